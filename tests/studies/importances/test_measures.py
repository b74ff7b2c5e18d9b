"""Agreement of scores with exact effects: against scipy, by hand, and with effects whose answer is known (METHODS 19)."""

import dataclasses

import numpy as np
import pytest
from scipy.stats import spearmanr

from sepcap.statistics.intervals import summed_interval
from sepcap.studies.importances.measures import (
    DRAWS,
    MEASURES,
    SPLITS,
    Effects,
    Estimate,
    agreement,
    among_top,
    estimates,
    over_runs,
    random_scores,
    reliability,
)
from sepcap.studies.pruning.separability import halves

UNITS, DOCUMENTS = 120, 12


@pytest.fixture(scope="module")
def truth():
    """True effects of two tasks, [role, unit]."""
    return np.random.default_rng(7).standard_normal((2, UNITS))


@pytest.fixture(scope="module")
def effects(truth):
    """Effects of documents of uneven size: the truth with noise of their own, some neurons silent."""
    rng = np.random.default_rng(8)
    predictions = {role: rng.integers(20, 60, DOCUMENTS + i).astype(float) for i, role in enumerate(("forget", "retain"))}
    sums = {}
    for value, (role, n) in zip(truth, predictions.items(), strict=True):
        sums[role] = (value[:, None] + 0.8 * rng.standard_normal((UNITS, len(n)))) * n
        sums[role][:5] = 0.0  # ties
    return Effects(sums, predictions, UNITS)


def test_spearman_is_that_of_scipy_with_ties_too(effects):
    scores = np.random.default_rng(0).integers(0, 9, (3, UNITS)).astype(float)
    delta = effects.delta
    found = agreement(scores, delta["forget"][None], delta["retain"][None])
    for i, values in enumerate(scores):
        assert found["spearman_forget"][0, i] == pytest.approx(spearmanr(values, delta["forget"])[0], abs=1e-12)
        difference = delta["forget"] - delta["retain"]
        assert found["spearman_difference"][0, i] == pytest.approx(spearmanr(values, difference)[0], abs=1e-12)


def test_delta_is_the_change_of_the_mean_over_predictions(effects):
    for role in ("forget", "retain"):
        expected = [effects.sums[role][i].sum() / effects.predictions[role].sum() for i in range(UNITS)]
        np.testing.assert_allclose(effects.delta[role], expected, rtol=1e-12)
    turned = effects.reversed()
    np.testing.assert_array_equal(turned.delta["forget"], effects.delta["retain"])
    assert turned.units == effects.units == UNITS
    assert effects.clusters == DOCUMENTS


def test_recall_by_hand():
    """Of 100 neurons the 5% with the largest difference are 95 to 99; the score puts 97 to 99 first, then 0 and 1."""
    forget, retain = np.arange(100.0), np.zeros(100)
    score = np.zeros(100)
    score[[99, 98, 97, 0, 1]] = [9, 8, 7, 6, 5]
    score += np.linspace(0, 0.1, 100)  # no ties
    found = {name: float(value[0, 0]) for name, value in agreement(score[None], forget[None], retain[None]).items()}
    assert found["recall_1"] == 1.0
    assert found["recall_2"] == 1.0
    assert found["recall_5"] == pytest.approx(3 / 5)
    # with retain = 2·forget the order of the difference is turned: the five largest are 0 to 4
    turned = agreement(score[None], forget[None], 2 * forget[None])
    assert float(turned["recall_5"][0, 0]) == pytest.approx(2 / 5)
    assert float(turned["recall_1"][0, 0]) == 0.0


def test_ties_across_the_cut_count_with_their_probability():
    np.testing.assert_allclose(among_top(np.array([[5.0, 1, 1, 1], [2, 2, 2, 2]]), 2), [[1, 1 / 3, 1 / 3, 1 / 3], [0.5] * 4])
    assert among_top(np.arange(6.0), 6).tolist() == [1.0] * 6
    # one of two equal scores is in the top 1% of 100: half of a hit
    score = np.zeros(100)
    score[[3, 4]] = 1
    truth = np.zeros(100)
    truth[3] = 1
    assert float(agreement(score[None], truth[None], np.zeros((1, 100)))["recall_1"][0, 0]) == 0.5


