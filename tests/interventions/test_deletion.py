"""Deletion by weights is zero ablation by hooks, on the plain model too; nothing else is touched."""

import pytest
import torch
from plain import Plain, token_ids

import sepcap
from sepcap.models.weights import plain_state_dict

ALL = {"mlp": 0.4, "attn_pre_out": 0.3, "attn_value": 0.25}


def some(model, kind, seed=0):
    if kind == "heads":
        return sepcap.NeuronSet.heads(model, [(0, 1), (1, 0), (1, 3)])
    return sepcap.NeuronSet.random(model, ALL if kind == "all" else {kind: ALL[kind]}, seed=seed)


def weights(model):
    return {name: value.clone() for name, value in plain_state_dict(model).items()}


@pytest.mark.parametrize("kind", ["mlp", "attn_pre_out", "attn_value", "heads", "all"])
def test_deleting_is_zero_ablating(tiny, tiny_folders, family, kind):
    ids = token_ids()
    neurons = some(tiny, kind)
    plain = Plain(family, tiny_folders[family])
    with torch.no_grad():
        with sepcap.ablate(tiny, neurons):
            ablated = tiny(ids)
        sepcap.delete(tiny, neurons)
        deleted = tiny(ids)
    by_torch_hooks = plain.run(ids, zero=neurons.masks)
    assert (plain.run(ids) - by_torch_hooks).abs().max() > 0.05  # the set matters
    torch.testing.assert_close(deleted, by_torch_hooks, atol=1e-4, rtol=0)
    torch.testing.assert_close(ablated, by_torch_hooks, atol=1e-4, rtol=0)


def test_deleted_neurons_are_silent(tiny, family):
    """act(0) = 0 for relu, gelu and silu: a deleted mlp neuron has nothing left to say, and neither has a deleted value."""
    neurons = some(tiny, "mlp") | some(tiny, "attn_value")
    sepcap.delete(tiny, neurons)
    for site, mask in neurons.masks.items():
        for layer in range(2):
            _, cache = tiny.run_with_cache(token_ids())
            z = cache[f"blocks.{layer}.{'mlp.hook_post' if site == 'mlp' else 'attn.hook_v'}"]
            assert (z[..., mask[layer]] == 0).all()
            assert (z[..., ~mask[layer]] != 0).any(dim=0).any(dim=0).float().mean() > 0.9


def test_weights_named_in_the_method_are_zero_and_all_others_as_before(tiny, family):
    names = ("W_Q", "W_K", "W_V", "W_O", "W_in", "W_out", "W_gate")
    before = [
        {name: getattr(part, name).clone() for part in (b.attn, b.mlp) for name in names if getattr(part, name, None) is not None}
        for b in tiny.blocks
    ]
    old = weights(tiny)
    neurons = some(tiny, "mlp") | some(tiny, "attn_value")
    sepcap.delete(tiny, neurons)
    for layer, block in enumerate(tiny.blocks):
        mlp, value = neurons.masks["mlp"][layer], neurons.masks["attn_value"][layer]
        query = value.repeat_interleave(len(block.attn.W_O) // len(value), dim=0)
        was = before[layer]
        assert torch.equal(block.mlp.W_in, was["W_in"].masked_fill(mlp[None, :], 0))
        assert torch.equal(block.mlp.W_out, was["W_out"].masked_fill(mlp[:, None], 0))
        assert torch.equal(block.attn.W_V, was["W_V"].masked_fill(value[:, None, :], 0))
        assert torch.equal(block.attn.W_O, was["W_O"].masked_fill(query[..., None], 0))
        assert torch.equal(block.attn.W_Q, was["W_Q"])
        assert torch.equal(block.attn.W_K, was["W_K"])
        if "W_gate" in was:
            assert torch.equal(block.mlp.W_gate, was["W_gate"].masked_fill(mlp[None, :], 0))
        for part, name, mask in ((block.mlp, "b_in", mlp), (block.attn, "b_V", value)):
            bias = getattr(part, name, None)
            if bias is not None:
                assert (bias[mask] == 0).all()
                assert (bias[~mask] != 0).all()
    new = weights(tiny)
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert changed
    for word in ("embed", "norm", "wte", "wpe", "ln_", "lm_head", "o_proj.bias", "out_proj.bias", "c_proj.bias", "dense.bias", "fc2.bias"):
        assert not [name for name in changed if word in name]


def test_shared_value_column_goes_only_with_its_last_query_head(tiny_folders):
    model = sepcap.load_model(tiny_folders["mistral"], device="cpu")  # query heads 0 and 1 share value head 0
    before = model.blocks[0].attn.W_V.clone()
    one = sepcap.NeuronSet.empty(model, "attn_pre_out")
    one.masks["attn_pre_out"][0, 0, 3] = True
    sepcap.delete(model, one)
    assert (model.blocks[0].attn.W_O[0, 3] == 0).all()
    assert torch.equal(model.blocks[0].attn.W_V, before)
    other = sepcap.NeuronSet.empty(model, "attn_pre_out")
    other.masks["attn_pre_out"][0, 1, 3] = True
    sepcap.delete(model, other)
    expected = before.clone()
    expected[0, :, 3] = 0
    assert torch.equal(model.blocks[0].attn.W_V, expected)


def test_deleting_in_steps_is_deleting_the_union(tiny_folders, family):
    one, two = (sepcap.load_model(tiny_folders[family], device="cpu") for _ in range(2))
    sets = [some(one, "all", seed) for seed in (1, 2, 3)]
    for neurons in sets:
        sepcap.delete(one, neurons)
    sepcap.delete(two, sets[0] | sets[1] | sets[2])
    a, b = weights(one), weights(two)
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_set_of_another_shape_changes_nothing(tiny, family):
    before = weights(tiny)
    right = some(tiny, "mlp").masks["mlp"]
    wrong = sepcap.NeuronSet({"mlp": right, "attn_pre_out": torch.ones(2, 4, 9, dtype=torch.bool)})
    with pytest.raises(ValueError, match=r"'attn_pre_out' is \[2, 4, 9\] but this model has \[2, 4, 8\]"):
        sepcap.delete(tiny, wrong)
    after = weights(tiny)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_nothing_is_deleted_where_one_of_the_sites_cannot_be(tiny_opt, monkeypatch):
    monkeypatch.setattr("sepcap.interventions.trial.norm_inside", lambda part: "ln" if part is tiny_opt.blocks[0].attn else None)
    before = weights(tiny_opt)
    with pytest.raises(NotImplementedError, match="ln normalises over them"):
        sepcap.delete(tiny_opt, some(tiny_opt, "all"))
    assert all(torch.equal(value, before[name]) for name, value in weights(tiny_opt).items())


def test_an_architecture_that_shows_copies_is_refused(tiny_opt, monkeypatch):
    """Editing a copy must not pass for a deletion."""
    monkeypatch.setattr(type(tiny_opt.blocks[0].mlp), "W_out", property(lambda self: self.out.weight.T.clone()), raising=False)
    with pytest.raises(RuntimeError, match=r"blocks\.0\.mlp\.W_out did not reach the model"):
        sepcap.delete(tiny_opt, some(tiny_opt, "mlp"))
