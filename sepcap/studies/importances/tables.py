"""The tables of a comparison of importances (METHODS 19)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float

from sepcap.statistics.intervals import as_columns
from sepcap.studies.base.folder import as_json
from sepcap.studies.importances.config import ABS, CEILING, LABELLED, LEARNED, RANDOM, in_direction
from sepcap.studies.importances.measures import (
    MEASURES,
    RECALLS,
    ROLES,
    Effects,
    Estimate,
    estimates,
    over_runs,
    random_scores,
    reliability,
)
from sepcap.studies.importances.plan import Plan
from sepcap.studies.importances.result import ImportanceComparison
from sepcap.studies.learned.study import LearnedRanking
from sepcap.studies.pruning.config import DIRECTIONS, Direction
from sepcap.studies.pruning.separability import Separability, costs_at

RANDOM_DRAWS = 20
"""Number of random orders over which agreement is averaged; one per seed also has a trajectory."""

STABLE = 0.1
"""Share of the neurons whose selection is compared between calibration texts."""

HALF = 50
"""Drop of the forget task in percent at which the loss of the retain task is reported."""

Runs = dict[tuple[str, Direction, str], list[Separability]]


@dataclass(eq=False)
class Found:
    """All measurements of the study.

    Attributes:
        scores: (weights, site, direction, score) -> [seed, layer, *neuron].
        ablations: (weights, site) -> places of the neurons, and their effects.
        one_shot, iterative: (site, direction, score) -> separability of every draw or seed.
        learned: (site, direction) -> the learned order.
        choice: (site, direction, score) -> area on the collection texts.
        chosen: site -> the best scores on the collection texts, the best first.
    """

    scores: dict[tuple[str, str, Direction, str], np.ndarray] = field(default_factory=dict)
    ablations: dict[tuple[str, str], tuple[np.ndarray, Effects]] = field(default_factory=dict)
    one_shot: Runs = field(default_factory=dict)
    iterative: Runs = field(default_factory=dict)
    learned: dict[tuple[str, Direction], LearnedRanking] = field(default_factory=dict)
    choice: dict[tuple[str, Direction, str], float] = field(default_factory=dict)
    chosen: dict[str, list[str]] = field(default_factory=dict)


def result_of(prepared: Plan, found: Found) -> ImportanceComparison:
    """All tables, and the scores and effects of the measured neurons."""
    league, control, ceilings, trust, labels = [], [], [], [], []
    areas = min(sample.n_documents for sample in prepared.evaluate.values())
    tensors: dict[str, torch.Tensor] = {}
    for site in prepared.config.sites:
        places, effects = found.ablations["trained", site]
        tensors[f"{site}/places"] = torch.from_numpy(places)
        tensors |= {f"{site}/delta/{role}": torch.from_numpy(effects.delta[role]) for role in ROLES}
        agreed: dict[str, dict[Direction, Any]] = {"trained": {}, "untrained": {}}
        for way in DIRECTIONS:
            for weights in prepared.weights:
                agreed[weights][way] = _agreement(prepared, found, weights, site, way)
            row = {"site": site, "direction": way, **_tasks(prepared, way)}
            ceiling = reliability(_turned(effects, way), prepared.config.seed) if effects.clusters > 1 else {}
            ceilings.append(row | {"n_clusters": effects.clusters, **ceiling})
            counted = {"n_documents": areas, "n_clusters": effects.clusters}
            league += [row | counted | one for one in _league(prepared, found, site, way, agreed["trained"][way], ceiling)]
            control += [row | {"score": name} | one for name, one in _agreed_columns(agreed["untrained"].get(way, {})).items()]
            if prepared.compiled is not None:
                labels += [row | one for one in _labels(prepared, found, site, way)]
            for name in prepared.named(site):
                tensors[f"{site}/scores/{way}/{name}"] = torch.from_numpy(_at(found.scores["trained", site, way, name][0], places))
        if effects.clusters > 3:
            trust += _trust(prepared, found, site, agreed["untrained"])
    tables = {
        "league": pd.DataFrame(league),
        "trust": pd.DataFrame(trust, columns=None if trust else ["site", "direction", "score"]),
        "reliability": pd.DataFrame(ceilings),
        "control": pd.DataFrame(control, columns=None if control else ["site", "direction", "score"]),
        "choice": _choice(found),
        "trajectory": _trajectory(prepared, found),
    }
    if labels:
        tables["labels"] = pd.DataFrame(labels)
    return ImportanceComparison(as_json({"study": ImportanceComparison.STUDY, **prepared.resolved}), tables, tensors)


def _tasks(prepared: Plan, way: Direction) -> dict[str, str]:
    return dict(zip(ROLES, in_direction(way, *(prepared.resolved[role] for role in ROLES)), strict=True))


def _turned(effects: Effects, way: Direction) -> Effects:
    return effects if way == DIRECTIONS[0] else effects.reversed()


def _at(values: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Values [*several, unit] of the measured neurons."""
    return values[(..., *places.T)]