def test_the_effect_itself_has_a_correlation_of_1_and_random_scores_have_none(effects):
    delta = effects.delta
    scores = {
        "exact": (delta["forget"] - delta["retain"])[None],
        "opposite": (delta["retain"] - delta["forget"])[None],
        "random": np.stack([random_scores((UNITS,), draw, 0) for draw in range(20)]),
    }
    found = estimates(scores, effects)
    assert found["spearman_difference"]["exact"].value == pytest.approx(1, abs=1e-12)
    assert found["spearman_difference"]["opposite"].value == pytest.approx(-1, abs=1e-12)
    for name in ("recall_1", "recall_2", "recall_5"):
        assert found[name]["exact"].value == 1.0
    for name in ("spearman_forget", "spearman_difference"):
        low, high = found[name]["random"].ends
        assert low < 0 < high
        low, high = found[name]["exact"].minus(found[name]["random"]).ends
        assert low > 0
    assert set(found) == set(MEASURES)


def test_the_interval_adds_documents_calibration_texts_and_neurons_in_squares(effects):
    rng = np.random.default_rng(3)
    difference = effects.delta["forget"] - effects.delta["retain"]
    scores = {"noisy": difference + rng.standard_normal((3, UNITS)), "one": difference[None] + rng.standard_normal((1, UNITS))}
    whole = estimates(scores, effects)["spearman_difference"]
    some = estimates(scores, dataclasses.replace(effects, of=4 * UNITS))["spearman_difference"]
    one = whole["noisy"]
    np.testing.assert_allclose(one.values, [spearmanr(values, difference)[0] for values in scores["noisy"]], atol=1e-12)
    parts = [one.replicas.std(ddof=1), one.values.std(ddof=1) / np.sqrt(3)]
    assert one.ends == pytest.approx(summed_interval(one.values.mean(), parts, (DOCUMENTS, 3)))
    assert len(whole["one"].drawn) == 0
    assert len(some["one"].drawn) == DRAWS
    # Spearman's ρ of n pairs has a standard error near √((1 − ρ²)²(1 + ρ²/2)/n) for a normal pair
    rho = some["one"].value
    assert some["one"].drawn.std(ddof=1) == pytest.approx(np.sqrt((1 - rho**2) ** 2 * (1 + rho**2 / 2) / UNITS), rel=0.4)
    assert some["one"].left == 0.75
    parts = [some["one"].replicas.std(ddof=1), some["one"].drawn.std(ddof=1) * np.sqrt(0.75)]  # a quarter of the neurons is known
    assert some["one"].ends == pytest.approx(summed_interval(rho, parts, (DOCUMENTS, UNITS)))
    (low, high), (low_all, high_all) = some["one"].ends, whole["one"].ends
    assert high - low > high_all - low_all
    assert np.isnan(whole["one"].seeds_sd)


def test_differences_are_paired(effects):
    """The same score twice differs by nothing, whatever the documents; a copy with a constant added has the same ranks."""
    scores = np.random.default_rng(1).standard_normal((2, UNITS))
    found = estimates({"abs": scores, "same": 2 * scores + 5}, effects)["spearman_forget"]
    difference = found["same"].minus(found["abs"])
    assert difference.value == pytest.approx(0, abs=1e-12)
    assert difference.ends == pytest.approx((0, 0), abs=1e-12)


