"""Offsets: what deleted neurons added at constant activations stays in the output bias."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from plain import token_ids

import sepcap
from sepcap.interventions.rotation import rotate_values
from sepcap.models.sites import get_site
from sepcap.models.weights import WeightSnapshot, fingerprint

OUT = {"mlp": "blocks.{}.mlp.out.hook_out", "attn_pre_out": "blocks.{}.attn.o.hook_out"}
WITH_BIAS = ("opt", "gpt2", "neox")


@pytest.fixture(params=WITH_BIAS)
def biased(tiny_folders, request):
    return sepcap.load_model(tiny_folders[request.param], device="cpu")


class Part(torch.nn.Module):
    """A module with these attributes."""

    def __init__(self, **attributes):
        super().__init__()
        for name, value in attributes.items():
            setattr(self, name, value)


def toy(value_heads=2) -> Any:
    """One layer: 2 mlp neurons, 2 query heads of d_head 2, residual stream of 3."""
    mlp = {"W_in": [[1, 2], [3, 4], [5, 6]], "b_in": [1, 1], "W_out": [[1, 0, 2], [0, 3, 1]], "b_out": [10, 20, 30]}
    attn = {
        "W_V": torch.ones(value_heads, 3, 2),
        "b_V": torch.ones(value_heads, 2),
        "W_O": [[[1, 2, 0], [0, 1, 1]], [[5, 0, 0], [7, 0, 1]]],
        "b_O": [1, 1, 1],
    }
    block = {
        name: Part(**{k: torch.as_tensor(v, dtype=torch.float32) for k, v in part.items()}) for name, part in (("mlp", mlp), ("attn", attn))
    }
    return Part(blocks=torch.nn.ModuleList([Part(**block)]), cfg=SimpleNamespace(architecture="Toy"))


@pytest.fixture
def without_a_pass(monkeypatch):
    """The toy has weights and no forward: what is done to them is all there is to see."""
    monkeypatch.setattr("sepcap.interventions.deletion.check_deletion", lambda *_: None)


def test_offset_by_hand(without_a_pass):
    model = toy()
    neurons = sepcap.NeuronSet({"mlp": torch.tensor([[False, True]]), "attn_pre_out": torch.tensor([[[True, False], [False, True]]])})
    offset = {"mlp": torch.tensor([[9.0, 2.0]]), "attn_pre_out": torch.tensor([[[3.0, 9.0], [9.0, -1.0]]])}
    sepcap.delete(model, neurons, offset)
    mlp, attn = model.blocks[0].mlp, model.blocks[0].attn
    assert mlp.b_out.tolist() == [10, 20 + 2 * 3, 30 + 2 * 1]
    assert attn.b_O.tolist() == [1 + 3 * 1 - 7, 1 + 3 * 2, 1 - 1]
    assert mlp.W_out.tolist() == [[1, 0, 2], [0, 0, 0]]
    assert attn.W_O.tolist() == [[[0, 0, 0], [0, 1, 1]], [[5, 0, 0], [0, 0, 0]]]


def test_offset_of_a_shared_value_neuron_goes_through_every_query_head(without_a_pass):
    model = toy(value_heads=1)
    sepcap.delete(model, sepcap.NeuronSet({"attn_value": torch.tensor([[[False, True]]])}), {"attn_value": torch.tensor([[[9.0, 2.0]]])})
    attn = model.blocks[0].attn
    assert attn.b_O.tolist() == [1 + 2 * (0 + 7), 1 + 2 * 1, 1 + 2 * (1 + 1)]
    assert attn.W_O.tolist() == [[[1, 2, 0], [0, 0, 0]], [[5, 0, 0], [0, 0, 0]]]


def test_a_neuron_is_compensated_once(without_a_pass):
    """Gone already, or named at both attention sites."""
    once, twice, both = toy(), toy(), toy()
    neurons = sepcap.NeuronSet({"attn_pre_out": torch.tensor([[[True, False], [False, True]]])})
    constants = torch.tensor([[[3.0, 9.0], [9.0, -1.0]]])
    sepcap.delete(once, neurons, {"attn_pre_out": constants})
    for _ in range(2):
        sepcap.delete(twice, neurons, {"attn_pre_out": constants})
    mask = neurons.masks["attn_pre_out"]
    sepcap.delete(
        both, sepcap.NeuronSet({"attn_pre_out": mask, "attn_value": mask}), {"attn_pre_out": constants, "attn_value": 100 * constants}
    )
    assert once.blocks[0].attn.b_O.tolist() == twice.blocks[0].attn.b_O.tolist() == both.blocks[0].attn.b_O.tolist()


@pytest.mark.parametrize("site", OUT)
@pytest.mark.parametrize("rotated", [False, True])
def test_mean_offset_keeps_the_mean_output_of_the_block(biased, site, rotated):
    """An identity: out = Σ_n z_n W[n] + b, so its mean depends on the mean of z alone."""
    if rotated and site != "mlp":
        rotate_values(biased, "fold")

    def mean_output():
        total = []
        hook = (OUT[site].format(0), lambda out, hook: total.append(out[:, 1:].double().mean((0, 1))))
        with torch.no_grad(), biased.hooks(fwd_hooks=[hook]):
            biased(ids)
        return total[0]

    ids = token_ids()
    seen = []
    hook = (get_site(site).hook_name(0), lambda z, hook: seen.append(z[:, 1:].double().mean((0, 1))))
    with torch.no_grad(), biased.hooks(fwd_hooks=[hook]):
        biased(ids)
    mean = torch.stack([seen[0], seen[0]])
    neurons = sepcap.NeuronSet.random(biased, {site: 0.5}, seed=1)
    neurons.masks[site][1] = False
    before = mean_output()
    snapshot = WeightSnapshot(biased, (site,))
    sepcap.delete(biased, neurons)
    assert (mean_output() - before).abs().max() > 0.02  # without offset it moves
    snapshot.restore()
    sepcap.delete(biased, neurons, {site: mean})
    torch.testing.assert_close(mean_output(), before, atol=2e-6, rtol=0)


def test_mean_offset_is_mean_ablation(biased, letters):
    """Constants in place of activations, by hooks or in the weights: the same logits."""
    statistics = sepcap.collect(biased, letters, tokens=200, sites=("mlp", "attn_pre_out"))
    neurons = sepcap.NeuronSet.random(biased, {"mlp": 0.4, "attn_pre_out": 0.4})
    with torch.no_grad():
        with sepcap.ablate(biased, neurons, "mean", reference=statistics):
            expected = biased(token_ids())
        plain = biased(token_ids())
        sepcap.delete(biased, neurons, {site: statistics[site].mean for site in neurons.masks})
        torch.testing.assert_close(biased(token_ids()), expected, atol=1e-4, rtol=0)
    assert (expected - plain).abs().max() > 0.05


@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize(("site", "bias"), [("mlp", "b_out"), ("attn_pre_out", "b_O"), ("attn_value", "b_O")])
def test_without_output_bias_nothing_is_edited(tiny_folders, family, site, bias):
    model = sepcap.load_model(tiny_folders[family], device="cpu")
    before = fingerprint(model)
    neurons = sepcap.NeuronSet.random(model, {site: 0.5})
    with pytest.raises(ValueError, match=f"offset: .*ForCausalLM has no {bias}, the bias that would take the offset of '{site}'"):
        sepcap.delete(model, neurons, {site: torch.ones(neurons.masks[site].shape)})
    assert fingerprint(model) == before


def test_wrong_constants_are_refused_before_anything_is_edited(tiny_opt):
    before = fingerprint(tiny_opt)
    neurons = sepcap.NeuronSet.random(tiny_opt, {"mlp": 0.5, "attn_pre_out": 0.5})
    mlp, attn = (torch.ones(mask.shape) for mask in neurons.masks.values())
    broken = attn.clone()
    broken[neurons.masks["attn_pre_out"]] = torch.nan
    for offset, message in (
        ({"mlp": mlp}, "offset of site 'attn_pre_out': got nothing"),
        ({"mlp": mlp, "attn_pre_out": attn[:1]}, r"offset of site 'attn_pre_out': got \[1, 4, 8\], but the neurons are \[2, 4, 8\]"),
        ({"mlp": mlp, "attn_pre_out": broken}, r"offset of site 'attn_pre_out': \d+ of \d+ are NaN or infinite"),
    ):
        with pytest.raises(ValueError, match=message):
            sepcap.delete(tiny_opt, neurons, offset)
    assert fingerprint(tiny_opt) == before
    kept = torch.where(neurons.masks["mlp"], mlp, torch.nan)
    sepcap.delete(tiny_opt, sepcap.NeuronSet({"mlp": neurons.masks["mlp"]}), {"mlp": kept})  # of those that stay nothing is asked
    assert tiny_opt.blocks[0].mlp.b_out.isfinite().all()
