"""Measurements of the compared methods: means over seeds with their intervals over texts, and differences on the same texts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from sepcap.statistics.intervals import REPLICAS, Interval, bootstrap_interval
from sepcap.studies.pruning.on_disk.run_folder import RunFolder
from sepcap.studies.pruning.on_disk.step_files import ROLES
from sepcap.studies.pruning.separability import Separability, costs_at, halves, separability

Measure = Callable[[Separability], tuple[float, np.ndarray, int]]
"""Of one run: a value, its bootstrap replicas, and the number of clusters of documents that each of them drew."""


@dataclass(frozen=True)
class Mean(Interval):
    """The mean over seeds of a measure, with its interval over texts and its spread over seeds."""

    replicas: np.ndarray
    clusters: int
    seeds_sd: float

    def minus(self, other: "Mean") -> Interval:
        """The difference, paired by bootstrap sample on the same documents."""
        difference = self.replicas - other.replicas
        return Interval(self.value - other.value, *bootstrap_interval(difference, min(self.clusters, other.clusters)))


@dataclass(frozen=True)
class Measured:
    """Separability of a method in one direction, that of its random neurons, and the difference at their steps."""

    found: list[Separability]
    percent: Mean
    random: Mean
    gain: Interval
    seeds: int


def separabilities_of(runs: Sequence[RunFolder], metric: str, half: int | None = None, steps: slice = slice(None)) -> list[Separability]:
    """Separability of every run at some of its steps, on all documents or on one seeded half of those of both tasks."""
    found = []
    for run in runs:
        forget, retain = (run.per_cluster(role)[steps] for role in ROLES)
        if half is not None:
            rng = np.random.default_rng(0)
            forget, retain = (sums[:, halves(sums.shape[1], rng)[half]] for sums in (forget, retain))
        found.append(separability(forget, retain, metric))
    return found


def over_seeds(found: Sequence[Separability], measure: Measure) -> Mean:
    """The mean of a measure over runs that differ in their seed; NaN if there are none."""
    if not found:
        return Mean(np.nan, np.nan, np.nan, np.array([np.nan]), 0, np.nan)
    values, drawn, clusters = zip(*map(measure, found), strict=True)
    replicas = np.mean(drawn, axis=0)
    seeds_sd = float(np.std(values, ddof=1)) if len(values) > 1 else np.nan
    return Mean(float(np.mean(values)), *bootstrap_interval(replicas, clusters[0]), replicas, clusters[0], seeds_sd)


def percent_of(found: Separability) -> tuple[float, np.ndarray, int]:
    """100·(A − 1)."""
    return 100 * (found.area - 1), 100 * (found.replicas.area - 1), found.replicas.clusters


def drop_of(found: Separability) -> tuple[float, np.ndarray, int]:
    """Cross-fitted maximum differential drop."""
    return found.max_drop, found.replicas.max_drop, found.replicas.clusters // 2


def cost_of(found: Separability, forget_drop: float) -> tuple[float, np.ndarray, int]:
    """Retain cost of a forget drop; NaN if the run never dropped so far."""
    value = float(costs_at(found.forget, found.retain, forget_drop))
    if not np.isfinite(value):
        return np.nan, np.full(REPLICAS, np.nan), 0
    return value, costs_at(found.replicas.forget, found.replicas.retain, forget_drop), found.replicas.clusters
