"""Ablation: activations replaced during the forward pass, by hooks; the weights stay (METHODS 8)."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sepcap.errors import unknown
from sepcap.models.forward import Hook
from sepcap.models.sites import get_site
from sepcap.selection.neurons import NeuronSet
from sepcap.statistics.moments import Statistics

Constants = Mapping[str, Float[Tensor, "layer *neuron"]]


def _zero(neurons: NeuronSet, reference: Statistics | None) -> Constants:
    return {site: torch.zeros(mask.shape) for site, mask in neurons.masks.items()}


def _mean(neurons: NeuronSet, reference: Statistics | None) -> Constants:
    if reference is None:
        raise ValueError("kind='mean' needs reference=: statistics of the dataset whose mean is to be used, from sepcap.collect")
    return {site: reference[site].mean for site in neurons.masks}


KINDS: dict[str, Callable[[NeuronSet, Statistics | None], Constants]] = {"zero": _zero, "mean": _mean}
"""Kinds of ablation by name; each gives the constant every neuron is set to."""


def ablation_hooks(neurons: NeuronSet, kind: str | Constants = "zero", *, reference: Statistics | None = None) -> list[Hook]:
    """Plain TransformerLens `fwd_hooks` that set the neurons to a constant at every position.

    Args:
        neurons: what to ablate.
        kind: "zero", "mean" (over the `reference` statistics), or constants per site [layer, neuron] or [layer, head, d_head].
        reference: statistics that "mean" is taken from.
    """
    if isinstance(kind, str):
        if kind not in KINDS:
            raise unknown("kind", kind, KINDS, "Or a mapping from site to a tensor of constants.")
        constants = KINDS[kind](neurons, reference)
    else:
        constants = kind
    hooks: list[Hook] = []
    for site, mask in neurons.masks.items():
        if site not in constants or tuple(constants[site].shape) != tuple(mask.shape):
            came = list(constants[site].shape) if site in constants else "nothing"
            raise ValueError(f"constants of site {site!r}: {came}, but the neurons are {list(mask.shape)}")
        for layer in range(len(mask)):
            if bool(mask[layer].any()):
                hooks.append((get_site(site).hook_name(layer), _setter(mask[layer], constants[site][layer])))
    return hooks


def _setter(mask: Tensor, constant: Tensor) -> Callable[..., Tensor]:
    def set_constant(z: Float[Tensor, "batch pos ..."], hook: Any) -> Tensor:
        return torch.where(mask.to(z.device), constant.to(z.device, z.dtype), z)

    return set_constant


@contextmanager
def ablate(model: Any, neurons: NeuronSet, kind: str | Constants = "zero", *, reference: Statistics | None = None) -> Iterator[Any]:
    """Ablate neurons inside a `with` block; afterwards nothing stays hooked, also after an exception.

    Args:
        model: a hooked model.
        neurons: what to ablate.
        kind: "zero", "mean", or a mapping from site to constants of the masks' shapes.
        reference: statistics that "mean" is taken from, usually those of the retain task.

    Source: METHODS section 8; [PEAK].

    Example:
        >>> with sepcap.ablate(model, neurons, "mean", reference=retain):  # doctest: +SKIP
        ...     sepcap.evaluate(model, "local-code", tokens=20_000)
    """
    neurons.check(model)
    with model.hooks(fwd_hooks=ablation_hooks(neurons, kind, reference=reference)):
        yield model
