"""How often 95% intervals cover the truth, simulated: rows that depend on their document, few documents and many (METHODS 9, 11).

Documents differ in difficulty (beta) and in how much of it they keep at every step; several rows of each share both. What a document
keeps has the planted mean at every step, so that the truth is known exactly and not from a larger sample.
"""

from collections import defaultdict
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from sepcap.evaluation.result import COUNTS, Evaluation
from sepcap.studies.pruning.random_neurons.above_random import over_seeds, with_above_random
from sepcap.studies.pruning.separability import area, costs_at, separability

REPETITIONS = 2000
STEPS = 8
ROWS = 3
FORGOTTEN, RETAINED = np.linspace(1, 0.1, STEPS), np.linspace(1, 0.6, STEPS)
PLATEAU = np.array([1, *np.linspace(0.9, 0.4, STEPS - 1)])
"""Kept where the differential drop is the same at every step, whichever is chosen."""


@dataclass(frozen=True)
class World:
    """A task: mean accuracy of the unpruned model, and the mean share of it that is left at every step."""

    accuracy: float
    kept: np.ndarray

    def draw(self, documents: int, rng: np.random.Generator) -> np.ndarray:
        """Sums [step, document, row, count] of so many documents of one to three rows."""
        return runs_of(self.accuracy, self.kept[None], documents, rng)[0]


def runs_of(accuracy: float, kept: np.ndarray, documents: int, rng: np.random.Generator) -> np.ndarray:
    """Sums [run, step, document, row, count] of several runs over the same documents, of which each run keeps its own shares [run, step].

    Losses are gamma, with a mean of 3 nats over documents, of which every step adds what is no longer kept.
    """
    n = rng.integers(60, 256, (documents, ROWS)) * (np.arange(ROWS) < rng.integers(1, ROWS + 1, documents)[:, None])
    p = rng.beta(8 * accuracy, 8 * (1 - accuracy), (documents, 1))
    p = p + 0.3 * np.minimum(p, 1 - p) * rng.uniform(-1, 1, (documents, ROWS))
    own = rng.uniform(-1, 1, (len(kept), documents, 1))
    noise = 0.7 * own + 0.3 * rng.uniform(-1, 1, (len(kept), documents, STEPS))  # correlated over steps, of mean 0, within [−1, 1]
    kept = kept[:, None] + 0.8 * np.minimum(kept, 1 - kept)[:, None] * noise
    kept = kept.transpose(0, 2, 1)[..., None]
    sums = np.zeros((*kept.shape[:3], ROWS, len(COUNTS)))
    sums[..., COUNTS.index("n")] = n
    sums[..., COUNTS.index("top1")] = rng.binomial(n, p * kept)
    loss = 3 * rng.gamma(4, 1 / 4, (documents, 1)) + 2 - kept
    sums[..., COUNTS.index("loss")] = n * loss * rng.gamma(20, 1 / 20, (documents, ROWS))
    return sums


def drop_of(forget: World, retain: World) -> float:
    """The largest differential drop there is."""
    return float((100 * (retain.kept - forget.kept)).max())


def covered(documents: tuple[int, int]) -> dict[str, float]:
    """Shares of the repetitions in which the interval holds the truth."""
    forget, retain = World(0.45, FORGOTTEN), World(0.5, RETAINED)
    flat = World(0.45, PLATEAU - np.array([0, *[0.3] * (STEPS - 1)]))
    truth = {
        "accuracy": forget.accuracy,
        "difference": forget.accuracy * (FORGOTTEN[2] - 1),
        "area": float(area(FORGOTTEN, RETAINED)),
        "retain cost": float(costs_at(FORGOTTEN, RETAINED, 50.0)),
        "drop": drop_of(flat, World(0.5, PLATEAU)),
    }
    rng, hits = np.random.default_rng(documents), defaultdict(int)
    clusters = np.repeat(np.arange(documents[0]), ROWS)
    for seed in range(REPETITIONS):
        f, r = forget.draw(documents[0], rng), retain.draw(documents[1], rng)
        before, after = (Evaluation("t", f[step].reshape(-1, len(COUNTS)), (), {"sample": "s"}, clusters) for step in (0, 2))
        run = separability(f.sum(axis=2), r.sum(axis=2), seed=seed)
        even = separability(flat.draw(documents[0], rng).sum(axis=2), World(0.5, PLATEAU).draw(documents[1], rng).sum(axis=2), seed=seed)
        ends = {
            "accuracy": before.interval("top1"),
            "difference": after.difference(before, seed=seed)[1],
            "area": run.interval,
            "retain cost": run.retain_cost_interval(50.0),
            "drop": even.max_drop_interval,
        }
        for name, (low, high) in ends.items():
            hits[name] += low <= truth[name] <= high
    return {name: hits[name] / REPETITIONS for name in truth}


def between(found: dict[str, float], documents: tuple[int, ...], repetitions: int) -> None:
    """93 to 97% at 40 documents and more, not below 90% at fewer: within two standard errors of the share of so many repetitions."""
    least, most = (0.93, 0.97) if min(documents) >= 40 else (0.90, 1.0)
    print(documents, {name: f"{share:.1%}" for name, share in found.items()})
    for name, share in found.items():
        lowest, highest = (bound + 2 * side * np.sqrt(bound * (1 - bound) / repetitions) for bound, side in ((least, -1), (most, 1)))
        assert lowest <= share <= highest, (name, found)


