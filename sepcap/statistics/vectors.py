"""Vectors of size d_model at a few positions of a few texts, the only activations that geometry stores (METHODS 13)."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sepcap.models.blocks.places import Look
from sepcap.models.forward import Hook, device_of, measuring, run_hooks
from sepcap.progress import progress
from sepcap.statistics.collect import BATCH_SIZE, halving_batches


def vectors_at(
    model: Any,
    rows: Int[np.ndarray, "text pos"],
    hooks_for: Callable[[Look], list[Hook]],
    positions: Sequence[int],
    *,
    dims: Sequence[int] | None = None,
    batch_size: int = BATCH_SIZE,
) -> Float[Tensor, "place text position dim"]:
    """Vectors at some positions of every text; everything else is dropped inside the hook.

    Args:
        model: a hooked model.
        rows: token ids, as in `LabelledTexts.rows`.
        hooks_for: makes the hooks that call a function with (number of the place, vectors); places are ordered by their numbers.
        positions: positions to keep.
        dims: dimensions of the vectors to keep; default is all.
        batch_size: texts per pass; halved, with a warning, when memory runs out.

    Returns:
        float32 on the CPU: len(places) · texts · positions · dims · 4 bytes in memory, whatever the length of the texts.

    Raises:
        FloatingPointError: NaN or infinite values.
    """

    def one_pass(size: int) -> Tensor:
        kept: dict[int, list[Tensor]] = {}
        bar = progress(total=len(rows), desc="run texts", unit="text")
        with measuring(model), bar:
            for start in range(0, len(rows), size):
                batch = torch.from_numpy(rows[start : start + size]).to(device_of(model))
                run_hooks(model, batch, hooks_for(partial(_keep, kept, list(positions), dims)))
                bar.update(len(batch))
        return torch.stack([torch.cat(kept[place]) for place in sorted(kept)])

    found = halving_batches(one_pass, batch_size)
    finite = found.isfinite().flatten(1).all(dim=1)
    if not bool(finite.all()):
        raise FloatingPointError(
            f"the vectors of layer {int(finite.int().argmin())} are NaN or infinite. Usual causes: NaN or infinite weights, "
            "or overflow in float16; load the model with dtype='float32' or 'bfloat16'."
        )
    return found


def _keep(
    kept: dict[int, list[Tensor]],
    positions: list[int],
    dims: Sequence[int] | None,
    place: int,
    vectors: Float[Tensor, "batch pos d_model"],
) -> None:
    chosen = vectors[:, positions]
    kept.setdefault(place, []).append((chosen if dims is None else chosen[..., list(dims)]).detach().float().cpu())
