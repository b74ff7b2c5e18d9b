"""Positions at which a model's first choice is right, to which statistics can be restricted (METHODS 3; [SEP] 4.3.3)."""

from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from sepcap.models.devices import device_of
from sepcap.models.forward import logits_of, measuring, output_in_place
from sepcap.progress import progress
from sepcap.tasks.batches import Batch, TokenSample


def right_in(model: Any, sample: TokenSample, batch_size: int, *, quiet: bool = False) -> Bool[Tensor, "row pos"]:
    """Whether the prediction made at every position of a sample is right; see `sepcap.correct_positions`."""
    parts = []
    bar = progress(total=sample.tokens, desc=f"predict {sample.task}", unit="tok", unit_scale=True, quiet=quiet)
    with measuring(model), output_in_place(model), bar:
        for batch in sample.batches(batch_size):
            parts.append(_right(model, batch.to(device_of(model))).cpu())
            bar.update(batch.size)
    # batches are padded to their own longest row
    width = max(part.shape[1] for part in parts)
    return torch.cat([torch.nn.functional.pad(part, (0, width - part.shape[1])) for part in parts])


def check_positions(right: Bool[Tensor, "row pos"], sample: TokenSample) -> None:
    """Check that the positions are of this sample, and that there are some.

    Raises:
        ValueError: they are not, or nothing is predicted right.
    """
    longest = max(map(len, sample.rows))
    if tuple(right.shape) != (len(sample.rows), longest):
        raise ValueError(
            f"positions: {list(right.shape)}, and the tokens of {sample.task!r} are {[len(sample.rows), longest]}; give those that "
            "sepcap.correct_positions found for the same task, tokens, context and seed"
        )
    if not bool(right.any()):
        raise ValueError(
            f"positions='correct': the model predicts none of {sample.tokens:,} tokens of {sample.task!r} right, so no position is left; "
            "give positions='all'"
        )


@torch.inference_mode()
def _right(model: Any, batch: Batch) -> Bool[Tensor, "batch pos"]:
    logits = logits_of(model, batch.inputs, batch.mask)
    answers, asked = (x.to(logits.device) for x in (batch.answers, batch.asked))
    # row by row: a comparison of all logits at once would double the memory. As in evaluation, a tie is not right, and neither is NaN
    targets = logits.gather(2, answers[..., None])
    better = torch.stack([(row >= target).sum(-1) + row.isnan().any(-1) for row, target in zip(logits, targets, strict=True)])
    return asked & (better == 1) & torch.isfinite(targets[..., 0])
