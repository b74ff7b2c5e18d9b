"""Streamed, mergeable histograms of activations: peak, median, quantiles and densities (METHODS 3, 8).

Every neuron has its own bins of equal width. The width is a power of two, and all edges are multiples of it. When an activation
falls outside the bins, neighbouring bins are merged in pairs, exactly, until it fits. The width depends only on the smallest and
the largest activation, so a histogram does not depend on the order of the activations: merged shards have the counts of one pass,
bit for bit.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sepcap.checks import ANY, checked

BINS = 1024
"""Number of bins per neuron, a power of two. The activations span at least BINS/2 − 1 of them, so a bin is narrower than range/510
(or has the exponent `NARROWEST`)."""

PEAK_BINS = 100
"""Number of bins over a neuron's own [min, max]; the fullest is its peak ([PEAK], METHODS 8)."""

PAD = 16
"""Unused entries after each neuron's bins while counting. With a power of two as stride, the same bin of all neurons would
map to the same few cache lines, and counting would take three times as long."""

COLUMNS = 64
"""Neurons counted at once on a CPU: the bins of this many fit in the second-level cache while a batch is counted."""

NARROWEST = -120
"""Smallest exponent of a bin width, about 1e-36: the inverse of the width must be a normal float32. Activations closer
together than that are counted as equal."""

RESOLUTION = 41
"""Bins are at least 2^-RESOLUTION times the largest activation wide, so that bin indices are exact. float32 never reaches this limit."""

MOST = 2**31 - 1
"""Positions that an int32 count can hold."""


def check_count(count: int) -> None:
    """Raise if there are more positions than can be counted."""
    if count > MOST:
        raise OverflowError(f"histograms count at most {MOST:,} positions, not {count:,}: give fewer tokens")


class Grid(NamedTuple):
    """Bin i of a neuron is [(start + i)·2^exponent, (start + i + 1)·2^exponent)."""

    exponent: Int[Tensor, "*neuron"]
    start: Int[Tensor, "*neuron"]


def power_of_two(exponent: Int[Tensor, "*neuron"]) -> Float[Tensor, "*neuron"]:
    """Exact 2^exponent in float64, by writing the exponent bits of the number."""
    return ((exponent.long() + 1023) << 52).view(torch.float64)


def grid_of(low: Float[Tensor, "*neuron"], high: Float[Tensor, "*neuron"], bins: int = BINS) -> Grid:
    """Grid of the narrowest bins such that `bins` of them cover [low, high], starting with the bin of `low`.

    A wider interval never has narrower bins. Neurons without activations (low > high) get the grid of a constant zero.
    """
    low, high = (torch.where(low <= high, x, 0).double() for x in (low, high))
    reach = high - low
    largest = torch.maximum(low.abs(), high.abs())
    # reach = m·2^e with m in [½, 1): it is bins/2 to bins widths of 2^e / bins
    exponent = torch.where(reach > 0, torch.frexp(reach).exponent.long() - (bins.bit_length() - 1), NARROWEST)
    finest = torch.where(largest > 0, torch.frexp(largest).exponent.long() - RESOLUTION, NARROWEST)
    exponent = torch.maximum(exponent, finest).clamp_min(NARROWEST)
    # if low is near the end of its bin, one more bin is needed
    first, last = (torch.floor(x * power_of_two(-exponent)) for x in (low, high))
    exponent = exponent + (last - first >= bins)
    return Grid(exponent, torch.floor(low * power_of_two(-exponent)).long())


def regrid(counts: Int[Tensor, "neuron bin"], old: Grid, new: Grid, bins: int = BINS) -> Int[Tensor, "neuron {bins}"]:
    """The same counts in equal or wider bins that cover all counted values: whole bins are added, none is split."""
    held = torch.arange(counts.shape[1], device=counts.device)
    steps = (new.exponent - old.exponent).clamp_max(62)  # larger shifts are undefined and would change nothing
    place = ((old.start[:, None] + held) >> steps[:, None]) - new.start[:, None]
    # only empty bins, outside the data, are clamped
    return counts.new_zeros(len(counts), bins).scatter_add_(1, place.clamp_(0, bins - 1), counts)


