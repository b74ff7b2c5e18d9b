"""Heads in a heat map, and what score histograms say about single neurons."""

import numpy as np
import pytest
import torch
from planted_statistics import LARGE, large

import sepcap
from sepcap import plots
from sepcap.selection.neurons import NeuronSet
from sepcap.selection.score import Scores


@pytest.fixture
def scores():
    values = torch.exp(torch.randn(3, 4, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    return Scores({"attn_pre_out": values}, {"importance": "abs"})


@pytest.mark.parametrize("aggregate", ["mean", "median"])
def test_cells_are_the_scores_of_heads(scores, aggregate):
    fig = plots.head_scores(scores, aggregate)
    (heat,) = fig.data
    expected = getattr(np, aggregate)(scores["attn_pre_out"].numpy(), axis=-1)
    np.testing.assert_allclose(10 ** np.array(heat.z, dtype=float), expected, rtol=2e-3)
    assert [float(t) for t in np.ravel(heat.text)] == pytest.approx(expected.ravel(), rel=5e-3)
    # white is 1: the scale reaches as far below it as above
    assert fig.layout.coloraxis.cmin == -fig.layout.coloraxis.cmax
    assert fig.layout.coloraxis.cmax == pytest.approx(np.abs(np.log10(expected)).max())
    bar = fig.layout.coloraxis.colorbar
    assert [float(t) for t in bar.ticktext] == pytest.approx([10**v for v in bar.tickvals], rel=0.05)
    assert "layer %{customdata}, head %{x}" in heat.hovertemplate


def test_what_is_no_ratio_has_a_scale_from_zero(scores):
    fig = plots.head_scores(Scores(dict(scores), {"importance": "mean_shift"}))
    np.testing.assert_allclose(np.array(fig.data[0].z, dtype=float), scores["attn_pre_out"].mean(-1), rtol=2e-3)
    assert fig.layout.coloraxis.cmin == 0


def test_a_score_of_zero_is_said_and_coloured_as_the_lowest(scores):
    scores["attn_pre_out"][1, 2] = 0
    (heat,) = plots.head_scores(scores).data
    z = np.array(heat.z, dtype=float)
    assert z[1, 2] == z.min()
    assert float(heat.text[1][2]) == 0


def test_whole_heads_of_a_set_are_framed(scores):
    neurons = scores.top({"heads": 0.25})
    neurons.masks["attn_pre_out"][0, 0, :3] = True  # a part of a head is no head
    fig = plots.head_scores(scores, neurons=neurons)
    framed = {((s.y0 + s.y1) / 2, (s.x0 + s.x1) / 2) for s in fig.layout.shapes}
    expected = neurons.masks["attn_pre_out"].all(-1).nonzero().tolist()
    assert {(round(y), round(x)) for y, x in framed} == {tuple(i) for i in expected}
    with pytest.raises(ValueError, match=r"\[2, 4\] heads, not \[3, 4\]|of \[2, 4\]"):
        plots.head_scores(scores, neurons=NeuronSet({"attn_pre_out": torch.ones(2, 4, 9, dtype=torch.bool)}))


def test_mlp_has_no_heads(scores):
    with pytest.raises(ValueError, match="no heads"):
        plots.head_scores(Scores({"mlp": torch.ones(2, 5)}), site="mlp")


def test_histograms_name_the_ends_of_every_layer(scores):
    (ends,) = [t for t in plots.score_histograms(scores).data if t.name == "lowest and highest"]
    for layer in range(3):
        values = scores["attn_pre_out"][layer]
        for i, position in ((0, int(values.argmin())), (1, int(values.argmax()))):
            head, neuron = divmod(position, 9)
            assert f"layer {layer}, head {head}, neuron {neuron}<" in ends.hovertext[2 * layer + i]
            assert ends.x[2 * layer + i] == pytest.approx(float(values.flatten()[position].log10()), rel=1e-4)


def test_large_models_make_small_figures():
    sites = {**LARGE, "attn_value": LARGE["attn_pre_out"]}
    scores = sepcap.score(large("code", 0, sites), large("prose", 1, sites))
    neurons = scores.top(dict.fromkeys(sites, 0.3))
    fig = plots.score_histograms(scores, neurons=neurons)
    assert len(fig.to_json()) < 300_000
    for site, axis in zip(sites, ("x", "x2", "x3"), strict=True):
        for name, n in (("all", int((scores[site] > 0).sum())), ("selected", neurons.count(site))):
            ridges = [t for t in fig.data if t.name == name and t.xaxis == axis and t.customdata is not None]
            assert sum(int(np.sum(t.customdata, dtype=np.int64)) for t in ridges) == n
    assert len(plots.head_scores(scores).to_json()) < 300_000
