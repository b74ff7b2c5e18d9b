"""Hartigan's dip of distributions that are known as histograms: how far each is from having one mode (METHODS 3)."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sepcap.progress import progress
from sepcap.statistics.histogram import Histogram, power_of_two


def dip_of(edges: Float[np.ndarray, " edge"], counts: Int[np.ndarray, " bin"]) -> float:
    """The dip of a histogram: the largest difference between its cumulative distribution and the nearest one with a single mode.

    A distribution has a single mode if its cumulative distribution is convex up to some point and concave from there on. The dip is 0
    for every such one, however skewed, and at most 1/4, for two values that are equally frequent.

    Args:
        edges: increasing edges of the bins.
        counts: numbers in the bins, spread evenly over them.

    Returns:
        The dip, from 0 to 1/4; 0 if there is nothing in the bins.

    Source: Hartigan and Hartigan, "The dip test of unimodality", Annals of Statistics 13 (1985), with its algorithm.

    >>> dip_of(np.array([0.0, 1, 2, 3]), np.array([1, 0, 1]))
    0.125
    """
    filled = np.flatnonzero(counts)
    if not len(filled):
        return 0.0
    first, last = int(filled[0]), int(filled[-1])
    x = edges[first : last + 2].astype(np.float64)
    f = np.concatenate([[0.0], np.cumsum(counts[first : last + 1])]) / counts.sum()
    low, high, dip = 0, len(x) - 1, 0.0
    while True:
        # the greatest convex function below the distribution between `low` and `high`, and the least concave one above it
        convex, concave = _hull(x, f, low, high, 1), _hull(x, f, low, high, -1)
        at = np.arange(low, high + 1)
        below, above = np.interp(x[at], x[convex], f[convex]), np.interp(x[at], x[concave], f[concave])
        # they are furthest apart at a knot of one of them; between two, rounding could find a place where neither has one
        widest = max({*convex, *concave}, key=lambda i: above[i - low] - below[i - low])
        if above[widest - low] - below[widest - low] <= dip:
            return dip / 2
        # the mode lies between the knots of both that enclose that place
        left, right = max(i for i in convex if i <= widest), min(i for i in concave if i >= widest)
        dip = max(dip, float((f[at] - below)[: left - low + 1].max()), float((above - f[at])[right - low :].max()))
        low, high = left, right


def _hull(x: np.ndarray, f: np.ndarray, low: int, high: int, sign: int) -> list[int]:
    """Knots of the greatest convex function below the points (sign 1), or of the least concave one above them (sign −1)."""
    xs, fs = x.tolist(), (sign * f).tolist()
    knots: list[int] = []
    for i in range(low, high + 1):
        while len(knots) > 1 and (fs[knots[-1]] - fs[knots[-2]]) * (xs[i] - xs[knots[-1]]) >= (fs[i] - fs[knots[-1]]) * (
            xs[knots[-1]] - xs[knots[-2]]
        ):
            knots.pop()
        knots.append(i)
    return knots


def dips(histogram: Histogram, site: str) -> Float[Tensor, "layer *neuron"]:
    """The dip of every neuron of a site, float64; about a millisecond each."""
    counts = histogram.counts.cpu().flatten(1, -2) if histogram.counts.dim() > 2 else histogram.counts.cpu()
    width = power_of_two(histogram.exponent).cpu().flatten(1)
    start, low, high = (values.double().cpu().flatten(1) for values in (histogram.start, histogram.low, histogram.high))
    found = torch.zeros(low.shape, dtype=torch.float64)
    places = torch.arange(counts.shape[-1] + 1, dtype=torch.float64)
    for layer in progress(range(len(low)), desc=f"dip {site}", unit="layer"):
        for neuron in range(low.shape[1]):
            edges = (start[layer, neuron] + places) * width[layer, neuron]
            # the outermost bins hold nothing beyond the smallest and the largest activation, unless that is the lower edge of its bin
            ends = high[layer, neuron].where(edges[:-1] < high[layer, neuron], edges[1:])
            edges = torch.cat([edges[:1].clamp_min(low[layer, neuron]), torch.minimum(edges[1:], ends)])
            found[layer, neuron] = dip_of(edges.numpy(), counts[layer, neuron].numpy())
    return found.view(histogram.low.shape).to(histogram.low.device)


def dip_table(by_site: Mapping[str, Float[Tensor, "layer *neuron"]], heads: bool) -> Any:
    """One row per neuron, or per head with the mean over its neurons; the highest of each site first."""
    import pandas as pd

    parts = []
    for site, of_neurons in by_site.items():
        values = of_neurons.mean(-1) if heads else of_neurons
        names = ["layer", "head"] if heads else ["layer", "neuron"] if values.dim() == 2 else ["layer", "head", "neuron"]
        places = dict(zip(names, torch.cartesian_prod(*map(torch.arange, values.shape)).T.numpy(), strict=True))
        part = pd.DataFrame({"site": site, **places, "bimodality": values.flatten().numpy()})
        parts.append(part.sort_values("bimodality", ascending=False, kind="stable"))
    table = pd.concat(parts, ignore_index=True)
    columns = ["site", *(name for name in ("layer", "head", "neuron") if name in table), "bimodality"]
    return table.astype({"head": "Int64"})[columns] if "head" in table else table[columns]
