"""Statistics with planted numbers, and what plotly has packed, unpacked again."""

import base64

import numpy as np
import torch

from sepcap.statistics.moments import SUMS, NeuronStatistics, Statistics

LARGE = {"mlp": (32, 16_384), "attn_pre_out": (32, 32, 128)}


def with_importance(task, by_site, count=1000):
    """Statistics whose `abs` is given."""
    stats = {}
    for site, values in by_site.items():
        values = values.double()
        stats[site] = NeuronStatistics(site, count, dict.fromkeys(SUMS, values * count), -values, values)
    return Statistics(stats, {"task": task})


def large(task, seed, sites=LARGE):
    """Statistics of the size of a model of 32 layers, some neurons silent; those of two seeds are correlated."""
    values = {}
    for site, shape in sites.items():
        common, own = (torch.randn(shape, generator=torch.Generator().manual_seed(s)) for s in (99, seed))
        values[site] = torch.exp(1.5 * common + own)
        values[site][..., ::61] = 0
    return with_importance(task, values)


def unpacked(value):
    """An array from what stands in a figure."""
    if isinstance(value, dict):
        array = np.frombuffer(base64.b64decode(value["bdata"]), dtype=value["dtype"])
        return array.reshape([int(n) for n in value["shape"].split(",")]) if "shape" in value else array
    return np.asarray(value)