@pytest.mark.slow
@pytest.mark.parametrize("documents", [(8, 8), (10, 10), (20, 20), (40, 40), (100, 100), (200, 200), (10, 100), (40, 200)])
def test_intervals_cover_the_truth_as_often_as_they_say(documents):
    between(covered(documents), documents, REPETITIONS)


def run_over(forget: np.ndarray, retain: np.ndarray, importance: str, seed: int = 0) -> Any:
    """What `above_random` takes of a run: sums per document of both tasks, and what it was."""
    config = {"samples": {"evaluate": {"forget": "f", "retain": "r"}}, "importance": importance, "baseline": "uniform", "seed": seed}
    config |= {"steps": STEPS - 1, "fractions": {"mlp": 0.1}}
    sums = {"forget": forget.sum(axis=2), "retain": retain.sum(axis=2)}
    return SimpleNamespace(config=config, steps_done=STEPS - 1, folder=importance, per_cluster=lambda role, _: sums[role])


def covered_between_runs(documents: int, repetitions: int) -> dict[str, float]:
    """Shares of the repetitions in which intervals of differences, of means over three seeds and of losses hold the truth."""
    forget = np.stack([FORGOTTEN, *(np.linspace(1, last, STEPS) for last in (0.4, 0.5, 0.6))])
    retain = np.stack([RETAINED, *(np.linspace(1, last, STEPS) for last in (0.5, 0.4, 0.6))])
    areas = area(forget, retain)
    truth = {"minus": areas[0] - areas[1], "above random": areas[0] - areas[1:].mean(), "over seeds": areas[1:].mean()}
    truth |= {"loss": 4.0, "difference of losses": 1 - FORGOTTEN[2]}
    rng, hits, clusters = np.random.default_rng(documents), defaultdict(int), np.repeat(np.arange(documents), ROWS)
    for seed in range(repetitions):
        f, r = (runs_of(p, kept, documents, rng) for p, kept in ((0.45, forget), (0.5, retain)))
        one, other = (separability(f[i].sum(axis=2), r[i].sum(axis=2), seed=seed) for i in (0, 1))
        selected, *randoms = (run_over(*pair, "abs" if i == 0 else "random", i) for i, pair in enumerate(zip(f, r, strict=True)))
        before, after = (Evaluation("t", f[0][step].reshape(-1, len(COUNTS)), (), {"sample": "s"}, clusters) for step in (0, 2))
        ends = {
            "minus": one.minus(other)[1],
            "above random": with_above_random(one, selected, randoms, seed=seed).above_random_interval,
            "over seeds": over_seeds(randoms, seed=seed).interval,
            "loss": before.interval("loss"),
            "difference of losses": after.difference(before, "loss", seed=seed)[1],
        }
        for name, (low, high) in ends.items():
            hits[name] += low <= truth[name] <= high
    return {name: hits[name] / repetitions for name in truth}


@pytest.mark.slow
@pytest.mark.parametrize("documents", [10, 40, 200])
def test_intervals_between_runs_cover_the_truth_as_often_as_they_say(documents):
    between(covered_between_runs(documents, 1000), (documents,), 1000)


def maxima(planted: float, documents: int, repetitions: int) -> tuple[np.ndarray, np.ndarray]:
    """Plain and cross-fitted maximum differential drops where the true one is `planted` points at every step."""
    forget, retain = World(0.45, PLATEAU - np.array([0, *[planted / 100] * (STEPS - 1)])), World(0.5, PLATEAU)
    rng = np.random.default_rng(1)
    runs = (
        separability(forget.draw(documents, rng).sum(axis=2), retain.draw(documents, rng).sum(axis=2), seed=seed)
        for seed in range(repetitions)
    )
    plain, fitted = zip(*((run.differential_drop.max(), run.max_drop) for run in runs), strict=True)
    return np.array(plain), np.array(fitted)


@pytest.mark.slow
@pytest.mark.parametrize("planted", [0.0, 0.3])
def test_the_plain_maximum_is_too_high_where_nothing_differs_and_the_cross_fitted_one_is_not(planted):
    plain, fitted = maxima(planted, documents=30, repetitions=1500)
    bias, error = fitted.mean() - planted, fitted.std(ddof=1) / np.sqrt(len(fitted))
    print(f"truth {planted}: plain maximum {plain.mean():.2f}, cross-fitted {fitted.mean():.2f} ± {error:.2f}")
    assert plain.mean() - planted > 2  # points
    assert abs(bias) < 4 * error + 0.1


def test_a_few_repetitions_show_the_bias_of_the_maximum():
    plain, fitted = maxima(0.0, documents=20, repetitions=60)
    assert (plain >= 0).all()  # step 0 is among the steps
    assert plain.mean() > 4 * plain.std(ddof=1) / np.sqrt(60)
    assert abs(fitted.mean()) < 4 * fitted.std(ddof=1) / np.sqrt(60)
