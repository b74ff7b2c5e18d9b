"""How well an order separates two tasks: accuracies with growing shares of it masked, and their area (METHODS 11, 21)."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sepcap.evaluation.next_token import evaluate_batch, most_frequent_targets
from sepcap.evaluation.result import ratio
from sepcap.evaluation.trajectory import area
from sepcap.learning.order import Ranked, Theta, kept, masking_hooks
from sepcap.models.forward import device_of, measuring, with_hooks
from sepcap.statistics.collect import halving_batches
from sepcap.tasks.batches import TokenSample

ROLES = ("forget", "retain")

Rows = dict[str, np.ndarray]
"""Role -> evaluation sums of every row at every step [step, row, count], in the order of `COUNTS`."""


def masked_rows(
    model: Any,
    ranked: Sequence[Ranked],
    theta: Theta,
    samples: Mapping[str, TokenSample],
    shares: Sequence[Mapping[str, float]],
    *,
    constants: Mapping[str, Tensor] | None,
    batch_size: int,
    unpruned: Rows | None = None,
    relearned: Callable[[Theta], AbstractContextManager[Any]] | None = None,
) -> Rows:
    """Evaluation sums of every row, of the whole model and with each of some shares of the order masked.

    Args:
        model: a hooked model.
        ranked: what is in order.
        theta: the order.
        samples: role -> texts.
        shares: per step, key -> share that is masked.
        constants: see `masking_hooks`.
        batch_size: rows per pass; halved, with a warning, when memory runs out.
        unpruned: sums of the whole model, if they are known from another order.
        relearned: given the masks of a step, the model after simulated fine-tuning, on which forget is then evaluated.
    """
    # images have no frequent targets
    frequent = {
        role: torch.tensor(list(most_frequent_targets(sample)), dtype=torch.long, device=device_of(model))
        for role, sample in samples.items()
    }

    def one_pass(size: int) -> Rows:
        found: dict[str, list[np.ndarray]] = {role: [] if unpruned is None else [unpruned[role][0]] for role in samples}
        with measuring(model):
            for step in [*([{}] if unpruned is None else []), *shares]:
                masks = {one.key: kept(theta[one.key], one.count(step.get(one.key, 0))) for one in ranked}
                with with_hooks(model, masking_hooks(ranked, masks, constants) if step else []):
                    for role, sample in samples.items():
                        tuned = relearned(masks) if relearned is not None and step and role == "forget" else nullcontext()
                        with tuned:
                            sums = [evaluate_batch(model, b.to(device_of(model)), frequent[role]) for b in sample.batches(size)]
                        found[role].append(torch.cat(sums).cpu().numpy())
        return {role: np.stack(of_steps) for role, of_steps in found.items()}

    return halving_batches(one_pass, batch_size)


def area_of(rows: Rows, metric: str = "top1") -> float:
    """Normalised area of the trajectory.

    Raises:
        ValueError: the whole model has no hit on a task.
    """
    values = [ratio(rows[role], metric) for role in ROLES]
    for role, value in zip(ROLES, values, strict=True):
        if value[0] == 0:
            raise ValueError(f"{metric} of the unpruned model is 0 on the {role} task: there is no accuracy to lose")
    return float(area(*values))
