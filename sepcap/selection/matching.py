"""Classes of neurons that are alike in layer and activity: what a control set is matched on (METHODS 12)."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

BINS = 10
"""Quantile bins of activity per layer."""

LEAST_PER_BIN = 10
"""Neurons, or heads, of a bin; layers that have fewer than ten times as many get fewer bins, so that a draw from a bin has a choice."""


def quantile_bins(activity: Float[Tensor, "layer unit"]) -> Int[Tensor, "layer unit"]:
    """Bin of every neuron within its layer, 0 for the least active ones: ten equally large ones, fewer where a layer is small.

    Equal values are put in their order, so that bins differ in size by one at most.

    >>> import torch
    >>> quantile_bins(torch.arange(40.0)[None])[0, ::10].tolist()
    [0, 1, 2, 3]
    """
    units = activity.shape[1]
    rank = activity.argsort(dim=1, stable=True).argsort(dim=1)
    return rank * max(1, min(BINS, units // LEAST_PER_BIN)) // units


def chosen_by_activity(activity: Float[Tensor, "layer unit"], per_layer: Sequence[int], *, most: bool) -> Bool[Tensor, "layer unit"]:
    """The least or the most active neurons, so many of every layer: a set chosen by activity alone.

    >>> import torch
    >>> chosen_by_activity(torch.tensor([[0.3, 0.1, 0.4], [3.0, 2.0, 1.0]]), [1, 2], most=False).tolist()
    [[False, True, False], [False, True, True]]
    """
    rank = activity.argsort(dim=1, descending=most, stable=True).argsort(dim=1)
    return rank < torch.tensor(list(per_layer), device=rank.device)[:, None]


def activity_of(matched: Any, site: str) -> Float[Tensor, "layer *neuron"]:
    """Mean absolute activation of every neuron of a site.

    Args:
        matched: what `collect` gives, or site -> activity.
        site: whose neurons.

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
