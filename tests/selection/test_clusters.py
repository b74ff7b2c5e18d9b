"""Clusters of mlp neurons: planted groups are found, sizes are balanced, and other weights are refused."""

import sys

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import sepcap
from sepcap.errors import CorruptFile
from sepcap.models.blocks.views import mlp_input_weights
from sepcap.selection.clusters import Clusters, index_clusters, input_fingerprint, moefy_cost, seconds_per_start

WIDTH, GROUPS = 72, 6


def plant(model, seed=0):
    """Give the input weights GROUPS directions, in random order and of random length; group of every neuron [layer, neuron]."""
    generator = torch.Generator().manual_seed(seed)
    truth = torch.stack([torch.randperm(WIDTH, generator=generator) % GROUPS for _ in model.blocks])
    for block, groups in zip(model.blocks, truth, strict=True):
        d_model = block.mlp.W_in.shape[0]
        centres = torch.nn.functional.normalize(torch.randn(GROUPS, d_model, generator=generator), dim=1)
        noise = 0.02 * torch.randn(WIDTH, d_model, generator=generator)
        lengths = 10 ** (2 * torch.rand(WIDTH, 1, generator=generator) - 1)
        with torch.no_grad():
            block.mlp.W_in.copy_((lengths * (centres[groups] + noise)).T)
    return truth


def same_partition(labels, truth):
    """Whether two labellings of one layer are the same but for the names of the clusters."""
    return len({*zip(labels.tolist(), truth.tolist(), strict=True)}) == len(set(truth.tolist())) == len(set(labels.tolist()))


