"""Ranks and cross-entropies of targets from the last hidden states, without the logits of the whole vocabulary (METHODS 9).

Logits are the largest tensor of a pass: written whole, they are read again from memory for every comparison and every sum. Here a part
of the vocabulary at a time is computed for a block of positions, compared and summed while it is in the cache, as kernels for a fused
linear cross-entropy do.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sepcap.models.blocks.unembedding import Unembedding

MISS = 2**31 - 1
"""Rank of a target if logits are not finite: outside every top-k, however few the classes."""

BLOCK = 512
"""Positions of a block on a CPU."""

PART = 1024
"""Tokens whose logits are computed at once on a CPU: with `BLOCK` positions, 2 MB in float32."""

AT_ONCE = 2**26
"""Logits that are computed at once on other devices: 256 MB in float32. There a block has the whole vocabulary."""


def ranks_and_losses(
    unembedding: Unembedding, hidden: Float[Tensor, "place d_model"], targets: Int[Tensor, " place"]
) -> tuple[Int[Tensor, " place"], Int[Tensor, " place"], Float[Tensor, " place"]]:
    """Rank of every target, the number of tokens tied with it, and its cross-entropy in nats: `rank_and_loss` of the logits.

    Args:
        unembedding: of the model.
        hidden: what it reads, at the places that are scored.
        targets: the right token at each place.
    """
    vocabulary = unembedding.vocabulary
    block, part = (BLOCK, PART) if hidden.device.type == "cpu" else (max(1, AT_ONCE // vocabulary), vocabulary)
    # in the order of their targets: then those of a block are in few parts of the vocabulary, see _of_block
    order = targets.argsort()
    scratch = hidden.new_empty(1 + (part < vocabulary), min(block, len(order)) * min(part, vocabulary), dtype=wide(hidden.dtype))
    found = [_of_block(unembedding, hidden[some], targets[some], part, scratch) for some in order.split(block)]
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=order.device)
    ranks, tied, losses = (torch.cat(columns)[back] for columns in zip(*found, strict=True))
    return ranks, tied, losses


def wide(dtype: torch.dtype) -> torch.dtype:
    """The precision in which logits are compared and summed."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _of_block(
    unembedding: Unembedding,
    hidden: Float[Tensor, "place d_model"],
    targets: Int[Tensor, " place"],
    part: int,
    scratch: Float[Tensor, "_ size"],
) -> tuple[Int[Tensor, " place"], Int[Tensor, " place"], Float[Tensor, " place"]]:
    starts = range(0, unembedding.vocabulary, part)
    half = hidden.dtype.itemsize == 2
    memory, flags = scratch[0], scratch[-1]  # one part is computed once, without a buffer

    def logits_from(start: int, memory: Tensor | None) -> Float[Tensor, "place part"]:
        shape = (len(hidden), min(part, unembedding.vocabulary - start))
        own = None if half or memory is None else memory[: shape[0] * shape[1]].view(shape)
        return unembedding.logits(hidden, slice(start, start + part), own).to(scratch.dtype)

    # a product of another shape may round differently, so a target is compared with the others as it is in the part that it belongs to
    of_target = targets.div(part, rounding_mode="floor")
    own_logits = torch.empty(len(hidden), 1, dtype=scratch.dtype, device=hidden.device)
    held: dict[int, Tensor] = {}
    for number in [0] if len(starts) == 1 else of_target.unique().tolist():
        held[number * part] = logits_from(number * part, None)
        at = (of_target == number).nonzero()[:, 0]
        own_logits[at] = held[number * part][at, targets[at] - number * part][:, None]
    ranks = torch.full_like(own_logits[:, 0], -1)
    tied = torch.zeros_like(ranks) if half else torch.ones_like(ranks)
    sums = []
    for start in starts:
        logits = held.pop(start) if start in held else logits_from(start, memory)
        compared = flags[: logits.numel()].view(logits.shape)
        # comparing into a float buffer: summing booleans is four times slower on a CPU, and floats count exactly to 2^24
        ranks += torch.ge(logits, own_logits, out=compared).sum(dim=1)
        if half:
            tied += torch.eq(logits, own_logits, out=compared).sum(dim=1)
        most = logits.amax(dim=1, keepdim=True).clamp_min(torch.finfo(logits.dtype).min)
        sums.append((_precise(most[:, 0]), _precise(logits.sub_(most).exp_().sum(dim=1))))
    most, powers = (torch.stack(column) for column in zip(*sums, strict=True))
    losses = torch.logsumexp(most + powers.log(), dim=0) - _precise(own_logits[:, 0])
    # NaN compares false with everything and would rank first
    broken = ~torch.isfinite(own_logits[:, 0]) | losses.isnan()
    return torch.where(broken, MISS, ranks.long()), torch.where(broken, 1, tied.long()), losses


def _precise(x: Tensor) -> Tensor:
    return x if x.device.type == "mps" else x.double()  # Apple's GPUs have no float64
