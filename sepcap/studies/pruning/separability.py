"""How separable two capabilities are, from the shape of a pruning trajectory (METHODS 11)."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from sepcap.checks import checked
from sepcap.errors import unknown
from sepcap.evaluation.result import columns_of, ratio
from sepcap.evaluation.trajectory import area
from sepcap.latex import latex_table
from sepcap.statistics.intervals import REPLICAS, UNKNOWN, Cluster, Ends, bootstrap_interval, bootstrap_weights, in_percent

ACCURACIES = ("top1", "top10", "skip50_top1", "skip50_top10")

BASELINES = {"uniform": "", "per_layer": "per layer", "activity": "per layer and activity"}
"""Kind of random neurons -> how they are matched with those of a run."""


@dataclass(frozen=True, eq=False)
class Replicas:
    """Bootstrap samples of the documents of both tasks, with the same documents at every step.

    The same seed draws the same documents for every run over the same texts, sample by sample: differences between runs are paired.

    Attributes:
        forget, retain: accuracy per step.
        area: normalised area; NaN if the unpruned model has no hit in a sample.
        max_drop: cross-fitted maximum differential drop, with its steps fixed.
        clusters: number of clusters drawn, of the task that has fewer.
        samples: evaluation tokens that they are drawn from, of the forget and the retain task; None if unknown.
        cluster: unit that is drawn.
        seed: seed of the draws.
    """

    forget: Float[np.ndarray, "replica step"]
    retain: Float[np.ndarray, "replica step"]
    area: Float[np.ndarray, " replica"]
    max_drop: Float[np.ndarray, " replica"]
    clusters: int
    samples: tuple[str, str] | None = None
    cluster: Cluster = "document"
    seed: int = 0


@dataclass(frozen=True, eq=False)
class Separability:
    """Areas and drops of one pruning run.

    Attributes:
        metric: accuracy they are computed from.
        specific: which role is on the x axis.
        forget, retain: the metric per step, step 0 first.
        area: normalised area; 1 is not separable. For a run that ends early it is the area so far (see `remaining`): it grows as the run
            continues, and is comparable only with runs that go as far.
        interval: 95% bootstrap interval of the area: the documents of both evaluation sets are resampled, the same ones at every step.
        percent: separability 100·(A − 1), or 100·(1 − A) if `specific` is "retain": negative if the retain task drops first.
        percent_interval: its 95% bootstrap interval.
        max_drop: maximum differential drop in percentage points, 100·[(1 − f_i/f_0) − (1 − r_i/r_0)] at the step where it is highest.
            The step is chosen on one half of the documents of both tasks and the drop measured on the other half, and the reverse; this
            is the mean of the two. The plain maximum over steps, `differential_drop.max()`, picks what is high by chance: it is too high.
        max_drop_lost: accuracy that the forget and the retain task lost there, in percent, measured like `max_drop`, which is
            their difference.
        max_drop_step: the step where the differential drop of all documents together is highest.
        max_drop_interval: 95% bootstrap interval of `max_drop`, the documents resampled within the halves, the two steps fixed. It covers
            the drop at the steps that were chosen.
        n_clusters: units drawn of the forget and of the retain task: documents, sets of documents that share rows, or packages.
        replicas: the bootstrap samples.
        above_random: area minus that of random neurons, the mean over their seeds, if a baseline was given. Both are computed at the steps
            at which the baseline was evaluated; `area` itself can have more steps.
        above_random_interval: its 95% bootstrap interval over documents, the same ones drawn for both, for the seeds that were run.
        baseline: kind of the random neurons, "uniform", "per_layer" or "activity".
        seeds: number of their seeds.
        seeds_sd: standard deviation of their area over seeds; NaN for one seed.

    With fewer than two documents of a task there are no halves and no intervals: `max_drop` is then the plain maximum.
    """

    metric: str
    specific: Literal["forget", "retain"]
    forget: np.ndarray
    retain: np.ndarray
    area: float
    interval: Ends
    percent: float
    percent_interval: Ends
    max_drop: float
    max_drop_lost: tuple[float, float]
    max_drop_step: int
    max_drop_interval: Ends
    n_clusters: tuple[int, int]
    replicas: Replicas
    above_random: float | None = None
    above_random_interval: Ends = UNKNOWN
    baseline: str = ""
    seeds: int = 0
    seeds_sd: float = math.nan

    @property
    def table(self) -> pd.DataFrame:
        """One row: metric, area, separability in percent, maximum differential drop in points, area above random; ends of 95% intervals."""
        found = {"area": (self.area, self.interval), "separability": (self.percent, self.percent_interval)}
        found["max_drop"] = self.max_drop, self.max_drop_interval
        if self.above_random is not None:
            found["above_random"] = self.above_random, self.above_random_interval
        row: dict[str, Any] = {"metric": self.metric}
        for name, (value, (low, high)) in found.items():
            row |= {name: value, f"{name}_low": low, f"{name}_high": high}
        return pd.DataFrame([row])

    def to_latex(self, **options: Any) -> str:
        """`.table` for a paper, see `sepcap.latex.latex_table`."""
        return latex_table(self.table, **options)

    @property
    def remaining(self) -> tuple[float, float]:
        """Accuracy at the last step relative to the unpruned model's, of the forget and the retain task."""
        return float(self.forget[-1] / self.forget[0]), float(self.retain[-1] / self.retain[0])

    @property
    def differential_drop(self) -> Float[np.ndarray, " step"]:
        """100·[(1 − f_i/f_0) − (1 − r_i/r_0)] at every step, in percentage points, on all documents."""
        return differential_drop(self.forget, self.retain)

    @checked()
    def above_random_in_words(self, digits: int = 2) -> str:
        """Area above that of random neurons: interval over texts, kind of neurons, and spread over seeds."""
        (low, high), matched = self.above_random_interval, BASELINES.get(self.baseline, "")
        spread = f", standard deviation over seeds {self.seeds_sd:.{digits}f}" if self.seeds > 1 else ""
        return (
            f"{self.above_random:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}] above random neurons{' matched ' * bool(matched)}"
            f"{matched} ({self.seeds} seed{'s' * (self.seeds > 1)}{spread})"
        )

    @checked()
    def retain_cost(self, forget_drop: float) -> float:
        """Relative drop of the retain task in percent where the forget task has first dropped by `forget_drop` percent.

        Linear between steps. `run.separability("top1").retain_cost(80)` is [SP]'s "80% forget drop costs …% retain".
        """
        return cost_at(self.forget, self.retain, forget_drop, "forget_drop")

    @checked()
    def retain_cost_interval(self, forget_drop: float) -> Ends:
        """95% bootstrap interval of `retain_cost(forget_drop)`; its upper end is infinite if too many samples never drop so far."""
        self.retain_cost(forget_drop)  # raises an error if the drop is wrong
        return bootstrap_interval(costs_at(self.replicas.forget, self.replicas.retain, forget_drop), self.replicas.clusters)

    @checked()
    def forget_drop(self, retain_cost: float) -> float:
        """Relative drop of the forget task in percent where the retain task has first dropped by `retain_cost` percent."""
        return cost_at(self.retain, self.forget, retain_cost, "retain_cost")

    @checked()
    def forget_drop_interval(self, retain_cost: float) -> Ends:
        """95% bootstrap interval of `forget_drop(retain_cost)`; its upper end is infinite if too many samples never drop so far."""
        self.forget_drop(retain_cost)
        return bootstrap_interval(costs_at(self.replicas.retain, self.replicas.forget, retain_cost), self.replicas.clusters)

    @checked()
    def minus(self, other: "Separability") -> tuple[float, Ends]:
        """Area minus that of another run over the same documents, with its paired 95% bootstrap interval.

        Raises:
            ValueError: an area of other documents, another metric, swapped roles, or another bootstrap draw.
        """
        its = other._paired_by
        for name, mine in self._paired_by.items():
            if mine != its[name]:
                raise ValueError(f"other: {name} is {its[name]!r}, here {mine!r}; only areas of the same metric and documents are paired")
        return self.area - other.area, bootstrap_interval(self.replicas.area - other.replicas.area, self.replicas.clusters)

    @property
    def _paired_by(self) -> dict[str, Any]:
        """What areas must have in common to be paired."""
        drawn = {name: getattr(self.replicas, name) for name in ("samples", "cluster", "seed")}
        return {"metric": self.metric, "specific": self.specific, "n_clusters": self.n_clusters, **drawn}

    def __repr__(self) -> str:
        def ends(interval: Ends, digits: int) -> str:
            return "[{:.{d}f}, {:.{d}f}]".format(*interval, d=digits)

        random = "" if self.above_random is None else f", {self.above_random_in_words(3)}"
        return (
            f"Separability({self.metric}: area={self.area:.3f} {ends(self.interval, 3)}, "
            f"{in_percent(self.percent, self.percent_interval)}, max_drop={self.max_drop:.1f} {ends(self.max_drop_interval, 1)} at step "
            f"{self.max_drop_step}{random}; at the last step forget {self.remaining[0]:.0%} and retain {self.remaining[1]:.0%} left; "
            f"{self.n_clusters[0]:,} and {self.n_clusters[1]:,} clusters of documents)"
        )


