"""Histograms of scores: binned before drawing, nothing dropped."""

import re
from typing import Any

import numpy as np
import pytest
import torch

from sepcap import plots
from sepcap.selection.figures import bin_scores
from sepcap.selection.neurons import NeuronSet
from sepcap.selection.score import Scores


def ridges(fig, name="all") -> dict[int, Any]:
    found = ((re.search(r"layer (\d+)", t.hovertemplate), t) for t in fig.data if t.hovertemplate and t.name == name)
    return {int(layer[1]): t for layer, t in found if layer}


def drawn(trace):
    """Neurons per bin, without the two ends of the outline."""
    return np.array(trace.customdata[1:-1])


@pytest.fixture
def scores():
    values = torch.exp(torch.randn(3, 200, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    values[1, :50] = 0
    return Scores({"mlp": values})


def test_bins_by_hand():
    b = bin_scores(np.array([[1.0, 10.0, 100.0, 0.0], [1.0, 1.0, 99.0, 0.5 * 20]]), 2)
    np.testing.assert_allclose(b.edges, [0, 1, 2])
    assert b.counts.tolist() == [[1, 2], [2, 2]]  # 10 is the left end of the upper bin
    assert b.beside["score = 0"].tolist() == [1, 0]


def test_every_neuron_is_drawn_or_said(scores):
    fig: Any = plots.score_histograms(scores)
    for layer, ridge in ridges(fig).items():
        zero = int((scores["mlp"][layer] == 0).sum())
        assert drawn(ridge).sum() + zero == 200
        assert f"score = 0: {zero} " in ridge.hovertemplate
        assert f"layer {layer}<" in ridge.hovertemplate
    texts = [a.text for a in fig.layout.annotations]
    assert texts == ["score = 0", "0", "25.0%", "0"]


def test_a_ridge_is_the_histogram_of_its_layer(scores):
    fig: Any = plots.score_histograms(scores, bins=20)
    logs = scores["mlp"][scores["mlp"] > 0].log10().numpy()
    edges = np.linspace(logs.min(), logs.max(), 21)
    for layer, ridge in ridges(fig).items():
        values = scores["mlp"][layer]
        expected = np.histogram(values[values > 0].log10().numpy(), edges)[0]
        filled = np.flatnonzero(expected)
        expected = expected[filled[0] : filled[-1] + 1]
        assert np.array_equal(drawn(ridge), expected)
        x = ridge.x0 + ridge.dx * np.arange(1, len(expected) + 2)
        np.testing.assert_allclose(x, edges[filled[0] : filled[-1] + 2], atol=1e-4)
        heights = np.array(ridge.y[1:-1]) - layer
        np.testing.assert_allclose(heights * expected.max(), expected * heights.max(), atol=0.05)


def test_all_layers_have_one_scale():
    """Twice the neurons in a bin are twice the height, in whatever layer."""
    values = torch.tensor([[1.0] * 8 + [10.0] * 2, [1.0] * 4 + [10.0] * 6])
    by_layer = ridges(plots.score_histograms(Scores({"mlp": values}), bins=2))
    heights = {layer: np.array(t.y[1:-1]) - layer for layer, t in by_layer.items()}
    np.testing.assert_allclose(heights[0] / heights[0][0] * 8, [8, 2], rtol=1e-3)
    np.testing.assert_allclose(heights[1] / heights[0][0] * 8, [4, 6], rtol=1e-3)


def test_layers_without_any_logarithm_are_still_there():
    fig: Any = plots.score_histograms(Scores({"mlp": torch.tensor([[0.0, 0.0], [1.0, 2.0]])}))
    assert [a.text for a in fig.layout.annotations] == ["score = 0", "100.0%", "0"]
    fig: Any = plots.score_histograms(Scores({"mlp": torch.zeros(2, 5)}))
    assert [a.text for a in fig.layout.annotations][1:] == ["100.0%", "100.0%"]
    assert not ridges(fig)


def test_infinite_scores_are_said_too():
    fig: Any = plots.score_histograms(Scores({"mlp": torch.tensor([[1.0, 2.0, 3.0, torch.inf], [1.0, 2.0, 0.0, torch.nan]])}))
    assert [a.text for a in fig.layout.annotations] == ["score = 0 / not finite", "0 / 25.0%", "25.0% / 25.0%"]
    assert "not finite: 1" in ridges(fig)[0].hovertemplate


def test_equal_scores_fill_one_bin():
    fig: Any = plots.score_histograms(Scores({"mlp": torch.full((2, 7), 3.0)}))
    assert [drawn(t).tolist() for t in ridges(fig).values()] == [[7], [7]]


def test_selected_neurons_and_their_threshold(scores):
    neurons = scores.top({"mlp": 0.1})
    fig: Any = plots.score_histograms(scores, neurons=neurons)
    chosen = ridges(fig, "selected")
    assert {layer: drawn(t).sum() for layer, t in chosen.items()} == dict(enumerate(neurons.per_layer("mlp")))
    threshold = float(scores["mlp"][neurons.masks["mlp"]].min())
    (line,) = fig.layout.shapes
    assert line.x0 == line.x1 == pytest.approx(np.log10(threshold))
    assert len([t for t in fig.data if t.showlegend is None]) == 3  # all, selected, and the strokes at the ends of a layer


def test_a_threshold_per_layer_is_no_single_line(scores):
    fig: Any = plots.score_histograms(scores, neurons=scores.top({"mlp": 0.1}, per_layer=True))
    assert not fig.layout.shapes
    assert [drawn(t).sum() for t in ridges(fig, "selected").values()] == [20, 20, 20]


def test_neurons_of_another_model_are_refused(scores):
    other = NeuronSet({"mlp": torch.ones(3, 10, dtype=torch.bool)})
    with pytest.raises(ValueError, match=r"\[3, 10\].*\[3, 200\]"):
        plots.score_histograms(scores, neurons=other)


def test_one_panel_per_site_or_the_one_asked_for(scores):
    both = Scores({"mlp": scores["mlp"], "attn_pre_out": torch.rand(3, 2, 4) + 0.1})
    fig: Any = plots.score_histograms(both)
    assert {"MLP neurons", "Attention pre-out neurons"} < {note.text for note in fig.layout.annotations}
    of_site: Any = plots.score_histograms(both, "mlp")
    assert "MLP" in of_site.layout.xaxis.title.text
    assert fig.layout.xaxis.domain[1] < fig.layout.xaxis2.domain[0]
    heads = [t for t in fig.data if t.hovertemplate and t.xaxis == "x2"]
    assert [drawn(t).sum() for t in heads] == [8, 8, 8]
    alone: Any = plots.score_histograms(both, "attn_pre_out")
    assert [drawn(t).sum() for t in ridges(alone).values()] == [8, 8, 8]
    with pytest.raises(ValueError, match="Did you mean 'mlp'"):
        plots.score_histograms(both, "mpl")


@pytest.mark.parametrize("bins", [0, 1, 201])
def test_bins_out_of_range_are_refused(scores, bins):
    with pytest.raises(ValueError, match=f"bins={bins}"):
        plots.score_histograms(scores, bins=bins)


def test_a_large_model_fits_in_a_small_figure():
    values = torch.rand(32, 16_384, generator=torch.Generator().manual_seed(0)) ** 3
    values[:, ::50] = 0
    scores = Scores({"mlp": values})
    assert len(scores.figure(neurons=scores.top({"mlp": 0.02})).to_json()) < 300_000
