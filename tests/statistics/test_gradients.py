"""Gradient importances against known answers: arithmetic, derivatives by a mask, completeness, identities, and sums that merge."""

import numpy as np
import pytest
import torch
from conftest import CONTEXT, tiny_tokenizer, words
from tiny import SPECIAL, fresh, save_parts
from torch.nn.functional import rms_norm
from transformers.models.mistral.modeling_mistral import MistralRMSNorm

import sepcap
from sepcap.models.forward import call, measuring, with_hooks
from sepcap.models.sites import SITES, bind, get_site
from sepcap.statistics.backward import graded_points, summed_loss
from sepcap.statistics.collect import collect_sample
from sepcap.tasks.samples import sample_task

EVERY = tuple(SITES)
SHARED = ("atp", "taylor", "fisher")
THREE = [pytest.param(name, marks=[pytest.mark.slow] if name in ("gpt2", "neox") else []) for name in ("opt", "mistral", "gpt2", "neox")]


def sample_of(model, tokens=70, seed=0):
    return sample_task(model, sepcap.load_task(words(seed)), "collect", tokens, CONTEXT)


@pytest.fixture(scope="module")
def few_folder(tmp_path_factory):
    """OPT of one layer, four dimensions and three mlp neurons, whose attention adds nothing."""
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(0)
    config = OPTConfig(
        hidden_size=4,
        word_embed_proj_dim=4,
        ffn_dim=3,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=CONTEXT,
        **SPECIAL,
    )
    hf_model = OPTForCausalLM(config)
    with torch.no_grad():
        for parameter in hf_model.parameters():
            parameter.normal_(0, 0.7)
        hf_model.model.decoder.layers[0].self_attn.out_proj.weight.zero_()
        hf_model.model.decoder.layers[0].self_attn.out_proj.bias.zero_()
    return save_parts(tmp_path_factory.mktemp("few"), hf_model, tiny_tokenizer())


def normed(x, weight, bias):
    scale = np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    return (x - x.mean(-1, keepdims=True)) / scale * weight + bias, scale


