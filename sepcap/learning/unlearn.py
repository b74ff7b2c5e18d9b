"""Unlearning by gradients: negative preference optimisation, vectors of fine-tuning, and a count of the passes (METHODS 22)."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cross_entropy, logsigmoid

from sepcap.models.forward import call, device_of, measuring
from sepcap.statistics.collect import halving_batches
from sepcap.tasks.batches import Batch, TokenSample


def log_probabilities(logits: Float[Tensor, "batch pos out"], batch: Batch) -> Float[Tensor, "batch pos"]:
    """Log-probability in nats of the answer at every position that is asked, 0 at the others; in float32 or wider."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    answers = batch.answers.masked_fill(~batch.asked, -100).to(logits.device)
    return -cross_entropy(wide.transpose(1, 2), answers, reduction="none", ignore_index=-100)


@dataclass(frozen=True, eq=False)
class NegativePreference:
    """The loss of negative preference optimisation: −(2/β)·log σ(−β·log(π/π_ref)), its mean over rows.

    π is the probability that the model gives a row, the product over its predictions; π_ref that of the frozen reference. Its gradient is
    that of gradient ascent on the log-loss times 2π^β/(π^β + π_ref^β), which is 1 at the reference and goes to 0 with π.

    Attributes:
        beta: β, the inverse temperature; for β → 0 the loss is that of gradient ascent, plus a constant.
        reference: log-probability of every row of the sample under the reference, in nats.

    Source: Zhang et al. 2024 (arXiv:2404.05868), equation 3.

    >>> loss = NegativePreference(0.5, torch.tensor([-2.0]))
    >>> round(float(loss.of_rows(torch.tensor([-2.0]), [0])), 4)  # -(2/0.5)·log(1/2)
    2.7726
    """

    beta: float
    reference: Float[Tensor, " row"]

    def units(self, batch: Batch) -> int:
        """Number of rows."""
        return len(batch.inputs)

    def summed(self, logits: Float[Tensor, "batch pos out"], batch: Batch, rows: Sequence[int]) -> Float[Tensor, ""]:
        """Loss summed over rows."""
        return self.of_rows(log_probabilities(logits, batch).sum(-1), rows)

    def of_rows(self, found: Float[Tensor, " batch"], rows: Sequence[int]) -> Float[Tensor, ""]:
        """Loss summed over rows, from their log-probabilities."""
        ratio = found - self.reference[list(rows)].to(found)
        return -(2 / self.beta) * logsigmoid(-self.beta * ratio).sum()


def reference_of(model: Any, sample: TokenSample, batch_size: int) -> Float[Tensor, " row"]:
    """Log-probability of every row of a sample under the model as it is now, in nats."""

    @torch.inference_mode()
    def one_pass(size: int) -> Tensor:
        batches = (batch.to(device_of(model)) for batch in sample.batches(size))
        with measuring(model):
            return torch.cat([log_probabilities(call(model, batch.inputs, batch.mask), batch).sum(-1).cpu() for batch in batches])

    return halving_batches(one_pass, batch_size).clone()


class TaskVector:
    """The change of all weights by fine-tuning, which a scale adds to or subtracts from the weights before it.

    Source: Ilharco et al. 2023 (arXiv:2212.04089): forgetting by negation.

    Args:
        model: the model before fine-tuning; its weights are copied.
    """

    def __init__(self, model: Any) -> None:
        self.weights = list(dict.fromkeys(model.parameters()))
        self.before = [weight.detach().clone() for weight in self.weights]

    @torch.no_grad()
    def take(self) -> None:
        """Call after fine-tuning: the vector is the difference of the weights to those before."""
        self.vector = [weight - old for weight, old in zip(self.weights, self.before, strict=True)]

    @torch.no_grad()
    def subtract(self, scale: float) -> None:
        """Set the weights to those before minus `scale` times the vector; 0 restores their bits."""
        for weight, old, change in zip(self.weights, self.before, self.vector, strict=True):
            weight.copy_(old - scale * change if scale else old)


@dataclass
class Passes:
    """Tokens that passes over a model processed, padding included."""

    forward: int = 0
    backward: int = 0


@contextmanager
def counted(model: Any, into: Passes) -> Iterator[None]:
    """Add the tokens of every forward pass of a model, and of every backward pass through its logits."""

    def begun(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        into.forward += args[0].numel()

    def ended(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], logits: Any) -> None:
        if isinstance(logits, Tensor) and logits.requires_grad:
            logits.register_hook(lambda _: _add(into, args[0].numel()))

    handles = [model.register_forward_pre_hook(begun, with_kwargs=True), model.register_forward_hook(ended, with_kwargs=True)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _add(into: Passes, tokens: int) -> None:
    into.backward += tokens
