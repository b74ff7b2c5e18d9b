"""Rounding of weights: values by hand, the largest error, zeros, and the bits of the model."""

import pytest
import tiny
import torch

import sepcap
from sepcap.interventions.quantise import quantised, quantiser_of, round_to_nearest
from sepcap.models.weights import fingerprint


def test_values_by_hand():
    # 3 bits: multiples from −3 to 3 of max|w|/3; groups of two have scales of their own
    weight = torch.tensor([[3.0, -1.4, 0.6, 0.0]])
    assert round_to_nearest(weight, 3, 2).tolist() == [[3.0, -1.0, pytest.approx(0.6), 0.0]]
    assert round_to_nearest(weight, 3, 4).tolist() == [[3.0, -1.0, 1.0, 0.0]]


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_an_error_is_at_most_half_of_the_scale_of_its_group(bits):
    weight = torch.randn(5, 70, generator=torch.Generator().manual_seed(0))
    largest = [part.abs().amax(1, keepdim=True).expand_as(part) for part in (weight[:, :64], weight[:, 64:])]
    scale = torch.cat(largest, dim=1)
    error = (round_to_nearest(weight, bits, 64) - weight).abs()
    assert bool((error <= scale / (2 ** (bits - 1) - 1) * (0.5 + 1e-5)).all())


def test_zeros_and_groups_of_zeros_stay_zero():
    weight = torch.randn(4, 128, generator=torch.Generator().manual_seed(0))
    weight[0] = 0
    weight[1, :64] = 0
    weight[2, ::3] = 0
    assert not round_to_nearest(weight, 4, 64)[weight == 0].any()


def test_rounding_twice_is_rounding_once():
    once = round_to_nearest(torch.randn(4, 64, generator=torch.Generator().manual_seed(1)), 4, 32)
    torch.testing.assert_close(round_to_nearest(once, 4, 32), once)


@pytest.mark.parametrize("family", ["opt", "gpt2"])
def test_the_model_is_rounded_inside_and_has_its_bits_afterwards(family, tmp_path):
    model = tiny.fresh(tiny.save_tiny(family, tmp_path))
    before, old = fingerprint(model), model.blocks[1].mlp.W_out.detach().clone()

    def stopped():
        with quantised(model, 4, 16) as n:
            # TransformerLens's W_out is [in, out]
            torch.testing.assert_close(model.blocks[1].mlp.W_out.T, round_to_nearest(old.T, 4, 16))
            assert n > 0
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert fingerprint(model) == before


def test_a_weight_that_two_modules_share_is_rounded_once(tmp_path):
    """q, k and v of GPT-2 are views of one fused weight; the rounding here is not idempotent, as that of torchao."""
    model = sepcap.load_model(tiny.save_tiny("gpt2", tmp_path), device="cpu")
    old = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    with quantised(model, 4, 16, lambda weight, bits, group_size: weight + 1):
        added = {name: (weight - old[name]).round() for name, weight in model.named_parameters()}
    assert {int(one) for each in added.values() for one in each.unique()} == {0, 1}


def test_torchao_differs_by_at_most_one_step():
    pytest.importorskip("torchao")
    name, how = quantiser_of("torchao")
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    weight[:, :9] = 0
    assert name == "torchao"
    assert not how(weight, 4, 64)[weight == 0].any()
    assert bool(((how(weight, 4, 64) - weight).abs() <= weight.abs().amax(1, keepdim=True) / 7).all())


def test_without_torchao_its_name_is_an_error_and_auto_takes_the_reference(monkeypatch):
    monkeypatch.setattr("sepcap.interventions.quantise.find_spec", lambda name: None)
    assert quantiser_of("auto") == ("reference", round_to_nearest)
    with pytest.raises(ImportError, match="torchao"):
        quantiser_of("torchao")
