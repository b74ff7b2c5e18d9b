"""Classes of neurons of the same layer and similar activity, on which control sets are matched (METHODS 12)."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

BINS = 10
"""Quantile bins of activity per layer."""

LEAST_PER_BIN = 10
"""Minimum of neurons, or heads, per bin; layers with fewer than ten times as many get fewer bins, so that draws from a bin can differ."""


def quantile_bins(activity: Float[Tensor, "layer unit"]) -> Int[Tensor, "layer unit"]:
    """Bin of every neuron within its layer, 0 for the least active: ten bins of equal size, fewer in a small layer.

    Ties are broken by index, so that bin sizes differ by at most one.

    >>> import torch
    >>> quantile_bins(torch.arange(40.0)[None])[0, ::10].tolist()
    [0, 1, 2, 3]
    """
    units = activity.shape[1]
    rank = activity.argsort(dim=1, stable=True).argsort(dim=1)
    return rank * max(1, min(BINS, units // LEAST_PER_BIN)) // units


def chosen_by_activity(activity: Float[Tensor, "layer unit"], per_layer: Sequence[int], *, most: bool) -> Bool[Tensor, "layer unit"]:
    """The least or the most active neurons, `per_layer` of every layer: a set chosen by activity alone.

    >>> import torch
    >>> chosen_by_activity(torch.tensor([[0.3, 0.1, 0.4], [3.0, 2.0, 1.0]]), [1, 2], most=False).tolist()
    [[False, True, False], [False, True, True]]
    """
    rank = activity.argsort(dim=1, descending=most, stable=True).argsort(dim=1)
    return rank < torch.tensor(list(per_layer), device=rank.device)[:, None]


def activity_of(matched: Any, site: str) -> Float[Tensor, "layer *neuron"]:
    """Mean absolute activation of every neuron of a site.

    Args:
        matched: what `collect` returns, or site -> activity.
        site: site of the neurons.

    Raises:
        ValueError: the site was not collected.
    """
    if not isinstance(matched, Mapping):
        raise TypeError(f"matched is a {type(matched).__name__}; give what sepcap.collect returns, or site -> activity [layer, neuron]")
    if site not in matched:
        has = f"it has {', '.join(matched)}" if matched else "it is empty"
        raise ValueError(f"matched has no site {site!r}; {has}. Collect it: collect(model, task, sites={site!r})")
    found = matched[site] if isinstance(matched[site], Tensor) else matched[site].abs
    if not bool(found.isfinite().all()):
        raise ValueError(f"matched[{site!r}] holds {int((~found.isfinite()).sum())} activities that are NaN or infinite; give finite ones")
    return found
