"""How well scores agree with the exact effects of neurons: rank correlation and recall, with intervals, and their ceiling (METHODS 19)."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Float, Int
from scipy.stats import rankdata

from sepcap.statistics.intervals import Ends, as_columns, bootstrap_interval, bootstrap_weights, summed_interval
from sepcap.studies.pruning.separability import halves

ROLES = ("forget", "retain")

RECALLS = {"recall_1": 0.01, "recall_2": 0.02, "recall_5": 0.05}
"""Measure -> share of the neurons, those with the largest Δ_forget − Δ_retain."""

MEASURES = ("spearman_forget", "spearman_difference", *RECALLS)

SPLITS = 100
"""Number of random splits of the documents into halves, from which the reliability of Δ is estimated."""

DRAWS = 100
"""Bootstrap samples of the neurons, where these are a sample."""

PART = 100
"""Replicas that are ranked at once."""


@dataclass(frozen=True, eq=False)
class Effects:
    """Changes of the loss when each neuron alone is ablated, by document.

    Attributes:
        sums: role -> changes of the summed loss of every document, in nats.
        predictions: role -> predictions of every document.
        of: neurons of the site; more than are ablated, if these are a random sample.
    """

    sums: Mapping[str, Float[np.ndarray, "unit _"]]
    predictions: Mapping[str, Float[np.ndarray, " _"]]
    of: int

    @property
    def units(self) -> int:
        """Number of neurons that were ablated."""
        return len(self.sums[ROLES[0]])

    @property
    def clusters(self) -> int:
        """Number of documents, of the task that has fewer."""
        return min(len(n) for n in self.predictions.values())

    def reversed(self) -> "Effects":
        """The same with the tasks swapped."""
        swapped = dict(zip(ROLES, ROLES[::-1], strict=True))
        sums, predictions = ({role: of[swapped[role]] for role in ROLES} for of in (self.sums, self.predictions))
        return Effects(sums, predictions, self.of)

    @cached_property
    def delta(self) -> dict[str, Float[np.ndarray, " unit"]]:
        """Role -> Δ: change of the mean loss, in nats."""
        return {role: self.sums[role].sum(1) / self.predictions[role].sum() for role in ROLES}

    def replicas(self) -> dict[str, Float[np.ndarray, "replica unit"]]:
        """Role -> Δ on bootstrap samples of the documents, the same ones for every neuron; not kept, since it can be large."""
        rng, found = np.random.default_rng(0), {}
        for role in ROLES:
            weights = bootstrap_weights(len(self.predictions[role]), rng)
            found[role] = (weights @ self.sums[role].T) / (weights @ self.predictions[role])[:, None]
        return found

    def part(self, of: Mapping[str, Int[np.ndarray, " _"]]) -> "Effects":
        """The effects on some documents of each task."""
        sums = {role: self.sums[role][:, of[role]] for role in ROLES}
        return Effects(sums, {role: self.predictions[role][of[role]] for role in ROLES}, self.of)

    def halves(self, rng: np.random.Generator) -> tuple["Effects", "Effects"]:
        """The effects on two random halves of the documents of both tasks.

        Raises:
            ValueError: a task with one document.
        """
        if self.clusters < 2:
            raise ValueError("the effects are of one document of a task, which has no halves; give more effect_tokens=")
        parts = {role: halves(len(self.predictions[role]), rng) for role in ROLES}
        first, second = ({role: parts[role][i] for role in ROLES} for i in (0, 1))
        return self.part(first), self.part(second)


@dataclass(frozen=True, eq=False)
class Estimate:
    """A measure of one score: its mean over calibration texts.

    Attributes:
        values: one per sample of calibration texts, or per draw of a random score.
        replicas: their mean on bootstrap samples of the documents of Δ.
        clusters: number of documents.
        drawn: their mean on bootstrap samples of the neurons; empty if all were ablated.
        units: number of neurons.
        left: share of the site's neurons that were not ablated.
        apart: standard error over calibration texts, and their number, of a score that was subtracted and has other texts.
    """

    values: Float[np.ndarray, " seed"]
    replicas: Float[np.ndarray, " replica"]
    clusters: int
    drawn: Float[np.ndarray, " _"]
    units: int
    left: float
    apart: tuple[tuple[float, int], ...] = ()

    @property
    def value(self) -> float:
        """The mean over calibration texts."""
        return float(self.values.mean())

    @property
    def seeds_sd(self) -> float:
        """Standard deviation over calibration texts; NaN for one."""
        return float(self.values.std(ddof=1)) if len(self.values) > 1 else math.nan

    @property
    def ends(self) -> Ends:
        """95% interval over documents, calibration texts and, where they are a sample, neurons. One sample of texts has none over them.

        Standard errors are added in squares. The bootstrap gives standard errors here, not percentiles: each replica of Δ has the noise
        of Δ twice, so that correlations of replicas lie below the correlation itself.
        """
        parts = [(float(self.replicas.std(ddof=1)), self.clusters), *self.apart]
        if len(self.values) > 1:
            parts.append((self.seeds_sd / math.sqrt(len(self.values)), len(self.values)))
        if len(self.drawn):
            parts.append((float(self.drawn.std(ddof=1)) * math.sqrt(self.left), self.units))
        errors, counts = zip(*parts, strict=True)
        return summed_interval(self.value, errors, counts)

    def minus(self, other: "Estimate") -> "Estimate":
        """The difference to another score, paired by documents, neurons and, if both have as many, calibration texts."""
        n = len(other.values)
        paired = len(self.values) == n
        values = self.values - (other.values if paired else other.value)
        apart = () if paired or n < 2 else ((other.seeds_sd / math.sqrt(n), n),)
        replicas, drawn = self.replicas - other.replicas, self.drawn - other.drawn
        return dataclasses.replace(self, values=values, replicas=replicas, drawn=drawn, apart=apart)

    def columns(self, name: str) -> dict[str, float]:
        """The value and both ends as columns of a table; ends of a measure, not of a difference, are values that it can have."""
        low, high = np.clip(self.ends, 0 if name in RECALLS else -1, 1).tolist() if name in MEASURES else self.ends
        return as_columns(name, self.value, (low, high))


def ranked(values: Float[np.ndarray, "*several unit"]) -> Float[np.ndarray, "*several unit"]:
    """Mean ranks, centred and of length 1; NaN where all values are equal. Products of two of these are Spearman correlations."""
    centred = rankdata(values, axis=-1) - (values.shape[-1] + 1) / 2
    with np.errstate(invalid="ignore"):
        return centred / np.sqrt((centred**2).sum(-1, keepdims=True))


def among_top(values: Float[np.ndarray, "*several unit"], k: int) -> Float[np.ndarray, "*several unit"]:
    """Probability of every neuron to be among the k highest, if ties across the cut are broken at random.

    >>> among_top(np.array([3.0, 2.0, 2.0, 1.0]), 2).tolist()
    [1.0, 0.5, 0.5, 0.0]
    """
    cut = -np.partition(-values, k - 1, axis=-1)[..., k - 1 : k]
    above, at = values > cut, values == cut
    return above + at * (k - above.sum(-1, keepdims=True)) / at.sum(-1, keepdims=True)


def agreement(
    scores: Float[np.ndarray, "score unit"], forget: Float[np.ndarray, "replica unit"], retain: Float[np.ndarray, "replica unit"]
) -> dict[str, Float[np.ndarray, "replica score"]]:
    """All measures of some scores against each of several pairs of effects.

    Args:
        scores: the highest are taken for the neurons with the highest importance on forget relative to retain.
        forget, retain: Δ of both tasks.

    Returns:
        Measure -> values: Spearman's correlation with Δ_forget and with Δ_forget − Δ_retain (ties get their mean rank), and recall: of the
        ⌊share·n⌋ neurons, at least one, with the largest Δ_forget − Δ_retain the share that is among as many with the highest scores.
    """
    n = scores.shape[1]
    sizes = {name: max(1, int(share * n + 1e-9)) for name, share in RECALLS.items()}
    by_rank, tops = ranked(scores).T, {name: among_top(scores, k).T for name, k in sizes.items()}
    found: dict[str, list[np.ndarray]] = {name: [] for name in MEASURES}
    for start in range(0, len(forget), PART):
        f = forget[start : start + PART]
        difference = f - retain[start : start + PART]
        found["spearman_forget"].append(ranked(f) @ by_rank)
        found["spearman_difference"].append(ranked(difference) @ by_rank)
        for name, k in sizes.items():
            found[name].append(among_top(difference, k) @ tops[name] / k)
    return {name: np.concatenate(parts) for name, parts in found.items()}


def estimates(scores: Mapping[str, Float[np.ndarray, "_ unit"]], effects: Effects, seed: int = 0) -> dict[str, dict[str, Estimate]]:
    """Measure -> score -> estimate.

    Args:
        scores: name -> values by calibration texts, or by draw of a random score.
        effects: the exact effects of the same neurons.
        seed: of the bootstrap samples of the neurons.
    """
    stacked = np.concatenate(list(scores.values()))
    delta, replicas = effects.delta, effects.replicas()
    values = agreement(stacked, *(delta[role][None] for role in ROLES))
    over_texts = agreement(stacked, *(replicas[role] for role in ROLES))
    left, rng = 1 - effects.units / effects.of, np.random.default_rng([seed, 2])
    draws = []
    for _ in range(DRAWS if left > 0 else 0):
        chosen = rng.integers(effects.units, size=effects.units)
        draws.append(agreement(stacked[:, chosen], *(delta[role][None, chosen] for role in ROLES)))
    found: dict[str, dict[str, Estimate]] = {}
    for measure in MEASURES:
        drawn = np.concatenate([draw[measure] for draw in draws]) if draws else np.zeros((0, len(stacked)))
        begin, found[measure] = 0, {}
        for name, of_seeds in scores.items():
            at = slice(begin, begin := begin + len(of_seeds))
            mean_replicas, mean_drawn = over_texts[measure][:, at].mean(1), drawn[:, at].mean(1)
            one = Estimate(values[measure][0, at], mean_replicas, effects.clusters, mean_drawn, effects.units, left)
            found[measure][name] = one
    return found


def reliability(effects: Effects, seed: int = 0) -> dict[str, float]:
    """Reproducibility of Δ: agreement between Δ on two halves of the documents, mean over 100 random splits.

    Returns:
        For both correlations: `_half` (between halves), `_half_sd` (over splits), `_reliability` of Δ on all documents, 2r/(1 + r) by
        Spearman and Brown, and `_ceiling`, its square root: the correlation of a score without any error with Δ as measured; NaN if r is
        not above 0. For recall the value between halves, which is below that of all documents.
    """
    rng, found = np.random.default_rng([seed, 3]), []
    for _ in range(SPLITS):
        one, other = (half.delta for half in effects.halves(rng))
        of_difference = agreement((one["forget"] - one["retain"])[None], other["forget"][None], other["retain"][None])
        of_forget = agreement(one["forget"][None], other["forget"][None], other["retain"][None])
        found.append([of_forget[MEASURES[0]][0, 0], *(of_difference[name][0, 0] for name in MEASURES[1:])])
    means, spread = np.mean(found, axis=0), np.std(found, axis=0, ddof=1)
    row: dict[str, float] = {}
    for name, r, sd in zip(MEASURES, means, spread, strict=True):
        row |= {f"{name}_half": float(r), f"{name}_half_sd": float(sd)}
        if name not in RECALLS:
            whole = 2 * r / (1 + r) if r > 0 else math.nan
            row |= {f"{name}_reliability": float(whole), f"{name}_ceiling": math.sqrt(whole) if whole > 0 else math.nan}
    return row


def over_runs(values: Float[np.ndarray, " seed"], replicas: Float[np.ndarray, "seed replica"], clusters: int) -> tuple[float, Ends]:
    """Mean over runs, with its 95% interval: over documents for one run, and for several also over their calibration texts."""
    value, mean = float(values.mean()), replicas.mean(0)
    if len(values) == 1:
        return value, bootstrap_interval(mean, clusters)
    known = mean[np.isfinite(mean)]
    errors = float(known.std(ddof=1)) if len(known) > 1 else math.nan, float(values.std(ddof=1)) / math.sqrt(len(values))
    return value, summed_interval(value, errors, (clusters, len(values)))


def random_scores(shape: tuple[int, ...], draw: int, seed: int) -> Float[np.ndarray, "*layer"]:
    """Random scores of a site: one of several draws."""
    return np.random.default_rng([seed, draw, 18]).random(shape)