def differential_drop(
    forget: Float[np.ndarray, "*replica step"], retain: Float[np.ndarray, "*replica step"]
) -> Float[np.ndarray, "*replica step"]:
    """100·[(1 − f_i/f_0) − (1 − r_i/r_0)] in percentage points, from accuracies per step, step 0 first."""
    return 100 * (relative(retain) - relative(forget))


def relative(values: Float[np.ndarray, "*replica step"]) -> Float[np.ndarray, "*replica step"]:
    """Accuracies per step as shares of the first, that of the unpruned model; NaN if that is 0."""
    first = np.broadcast_to(values[..., :1], values.shape)
    return np.divide(values, first, out=np.full(values.shape, np.nan), where=first != 0)


def cost_at(of: np.ndarray, other: np.ndarray, drop: float, name: str) -> float:
    """Relative drop of `other` in percent where `of` has first dropped by `drop` percent, linear between steps."""
    if not 1 < drop <= 100:
        raise ValueError(f"{name}={drop}: give a relative drop in percent, above 1 and up to 100 (80 for 80%)")
    cost = float(costs_at(of, other, drop))
    if math.isinf(cost):
        most = (100 * (1 - of / of[0])).max()
        raise ValueError(f"{name}={drop}: the largest drop of this run is {most:.1f}%; prune further to reach {drop}%")
    return cost


