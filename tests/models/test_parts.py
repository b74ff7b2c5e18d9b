"""Attention and mlp as functions of the residual stream: against finite differences, closed forms, and what the model itself adds."""

import pytest
import torch

import sepcap
from sepcap.models.blocks.parts import block_part, widest
from sepcap.models.forward import logits_of, run_hooks
from sepcap.selection.neurons import NeuronSet
from sepcap.statistics.spectrum import all_values, jacobian

IDS = torch.tensor([0, 70, 81, 92, 75, 86])
"""BOS and five different tokens."""
KEPT = [1, 2, 3, 4, 5]
D = 32


def whole(model, layer, part, ids=IDS, kept=KEPT, **options):
    """The Jacobian, the function's value, and the largest rank possible."""
    with block_part(model, layer, part, ids, kept, **options) as found:
        return jacobian(found.function, found.at, 64), found.function(found.at), widest(found, model)


@pytest.mark.parametrize("part", ["attn", "mlp"])
def test_the_function_is_what_the_model_adds_and_its_jacobian_agrees_with_finite_differences(tiny, part):
    seen = {}
    place = {"attn": "blocks.1.attn.o.hook_out", "mlp": "blocks.1.mlp.out.hook_out"}[part]
    run_hooks(tiny, IDS[None], [(place, lambda added, hook: seen.update(added=added.reshape(len(IDS), D)))])
    with block_part(tiny, 1, part, IDS, KEPT) as found:
        torch.testing.assert_close(found.function(found.at).float(), seen["added"][KEPT], atol=2e-5, rtol=1e-4)
        matrix = jacobian(found.function, found.at, 64)
        generator = torch.Generator().manual_seed(0)
        for _ in range(6):
            v = torch.randn(found.at.shape, generator=generator, dtype=torch.float64)
            step = 1e-6
            change = (found.function(found.at + step * v) - found.function(found.at - step * v)) / (2 * step)
            expected = change.flatten()
            assert (matrix @ v.flatten() - expected).norm() < 1e-7 * expected.norm()


def opt_attention(layer, x, context):
    """OPT's attention written out: LayerNorm, then causal softmax over BOS and the positions, then the output projection."""
    attn, norm = layer.self_attn, layer.self_attn_layer_norm
    y = torch.nn.functional.layer_norm(torch.cat([context, x]), (D,), norm.weight, norm.bias, norm.eps)
    q, k, v = ((y @ p.weight.T + p.bias).reshape(len(y), 4, 8) for p in (attn.q_proj, attn.k_proj, attn.v_proj))
    scores = torch.einsum("thd,shd->hts", q, k) / 8**0.5
    scores = scores.masked_fill(torch.ones(len(y), len(y)).triu(1).bool(), -torch.inf)
    z = torch.einsum("hts,shd->thd", scores.softmax(-1), v).reshape(len(y), D)
    return (z @ attn.out_proj.weight.T + attn.out_proj.bias)[len(context) :]


