"""Neuron sets: drawn at random, and as sets (METHODS 5, 12)."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shapes import model

import sepcap
from sepcap.errors import CorruptFile

# Random


@pytest.mark.parametrize("per_layer", [True, False])
def test_random_sets_are_uniform(per_layer):
    """In S independent draws of a share p every neuron is drawn Binomial(S, p) times: within five standard deviations of S·p."""
    m, draws, p = model(), 400, 0.2
    sets = [sepcap.NeuronSet.random(m, {"mlp": p, "attn_pre_out": 0.25}, seed=seed, per_layer=per_layer) for seed in range(draws)]
    for site, share in (("mlp", p), ("attn_pre_out", 0.25)):
        counts = torch.stack([s.masks[site] for s in sets]).sum(0).double()
        spread = math.sqrt(draws * share * (1 - share))
        assert float((counts - draws * share).abs().max()) < 5 * spread
        # neither too even nor too uneven: the sum of squared deviations is that of independent draws
        assert 0.5 < float(((counts - draws * share) / spread).square().mean()) < 1.6
        if not per_layer:
            # a layer's number varies as drawing without replacement says: N·K/M·(1−K/M)·(M−N)/(M−1)
            total, layer = sets[0].masks[site].numel(), sets[0].masks[site][0].numel()
            drawn = int(share * total)
            variance = drawn * layer / total * (1 - layer / total) * (total - drawn) / (total - 1)
            per_layer_counts = torch.tensor([s.per_layer(site) for s in sets]).double()
            assert float(per_layer_counts.var(0, correction=0).mean()) == pytest.approx(variance, rel=0.2)
    for s in sets:
        assert (s.count("mlp"), s.count("attn_pre_out")) == (20, 12)
        if per_layer:
            assert (s.per_layer("mlp"), s.per_layer("attn_pre_out")) == ([5] * 4, [3] * 4)


def test_a_random_set_is_its_seed():
    m = model()
    first, again, other = (sepcap.NeuronSet.random(m, {"mlp": 0.2}, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other


@pytest.mark.parametrize("per_layer", [True, False])
def test_random_sets_leave_out_what_is_gone_and_stay_uniform(per_layer):
    m, draws = model(), 300
    gone = sepcap.NeuronSet.random(m, {"mlp": 0.4}, seed=99, per_layer=True)
    sets = [sepcap.NeuronSet.random(m, {"mlp": 0.2}, seed=seed, exclude=gone, per_layer=per_layer) for seed in range(draws)]
    counts = torch.stack([s.masks["mlp"] for s in sets]).sum(0).double()
    assert {len(s) for s in sets} == {20}
    assert float(counts[gone.masks["mlp"]].sum()) == 0
    left = counts[~gone.masks["mlp"]]
    assert float((left - draws / 3).abs().max()) < 5 * math.sqrt(draws * (1 / 3) * (2 / 3))  # 20 of the 60 that are left
    with pytest.raises(ValueError, match=r"only 60 of 100 are left|only 15 of 25 are left in a layer"):
        sepcap.NeuronSet.random(m, {"mlp": 0.8}, exclude=gone, per_layer=per_layer)


def test_random_sets_refuse_unknown_sites():
    with pytest.raises(ValueError, match=r"site='mpl' is not known. Did you mean 'mlp'"):
        sepcap.NeuronSet.random(model(), {"mpl": 0.1})


# Neuron sets

masks = st.lists(st.booleans(), min_size=6, max_size=6).map(lambda bits: torch.tensor(bits).view(2, 3))
heads = st.lists(st.booleans(), min_size=8, max_size=8).map(lambda bits: torch.tensor(bits).view(2, 2, 2))
both_sites = st.fixed_dictionaries({"mlp": masks, "attn_pre_out": heads})
some_sites = st.one_of(both_sites, st.fixed_dictionaries({"mlp": masks}), st.fixed_dictionaries({"attn_pre_out": heads}))


@settings(max_examples=100, deadline=None)
@given(st.tuples(some_sites, some_sites, some_sites))
def test_laws_of_sets(three):
    a, b, c = map(sepcap.NeuronSet, three)
    assert a | b == b | a
    assert a & b == b & a
    assert (a | b) | c == a | (b | c)
    assert (a & b) & c == a & (b & c)
    assert a & (b | c) == (a & b) | (a & c)
    assert a | (b & c) == (a | b) & (a | c)
    assert a | (a & b) == a
    assert a - b == a - (a & b)
    assert len((a - b) & b) == 0
    assert (a - b) | (a & b) == a
    assert len(a | b) + len(a & b) == len(a) + len(b)
    assert ~~a == a
    assert len(a & ~a) == 0
    assert bool(a) == (len(a) > 0)


@settings(max_examples=60, deadline=None)
@given(st.tuples(both_sites, both_sites))
def test_complements(two):
    a, b = map(sepcap.NeuronSet, two)
    assert ~(a | b) == ~a & ~b
    assert ~(a & b) == ~a | ~b
    assert a - b == a & ~b
    assert len(~a) == 6 + 8 - len(a)
    for site in ("mlp", "attn_pre_out"):
        assert torch.equal((a - b).masks[site], a.masks[site] & ~b.masks[site])
        assert torch.equal((a | b).masks[site], a.masks[site] | b.masks[site])
        assert torch.equal((a & b).masks[site], a.masks[site] & b.masks[site])


def test_algebra_makes_new_sets():
    mask = torch.tensor([[True, False]])
    a = sepcap.NeuronSet({"mlp": mask})
    b = a | sepcap.NeuronSet({"mlp": torch.tensor([[False, True]])})
    b.masks["mlp"][:] = False
    assert mask.tolist() == [[True, False]]
    assert a != sepcap.NeuronSet({"mlp": torch.tensor([[True, True]])})
    assert a != "a"


def test_counts():
    s = sepcap.NeuronSet({"mlp": torch.tensor([[True, True], [False, True]]), "attn_pre_out": torch.ones(2, 1, 2, dtype=torch.bool)})
    assert (len(s), s.count("mlp"), s.count("attn_pre_out"), s.count("attn_value")) == (7, 3, 4, 0)
    assert s.per_layer("mlp") == [2, 1]
    assert s.per_layer("attn_pre_out") == [2, 2]


def test_a_mask_has_a_dtype_and_a_shape():
    with pytest.raises(TypeError, match=r"masks\['mlp'\] has dtype torch.float32"):
        sepcap.NeuronSet({"mlp": torch.zeros(2, 3)})
    with pytest.raises(ValueError, match=r"masks\['mlp'\] has shape \[3\]; it must be \[layer, neuron\]"):
        sepcap.NeuronSet({"mlp": torch.zeros(3, dtype=torch.bool)})
    with pytest.raises(ValueError, match=r"masks\['attn_value'\] has shape \[2, 3\]; it must be \[layer, head, d_head\]"):
        sepcap.NeuronSet({"attn_value": torch.zeros(2, 3, dtype=torch.bool)})
    with pytest.raises(ValueError, match=r"site='attn_pre_uot' is not known. Did you mean 'attn_pre_out'"):
        sepcap.NeuronSet({"attn_pre_uot": torch.zeros(2, 3, 4, dtype=torch.bool)})


def test_sets_of_another_models_shape_are_refused(tiny_opt):
    mine, other = sepcap.NeuronSet.empty(model(), "mlp"), sepcap.NeuronSet.empty(model(mlp=24), "mlp")
    with pytest.raises(ValueError, match=r"\[4, 25\] and \[4, 24\] belong to different models"):
        _ = mine | other
    wrong = ~sepcap.NeuronSet.empty(model(2, 72, 4, 4), ("mlp", "attn_pre_out"))  # the mlp mask fits, the other does not
    before = tiny_opt.blocks[0].mlp.W_out.clone()
    with pytest.raises(ValueError, match=r"site 'attn_pre_out' is \[2, 4, 4\] but this model has \[2, 4, 8\]"):
        sepcap.delete(tiny_opt, wrong)
    assert torch.equal(tiny_opt.blocks[0].mlp.W_out, before)  # refused before anything is changed


def test_save_and_load(tmp_path):
    s = sepcap.NeuronSet.random(model(), {"mlp": 0.2, "attn_value": 0.5}, seed=3)
    s.info = {"importance": "abs"}
    s.save(tmp_path / "neurons.safetensors")
    back = sepcap.NeuronSet.load(tmp_path / "neurons.safetensors")
    assert back == s
    assert back.info == {"importance": "abs"}
    assert {site: mask.dtype for site, mask in back.masks.items()} == {"mlp": torch.bool, "attn_value": torch.bool}
    (tmp_path / "neurons.safetensors").write_bytes((tmp_path / "neurons.safetensors").read_bytes()[:50])
    with pytest.raises(CorruptFile):
        sepcap.NeuronSet.load(tmp_path / "neurons.safetensors")
