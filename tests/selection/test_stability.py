"""Intervals of scores and stability of selections: planted documents, coverage in simulations, sets whose Jaccard index is known."""

import hashlib

import numpy as np
import pytest
import torch

import sepcap
from sepcap import plots
from sepcap.statistics.intervals import bootstrap_interval
from sepcap.statistics.moments import SUMS, NeuronStatistics, Statistics
from sepcap.statistics.replicates import ACTIVATIONS, Replicates, poisson_weights

EPS = 1e-3


def stats_of(sizes, positions, name, replicates=100):
    """Statistics of documents with given mean |z|, [document, neuron], and numbers of positions, with their replicates."""
    absolute, n = torch.from_numpy(sizes * positions[:, None]), torch.from_numpy(positions).double()
    keys = [hashlib.sha256(f"{name} {i}".encode()).hexdigest()[:16] for i in range(len(n))]
    weights = torch.from_numpy(np.stack([poisson_weights(key, replicates) for key in keys], axis=1)).double()
    total = absolute.sum(0)[None]
    counts = torch.stack([weights @ n, torch.zeros(replicates), torch.zeros(replicates)], dim=1)
    drawn = Replicates(counts, dict.fromkeys(ACTIVATIONS, (weights @ absolute)[:, None]), {key: key for key in keys})
    one = NeuronStatistics("mlp", int(n.sum()), dict.fromkeys(SUMS, total), total, total, replicates=drawn)
    return Statistics({"mlp": one}, {"task": name})


def covered(documents, repetitions, neurons, seed=0):
    """Share of intervals of the ratio that hold the true ratio: sizes of documents differ, and each has its own level of every neuron."""
    rng, hits = np.random.default_rng(seed), []
    means = rng.uniform(0.1, 2, (2, neurons))
    for repetition in range(repetitions):
        both = []
        for role, of in zip(("forget", "retain"), means, strict=True):
            positions = rng.integers(20, 200, documents)
            levels = of * rng.gamma(4, 1 / 4, (documents, neurons))
            both.append(stats_of(levels, positions, (role, seed, repetition, documents)))
        scores = sepcap.score(*both)
        low, high = scores.interval("mlp")
        truth = torch.from_numpy(means[0] / (means[1] + EPS))[None]
        hits.append(((low <= truth) & (truth <= high)).double().mean())
    return float(np.mean(hits))


def test_intervals_cover_the_truth():
    """95% of intervals, ± 4 standard errors of 6,000 draws, of which those of a repetition share their sizes."""
    assert covered(30, 20, 300) == pytest.approx(0.95, abs=0.025)


@pytest.mark.slow
@pytest.mark.parametrize("documents", [8, 15, 50, 200])
def test_intervals_cover_the_truth_of_few_and_many_documents(documents):
    assert covered(documents, 150, 300, seed=documents) == pytest.approx(0.95, abs=0.02)


def test_few_replicates_have_no_interval():
    """Ends of a 95% interval need a replicate in each outer 2.5%: 40."""
    few = sepcap.score(*(stats_of(np.ones((20, 2)), np.full(20, 50), name, replicates=39) for name in "fr"))
    with pytest.raises(ValueError, match=r"39 replicates: .* collect with replicates=100"):
        few.interval("mlp")
    assert "score_low" not in few.table
    assert few.stability({"mlp": 1}).pairs is not None
    assert "score_low" in sepcap.score(*(stats_of(np.ones((20, 2)), np.full(20, 50), name, replicates=40) for name in "fr")).table


def test_a_neuron_that_one_document_carries_has_a_wide_interval():
    levels = np.ones((20, 2))
    levels[:, 1] = [20.0] + [0.0] * 19  # the same mean, from one document
    positions = np.full(20, 50)
    scores = sepcap.score(stats_of(levels, positions, "f"), stats_of(np.ones((20, 2)), positions, "r"))
    low, high = scores.interval("mlp")
    assert scores["mlp"][0].tolist() == pytest.approx([1 / (1 + EPS)] * 2)
    assert float(high[0, 0] - low[0, 0]) < 1e-9  # all documents are alike
    assert float(low[0, 1]) == 0  # a third of replicates leave the document out
    assert float(high[0, 1]) > 2
    table = scores.table.set_index("neuron")
    assert table.loc[1, "score_high"] == pytest.approx(float(high[0, 1]))


def test_an_interval_is_that_of_the_scores_of_every_replicate():
    rng = np.random.default_rng(3)
    both = [stats_of(rng.gamma(2, 1, (12, 5)), rng.integers(10, 90, 12), name) for name in "fr"]
    scores = sepcap.score(*both, contrast="guarded")
    by_hand = torch.stack([sepcap.score(*(_drawn(s, b) for s in both), contrast="guarded")["mlp"] for b in range(100)])
    assert torch.equal(scores.replicates["mlp"], by_hand)
    low, high = scores.interval("mlp")
    for i in range(5):
        assert (float(low[0, i]), float(high[0, i])) == bootstrap_interval(by_hand[:, 0, i].numpy(), 12)
    assert torch.equal(scores.replicate(7)["mlp"], by_hand[7])


def _drawn(stats, b):
    return Statistics({site: one.replicate(b) for site, one in stats.items()}, stats.info)