def _of_measured(prepared: Plan, found: Found, weights: str, site: str, way: Direction) -> dict[str, np.ndarray]:
    """Score -> [seed, unit] of the neurons that were ablated alone."""
    places, _ = found.ablations[weights, site]
    scores = {name: _at(found.scores[weights, site, way, name], places) for name in prepared.named(site)}
    if RANDOM in prepared.resolved["scores"]:
        shape = found.scores[weights, site, way, ABS].shape[1:]
        draws = [random_scores(shape, draw, prepared.config.seed) for draw in range(RANDOM_DRAWS)]
        scores[RANDOM] = _at(np.stack(draws), places)
    if weights == "trained" and (site, way) in found.learned:
        scores[LEARNED] = _at(found.learned[site, way][site].numpy()[None], places)
    return scores


def _agreement(prepared: Plan, found: Found, weights: str, site: str, way: Direction) -> dict[str, dict[str, Estimate]]:
    effects = _turned(found.ablations[weights, site][1], way)
    return estimates(_of_measured(prepared, found, weights, site, way), effects, prepared.config.seed)


def _agreed_columns(agreed: Mapping[str, Mapping[str, Estimate]]) -> dict[str, dict[str, float]]:
    """Score -> columns of all measures, and of the paired differences to abs."""
    rows: dict[str, dict[str, float]] = {}
    for measure, of_scores in agreed.items():
        for name, one in of_scores.items():
            row = rows.setdefault(name, {})
            row |= one.columns(measure) | {f"{measure}_seeds_sd": one.seeds_sd}
            if measure not in RECALLS:
                other = one.minus(of_scores[ABS]).columns(f"{measure}_minus_abs") if name != ABS else {}
                row |= other or as_columns(f"{measure}_minus_abs")
    return rows


def _league(
    prepared: Plan, found: Found, site: str, way: Direction, agreed: Mapping[str, Mapping[str, Estimate]], ceiling: Mapping[str, float]
) -> list[dict[str, Any]]:
    rows = []
    for name, columns in _agreed_columns(agreed).items():
        cost = found.learned[site, way].tables["cost"]["passes"].iloc[0] if name == LEARNED else prepared.cost_of(name)
        row = {"score": name, "passes": float(cost), "chosen": name in found.chosen.get(site, ())} | columns
        row["jaccard_10"] = _stability(found.scores.get(("trained", site, way, name)))
        for kind, runs in (("one_shot", found.one_shot), ("iterative", found.iterative)):
            row |= _areas(kind, runs.get((site, way, name), []), runs.get((site, way, ABS), []) if name != ABS else [])
        rows.append(row)
    above = {name: ceiling.get(f"{name}_half" if name in RECALLS else f"{name}_ceiling", float("nan")) for name in MEASURES}
    # Δ itself costs a pass per neuron
    return [*rows, {"score": CEILING, "passes": float(prepared.resolved["neurons"][site]), "chosen": False} | above]


def _stability(of_seeds: Float[np.ndarray, "seed layer *neuron"] | None) -> float:
    """Mean overlap |A∩B| / |A∪B| of the top tenths by every two calibration texts; NaN for one, and for an order that has none."""
    if of_seeds is None or len(of_seeds) < 2:
        return float("nan")
    flat = of_seeds.reshape(len(of_seeds), -1)
    n = max(1, int(STABLE * flat.shape[1]))
    tops = [set(np.argsort(-each, kind="stable")[:n].tolist()) for each in flat]
    return float(np.mean([len(a & b) / len(a | b) for a, b in combinations(tops, 2)]))


def _areas(kind: str, runs: Sequence[Separability], others: Sequence[Separability]) -> dict[str, float]:
    """Area and retain cost with their intervals, and the difference of the area to abs, paired by documents and, if they match, seeds."""
    names = (f"{kind}_area", f"{kind}_minus_abs", f"{kind}_retain_cost_{HALF}")
    row = {key: value for name in names for key, value in as_columns(name).items()} | {f"{kind}_seeds_sd": float("nan")}
    if not runs:
        return row
    clusters = runs[0].replicas.clusters
    areas, drawn = np.array([run.area for run in runs]), np.stack([run.replicas.area for run in runs])
    row |= as_columns(names[0], *over_runs(areas, drawn, clusters))
    row[f"{kind}_seeds_sd"] = float(areas.std(ddof=1)) if len(runs) > 1 else float("nan")
    if others:
        theirs, their_drawn = np.array([run.area for run in others]), np.stack([run.replicas.area for run in others])
        paired = len(others) == len(runs)
        values = areas - (theirs if paired else theirs.mean())
        row |= as_columns(names[1], *over_runs(values, drawn - (their_drawn if paired else their_drawn.mean(0)), clusters))
    costs = np.array([float(costs_at(run.forget, run.retain, HALF)) for run in runs])
    if np.isfinite(costs).all():
        replicas = np.stack([costs_at(run.replicas.forget, run.replicas.retain, HALF) for run in runs])
        row |= as_columns(names[2], *over_runs(costs, replicas, clusters))
    return row


