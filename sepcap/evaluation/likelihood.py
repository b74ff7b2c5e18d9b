"""Log-probabilities of given continuations after given prompts, with teacher forcing."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from sepcap.models.forward import device_of, logits_of, measuring
from sepcap.statistics.collect import BATCH_SIZE, halving_batches
from sepcap.tasks.batches import pad


def log_likelihoods(
    model: Any,
    prompts: Sequence[Sequence[int]],
    continuations: Sequence[Sequence[int]],
    *,
    batch_size: int = BATCH_SIZE,
    inside: Callable[[list[int]], AbstractContextManager[Any]] | None = None,
) -> Float[np.ndarray, "row pos"]:
    """Log-probability of every token of a continuation given the prompt and the true tokens before it, in nats.

    Args:
        model: a hooked causal language model.
        prompts: token ids, BOS included, at least one each.
        continuations: token ids, at least one each.
        batch_size: rows per pass; halved, with a warning, when memory runs out.
        inside: returns a context manager for the pass over the rows with these numbers.

    Returns:
        Log-probabilities; NaN after the end of a continuation.

    Example:
        >>> log_likelihoods(model, [[0, 5]], [[6, 7]]).sum()  # doctest: +SKIP
    """
    rows = [np.asarray([*prompt, *after], dtype=np.int64) for prompt, after in zip(prompts, continuations, strict=True)]
    found = np.full((len(rows), max(map(len, continuations), default=1)), np.nan)

    def one_pass(size: int) -> None:
        with measuring(model):
            for chosen in (list(range(len(rows))[first : first + size]) for first in range(0, len(rows), size)):
                # padded on the right: under causal attention no token attends to it
                ids, _ = pad([rows[i] for i in chosen], 0)
                with nullcontext() if inside is None else inside(chosen):
                    logits = logits_of(model, ids.to(device_of(model)))
                for i, of_row in zip(chosen, logits, strict=True):
                    # the token at position p is predicted at p − 1
                    predicting = of_row[len(prompts[i]) - 1 : len(rows[i]) - 1].float()
                    true = torch.tensor(continuations[i], device=predicting.device)
                    losses = torch.nn.functional.cross_entropy(predicting, true, reduction="none")
                    found[i, : len(true)] = -losses.double().cpu().numpy()

    halving_batches(one_pass, batch_size)
    return found