@dataclass(frozen=True, eq=False)
class Histogram:
    """Histograms of all neurons of a site.

    Attributes:
        counts: positions per bin, int32.
        exponent, start: bin i of a neuron is [(start + i)·2^exponent, (start + i + 1)·2^exponent).
        low, high: smallest and largest activation.

    When a bin is split, its positions are spread evenly over its part of [low, high], with one exception: a bin with more
    than twice the positions of its two neighbours together is assumed to contain a single value, its lower end. Such bins
    contain the zeros of a ReLU, the activations of a constant neuron and those of coarse dtypes (bfloat16).
    """

    counts: Int[Tensor, "layer *neuron bin"]
    exponent: Int[Tensor, "layer *neuron"]
    start: Int[Tensor, "layer *neuron"]
    low: Float[Tensor, "layer *neuron"]
    high: Float[Tensor, "layer *neuron"]

    @property
    def width(self) -> Float[Tensor, "layer *neuron"]:
        """Bin width of every neuron, float64."""
        return power_of_two(self.exponent)

    def layers(self) -> Iterator["Layer"]:
        """Yield one flattened layer at a time: float64 cumulative counts of a whole site would need gigabytes."""
        for layer in range(len(self.counts)):
            yield self.part(layer, slice(None))

    @checked(layer=ANY)
    def part(self, layer: int, neurons: slice) -> "Layer":
        """Some neurons of one layer, flattened."""
        flat = (x[layer].reshape(-1)[neurons] for x in (self.exponent, self.start, self.low, self.high))
        return Layer(self.counts[layer].flatten(0, -2)[neurons], *flat)

    def peak(self) -> Float[Tensor, "layer *neuron"]:
        """Centre of the fullest of 100 equal bins over [low, high]; the lowest in case of ties."""
        return torch.stack([layer.peak() for layer in self.layers()]).view_as(self.low)

    @checked()
    def quantile(self, q: float) -> Float[Tensor, "layer *neuron"]:
        """The activation of rank q·(N − 1), counted from 0 and interpolated between neighbours, to within one bin."""
        return torch.stack([layer.quantile(q) for layer in self.layers()]).view_as(self.low)

    @checked(layer=ANY)
    def density(self, layer: int, index: tuple[int, ...], edges: np.ndarray) -> np.ndarray:
        """Share of a neuron's positions in each of the bins between `edges`.

        Args:
            layer: which layer.
            index: (neuron,) for mlp, (head, dimension) for attention.
            edges: increasing bin edges in units of the activation; bins include their lower edge, the last bin both.

        Returns:
            One share per bin, len(edges) − 1 of them; they add up to 1 when the edges span [low, high].
        """
        if edges.ndim != 1 or len(edges) < 2 or not bool((np.diff(edges) > 0).all()):
            raise ValueError(f"edges={edges!r}: give at least two increasing numbers")
        shape = tuple(self.low.shape)
        if len(index) != len(shape) - 1 or not all(-n <= i < n for i, n in zip((layer, *index), shape, strict=True)):
            raise IndexError(f"layer={layer}, index={index}: this site has neurons {list(shape)}")
        neuron = int(np.ravel_multi_index([i % n for i, n in zip(index, shape[1:], strict=True)], shape[1:]))
        at = np.append(edges[:-1], np.nextafter(edges[-1], np.inf))
        of = self.part(layer, slice(neuron, neuron + 1))
        below = of.below(torch.from_numpy(at.astype(np.float64)).to(self.low.device)[None])[0].cpu().numpy()
        return np.diff(below) / max(1, int(of.counts.sum()))

    def merge(self, other: "Histogram") -> "Histogram":
        """Histograms of both datasets together, exact and independent of the order."""
        other = other.to(self.low.device)
        low, high = torch.minimum(self.low, other.low), torch.maximum(self.high, other.high)
        merged = grid_of(low, high)
        layers = zip(self.layers(), other.layers(), map(Grid, merged.exponent.flatten(1), merged.start.flatten(1)), strict=True)
        counts = torch.stack([regrid(a.counts, a.grid, new) + regrid(b.counts, b.grid, new) for a, b, new in layers])
        return Histogram(counts.view_as(self.counts), *merged, low, high)

    @checked()
    def to(self, device: str | torch.device) -> "Histogram":
        """The same histograms on another device."""
        return Histogram(*(x.to(device) for x in (self.counts, self.exponent, self.start, self.low, self.high)))

    def __repr__(self) -> str:
        return f"Histogram({list(self.low.shape)}, {self.counts.shape[-1]:,} bins each)"


