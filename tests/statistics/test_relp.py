"""The linearised backward pass against its rules written out: plain functions of the weights of the Hugging Face models."""

import math

import pytest
import torch
from tiny import CONTEXT, fresh, words
from torch.nn.functional import cross_entropy, gelu, layer_norm, silu

import sepcap
from sepcap.models.forward import call
from sepcap.models.linearised import linearised
from sepcap.models.sites import SITES
from sepcap.statistics.collect import collect_sample
from sepcap.tasks.samples import sample_task

EVERY = tuple(SITES)


def fixed(new, like):
    """The value of `like` with the gradient of `new`."""
    return new - new.detach() + like.detach()


def by_quotient(act, x):
    y = act(x).detach()
    ratio = torch.where(x.detach() == 0, torch.zeros(()), y / torch.where(x == 0, 1, x).detach())
    return fixed(x * ratio, y)


def centred_norm(x, weight, bias, eps=1e-5):
    centred = x - x.mean(-1, keepdim=True)
    scale = (centred.square().mean(-1, keepdim=True) + eps).sqrt().detach()
    return fixed(centred / scale * weight + bias, layer_norm(x, x.shape[-1:], weight, bias, eps))


def rms_norm(x, weight, eps=1e-6):
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt().detach() * weight


def heads(x, n):
    return x.unflatten(-1, (n, -1)).transpose(0, 1)


def attended(q, k, v):
    """Σ of values [head, pos, d] by patterns that are constants."""
    scores = (q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])).detach()
    mask = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return (scores.masked_fill(mask, -math.inf).softmax(-1) @ v).transpose(0, 1)


class Seen:
    """The activations of every site and layer, with their gradients."""

    def __init__(self):
        self.z = {site: {} for site in EVERY}

    def __call__(self, site, layer, z):
        z = z if z.requires_grad else z.requires_grad_()
        z.retain_grad()
        self.z[site][layer] = z
        return z


def opt(w, ids, seen):
    w = {name.removeprefix("model.decoder."): value for name, value in w.items()}
    x = w["embed_tokens.weight"][ids] + w["embed_positions.weight"][torch.arange(len(ids)) + 2]
    for i in range(2):
        b = {name.removeprefix(f"layers.{i}."): value for name, value in w.items() if name.startswith(f"layers.{i}.")}
        h = centred_norm(x, b["self_attn_layer_norm.weight"], b["self_attn_layer_norm.bias"])
        q, k, v = (heads(h @ b[f"self_attn.{p}_proj.weight"].T + b[f"self_attn.{p}_proj.bias"], 4) for p in "qkv")
        v = seen("attn_value", i, v)
        z = seen("attn_pre_out", i, attended(q, k, v))
        x = x + z.flatten(1) @ b["self_attn.out_proj.weight"].T + b["self_attn.out_proj.bias"]
        h = centred_norm(x, b["final_layer_norm.weight"], b["final_layer_norm.bias"])
        z = seen("mlp", i, by_quotient(torch.relu, h @ b["fc1.weight"].T + b["fc1.bias"]))
        x = x + z @ b["fc2.weight"].T + b["fc2.bias"]
    return centred_norm(x, w["final_layer_norm.weight"], w["final_layer_norm.bias"]) @ w["embed_tokens.weight"].T


def gpt2(w, ids, seen):
    w = {name.removeprefix("transformer."): value for name, value in w.items()}
    x = w["wte.weight"][ids] + w["wpe.weight"][torch.arange(len(ids))]
    for i in range(2):
        b = {name.removeprefix(f"h.{i}."): value for name, value in w.items() if name.startswith(f"h.{i}.")}
        h = centred_norm(x, b["ln_1.weight"], b["ln_1.bias"])
        q, k, v = (heads(part, 4) for part in (h @ b["attn.c_attn.weight"] + b["attn.c_attn.bias"]).chunk(3, -1))
        v = seen("attn_value", i, v)
        z = seen("attn_pre_out", i, attended(q, k, v))
        x = x + z.flatten(1) @ b["attn.c_proj.weight"] + b["attn.c_proj.bias"]
        h = centred_norm(x, b["ln_2.weight"], b["ln_2.bias"])
        z = seen("mlp", i, by_quotient(lambda x: gelu(x, approximate="tanh"), h @ b["mlp.c_fc.weight"] + b["mlp.c_fc.bias"]))
        x = x + z @ b["mlp.c_proj.weight"] + b["mlp.c_proj.bias"]
    return centred_norm(x, w["ln_f.weight"], w["ln_f.bias"]) @ w["wte.weight"].T


