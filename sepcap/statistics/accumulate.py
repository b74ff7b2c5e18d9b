"""Sums of activations, block by block and layer by layer, for the moments of a site (METHODS 3)."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sepcap.statistics.gradients import GradientSums
from sepcap.statistics.histogram import HistogramCounter, check_count, gather_histogram
from sepcap.statistics.moments import SUMS, NeuronStatistics, between
from sepcap.statistics.replicates import Replicates

CHUNK = 256
"""Positions reduced at once on a CPU. A block of this many rows fits in the second-level cache, so each
pass over it is several times cheaper than a pass over a whole batch."""


@dataclass
class Accumulator:
    """Mutable sums of one site in one layer, filled inside a hook.

    `update` adds the kept positions of one batch; the batch itself is not stored.
    """

    neurons: tuple[int, ...]
    device: torch.device
    scratch: dict[tuple[int, torch.dtype], Tensor] = field(default_factory=dict)
    histogram: bool = False
    counter: HistogramCounter | None = field(init=False, default=None)
    sums: Float[Tensor, "5 neuron"] = field(init=False)
    low: Float[Tensor, " neuron"] = field(init=False)
    high: Float[Tensor, " neuron"] = field(init=False)
    count: int = 0

    def __post_init__(self) -> None:
        n = int(torch.Size(self.neurons).numel())
        self.sums = torch.zeros(len(SUMS), n, dtype=torch.float64, device=self.device)
        self.low = torch.full((n,), torch.inf, device=self.device)
        self.high = torch.full((n,), -torch.inf, device=self.device)
        if self.histogram:
            self.counter = HistogramCounter(n, self.device)

    @torch.no_grad()
    def update(self, z: Float[Tensor, "batch pos *neuron"], keep: Bool[Tensor, "batch pos"]) -> None:
        """Add the activations at the positions where `keep` is true."""
        z = z.detach().flatten(2)
        wide = z.dtype if z.dtype == torch.float64 else torch.float32
        if self.low.dtype != wide:
            self.low, self.high = self.low.to(wide), self.high.to(wide)
        on_cpu = z.device.type == "cpu"
        blocks = list(_blocks(z, keep)) if on_cpu else [z[keep]]
        # float64 sums of half-precision activations are exact, as are their squares in float32, and cost no extra time
        sum_dtype = wide if on_cpu and z.dtype.itemsize > 2 else torch.float64
        for block in blocks:
            self._add(block.to(wide), sum_dtype)
        if self.counter is not None:
            check_count(self.count)
            # after the whole batch is summed, so that bins are widened once per batch, not once per block
            self.counter.add(blocks, self.low, self.high)

    def _buffer(self, x: Float[Tensor, "n neuron"]) -> Float[Tensor, "n neuron"]:
        """Scratch memory for a block, shared by all layers of a pass: allocating it anew would cost more than the sums."""
        key = (x.shape[1], x.dtype)
        if key not in self.scratch or len(self.scratch[key]) < len(x):
            self.scratch[key] = torch.empty_like(x)
        return self.scratch[key][: len(x)]

    def _add(self, x: Float[Tensor, "n neuron"], sum_dtype: torch.dtype) -> None:
        if not len(x):
            return
        buffer, n = self._buffer(x), len(x)
        torch.gt(x, 0, out=buffer)
        self.sums[0] += buffer.sum(0, dtype=sum_dtype)
        torch.abs(x, out=buffer)
        absolute = buffer.sum(0, dtype=sum_dtype)
        self.sums[2] += absolute
        # the vectorised square root is forty times slower on zeros, which are frequent after ReLU. They are replaced by the
        # smallest normal number, whose root, 1e-19, is lost to rounding in any nonzero sum
        torch.sqrt(buffer.clamp_min_(torch.finfo(x.dtype).tiny), out=buffer)
        self.sums[3] += torch.where(absolute == 0, 0, buffer.sum(0, dtype=sum_dtype))
        total = x.sum(0, dtype=sum_dtype)
        pivot = (total / n).to(x.dtype)
        torch.sub(x, pivot, out=buffer)
        rest = buffer.sum(0, dtype=sum_dtype).double()
        torch.mul(buffer, buffer, out=buffer)
        deviation = (buffer.sum(0, dtype=sum_dtype).double() - rest.square() / n).clamp_min(0)
        if sum_dtype != torch.float64:
            total = pivot.double() * n + rest
        self.sums[4] += deviation + between(self.count, self.sums[1], n, total)
        self.sums[1] += total
        torch.minimum(self.low, x.amin(0), out=self.low)
        torch.maximum(self.high, x.amax(0), out=self.high)
        self.count += n


def _blocks(z: Float[Tensor, "batch pos neuron"], keep: Bool[Tensor, "batch pos"]) -> Iterator[Float[Tensor, "_ neuron"]]:
    """The kept positions row by row, at most `CHUNK` at once."""
    for row, kept in zip(z, keep, strict=True):
        # usually all positions except the first are kept: a slice needs no copy, a boolean index does
        yield from (row[1:] if bool(kept[1:].all()) and not bool(kept[0]) else row[kept]).split(CHUNK)


def gather(
    site: str,
    layers: list[Accumulator],
    gradients: GradientSums | None = None,
    write_norm: Tensor | None = None,
    replicates: Replicates | None = None,
) -> NeuronStatistics:
    """Combine the per-layer accumulators of one site and its other sums into one `NeuronStatistics`."""
    neurons = layers[0].neurons
    device = layers[0].device

    def stack(parts: list[Tensor]) -> Tensor:
        return torch.stack([p.to(device).view(neurons) for p in parts])

    sums = {name: stack([a.sums[i] for a in layers]) for i, name in enumerate(SUMS)}
    low, high = stack([a.low for a in layers]), stack([a.high for a in layers])
    counters = [a.counter for a in layers if a.counter is not None]
    histogram = gather_histogram(counters, low, high) if counters else None
    norm = None if write_norm is None else write_norm.to(device)
    return NeuronStatistics(site, layers[0].count, sums, low, high, histogram, gradients, norm, replicates)