def test_planted_groups_are_found_in_every_family(tiny):
    truth = plant(tiny)
    clusters = sepcap.cluster_neurons(tiny, k=GROUPS, n_init=3)
    for labels, groups in zip(clusters.labels, truth, strict=True):
        assert same_partition(labels, groups)
    assert clusters.sizes().tolist() == [[WIDTH // GROUPS] * GROUPS] * 2
    assert not same_partition(index_clusters(tiny, GROUPS).labels[0], truth[0])


@pytest.mark.parametrize("gated", ["llama", "mistral"])
def test_of_a_gated_mlp_the_up_projection_is_clustered(tiny_folders, gated):
    model = sepcap.load_model(tiny_folders[gated], device="cpu")
    plain = AutoModelForCausalLM.from_pretrained(tiny_folders[gated])
    for layer in range(2):
        up = plain.model.layers[layer].mlp.up_proj.weight
        assert torch.equal(mlp_input_weights(model, layer), up.double())
    before = sepcap.cluster_neurons(model, k=GROUPS)
    with torch.no_grad():
        model.blocks[0].mlp.W_gate.mul_(-3).add_(1)
    after = sepcap.cluster_neurons(model, k=GROUPS)
    assert torch.equal(before.labels, after.labels)
    assert before.fingerprint == after.fingerprint


@pytest.mark.parametrize(("k", "small", "large"), [(7, 10, 11), (5, 14, 15), (70, 1, 2), (72, 1, 1), (1, 72, 72)])
def test_sizes_differ_by_at_most_one(tiny_opt, k, small, large):
    for clusters in (sepcap.cluster_neurons(tiny_opt, k=k), index_clusters(tiny_opt, k)):
        sizes = clusters.sizes()
        assert sizes.shape == (2, k)
        assert set(sizes.flatten().tolist()) == {small, large}
        assert (sizes.sum(dim=1) == WIDTH).all()
    assert (f"{small} to {large} each" if small != large else f"{small} each") in repr(clusters)


def test_index_clusters_are_the_index_mod_k(tiny_opt):
    assert torch.equal(index_clusters(tiny_opt, 7).labels, torch.stack([torch.arange(WIDTH) % 7] * 2))


def test_the_length_of_input_weights_does_not_matter(tiny_opt):
    before = sepcap.cluster_neurons(tiny_opt, k=8)
    with torch.no_grad():
        for block in tiny_opt.blocks:
            # powers of two, so that normalising gives the same bits
            block.mlp.W_in.mul_(2.0 ** torch.randint(-4, 5, (WIDTH,), generator=torch.Generator().manual_seed(1)))
    after = sepcap.cluster_neurons(tiny_opt, k=8)
    assert torch.equal(before.labels, after.labels)
    assert before.fingerprint != after.fingerprint


def squares(directions, labels):
    """Sum of squared distances to the means of the clusters, in numpy."""
    return sum(((directions[labels == c] - directions[labels == c].mean(axis=0)) ** 2).sum() for c in np.unique(labels))


def test_neurons_of_a_cluster_are_closer_than_those_of_the_control(tiny_opt):
    clusters, index = sepcap.cluster_neurons(tiny_opt, k=8), index_clusters(tiny_opt, 8)
    for layer, block in enumerate(tiny_opt.blocks):
        weights = block.mlp.W_in.detach().numpy().T.astype(np.float64)
        directions = weights / np.linalg.norm(weights, axis=1, keepdims=True)
        found, control = (squares(directions, c.labels[layer].numpy()) for c in (clusters, index))
        assert found < 0.95 * control
        # what the library counts is to the centres of its last step, which are no better than the means
        assert found * (1 - 1e-9) <= clusters.info["inertia"][layer] <= 1.05 * found


def test_more_starts_are_never_worse_and_hold_the_single_one(tiny_opt):
    one, three = (sepcap.cluster_neurons(tiny_opt, k=8, n_init=n) for n in (1, 3))
    for few, many in zip(one.info["inertia"], three.info["inertia"], strict=True):
        assert many <= few
    assert one.info["inertia"] != three.info["inertia"]


def test_a_seed_gives_the_same_clusters_and_touches_no_global_generator(tiny_opt):
    numpy_before, torch_before = np.random.get_state()[1].copy(), torch.get_rng_state()
    first, again, other = (sepcap.cluster_neurons(tiny_opt, k=8, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(first.labels, again.labels)
    assert not torch.equal(first.labels, other.labels)
    assert (np.random.get_state()[1] == numpy_before).all()
    assert torch.equal(torch.get_rng_state(), torch_before)


def test_deleted_neurons_are_in_no_cluster(tiny):
    truth = plant(tiny)
    gone = sepcap.NeuronSet.empty(tiny, "mlp")
    for layer, groups in enumerate(truth):
        for group in range(GROUPS):  # two of every group, so that the groups stay balanced
            gone.masks["mlp"][layer, (groups == group).nonzero()[:2, 0]] = True
    sepcap.delete(tiny, gone)
    clusters, index = sepcap.cluster_neurons(tiny, k=GROUPS, n_init=3), index_clusters(tiny, GROUPS)
    for found in (clusters, index):
        assert torch.equal(found.labels < 0, gone.masks["mlp"])
        assert found.sizes().tolist() == [[10] * GROUPS] * 2
        assert found.counts(gone).sum() == 0
        assert "24 without input weights in no cluster" in repr(found)
    for labels, groups, mask in zip(clusters.labels, truth, gone.masks["mlp"], strict=True):
        assert same_partition(labels[~mask], groups[~mask])
    assert torch.equal(index.labels[0][~gone.masks["mlp"][0]], torch.arange(60) % GROUPS)


def test_counts_are_of_the_set_in_each_cluster():
    clusters = Clusters(torch.tensor([[0, 1, 1, 2], [2, 2, -1, 0]]), 3, "made up")
    neurons = sepcap.NeuronSet({"mlp": torch.tensor([[True, True, True, False], [True, False, True, True]])})
    assert clusters.counts(neurons).tolist() == [[1, 2, 0], [1, 0, 1]]
    assert clusters.sizes().tolist() == [[1, 2, 1], [1, 0, 2]]


def test_whole_clusters_as_neurons(tiny_opt):
    clusters = sepcap.cluster_neurons(tiny_opt, k=8)
    mask = clusters.neurons(tiny_opt, [(1, 3), (1, 5)]).masks["mlp"]
    assert not mask[0].any()
    assert torch.equal(mask[1], (clusters.labels[1] == 3) | (clusters.labels[1] == 5))
    for wrong in ((2, 0), (0, 8), (-1, 0)):
        with pytest.raises(IndexError, match="2 layers of 8 clusters"):
            clusters.neurons(tiny_opt, [wrong])


def test_what_is_saved_is_what_is_loaded(tiny_opt, tmp_path):
    clusters = sepcap.cluster_neurons(tiny_opt, k=8)
    clusters.save(tmp_path / "clusters.safetensors")
    loaded = Clusters.load(tmp_path / "clusters.safetensors")
    assert torch.equal(loaded.labels, clusters.labels)
    assert (loaded.k, loaded.fingerprint, loaded.info) == (8, clusters.fingerprint, clusters.info)
    loaded.check(tiny_opt)
    assert "moefied" in loaded._repr_html_()
    sepcap.NeuronSet.random(tiny_opt, {"mlp": 0.1}).save(tmp_path / "neurons.safetensors")
    with pytest.raises(CorruptFile, match="holds neurons, but a file of clusters"):
        Clusters.load(tmp_path / "neurons.safetensors")


def test_other_input_weights_are_refused(tiny_opt, tiny_folders):
    clusters = sepcap.cluster_neurons(tiny_opt, k=8)
    with torch.no_grad():  # what a neuron writes is not what it reads
        tiny_opt.blocks[0].mlp.W_out.mul_(2)
    clusters.check(tiny_opt)
    with pytest.raises(ValueError, match="clusters were made from other input weights"):
        clusters.check(sepcap.load_model(tiny_folders["gpt2"], device="cpu"))
    sepcap.delete(tiny_opt, sepcap.NeuronSet.random(tiny_opt, {"mlp": 0.01}))
    with pytest.raises(ValueError, match=r"was edited since. Recompute them with sepcap.cluster_neurons\(model\)"):
        clusters.neurons(tiny_opt, [(0, 0)])
    with pytest.raises(ValueError, match=r"\[1, 4\] mlp neurons but this model has \[2, 72\]"):
        Clusters(torch.zeros(1, 4, dtype=torch.long), 1, "made up").check(tiny_opt)


def test_the_fingerprint_is_of_the_values_in_any_precision(tiny_folders):
    single, double = (sepcap.load_model(tiny_folders["opt"], dtype=dtype, device="cpu") for dtype in ("float32", "float64"))
    assert input_fingerprint(single) == input_fingerprint(double)


def test_bad_input(tiny_opt, monkeypatch):
    for name, options in {"k": {"k": 0}, "n_init": {"k": 4, "n_init": 0}, "max_iter": {"k": 4, "max_iter": 0}}.items():
        with pytest.raises(ValueError, match=f"{name}=0: give at least 1"):
            sepcap.cluster_neurons(tiny_opt, **options)
    with pytest.raises(ValueError, match="k=96: layer 0 has 72 of 72 mlp neurons with input weights; give at most 72"):
        sepcap.cluster_neurons(tiny_opt)
    with pytest.raises(ValueError, match="seed=-1: give a whole number, 0 or more"):
        sepcap.cluster_neurons(tiny_opt, k=4, seed=-1)
    with pytest.raises(ValueError, match="with k=2 give labels from −1"):
        Clusters(torch.tensor([[0, 2]]), 2, "made up")
    clusters = index_clusters(tiny_opt, 4)
    with pytest.raises(ValueError, match="masks of attn_pre_out; the clusters are of the site 'mlp'"):
        clusters.counts(sepcap.NeuronSet.random(tiny_opt, {"attn_pre_out": 0.1}))
    with pytest.raises(ValueError, match="the set was made for another model"):
        clusters.counts(sepcap.NeuronSet({"mlp": torch.ones(2, 80, dtype=torch.bool)}))
    monkeypatch.setitem(sys.modules, "k_means_constrained", None)
    with pytest.raises(ImportError, match=r"pip install 'sepcap\[clusters\]'"):
        sepcap.cluster_neurons(tiny_opt, k=4)
    with torch.no_grad():
        tiny_opt.blocks[1].mlp.W_in[0, 5] = float("nan")
    with pytest.raises(FloatingPointError, match="layer 1 are NaN"):
        index_clusters(tiny_opt, 4)


def test_the_cost_is_said_before(tiny_opt):
    said = []
    sepcap.cluster_neurons(tiny_opt, k=4, n_init=2, progress=said.append)
    assert said == [moefy_cost(tiny_opt, 4, 2)]
    assert said[0] == "cluster 2 layers of 72 neurons × 32 into 4 each, 2 starts: about 1 s on one core"


@pytest.mark.parametrize(
    ("neurons", "d_model", "seconds"),
    [(1024, 512, 0.4), (4096, 512, 2.5), (8192, 512, 6.2), (4096, 2048, 6.8), (8192, 2048, 17.6), (16384, 4096, 87)],
)
def test_the_formula_of_the_cost_fits_the_times_in_the_documentation(neurons, d_model, seconds):
    assert seconds_per_start(neurons, d_model, 96) == pytest.approx(seconds, rel=1 / 3)