def test_three_neurons_by_hand(few_folder):
    model = fresh(few_folder, "float64")
    sample = sample_of(model)
    stats = collect_sample(model, sample, ("mlp",), gradients=SHARED, batch_size=2)["mlp"]
    w = {name.replace("._original_component", ""): p.detach().numpy() for name, p in model.original_model.named_parameters()}
    block = {name.split("layers.0.")[1]: value for name, value in w.items() if "layers.0." in name}
    decoder = {name.split("decoder.")[1]: value for name, value in w.items() if "layers." not in name and "decoder." in name}
    total, absolute, rows, n = np.zeros(3), np.zeros(3), np.zeros(3), 0
    for ids in sample.rows:
        x = decoder["embed_tokens.weight"][ids] + decoder["embed_positions.weight"][np.arange(len(ids)) + 2]
        h, _ = normed(x, block["final_layer_norm.weight"], block["final_layer_norm.bias"])
        z = np.maximum(h @ block["fc1.weight"].T + block["fc1.bias"], 0)
        after = x + z @ block["fc2.weight"].T + block["fc2.bias"]
        y, scale = normed(after, 1, 0)
        logits = (y * decoder["final_layer_norm.weight"] + decoder["final_layer_norm.bias"]) @ decoder["embed_tokens.weight"].T
        p = np.exp(logits - logits.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        p[np.arange(len(ids) - 1), ids[1:]] -= 1  # ∂ℓ/∂logits
        p[-1] = 0  # the last position predicts nothing
        d = p @ decoder["embed_tokens.weight"] * decoder["final_layer_norm.weight"]
        d = (d - d.mean(-1, keepdims=True) - y * (d * y).mean(-1, keepdims=True)) / scale
        zg = z * (d @ block["fc2.weight"])
        total, absolute, rows, n = total + zg.sum(0), absolute + np.abs(zg).sum(0), rows + zg.sum(0) ** 2, n + len(ids) - 1
    np.testing.assert_allclose(stats.atp[0], -total / n, rtol=1e-9)
    np.testing.assert_allclose(stats.taylor[0], absolute / n, rtol=1e-9)
    np.testing.assert_allclose(stats.fisher[0], rows / len(sample.rows), rtol=1e-9)
    assert (stats.gradients.predictions, stats.gradients.rows) == (n, len(sample.rows))


def masked_loss(model, sample, masks):
    """Mean loss with z → a + m·(z − a) at every position; masks: hook name -> (m, a)."""
    hooks = [(name, lambda z, hook, m=m, a=a: a + m * (z - a)) for name, (m, a) in masks.items()]
    total, n = 0.0, 0
    with torch.no_grad(), measuring(model), with_hooks(model, hooks):
        for batch in sample.batches(8):
            total += float(summed_loss(call(model, batch.inputs, batch.mask), batch))
            n += int(batch.asked.sum())
    return total / n


@pytest.mark.parametrize("family", THREE)
def test_atp_is_the_derivative_by_a_mask(tiny_folders, family, monkeypatch):
    """−∂L/∂m at m = 1, by a central difference in float64, for some neurons of every site, and about another constant than 0."""
    # transformers rounds the norms of Mistral to float32, which a difference quotient does not survive
    monkeypatch.setattr(MistralRMSNorm, "forward", lambda self, x: rms_norm(x, x.shape[-1:], self.weight, self.variance_epsilon))
    model = fresh(tiny_folders[family], "float64")
    sample = sample_of(model)
    stats = collect_sample(model, sample, EVERY, gradients=SHARED)
    h = 1e-5
    for site in EVERY:
        shape = bind(model, site).shape[1:]
        for layer, at, a in ((0, 0, 0.0), (1, -1, 0.0), (0, 1, 0.3)):
            name, unit = get_site(site).hook_name(layer), torch.zeros(shape, dtype=torch.float64)
            unit.view(-1)[at] = 1
            up, down = (masked_loss(model, sample, {name: (1 + sign * h * unit, a)}) for sign in (1, -1))
            got = float(stats[site].atp_at(a)[layer].flatten()[at])
            assert got == pytest.approx(-(up - down) / (2 * h), abs=1e-6 * max(1e-2, abs(got)) + 1e-9)


@pytest.mark.parametrize("family", THREE)
def test_integrated_gradients_add_up_to_the_loss_of_the_site(tiny_folders, family):
    model = fresh(tiny_folders[family])
    sample = sample_of(model)
    stats = collect_sample(model, sample, EVERY[:2], gradients=("ig",), k=12)
    for site in EVERY[:2]:
        names = [get_site(site).hook_name(layer) for layer in range(2)]
        change = masked_loss(model, sample, dict.fromkeys(names, (0.0, 0.0))) - masked_loss(model, sample, {})
        found = stats[site].gradients
        assert abs(float(stats[site].ig.sum()) - change) == pytest.approx(found.completeness_error, abs=1e-5)
        assert found.completeness_error < 0.02 * max(0.1, abs(change))
        assert found.points == 12


def test_points_of_integration_find_the_jump_behind_a_norm():
    """∂L/∂m of L = x/√(x² + ε) at m·x: δ²/(m² + δ²)^1.5 with δ = √ε/x, which differs between tokens; and what is smooth."""
    points, weights = map(np.array, zip(*graded_points(16), strict=True))
    assert (weights * np.exp(-3 * points)).sum() == pytest.approx((1 - np.exp(-3)) / 3, abs=1e-9)
    assert (weights * np.sin(6 * points)).sum() == pytest.approx((1 - np.cos(6)) / 6, abs=1e-5)
    for typical, most in ((1e-1, 1e-5), (1e-2, 1e-5), (1e-3, 1e-5), (1e-4, 1e-3), (1e-5, 0.1)):
        d = typical * np.exp(np.random.default_rng(0).normal(size=(2000, 1)))
        found = (weights * d**2 / (points**2 + d**2) ** 1.5).sum(1)
        assert found.mean() == pytest.approx((1 / np.sqrt(1 + d**2)).mean(), rel=most)


def test_the_signed_sum_over_the_weights_is_twice_that_over_the_activations(tiny_opt, tiny_folders):
    """ReLU with biases: scaling what a neuron reads by 1 + ε scales its activation, and so does scaling what it writes."""
    for model, sites in ((tiny_opt, EVERY), (fresh(tiny_folders["mistral"]), ("attn_value",))):  # Mistral's query heads share values
        stats = collect_sample(model, sample_of(model), sites, gradients=("atp", "snip"))
        for site in sites:
            sums = stats[site].gradients.sums
            torch.testing.assert_close(sums["snip"].sum(-1), 2 * sums["zg"], rtol=1e-4, atol=1e-5 * float(sums["zg"].abs().max()))
            torch.testing.assert_close(stats[site].snip, sums["snip"].abs().sum(-1))


def test_wanda_is_rms_by_the_norm_of_the_output_weights(tiny):
    stats = collect_sample(tiny, sample_of(tiny), EVERY)
    for site in EVERY:
        rows = torch.stack([bind(tiny, site).rows(layer).detach().double().norm(dim=-1) for layer in range(2)])
        torch.testing.assert_close(stats[site].wanda, stats[site].rms * rows)


@pytest.mark.parametrize("family", [pytest.param("opt"), pytest.param("mistral", marks=pytest.mark.slow)])
def test_batch_size_and_recomputed_blocks_have_no_effect(tiny_folders, family):
    """To the rounding of float32 matrix products of other sizes."""
    model = fresh(tiny_folders[family])
    names = ("atp", "relp", "snip")
    whole = collect_sample(model, sample_of(model), EVERY, gradients=names, batch_size=16)
    for how in ({"batch_size": 2}, {"batch_size": 16, "checkpoint": True}):
        other = collect_sample(model, sample_of(model), EVERY, gradients=names, **how)
        for site in EVERY:
            assert torch.allclose(other[site].abs, whole[site].abs, rtol=1e-6)
            for name, value in whole[site].gradients.sums.items():
                got = other[site].gradients.sums[name]
                assert torch.allclose(got, value, rtol=1e-3, atol=1e-5 * float(value.abs().max())), name


@pytest.mark.filterwarnings("ignore:integrated gradients")
def test_parts_merge_in_any_order_to_the_whole(tiny_opt, tmp_path):
    sample = sample_of(tiny_opt, tokens=120)
    names = (*SHARED, "relp", "ig", "snip")
    how = {"sites": ("mlp", "attn_value"), "gradients": names, "k": 2, "batch_size": 1}
    whole = collect_sample(tiny_opt, sample, **how)
    a, b, c = (collect_sample(tiny_opt, sample.take(rows), **how) for rows in ([0], [1, 2], range(3, len(sample.rows))))
    for merged in (a.merge(b).merge(c), c.merge(a.merge(b)), b.merge(c).merge(a)):
        for site in how["sites"]:
            assert set(merged[site].gradients.names) == set(names)
            for name in (*names, "wanda"):
                torch.testing.assert_close(getattr(merged[site], name), getattr(whole[site], name), rtol=1e-9, atol=1e-12)
            assert merged[site].gradients.completeness_error == pytest.approx(whole[site].gradients.completeness_error, abs=1e-9)
    whole.save(tmp_path / "s.safetensors")
    read = sepcap.Statistics.load(tmp_path / "s.safetensors")
    for site in how["sites"]:
        assert all(torch.equal(read[site].gradients.sums[n], v) for n, v in whole[site].gradients.sums.items())
        assert read[site].gradients.as_json() == whole[site].gradients.as_json()
        assert "gradients of atp, taylor, fisher, ig, relp, snip" in repr(read[site])
    with pytest.raises(ValueError, match="with and without gradients"):
        whole.merge(collect_sample(tiny_opt, sample, how["sites"]))
    with pytest.raises(ValueError, match="with k=2"):
        whole.merge(collect_sample(tiny_opt, sample, **(how | {"k": 3})))


def test_gradients_do_not_change_what_is_collected_of_activations(tiny_opt):
    plain, with_them = (collect_sample(tiny_opt, sample_of(tiny_opt), EVERY, gradients=g, histogram=True) for g in ((), ("atp", "relp")))
    for site in EVERY:
        for name in ("mean", "abs", "std", "min", "max", "median"):
            torch.testing.assert_close(getattr(with_them[site], name), getattr(plain[site], name), rtol=1e-5, atol=1e-6)


def test_half_precision_is_near_to_float32(tiny_folders):
    exact, half = (fresh(tiny_folders["opt"], dtype) for dtype in ("float32", "bfloat16"))
    one, other = (collect_sample(m, sample_of(m), ("mlp",), gradients=(*SHARED, "relp"))["mlp"] for m in (exact, half))
    for name in ("atp", "taylor", "relp"):
        a, b = getattr(one, name), getattr(other, name)
        assert b.dtype == torch.float64
        assert float((a - b).norm() / a.norm()) < 0.1, name


def test_an_ablation_around_the_call_is_part_of_the_model(tiny_opt):
    neurons = sepcap.NeuronSet.random(tiny_opt, {"mlp": 0.5}, seed=0)
    before = collect_sample(tiny_opt, sample_of(tiny_opt), ("mlp",), gradients=SHARED)
    with sepcap.ablate(tiny_opt, neurons):
        hooked = collect_sample(tiny_opt, sample_of(tiny_opt), ("mlp",), gradients=SHARED)
    sepcap.delete(tiny_opt, neurons)
    deleted = collect_sample(tiny_opt, sample_of(tiny_opt), ("mlp",), gradients=SHARED)
    assert not torch.allclose(before["mlp"].taylor, hooked["mlp"].taylor)
    kept = ~neurons.masks["mlp"]
    torch.testing.assert_close(hooked["mlp"].taylor[kept], deleted["mlp"].taylor[kept], rtol=1e-3, atol=1e-8)
    assert not hooked["mlp"].taylor[~kept].any()


def state_of(model):
    hooks = [len(point.fwd_hooks) for point in model.hook_dict.values()]
    own = sorted(name for name, module in model.named_modules() if "forward" in module.__dict__)
    return hooks, own, [(p.requires_grad, p.grad is None) for p in model.parameters()], model.training


@pytest.mark.filterwarnings("ignore:integrated gradients")
def test_the_model_is_left_as_it_was_after_success_and_after_an_error(tiny_opt, monkeypatch):
    for parameter in list(tiny_opt.parameters())[::2]:
        parameter.requires_grad_(False)
    tiny_opt.train()
    before, names = state_of(tiny_opt), ("atp", "relp", "ig", "snip")
    collect_sample(tiny_opt, sample_of(tiny_opt), ("mlp",), gradients=names, k=1, checkpoint=True)
    assert state_of(tiny_opt) == before
    monkeypatch.setattr("sepcap.statistics.backward.summed_loss", lambda logits, batch: logits.sum() / "no number")
    for only in names:
        with pytest.raises(TypeError):
            collect_sample(tiny_opt, sample_of(tiny_opt), ("mlp",), gradients=(only,), k=1, checkpoint=True)
        assert state_of(tiny_opt) == before


def test_batches_halve_when_memory_runs_out_in_a_backward_pass(tiny_opt, monkeypatch):
    from sepcap.statistics import backward

    reduce = backward._rows

    def small(z, g, *rest):
        if len(z) > 2:
            raise torch.OutOfMemoryError("no memory for so many rows")
        return reduce(z, g, *rest)

    expected = collect_sample(tiny_opt, sample_of(tiny_opt), ("mlp",), gradients=SHARED, batch_size=2)
    monkeypatch.setattr(backward, "_rows", small)
    with pytest.warns(UserWarning, match="batch_size=2"):
        got = collect_sample(tiny_opt, sample_of(tiny_opt), ("mlp",), gradients=SHARED, batch_size=4)
    assert torch.equal(got["mlp"].atp, expected["mlp"].atp)


def test_it_works_inside_inference_mode(tiny_opt):
    expected = collect_sample(tiny_opt, sample_of(tiny_opt), ("mlp",), gradients=SHARED)["mlp"].atp
    with torch.inference_mode():
        assert torch.equal(collect_sample(tiny_opt, sample_of(tiny_opt), ("mlp",), gradients=SHARED)["mlp"].atp, expected)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"gradients": "taylr"}, "taylor"),
        ({"gradients": ("wanda",)}, "wanda"),
        ({"gradients": 3}, "give True, False, or names"),
        ({"gradients": ("ig",), "k": 0}, "k=0"),
    ],
)
def test_bad_arguments_are_named(tiny_opt, how, said):
    with pytest.raises((ValueError, TypeError), match=said):
        sepcap.collect(tiny_opt, words(0), tokens=60, **how)


