"""Standard errors and intervals over clusters, by hand and against second computations (METHODS 9)."""

import math

import numpy as np
import pytest
from scipy import stats

from sepcap.errors import CorruptFile
from sepcap.evaluation.result import COUNTS, Evaluation
from sepcap.statistics.intervals import (
    bootstrap_interval,
    bootstrap_weights,
    cluster_sums,
    connected,
    ratio_se,
    summed_interval,
    t_factor,
    t_interval,
)
from sepcap.storage import load_tensors, save_tensors
from sepcap.studies.base.seeds import seed_interval


def test_rows_of_one_cluster_are_added():
    rows = np.arange(24.0).reshape(2, 4, 3)
    sums = cluster_sums(rows, np.array([0, 1, 0, 2]))
    np.testing.assert_array_equal(sums, np.stack([rows[:, 0] + rows[:, 2], rows[:, 1], rows[:, 3]], axis=1))
    np.testing.assert_array_equal(cluster_sums(rows, np.arange(4)), rows)
    np.testing.assert_array_equal(cluster_sums(rows, np.array([1, 0, 3, 2])), rows[:, [1, 0, 3, 2]])


def test_connected_are_rows_that_a_chain_of_labels_joins():
    assert connected([0, 1, 2, 3]).tolist() == [0, 1, 2, 3]
    # row 0 and 2 share a package, 2 and 3 a document, 3 and 5 a package
    assert connected([0, 1, 2, 2, 3, 4], ["a", "b", "a", "c", "d", "c"]).tolist() == [0, 1, 0, 0, 2, 0]
    assert connected(np.array([5, 5, 1]), ["x", "y", "z"]).tolist() == [0, 0, 1]


def test_the_error_of_a_ratio_of_equal_weights_is_that_of_a_mean():
    sums = np.array([3.0, 5.0, 1.0, 7.0])
    assert ratio_se(sums, np.full(4, 10.0)) == pytest.approx(sums.std(ddof=1) / 10 / math.sqrt(4))
    # r = 6/4; residuals 1 − r, 5 − 3r are −0.5 and 0.5: √(2 · 0.5) / 4
    assert ratio_se(np.array([1.0, 5.0]), np.array([1.0, 3.0])) == pytest.approx(math.sqrt(2 * 0.5) / 4)
    assert math.isnan(ratio_se(np.array([1.0]), np.array([2.0])))
    assert math.isnan(ratio_se(np.zeros(3), np.zeros(3)))


def test_t_intervals_are_those_of_scipy():
    values = np.array([0.3, 0.5, 0.1, 0.7])
    low, high = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert t_interval(values.mean(), values.std(ddof=1) / 2, 4) == pytest.approx((low, high))
    assert math.isnan(t_factor(1))
    # of three intervals each misses in 5%/3 of draws
    assert t_factor(4, 3) == pytest.approx(stats.t.ppf(1 - 0.05 / 6, 3))
    assert seed_interval("x", values, 3)["x_high"] == pytest.approx(stats.ttest_1samp(values, 0).confidence_interval(1 - 0.05 / 3).high)


def test_squared_half_widths_of_parts_are_added():
    assert summed_interval(0.4, (0.1,), (7,)) == pytest.approx(t_interval(0.4, 0.1, 7))
    thirds, ninths = stats.t.ppf(0.975, 2), stats.t.ppf(0.975, 8)
    expected = 1 + math.sqrt((thirds * 0.2) ** 2 + (ninths * 0.1) ** 2)
    assert summed_interval(1.0, (0.2, 0.1), (3, 9)) == pytest.approx((2 - expected, expected))
    assert summed_interval(1.0, (0.0, 0.0), (4, 4)) == (1.0, 1.0)
    assert np.isnan(summed_interval(1.0, (0.1, 0.1), (4, 1))).all()
    assert np.isnan(summed_interval(1.0, (math.nan, 0.1), (4, 4))).all()


SATTERTHWAITE = {(2, 4.0): 0.87, (3, 2.0): 0.92}
"""Coverage with Satterthwaite's degrees of freedom where it is lowest, by number of seeds and error over seeds."""


@pytest.mark.parametrize("seeds", [2, 3, 5])
@pytest.mark.parametrize("over_seeds", [0.2, 1.0, 2.0, 4.0])
def test_a_sum_of_a_part_over_texts_and_one_over_few_seeds_is_covered(seeds, over_seeds):
    """The error over seeds is 0.2 to 4 times that over 60 texts (METHODS 9)."""
    rng, draws = np.random.default_rng(0), 2000
    of_seeds = over_seeds * math.sqrt(seeds) * rng.standard_normal((draws, seeds))
    texts, errors = np.sqrt(rng.chisquare(59, draws) / 59), of_seeds.std(axis=1, ddof=1) / math.sqrt(seeds)
    value = of_seeds.mean(axis=1) + rng.standard_normal(draws)
    ends = np.array([summed_interval(v, (a, b), (60, seeds)) for v, a, b in zip(value, texts, errors, strict=True)])
    margin = 2 * math.sqrt(0.95 * 0.05 / draws)
    assert 0.95 - margin < ((ends[:, 0] <= 0) & (ends[:, 1] >= 0)).mean() < (0.99 if seeds == 2 else 0.97) + margin
    if (seeds, over_seeds) in SATTERTHWAITE:
        freedom = (texts**2 + errors**2) ** 2 / (texts**4 / 59 + errors**4 / (seeds - 1))
        covered = (np.abs(value) <= stats.t.ppf(0.975, freedom) * np.hypot(texts, errors)).mean()
        assert covered == pytest.approx(SATTERTHWAITE[seeds, over_seeds], abs=0.015)


