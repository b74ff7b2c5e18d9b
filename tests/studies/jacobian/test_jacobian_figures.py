"""Figures of spectra of Jacobians: what is drawn is what was found."""

import numpy as np
import pandas as pd
import pytest
import torch

from sepcap import plots
from sepcap.studies.jacobian.study import JacobianSpectrum

SIZE = 50


def spectrum(weights, layer, row):
    """Values that fall by a factor per place, faster in trained layers; the last ten are 0."""
    values = np.exp(-np.arange(SIZE) * (0.2 * (weights == "trained") * (1 + layer) + 0.01 * row))
    values[-10:] = 0
    return values


def study(layers=(0, 1, 2), rows=3, control=True, at_least=False, model="default"):
    of_weights = ("trained", "random") if control else ("trained",)
    lines, tensors = [], {}
    for weights in of_weights:
        tensors[weights] = torch.tensor(np.array([[spectrum(weights, i, j) for j in range(rows)] for i in range(len(layers))]))
        for i, layer in enumerate(layers):
            for j in range(rows):
                rank = int((spectrum(weights, i, j) > 1e-3).sum())
                measures = dict.fromkeys(("stable_rank", "participation_ratio", "effective_rank"), 2.0 + j)
                line = {"weights": weights, "layer": layer, "row": j, "largest": 1.0, "rank": rank, "at_least": at_least, "bound": 45 + i}
                lines.append(line | measures)
    config = {"part": "attn", "model": model, "task": "local-prose", "tokens": 2, "rows": rows, "threshold": 1e-3}
    config |= {"layers": list(layers), "control": control, "size": SIZE, "n_documents": rows}
    return JacobianSpectrum(config, {"jacobians": pd.DataFrame(lines)}, tensors)


def named(fig, name):
    return next(trace for trace in fig.data if trace.name == name)


def test_ranks_are_means_with_intervals_and_the_bound_at_every_layer():
    result = study()
    fig = result.figure("ranks")
    for weights, name in (("trained", "trained"), ("random", "random weights")):
        table = result.by_layer[result.by_layer["weights"] == weights]
        drawn = named(fig, name)
        np.testing.assert_allclose(drawn.y, table["rank"], rtol=1e-4)
        np.testing.assert_allclose(np.add(drawn.y, drawn.error_y.array), table["rank_high"], rtol=1e-4)
        np.testing.assert_allclose(np.subtract(drawn.y, drawn.error_y.arrayminus), table["rank_low"], rtol=1e-4)
        assert np.round(drawn.x).tolist() == [0, 1, 2]
        assert f"layer 1, {name}" in drawn.hovertext[1]
    assert named(fig, "largest possible").y == (45, 46, 47, 45, 46, 47)
    assert fig.layout.yaxis.range[1] >= 47
    assert "0.001" in fig.layout.yaxis.title.text


def test_other_measures_have_no_bound_and_unknown_ones_are_refused():
    fig = study().figure("ranks", measure="stable_rank")
    assert [trace.name for trace in fig.data] == ["trained", "random weights"]
    assert named(fig, "trained").y == (3, 3, 3)
    with pytest.raises(ValueError, match=r"measure='rang'.*'rank'"):
        plots.jacobian_ranks(study(), "rang")


def test_lower_bounds_point_up_have_no_interval_and_no_line_to_compare_them_by():
    result = study(at_least=True, control=False)
    fig = result.figure()
    drawn = named(fig, "trained")
    assert set(drawn.marker.symbol) == {"triangle-up"}
    assert drawn.mode == "markers"
    assert drawn.error_y.visible is False
    assert f"rank at least {result.by_layer['rank'][0]:,.4g}<br>" in drawn.hovertext[0]
    assert named(fig, "lower bound on the rank").showlegend is not False
    other = result.figure(measure="stable_rank")
    assert set(named(other, "trained").marker.symbol) == {"circle"}
    texts = (*named(other, "trained").hovertext, *(trace.name for trace in other.data))
    assert not any("at least" in text or "lower bound" in text for text in texts)
    assert all(trace.name != "lower bound on the rank" for trace in study().figure().data)


def test_one_layer_alone_can_be_a_lower_bound():
    result = study()
    result.tables["jacobians"].loc[3, "at_least"] = True
    drawn = named(result.figure(), "trained")
    assert drawn.marker.symbol == ("circle", "triangle-up", "circle")
    assert drawn.error_y.array[1] is None
    assert drawn.error_y.array[0] > 0


def test_one_row_has_no_interval_and_nothing_reaches_beyond_the_largest_rank_possible():
    fig = study(rows=1, control=False).figure()
    assert named(fig, "trained").x == (0, 1, 2)
    assert all(end is None for end in named(fig, "trained").error_y.array)
    assert "1 row of 2 tokens" in named(fig, "trained").hovertext[0]
    result = study(rows=3, control=False)
    result.tables["jacobians"].loc[:2, "rank"] = [45, 45, 20]
    drawn = named(result.figure(), "trained")
    assert drawn.y[0] + drawn.error_y.array[0] == pytest.approx(45, abs=1e-2)
    result.tables["jacobians"].loc[:2, "bound"] = [45, 46, 47]
    assert named(study().figure(), "largest possible")
    assert named(JacobianSpectrum(result.config, result.tables, result.tensors).figure(), "largest possible, mean over rows").y[0] == 46


def test_a_measure_that_is_nowhere_defined_can_be_drawn():
    result = study(control=False)
    result.tables["jacobians"]["stable_rank"] = np.nan
    assert all(y is None for y in named(result.figure(measure="stable_rank"), "trained").y)


def test_spectra_are_shares_of_the_largest_per_layer_and_zeros_are_left_out():
    fig = study().figure("spectra")
    for layer in (0, 1, 2):
        drawn = named(fig, f"layer {layer}")
        expected = spectrum("trained", layer, 1)  # the middle one of three rows
        for number, y in zip(drawn.x, drawn.y, strict=True):
            assert (y is None) == (expected[number - 1] == 0)
            assert y is None or y == pytest.approx(expected[number - 1], rel=1e-2)
        assert drawn.x[0] == 1
        assert drawn.x[-1] == SIZE
    assert named(fig, "random weights, all layers").y[0] == 1
    assert fig.layout.shapes[0].y0 == 1e-3
    shown = [t.name for t in study().figure("spectra", control=False).data]
    assert shown == ["layer 0", "layer 1", "layer 2", "threshold of the rank, 0.001"]


def test_many_layers_get_a_short_legend_and_a_small_file():
    result = study(layers=range(40))
    fig = result.figure("spectra")
    named_lines = ["layer 0", "layer 20", "layer 39", "random weights, all layers", "threshold of the rank, 0.001"]
    assert [t.name for t in fig.data if t.showlegend is not False] == named_lines
    assert len(fig.to_json()) < 300_000
    assert len(result.figure("ranks").to_json()) < 60_000


def test_a_block_that_passes_nothing_can_be_drawn():
    result = study(layers=(0,), control=False)
    result.tensors["trained"].zero_()
    assert all(y is None for y in result.figure("spectra").data[0].y)


@pytest.mark.parametrize("kind", ["ranks", "spectra"])
@pytest.mark.parametrize("width", ["column", "page"])
def test_text_from_outside_is_plain(kind, width):
    fig = study(model="<b>$x$").figure(kind, width=width)
    assert "&lt;b&gt;&#36;x&#36;" in fig.layout.legend.title.text
