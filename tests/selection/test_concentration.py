"""Concentration in clusters: known areas, plain-Python areas, and chance by enumerating every set."""

from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import sepcap
from sepcap.selection.clusters import Clusters
from sepcap.selection.concentration import area, cumulative_share, fullest, measure_concentration
from sepcap.selection.matching import chosen_by_activity


def clusters_of(*layers, k=None):
    labels = torch.tensor(layers)
    return Clusters(labels, int(labels.max()) + 1 if k is None else k, "made up")


def set_of(shape, *members):
    mask = torch.zeros(shape, dtype=torch.bool)
    for member in members:
        mask[member] = True
    return sepcap.NeuronSet({"mlp": mask})


def plain_area(counts):
    """Trapezoids under the cumulative share, one after the other."""
    shares = sorted((c / sum(counts) for c in counts), reverse=True)
    before, total = 0.0, 0.0
    for share in shares:
        total += (before + before + share) / 2 / len(counts)
        before += share
    return total


@pytest.mark.parametrize("k", [2, 5, 96])
@pytest.mark.parametrize("size", [1, 4])
def test_one_whole_cluster_is_the_most_there_can_be(k, size):
    labels = torch.arange(k * size) % k
    found = measure_concentration(sepcap.NeuronSet({"mlp": (labels == 1)[None]}), Clusters(labels[None], k, "made up"), draws=50).total
    assert found["neurons"] == size
    assert found["area"] == pytest.approx(1 - 1 / (2 * k), abs=1e-12)
    assert found["most"] == pytest.approx(found["area"], abs=1e-12)
    if size > 1:
        assert found["concentration"] == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("each", [1, 3])
def test_spread_evenly_over_all_clusters_is_one_half(each):
    labels = torch.arange(40) % 8
    mask = torch.arange(40) < 8 * each
    found = measure_concentration(sepcap.NeuronSet({"mlp": mask[None]}), Clusters(labels[None], 8, "made up")).total
    assert found["area"] == pytest.approx(0.5, abs=1e-12)
    assert found["concentration"] < 0
    assert found["p"] == 1


def test_few_neurons_each_in_a_cluster_of_its_own():
    labels = torch.arange(40) % 8
    found = measure_concentration(set_of((1, 40), (0, 0), (0, 1), (0, 2)), Clusters(labels[None], 8, "made up")).total
    assert found["area"] == pytest.approx(1 - 3 / 16, abs=1e-12)


def test_an_area_by_hand():
    # 2, 1, 1 and 0 of 4 neurons: shares 1/2, 3/4, 1, 1, so (1/2 + 3/4 + 1 + 1)/4 − 1/8
    found = measure_concentration(set_of((1, 8), (0, 0), (0, 1), (0, 2), (0, 6)), clusters_of([0, 0, 1, 1, 2, 2, 3, 3])).total
    assert found["area"] == pytest.approx(0.6875, abs=1e-12)
    # two whole clusters: shares 1/2, 1, 1, 1
    assert found["most"] == pytest.approx(0.75, abs=1e-12)


@given(st.lists(st.integers(0, 30), min_size=1, max_size=20).filter(any))
def test_areas_are_those_of_plain_trapezoids_whatever_the_order(counts):
    expected = plain_area(counts)
    assert float(area(cumulative_share(np.array(counts)))) == pytest.approx(expected, abs=1e-12)
    assert float(area(cumulative_share(np.array(counts[::-1])))) == pytest.approx(expected, abs=1e-12)
    assert float(area(cumulative_share(3 * np.array(counts)))) == pytest.approx(expected, abs=1e-12)
    assert 0.5 - 1e-12 <= expected <= 1 - 1 / (2 * len(counts)) + 1e-12


@pytest.mark.parametrize(("labels", "n"), [([0, 0, 0, 1, 1, 1, 2, 2, 2], 3), ([0, 0, 0, 1, 1, 1, 2, 2], 4), ([0, 1, 2, 3, 0, 1], 2)])
def test_chance_most_and_p_are_those_of_all_sets_there_are(labels, n):
    k, size = max(labels) + 1, len(labels)
    every = [plain_area(np.bincount(np.array(labels)[list(chosen)], minlength=k)) for chosen in combinations(range(size), n)]
    mine = list(range(n))
    found = measure_concentration(set_of((1, size), *((0, i) for i in mine)), clusters_of(labels), draws=20_000).total
    error = np.std(every) / np.sqrt(20_000)
    assert found["chance"] == pytest.approx(np.mean(every), abs=4 * error + 1e-12)
    assert found["most"] == pytest.approx(max(every), abs=1e-12)
    as_large = np.mean(np.array(every) >= plain_area(np.bincount(np.array(labels)[mine], minlength=k)) - 1e-12)
    assert found["p"] == pytest.approx(as_large, abs=4 * np.sqrt(0.25 / 20_000) + 1e-4)
    concentrated = (found["area"] - np.mean(every)) / (max(every) - np.mean(every))
    assert found["concentration"] == pytest.approx(concentrated, abs=0.05)


