"""Constants that ablated neurons are set to: zero, mean, median, peak, or the user's own (METHODS 8)."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sepcap.models.forward import Hook
from sepcap.models.sites import get_site
from sepcap.selection.neurons import NeuronSet
from sepcap.statistics.moments import Statistics

Constants = Mapping[str, Float[Tensor, "layer *neuron"]]


def _statistic(neurons: NeuronSet, reference: Statistics | None, kind: str) -> Constants:
    if reference is None:
        how = "sepcap.collect" if kind == "mean" else "sepcap.collect(..., histogram=True)"
        raise ValueError(f"kind={kind!r} needs reference=: statistics of the dataset whose {kind} is to be used, from {how}")
    return {site: getattr(reference[site], kind) for site in neurons.masks}


CONSTANTS: dict[str, Callable[[NeuronSet, Statistics | None], Constants]] = {
    "zero": lambda neurons, reference: {site: torch.zeros(mask.shape) for site, mask in neurons.masks.items()},
    **{kind: partial(_statistic, kind=kind) for kind in ("mean", "median", "peak")},
}
"""Kinds of constants by name; each returns the constant of every neuron of the sites."""


def given_constants(neurons: NeuronSet, values: Any) -> Constants:
    """The user's constants in the shape of the masks.

    Args:
        neurons: the neurons to ablate.
        values: site -> constants [layer, neuron] or [layer, head, d_head]; or, for neurons of one site, a tensor or number that
            broadcasts to that shape, such as [d_head].
    """
    if not isinstance(values, Mapping):
        if len(neurons.masks) != 1:
            raise ValueError(f"kind is one tensor, but the neurons are of {len(neurons.masks)} sites; give a mapping from site to tensor")
        ((site, mask),) = neurons.masks.items()
        tensor = torch.as_tensor(values)
        fits = all(mine in (1, want) for mine, want in zip(tensor.shape[::-1], mask.shape[::-1], strict=False))
        values = {site: tensor.expand(mask.shape) if fits and tensor.dim() <= mask.dim() else tensor}
    check_constants(neurons, values, "constants")
    return values


def check_constants(neurons: NeuronSet, constants: Constants, name: str) -> None:
    """Raise if constants do not have the shape of the masks, or if the constant of a neuron in the set is NaN or infinite."""
    for site, mask in neurons.masks.items():
        if site not in constants or tuple(constants[site].shape) != tuple(mask.shape):
            came = list(constants[site].shape) if site in constants else "nothing"
            raise ValueError(f"{name} of site {site!r}: got {came}, but the neurons are {list(mask.shape)}")
        broken = ~torch.isfinite(constants[site]) & mask.to(constants[site].device)
        if bool(broken.any()):
            raise ValueError(f"{name} of site {site!r}: {int(broken.sum())} of {int(mask.sum())} are NaN or infinite")


def constant_hooks(neurons: NeuronSet, constants: Constants) -> list[Hook]:
    """Plain TransformerLens `fwd_hooks` that set the neurons to constants; gradients flow to the constants."""
    return [
        (get_site(site).hook_name(layer), partial(_set, mask=mask, constant=constants[site][layer]))
        for site, layer, mask in neurons.by_layer()
    ]


def _set(z: Float[Tensor, "batch pos ..."], hook: Any, mask: Tensor, constant: Tensor) -> Tensor:
    return torch.where(mask.to(z.device), constant.to(z.device, z.dtype), z)
