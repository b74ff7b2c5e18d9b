"""Importance on forget against retain: counted in cells, chosen neurons marked, the line where it belongs."""

import json

import numpy as np
import pytest
import torch
from planted_statistics import LARGE, large, unpacked, with_importance

import sepcap
from sepcap import plots
from sepcap.selection.neurons import NeuronSet
from sepcap.selection.score import Scores


def random_pair(shape, seed=0, site="mlp"):
    generator = torch.Generator().manual_seed(seed)
    pair = [torch.exp(2 * torch.randn(shape, generator=generator, dtype=torch.float64)) for _ in range(2)]
    return [with_importance(task, {site: values}) for task, values in zip(("code", "prose"), pair, strict=True)]


def named(fig, name, axis="x"):
    return [t for t in fig.data if t.name == name and t.xaxis == axis]


def view(fig, label):
    """What the step of the slider puts into the first traces: a list of {key: value} per trace."""
    (step,) = [s for s in fig.layout.sliders[0].steps if s.label == label]
    new, traces = step.args
    return [{key: unpacked(values[i]) if values[i] is not None else None for key, values in new.items()} for i in traces]


def test_cells_are_the_histogram_in_two_dimensions():
    forget, retain = random_pair((3, 500))
    fig = plots.importance_scatter(forget, retain, bins=20)
    (heat,) = [t for t in fig.data if t.type == "heatmap"]
    x, y = (s["mlp"].abs.flatten().log10().numpy() for s in (retain, forget))
    edges = np.array(heat.x)[2:]
    expected = np.histogram2d(y, x, [edges, edges])[0]
    counts = np.array(heat.z)
    # a value may lie on an edge up to the rounding of a float32
    assert np.abs(counts[2:, 2:] - expected).sum() <= 2
    assert counts.sum() == 1500
    assert not counts[:2].any()
    assert not counts[:, :2].any()
    assert edges[0] < min(x.min(), y.min())
    assert edges[-1] > max(x.max(), y.max())


def test_every_layer_has_a_step_of_the_slider():
    forget, retain = random_pair((3, 500))
    forget["mlp"].sums["absolute"][1, :7] = 0
    fig = plots.importance_scatter(forget, retain)
    assert [s.label for s in fig.layout.sliders[0].steps] == ["all", "0", "1", "2"]
    for layer in range(3):
        heat, points = view(fig, str(layer))
        assert heat["z"].sum() == 500
        assert heat["name"] == f"layer {layer}"
        assert heat["z"][0].sum() == (7 if layer == 1 else 0)  # row 0: silent on forget
        edges = heat["x"][2:]
        x, y = (s["mlp"].abs[layer].numpy() for s in (retain, forget))
        expected = np.histogram2d(np.log10(y[y > 0]), np.log10(x[y > 0]), [edges, edges])[0]
        assert np.abs(heat["z"][2:, 2:] - expected).sum() <= 2
        assert set(points["customdata"][:, 0]) == {layer}
    # the first step is what the figure opens with
    for trace, new in zip(fig.data, view(fig, "all"), strict=False):
        np.testing.assert_array_equal(np.array(trace.x), new["x"])
        np.testing.assert_array_equal(np.array(trace.customdata), new["customdata"])


def test_one_layer_needs_no_slider():
    assert not plots.importance_scatter(*random_pair((1, 50))).layout.sliders


def test_silent_neurons_stand_apart_at_the_tick_zero():
    forget = with_importance("code", {"mlp": torch.tensor([[0.0, 1.0, 0.0, 10.0]])})
    retain = with_importance("prose", {"mlp": torch.tensor([[0.0, 0.0, 1.0, 10.0]])})
    fig = plots.importance_scatter(forget, retain, bins=10)
    (heat,) = [t for t in fig.data if t.type == "heatmap"]
    counts, edges = np.array(heat.z), np.array(heat.x)
    assert counts[0, 0] == 1
    assert counts[0].sum() == counts[:, 0].sum() == 2
    assert counts[1].sum() == counts[:, 1].sum() == 0
    axis = fig.layout.xaxis
    at = axis.tickvals[axis.ticktext.index("0")]
    assert edges[0] < at < edges[1] < edges[2] <= 0
    assert axis.range[0] == pytest.approx(edges[0], abs=1e-6)


def test_chosen_neurons_are_points_where_they_belong():
    forget, retain = random_pair((2, 4, 8), site="attn_pre_out")
    scores = sepcap.score(forget, retain)
    neurons = scores.top({"attn_pre_out": 0.2})
    fig = plots.importance_scatter(forget, retain, neurons=neurons)
    (points,) = named(fig, "points")
    chosen = np.array(points.marker.color) == 1
    rows = np.array(points.customdata)
    where = [tuple(int(i) for i in row[:3]) for row in rows]
    assert {w for w, c in zip(where, chosen, strict=True) if c} == {tuple(i) for i in neurons.masks["attn_pre_out"].nonzero().tolist()}
    for (layer, head, neuron), x, y, row in zip(where, points.x, points.y, rows, strict=True):
        f, r = (float(s["attn_pre_out"].abs[layer, head, neuron]) for s in (forget, retain))
        assert (x, y) == pytest.approx((np.log10(r), np.log10(f)), abs=1e-5)
        assert row[3:] == pytest.approx((f, r), rel=1e-5)
    assert "head %{customdata[1]}, neuron %{customdata[2]}" in points.hovertemplate
    # the highest score of every layer is there in any case
    for layer in range(2):
        assert (layer, *divmod(int(scores["attn_pre_out"][layer].argmax()), 8)) in where


