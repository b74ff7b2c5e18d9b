"""Simulated fine-tuning: the weights of a masked model after a few steps on forget texts, and restored (METHODS 21)."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sepcap.learning.finetune import OPTIMISERS, Term, drawn, gradients_of
from sepcap.learning.fitting import Fitting
from sepcap.learning.order import Ranked, Theta, masking_hooks
from sepcap.models.forward import measuring, with_hooks
from sepcap.models.weights import EveryWeight
from sepcap.tasks.batches import TokenSample


@dataclass(frozen=True)
class Relearned:
    """A model with masked neurons, as it is after some steps of AdamW on forget texts.

    Attributes:
        model: a hooked model.
        ranked: what the masks are of.
        sample: forget texts.
        how: number, tokens and size of the steps.
        constants: see `sepcap.learning.order.masking_hooks`.
        batch_size: rows per pass.
    """

    model: Any
    ranked: Sequence[Ranked]
    sample: TokenSample
    how: Fitting
    constants: Mapping[str, Tensor] | None
    batch_size: int

    @contextmanager
    def at(self, masks: Theta, number: int) -> Iterator[int]:
        """The weights after fine-tuning with some neurons masked; they have their bits back afterwards.

        Masked neurons have no gradient, as deleted ones have none: fine-tuning uses the others.

        Args:
            masks: key -> 1 for the kept neurons, or heads, and 0 for the masked.
            number: the texts of a number are drawn after those of the one before.

        Yields:
            Tokens that the passes processed forward, and as many backward, padding included.
        """
        if not self.how.simulated:
            yield 0
            return
        saved, tokens = EveryWeight(self.model), 0
        weights = list(dict.fromkeys(self.model.parameters()))
        n = len(self.sample.rows)
        each = min(n, max(1, round(self.how.step_tokens * n / self.sample.tokens)))
        try:
            for weight in weights:
                weight.requires_grad_(True)
            adam = OPTIMISERS["adamw"](weights, self.how.lasting_lr)
            fixed = {key: mask.detach() for key, mask in masks.items()}
            for step in range(number * self.how.simulated, (number + 1) * self.how.simulated):
                # an order of its own: the loss that is taken afterwards is of other rows
                rows = drawn(n, each, step, (self.how.seed, 2))
                with torch.enable_grad(), measuring(self.model), with_hooks(self.model, masking_hooks(self.ranked, fixed, self.constants)):
                    loss = gradients_of(self.model, [(Term(self.sample), rows)], weights, self.batch_size)
                if not np.isfinite(loss):
                    raise FloatingPointError(
                        f"lasting objective: the loss of simulated fine-tuning is NaN or infinite at lasting_lr={self.how.lasting_lr:g}; "
                        "give a smaller one, or load the model with dtype='float32'"
                    )
                adam.step()
                tokens += sum(batch.real.numel() for batch in self.sample.take(rows).batches(self.batch_size))
            for weight in weights:
                weight.requires_grad_(False)
                weight.grad = None
            yield tokens
        finally:
            saved.restore()