def test_reliability_by_an_independent_computation(effects):
    rng, found = np.random.default_rng([0, 3]), []
    for _ in range(SPLITS):
        of = {role: halves(len(effects.predictions[role]), rng) for role in ("forget", "retain")}
        deltas = [
            {role: effects.sums[role][:, of[role][i]].sum(1) / effects.predictions[role][of[role][i]].sum() for role in of} for i in (0, 1)
        ]
        differences = [delta["forget"] - delta["retain"] for delta in deltas]
        found.append([spearmanr(deltas[0]["forget"], deltas[1]["forget"])[0], spearmanr(*differences)[0]])
    row = reliability(effects)
    for name, r in zip(("spearman_forget", "spearman_difference"), np.mean(found, axis=0), strict=True):
        assert row[f"{name}_half"] == pytest.approx(r, abs=1e-10)
        assert row[f"{name}_reliability"] == pytest.approx(2 * r / (1 + r), abs=1e-10)
        assert row[f"{name}_ceiling"] == pytest.approx(np.sqrt(2 * r / (1 + r)), abs=1e-10)


def test_the_ceiling_is_the_correlation_of_the_truth_with_the_measured_effect():
    """With 2,000 neurons the truth without noise correlates with Δ as the ceiling says, to within sampling error."""
    rng, n = np.random.default_rng(5), 2_000
    truth = rng.standard_normal(n)
    noisy = (truth[:, None] + 3 * rng.standard_normal((n, 16))) * 10.0
    effects = Effects({"forget": noisy, "retain": np.zeros((n, 16))}, dict.fromkeys(("forget", "retain"), np.full(16, 10.0)), n)
    measured = spearmanr(truth, effects.delta["forget"])[0]
    assert reliability(effects)["spearman_forget_ceiling"] == pytest.approx(measured, abs=0.03)


def test_effects_without_signal_have_no_ceiling():
    rng = np.random.default_rng(2)
    noise = {role: rng.standard_normal((400, 2)) for role in ("forget", "retain")}
    noise["forget"][:, 1] = -noise["forget"][:, 0]  # the halves disagree perfectly
    row = reliability(Effects(noise, dict.fromkeys(noise, np.ones(2)), 400))
    assert row["spearman_forget_half"] == pytest.approx(-1)
    assert np.isnan(row["spearman_forget_ceiling"])
    with pytest.raises(ValueError, match="one document"):
        Effects({role: of[:, :1] for role, of in noise.items()}, dict.fromkeys(noise, np.ones(1)), 400).halves(rng)


def test_the_mean_over_runs_covers_documents_and_calibration_texts():
    replicas = np.random.default_rng(0).normal(1.5, 0.1, (3, 1000))
    values = np.array([1.4, 1.5, 1.7])
    value, ends = over_runs(values, replicas, 20)
    assert value == pytest.approx(values.mean())
    assert ends == pytest.approx(summed_interval(value, (replicas.mean(0).std(ddof=1), values.std(ddof=1) / 3**0.5), (20, 3)))
    value, (low, high) = over_runs(values[:1], replicas[:1], 20)
    assert replicas[0].min() <= low < 1.5 < high <= replicas[0].max()


def test_a_difference_of_scores_with_other_texts_has_the_variance_of_both():
    """By hand: one learned order minus five samples of texts; recall is no number beyond 0 and 1."""
    replicas, none = np.random.default_rng(0).normal(size=(2, 400)), np.zeros(0)
    texts = np.array([0.1, 0.2, 0.3, 0.4, 0.5])
    learned = Estimate(np.array([0.9]), replicas[0], 40, none, 10, 0.0)
    of_abs = Estimate(texts, replicas[1], 40, none, 10, 0.0)
    errors = (replicas[0] - replicas[1]).std(ddof=1), texts.std(ddof=1) / np.sqrt(5)
    assert learned.minus(of_abs).ends == pytest.approx(summed_interval(0.6, errors, (40, 5)))
    assert learned.ends == pytest.approx(summed_interval(0.9, [replicas[0].std(ddof=1)], [40]))
    assert learned.columns("recall_1") == {"recall_1": 0.9, "recall_1_low": 0.0, "recall_1_high": 1.0}
    assert learned.columns("recall_1_minus_abs")["recall_1_minus_abs_high"] > 1
