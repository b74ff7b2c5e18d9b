"""Training on the texts of tasks, measured after given numbers of tokens (METHODS 22)."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sepcap.errors import missing_extra
from sepcap.learning.fitting import Tuning
from sepcap.models.forward import call, device_of, measuring
from sepcap.models.kinds import check_wraps, inner
from sepcap.progress import progress
from sepcap.statistics.backward import check_differentiable, summed_loss
from sepcap.statistics.collect import halving_batches
from sepcap.tasks.batches import Batch, TokenSample


@runtime_checkable
class Loss(Protocol):
    """A loss that is a mean over units, which are predictions or rows."""

    def units(self, batch: Batch) -> int:
        """Number of units of a batch."""
        ...

    def summed(self, logits: Float[Tensor, "batch pos out"], batch: Batch, rows: Sequence[int]) -> Float[Tensor, ""]:
        """Sum over the units of a batch, which consists of the rows of the sample with these numbers."""
        ...


class CrossEntropy:
    """Mean cross-entropy of the predictions, in nats."""

    def units(self, batch: Batch) -> int:
        """Number of predictions."""
        return int(batch.asked.sum())

    def summed(self, logits: Float[Tensor, "batch ... out"], batch: Batch, rows: Sequence[int]) -> Float[Tensor, ""]:
        """Summed cross-entropy of the predictions."""
        return summed_loss(logits, batch)


@dataclass(frozen=True, eq=False)
class Term:
    """One term of the loss that training minimises.

    Attributes:
        sample: texts; every step reads some of their rows.
        weight: factor of the term; a negative one raises the loss.
        loss: loss of the rows.
    """

    sample: TokenSample
    weight: float = 1.0
    loss: Loss = field(default_factory=CrossEntropy)


def fine_tuned(
    model: Any,
    terms: TokenSample | Sequence[Term],
    how: Tuning,
    checkpoints: Sequence[int],
    *,
    parameters: Sequence[Tensor] | None = None,
    after_step: Callable[[], Any] | None = None,
    desc: str = "fine-tune",
) -> Iterator[int]:
    """Train a model in place, and stop at every checkpoint to let the caller measure.

    The loss of a step is the weighted sum of its terms, each a mean over the rows that the step reads of its sample. The model stays in
    evaluation mode, without dropout. Rows are read in random order, and again in another one. The caller restores the weights, see
    `sepcap.models.weights.EveryWeight`.

    Args:
        model: a hooked model; its weights are changed.
        terms: the terms of the loss; a sample for its cross-entropy.
        how: optimiser, step size and tokens per term and step, and the seed of the order of the texts.
        checkpoints: numbers of tokens seen, of all terms, in increasing order; a step is whole, so that a few more can have been seen.
        parameters: what is trained; default all weights.
        after_step: called after every step, for example to hold some weights at 0.
        desc: name of the progress bar.

    Yields:
        Number of tokens seen so far, once per checkpoint.

    Raises:
        ValueError: a model without gradients.
        FloatingPointError: a loss that is NaN or infinite.
    """
    check_differentiable(model)
    terms = [Term(terms)] if isinstance(terms, TokenSample) else terms
    chosen = list(dict.fromkeys(model.parameters() if parameters is None else parameters))
    each = [min(n, max(1, round(how.step_tokens * n / term.sample.tokens))) for term in terms for n in [len(term.sample.rows)]]
    # not around the yields: the mode of the caller would change, at a time that the garbage collector chooses if the generator is dropped
    with torch.inference_mode(False):
        for weight in chosen:
            weight.requires_grad_(True)
        optimiser = OPTIMISERS[how.optimiser](chosen, how.lr)
    seen = step = 0
    with progress(total=checkpoints[-1], desc=desc, unit="tok", unit_scale=True) as bar:
        for target in checkpoints:
            while seen < target:
                rows = [drawn(len(term.sample.rows), n, step, how.seed) for term, n in zip(terms, each, strict=True)]
                with torch.inference_mode(False):
                    with torch.enable_grad(), measuring(model):
                        loss = halving_batches(partial(gradients_of, model, list(zip(terms, rows, strict=True)), chosen), how.batch_size)
                    if not np.isfinite(loss):
                        raise FloatingPointError(
                            f"{desc}: the loss of step {step + 1} is NaN or infinite at lr={how.lr:g}; give a smaller lr, or load the "
                            "model with dtype='float32'"
                        )
                    optimiser.step()
                    if after_step is not None:
                        after_step()
                tokens = sum(term.sample.take(of_term).tokens for term, of_term in zip(terms, rows, strict=True))
                seen, step = seen + tokens, step + 1
                bar.update(tokens)
            yield seen


OPTIMISERS: dict[str, Callable[[Sequence[Tensor], float], torch.optim.Optimizer]] = {
    "adamw": lambda chosen, lr: torch.optim.AdamW(chosen, lr=lr, weight_decay=0.0, foreach=False),
    "sgd": lambda chosen, lr: torch.optim.SGD(chosen, lr=lr, foreach=False),
}
"""Name of an optimiser -> it, given the weights and the step size; without weight decay or momentum."""


def gradients_of(model: Any, parts: Sequence[tuple[Term, Sequence[int]]], chosen: Sequence[Tensor], batch_size: int) -> float:
    """Set the gradients of the weighted sum of the mean losses of some rows, and return that sum.

    Args:
        model: a hooked model, prepared by `measuring`.
        parts: terms with the numbers of the rows to read of each.
        chosen: the weights.
        batch_size: rows per pass.
    """
    for weight in chosen:
        weight.grad = None
    total = 0.0
    for term, rows in parts:
        batches = [batch.to(device_of(model)) for batch in term.sample.take(rows).batches(batch_size)]
        units = sum(map(term.loss.units, batches))
        for i, batch in enumerate(batches):
            summed = term.loss.summed(call(model, batch.inputs, batch.mask), batch, rows[i * batch_size : (i + 1) * batch_size])
            loss = term.weight * summed / units
            loss.backward()
            total += float(loss.detach())
    return total


def drawn(n: int, each: int, step: int, seed: int | tuple[int, ...]) -> list[int]:
    """Numbers of the rows of a step: all n rows in random order, then in another one, so that every row is used equally often."""
    own, rows = (seed,) if isinstance(seed, int) else seed, []
    for number in range(step * each, (step + 1) * each):
        epoch, place = divmod(number, n)
        rows.append(int(_order(n, *own, epoch)[place]))
    return rows


@lru_cache(maxsize=4)
def _order(n: int, *seed: int) -> np.ndarray:
    return np.random.default_rng(seed).permutation(n)


@contextmanager
def low_rank(model: Any, rank: int, seed: int) -> Iterator[list[Tensor]]:
    """Add LoRA adapters of peft to every linear layer of the blocks; they are gone afterwards.

    Args:
        model: a bridge.
        rank: of every adapter; their scale is alpha / rank = 2.
        seed: of their random start.

    Yields:
        The weights of the adapters.

    Raises:
        ImportError: peft is not installed.
        ValueError: no linear layer.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise missing_extra("peft", "certificate", "fine-tuning by LoRA") from error
    check_wraps(model, "fine-tuning by LoRA")
    hf_model = inner(model)
    inside = {id(module) for module in model.blocks.modules()}
    layers = {name: module for name, module in hf_model.named_modules() if id(module) in inside and _is_linear(module)}
    if not layers:
        raise ValueError("fine-tuning by LoRA: the blocks of this model have no linear layers")
    had = getattr(hf_model, "peft_config", None)
    trained = [(weight, weight.requires_grad) for weight in dict.fromkeys(model.parameters())]
    forked = torch.random.fork_rng(devices=range(torch.cuda.device_count())) if torch.cuda.is_available() else torch.random.fork_rng()
    try:
        with forked, torch.inference_mode(False):  # the adapters are trained
            torch.manual_seed(seed)
            inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules=list(layers)), hf_model)
        yield [weight for name, weight in hf_model.named_parameters() if "lora_" in name]
    finally:
        for name, module in layers.items():
            above, _, last = name.rpartition(".")
            hf_model.get_submodule(above)._modules[last] = module
        if had is None and hasattr(hf_model, "peft_config"):
            del hf_model.peft_config
        for weight, wanted in trained:
            weight.requires_grad_(wanted)


def _is_linear(module: Any) -> bool:
    return isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D"


def adapters(model: Any, how: Tuning, rank: int | None) -> Any:
    """What is trained: LoRA adapters of a rank, or, without one, None for all weights."""
    return nullcontext() if rank is None else low_rank(model, rank, how.seed)
