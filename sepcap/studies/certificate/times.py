"""How many tokens of fine-tuning a share of the original accuracy takes, and quotients of such numbers (METHODS 22)."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from torch import Tensor

from sepcap.evaluation.result import ratio
from sepcap.statistics.intervals import LEVEL, UNKNOWN, Ends, as_columns, bootstrap_interval, t_factor
from sepcap.studies.base.task_sets import WHOLE, Relative
from sepcap.studies.certificate.arms import MATCHED, RANDOM, REFERENCE
from sepcap.studies.certificate.measured import Sums
from sepcap.studies.certificate.plan import Plan

QUOTIENTS = {"ratio_matched": MATCHED, "ratio_random": RANDOM, "anamnesis_index": REFERENCE}
"""Column of a quotient of tokens -> the model in its denominator."""


@dataclass(frozen=True, eq=False)
class Curve:
    """The evaluations along one fine-tuning.

    Attributes:
        kind, variant, seed, lr: see `sepcap.studies.certificate.relearn.Run`.
        role: the task that was fine-tuned on.
        seen: tokens seen at every checkpoint, 0 first.
        sums: texts -> sums [checkpoint, document, count].
        scores: site -> scores of its neurons at the end, if they were computed.
        diverged: whether a loss was NaN or infinite, so that the last checkpoints are missing.
    """

    kind: str
    variant: str
    role: str
    seed: int
    lr: float
    seen: tuple[int, ...]
    sums: dict[str, Float[np.ndarray, "checkpoint cluster count"]]
    scores: dict[str, Tensor]
    diverged: bool

    def at(self, i: int) -> str:
        """Name of a checkpoint."""
        return f"{self.kind}-{self.variant}-{self.seed}@{i}"

    def step(self, i: int) -> Sums:
        """Sums at a checkpoint."""
        return {name: values[i] for name, values in self.sums.items()}

    def held_out(self, metric: str) -> float:
        """Mean accuracy over the checkpoints on held-out collection texts of the task that was fine-tuned on; −∞ if it diverged."""
        if self.diverged:
            return -math.inf
        return float(ratio(self.sums[f"held-{self.role}"][1:], metric).mean())

    def row(self, metric: str) -> dict[str, Any]:
        """How it was made, its accuracy on held-out texts, and both accuracies at the end."""
        row = {"kind": self.kind, "variant": self.variant, "seed": self.seed, "lr": self.lr, "diverged": self.diverged}
        row |= {"held_out": math.nan if self.diverged else self.held_out(metric)}
        return row | {role: float(ratio(self.sums[role][-1], metric)) for role in ("forget", "retain")}


def tokens_to(
    values: Float[np.ndarray, "*replica checkpoint"], seen: Int[np.ndarray, " checkpoint"], target: float
) -> Float[np.ndarray, "*replica"]:
    """Tokens after which a curve first reaches a target, by linear interpolation between checkpoints; infinite if it does not.

    >>> tokens_to(np.array([0.2, 0.4, 0.8]), np.array([0, 10, 20]), 0.5).item()
    12.5
    """
    over = values >= target
    first = over.argmax(-1)
    low, high = (np.take_along_axis(values, np.maximum(at, 0)[..., None], -1)[..., 0] for at in (first - 1, first))
    start, end = seen[np.maximum(first - 1, 0)], seen[first]
    with np.errstate(invalid="ignore", divide="ignore"):
        between = start + (end - start) * (target - low) / (high - low)
    found = np.where(first == 0, 0.0, between)
    return np.where(over.any(-1), found, np.inf)


def times_of(
    plan: Plan, curves: Mapping[tuple[str, str], Sequence[Curve]], whole: Sums, quotients: Mapping[str, str] = MappingProxyType(QUOTIENTS)
) -> pd.DataFrame:
    """Tokens to every target of every model and variant, and their quotients by those of the controls.

    Numbers are geometric means over seeds. A target that is not reached within the last checkpoint with every seed is censored: its number
    of tokens is infinite. If only one of the two numbers of a quotient is known, the quotient is a bound, and `_bound` states its
    direction. Where fine-tuning diverged at every rate, numbers are NaN. Quotients are of models that are fine-tuned in the same manner,
    with all weights on forget.
    """
    c = plan.config
    sums = {curve.at(i): curve.step(i)["forget"] for of_pair in curves.values() for curve in of_pair for i in range(len(curve.seen))}
    relative = Relative({WHOLE: whole["forget"]} | sums, c.metric, plan.evaluate["forget"].fingerprint)
    rows = []
    for target in c.targets:
        found = {pair: Tokens.of(relative, of_pair, target) for pair, of_pair in curves.items()}
        for (kind, variant), tokens in found.items():
            row: dict[str, Any] = {"kind": kind, "variant": variant, "target": target, **tokens.columns(relative.n_clusters)}
            for column, control in quotients.items():
                alike = control != kind and variant in ("all", "held") and (control, "all") in found
                row |= quotient(column, tokens, found[control, "all"], relative.n_clusters) if alike else _no_quotient(column, "")
            rows.append(row)
    return pd.DataFrame(rows)


@dataclass(frozen=True, eq=False)
class Tokens:
    """Numbers of tokens to a target, of every seed.

    Attributes:
        each: with every seed; infinite if the target is not reached, NaN if fine-tuning diverged.
        replicas: the same in bootstrap samples of the documents.
        budget: tokens seen at the last checkpoint.
    """

    each: Float[np.ndarray, " seed"]
    replicas: Float[np.ndarray, "replica seed"]
    budget: float

    @classmethod
    def of(cls, relative: Relative, curves: Sequence[Curve], target: float) -> "Tokens":
        """Of the curves of a model, one per seed."""
        if curves[-1].diverged:
            return cls(np.full(1, math.nan), np.full((len(relative.replicas), 1), math.nan), float(curves[-1].seen[-1]))
        seen = np.array(curves[0].seen)
        along = [relative.along([curve.at(i) for i in range(len(seen))]) for curve in curves]
        each, replicas = (np.stack([tokens_to(one[part], seen, target) for one in along], axis=-1) for part in (0, 1))
        return cls(each, replicas, float(seen[-1]))

    @property
    def diverged(self) -> bool:
        """Whether fine-tuning diverged."""
        return bool(np.isnan(self.each).any())

    @property
    def censored(self) -> bool:
        """Whether the target is not reached with every seed."""
        return bool(np.isinf(self.each).any())

    @property
    def mean(self) -> float:
        """Geometric mean over seeds: infinite with a seed that does not reach the target, 0 with one that never fell below it."""
        if self.censored or self.diverged or not self.each.all():
            return math.inf if self.censored else math.nan if self.diverged else 0.0
        return float(np.exp(np.log(self.each).mean()))

    def logs(self) -> tuple[Float[np.ndarray, " seed"], Float[np.ndarray, "replica seed"]]:
        """Logarithms of all numbers, those beyond the budget as the budget, and those below one token as one."""
        return np.log(self.each.clip(1, self.budget)), np.log(self.replicas.clip(1, self.budget))

    def over(self) -> float:
        """Share of the replicas in which a seed does not reach the target; 1 if that is so in the data."""
        return 1.0 if self.censored else float(np.isinf(self.replicas).any(-1).mean())

    def under(self) -> float:
        """Share of the replicas in which a seed is never below the target; 1 if that is so in the data."""
        return 1.0 if not self.each.all() else float((self.replicas == 0).any(-1).mean())

    def columns(self, clusters: int) -> dict[str, Any]:
        """Columns of a table."""
        ends = UNKNOWN if self.diverged else mean_interval(*self.logs(), clusters, self.under(), self.over())
        row = as_columns("tokens", self.mean, ends if self.each.any() else (0.0, 0.0))
        row |= {"censored": self.censored, "diverged": self.diverged, "budget": self.budget}
        return row | {"seeds": len(self.each), "seeds_reached": int(np.isfinite(self.each).sum())}


RARE = (1 - LEVEL) / 2
"""Share of replicas beyond one end of an interval."""


def mean_interval(
    each: Float[np.ndarray, " seed"], replicas: Float[np.ndarray, "replica seed"], clusters: int, under: float = 0.0, over: float = 0.0
) -> Ends:
    """95% interval of the exponential of a mean over seeds, from logarithms.

    With several seeds each half width is √(a² + b²), where a is that of Student's t over the seeds and b that of the bootstrap over the
    documents (as in `summed_interval`). With one seed the interval covers documents only.

    Args:
        each: logarithm with every seed.
        replicas: the same in bootstrap samples of the documents.
        clusters: number of clusters of documents.
        under, over: shares of the replicas in which a logarithm stands for an unknown one that is smaller, or larger; the end on that side
            is open where they are not rare.

    >>> low, high = mean_interval(np.log([1.0, 2.0, 4.0]), np.log([[2.0, 2.0, 2.0]] * 9), 9)
    >>> round(high / 2, 3)  # exp of 4.303 standard errors of log(2) / 3 ** 0.5
    5.595

    Source: Howe 1974, Approximate confidence limits on the mean of X + Y, for the sum of squares.
    """
    mean, drawn = float(each.mean()), replicas.mean(axis=1)
    low, high = bootstrap_interval(drawn, clusters)
    if len(each) > 1:
        half = t_factor(len(each)) * float(each.std(ddof=1)) / math.sqrt(len(each))
        low, high = mean - math.hypot(mean - low, half), mean + math.hypot(high - mean, half)
    with np.errstate(over="ignore"):
        return 0.0 if under > RARE else float(np.exp(low)), math.inf if over > RARE else float(np.exp(high))


def _no_quotient(name: str, why: str) -> dict[str, Any]:
    return as_columns(name) | {f"{name}_bound": why}


def quotient(name: str, one: Tokens, other: Tokens, clusters: int) -> dict[str, Any]:
    """Columns of a quotient of two numbers of tokens, seed by seed, with its interval; a bound if one of them is censored.

    In place of a censored number its budget is used, in the replicas too: the lower end of "at least" is then a lower bound, and the upper
    end of "at most" an upper bound, while the other end is open.

    >>> ten, never = (Tokens(np.full(3, n), np.full((9, 3), n), 100.0) for n in (10.0, np.inf))
    >>> {key: value if isinstance(value, str) else round(value, 6) for key, value in quotient("ratio", never, ten, 9).items()}
    {'ratio': 10.0, 'ratio_low': 10.0, 'ratio_high': inf, 'ratio_bound': 'at least'}
    """
    if one.diverged or other.diverged:
        return _no_quotient(name, "diverged")
    if one.censored and other.censored:
        return _no_quotient(name, "both censored")
    if not other.each.all():  # the control never fell below the target
        return _no_quotient(name, "control not below")
    bound = "at least" if one.censored else "at most" if other.censored else ""
    each, replicas = (mine - theirs for mine, theirs in zip(one.logs(), other.logs(), strict=True))
    value = 0.0 if not one.each.all() else float(np.exp(each.mean()))
    ends = mean_interval(each, replicas, clusters, one.under() + other.over(), one.over() + other.under())
    return as_columns(name, value, ends) | {f"{name}_bound": bound}