def test_too_few_points_say_how_much_is_missing(tiny_opt):
    with pytest.warns(UserWarning, match="give more than k=1 points"):
        collect_sample(tiny_opt, sample_of(tiny_opt), ("mlp",), gradients=("ig",), k=1)


def test_models_without_gradients_are_refused(tiny_opt, tiny_folders):
    other = fresh(tiny_folders["opt"])
    with torch.inference_mode():
        other.original_model.lm_head.weight = torch.nn.Parameter(torch.randn(320, 32))
    with pytest.raises(ValueError, match="inference tensor"):
        sepcap.collect(other, words(0), tokens=60, gradients=True)
    weight = next(tiny_opt.parameters())
    weight.requires_grad_(False)
    weight.data = weight.data.to(torch.int8)
    with pytest.raises(ValueError, match="int8, as in a quantised model"):
        sepcap.collect(tiny_opt, words(0), tokens=60, gradients=True)


def test_what_was_not_collected_says_how_to_collect_it(tiny_opt):
    stats = sepcap.collect(tiny_opt, words(0), tokens=60, gradients=False)
    for name in ("atp", "taylor", "fisher", "ig", "relp", "snip"):
        with pytest.raises(ValueError, match=rf"gradients=\('{name}',\)"):
            getattr(stats["mlp"], name)
    with pytest.raises(ValueError, match="gradients="):
        sepcap.score(stats, stats, "taylor")
