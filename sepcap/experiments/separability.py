"""How separable two capabilities are, from the shape of a pruning trajectory (METHODS 11)."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float

from sepcap.errors import unknown
from sepcap.evaluation.next_token import ratio

ACCURACIES = ("top1", "top10", "skip50_top1", "skip50_top10")
BOOTSTRAP = 1000


def area(specific: Float[np.ndarray, "*replicate step"], general: Float[np.ndarray, "*replicate step"]) -> Float[np.ndarray, "*replicate"]:
    """Normalised area under the trajectory in the plane x = specific, y = general.

    The walk goes from (0, 0) to the last step and back along the trajectory to the first; the area of the
    trapezoids below it is divided by that of the triangle below the diagonal.

    Args:
        specific, general: accuracies per step, step 0 first.

    Returns:
        1 where nothing separates the two, 2 where the general one is kept to the end, 0 where the specific one is.

    >>> float(area(np.array([1.0, 0.0]), np.array([1.0, 1.0])))
    2.0
    """
    zero = np.zeros((*specific.shape[:-1], 1))
    x = np.concatenate([zero, specific[..., ::-1]], axis=-1)
    y = np.concatenate([zero, general[..., ::-1]], axis=-1)
    trapezoids = 0.5 * np.diff(x, axis=-1) * (y[..., 1:] + y[..., :-1])
    return np.asarray(trapezoids.sum(-1) / (0.5 * specific[..., 0] * general[..., 0]))


@dataclass(frozen=True, eq=False)
class Separability:
    """Areas and drops of one pruning run.

    Attributes:
        metric: accuracy they are computed from.
        specific: which role is on the x axis.
        forget, retain: the metric per step, step 0 first.
        area: normalised area; 1 not separable. That of a run which ends early is the area so far (see `left`): it grows while the run goes
            on, and compares only with runs that go as far.
        interval: 95% bootstrap interval of the area: the rows of both evaluation sets are resampled, the same ones at every step.
        percent: separability 100·|A − 1|.
        percent_interval: its 95% bootstrap interval.
        max_drop: maximum differential drop in percentage points, max of 100·[(1 − f_i/f_0) − (1 − r_i/r_0)].
        max_drop_step: the step where it is.
        above_random: area minus that of the random baseline, when one was given.
    """

    metric: str
    specific: Literal["forget", "retain"]
    forget: np.ndarray
    retain: np.ndarray
    area: float
    interval: tuple[float, float]
    percent: float
    percent_interval: tuple[float, float]
    max_drop: float
    max_drop_step: int
    above_random: float | None = None

    @property
    def left(self) -> tuple[float, float]:
        """Accuracy at the last step relative to the unpruned model's, of the forget and the retain task."""
        return float(self.forget[-1] / self.forget[0]), float(self.retain[-1] / self.retain[0])

    def retain_cost(self, forget_drop: float) -> float:
        """Relative drop of the retain task in percent where the forget task has first dropped by `forget_drop` percent.

        Linear between steps. `run.separability("top1").retain_cost(80)` is [SP]'s "80% forget drop costs …% retain".
        """
        return cost_at(self.forget, self.retain, forget_drop, "forget_drop")

    def forget_drop(self, retain_cost: float) -> float:
        """Relative drop of the forget task in percent where the retain task has first dropped by `retain_cost` percent."""
        return cost_at(self.retain, self.forget, retain_cost, "retain_cost")

    def __repr__(self) -> str:
        low, high = self.interval
        random = "" if self.above_random is None else f", above random {self.above_random:+.3f}"
        return (
            f"Separability({self.metric}: area={self.area:.3f} [{low:.3f}, {high:.3f}], {self.percent:.0f}% "
            f"[{self.percent_interval[0]:.0f}, {self.percent_interval[1]:.0f}], "
            f"max_drop={self.max_drop:.1f} at step {self.max_drop_step}{random}; at the last step forget {self.left[0]:.0%} and "
            f"retain {self.left[1]:.0%} left)"
        )


