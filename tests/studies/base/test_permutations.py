"""Tests by relabelling: all relabellings are there once, p-values are what counting gives, and chance is called chance."""

import itertools

import numpy as np
import pytest
from scipy import stats

from sepcap.studies.base.permutations import corrected, count_relabellings, critical, jackknife, p_values, relabel
from sepcap.studies.similarity.study import gaps, gaps_without


def labels_of(*sizes):
    return np.repeat(np.arange(len(sizes)), sizes)


def divisions(labels):
    """The same as sets of sets of texts."""
    return {frozenset(frozenset(np.flatnonzero(row == g).tolist()) for g in np.unique(row)) for row in labels}


@pytest.mark.parametrize(("sizes", "n"), [((2, 2), 3), ((2, 3), 10), ((2, 2, 3), 105), ((3, 3, 3), 280), ((4, 3, 3), 2_100)])
def test_every_relabelling_is_there_once_and_the_found_one_first(sizes, n):
    labels = labels_of(*sizes)
    found = relabel(labels)
    assert found.exact
    assert count_relabellings(labels) == len(found.labels) == len(divisions(found.labels)) == n
    assert (found.labels[0] == labels).all()
    assert all(sorted(np.bincount(row)) == sorted(sizes) for row in found.labels[:200])


def test_they_are_those_of_trying_all_orders():
    labels = labels_of(2, 2, 3)
    assert divisions(relabel(labels).labels) == divisions(np.array(list(itertools.permutations(labels.tolist()))))


def test_too_many_are_drawn_by_a_seed_and_the_found_one_is_among_them():
    labels = labels_of(6, 6, 6)
    one, same, other = (relabel(labels, 500, seed) for seed in (0, 0, 1))
    assert not one.exact
    assert (one.labels == same.labels).all()
    assert (one.labels != other.labels).any()
    assert (one.labels[0] == labels).all()
    assert one.labels.shape == (500, 18)
    assert (np.sort(one.labels, axis=1) == labels).all()


def test_a_p_value_is_the_share_that_reaches_as_much():
    statistic = np.array([[3.0, 1.0], [1.0, 1.0 + 1e-12], [2.0, 2.0], [3.0, 0.0]])
    np.testing.assert_allclose(p_values(statistic), [2 / 4, 3 / 4])


def test_the_correction_takes_the_largest_over_places_in_units_of_each():
    rng = np.random.default_rng(0)
    statistic = rng.normal(size=(40, 3)) * [1, 1000, 0.001] + [5, 0, -2]
    p, reached = corrected(statistic)
    scores = (statistic - statistic.mean(axis=0)) / statistic.std(axis=0)
    by_hand = [sum(max(row) >= scores[0, j] - 1e-9 for row in scores) / 40 for j in range(3)]
    np.testing.assert_allclose(p, by_hand)
    assert (p >= p_values(statistic) - 1e-12).all()
    np.testing.assert_allclose(corrected(statistic[:, :1])[0], p_values(statistic[:, :1]))
    # a place that is twice there costs nothing, and one whose statistic never changes cannot win
    np.testing.assert_allclose(corrected(np.hstack([statistic, statistic]))[0], np.tile(p, 2))
    constant = corrected(np.hstack([statistic, np.full((40, 1), 7.0)]))[0]
    assert constant[3] == 1
    for first in range(40):
        turned = np.roll(statistic, -first, axis=0)
        assert ((corrected(turned)[0] <= 0.05) == (turned[0] >= reached - 1e-9)).all()


@pytest.mark.filterwarnings("error")
def test_a_statistic_that_no_relabelling_changes_reaches_nothing():
    every = np.zeros((40, 2))
    for found in (every, every + 0.3, np.hstack([every, np.arange(40.0)[::-1, None]])):
        p, reached = corrected(found)
        assert p[:2].tolist() == [1, 1]
        assert reached[:2].tolist() == [np.inf, np.inf]
    assert (p[2], reached[2]) == (1 / 40, pytest.approx(38))


def test_what_five_percent_reach():
    assert critical(np.arange(40.0)) == 38
    assert critical(np.array([1.0] * 39 + [2.0])) == 2
    assert critical(np.arange(19.0)) == np.inf


def test_chance_is_called_chance_as_often_as_it_says():
    """Texts without categories: a p-value of at most k/35 comes with probability k/35, for one layer and for the best of five."""
    labels = labels_of(4, 4)
    relabelled = relabel(labels).labels
    alone, best = [], []
    for seed in range(500):
        rng = np.random.default_rng(seed)
        layers = np.cumsum(rng.normal(size=(5, 8, 6)), axis=0)  # neighbouring layers resemble each other
        unit = layers / np.linalg.norm(layers, axis=2, keepdims=True)
        null = gaps(unit @ unit.transpose(0, 2, 1), relabelled)
        alone.append(p_values(null)[0])
        best.append(corrected(null)[0].min())
    for found in (alone, best):
        for k in (1, 2, 4, 9, 18, 27):
            expected = k / 35
            assert abs(np.mean(np.array(found) <= expected + 1e-9) - expected) < 3.5 * np.sqrt(expected * (1 - expected) / 500), k


@pytest.mark.parametrize(("sizes", "noise"), [((3, 3, 3, 3), 0.5), ((5, 5, 5, 5), 1), ((4, 3, 6), 1)])
def test_intervals_hold_the_true_gap_about_as_often_as_they_say(sizes, noise):
    """Dot products of texts around known centres: within is |μ|², between μ·μ', weighted by pairs of texts."""
    labels = labels_of(*sizes)
    centres = np.random.default_rng(7).normal(size=(len(sizes), 8))
    gram = (centres @ centres.T)[labels][:, labels]
    truth = gaps(gram[None], labels[None])[0, 0]
    hits = []
    for seed in range(200):
        texts = centres[labels] + noise * np.random.default_rng(seed).normal(size=(len(labels), 8))
        matrix = (texts @ texts.T)[None]
        low, high = jackknife(gaps(matrix, labels[None])[0], gaps_without(matrix, labels), labels)
        hits.append(low[0] <= truth <= high[0])
    assert 0.90 <= np.mean(hits) <= 0.995


def test_of_a_mean_the_interval_is_that_of_student():
    """With one category, leaving out gives the standard error of the mean exactly."""
    values = np.random.default_rng(3).normal(2, 1, 9)
    without = np.array([[np.delete(values, i).mean()] for i in range(9)])
    low, high = jackknife(np.array([values.mean()]), without, np.zeros(9, dtype=np.int64))
    expected = stats.t.interval(0.95, 8, values.mean(), stats.sem(values))
    np.testing.assert_allclose([low[0], high[0]], expected)


def test_too_few_relabellings_are_refused():
    with pytest.raises(ValueError, match="permutations=19: with fewer than 20"):
        relabel(labels_of(2, 2), 19)


def test_twelve_texts_in_four_categories_are_few_enough_to_try_all():
    found = relabel(labels_of(3, 3, 3, 3))
    assert found.exact
    assert len(found.labels) == count_relabellings(found.labels[0]) == 15_400
    assert found.said == "all 15,400 relabellings of the texts"
