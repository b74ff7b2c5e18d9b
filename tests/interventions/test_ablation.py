"""Ablation by constants: exact values at the hook, the neurons that were meant, and nothing left behind."""

import inspect

import pytest
import torch
from hooked import FRACTIONS, at_hook, hooks_of
from plain import Plain, token_ids

import sepcap
from sepcap.interventions.ablation import choose
from sepcap.models.sites import SITES


def activations(model, site):
    return torch.stack([at_hook(model, site, layer, lambda: model(token_ids()))[0] for layer in range(2)])


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("kind", ["zero", "mean", "median", "peak", "constants"])
def test_exact_value_at_the_hook(tiny, letters, site, kind):
    neurons = sepcap.NeuronSet.random(tiny, {site: 0.3})
    mask, hooks = neurons.masks[site], hooks_of(tiny)
    reference = sepcap.collect(tiny, letters, tokens=300, sites=site, histogram=True)
    constants = torch.randn(mask.shape, generator=torch.Generator().manual_seed(1))
    stats = reference[site]
    want = {"zero": torch.zeros(mask.shape), "mean": stats.mean, "median": stats.median, "peak": stats.peak, "constants": constants}
    want = want[kind].float()
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
    for kind in ("zero", "resample"):
        assert sepcap.ablate(tiny_opt, neurons, kind).fwd_hooks == []
    neurons.masks["mlp"][1, 5] = True
    (hook,) = sepcap.ablate(tiny_opt, neurons).fwd_hooks
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


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_constants_that_are_not_finite_are_refused_where_they_would_be_used(tiny_opt, value):
    neurons = sepcap.NeuronSet.random(tiny_opt, {"mlp": 0.3})
    constants = torch.where(neurons.masks["mlp"], 0.0, value)
    sepcap.ablate(tiny_opt, neurons, {"mlp": constants})  # of other neurons they say nothing
    constants[tuple(neurons.masks["mlp"].nonzero()[0])] = value
    with pytest.raises(ValueError, match=r"constants of site 'mlp': 1 of 43 are NaN or infinite"):
        sepcap.ablate(tiny_opt, neurons, {"mlp": constants})


def test_ablation_in_the_models_dtype(tiny_folders):
    model = sepcap.load_model(tiny_folders["llama"], device="cpu", dtype="bfloat16")
    neurons = sepcap.NeuronSet.random(model, {"mlp": 0.3})
    with sepcap.ablate(model, neurons, {"mlp": torch.full((2, 72), 0.3)}):
        z = activations(model, "mlp")
    assert z.dtype == torch.bfloat16
    at = z[0][..., neurons.masks["mlp"][0]]
    assert torch.equal(at, torch.full_like(at, 0.3))


