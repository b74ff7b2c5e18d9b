"""The selection checks: keep only, step size, layer by layer, and where the two directions meet (METHODS 5, 11, 12)."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, permutations
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sepcap.models.sites import populations
from sepcap.selection.neurons import NeuronSet, random_ranks
from sepcap.selection.overlap import overlap
from sepcap.selection.score import Scores
from sepcap.statistics.intervals import Interval, bootstrap_interval
from sepcap.studies.base.seeds import bonferroni
from sepcap.studies.base.task_sets import WHOLE, Lesions, NamedTasks, Relative, n_highest, n_random
from sepcap.studies.pruning.config import PruningConfig
from sepcap.studies.pruning.on_disk.step_files import ROLES
from sepcap.studies.pruning.plan import plan
from sepcap.studies.pruning.prune import execute
from sepcap.studies.pruning.run import Run
from sepcap.studies.selection_checks.config import SelectionChecksConfig

OTHER_TEXTS = "1 step, other texts"
"""The run of "step-size" that measures the effect of other documents alone."""

Tables = dict[str, pd.DataFrame]
Rows = dict[str, dict[str, np.ndarray]]


@dataclass(frozen=True, eq=False)
class Bench:
    """What the checks share: a pair of tasks, the scores of each against the other, and evaluations without sets of neurons.

    Attributes:
        config, model, tasks: as requested.
        scores: task -> scores of that task against the other.
        lesions: evaluates the model without sets of neurons.
        neurons: number of neurons of the site.
        bar: progress bar; one step per evaluated set.
    """

    config: SelectionChecksConfig
    model: Any
    tasks: NamedTasks
    scores: dict[str, Scores]
    lesions: Lesions
    neurons: int
    bar: Any

    def rows(self, sets: Mapping[str, NeuronSet]) -> Rows:
        """Task -> name of the set -> sums per document, including those of the unpruned model."""
        whole = self.lesions.whole()
        rows: Rows = {task: {WHOLE: whole[task]} for task in self.tasks.names}
        for name, neurons in sets.items():
            for task, sums in self.lesions.without(name, neurons).items():
                rows[task][name] = sums
            self.bar.update()
        return rows

    def relative(self, rows: Rows) -> dict[str, Relative]:
        """Task -> accuracies relative to the unpruned model."""
        samples = self.lesions.samples
        return {task: Relative(of_task, self.config.metric, samples[task].fingerprint) for task, of_task in rows.items()}

    def random(self, n: int, seed: int) -> NeuronSet:
        """n random neurons of the site."""
        return n_random(self.model, self.config.site, n, self.neurons, seed)

    def highest(self, task: str, n: int) -> NeuronSet:
        """The n neurons with the highest scores of a task."""
        return n_highest(self.scores[task], self.config.site, n)

    def number(self, fraction: float) -> int:
        """Number of neurons of a share, ⌊fraction·N⌋ as everywhere."""
        return int(fraction * self.neurons + 1e-9)


def keep_only(bench: Bench) -> Tables:
    """Delete all neurons of the site except the highest of a task, or as many random ones, and evaluate both tasks."""
    seeds, sets, jobs = bench.config.seeds, {}, []
    for fraction in bench.config.fractions:
        n = bench.number(fraction)
        randoms = {f"keep-random-{n}-{seed}": ~bench.random(n, seed) for seed in seeds}
        for i, task in enumerate(bench.tasks.names):
            sets[f"keep-{i}-{n}"] = ~bench.highest(task, n)
            jobs.append((f"keep-{i}-{n}", list(randoms), {"kept": task, "fraction": fraction, "n": n}))
        sets |= randoms
    return {"keep_only": _table(bench, bench.relative(bench.rows(sets)), jobs)}


def layers(bench: Bench) -> Tables:
    """Delete the same share of the last layer, of the last two, and so on.

    The activations of a neuron on either task depend only on earlier layers. In this order, recollecting statistics after every
    deletion would give the same scores: one collection is exact.
    """
    site, sets, jobs = bench.config.site, {}, []
    fractions = {site: bench.config.layer_fraction}
    whole = {task: bench.scores[task].top(fractions, per_layer=True) for task in bench.tasks.names}
    randoms = {seed: NeuronSet.random(bench.model, fractions, seed=seed, per_layer=True) for seed in bench.config.seeds}
    depth = len(bench.scores[bench.tasks.names[0]][site])
    for last in range(1, depth + 1):
        of_seeds = {f"layers-random-{last}-{seed}": _last(neurons, site, last) for seed, neurons in randoms.items()}
        for i, task in enumerate(bench.tasks.names):
            sets[f"layers-{i}-{last}"] = _last(whole[task], site, last)
            where = {"pruned": task, "layers": last, "first_layer": depth - last, "n": len(sets[f"layers-{i}-{last}"])}
            jobs.append((f"layers-{i}-{last}", list(of_seeds), where))
        sets |= of_seeds
    return {"layers": _table(bench, bench.relative(bench.rows(sets)), jobs)}


def _last(neurons: NeuronSet, site: str, layers: int) -> NeuronSet:
    mask = neurons.masks[site].clone()
    mask[: len(mask) - layers] = False
    return NeuronSet({site: mask})


def _table(bench: Bench, relative: Mapping[str, Relative], jobs: Sequence[tuple[str, list[str], dict[str, Any]]]) -> pd.DataFrame:
    """One row per job and evaluated task."""
    documents = {task: sample.n_documents for task, sample in bench.lesions.samples.items()}
    return pd.DataFrame(
        where | {"evaluated": task, "n_documents": documents[task]} | of_task.columns(name, randoms)
        for name, randoms, where in jobs
        for task, of_task in relative.items()
    )


def step_size(bench: Bench) -> Tables:
    """Runs that prune equally many neurons in few large or many small steps; statistics are recollected at every step.

    Each task of the pair is pruned. One more run with a single step collects from other documents: two sets that differ no more than
    this one and that of the other single-step run differ by chance.
    """
    config, table, pairs = bench.config, [], []
    n = equal_number(config, bench.neurons)
    randoms = {f"steps-random-{n}-{seed}": bench.random(n, seed) for seed in config.seeds}
    of_random = bench.rows(randoms)
    for pruned, retain in permutations(bench.tasks.names):
        runs = {f"{k} step{'s' * (k > 1)}": _run(bench, pruned, n, k) for k in config.steps}
        runs[OTHER_TEXTS] = _run(bench, pruned, n, 1, seed=1 + max(config.seeds))
        roles = zip(ROLES, (pruned, retain), strict=True)
        rows = {task: of_random[task] | {label: run.per_cluster(role)[-1] for label, run in runs.items()} for role, task in roles}
        first = next(iter(runs))
        table += [
            {"pruned": pruned, "run": label, "steps": run.config["steps"], "n": n, "fraction": n / bench.neurons, "evaluated": task}
            | {"n_documents": bench.lesions.samples[task].n_documents}
            | of_task.columns(label, list(randoms))
            | of_task.difference(label, [first]).columns("minus_first")
            for task, of_task in bench.relative(rows).items()
            for label, run in runs.items()
        ]
        for one, other in combinations(runs, 2):
            total = overlap(runs[one].neurons(), runs[other].neurons()).query("layer.isna()").drop(columns="layer")
            pairs.append(total.assign(pruned=pruned, first=one, second=other))
    overlaps = pd.concat(pairs, ignore_index=True)
    return {"steps": pd.DataFrame(table), "step_overlaps": overlaps.assign(log10_p_corrected=bonferroni(overlaps["log10_p"]))}


def equal_number(config: SelectionChecksConfig, neurons: int) -> int:
    """The largest number of neurons, up to the requested share, that is divisible by every number of steps.

    Raises:
        ValueError: there is no such number.
    """
    common = math.lcm(*config.steps)
    n = int(config.pruned * neurons + 1e-9) // common * common
    if n == 0:
        raise ValueError(
            f"pruned={config.pruned}: {int(config.pruned * neurons)} neurons cannot be divided into each of {config.steps} equal steps; "
            f"this takes a multiple of {common}"
        )
    return n


def _run(bench: Bench, pruned: str, n: int, steps: int, seed: int = 0) -> Run:
    config, names = bench.config, bench.tasks.names
    side = names.index(pruned)
    forget, retain = (replace(bench.tasks.by_name[name], name=name) for name in (names[side], names[1 - side]))
    same = {name: getattr(config, name) for name in ("importance", "tokens", "eval_tokens", "batch_size", "context", "per_document")}
    pruning = PruningConfig(
        forget=forget, retain=retain, fractions={config.site: n / steps / bench.neurons}, steps=steps, seed=seed, **same
    )
    run = execute(plan(bench.model, pruning), bench.lesions.pieces.folder / "runs" / f"forget-{side}" / f"{steps}-steps-seed-{seed}")
    bench.bar.update(steps + 1)
    return run


def ranks(scores: Float[Tensor, "layer ..."]) -> Int[Tensor, " neuron"]:
    """Rank of every neuron by score, 1 for the highest; ties are ranked in the order of the neurons, as in every selection."""
    order = scores.flatten().double().argsort(descending=True, stable=True)
    places = torch.empty_like(order)
    places[order] = torch.arange(1, len(order) + 1, device=order.device)
    return places


def meeting_numbers(first: Int[Tensor, " neuron"], second: Int[Tensor, " neuron"]) -> tuple[int, int]:
    """Smallest n at which the first n of two rankings share a neuron, and at which they together contain every neuron.

    >>> meeting_numbers(torch.tensor([1, 2, 3, 4]), torch.tensor([4, 3, 2, 1]))
    (3, 2)
    """
    return int(torch.maximum(first, second).min()), int(torch.minimum(first, second).max())


def meeting(bench: Bench) -> Tables:
    """Prune each of the two tasks, from the two ends of the ranking, and find where the sets and the accuracies meet.

    Sets: the smallest share at which the two selections share a neuron, and the smallest at which every neuron is in at least one.
    Curves: accuracy on one task with its own neurons pruned, and with those of the other task pruned; they cross at the first share at
    which the first, having been below the second, no longer is. Plane: the first point along the trajectory of the first task, from
    the unpruned model, that is on the trajectory of the second, excluding their common start. All are linear between the measured
    shares. With everything pruned, both directions give the same model, so that they meet there at the latest.
    """
    config, names, seeds = bench.config, bench.tasks.names, bench.config.seeds
    sets, jobs, numbers = {}, [], [bench.number(fraction) for fraction in config.fractions]
    for fraction, n in zip(config.fractions, numbers, strict=True):
        randoms = {f"cut-random-{n}-{seed}": bench.random(n, seed) for seed in seeds}
        for i, task in enumerate(names):
            sets[f"cut-{i}-{n}"] = bench.highest(task, n)
            jobs.append((f"cut-{i}-{n}", list(randoms), {"pruned": task, "fraction": fraction, "n": n}))
        sets |= randoms
    relative = bench.relative(bench.rows(sets))
    found = _where_sets_meet(bench) + _where_curves_meet(bench, relative, numbers)
    both = [sets[f"cut-0-{n}"] & sets[f"cut-1-{n}"] for n in numbers]
    shared = pd.DataFrame(
        {
            "fraction": config.fractions,
            "n": numbers,
            "both": list(map(len, both)),
            "both_by_chance": [float(overlap(sets[f"cut-0-{n}"], sets[f"cut-1-{n}"])["expected"].iloc[0]) for n in numbers],
            "neither": [bench.neurons - 2 * n + len(common) for n, common in zip(numbers, both, strict=True)],
        }
    )
    return {"curves": _table(bench, relative, jobs), "meeting": pd.DataFrame(found), "shared": shared}


def _where_sets_meet(bench: Bench) -> list[dict[str, Any]]:
    site, n = bench.config.site, bench.neurons
    a, b = (ranks(bench.scores[task][site]) for task in bench.tasks.names)
    by_chance, among = [], populations(bench.model, site)
    for seed in bench.config.seeds:
        pair = (ranks(random_ranks(among, [seed, side])[site]) for side in (0, 1))
        by_chance.append(meeting_numbers(*pair))
    rows = []
    for i, what in enumerate(("selections first share a neuron", "every neuron is in at least one selection")):
        drawn = [numbers[i] / n for numbers in by_chance]
        row = {"what": what, "value": meeting_numbers(a, b)[i] / n, "low": math.nan, "high": math.nan}
        rows.append(row | {"random": float(np.mean(drawn)), "random_low": min(drawn), "random_high": max(drawn)})
    return rows


def _where_curves_meet(bench: Bench, relative: Mapping[str, Relative], numbers: Sequence[int]) -> list[dict[str, Any]]:
    names, at = bench.tasks.names, np.array([0.0, *bench.config.fractions])
    # [direction][evaluated task] -> values per share, and replicas
    path = [[relative[task].along([WHOLE, *(f"cut-{i}-{n}" for n in numbers)]) for task in names] for i in (0, 1)]
    rows = []
    for j, task in enumerate(names):
        own, other = path[j][j], path[1 - j][j]
        replicas = np.array([crossing(at, x, y) for x, y in zip(own[1], other[1], strict=True)])
        rows.append(_found(f"accuracy on {task}: curves cross", relative[task].interval(crossing(at, own[0], other[0]), replicas)))
    first, second = (np.stack([values for values, _ in of_direction], axis=1) for of_direction in path)
    drawn = (np.stack([replicas for _, replicas in of_direction], axis=2) for of_direction in path)
    fewest = min(of_task.n_clusters for of_task in relative.values())
    replicas = np.array([where_paths_meet(at, one, other) for one, other in zip(*drawn, strict=True)])
    words = [f"trajectories meet: share of {names[0]} neurons", f"trajectories meet: share of {names[1]} neurons"]
    words += [f"trajectories meet: accuracy on {task}" for task in names]
    for k, value in enumerate(where_paths_meet(at, first, second)):
        rows.append(_found(words[k], Interval(value, *bootstrap_interval(replicas[:, k], fewest))))
    return rows


def _found(what: str, found: Interval) -> dict[str, Any]:
    nothing = dict.fromkeys(("random", "random_low", "random_high"), math.nan)
    return {"what": what, "value": found.value, "low": found.low, "high": found.high} | nothing


def crossing(at: Float[np.ndarray, " share"], lower: Float[np.ndarray, " share"], upper: Float[np.ndarray, " share"]) -> float:
    """Where a curve that was below another first reaches it again, linear between shares; NaN if it never does.

    >>> crossing(np.array([0.0, 0.5, 1.0]), np.array([1.0, 0.0, 1.0]), np.array([1.0, 1.0, 0.0]))
    0.75
    """
    gap = upper - lower
    below = np.flatnonzero(gap > 0)
    back = np.flatnonzero(gap[below[0] :] <= 0) if len(below) else []
    if not len(back):
        return math.nan
    i = int(below[0] + back[0])
    return float(at[i - 1] + (at[i] - at[i - 1]) * gap[i - 1] / (gap[i - 1] - gap[i]))


def where_paths_meet(
    at: Float[np.ndarray, " share"], first: Float[np.ndarray, "share 2"], second: Float[np.ndarray, "share 2"]
) -> tuple[float, float, float, float]:
    """The first point along a path, from its start, that is on another path with the same start; the start is excluded.

    Args:
        at: share at every vertex, the same for both paths.
        first, second: vertices in the plane.

    Returns:
        Share on the first path and on the second, and both coordinates; NaN if they do not meet again. If both follow the same line
        for a while, the first vertex of either on the other counts.
    """
    p, d = first[:-1, None], np.diff(first, axis=0)[:, None]
    q, e = second[None, :-1], np.diff(second, axis=0)[None, :]
    with np.errstate(divide="ignore", invalid="ignore"):
        det = _cross(d, e)
        s, t = _cross(q - p, e) / det, _cross(q - p, d) / det
        i, j = np.indices(s.shape)
        apart = np.isfinite(s) & np.isfinite(t) & (np.minimum(s, t) > -1e-12) & (np.maximum(s, t) < 1 + 1e-12) & (i + s + j + t > 1e-9)
    candidates = list(zip((i + s)[apart], (j + t)[apart], strict=True))
    candidates += [(float(k), place) for k in range(1, len(first)) for place in _places(first[k], second)]
    candidates += [(place, float(k)) for k in range(1, len(second)) for place in _places(second[k], first)]
    if not candidates:
        return math.nan, math.nan, math.nan, math.nan
    walked, other = min(candidates)
    corners = np.arange(len(at), dtype=float)
    x, y = (float(np.interp(walked, corners, first[:, axis])) for axis in (0, 1))
    return float(np.interp(walked, corners, at)), float(np.interp(other, corners, at)), x, y


def _cross(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return a[..., 0] * b[..., 1] - a[..., 1] * b[..., 0]


def _places(point: np.ndarray, path: np.ndarray) -> list[float]:
    """Positions of a point on a path, excluding its start: number of the segment plus share of it."""
    begin, step = path[:-1], np.diff(path, axis=0)
    length = (step**2).sum(-1)
    along = np.where(length > 0, ((point - begin) * step).sum(-1) / np.where(length > 0, length, 1), 0.0)
    near = np.abs(begin + along[:, None] * step - point).max(-1) < 1e-12
    on = near & (along > -1e-12) & (along < 1 + 1e-12)
    return [float(k + along[k]) for k in np.flatnonzero(on) if k + along[k] > 1e-9]
