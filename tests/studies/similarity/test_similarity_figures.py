"""Figures of similarity: cells, blocks, gaps and bands are those of the result."""

import json

import numpy as np
import pandas as pd
import plotly.io
import pytest
import torch

from sepcap import plots
from sepcap.studies.base.permutations import relabel
from sepcap.studies.similarity.study import ActivationSimilarity, _layer_table, similarities, text_similarities

CATEGORIES = {"<b>prose</b>": 3, "C++": 4}
LABELS = np.repeat([0, 1], [3, 4])


def result(layers=(0, 1), positions=4, scaled=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(len(layers), 7 * positions, 16, generator=generator)
    vectors[0, :, 0] += torch.from_numpy(LABELS).repeat_interleave(positions) * 6
    matrices = torch.stack([similarities(one, scaled) for one in vectors])
    of_texts = text_similarities(matrices, 7)
    texts = pd.DataFrame({"text": range(7), "category": np.repeat(list(CATEGORIES), list(CATEGORIES.values())), "name": "n"})
    config = {"model": "m", "what": "attn_out", "scaled": scaled, "positions": list(range(10, 10 + 4 * positions, 4))}
    config |= {"categories": CATEGORIES, "relabellings": "all", "texts": "f", "head": None, "layer": None, "norm": None}
    tables = {"layers": _layer_table(of_texts.numpy(), relabel(LABELS).labels, list(layers)), "texts": texts}
    return ActivationSimilarity(config, tables, {"similarity": matrices.float(), "text_similarity": of_texts})


def maps(fig):
    return [t for t in fig.data if t.type == "heatmap"]


@pytest.mark.parametrize("width", ["column", "page"])
def test_a_panel_per_layer_with_every_cell_and_lines_between_categories(width):
    found = result()
    fig = plots.similarity(found, width=width)
    for i, panel in enumerate(maps(fig)):
        np.testing.assert_allclose(panel.z, found.tensors["similarity"][i].numpy(), atol=1e-6)
        assert panel.coloraxis == "coloraxis"
        assert list(panel.x) == list(panel.y)
        assert len(set(panel.x)) == 28
        assert panel.x[1] == "&lt;b&gt;prose&lt;/b&gt; 1, token 14"
        assert panel.x[-1] == "C++ 4, token 22"
    assert [note.text for note in fig.layout.annotations] == ["Layer 0", "Layer 1"]
    upright = sorted({s.x0 for s in fig.layout.shapes if s.x0 == s.x1 and s.xref == "x"})
    assert upright == [-0.5, 11.5, 27.5]
    assert fig.layout.yaxis.autorange == "reversed"
    assert len(fig.layout.yaxis.tickvals) == 2
    assert json.loads(plotly.io.to_json(fig))["layout"]["width"] == pytest.approx({"column": 380.2, "page": 794.9}[width], abs=1)


def test_white_is_zero_and_the_scale_has_both_sides():
    axis = plots.similarity(result()).layout.coloraxis
    assert axis.cmin < 0 < axis.cmax < 1
    white = [axis.cmin + at * (axis.cmax - axis.cmin) for at, colour in axis.colorscale if colour == "#ffffff"]
    assert white == [pytest.approx(0)]
    steps = [at for at, _ in axis.colorscale]
    assert steps == sorted(steps)
    assert (steps[0], steps[-1]) == (0, pytest.approx(1))


def test_the_ends_of_the_scale_are_marked_where_cells_lie_beyond_them():
    found = result()
    axis = plots.similarity(found).layout.coloraxis
    values, texts = axis.colorbar.tickvals, axis.colorbar.ticktext
    assert (values[0], values[-1]) == (axis.cmin, axis.cmax)
    assert list(values) == sorted(values)
    assert 3 <= len(values) <= 8
    assert texts[-1] == f"≥ {axis.cmax:.2g}"  # the diagonal is 1
    assert axis.cmin == -axis.cmax  # neither side looks stronger than it is
    for value, text in zip(values[1:-1], texts[1:-1], strict=True):
        assert float(text.replace("−", "-")) == pytest.approx(value, abs=1e-9)
    found.tensors["similarity"][:] = 0.25
    assert not any(text[0] in "≤≥" for text in plots.similarity(found).layout.coloraxis.colorbar.ticktext)


def test_categories_are_named_on_rows_and_on_the_lowest_columns():
    layout = plots.similarity(result(layers=range(5), positions=1)).layout  # three panels above two
    named = [layout[f"xaxis{i}"].showticklabels for i in ("", 2, 3, 4, 5)]
    assert named == [False, False, True, True, True]
    assert list(layout.xaxis5.ticktext) == list(layout.yaxis.ticktext) == ["&lt;b&gt;prose&lt;/b&gt;", "C++"]
    assert list(layout.xaxis5.tickvals) == list(layout.yaxis.tickvals)


def test_many_positions_are_averaged_down_within_their_text():
    found = result(layers=(0,), positions=30)
    panel = maps(plots.similarity(found))[0]
    z = np.array(panel.z)
    assert z.shape == (77, 77)  # 80 cells for 7 texts: 11 each
    whole = found.tensors["similarity"][0].numpy()
    first = slice(0, 3)  # 30 positions in 11 bins: 3, 3, … 2
    assert z[0, 0] == pytest.approx(whole[first, first].mean(), abs=1e-6)
    assert z[0, 11] == pytest.approx(whole[first, 30:33].mean(), abs=1e-6)
    assert panel.x[0] == "&lt;b&gt;prose&lt;/b&gt; 1, token 10–18"
    assert len(plots.similarity(found).to_json()) < 100_000


def test_of_many_layers_twelve_are_drawn_and_others_on_request():
    found = result(layers=range(48), positions=1)
    shown = [note.text for note in plots.similarity(found).layout.annotations]
    assert len(shown) == 12
    assert (shown[0], shown[-1]) == ("Layer 0", "Layer 47")
    fig = plots.similarity(found, layers=[47, 3])
    np.testing.assert_allclose(maps(fig)[0].z, found.tensors["similarity"][47].numpy(), atol=1e-6)
    with pytest.raises(ValueError, match=r"layers=\[48\]"):
        plots.similarity(found, layers=[48])


def named(fig):
    return {t.name: t for t in fig.data}


def test_the_profile_has_gaps_intervals_and_what_relabelling_gives():
    found = result()
    table = found.tables["layers"]
    lines = named(plots.similarity_profile(found))
    points = lines["true labels"]
    np.testing.assert_allclose(points.y, table["gap"], rtol=1e-4)
    np.testing.assert_allclose(np.add(points.y, points.error_y.array), table["high"], rtol=1e-3)
    np.testing.assert_allclose(np.subtract(points.y, points.error_y.arrayminus), table["low"], atol=1e-4)
    band = lines["relabelled texts, 95%"]
    np.testing.assert_allclose(band.y, [*table["null_high"], *table["null_low"][::-1]], rtol=1e-4)
    np.testing.assert_allclose(lines["p = 0.05, corrected for layers"].y, table["critical"], rtol=1e-4)
    assert f"p {table['p'][0]:.2g}" in points.hovertext[0]


def test_a_control_stands_beside_it_and_a_single_layer_can_be_drawn():
    found, control = result(), result(seed=1)
    lines = named(plots.similarity_profile(found, control=control, control_name="<i>none</i>"))
    np.testing.assert_allclose(lines["&lt;i&gt;none&lt;/i&gt;"].y, control.tables["layers"]["gap"], rtol=1e-4)
    np.testing.assert_allclose(lines["this model"].y, found.tables["layers"]["gap"], rtol=1e-4)
    one = result(layers=(5,), scaled=True)
    fig = plots.similarity_profile(one)
    assert fig.layout.xaxis.range[0] < 5 < fig.layout.xaxis.range[1]
    assert "scaled cosine" in fig.layout.yaxis.title.text
    assert "Scaled cosine" in plots.similarity(one).layout.coloraxis.colorbar.title.text


def test_too_few_relabellings_for_a_threshold_draw_none():
    found = result()
    found.tables["layers"]["critical"] = np.inf
    assert "p = 0.05, corrected for layers" not in named(plots.similarity_profile(found))


def test_a_layer_without_a_threshold_takes_it_from_no_other():
    found = result()
    found.tables["layers"].loc[0, "critical"] = np.inf
    assert named(plots.similarity_profile(found))["p = 0.05, corrected for layers"].y[0] is None
