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
from sepcap.statistics.intervals import as_columns, bootstrap_interval
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

    A target that is not reached within the last checkpoint is censored: its number of tokens is infinite. If only one of the two numbers
    of a quotient is known, the quotient is a bound, and `_bound` states its direction. Where fine-tuning diverged at every rate, numbers
    are NaN.
    """
    c = plan.config
    sums = {curve.at(i): curve.step(i)["forget"] for of_pair in curves.values() for curve in of_pair for i in range(len(curve.seen))}
    relative = Relative({WHOLE: whole["forget"]} | sums, c.metric, plan.evaluate["forget"].fingerprint)
    seeds = len(c.seeds)
    clusters = relative.n_clusters if seeds == 1 else min(relative.n_clusters, seeds)
    # the same seeds are drawn for all models: seed i of two models has texts in the same order
    drawn = np.random.default_rng(0).integers(seeds, size=(len(relative.replicas), seeds))
    broken = {pair for pair, of_pair in curves.items() if of_pair[-1].diverged}
    rows = []
    for target in c.targets:
        found, replicas = {}, {}
        for pair, of_pair in curves.items():
            if pair in broken:
                found[pair], replicas[pair] = math.nan, np.full(len(drawn), math.nan)
                continue
            seen = np.array(of_pair[0].seen)
            along = [relative.along([curve.at(i) for i in range(len(seen))]) for curve in of_pair]
            values = np.mean([one[0] for one in along], axis=0)
            each = np.stack([one[1] for one in along], axis=1)
            resampled = np.take_along_axis(each, drawn[..., None], axis=1).mean(1)
            found[pair], replicas[pair] = float(tokens_to(values, seen, target)), tokens_to(resampled, seen, target)
        for (kind, variant), tokens in found.items():
            ends = bootstrap_interval(replicas[kind, variant], clusters)
            row: dict[str, Any] = {"kind": kind, "variant": variant, "target": target, **as_columns("tokens", tokens, ends)}
            row |= {"censored": math.isinf(tokens), "diverged": (kind, variant) in broken, "budget": float(curves[kind, variant][0].seen[-1])}
            for column, control in quotients.items():
                if control != kind and (control, "all") in found:
                    last = float(curves[control, "all"][0].seen[-1])
                    pairs = (tokens, found[control, "all"]), (replicas[kind, variant], replicas[control, "all"])
                    row |= quotient(column, *pairs, (row["budget"], last), clusters)
                else:
                    row |= as_columns(column) | {f"{column}_bound": ""}
            rows.append(row)
    return pd.DataFrame(rows)


def quotient(
    name: str, tokens: tuple[float, float], replicas: tuple[np.ndarray, np.ndarray], budgets: tuple[float, float], clusters: int
) -> dict[str, Any]:
    """Columns of a quotient of two numbers of tokens, with its interval; a bound if one of them is censored.

    In place of a censored number its budget is used, in the replicas too: the lower end of "at least" is then a lower bound, and the upper
    end of "at most" an upper bound.

    >>> quotient("ratio", (np.inf, 10.0), (np.full(2, np.inf), np.full(2, 10.0)), (100.0, 100.0), 9)
    {'ratio': 10.0, 'ratio_low': 10.0, 'ratio_high': 10.0, 'ratio_bound': 'at least'}
    """
    one, other = tokens
    if math.isnan(one) or math.isnan(other):
        return as_columns(name) | {f"{name}_bound": "diverged"}
    if math.isinf(one) and math.isinf(other):
        return as_columns(name) | {f"{name}_bound": "both censored"}
    if not other:  # the control never fell below the target
        return as_columns(name) | {f"{name}_bound": "control not below"}
    bound = "at least" if math.isinf(one) else "at most" if math.isinf(other) else ""
    kept = [np.minimum(drawn, last) if math.isinf(n) else drawn for n, drawn, last in zip(tokens, replicas, budgets, strict=True)]
    with np.errstate(invalid="ignore", divide="ignore"):
        ends = bootstrap_interval(kept[0] / kept[1], clusters)
    return as_columns(name, min(one, budgets[0]) / min(other, budgets[1]), ends) | {f"{name}_bound": bound}