@pytest.mark.thorough
def test_random_sets_are_not_concentrated():
    labels = torch.arange(200) % 20
    rng = np.random.default_rng(0)
    found = []
    for _ in range(200):
        mask = torch.zeros(1, 200, dtype=torch.bool)
        mask[0, rng.choice(200, 30, replace=False)] = True
        found.append(measure_concentration(sepcap.NeuronSet({"mlp": mask}), Clusters(labels[None], 20, "made up"), draws=200).total)
    values = np.array([row["concentration"] for row in found])
    assert abs(values.mean()) < 4 * values.std() / np.sqrt(200)
    outside = [row for row in found if not row["chance_low"] <= row["area"] <= row["chance_high"]]
    assert len(outside) < 22  # 5% of 200, and four standard deviations of that
    assert sum(row["p"] <= 0.05 for row in found) < 22


def test_layers_together_are_weighted_by_their_neurons():
    clusters = clusters_of([0, 0, 1, 1, 2, 2, 3, 3], [0, 1, 2, 3, 0, 1, 2, 3], [0, 0, 1, 1, 2, 2, 3, 3])
    neurons = set_of((3, 8), (0, 0), (0, 1), (1, 0), (1, 1), (1, 2), (1, 3))
    found = measure_concentration(neurons, clusters)
    table = found.table.set_index(found.table["layer"].fillna(-1))
    assert table.loc[[0, 1, -1], "area"].tolist() == pytest.approx([7 / 8, 1 / 2, (2 * 7 / 8 + 4 / 2) / 6])
    for name in ("chance", "most"):
        assert table.loc[-1, name] == pytest.approx((2 * table.loc[0, name] + 4 * table.loc[1, name]) / 6)
    assert area(found.curve) == pytest.approx(found.total["area"])
    assert area(found.chance[0]) == pytest.approx(found.total["chance"])
    assert (found.chance[1] <= found.chance[0]).all()
    assert (found.chance[0] <= found.chance[2]).all()
    # the curve: 2 of 6 neurons fill their first cluster at once, 4 of 6 have a quarter in each
    assert found.curve.tolist() == pytest.approx([0, (2 + 1) / 6, (2 + 2) / 6, (2 + 3) / 6, 1])
    # the layer without neurons
    assert table.loc[2, "neurons"] == 0
    assert table.loc[2, ["area", "chance", "most", "concentration", "p"]].isna().all()


def test_a_set_without_neurons_has_no_area():
    found = measure_concentration(set_of((2, 4)), clusters_of([0, 0, 1, 1], [0, 1, 0, 1]), draws=10)
    assert found.table[["area", "chance", "concentration", "p"]].isna().all(axis=None)
    assert np.isnan(found.curve).all()


def test_one_neuron_can_be_nothing_but_in_one_cluster():
    found = measure_concentration(set_of((1, 4), (0, 2)), clusters_of([0, 0, 1, 1]), draws=10).total
    assert found["area"] == found["chance"] == found["most"] == 0.75
    assert np.isnan(found["concentration"])
    assert found["p"] == 1


def test_clusters_of_the_same_sizes_meet_the_same_random_sets():
    # sizes 1, 2, 3 in another order
    one, other = clusters_of([0, 1, 1, 2, 2, 2]), clusters_of([0, 0, 0, 1, 2, 2])
    neurons = set_of((1, 6), (0, 3), (0, 4))
    assert np.array_equal(measure_concentration(neurons, one, seed=2).chance, measure_concentration(neurons, other, seed=2).chance)
    again, different = (measure_concentration(neurons, one, seed=seed).total["chance"] for seed in (2, 3))
    assert again == measure_concentration(neurons, one, seed=2).total["chance"] != different


def test_neurons_in_no_cluster_are_left_out():
    found = measure_concentration(set_of((1, 6), (0, 0), (0, 1), (0, 5)), clusters_of([0, 0, 1, 1, -1, -1], k=2)).total
    assert (found["neurons"], found["area"]) == (2, 0.75)


def test_the_fullest_curve_fills_the_largest_clusters_first():
    assert fullest(5, np.array([1, 3, 2])).tolist() == pytest.approx([0, 3 / 5, 1, 1])


def test_fewer_than_one_draw_is_refused():
    with pytest.raises(ValueError, match="draws=0: give at least 1"):
        measure_concentration(set_of((1, 4), (0, 0)), clusters_of([0, 0, 1, 1]), draws=0)


def activity_of_bins(*bins):
    """Activity [1, neuron] by which neuron i is in bin bins[i], of ten neurons each."""
    return torch.tensor([[float(b) for b in bins]]) + torch.linspace(0, 0.5, len(bins))