def test_the_jacobian_of_attention_is_that_of_the_plain_model_written_out(tiny_folders):
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(tiny_folders["opt"]).double()
    stream = plain.model(IDS[None], output_hidden_states=True).hidden_states[1][0].detach()
    layer = plain.model.decoder.layers[1]
    expected = torch.autograd.functional.jacobian(lambda x: opt_attention(layer, x, stream[:1]), stream[1:])
    matrix, _, _ = whole(sepcap.load_model(tiny_folders["opt"], device="cpu"), 1, "attn")
    # the stream comes from a float32 pass in one case and a float64 pass in the other
    torch.testing.assert_close(matrix, expected.reshape(160, 160), rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_the_jacobian_of_a_relu_mlp_is_the_product_of_its_weights_over_active_neurons(tiny_opt):
    mlp = tiny_opt.blocks[0].mlp
    with block_part(tiny_opt, 0, "mlp", IDS, KEPT, norm=False) as found:
        w_in, w_out, b_in = (w.detach().double() for w in (mlp.W_in, mlp.W_out, mlp.b_in))
        active = found.at @ w_in + b_in > 0
        assert found.active == tuple(active.sum(1).tolist())
        expected = torch.block_diag(*[((w_in * on) @ w_out).T for on in active.double()])
        torch.testing.assert_close(jacobian(found.function, found.at, 64), expected)


@pytest.mark.parametrize(("part", "norm"), [("attn", "ln1"), ("mlp", "ln2")])
def test_with_the_norm_inside_the_chain_rule_holds(tiny_opt, part, norm):
    outer, _, _ = whole(tiny_opt, 1, part, norm=False)
    inner = getattr(tiny_opt.blocks[1], norm)
    with block_part(tiny_opt, 1, part, IDS, KEPT) as found:
        weights = [w.detach().double() for w in (inner.original_component.weight, inner.original_component.bias)]
        of_norm = torch.autograd.functional.jacobian(lambda x: torch.nn.functional.layer_norm(x, (D,), *weights, 1e-5), found.at)
        torch.testing.assert_close(jacobian(found.function, found.at, 64), outer @ of_norm.reshape(160, 160), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("part", ["attn", "mlp"])
def test_the_residual_connection_is_outside(tiny, part):
    with torch.no_grad():
        (tiny.blocks[1].attn.W_O if part == "attn" else tiny.blocks[1].mlp.W_out).zero_()
    assert not whole(tiny, 1, part)[0].any()


def test_attention_is_block_lower_triangular_and_an_mlp_block_diagonal(tiny):
    attention = whole(tiny, 1, "attn")[0].reshape(5, D, 5, D)
    mlp = whole(tiny, 1, "mlp")[0].reshape(5, D, 5, D)
    for out in range(5):
        for into in range(5):
            assert bool(attention[out, :, into].any()) == (into <= out)
            assert bool(mlp[out, :, into].any()) == (into == out)


def test_a_masked_model_looks_both_ways(tmp_path):
    from encoders import save_masked

    model = sepcap.load_model(save_masked("roberta", tmp_path), device="cpu")
    width = model.cfg.d_model
    matrix = whole(model, 0, "attn", ids=torch.tensor([0, 70, 81, 92, 2]), kept=[1, 2, 3])[0].reshape(3, width, 3, width)
    assert all(bool(matrix[out, :, into].any()) for out in range(3) for into in range(3))


@pytest.mark.parametrize("part", ["attn", "mlp"])
def test_the_bound_is_the_rank_when_nothing_is_degenerate(tiny, family, part):
    matrix, _, bound = whole(tiny, 0, part)
    assert all_values(matrix).rank(1e-10) == (bound, False)
    if family in ("opt", "gpt2", "neox") and part == "attn":
        assert bound == 5 * (D - 1)


def test_two_query_heads_that_share_values_bound_the_rank_further(tiny_folders):
    model = sepcap.load_model(tiny_folders["mistral"], device="cpu")
    # without BOS before it, position t weighs t values: 2 groups of 8 coordinates, and 0, 1, 2, … weights for the second heads
    ids = IDS[1:]
    matrix, _, bound = whole(model, 0, "attn", ids=ids, kept=[0, 1, 2, 3, 4])
    assert bound == 2 * (5 * 8 + 0 + 1 + 2 + 3 + 4)
    assert all_values(matrix).rank(1e-10)[0] == bound
    # one token has nothing to weigh
    assert whole(model, 0, "attn", ids=ids[:1], kept=[0])[2] == 16


def test_float64_is_kept_where_an_architecture_computes_in_float32(tiny_folders):
    model = sepcap.load_model(tiny_folders["llama"], device="cpu")
    with torch.no_grad():
        model.blocks[0].attn.W_O[:, 2:] = 0  # 4 heads with 2 coordinates each
    matrix, _, _ = whole(model, 0, "attn")
    values = all_values(matrix).values
    assert float(values[39] / values[0]) > 1e-6
    assert float(values[40] / values[0]) < 1e-14


def test_an_ablation_around_it_is_part_of_the_model(tiny):
    everything = NeuronSet.heads(tiny, [(1, head) for head in range(4)])
    with sepcap.ablate(tiny, everything):
        assert not whole(tiny, 1, "attn")[0].any()
    assert whole(tiny, 1, "attn")[0].any()


def test_the_model_is_left_as_it_was(tiny):
    tiny.train()
    before = {name: value.clone() for name, value in tiny.original_model.state_dict().items()}
    tiny.original_model.set_attn_implementation("sdpa")
    hooks = sum(len(point._forward_hooks) for point in tiny.hook_dict.values())
    for part in ("attn", "mlp"):
        whole(tiny, 1, part)
        with pytest.raises(ZeroDivisionError), block_part(tiny, 1, part, IDS, KEPT):
            _ = 1 / 0
    assert sum(len(point._forward_hooks) for point in tiny.hook_dict.values()) == hooks
    assert all(torch.equal(before[name], value) for name, value in tiny.original_model.state_dict().items())
    assert all(module.training for module in tiny.modules())
    assert all(weight.requires_grad for weight in tiny.original_model.parameters())
    assert tiny.original_model.config._attn_implementation == "sdpa"
    assert logits_of(tiny.eval(), IDS[None]).shape == (1, 6, tiny.cfg.d_vocab)


def test_precisions_agree_to_rounding(tiny):
    for part in ("attn", "mlp"):
        double, _, _ = whole(tiny, 1, part)
        single, _, _ = whole(tiny, 1, part, dtype=torch.float32)
        assert single.dtype == torch.float32
        assert float((single.double() - double).norm() / double.norm()) < 1e-5


def test_bad_input_is_named(tiny_opt):
    with pytest.raises(ValueError, match=r"part='atn' is not known. Did you mean 'attn'"), block_part(tiny_opt, 0, "atn", IDS, KEPT):
        pass
    for layer in (-1, 2):
        with pytest.raises(IndexError, match=f"layer={layer} does not exist"), block_part(tiny_opt, layer, "attn", IDS, KEPT):
            pass
    fake = type("HookedTransformer", (), {})()
    with pytest.raises(NotImplementedError, match="HookedTransformer"), block_part(fake, 0, "attn", IDS, KEPT):
        pass