def turned(x):
    """Rotary embeddings of [head, pos, d]."""
    d = x.shape[-1]
    angles = torch.arange(x.shape[1])[:, None] * 10000.0 ** (-torch.arange(0, d, 2) / d)
    cos, sin = (f(torch.cat([angles, angles], -1)).to(x) for f in (torch.cos, torch.sin))
    return x * cos + torch.cat([-x[..., d // 2 :], x[..., : d // 2]], -1) * sin


def gated(w, ids, seen, groups=1):
    w = {name.removeprefix("model."): value for name, value in w.items()}
    x = w["embed_tokens.weight"][ids]
    for i in range(2):
        b = {name.removeprefix(f"layers.{i}."): value for name, value in w.items() if name.startswith(f"layers.{i}.")}
        h = rms_norm(x, b["input_layernorm.weight"])
        q, k, v = (heads(h @ b[f"self_attn.{p}_proj.weight"].T, n) for p, n in (("q", 4), ("k", 4 // groups), ("v", 4 // groups)))
        v = seen("attn_value", i, v)
        k, shared = (part.repeat_interleave(groups, 0) for part in (turned(k), v))
        z = seen("attn_pre_out", i, attended(turned(q), k, shared))
        x = x + z.flatten(1) @ b["self_attn.o_proj.weight"].T
        h = rms_norm(x, b["post_attention_layernorm.weight"])
        gate, up = by_quotient(silu, h @ b["mlp.gate_proj.weight"].T), h @ b["mlp.up_proj.weight"].T
        half = (gate.detach() * up + gate * up.detach()) / 2  # each factor gets half of the gradient
        z = seen("mlp", i, fixed(half, gate * up))
        x = x + z @ b["mlp.down_proj.weight"].T
    return rms_norm(x, w["norm.weight"]) @ w.get("lm_head.weight", w["embed_tokens.weight"]).T


def by_rules(function, hf_model, sample):
    """−(1/N) Σ z·g at every site and layer."""
    weights = {name: value.detach() for name, value in hf_model.state_dict().items()}
    total, n = {}, 0
    for row in sample.rows:
        ids, seen = torch.from_numpy(row), Seen()
        logits = function(weights, ids, seen)
        torch.testing.assert_close(logits, hf_model(ids[None]).logits[0], atol=1e-4, rtol=1e-4)
        cross_entropy(logits[:-1], ids[1:], reduction="sum").backward()
        n += len(row) - 1
        for site, layers in seen.z.items():
            for layer, z in layers.items():
                along = 1 if site == "attn_value" else 0  # [head, pos, d]
                total[site, layer] = total.get((site, layer), 0) - (z * z.grad).sum(along).detach()
    return {at: value / n for at, value in total.items()}


@pytest.mark.parametrize(
    ("family", "function"),
    [("opt", opt), ("gpt2", gpt2), ("llama", gated), ("mistral", lambda *given: gated(*given, groups=2))],
    ids=["opt", "gpt2", "llama", "mistral"],
)
def test_relp_is_what_its_rules_give(tiny_folders, family, function):
    from transformers import AutoModelForCausalLM

    model = fresh(tiny_folders[family])
    sample = sample_task(model, sepcap.load_task(words(0)), "collect", 60, CONTEXT)
    expected = by_rules(function, AutoModelForCausalLM.from_pretrained(tiny_folders[family]).eval(), sample)
    stats = collect_sample(model, sample, EVERY, gradients=("relp", "atp"))
    for (site, layer), value in expected.items():
        scale = float(value.abs().max())
        torch.testing.assert_close(stats[site].relp[layer].float(), value, atol=1e-5 * max(1, scale), rtol=1e-3)
        assert float((stats[site].atp[layer].float() - value).abs().max()) > 1e-2 * scale, "the rules change nothing here"


def test_the_rules_leave_the_logits_as_they_are(tiny):
    ids = torch.randint(3, 320, (2, 12), generator=torch.Generator().manual_seed(0))
    before = call(tiny, ids).detach()
    with linearised(tiny) as rules, rules:
        assert torch.equal(call(tiny, ids), before)
    assert rules.activations == rules.patterns == 2
    assert torch.equal(call(tiny, ids), before)
    assert not any("forward" in module.__dict__ for module in tiny.modules())


def test_the_rules_apply_only_under_their_mode(tiny):
    """Patched modules do nothing by themselves: ordinary gradients inside of the context are those outside of it."""
    sample = sample_task(tiny, sepcap.load_task(words(0)), "collect", 40, CONTEXT)
    alone, beside = (collect_sample(tiny, sample, ("mlp",), gradients=names)["mlp"] for names in (("atp",), ("atp", "relp")))
    assert torch.equal(alone.atp, beside.atp)


def test_an_activation_that_is_not_0_at_0_is_refused(tiny_opt):
    with linearised(tiny_opt) as rules, rules:
        for function in (torch.sigmoid, torch.nn.functional.softplus):
            with pytest.raises(NotImplementedError, match="not 0 at 0"):
                function(torch.zeros(1))


def test_a_relu_at_0_has_its_own_slope_and_a_gelu_a_half(tiny_opt):
    x = torch.zeros(2, requires_grad=True)
    with linearised(tiny_opt) as rules:
        for function, slope in ((torch.relu, 0.0), (gelu, 0.5), (silu, 0.5), (torch.tanh, 1.0)):
            with rules:
                y = function(x)
            (g,) = torch.autograd.grad(y.sum(), x)
            assert g.tolist() == pytest.approx([slope, slope])