class Layer(NamedTuple):
    """Histograms of the neurons of one layer, flattened; see `Histogram`."""

    counts: Int[Tensor, "neuron bin"]
    exponent: Int[Tensor, " neuron"]
    start: Int[Tensor, " neuron"]
    low: Float[Tensor, " neuron"]
    high: Float[Tensor, " neuron"]

    @property
    def grid(self) -> Grid:
        """Grid of the bins."""
        return Grid(self.exponent, self.start)

    def _spread(self, bins: Int[Tensor, "neuron point"]) -> tuple[Tensor, Tensor]:
        """Lower end and extent of the values in those bins; the extent of a single value is 0."""
        width, low, high = (x.double()[:, None] for x in (power_of_two(self.exponent), self.low, self.high))
        lower = (self.start[:, None] + bins) * width
        extent = torch.minimum(lower + width, high) - torch.maximum(lower, low)
        sides = torch.nn.functional.pad(self.counts, (1, 1)).long()
        neighbours = sides.gather(1, bins) + sides.gather(1, bins + 2)
        return torch.maximum(lower, low), torch.where(self.counts.gather(1, bins) > 2 * neighbours, 0, extent)

    def below(self, at: Float[Tensor, "#neuron point"]) -> Float[Tensor, "neuron point"]:
        """Number of positions with an activation less than `at`."""
        place = torch.floor(at * power_of_two(-self.exponent)[:, None]) - self.start[:, None]
        bins = place.clamp(0, self.counts.shape[1] - 1).long()
        lower, extent = self._spread(bins)
        share = torch.where(extent > 0, (at - lower) / extent, (at > lower).double()).clamp(0, 1)
        held = self.counts.gather(1, bins)
        return self.counts.cumsum(1).gather(1, bins) - held + share * held

    def peak(self) -> Float[Tensor, " neuron"]:
        """Centre of the fullest of `PEAK_BINS` equal bins over [low, high]."""
        low, reach = self.low.double(), self.high.double() - self.low.double()
        edges = low[:, None] + reach[:, None] * torch.arange(PEAK_BINS, dtype=torch.float64, device=low.device) / PEAK_BINS
        held = torch.diff(self.below(edges), append=self.counts.sum(1, keepdim=True).double())
        # rounded, so that equally full bins tie; argmax returns the first
        fullest = (held * 1024).round().argmax(1)
        return low + reach * (fullest + 0.5) / PEAK_BINS

    def quantile(self, q: float) -> Float[Tensor, " neuron"]:
        """The activation of rank q·(N − 1), interpolated between the ranks below and above."""
        rank = (self.counts.sum(1) - 1).clamp_min(0).double() * q
        below, above = self._at_rank(rank.floor().long()), self._at_rank(rank.ceil().long())
        return torch.lerp(below, above, rank.frac())

    def _at_rank(self, rank: Int[Tensor, " neuron"]) -> Float[Tensor, " neuron"]:
        """The activation of a rank, counted from 0: the extremes exactly, the others to within a bin."""
        cumulated, rank = self.counts.cumsum(1), rank[:, None]
        bins = torch.searchsorted(cumulated, rank, right=True).clamp_max(self.counts.shape[1] - 1)
        lower, extent = self._spread(bins)
        held = self.counts.gather(1, bins)
        within = (rank + 0.5 - (cumulated.gather(1, bins) - held)) / held.clamp_min(1)
        value = torch.where(rank == 0, self.low.double()[:, None], lower + within * extent)
        return torch.where(rank == cumulated[:, -1:] - 1, self.high.double()[:, None], value)[:, 0]


