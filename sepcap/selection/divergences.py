"""Divergences between the activation distributions of two datasets, one number per neuron (METHODS 4)."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from sepcap.statistics.histogram import BINS, Grid, grid_of, power_of_two, regrid
from sepcap.statistics.moments import NeuronStatistics

COMMON_BINS = 128
"""Bins of `kl` and `js`: 64 to 128 over the range of both datasets together. With N positions each, two samples of the same
distribution differ by chance by about (bins in use)/4N nats of `js` and (bins in use)/N of `kl`, so finer bins would measure noise."""

Counts = Float[Tensor, "neuron bin"]


def kl(forget: NeuronStatistics, retain: NeuronStatistics) -> Float[Tensor, "layer *neuron"]:
    """Kullback–Leibler divergence Σ p ln(p/q) of forget from retain, in nats.

    Both datasets are counted in the same bins, at most `COMMON_BINS`, and half a position is added in both to every bin that
    is nonempty in either: the divergence is finite, nonnegative, and zero if the counts are equal.
    """

    def of_layer(f: Tensor, r: Tensor, width: Tensor) -> Tensor:
        used = (f + r) > 0
        p, q = (torch.where(used, x + 0.5, 0) for x in (f, r))
        p, q = p / p.sum(1, keepdim=True), q / q.sum(1, keepdim=True)
        return _relative_entropy(p, q)

    return _by_layer(forget, retain, COMMON_BINS, of_layer)


def js(forget: NeuronStatistics, retain: NeuronStatistics) -> Float[Tensor, "layer *neuron"]:
    """Jensen–Shannon divergence ½ KL(p‖m) + ½ KL(q‖m), m = (p + q)/2, in nats: 0 for equal distributions, ln 2 for disjoint ones.

    The bins are those of `kl`, without smoothing.
    """

    def of_layer(f: Tensor, r: Tensor, width: Tensor) -> Tensor:
        p, q = f / f.sum(1, keepdim=True), r / r.sum(1, keepdim=True)
        middle = (p + q) / 2
        return (_relative_entropy(p, middle) + _relative_entropy(q, middle)) / 2

    return _by_layer(forget, retain, COMMON_BINS, of_layer)


def wasserstein(forget: NeuronStatistics, retain: NeuronStatistics) -> Float[Tensor, "layer *neuron"]:
    """Wasserstein-1 distance ∫|F_forget(z) − F_retain(z)| dz, in units of the activation.

    Accurate to one bin of the range of both datasets together (range/510), and never less than the difference of the means,
    which is an exact lower bound.
    """

    def of_layer(f: Tensor, r: Tensor, width: Tensor) -> Tensor:
        shares = (x.cumsum(1) / x.sum(1, keepdim=True) for x in (f, r))
        return (next(shares) - next(shares)).abs().sum(1) * width

    return torch.maximum(_by_layer(forget, retain, BINS, of_layer), (forget.mean - retain.mean).abs())


def _relative_entropy(p: Counts, q: Counts) -> Float[Tensor, " neuron"]:
    # xlogy: 0 ln 0 = 0; rounding can make the sum slightly negative
    return (torch.xlogy(p, p) - torch.xlogy(p, q)).sum(1).clamp_min(0)


def _by_layer(
    forget: NeuronStatistics, retain: NeuronStatistics, bins: int, of_layer: Callable[[Tensor, Tensor, Tensor], Tensor]
) -> Float[Tensor, "layer *neuron"]:
    """A divergence from the counts of both datasets in the same bins, exactly, and the width of the bins."""
    one, other = forget.require_histogram(), retain.require_histogram()
    common = grid_of(torch.minimum(one.low, other.low), torch.maximum(one.high, other.high), bins)
    layers = []
    for f, r, *grid in zip(one.layers(), other.layers(), *(x.flatten(1) for x in common), strict=True):
        new = Grid(*grid)
        one_counted, other_counted = (regrid(x.counts, x.grid, new, bins).double() for x in (f, r))
        layers.append(of_layer(one_counted, other_counted, power_of_two(new.exponent)))
    return torch.stack(layers).view_as(forget.low)
