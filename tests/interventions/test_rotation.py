"""Rotation: the same model in the singular basis of every value head's W_V W_O."""

import pytest
import torch
from conftest import tiny_tokenizer
from plain import token_ids

import sepcap
from sepcap.interventions.rotation import Rotation, compute_rotation, rotate_values
from sepcap.models.sites import get_site
from sepcap.models.weights import WeightSnapshot, fingerprint

BIASES = ("fold", "rotate")
ATTENTION = ("attn_value", "attn_pre_out")


def logits(model):
    with torch.no_grad():
        return model(token_ids()).float()


def activations(model, site):
    """[layer, batch, pos, head, d_head]."""
    seen = []
    hooks = [(get_site(site).hook_name(layer), lambda z, hook: seen.append(z.clone())) for layer in range(len(model.blocks))]
    with torch.no_grad(), model.hooks(fwd_hooks=hooks):
        model(token_ids())
    return torch.stack(seen)


def products(model):
    """W_V W_O with W_O of a group's heads side by side, [layer, value_head, d_model, group·d_model], float64."""
    by_layer = []
    for block in model.blocks:
        w_v, w_o = block.attn.W_V.detach().double(), block.attn.W_O.detach().double()
        group = len(w_o) // len(w_v)
        by_layer.append(torch.stack([w_v[h] @ torch.cat(list(w_o[h * group : (h + 1) * group]), dim=1) for h in range(len(w_v))]))
    return torch.stack(by_layer)


@torch.no_grad()
def lower_rank(model):
    """Value heads of rank 3 in float32, one of W_O too, and one head that is nothing at all."""
    torch.manual_seed(0)
    for block in model.blocks:
        w_v, w_o = block.attn.W_V, block.attn.W_O
        w_v[0] = torch.randn(w_v.shape[1], 3) @ torch.randn(3, w_v.shape[2]) * 0.3
        w_o[-1] = torch.randn(w_o.shape[1], 2) @ torch.randn(2, w_o.shape[2]) * 0.3
        w_v[1] = 0


def pruned(model):
    sepcap.delete(model, sepcap.NeuronSet.random(model, {"attn_pre_out": 0.4, "attn_value": 0.3}))
    sepcap.delete(model, sepcap.NeuronSet.heads(model, [(0, 0), (0, 1)]))


CONDITIONS = {"whole": lambda model: None, "pruned": pruned, "low rank": lower_rank}


@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize("bias", BIASES)
def test_logits_stay_and_the_weights_are_another_basis(tiny, bias, condition):
    CONDITIONS[condition](tiny)
    before, old, product = logits(tiny), fingerprint(tiny), products(tiny)
    rotation = rotate_values(tiny, bias)
    assert fingerprint(tiny) != old
    torch.testing.assert_close(logits(tiny), before, atol=1e-4, rtol=0)
    torch.testing.assert_close(products(tiny), product, atol=1e-5, rtol=0)
    rotation.undo(tiny)
    assert fingerprint(tiny) == old
    assert torch.equal(logits(tiny), before)


@pytest.mark.parametrize("condition", CONDITIONS)
def test_singular_values_and_vectors_are_those_of_the_whole_product(tiny, condition):
    CONDITIONS[condition](tiny)
    u, s, vt = torch.linalg.svd(products(tiny), full_matrices=False)
    rotation = rotate_values(tiny)
    d_head = rotation.singular_values.shape[-1]
    torch.testing.assert_close(rotation.singular_values, s[..., :d_head], atol=1e-6, rtol=1e-9)
    assert (rotation.singular_values.diff(dim=-1) <= 0).all()
    for layer, block in enumerate(tiny.blocks):
        w_v, w_o = block.attn.W_V.detach().double(), block.attn.W_O.detach().double()
        right = w_o.view(len(w_v), -1, *w_o.shape[1:]).transpose(1, 2).flatten(2)
        for head in range(len(w_v)):
            for i, value in enumerate(rotation.singular_values[layer, head].tolist()):
                left = w_v[head, :, i]
                if value == 0:
                    assert not left.any()
                    assert not right[head, i].any()
                    continue
                if value < 1e-4:
                    continue  # noise of float32 weights: its vectors are not determined
                # each of them holds √S; the sign of a pair is fixed by the largest entry of the left vector
                sign = torch.sign(u[layer, head, :, i] @ left)
                torch.testing.assert_close(left, sign * value**0.5 * u[layer, head, :, i], atol=1e-5, rtol=0)
                torch.testing.assert_close(right[head, i], sign * value**0.5 * vt[layer, head, i], atol=1e-5, rtol=0)
                assert left[left.abs().argmax()] > 0


