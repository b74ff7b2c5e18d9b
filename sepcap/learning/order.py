"""Units to rank, neurons of some sites or whole heads, and masks of shares of the ranking with straight-through gradients (METHODS 21)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from sepcap.errors import unknown
from sepcap.models.forward import Hook
from sepcap.models.sites import SITES, Population, bind
from sepcap.selection.score import Scores

KEYS = (*SITES, "heads")
"""What can be ranked: the neurons of a site, or whole heads at the site attn_pre_out."""

Theta = Mapping[str, Tensor]
"""Key -> a number for every neuron [layer, *neuron], or head [layer, head]; the highest are masked first."""


@dataclass(frozen=True)
class Ranked:
    """The neurons of a site, or the heads, that are ranked together over all layers.

    Attributes:
        key: a site, or "heads".
        population: the neurons; those of the heads at attn_pre_out.
    """

    key: str
    population: Population

    @property
    def site(self) -> str:
        """Site of the neurons."""
        return self.population.site.name

    @property
    def shape(self) -> tuple[int, ...]:
        """[layer, *unit]: of the neurons, or [layer, head]."""
        return self.population.shape[:2] if self.key == "heads" else self.population.shape

    @property
    def size(self) -> int:
        """Number of neurons, or heads, to rank."""
        return int(torch.Size(self.shape).numel())

    def neurons(self, values: Shaped[Tensor, "layer *unit"]) -> Shaped[Tensor, "layer *neuron"]:
        """Every neuron's value: its own, or that of its head."""
        return values[..., None].expand(self.population.shape) if self.key == "heads" else values

    def count(self, share: float) -> int:
        """⌊share · size⌋."""
        return int(share * self.size + 1e-9)  # as in selection: 0.29 · 100 is 28.999999999999996 in floating point


def ranked_of(model: Any, keys: Sequence[str]) -> list[Ranked]:
    """The neurons or heads that the keys name in a model.

    Raises:
        ValueError: no key, an unknown or repeated key, or heads together with their neurons.
    """
    for key in keys:
        if key not in KEYS:
            raise unknown("site", key, KEYS)
    if not keys or len({*keys}) < len(keys):
        raise ValueError(f"site={tuple(keys)!r}: give one or more different sites, such as 'mlp' or ('mlp', 'attn_pre_out')")
    if {"heads", "attn_pre_out"} <= {*keys}:
        raise ValueError("site: 'heads' are made of 'attn_pre_out' neurons; rank one or the other")
    return [Ranked(key, bind(model, "attn_pre_out" if key == "heads" else key)) for key in keys]


def starting_theta(ranked: Sequence[Ranked], scores: Scores) -> dict[str, Tensor]:
    """Normal quantiles of the ranks of some scores, so that their spread fits the step size and τ for any scores.

    Raises:
        ValueError: scores of another model, or a NaN.
    """
    theta = {}
    for one in ranked:
        if one.site not in scores:
            raise ValueError(f"init: the scores have no site {one.site!r}, but {', '.join(map(repr, scores))}")
        if tuple(scores[one.site].shape) != one.population.shape:
            raise ValueError(
                f"init: the scores of site {one.site!r} are {list(scores[one.site].shape)}, but this model has "
                f"{list(one.population.shape)} neurons there"
            )
        values = (scores.heads(site=one.site) if one.key == "heads" else scores[one.site]).detach().double().cpu()
        if missing := int(values.isnan().sum()):
            raise ValueError(f"init: {missing} of {values.numel()} scores of {one.key!r} are NaN and cannot be ranked")
        place = torch.empty(one.size, dtype=torch.float64)
        # the first of equal scores ranks highest, as in a selection
        place[values.flatten().argsort(descending=True, stable=True)] = torch.arange(one.size, dtype=torch.float64)
        theta[one.key] = torch.special.ndtri(1 - (place + 0.5) / one.size).view(values.shape)
    return theta


def scores_of(ranked: Sequence[Ranked], theta: Theta) -> dict[str, Tensor]:
    """Site -> the share of the neurons, or heads, that do not precede it in the order: 1 for the first, 1/N for the last of N."""
    scores = {}
    for one in ranked:
        share = torch.empty(one.size, dtype=torch.float64)
        share[in_order(theta[one.key])] = 1 - torch.arange(one.size, dtype=torch.float64) / one.size
        scores[one.site] = one.neurons(share.view(one.shape)).clone()
    return scores


def in_order(theta: Float[Tensor, "layer *unit"]) -> Any:
    """Flat indices of the neurons, or heads, in the order in which they are masked."""
    return theta.detach().flatten().argsort(descending=True, stable=True)


def kept(theta: Float[Tensor, "layer *unit"], k: int) -> Bool[Tensor, "layer *unit"]:
    """Mask of all neurons, or heads, except the k highest."""
    mask = torch.ones(theta.numel(), dtype=torch.bool)
    mask[in_order(theta)[:k]] = False
    return mask.view(theta.shape)


class _StraightThrough(torch.autograd.Function):
    """1 for the kept and 0 for the others; its derivative by θ is that of σ((cut − θ)/τ), which is −σ′((θ − cut)/τ)/τ."""

    @staticmethod
    def forward(ctx: Any, theta: Tensor, keep: Tensor, cut: float, tau: float) -> Tensor:
        ctx.save_for_backward(theta)
        ctx.cut, ctx.tau = cut, tau
        return keep.to(theta.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        soft = torch.sigmoid((ctx.saved_tensors[0] - ctx.cut) / ctx.tau)
        return -grads[0] * soft * (1 - soft) / ctx.tau, None, None, None


def straight_through(theta: Float[Tensor, "layer *unit"], k: int, tau: float) -> Float[Tensor, "layer *unit"]:
    """A mask that is 0 for the k highest θ and 1 for the others, with the derivative of a sigmoid about the cut.

    Args:
        theta: a number for every neuron, or head.
        k: how many are masked, from 1 to their number. The cut is halfway between the lowest masked θ and the highest kept one, and
            counts as a constant.
        tau: width of the sigmoid, in units of θ.
    """
    values = theta.detach().flatten()[in_order(theta)]
    cut = float(values[k - 1 : k + 1].mean())
    return _StraightThrough.apply(theta, kept(theta, k), cut, tau)


def masking_hooks(ranked: Sequence[Ranked], masks: Theta, constants: Mapping[str, Tensor] | None = None) -> list[Hook]:
    """Hooks that set masked neurons to 0, or to their constants; gradients flow to the masks and to the constants.

    Args:
        ranked: what the masks are of.
        masks: key -> 1 for the kept and 0 for the masked.
        constants: site -> what masked neurons are set to; None for 0.
    """
    hooks: list[Hook] = []
    for one in ranked:
        values = one.neurons(masks[one.key])
        put = None if constants is None else constants[one.site]
        for layer in one.population.layers:
            function = partial(_mask, keep=values[layer], constant=None if put is None else put[layer])
            hooks.append((one.population.site.hook_name(layer), function))
    return hooks


def _mask(z: Float[Tensor, "batch pos ..."], hook: Any, keep: Tensor, constant: Tensor | None) -> Tensor:
    keep = keep.to(z.device, z.dtype)
    if constant is None:
        return z * keep
    constant = constant.to(z.device, z.dtype)
    return constant + (z - constant) * keep
