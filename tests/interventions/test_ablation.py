"""Ablation: exact values at the hook, and nothing left behind."""

import pytest
import torch
from plain import token_ids

import sepcap
from sepcap.interventions.ablation import ablation_hooks
from sepcap.models.sites import SITES, get_site

FRACTIONS = {"mlp": 0.3, "attn_pre_out": 0.3, "attn_value": 0.3}


def activations(model, site):
    seen = {}
    hooks = [(get_site(site).hook_name(layer), lambda z, hook, layer=layer: seen.__setitem__(layer, z.clone())) for layer in range(2)]
    with model.hooks(fwd_hooks=hooks), torch.no_grad():
        model(token_ids())
    return torch.stack([seen[layer] for layer in range(2)])


def hooks_of(model):
    """How many hooks every point has, those that the bridge itself put there included."""
    return {name: (len(point.fwd_hooks), len(point._forward_hooks)) for name, point in model.hook_dict.items()}


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("kind", ["zero", "mean", "constants"])
def test_exact_value_at_the_hook(tiny, letters, site, kind):
    neurons = sepcap.NeuronSet.random(tiny, {site: 0.3})
    mask, hooks = neurons.masks[site], hooks_of(tiny)
    reference = sepcap.collect(tiny, letters, tokens=300, sites=site)
    constants = torch.randn(mask.shape, generator=torch.Generator().manual_seed(1))
    want = {"zero": torch.zeros(mask.shape), "mean": reference[site].mean.float(), "constants": constants}[kind]
    free = activations(tiny, site)
    with sepcap.ablate(tiny, neurons, {site: constants} if kind == "constants" else kind, reference=reference):
        z = activations(tiny, site)
    for layer in range(2):
        at = z[layer][..., mask[layer]]
        assert torch.equal(at, want[layer][mask[layer]].expand_as(at))
    assert torch.equal(z[0][..., ~mask[0]], free[0][..., ~mask[0]])  # the others of the first layer are as they were
    assert torch.equal(activations(tiny, site), free)  # and afterwards everything is
    assert hooks_of(tiny) == hooks


def test_nothing_stays_hooked_after_an_exception(tiny_opt):
    neurons = sepcap.NeuronSet.random(tiny_opt, FRACTIONS)
    before, hooks = tiny_opt(token_ids()), hooks_of(tiny_opt)
    during = {}
    with pytest.raises(ZeroDivisionError), sepcap.ablate(tiny_opt, neurons):
        during.update(hooks_of(tiny_opt)) or 1 / 0
    assert during != hooks
    assert hooks_of(tiny_opt) == hooks
    assert torch.equal(tiny_opt(token_ids()), before)


def test_nested_ablations_are_the_union_and_the_outer_survives_the_inner(tiny_opt):
    ids = token_ids()
    a, b = (sepcap.NeuronSet.random(tiny_opt, FRACTIONS, seed=seed) for seed in (1, 2))
    with torch.no_grad():
        with sepcap.ablate(tiny_opt, a | b):
            union = tiny_opt(ids)
        with sepcap.ablate(tiny_opt, a):
            outer = tiny_opt(ids)
            with sepcap.ablate(tiny_opt, b):
                both = tiny_opt(ids)
            again = tiny_opt(ids)
    assert torch.equal(both, union)
    assert torch.equal(again, outer)
    assert not torch.equal(outer, union)


def test_a_users_own_hooks_stay(tiny_opt):
    calls = []
    tiny_opt.add_hook("blocks.0.mlp.hook_post", lambda z, hook: calls.append(1))
    with sepcap.ablate(tiny_opt, sepcap.NeuronSet.random(tiny_opt, FRACTIONS)):
        tiny_opt(token_ids())
    tiny_opt(token_ids())
    assert len(calls) == 2


def test_hooks_are_plain_and_only_where_neurons_are(tiny_opt):
    neurons = sepcap.NeuronSet.empty(tiny_opt, "mlp")
    assert ablation_hooks(neurons) == []
    neurons.masks["mlp"][1, 5] = True
    (hook,) = ablation_hooks(neurons)
    assert hook[0] == "blocks.1.mlp.hook_post"
    with torch.no_grad(), sepcap.ablate(tiny_opt, neurons):
        expected = tiny_opt(token_ids())
    assert torch.equal(tiny_opt.run_with_hooks(token_ids(), fwd_hooks=[hook]), expected)


def test_statistics_are_those_of_the_ablated_model(tiny_opt, letters):
    neurons = sepcap.NeuronSet.random(tiny_opt, {"mlp": 0.3})
    constants = {"mlp": torch.full((2, 72), 2.5)}
    with sepcap.ablate(tiny_opt, neurons, constants):
        stats = sepcap.collect(tiny_opt, letters, tokens=300, sites="mlp")["mlp"]
    assert (stats.low[neurons.masks["mlp"]] == 2.5).all()
    assert (stats.high[neurons.masks["mlp"]] == 2.5).all()
    assert (stats.std[~neurons.masks["mlp"]] > 0).float().mean() > 0.9


def test_ablation_in_the_models_dtype(tiny_folders):
    model = sepcap.load_model(tiny_folders["llama"], device="cpu", dtype="bfloat16")
    neurons = sepcap.NeuronSet.random(model, {"mlp": 0.3})
    with sepcap.ablate(model, neurons, {"mlp": torch.full((2, 72), 0.3)}):
        z = activations(model, "mlp")
    assert z.dtype == torch.bfloat16
    at = z[0][..., neurons.masks["mlp"][0]]
    assert torch.equal(at, torch.full_like(at, 0.3))