def test_null_directions_of_a_pruned_head_carry_nothing(tiny):
    neurons = sepcap.NeuronSet.empty(tiny, "attn_value")
    neurons.masks["attn_value"][0, 0, :5] = True
    sepcap.delete(tiny, neurons)
    rotation = rotate_values(tiny, "rotate")
    assert (rotation.singular_values[0, 0] > 0).sum() == 3
    assert (activations(tiny, "attn_value")[0, :, :, 0, 3:] == 0).all()
    assert not rotation.basis[0, 0, :, 3:].any()
    assert not rotation.output_bias.any()  # deletion takes the biases of the neurons along: nothing lies outside


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("site", ATTENTION)
def test_rotated_activations_of_the_unedited_model_are_those_of_the_edited_one(tiny, site, bias):
    rotation = compute_rotation(tiny, bias)
    before = activations(tiny, site)
    turned = torch.stack([rotation.activations(site, layer, z) for layer, z in enumerate(before)])
    rotation.apply(tiny)
    after = activations(tiny, site)
    assert (after - before).abs().max() > 0.05
    torch.testing.assert_close(turned, after, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("bias", BIASES)
def test_statistics_in_the_rotated_basis_are_those_of_the_edited_model(tiny, letters, bias):
    options = {"tokens": 300, "sites": ATTENTION, "histogram": True}
    rotation = compute_rotation(tiny, bias)
    unedited = sepcap.collect(tiny, letters, rotation=rotation, **options)
    plain = sepcap.collect(tiny, letters, **options)
    rotation.apply(tiny)
    edited = sepcap.collect(tiny, letters, **options)
    assert unedited.info["rotation"] == rotation.fingerprint
    for site in ATTENTION:
        assert (plain[site].mean - edited[site].mean).abs().max() > 0.05
        for name in ("mean", "abs", "rms", "std", "min", "max", "median"):
            torch.testing.assert_close(getattr(unedited[site], name), getattr(edited[site], name), atol=2e-3, rtol=1e-3, msg=name)
        torch.testing.assert_close(unedited[site].mean, edited[site].mean, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("bias", BIASES)
def test_biases_go_where_they_are_said_to_go(tiny_opt, bias):
    """Rows of attention sum to 1, so the value biases add Σ_h b_V[h] W_O[h] to every position."""
    attn = tiny_opt.blocks[0].attn
    b_v, b_o, w_o = (w.detach().double().clone() for w in (attn.b_V, attn.b_O, attn.W_O))
    rotation = rotate_values(tiny_opt, bias)
    if bias == "fold":
        assert not attn.b_V.any()
        torch.testing.assert_close(attn.b_O.double(), b_o + sum(b_v[h] @ w_o[h] for h in range(4)), atol=1e-6, rtol=0)
    else:
        assert torch.equal(attn.b_O.double(), b_o)
        _, s, vt = torch.linalg.svd(products(tiny_opt)[0], full_matrices=False)
        for head in range(4):
            # METHODS 7: b_V W_O V S^-½, up to the signs of the basis
            expected = b_v[head] @ w_o[head] @ vt[head, :8].T * s[head, :8].rsqrt()
            torch.testing.assert_close(attn.b_V[head].double().abs(), expected.abs(), atol=1e-5, rtol=1e-4)
    assert rotation.bias == bias


def qwen2():
    """Value biases, but no output bias."""
    import transformers as t

    torch.manual_seed(0)
    config = t.Qwen2Config(
        hidden_size=32,
        intermediate_size=72,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        vocab_size=320,
    )
    model = sepcap.load_model(t.AutoModelForCausalLM.from_config(config), tokenizer=tiny_tokenizer(), device="cpu")
    with torch.no_grad():
        for block in model.blocks:
            block.attn.b_V.normal_(0, 0.3)
            block.attn.W_O.mul_(4)
    return model


def test_value_bias_without_output_bias():
    model = qwen2()
    before = fingerprint(model)
    with pytest.raises(NotImplementedError, match="no output bias b_O to fold it into; use bias='rotate'"):
        rotate_values(model, "fold")
    assert fingerprint(model) == before
    old = logits(model)
    rotate_values(model, "rotate")
    torch.testing.assert_close(logits(model), old, atol=1e-4, rtol=0)
    # a head of low rank whose bias lies outside: no direction could carry all of it
    other = qwen2()
    lower_rank(other)
    before = fingerprint(other)
    with pytest.raises(ValueError, match="a part in null directions of W_V W_O, and this model has no b_O"):
        rotate_values(other, "rotate")
    assert fingerprint(other) == before


def test_results_repeat_and_do_not_depend_on_the_basis_they_start_from(tiny):
    first, again = compute_rotation(tiny), compute_rotation(tiny)
    assert first.fingerprint == again.fingerprint
    assert first.fingerprint != compute_rotation(tiny, "rotate").fingerprint
    rotate_values(tiny)
    twice = compute_rotation(tiny)
    torch.testing.assert_close(twice.singular_values, first.singular_values, atol=1e-5, rtol=1e-5)
    # already in its own basis: nothing is left to turn, signs included
    eye = torch.eye(8, dtype=torch.float64).expand_as(twice.basis)
    torch.testing.assert_close(twice.basis, eye, atol=1e-3, rtol=0)


def test_bfloat16_is_rotated_in_float64_and_written_back(tiny_folders, family):
    model = sepcap.load_model(tiny_folders[family], device="cpu", dtype="bfloat16")
    exact = sepcap.load_model(tiny_folders[family], device="cpu")
    with torch.no_grad():
        for ours, theirs in zip(exact.blocks, model.blocks, strict=True):
            for name in ("W_V", "W_O", "b_V", "b_O"):
                if getattr(ours.attn, name) is not None:
                    getattr(ours.attn, name).copy_(getattr(theirs.attn, name))
    rotation, expected = rotate_values(model), rotate_values(exact)
    assert model.blocks[0].attn.W_V.dtype == torch.bfloat16
    torch.testing.assert_close(rotation.singular_values, expected.singular_values, rtol=1e-12, atol=0)
    assert torch.equal(model.blocks[1].attn.W_O, exact.blocks[1].attn.W_O.bfloat16())


@pytest.mark.parametrize("bias", BIASES)
def test_saved_and_loaded_it_rotates_and_undoes(tiny, tmp_path, bias):
    before = fingerprint(tiny)
    rotation = rotate_values(tiny, bias)
    after = fingerprint(tiny)
    rotation.save(tmp_path / "r.safetensors")
    loaded = Rotation.load(tmp_path / "r.safetensors")
    assert loaded.fingerprint == rotation.fingerprint
    z = torch.randn(2, 3, *rotation.basis.shape[1:3])
    assert torch.equal(loaded.activations("attn_value", 1, z), rotation.activations("attn_value", 1, z))
    loaded.undo(tiny)
    assert fingerprint(tiny) == before
    loaded.apply(tiny)
    assert fingerprint(tiny) == after


def test_undo_and_apply_refuse_other_weights(tiny_opt, tiny_folders):
    rotation = rotate_values(tiny_opt)
    with pytest.raises(ValueError, match="not those this rotation was computed from"):
        rotation.apply(tiny_opt)  # it is rotated already
    other = sepcap.load_model(tiny_folders["opt"], device="cpu")
    with pytest.raises(ValueError, match="not as rotate_values left them"):
        rotation.undo(other)
    with pytest.raises(ValueError, match="nothing to undo"):
        compute_rotation(other).undo(other)
    sepcap.delete(tiny_opt, sepcap.NeuronSet.random(tiny_opt, {"mlp": 0.5}))
    rotation.undo(tiny_opt)  # what was done to the mlp has nothing to do with it
    sepcap.delete(other, sepcap.NeuronSet.random(other, {"mlp": 0.5}))
    assert fingerprint(tiny_opt) == fingerprint(other)


def test_bad_input(tiny_opt):
    with pytest.raises(ValueError, match="site='mlp' is not known"):
        compute_rotation(tiny_opt).activations("mlp", 0, torch.zeros(1, 1, 4, 8))
    with pytest.raises(ValueError, match=r"z has heads \[3, 8\]; this rotation has 4 value heads of 8"):
        compute_rotation(tiny_opt).activations("attn_pre_out", 0, torch.zeros(1, 1, 3, 8))


def test_a_snapshot_covers_all_that_rotation_edits(tiny):
    before = fingerprint(tiny)
    snapshot = WeightSnapshot(tiny, ("attn_value",))
    rotate_values(tiny)
    snapshot.restore()
    assert fingerprint(tiny) == before