def _trust(prepared: Plan, found: Found, site: str, control: Mapping[Direction, Any]) -> list[dict[str, Any]]:
    """The score that agrees best with Δ_forget − Δ_retain on one half of the documents, in both directions, measured on the other half."""
    measure = "spearman_difference"
    first, second = found.ablations["trained", site][1].halves(np.random.default_rng([prepared.config.seed, 4]))
    scores = {way: _of_measured(prepared, found, "trained", site, way) for way in DIRECTIONS}
    on_first = {way: estimates(scores[way], _turned(first, way), prepared.config.seed)[measure] for way in DIRECTIONS}
    mean = {name: float(np.mean([on_first[way][name].value for way in DIRECTIONS])) for name in prepared.named(site)}
    best = max(mean, key=lambda name: -np.inf if np.isnan(mean[name]) else mean[name])
    rows = []
    for way in DIRECTIONS:
        of_scores = estimates(scores[way], _turned(second, way), prepared.config.seed)[measure]
        for name in dict.fromkeys((best, ABS, *(name for name in (RANDOM, LEARNED) if name in of_scores))):
            row = {"site": site, "direction": way, **_tasks(prepared, way), "score": name, "best": name == best}
            row |= of_scores[name].columns(measure)
            row |= of_scores[name].minus(of_scores[ABS]).columns("minus_abs") if name != ABS else as_columns("minus_abs")
            there = control.get(way, {}).get(measure, {}).get(name)
            row |= as_columns("untrained") if there is None else there.columns("untrained")
            rows.append(row)
    return rows


def _labels(prepared: Plan, found: Found, site: str, way: Direction) -> list[dict[str, Any]]:
    """AUROC, AUPRC and recall of every score against the labels of a compiled model, means over calibration texts; and its area one-shot.

    The last row is the order that the labels give: its area is the most that knowing them allows.
    """
    compiled, rows = prepared.labelled(way), []
    every: dict[str, np.ndarray] = {name: found.scores["trained", site, way, name] for name in prepared.named(site)}
    if RANDOM in prepared.resolved["scores"]:
        shape = every[ABS].shape[1:]
        every[RANDOM] = np.stack([random_scores(shape, draw, prepared.config.seed) for draw in range(RANDOM_DRAWS)])
    if (site, way) in found.learned:
        every[LEARNED] = found.learned[site, way][site].numpy()[None]
    every[LABELLED] = prepared.by_labels(site, way)[None]
    for name, of_seeds in every.items():
        for among in ("used", "all"):
            each = pd.concat([compiled.metrics({site: torch.from_numpy(of_seed)}, among=among) for of_seed in of_seeds])
            row: dict[str, Any] = {"score": name, "among": among, "neurons": int(each["neurons"].iloc[0])}
            row["positives"] = int(each["forget"].iloc[0])
            for metric in ("auroc", "auprc", "recall"):
                values = each[metric].to_numpy(dtype=float)
                row |= {metric: values.mean(), f"{metric}_seeds_sd": values.std(ddof=1) if len(values) > 1 else float("nan")}
            runs = found.one_shot.get((site, way, name), [])
            rows.append(row | {"one_shot_area": float(np.mean([run.area for run in runs])) if runs else float("nan")})
    return rows


def _choice(found: Found) -> pd.DataFrame:
    rows = [
        {"site": site, "direction": way, "score": name, "area": area, "chosen": name in found.chosen.get(site, ())}
        for (site, way, name), area in found.choice.items()
    ]
    return pd.DataFrame(rows, columns=["site", "direction", "score", "area", "chosen"])


def _trajectory(prepared: Plan, found: Found) -> pd.DataFrame:
    rows = []
    for kind, runs in (("one-shot", found.one_shot), ("iterative", found.iterative)):
        for (site, way, name), several in runs.items():
            for number, one in enumerate(several):
                for step, (forget, retain) in enumerate(zip(one.forget, one.retain, strict=True)):
                    row = {"site": site, "direction": way, "score": name, "kind": kind, "run": number, "step": step}
                    rows.append(row | {"share": step / prepared.config.steps, "forget": float(forget), "retain": float(retain)})
    return pd.DataFrame(rows, columns=["site", "direction", "score", "kind", "run", "step", "share", "forget", "retain"])