def costs_at(
    of: Float[np.ndarray, "*replica step"], other: Float[np.ndarray, "*replica step"], drop: float
) -> Float[np.ndarray, "*replica"]:
    """`cost_at` of many trajectories; infinite if a drop is never reached, NaN if the unpruned model has no hit."""
    drops, costs = (100 * (1 - relative(values)) for values in (of, other))
    reached = drops >= drop
    after = np.maximum(reached.argmax(-1), 1)[..., None]  # the first drop is 0, so that none is reached there
    (d0, d1), (c0, c1) = ([np.take_along_axis(values, at, -1)[..., 0] for at in (after - 1, after)] for values in (drops, costs))
    with np.errstate(divide="ignore", invalid="ignore"):  # where it is not reached
        found = np.where(reached.any(-1), c0 + (drop - d0) / (d1 - d0) * (c1 - c0), np.inf)
    return np.where(np.isnan(drops[..., 0] + costs[..., 0]), np.nan, found)


def separability(
    forget: Float[np.ndarray, "step cluster count"],
    retain: Float[np.ndarray, "step cluster2 count"],
    metric: str = "top1",
    *,
    specific: Literal["forget", "retain"] = "forget",
    seed: int = 0,
    samples: tuple[str, str] | None = None,
    cluster: Cluster = "document",
) -> Separability:
    """`Separability` from the evaluation sums per document of every step, step 0 first.

    Args:
        forget, retain: `Evaluation.per_cluster` of every step, stacked.
        metric: one of the accuracies "top1", "top10", "skip50_top1", "skip50_top10".
        specific: role on the x axis. "forget" gives 2 for perfect separation; "retain" ([SEP]'s specific focus) gives 0.
        seed: seed of the bootstrap, and of the halves that the step of `max_drop` is chosen on.
        samples: evaluation tokens of both tasks, so that areas of other tokens are not paired with these.
        cluster: unit of the sums, documents or packages.
    """
    check_accuracy(metric)
    if specific not in ("forget", "retain"):
        raise unknown("specific", specific, ("forget", "retain"))
    f, r = ratio(forget, metric), ratio(retain, metric)
    if f[0] == 0 or r[0] == 0:
        raise ValueError(f"{metric} of the unpruned model is 0 on the {'forget' if f[0] == 0 else 'retain'} task: no accuracy to lose")

    lost, drops = cross_fitted_drop(forget, retain, metric, seed=seed)
    replicas = dataclasses.replace(_replicas(forget, retain, metric, specific, drops, seed), samples=samples, cluster=cluster, seed=seed)
    value = float(area(f, r) if specific == "forget" else area(r, f))
    interval = bootstrap_interval(replicas.area, replicas.clusters)
    ends = [_percent(end, specific) for end in interval]
    return Separability(
        metric,
        specific,
        f,
        r,
        value,
        interval,
        _percent(value, specific),
        (min(ends), max(ends)),
        lost[0] - lost[1],
        lost,
        int(differential_drop(f, r).argmax()),
        bootstrap_interval(drops, replicas.clusters // 2),
        (forget.shape[1], retain.shape[1]),
        replicas,
    )


def _percent(area: float, specific: Literal["forget", "retain"]) -> float:
    """Separability in percent: above 0 if the forget task drops first, whichever task is on the x axis."""
    return 100 * (area - 1) if specific == "forget" else 100 * (1 - area)


def _replicas(
    forget: np.ndarray, retain: np.ndarray, metric: str, specific: Literal["forget", "retain"], drops: np.ndarray, seed: int
) -> Replicas:
    rng = np.random.default_rng(seed)
    f, r = resampled(forget, metric, rng), resampled(retain, metric, rng)
    x, y = (relative(f), relative(r)) if specific == "forget" else (relative(r), relative(f))
    return Replicas(f, r, area(x, y), drops, min(forget.shape[1], retain.shape[1]))


def resampled(sums: Float[np.ndarray, "step cluster count"], metric: str, rng: np.random.Generator) -> Float[np.ndarray, "replica step"]:
    """The metric in 1000 bootstrap samples of the documents, the same ones for every step of a sample."""
    weights = bootstrap_weights(sums.shape[1], rng)
    hits, n = columns_of(sums, metric)
    with np.errstate(divide="ignore", invalid="ignore"):
        return (weights @ hits.T) / (weights @ n.T)


def cross_fitted_drop(
    forget: Float[np.ndarray, "step cluster count"], retain: Float[np.ndarray, "step cluster2 count"], metric: str, *, seed: int = 0
) -> tuple[tuple[float, float], Float[np.ndarray, " replica"]]:
    """Differential drop at the step where it is highest, chosen on one half of the documents and measured on the other, see `Separability`.

    Returns:
        Accuracy that the forget and the retain task lost there, in percent, the means over both assignments of the halves, whose
        difference is the drop; and bootstrap replicas of the drop: documents drawn within the halves, the two steps fixed. With fewer than
        two documents of a task, or no hit of the unpruned model in a half: the losses at the plain maximum, and NaN replicas.
    """
    rng = np.random.default_rng([seed, 1])
    pairs = list(zip(halves(forget.shape[1], rng), halves(retain.shape[1], rng), strict=True))
    parts = [(forget[:, mine], retain[:, theirs]) for mine, theirs in pairs]
    lost = [_lost(f, r, metric) for f, r in parts]
    if not np.isfinite(lost[0]).all() or not np.isfinite(lost[1]).all():
        (of_forget, of_retain) = _lost(forget, retain, metric)
        plain = (of_forget - of_retain).argmax()
        return (float(of_forget[plain]), float(of_retain[plain])), np.full(REPLICAS, np.nan)
    steps = [int((of_forget - of_retain).argmax()) for of_forget, of_retain in reversed(lost)]
    of_forget, of_retain = np.mean([of_half[:, step] for of_half, step in zip(lost, steps, strict=True)], axis=0)
    drawn = []
    for (f, r), step in zip(parts, steps, strict=True):
        f, r = (resampled(sums[[0, step]], metric, rng) for sums in (f, r))
        drawn.append(differential_drop(f, r)[:, 1])
    return (float(of_forget), float(of_retain)), np.mean(drawn, axis=0)


def _lost(
    forget: Float[np.ndarray, "step cluster count"], retain: Float[np.ndarray, "step cluster2 count"], metric: str
) -> Float[np.ndarray, "role step"]:
    """Accuracy lost by both tasks at every step, in percent."""
    return np.stack([100 * (1 - relative(ratio(sums, metric))) for sums in (forget, retain)])


def halves(clusters: int, rng: np.random.Generator) -> list[Int[np.ndarray, " cluster"]]:
    """Two random halves of the indices of the clusters; if their number is odd, the second has one more."""
    order = rng.permutation(clusters)
    return [order[: clusters // 2], order[clusters // 2 :]]


def check_accuracy(metric: str) -> None:
    """Raise a ValueError if a metric is no accuracy."""
    if metric not in ACCURACIES:
        raise unknown("metric", metric, ACCURACIES, "Areas are computed from accuracies.")