def test_the_line_parts_chosen_from_others():
    forget, retain = random_pair((2, 300), seed=3)
    for importance, eps in (("abs", None), ("abs", 0.7)):
        scores = sepcap.score(forget, retain, importance, eps=eps)
        neurons = scores.top({"mlp": 0.1})
        fig = plots.importance_scatter(forget, retain, importance, neurons, eps=eps)
        (line,) = named(fig, "lowest chosen score")
        x, y = (s["mlp"].abs.log10().numpy() for s in (retain, forget))
        above = y - np.interp(x, np.array(line.x), np.array(line.y))
        mask = neurons.masks["mlp"].numpy()
        # between the points of a drawn line it is straight
        assert above[mask].min() > -2e-3
        assert above[~mask].max() < 2e-3


def test_no_line_where_no_score_parts_them():
    forget, retain = random_pair((2, 300))
    scores = sepcap.score(forget, retain)
    random = Scores({"mlp": torch.rand(2, 300)}, {"importance": "random"}).top({"mlp": 0.1})
    for neurons in (None, random, scores.top({"mlp": 0.1}, per_layer=True), NeuronSet({"mlp": torch.zeros(2, 300, dtype=torch.bool)})):
        assert not named(plots.importance_scatter(forget, retain, neurons=neurons), "lowest chosen score")


def test_many_chosen_neurons_are_marked_in_their_cells():
    forget, retain = random_pair((2, 4000))
    mask = torch.rand(2, 4000, generator=torch.Generator().manual_seed(1)) < 0.3
    fig = plots.importance_scatter(forget, retain, neurons=NeuronSet({"mlp": mask}))
    (marks,) = named(fig, "chosen")
    assert np.sum(marks.customdata) == int(mask.sum())
    heat, of_layer, _ = view(fig, "1")
    assert of_layer["customdata"].sum() == int(mask[1].sum())
    # a mark lies in the middle of a cell that holds at least as many neurons
    rows = [np.searchsorted(heat["x"], of_layer[axis]) - 1 for axis in ("y", "x")]
    assert (heat["z"][rows[0], rows[1]] >= of_layer["customdata"]).all()
    sizes, shares = of_layer["marker.size"], of_layer["customdata"] / heat["z"][rows[0], rows[1]]
    assert sizes[shares == 1].min() > sizes[shares < 0.2].max()


@pytest.mark.parametrize("kind", ["half", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("none", "few", "top", "random"))])
def test_a_large_model_fits_in_a_small_figure(kind):
    forget, retain = large("code", 0), large("prose", 1)
    scores = sepcap.score(forget, retain)
    shares = {"few": 0.001, "top": 0.02, "half": 0.5}
    neurons = scores.top(dict.fromkeys(LARGE, shares[kind])) if kind in shares else None
    if kind == "random":
        drawn = {site: torch.rand(shape, generator=torch.Generator().manual_seed(0)) for site, shape in LARGE.items()}
        neurons = Scores(drawn).top(dict.fromkeys(LARGE, 0.3))
    fig = plots.importance_scatter(forget, retain, neurons=neurons)
    text = fig.to_json()
    assert len(text) < 300_000
    heats = [t for t in fig.data if t.type == "heatmap"]
    assert [int(np.sum(t.z, dtype=np.int64)) for t in heats] == [32 * 16_384, 32 * 32 * 128]
    assert [int(np.sum(t["z"], dtype=np.int64)) for t in view(fig, "31") if t["z"] is not None] == [16_384, 4096]
    # what the browser reads is what was counted
    assert unpacked(json.loads(text)["data"][0]["z"]).sum(dtype=np.int64) == 32 * 16_384


def test_paper_has_no_slider():
    from sepcap.drawing.style import SLIDER_PX, width_px, without_slider

    fig = plots.importance_scatter(*random_pair((3, 50)))
    height = fig.layout.height
    without_slider(fig)
    assert not fig.layout.sliders
    assert fig.layout.height == height - SLIDER_PX
    assert fig.layout.width == width_px("column")


def test_bad_input():
    forget, retain = random_pair((2, 30))
    with pytest.raises(ValueError, match=r"importance='mean_shift' is defined only for both tasks.*abs"):
        plots.importance_scatter(forget, retain, "mean_shift")
    with pytest.raises(ValueError, match="Did you mean 'mlp'"):
        plots.importance_scatter(forget, retain, site="mpl")
    with pytest.raises(ValueError, match="bins=1"):
        plots.importance_scatter(forget, retain, bins=1)
    with pytest.raises(ValueError, match="different models"):
        plots.importance_scatter(forget, retain, neurons=NeuronSet({"mlp": torch.ones(2, 31, dtype=torch.bool)}))


def test_an_importance_of_the_pair_of_tasks_can_be_drawn_too():
    forget, retain = random_pair((2, 60))
    fig = plots.importance_scatter(forget, retain, "std_common")
    assert "std_common" in str(fig.layout)
    assert plots.importance_histograms(forget, retain, "std_common").data