def test_matched_chance_is_that_of_all_sets_with_as_many_neurons_in_every_bin():
    """20 neurons in two bins of activity, and every set of one of the first and three of the second."""
    labels = [i % 4 for i in range(10)] + [0] * 8 + [1, 2]
    every = [
        plain_area(np.bincount([labels[i] for i in (one, *two)], minlength=4))
        for one in range(10)
        for two in combinations(range(10, 20), 3)
    ]
    neurons, activity = set_of((1, 20), (0, 1), (0, 10), (0, 16), (0, 19)), activity_of_bins(*[0] * 10, *[1] * 10)
    found = measure_concentration(neurons, clusters_of(labels), draws=20_000, matched={"mlp": activity})
    assert found.null == "layer and activity"
    assert found.total["chance"] == pytest.approx(np.mean(every), abs=4 * np.std(every) / np.sqrt(20_000))
    as_large = np.mean(np.array(every) >= found.total["area"] - 1e-12)
    assert found.total["p"] == pytest.approx(as_large, abs=4 * np.sqrt(0.25 / 20_000) + 1e-4)
    alone = measure_concentration(neurons, clusters_of(labels), draws=20_000)
    assert alone.null == "layer"
    # the second bin is nearly one cluster, so that sets with three of it are more concentrated than uniform ones
    assert found.total["chance"] > alone.total["chance"] + 0.01
    assert (found.total["area"], found.total["most"]) == (alone.total["area"], alone.total["most"])


def test_a_set_that_is_a_whole_bin_is_as_concentrated_as_its_matched_random_sets():
    """A set chosen by activity alone, in clusters that follow activity: far above random sets of the layer, exactly at matched ones."""
    rng = np.random.default_rng(0)
    rank = rng.permutation(200)
    labels = torch.as_tensor(rank // 10 % 20)[None]
    activity = torch.as_tensor(rank, dtype=torch.float64)[None]
    for bins in ((0,), (9,), (0, 1, 2)):
        members = torch.as_tensor(np.isin(rank // 20, bins))[None]
        neurons, clusters = sepcap.NeuronSet({"mlp": members}), Clusters(labels, 20, "made up")
        assert measure_concentration(neurons, clusters, draws=200).total["concentration"] == pytest.approx(1)
        matched = measure_concentration(neurons, clusters, draws=200, matched={"mlp": activity}).total
        assert matched["chance"] == pytest.approx(matched["area"])
        assert np.isnan(matched["concentration"])  # these sets fill clusters, so that nothing is above them
        # clusters that know nothing of activity leave room above it
        other = Clusters(torch.as_tensor(np.arange(200) % 20)[None], 20, "made up")
        plain = measure_concentration(neurons, other, draws=200, matched={"mlp": activity}).total
        assert (plain["concentration"], plain["p"]) == (pytest.approx(0, abs=1e-9), 1)


@pytest.mark.thorough
def test_sets_of_random_neurons_of_a_bin_are_not_concentrated_when_matched():
    rng = np.random.default_rng(1)
    rank = rng.permutation(400)
    clusters, activity = Clusters(torch.as_tensor(rank // 20)[None], 20, "made up"), torch.as_tensor(rank, dtype=torch.float64)[None]
    found = {"layer": [], "matched": []}
    for _ in range(100):
        mask = torch.zeros(1, 400, dtype=torch.bool)
        mask[0, torch.as_tensor(rng.choice(np.flatnonzero(rank < 80), 16, replace=False))] = True
        for name, matched in (("layer", None), ("matched", {"mlp": activity})):
            found[name].append(measure_concentration(sepcap.NeuronSet({"mlp": mask}), clusters, draws=100, matched=matched).total["p"])
    assert np.mean(np.array(found["layer"]) <= 0.05) > 0.95
    assert np.mean(np.array(found["matched"]) <= 0.05) <= 0.05 + 4 * np.sqrt(0.05 * 0.95 / 100)


def test_activity_chooses_as_many_of_every_layer():
    activity = torch.rand(3, 50, generator=torch.Generator().manual_seed(0))
    for most in (False, True):
        mask = chosen_by_activity(activity, [4, 0, 50], most=most)
        assert mask.sum(dim=1).tolist() == [4, 0, 50]
        inside, outside = activity[0][mask[0]], activity[0][~mask[0]]
        assert inside.min() > outside.max() if most else inside.max() < outside.min()


def test_activity_of_another_model_is_refused():
    neurons, clusters = set_of((1, 4), (0, 0)), clusters_of([0, 0, 1, 1])
    with pytest.raises(ValueError, match=r"matched: activity is \[1, 5\], and the clusters are of \[1, 4\]"):
        measure_concentration(neurons, clusters, matched={"mlp": torch.zeros(1, 5)})
    with pytest.raises(ValueError, match="matched has no site 'mlp'"):
        measure_concentration(neurons, clusters, matched={"attn_value": torch.zeros(1, 4)})
