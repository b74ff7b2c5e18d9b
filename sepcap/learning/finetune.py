"""Fine-tuning on the texts of a task, measured after given numbers of tokens (METHODS 22)."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sepcap.errors import missing_extra
from sepcap.learning.fitting import Tuning
from sepcap.models.forward import call, device_of, measuring
from sepcap.models.kinds import check_wraps, inner
from sepcap.progress import progress
from sepcap.statistics.backward import check_differentiable, summed_loss
from sepcap.statistics.collect import halving_batches
from sepcap.tasks.batches import TokenSample


def fine_tuned(
    model: Any,
    sample: TokenSample,
    how: Tuning,
    checkpoints: Sequence[int],
    *,
    parameters: Sequence[Tensor] | None = None,
    after_step: Callable[[], Any] | None = None,
    desc: str = "fine-tune",
) -> Iterator[int]:
    """Fine-tune a model in place by AdamW, and stop at every checkpoint to let the caller measure.

    The model stays in evaluation mode, without dropout. Rows are read in random order, and again in another one. The caller restores the
    weights, see `sepcap.models.weights.EveryWeight`.

    Args:
        model: a hooked model; its weights are changed.
        sample: texts to fine-tune on.
        how: step size and number, and the seed of the order of the texts.
        checkpoints: numbers of tokens seen, in increasing order; a step is whole, so that a few more can have been seen.
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
    chosen = list(dict.fromkeys(model.parameters() if parameters is None else parameters))
    n = len(sample.rows)
    each = min(n, max(1, round(how.step_tokens * n / sample.tokens)))
    with torch.inference_mode(False):
        for weight in chosen:
            weight.requires_grad_(True)
        adam = torch.optim.AdamW(chosen, lr=how.lr, weight_decay=0.0, foreach=False)
        seen = step = 0
        with progress(total=checkpoints[-1], desc=desc, unit="tok", unit_scale=True) as bar:
            for target in checkpoints:
                while seen < target:
                    part = sample.take(_drawn(n, each, step, how.seed))
                    with torch.enable_grad(), measuring(model):
                        loss = halving_batches(partial(_gradients, model, part, chosen), how.batch_size)
                    if not np.isfinite(loss):
                        raise FloatingPointError(
                            f"fine-tuning: the loss of step {step + 1} is NaN or infinite at lr={how.lr:g}; give a smaller lr, or load the "
                            "model with dtype='float32'"
                        )
                    adam.step()
                    if after_step is not None:
                        after_step()
                    seen, step = seen + part.tokens, step + 1
                    bar.update(part.tokens)
                yield seen


def _gradients(model: Any, part: TokenSample, chosen: Sequence[Tensor], batch_size: int) -> float:
    """Set the gradients of the mean loss of some rows, and return that loss in nats."""
    for weight in chosen:
        weight.grad = None
    batches = [batch.to(device_of(model)) for batch in part.batches(batch_size)]
    targets = sum(int(batch.asked.sum()) for batch in batches)
    total = 0.0
    for batch in batches:
        loss = summed_loss(call(model, batch.inputs, batch.mask), batch) / targets
        loss.backward()
        total += float(loss.detach())
    return total


def _drawn(n: int, each: int, step: int, seed: int) -> list[int]:
    """Numbers of the rows of a step: all rows in random order, then in another one, so that every row is used equally often."""
    rows = []
    for number in range(step * each, (step + 1) * each):
        epoch, place = divmod(number, n)
        rows.append(int(np.random.default_rng([seed, epoch]).permutation(n)[place]))
    return rows


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
    trained = [(weight, weight.requires_grad) for weight in dict.fromkeys(model.parameters())]
    drawn = torch.random.fork_rng(devices=range(torch.cuda.device_count())) if torch.cuda.is_available() else torch.random.fork_rng()
    try:
        with drawn:
            torch.manual_seed(seed)
            inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules=list(layers)), hf_model)
        yield [weight for name, weight in hf_model.named_parameters() if "lora_" in name]
    finally:
        for name, module in layers.items():
            above, _, last = name.rpartition(".")
            hf_model.get_submodule(above)._modules[last] = module
        for weight, wanted in trained:
            weight.requires_grad_(wanted)


def _is_linear(module: Any) -> bool:
    return isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D"


def adapters(model: Any, how: Tuning, rank: int | None) -> Any:
    """What is trained: LoRA adapters of a rank, or, without one, None for all weights."""
    return nullcontext() if rank is None else low_rank(model, rank, how.seed)