def test_zero_ablation_equals_deletion_and_the_plain_model(tiny, tiny_folders, family):
    neurons, ids = sepcap.NeuronSet.random(tiny, FRACTIONS), token_ids()
    expected = Plain(family, tiny_folders[family]).run(ids, zero=neurons.masks)
    with torch.no_grad():
        with sepcap.ablate(tiny, neurons):
            ablated = tiny(ids)
        sepcap.delete(tiny, neurons)
        deleted = tiny(ids)
    torch.testing.assert_close(ablated, expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(ablated, deleted, atol=1e-4, rtol=0)


@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_of_a_padded_batch_are_ablated_as_alone(tiny, side):
    """Each kind of constant, with a short row beside a long one."""
    long, short = token_ids(seed=1, batch=1, length=9), token_ids(seed=2, batch=1, length=5)
    padding = torch.ones(1, 4, dtype=torch.long)
    parts = [short, padding] if side == "right" else [padding, short]
    ids = torch.cat([long, torch.cat(parts, dim=1)])
    mask = torch.cat([torch.ones(1, 9), (torch.cat(parts, dim=1) != 1)]).long()
    neurons = sepcap.NeuronSet.random(tiny, FRACTIONS)
    constants = {site: torch.randn(m.shape, generator=torch.Generator().manual_seed(0)) for site, m in neurons.masks.items()}
    for kind in ("zero", constants):
        with torch.no_grad(), sepcap.ablate(tiny, neurons, kind):
            together, alone = tiny(ids, attention_mask=mask), [tiny(long), tiny(short)]
        for row in range(2):
            torch.testing.assert_close(together[row][mask[row].bool()], alone[row][0], atol=1e-4, rtol=0)


def indices(mask):
    return [tuple(place) for place in mask.nonzero().tolist()]


def test_neurons_by_layer_head_and_number(tiny):
    value_heads = tiny.blocks[0].attn.W_V.shape[0]
    head = {d: (1, 3, d) for d in range(8)}
    assert indices(choose(tiny, layer=1, head=3).masks["attn_pre_out"]) == list(head.values())
    assert indices(choose(tiny, [6, 0, 6], layer=1, head=3).masks["attn_pre_out"]) == [head[0], head[6]]
    assert choose(tiny, layer=1, head=[3, 0]) == sepcap.NeuronSet.heads(tiny, [(1, 0), (1, 3)])
    assert indices(choose(tiny, torch.tensor([71, 2]), layer=0).masks["mlp"]) == [(0, 2), (0, 71)]
    assert choose(tiny, layer=0, head=value_heads - 1, site="attn_value").count("attn_value") == 8
    assert choose(tiny, layer=0, site="mlp").per_layer("mlp") == [72, 0]
    assert choose(tiny, layer=1, site="attn_pre_out").per_layer("attn_pre_out") == [0, 32]
    (hook,) = sepcap.ablate(tiny, layer=1, head=3).fwd_hooks
    with torch.no_grad():
        free, z = at_hook(tiny, "attn_pre_out", 1, lambda: (tiny(token_ids()), tiny.run_with_hooks(token_ids(), fwd_hooks=[hook])))
    assert torch.equal(z, free)  # looked at before the hook that was added later
    with sepcap.ablate(tiny, layer=1, head=3, kind=torch.arange(8.0)):
        (z,) = at_hook(tiny, "attn_pre_out", 1, lambda: tiny(token_ids()))
    assert torch.equal(z[:, :, 3], torch.arange(8.0).expand(3, 20, 8))
    assert torch.equal(z[:, :, :3], free[:, :, :3])
    with sepcap.ablate(tiny, [5, 2], layer=0, kind=1.5):
        (z,) = at_hook(tiny, "mlp", 0, lambda: tiny(token_ids()))
    assert bool((z[..., [5, 2]] == 1.5).all())


WRONG = [
    ({}, ValueError, "neurons=None, layer=None: give a NeuronSet"),
    ({"layer": 1}, ValueError, "give a NeuronSet as neurons"),
    ({"head": 1}, ValueError, "give a NeuronSet as neurons"),
    ({"neurons": [1]}, ValueError, "give a NeuronSet as neurons"),
    ({"neurons": "set", "layer": 1}, ValueError, "leave layer, head and site out"),
    ({"neurons": "set", "site": "mlp"}, ValueError, "leave layer, head and site out"),
    ({"layer": 2, "head": 0}, IndexError, r"layer=\[2\]: this model has 2, numbered 0 to 1"),
    ({"layer": -1, "head": 0}, IndexError, "numbered 0 to 1"),
    ({"layer": 0, "head": 4}, IndexError, "head=4: this model has 4"),
    ({"layer": 0, "head": 0, "neurons": [8]}, IndexError, r"neurons=\[8\]: this model has 8"),
    ({"layer": 0, "neurons": [72]}, IndexError, r"neurons=\[72\]: this model has 72"),
    ({"layer": 0, "neurons": []}, ValueError, r"neurons=\[\]: give numbers from 0 to 71"),
    ({"layer": 0, "neurons": [0.5]}, ValueError, "give numbers"),
    ({"layer": 0, "neurons": [True]}, ValueError, "give numbers"),
    ({"layer": 0, "head": 1, "site": "mlp"}, ValueError, "site='mlp' has no heads"),
    ({"layer": 0, "neurons": [1], "site": "attn_value"}, ValueError, "give head= too"),
    ({"layer": 0, "neurons": [1], "site": "mpl"}, ValueError, "Did you mean 'mlp'"),
    ({"layer": 0, "head": 0, "kind": "resample", "source": "tokns"}, ValueError, "source='tokns' is not known. Did you mean 'tokens'"),
    ({"layer": 0, "head": 0, "kind": "zero", "source": "tokens"}, ValueError, "source= is for 'resample' and 'optimal'"),
    ({"layer": 0, "head": 0, "kind": "peak"}, ValueError, r"kind='peak' needs reference=.*histogram=True"),
    ({"layer": 0, "head": 0, "kind": "optimal"}, ValueError, "kind='optimal' needs source="),
    ({"layer": 0, "head": 0, "kind": "mean", "steps": 3}, TypeError, "'steps', which only kind='optimal' takes"),
    ({"layer": 0, "head": 0, "kind": torch.zeros(7)}, ValueError, r"\[7\], but the neurons are \[2, 4, 8\]"),
]


@pytest.mark.parametrize(("arguments", "error", "text"), WRONG)
def test_what_cannot_be_ablated(tiny_opt, arguments, error, text):
    if arguments.get("neurons") == "set":
        arguments = arguments | {"neurons": sepcap.NeuronSet.empty(tiny_opt, "mlp")}
    # past the type checks of the tests, which would stop some before the package's own checks see them
    with pytest.raises(error, match=text):
        inspect.unwrap(sepcap.ablate)(tiny_opt, **arguments)


def test_a_negative_seed_is_refused(tiny_opt):
    with pytest.raises(ValueError, match="seed=-1: give a whole number, 0 or more"):
        sepcap.ablate(tiny_opt, layer=0, head=0, kind="resample", seed=-1)


def test_median_and_peak_need_histograms(tiny_opt, letters):
    reference = sepcap.collect(tiny_opt, letters, tokens=100)
    for kind in ("median", "peak"):
        with pytest.raises(ValueError, match="histogram=True"):
            sepcap.ablate(tiny_opt, layer=0, head=0, kind=kind, reference=reference)
