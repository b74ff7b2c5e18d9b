"""Norms and biases read from the weights, against the Hugging Face checkpoint."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

import sepcap
from sepcap import plots
from sepcap.models.blocks.views import mlp_input_biases, value_row_norms
from sepcap.selection.neurons import NeuronSet


def drawn(fig):
    """Neurons per bin, layer by layer."""
    traces = [t for t in fig.data if t.name == "all"]
    return {round(float(t.y[0])): np.array(t.customdata)[1:-1] for t in traces}


def checkpoint(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


VALUE_ROWS = {
    "opt": lambda w, i: w[f"model.decoder.layers.{i}.self_attn.v_proj.weight"],
    "gpt2": lambda w, i: w[f"transformer.h.{i}.attn.c_attn.weight"][:, 64:].T,
    "neox": lambda w, i: w[f"gpt_neox.layers.{i}.attention.query_key_value.weight"].view(4, 3, 8, 32)[:, 2].reshape(32, 32),
    "llama": lambda w, i: w[f"model.layers.{i}.self_attn.v_proj.weight"],
    "mistral": lambda w, i: w[f"model.layers.{i}.self_attn.v_proj.weight"],
}
BIASES = {
    "opt": "model.decoder.layers.{}.fc1.bias",
    "gpt2": "transformer.h.{}.mlp.c_fc.bias",
    "neox": "gpt_neox.layers.{}.mlp.dense_h_to_4h.bias",
}


def test_norms_are_those_of_the_rows_of_the_checkpoint(tiny, tiny_folders, family):
    norms = value_row_norms(tiny)
    weights = checkpoint(tiny_folders[family])
    expected = torch.stack([VALUE_ROWS[family](weights, i).double().norm(dim=1) for i in range(2)])
    torch.testing.assert_close(norms.flatten(1), expected, rtol=1e-6, atol=0)
    fig = plots.value_norms(tiny, bins=12)
    edges = np.linspace(float(expected.min()), float(expected.max()), 13)
    for layer, counts in drawn(fig).items():
        histogram = np.histogram(expected[layer].numpy(), edges)[0]
        filled = np.flatnonzero(histogram)
        np.testing.assert_array_equal(counts, histogram[filled[0] : filled[-1] + 1])


def test_biases_are_those_of_the_checkpoint(tiny, tiny_folders, family):
    if family not in BIASES:
        with pytest.raises(ValueError, match="has no mlp biases"):
            plots.mlp_biases(tiny)
        return
    weights = checkpoint(tiny_folders[family])
    expected = torch.stack([weights[BIASES[family].format(i)] for i in range(2)]).double()
    torch.testing.assert_close(mlp_input_biases(tiny), expected, rtol=0, atol=0)
    fig = plots.mlp_biases(tiny)
    assert {layer: counts.sum() for layer, counts in drawn(fig).items()} == {0: 72, 1: 72}
    shares = [f"{float((layer < 0).double().mean()):.1%}" for layer in expected]
    assert [a.text for a in fig.layout.annotations] == ["bias &lt; 0", *shares]
    (zero,) = fig.layout.shapes
    assert zero.x0 == zero.x1 == 0


def test_the_ends_of_a_layer_are_named(tiny_opt):
    norms = value_row_norms(tiny_opt)
    (ends,) = [t for t in plots.value_norms(tiny_opt).data if t.name == "lowest and highest"]
    for layer in range(2):
        head, neuron = divmod(int(norms[layer].argmax()), 8)
        at = 2 * layer + 1
        assert f"layer {layer}, head {head}, neuron {neuron}<" in ends.hovertext[at]
        assert (ends.x[at], ends.y[at]) == (pytest.approx(float(norms[layer].max()), rel=1e-4), layer)


def test_deleted_neurons_have_no_norm(tiny_opt):
    mask = torch.zeros(2, 4, 8, dtype=torch.bool)
    mask[1, 2] = True
    sepcap.delete(tiny_opt, NeuronSet({"attn_pre_out": mask}))
    fig = plots.value_norms(tiny_opt)
    assert [a.text for a in fig.layout.annotations] == ["norm 0", "0", "25.0%"]
    assert {layer: counts.sum() for layer, counts in drawn(fig).items()} == {0: 32, 1: 24}


def test_large_models_make_small_figures(monkeypatch):
    import sepcap.plots.weights as drawing

    generator = torch.Generator().manual_seed(0)
    monkeypatch.setattr(drawing, "mlp_input_biases", lambda _: torch.randn(32, 16_384, generator=generator).double())
    monkeypatch.setattr(drawing, "value_row_norms", lambda _: torch.rand(32, 32, 128, generator=generator).double())
    for draw, n in ((plots.mlp_biases, 16_384), (plots.value_norms, 4096)):
        fig = draw(SimpleNamespace(cfg=None))
        assert len(fig.to_json()) < 300_000
        assert {counts.sum() for counts in drawn(fig).values()} == {n}
