"""Neuron sets: one boolean mask per site, with set algebra and random baselines (METHODS 5, 12)."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

import sepcap
from sepcap.checks import checked
from sepcap.latex import latex_table
from sepcap.models.sites import Population, bind, check_head, populations, resolve_sites
from sepcap.storage import html_card, load_tensors, save_tensors

ROTATED = "rotated_from"
"""Key of `NeuronSet.info`: fingerprint of the model in whose rotated basis the neurons are; they are not neurons of that model itself."""


class NeuronSet:
    """A set of neurons of a model, as a selection returns it and ablation and deletion take it.

    Attributes:
        masks: site -> Bool [layer, neuron] or [layer, head, d_head]; true means in the set.
        info: how it was made.

    `a | b`, `a & b`, `a - b` and `~a` are union, intersection, difference and complement within the sites of the masks;
    `len` counts neurons.

    Example:
        >>> a = NeuronSet({"mlp": torch.tensor([[True, False, True]])})
        >>> len(a), len(~a), len(a & ~a)
        (2, 1, 0)
    """

    def __init__(self, masks: Mapping[str, Tensor], info: Mapping[str, Any] | None = None) -> None:
        resolve_sites(masks)
        for site, mask in masks.items():
            if mask.dtype != torch.bool:
                raise TypeError(f"masks[{site!r}] has dtype {mask.dtype}; a mask is boolean")
            if mask.dim() != (2 if site == "mlp" else 3):
                want = "[layer, neuron]" if site == "mlp" else "[layer, head, d_head]"
                raise ValueError(f"masks[{site!r}] has shape {list(mask.shape)}; it must be {want}")
        self.masks: dict[str, Tensor] = dict(masks)
        self.info = dict(info or {})

    @classmethod
    @checked()
    def empty(cls, model: Any, sites: str | Iterable[str]) -> "NeuronSet":
        """The empty set over sites of a model."""
        return cls({site: torch.zeros(its.shape, dtype=torch.bool) for site, its in populations(model, sites).items()})

    @classmethod
    @checked()
    def random(
        cls,
        model: Any,
        fractions: Mapping[str, float],
        *,
        seed: int = 0,
        per_layer: bool = False,
        exclude: "NeuronSet | None" = None,
    ) -> "NeuronSet":
        """Neurons drawn uniformly without replacement: the baseline of every selection.

        Args:
            model: the model whose neurons are drawn.
            fractions: site -> fraction of the site's neurons, or a whole number of them; "heads" draws whole heads.
            seed: the same seed gives the same set.
            per_layer: draw the same number in every layer instead of from all layers together.
            exclude: neurons that are already pruned and cannot be drawn.
        """
        if exclude is not None:
            exclude.check(model)
        if not fractions:
            raise ValueError("fractions={}: give at least one site, {'mlp': 0.02}")
        ranks = random_ranks(populations(model, ("attn_pre_out" if key == "heads" else key for key in fractions)), seed)
        chosen, thresholds = select(ranks, fractions, lambda: ranks["attn_pre_out"].mean(dim=-1), per_layer=per_layer, exclude=exclude)
        chosen.info = {"importance": "random", "fractions": dict(fractions), "per_layer": per_layer, "threshold": thresholds}
        return chosen

    @classmethod
    @checked()
    def heads(cls, model: Any, heads: Iterable[tuple[int, int]], site: str = "attn_pre_out") -> "NeuronSet":
        """All neurons of whole heads, given as (layer, head) pairs."""
        shape = bind(model, site).shape
        if len(shape) != 3:
            raise ValueError(f"site={site!r} has no heads; use 'attn_pre_out' or 'attn_value'")
        layers, n_heads, _ = shape
        mask = torch.zeros(shape, dtype=torch.bool)
        for layer, head in heads:
            check_head(layer, head, layers, n_heads)
            mask[layer, head] = True
        return cls({site: mask})

    @cached_property
    def table(self) -> pd.DataFrame:
        """One row per neuron of the set, in index order: site, layer, head (attention only) and neuron (in its layer or head)."""
        return neuron_table({site: mask.nonzero().cpu().numpy() for site, mask in self.masks.items()})

    def to_latex(self, **options: Any) -> str:
        """`.table` for a paper, see `sepcap.latex.latex_table`."""
        return latex_table(self.table, **options)

    @checked()
    def count(self, site: str | None = None) -> int:
        """Neurons in the set, of one site or of all."""
        masks = self.masks.values() if site is None else [self.masks[site]] if site in self.masks else []
        return sum(int(mask.sum()) for mask in masks)

    @checked()
    def per_layer(self, site: str) -> list[int]:
        """Neurons in the set per layer of one site."""
        return self.masks[site].flatten(1).sum(dim=1).tolist()

    def by_layer(self) -> Iterator[tuple[str, int, Tensor]]:
        """(site, layer, mask of the layer) wherever the set has neurons."""
        return ((site, i, mask[i]) for site, mask in self.masks.items() for i in range(len(mask)) if bool(mask[i].any()))

    @checked()
    def check(self, model: Any) -> dict[str, Population]:
        """The populations of the model that the set is of; raises if the model has another shape."""
        found = populations(model, self.masks)
        for site, mask in self.masks.items():
            if tuple(mask.shape) != found[site].shape:
                raise ValueError(
                    f"neurons: the mask of site {site!r} is {list(mask.shape)} but this model has {list(found[site].shape)}: "
                    "the set was made for another model"
                )
        return found

    def __len__(self) -> int:
        return self.count()

    def __bool__(self) -> bool:
        return len(self) > 0

    def __eq__(self, other: object) -> bool:  # without __hash__: masks are mutable tensors
        if not isinstance(other, NeuronSet):
            return NotImplemented
        sites = set(self.masks) | set(other.masks)
        return all(
            (site in self.masks and site in other.masks and torch.equal(self.masks[site].cpu(), other.masks[site].cpu()))
            or (self.count(site) == 0 and other.count(site) == 0)
            for site in sites
        )

    def _combine(self, other: "NeuronSet", how: Callable[[Tensor, Tensor], Tensor]) -> "NeuronSet":
        if not isinstance(other, NeuronSet):
            return NotImplemented
        masks = {}
        for site in dict.fromkeys([*self.masks, *other.masks]):
            # a set without a mask of a site contains none of its neurons
            mine = self.masks[site] if site in self.masks else torch.zeros_like(other.masks[site])
            theirs = other.masks[site] if site in other.masks else torch.zeros_like(mine)
            if mine.shape != theirs.shape:
                raise ValueError(f"site {site!r}: masks of {list(mine.shape)} and {list(theirs.shape)} belong to different models")
            masks[site] = how(mine, theirs.to(mine.device))
        return NeuronSet(masks, other._basis | self._basis)

    @property
    def _basis(self) -> dict[str, Any]:
        return {ROTATED: self.info[ROTATED]} if ROTATED in self.info else {}

    def __or__(self, other: "NeuronSet") -> "NeuronSet":
        return self._combine(other, torch.logical_or)

    def __and__(self, other: "NeuronSet") -> "NeuronSet":
        return self._combine(other, torch.logical_and)

    def __sub__(self, other: "NeuronSet") -> "NeuronSet":
        return self._combine(other, lambda a, b: a & ~b)

    def __invert__(self) -> "NeuronSet":
        return NeuronSet({site: ~mask for site, mask in self.masks.items()}, self._basis)

    @checked()
    def to(self, device: str | torch.device) -> "NeuronSet":
        """The same set on another device."""
        return NeuronSet({site: mask.to(device) for site, mask in self.masks.items()}, self.info)

    def examine(self, model: Any, **how: Any) -> Any:
        """Profiles of the neurons: texts, tokens, logits; see `sepcap.examine` (METHODS 23)."""
        return sepcap.examine(model, self, **how)

    @checked()
    def save(self, path: str | Path) -> None:
        """Write one safetensors file, atomically."""
        save_tensors(path, self.masks, {"kind": "neurons", "info": self.info})

    @classmethod
    @checked()
    def load(cls, path: str | Path) -> "NeuronSet":
        """Read what `save` wrote."""
        tensors, meta = load_tensors(path, "neurons")
        return cls(tensors, meta["info"])

    def __repr__(self) -> str:
        parts = [f"{site} {self.count(site):,} of {mask.numel():,}" for site, mask in self.masks.items()]
        return f"NeuronSet({', '.join(parts)})"

    def _repr_html_(self) -> str:
        rows = []
        for site, mask in self.masks.items():
            layers, n = self.per_layer(site), self.count(site)
            row = {"site": site, "shape": " × ".join(map(str, mask.shape)), "neurons": f"{n:,}", "of": f"{mask.numel():,}"}
            said = ", ".join(map(str, layers)) if len(layers) <= 16 else f"{min(layers):,} to {max(layers):,} in {len(layers)} layers"
            rows.append(row | {"share": n / max(1, mask.numel()), "per layer": said})
        return html_card("NeuronSet", self.info, pd.DataFrame(rows))


def neuron_table(places: Mapping[str, np.ndarray]) -> pd.DataFrame:
    """Columns site, layer, head and neuron of neurons given by their indices.

    Args:
        places: site -> indices [n, 2] (layer, neuron) or [n, 3] (layer, head, neuron of the head).
    """
    parts = []
    for site, at in places.items():
        head = pd.array(at[:, 1] if at.shape[1] == 3 else [pd.NA] * len(at), dtype="Int64")
        parts.append(pd.DataFrame({"site": site, "layer": at[:, 0], "head": head, "neuron": at[:, -1]}))
    whole = pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=["site", "layer", "head", "neuron"])
    return whole.drop(columns="head") if bool(np.all(whole["head"].isna())) else whole


def random_ranks(among: Mapping[str, Population], seed: int | Sequence[int]) -> dict[str, Float[Tensor, "layer *neuron"]]:
    """Uniform random numbers in place of scores: selecting the highest is sampling uniformly without replacement."""
    rng = np.random.default_rng(seed)
    return {site: torch.from_numpy(rng.random(population.shape)) for site, population in among.items()}


def select(
    ranks: Mapping[str, Tensor],
    fractions: Mapping[str, float],
    heads: Callable[[], Float[Tensor, "layer head"]],
    head_site: str = "attn_pre_out",
    *,
    per_layer: bool = False,
    exclude: NeuronSet | None = None,
) -> tuple[NeuronSet, dict[str, float]]:
    """`top_of` for neurons, and for whole heads under "heads".

    Args:
        ranks: site -> a number for every neuron.
        fractions: site or "heads" -> share or count.
        heads: returns a number for every head.
        head_site: site of the neurons of the heads.
        per_layer, exclude: as for `top_of`.
    """
    plain = {site: f for site, f in fractions.items() if site != "heads"}
    masks: dict[str, Tensor] = {}
    thresholds: dict[str, float] = {}
    if plain:
        chosen, thresholds = top_of(ranks, plain, per_layer=per_layer, exclude=exclude)
        masks = chosen.masks
    if "heads" in fractions:
        of_heads = heads()
        excluded = _excluded(exclude, head_site, ranks[head_site]).all(dim=-1).to(of_heads.device)
        how_many(fractions["heads"], of_heads[0].numel() if per_layer else of_heads.numel(), "heads", "heads")
        check_order(of_heads, excluded, "heads")
        # heads are treated as a separate site with one number per head, selected like mlp neurons
        taken = NeuronSet({"mlp": excluded})
        chosen, threshold = top_of({"mlp": of_heads}, {"mlp": fractions["heads"]}, per_layer=per_layer, exclude=taken)
        thresholds["heads"] = threshold["mlp"]
        whole = chosen.masks["mlp"][..., None].expand(ranks[head_site].shape)
        masks[head_site] = whole | masks[head_site] if head_site in masks else whole.clone()
    return NeuronSet(masks), thresholds


def _excluded(exclude: NeuronSet | None, site: str, like: Tensor) -> Tensor:
    if exclude is None or site not in exclude.masks:
        return torch.zeros_like(like, dtype=torch.bool)
    return exclude.masks[site].to(like.device)


def top_of(
    ranks: Mapping[str, Tensor], fractions: Mapping[str, float], *, per_layer: bool = False, exclude: NeuronSet | None = None
) -> tuple[NeuronSet, dict[str, float]]:
    """The ⌊fraction·N⌋ highest neurons of every site, or a whole number of them, and the lowest value selected (METHODS 5).

    N is the original size of the site, including excluded neurons. Ties go to the neuron with the lower index.

    Raises:
        ValueError: a fraction outside (0, 1], one that selects no neuron or more than are left, or a NaN score.
    """
    masks, thresholds = {}, {}
    for site, fraction in fractions.items():
        values = ranks[site]
        excluded = _excluded(exclude, site, values)
        check_order(values, excluded, site)
        masks[site] = torch.zeros_like(excluded)
        groups = range(len(values)) if per_layer else [slice(None)]
        lowest = []
        for group in groups:
            n = how_many(fraction, values[group].numel(), site, "of a layer" if per_layer else "")
            left = ~excluded[group].flatten()
            if n > int(left.sum()):
                raise ValueError(
                    f"fractions[{site!r}]={fraction}: {n} neurons to select but only {int(left.sum())} of {left.numel()} are left"
                    + (" in a layer" if per_layer else "")
                )
            flat = values[group].flatten().double().masked_fill(~left, -torch.inf)
            chosen = flat.argsort(descending=True, stable=True)[:n]
            masks[site][group] = torch.zeros_like(left).index_fill_(0, chosen, True).view(values[group].shape)
            lowest.append(float(flat[chosen[-1]]))
        thresholds[site] = min(lowest)
    return NeuronSet(masks), thresholds


def check_order(values: Float[Tensor, "*neuron"], excluded: Bool[Tensor, "*neuron"], site: str) -> None:
    """Raise if the score of a neuron, or head, that is not excluded is NaN."""
    if undefined := int((values.isnan() & ~excluded).sum()):
        raise ValueError(
            f"{undefined} of {values.numel()} scores of site {site!r} are NaN and cannot be ranked: find out why, or exclude these neurons"
        )


def how_many(amount: float, total: int, name: str, of: str = "") -> int:
    """Number out of `total` that an amount selects, from one to all: an integer is a count, a decimal a fraction, ⌊fraction·total⌋."""
    if isinstance(amount, Integral):
        if not 1 <= amount <= total:
            raise ValueError(
                f"fractions[{name!r}]={amount}: a whole number is a count of {total}{' ' + of if of else ''}; give 1 to {total}, "
                "or a fraction as a decimal, 0.02 for two percent and 1.0 for all"
            )
        return int(amount)
    if not 0 < amount <= 1:
        raise ValueError(f"fractions[{name!r}]={amount}: a fraction lies in (0, 1], 0.02 for two percent; a whole number is a count")
    # 0.29 · 100 is 28.999999999999996 in floating point
    n = int(amount * total + 1e-9)
    if n == 0:
        raise ValueError(
            f"fractions[{name!r}]={amount} selects no neuron: {amount} of {total}{' ' + of if of else ''} is less than 1. "
            f"The least is {math.ceil(1e9 / total) / 1e9:.9g}"
        )
    return n


def amount_in_words(amount: float, name: str) -> str:
    """A count or a fraction of a site, in words."""
    return f"{amount:,} {name}" if isinstance(amount, Integral) else f"{100 * amount:g}% of {name}"