def test_percentiles_are_expanded_by_the_lost_degree_of_freedom_and_by_t():
    """Of replicas that are normal with the bootstrap's variance, √((G − 1)/G) of the right one, both ends are the t interval's."""
    for clusters in (5, 20, 1000):
        normal = stats.norm.ppf((np.arange(200_000) + 0.5) / 200_000) * math.sqrt((clusters - 1) / clusters)
        low, high = bootstrap_interval(normal, clusters)
        assert high == pytest.approx(stats.t.ppf(0.975, clusters - 1), rel=2e-3)
        assert low == pytest.approx(-high, rel=1e-6)


def test_replicas_that_are_no_numbers_or_infinite():
    values = np.arange(1000.0)
    some = np.concatenate([values, np.full(500, np.nan)])
    assert bootstrap_interval(some, 10) == bootstrap_interval(values, 10)
    assert bootstrap_interval(np.where(values > 900, np.inf, values), 10**6) == (24, math.inf)
    for few in (bootstrap_interval(values, 1), bootstrap_interval(np.full(9, np.nan), 10)):
        assert np.isnan(few).all()


def test_bootstrap_weights_draw_as_many_clusters_as_there_are():
    weights = bootstrap_weights(7, np.random.default_rng(0))
    assert weights.shape == (1000, 7)
    assert (weights.sum(axis=1) == 7).all()
    assert weights.var() == pytest.approx(6 / 7, rel=0.1)


# Evaluations of several rows per document


def evaluation(hits, n, clusters=None, groups=None) -> Evaluation:
    rows = np.zeros((len(hits), len(COUNTS)))
    rows[:, COUNTS.index("n")], rows[:, COUNTS.index("top1")] = n, hits
    known = {} if clusters is None else {"clusters": np.array(clusters)}
    return Evaluation("t", rows, (), {"sample": "s"}, **known, groups=groups)


def test_rows_of_one_document_count_once():
    """Every row twice, as a second part of the same document: nothing is known that was not known before."""
    hits, n = np.array([3.0, 9.0, 4.0, 6.0]), np.array([10.0, 12.0, 10.0, 14.0])
    once = evaluation(hits, n)
    twice = evaluation(np.tile(hits, 2), np.tile(n, 2), [0, 1, 2, 3, 0, 1, 2, 3])
    apart = evaluation(np.tile(hits, 2), np.tile(n, 2))
    assert (once.n_clusters, twice.n_clusters, apart.n_clusters) == (4, 4, 8)
    np.testing.assert_array_equal(twice.per_cluster, 2 * once.per_cluster)
    assert twice.se("top1") == pytest.approx(once.se("top1"))
    assert twice.interval("top1") == pytest.approx(once.interval("top1"))
    assert apart.se("top1") < 0.75 * once.se("top1")
    low, high = once.interval("top1")
    assert (low + high) / 2 == pytest.approx(once.top1)
    assert high - once.top1 == pytest.approx(stats.t.ppf(0.975, 3) * once.se("top1"))
    worse = evaluation(np.tile(hits / 2, 2), np.tile(n, 2), [0, 1, 2, 3, 0, 1, 2, 3])
    change, interval = worse.difference(twice)
    paired = evaluation(hits / 2, n).difference(once)
    assert change == pytest.approx(paired[0])
    assert interval == pytest.approx(paired[1])


def test_packages_join_their_documents():
    hits, n, groups = [3.0, 9.0, 4.0, 6.0, 5.0], [10.0] * 5, ("a", "b", "a", "c", "c")
    by_row, by_package = evaluation(hits, n, groups=groups), evaluation([7.0, 9.0, 11.0], [20.0, 10.0, 20.0])
    np.testing.assert_array_equal(by_row.sums("package"), by_package.per_cluster)
    assert by_row.se("top1", cluster="package") == by_package.se("top1")
    assert by_row.interval("top1", cluster="package") == by_package.interval("top1")
    assert by_row.difference(by_row, cluster="package") == (0, (0, 0))
    assert by_row.as_row("package")["top1_se"] == by_package.se("top1")
    with pytest.raises(ValueError, match=r"cluster='package': the packages of 't' are not known"):
        evaluation(hits, n).se("top1", cluster="package")
    with pytest.raises(ValueError, match="clusters has 3 entries for 5 rows"):
        evaluation(hits, n, [0, 1, 2])


def test_documents_and_packages_are_kept(tmp_path):
    kept = evaluation([3.0, 9.0, 4.0], [10.0] * 3, [0, 1, 0], ("a", "b", "a"))
    kept.save(tmp_path / "e.safetensors")
    read = Evaluation.load(tmp_path / "e.safetensors")
    np.testing.assert_array_equal(read.clusters, [0, 1, 0])
    assert read.groups == ("a", "b", "a")
    assert read.as_row() == pytest.approx(kept.as_row(), nan_ok=True)
    assert read.as_row()["n_documents"] == 2
    assert "n=30 in 2 documents" in repr(read)
    tensors, meta = load_tensors(tmp_path / "e.safetensors", "evaluation")
    save_tensors(tmp_path / "e.safetensors", {"per_row": tensors["per_row"]}, meta)
    with pytest.raises(CorruptFile, match=r"e.safetensors: tensor 'clusters' is missing: the file was written by another version"):
        Evaluation.load(tmp_path / "e.safetensors")
    # a row of several short documents is one cluster of them
    several = Evaluation("t", kept.per_row, (), {"n_documents": 7}, kept.clusters)
    assert (several.n_documents, several.n_clusters) == (7, 2)