class HistogramCounter:
    """Histograms of one site in one layer while activations are counted.

    Bins have room on both sides, so that most new extremes need no wider bins.
    """

    def __init__(self, neurons: int, device: torch.device) -> None:
        self.table = torch.zeros(neurons, BINS + PAD, dtype=torch.int32, device=device)
        self.grid = Grid(*(torch.full((neurons,), x, device=device) for x in (NARROWEST, 0)))
        # the interval that the bins cover; empty at first
        self.begin = torch.full((neurons,), torch.inf, dtype=torch.float64, device=device)
        self.end = -self.begin
        self.scale = torch.ones_like(self.begin)
        self.offsets = torch.arange(neurons, dtype=torch.int32, device=device) * (BINS + PAD)
        self.one = torch.ones(1, dtype=torch.int32, device=device)
        width = COLUMNS if device.type == "cpu" else neurons
        self.columns = [slice(first, first + width) for first in range(0, neurons, width)]

    def add(self, blocks: list[Float[Tensor, "_ neuron"]], low: Float[Tensor, " neuron"], high: Float[Tensor, " neuron"]) -> None:
        """Count blocks of activations; `low` and `high` are the extremes of each neuron so far, these blocks included."""
        outside = ~((low >= self.begin) & (high < self.end))
        if bool(outside.any()):
            if not bool(torch.isfinite(high.double() - low.double()).all()):
                return  # NaN or infinity: `collect` raises, with layer and site
            self._widen(outside.nonzero()[:, 0], low, high)
        scale, start = self.scale.to(low.dtype), self.grid.start.to(low.dtype)

        # one index_add_ runs in one thread. A thread pool, with separate neurons per thread, was slower: 1.6 times a pass
        # without histograms instead of 1.35
        for columns in self.columns:
            for block in blocks:
                # exact in float32: the scale is a power of two, and the difference is between integers
                bins = torch.mul(block[:, columns], scale[columns]).floor_().sub_(start[columns]).int()
                places = bins.add_(self.offsets[columns]).reshape(-1)
                self.table.view(-1).index_add_(0, places, self.one.expand(len(places)))

    def _widen(self, which: Int[Tensor, " some"], low: Tensor, high: Tensor) -> None:
        low, high = low[which].double(), high[which].double()
        exponent, first = grid_of(low, high)
        last = torch.floor(high * power_of_two(-exponent)).long()
        # room on both sides, except so far from zero that only the bins of activations have exact indices in float32
        start = torch.where(first.abs() < 2**22, first - (BINS - 1 - (last - first)) // 2, first)
        new = Grid(exponent, start)
        self.table[which, :BINS] = regrid(self.table[which, :BINS], Grid(*(x[which] for x in self.grid)), new)
        for held, value in zip(self.grid, new, strict=True):
            held[which] = value
        self.begin[which] = start * power_of_two(exponent)
        self.end[which] = (start + BINS) * power_of_two(exponent)
        self.scale = power_of_two(-self.grid.exponent)

    def counts(self, low: Float[Tensor, " neuron"], high: Float[Tensor, " neuron"]) -> Int[Tensor, "neuron bin"]:
        """The counts, in the bins that `grid_of` returns for the extremes."""
        return regrid(self.table[:, :BINS], self.grid, grid_of(low, high))


def gather_histogram(
    counters: list[HistogramCounter], low: Float[Tensor, "layer *neuron"], high: Float[Tensor, "layer *neuron"]
) -> Histogram:
    """Combine the counters of all layers of one site into one `Histogram`."""
    layers = zip(counters, low.flatten(1), high.flatten(1), strict=True)
    counts = torch.stack([c.counts(a.to(c.begin.device), b.to(c.begin.device)).to(low.device) for c, a, b in layers])
    return Histogram(counts.view(*low.shape, BINS), *grid_of(low, high), low, high)
