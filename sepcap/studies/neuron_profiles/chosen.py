"""Which neurons, or heads, are examined, and what is known of them beforehand: scores with ranks, effects of ablation (METHODS 23)."""

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import pandas as pd
import torch

from sepcap.checks import wrong
from sepcap.models.sites import bind
from sepcap.selection.neurons import NeuronSet
from sepcap.selection.score import Scores
from sepcap.studies.neuron_profiles.config import NeuronProfilesConfig
from sepcap.studies.neuron_profiles.stream import Group
from sepcap.studies.single_ablations.result import SingleAblations

PLACE = ["site", "layer", "head", "neuron"]

MOST = 20_000
"""Largest number of units of one call."""


def units_of(
    model: Any, config: NeuronProfilesConfig, neurons: Any, scores: Scores | None, ablations: SingleAblations | None
) -> pd.DataFrame:
    """One row per unit to examine: site, layer, head and neuron, with scores and effects where they are known, the highest first.

    Raises:
        ValueError: no neuron, one that does not exist, scores or effects of another model.
    """
    whole = config.whole_heads
    if isinstance(neurons, Scores):
        table = _highest(neurons, config)
    elif isinstance(neurons, SingleAblations):
        whole = bool(neurons.config["whole_heads"])
        table = _table(neurons.top(min(config.n, len(neurons.places))), whole)
    elif isinstance(neurons, NeuronSet):
        table = _table(neurons, whole)
    else:
        table = _table(_placed(model, neurons, config), whole)
    if not len(table):
        raise ValueError("neurons is empty: there is none to examine; give a NeuronSet with neurons, Scores, or places such as [(4, 812)]")
    if len(table) > MOST:
        raise ValueError(f"neurons: {len(table):,} units; give at most {MOST:,}, such as scores.top({{'mlp': 200}})")
    _check(model, table)
    if scores is not None:
        table = table.merge(_scored(scores, config, whole), on=PLACE, how="left")
    if ablations is not None:
        table = table.merge(_effects(ablations), on=PLACE, how="left")
    order = [name for name in ("score", "delta_loss_forget") if name in table]
    if order:
        table = table.sort_values(order[0], ascending=False, kind="stable", ignore_index=True)
    return table


def groups_of(model: Any, units: pd.DataFrame) -> list[Group]:
    """The units by site and layer, in the order of the sites and layers."""
    found = []
    for (site, layer), rows in cast(Any, units.groupby(["site", "layer"], sort=True)):
        population = bind(model, str(site))
        heads = bool(rows["neuron"].isna().any())
        neuron = rows["head" if heads else "neuron"].to_numpy(dtype=np.int64)
        if not heads and len(population.shape) == 3:
            neuron = rows["head"].to_numpy(dtype=np.int64) * population.shape[2] + neuron
        found.append(Group(population, int(layer), torch.from_numpy(rows.index.to_numpy().copy()), torch.from_numpy(neuron.copy()), heads))
    return found


def _placed(model: Any, places: Any, config: NeuronProfilesConfig) -> NeuronSet:
    """The neurons, or heads, at some places of the site of the configuration."""
    population = bind(model, config.site)
    width = len(population.shape) - config.whole_heads
    names = "(layer, neuron)" if len(population.shape) == 2 else "(layer, head)" if config.whole_heads else "(layer, head, neuron)"
    right = f"a NeuronSet, Scores, SingleAblations, or places of site {config.site!r}, such as [{names}, …]"
    if isinstance(places, str) or not isinstance(places, Sequence):
        raise wrong("neurons", places, right)
    mask = torch.zeros(population.shape, dtype=torch.bool)
    for place in places:
        at: Any = tuple(place) if isinstance(place, Sequence) and not isinstance(place, str) else (place,)
        if len(at) != width or not all(isinstance(i, int | np.integer) and not isinstance(i, bool) for i in at):
            raise wrong("neurons", places, right)
        if not all(0 <= i < n for i, n in zip(at, population.shape, strict=False)):
            raise IndexError(f"neurons: {at} does not exist; site {config.site!r} has the shape {list(population.shape)}")
        mask[at] = True
    return NeuronSet({config.site: mask})


def _table(neurons: NeuronSet, whole_heads: bool) -> pd.DataFrame:
    if not whole_heads:
        return _columns(neurons.table)
    parts = []
    for site, mask in neurons.masks.items():
        if mask.dim() == 3 and bool(mask.any()):
            if bool((mask.any(-1) != mask.all(-1)).any()):
                raise ValueError("neurons holds parts of heads, but whole_heads=True; give NeuronSet.heads(model, [(layer, head), …])")
            at = mask.all(-1).nonzero().cpu().numpy()
            parts.append(pd.DataFrame({"site": site, "layer": at[:, 0], "head": at[:, 1]}))
        elif bool(mask.any()):
            raise ValueError(f"whole_heads=True: site {site!r} has no heads; give neurons of attention alone")
    return _columns(pd.concat(parts, ignore_index=True)) if parts else _columns(neurons.table)


def _highest(scores: Scores, config: NeuronProfilesConfig) -> pd.DataFrame:
    """The n highest of each site, or the n highest heads."""
    if config.whole_heads:
        heads = scores.heads(site=config.site)
        return _table(scores.top({"heads": min(config.n, heads.numel())}, head_site=config.site), True)
    return _table(scores.top({site: min(config.n, values.numel()) for site, values in scores.items()}), False)


def _columns(table: pd.DataFrame) -> pd.DataFrame:
    """All four columns of a place, empty where they say nothing."""
    for name in ("head", "neuron"):
        if name not in table:
            table = table.assign(**{name: pd.array([pd.NA] * len(table), dtype="Int64")})
    return pd.DataFrame(table[PLACE]).astype({"layer": "int64", "head": "Int64", "neuron": "Int64"}).reset_index(drop=True)


def _check(model: Any, table: pd.DataFrame) -> None:
    for site, rows in cast(Any, table.groupby("site")):
        shape = bind(model, str(site)).shape
        names = ["layer", "neuron"] if len(shape) == 2 else ["layer", "head", "neuron"]
        highest = [-1 if rows[name].isna().all() else int(rows[name].max()) for name in names]
        if any(number >= n for number, n in zip(highest, shape, strict=True)):
            raise ValueError(f"neurons: this model has the shape {list(shape)} at site {site!r}; the neurons are those of another model")


def _scored(scores: Scores, config: NeuronProfilesConfig, whole_heads: bool) -> pd.DataFrame:
    if not whole_heads:
        table = scores.table
        return pd.concat([_columns(table), table[[name for name in table if name not in PLACE]]], axis=1)
    heads = scores.heads(site=config.site).cpu()
    order = heads.flatten().argsort(descending=True, stable=True).numpy()
    layer, head = np.unravel_index(order, tuple(heads.shape))
    found = _columns(pd.DataFrame({"site": config.site, "layer": layer, "head": head}))
    return found.assign(score=heads.flatten().numpy()[order], rank=np.arange(1, len(order) + 1))


def _effects(ablations: SingleAblations) -> pd.DataFrame:
    table = ablations.table.assign(site=ablations.config["site"])
    deltas = [name for name in table if str(name).startswith("delta_")]
    return pd.concat([_columns(table), table[deltas]], axis=1)