def test_a_single_document_has_no_interval_and_empty_replicates_are_left_out():
    one, many = stats_of(np.ones((1, 3)), np.array([9]), "f"), stats_of(np.ones((9, 3)), np.full(9, 9), "r")
    scores = sepcap.score(one, many)
    assert 40 < len(scores.replicates["mlp"]) < 85  # 1 − 1/e of 100
    assert scores.interval("mlp")[0].isnan().all()


def test_scores_keep_their_replicates_on_disk(tmp_path):
    rng = np.random.default_rng(0)
    scores = sepcap.score(*(stats_of(rng.gamma(2, 1, (9, 4)), np.full(9, 30), name) for name in "fr"))
    scores.save(tmp_path / "s.safetensors")
    read = sepcap.Scores.load(tmp_path / "s.safetensors")
    assert torch.equal(read.replicates["mlp"], scores.replicates["mlp"])
    assert all(torch.equal(a, b) for a, b in zip(read.interval("mlp"), scores.interval("mlp"), strict=True))


def chosen(*rows):
    return sepcap.NeuronSet({"mlp": torch.tensor(rows)})


def test_jaccard_of_equal_disjoint_and_overlapping_selections():
    t, f = True, False
    named = {"a": chosen([t, t, f, f]), "same": chosen([t, t, f, f]), "other": chosen([f, f, t, t]), "half": chosen([f, t, t, f])}
    found = sepcap.SelectionStability(named)
    third = 1 / 3
    expected = [[1, 1, 0, third], [1, 1, 0, third], [0, 0, 1, third], [third, third, third, 1]]
    np.testing.assert_allclose(found.jaccard("mlp"), expected)
    assert found.frequency["mlp"].tolist() == [[0.5, 0.75, 0.5, 0.25]]
    row = found.table.iloc[0]
    assert (row["size"], row["always"], row["ever"]) == (2, 0, 4)
    assert row["jaccard"] == pytest.approx((1 + 4 * third - third) / 6)
    assert row["jaccard_random"] == pytest.approx(2 / 6)  # 1 of 2·2/4 shared, 3 in the union
    assert len(found.pairs) == 6
    empty = sepcap.SelectionStability({"a": chosen([f]), "b": chosen([f])})
    assert np.isnan(empty.jaccard("mlp")).all()


def test_a_clear_selection_is_stable_and_noise_is_not():
    rng = np.random.default_rng(1)
    clear = np.ones((25, 200)) * rng.uniform(0.95, 1.05, (25, 200))
    clear[:, :20] *= 3
    noise = rng.gamma(0.5, 2, (25, 200))
    retain = stats_of(np.ones((25, 200)), np.full(25, 40), "r")
    results = []
    for name, levels in (("clear", clear), ("noise", noise)):
        scores = sepcap.score(stats_of(levels, np.full(25, 40), name), retain)
        results.append(scores.stability({"mlp": 20}))
    sure, unsure = (one.table.iloc[0] for one in results)
    assert (sure["jaccard"], sure["always"], sure["ever"], sure["kept"]) == (1, 20, 20, 1)
    assert results[0].frequency["mlp"][0, :20].tolist() == [1.0] * 20
    assert unsure["jaccard"] < 0.6
    assert unsure["jaccard"] > 1.5 * unsure["jaccard_random"]  # the replicates are of the same documents
    assert 0.4 < unsure["kept"] < 0.95
    fig = plots.selection_frequency(results[1])
    assert fig.data[0].y[0] == pytest.approx(float(results[1].frequency["mlp"].max()))
    assert sum(fig.data[0].y) == pytest.approx(20, rel=1e-3)  # every selection takes 20
    assert f": {unsure['jaccard']:.2f} (random 0.05)" in fig.data[0].name
    assert "100 bootstrap replicates of the documents" in repr(results[1])


def test_selections_from_several_seeds_or_texts_are_compared_by_name():
    values = torch.arange(12.0).view(3, 4)
    scores = {"seed 0": sepcap.Scores({"mlp": values}), "seed 1": sepcap.Scores({"mlp": values.flip(0)})}
    found = sepcap.selection_stability(scores, {"mlp": 4}, over="seeds")
    assert found.pairs.to_dict("records") == [{"site": "mlp", "a": "seed 0", "b": "seed 1", "jaccard": 0.0}]
    assert sepcap.selection_stability(list(scores.values()), {"mlp": 0.25}, per_layer=True).pairs["a"].tolist() == ["1"]


def test_what_cannot_be_compared_is_named():
    one, other = sepcap.Scores({"mlp": torch.rand(2, 5)}), sepcap.Scores({"mlp": torch.rand(2, 6)})
    with pytest.raises(ValueError, match="different sites or models"):
        sepcap.selection_stability([one, other], {"mlp": 2})
    with pytest.raises(ValueError, match="give at least two"):
        sepcap.selection_stability([one], {"mlp": 2})
    with pytest.raises(TypeError, match="give a list of"):
        sepcap.selection_stability(one, {"mlp": 2})
    with pytest.raises(TypeError, match=r"scores\['2'\] is a float"):
        sepcap.selection_stability([one, 1.0], {"mlp": 2})
    with pytest.raises(ValueError, match=r"collect\(..., replicates=100\)"):
        one.interval("mlp")
    with pytest.raises(ValueError, match=r"collect\(..., replicates=100\)"):
        one.stability({"mlp": 2})