def cost_at(of: np.ndarray, other: np.ndarray, drop: float, name: str) -> float:
    """Relative drop of `other` in percent where `of` has first dropped by `drop` percent, between steps on a straight line."""
    if not 1 < drop <= 100:
        raise ValueError(f"{name}={drop}: give a relative drop in percent, above 1 and up to 100 (80 for 80%)")
    drops, costs = 100 * (1 - of / of[0]), 100 * (1 - other / other[0])
    reached = np.flatnonzero(drops >= drop)
    if not len(reached):
        raise ValueError(f"{name}={drop}: the largest drop of this run is {drops.max():.1f}%; prune further to reach {drop}%")
    i = int(reached[0])
    share = (drop - drops[i - 1]) / (drops[i] - drops[i - 1])
    return float(costs[i - 1] + share * (costs[i] - costs[i - 1]))


def separability(
    forget_rows: Float[np.ndarray, "step row count"],
    retain_rows: Float[np.ndarray, "step row2 count"],
    metric: str = "top1",
    *,
    specific: Literal["forget", "retain"] = "forget",
    seed: int = 0,
) -> Separability:
    """`Separability` from the evaluation sums per row of every step, step 0 first.

    Args:
        forget_rows, retain_rows: `Evaluation.per_row` of every step, stacked.
        metric: one of the accuracies "top1", "top10", "skip50_top1", "skip50_top10".
        specific: role on the x axis. "forget" gives 2 for perfect separation; "retain" ([SEP]'s specific focus) gives 0.
        seed: of the bootstrap.
    """
    if metric not in ACCURACIES:
        raise unknown("metric", metric, ACCURACIES, "Areas are made of accuracies.")
    if specific not in ("forget", "retain"):
        raise unknown("specific", specific, ("forget", "retain"))
    f, r = ratio(forget_rows, metric), ratio(retain_rows, metric)
    if f[0] == 0 or r[0] == 0:
        raise ValueError(f"{metric} of the unpruned model is 0 on the {'forget' if f[0] == 0 else 'retain'} task: there is nothing to lose")

    replicas = area_replicas(forget_rows, retain_rows, metric, specific=specific, seed=seed)
    replicas = replicas[np.isfinite(replicas)]
    value = float(area(f, r) if specific == "forget" else area(r, f))
    differential = 100 * ((1 - f / f[0]) - (1 - r / r[0]))
    low, high = np.percentile(replicas, [2.5, 97.5])
    low_percent, high_percent = np.percentile(100 * np.abs(replicas - 1), [2.5, 97.5])
    if low <= 1 <= high:
        low_percent = 0.0  # folding at 1 hides that no separability at all is among what is likely
    if min(forget_rows.shape[1], retain_rows.shape[1]) < 2:
        low = high = low_percent = high_percent = float("nan")  # one row says nothing about its spread
    return Separability(
        metric,
        specific,
        f,
        r,
        value,
        (float(low), float(high)),
        100 * abs(value - 1),
        (float(low_percent), float(high_percent)),
        float(differential.max()),
        int(differential.argmax()),
    )


def area_replicas(
    forget_rows: Float[np.ndarray, "step row count"],
    retain_rows: Float[np.ndarray, "step row2 count"],
    metric: str = "top1",
    *,
    specific: Literal["forget", "retain"] = "forget",
    seed: int = 0,
) -> Float[np.ndarray, " replicate"]:
    """Areas of 1000 bootstrap samples of the rows, the same ones at every step.

    The same seed draws the same rows for every run over the same tokens: differences between runs are paired. Not a number, where a
    sample has no hit of the unpruned model.
    """
    rng = np.random.default_rng(seed)
    forget, retain = resampled(forget_rows, metric, rng), resampled(retain_rows, metric, rng)
    with np.errstate(divide="ignore", invalid="ignore"):
        return area(forget, retain) if specific == "forget" else area(retain, forget)


def resampled(rows: np.ndarray, metric: str, rng: np.random.Generator) -> np.ndarray:
    """The metric per [replicate, step], the same rows drawn for every step of a replicate."""
    n = rows.shape[1]
    weights = rng.multinomial(n, np.full(n, 1 / n), size=BOOTSTRAP).astype(np.float64)
    sums = np.einsum("br,src->bsc", weights, rows)
    return ratio(sums[:, :, None, :], metric)
