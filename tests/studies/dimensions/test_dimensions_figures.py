"""Figures of residual dimensions: a line per text and position, a mean per category, a panel per dimension."""

import json

import numpy as np
import pandas as pd
import plotly.io
import pytest

from sepcap import plots
from sepcap.studies.dimensions.result import DimensionSearch, DimensionTraces

CATEGORIES = {"prose": 3, "<b>C++</b>": 3}
LOCATIONS, POSITIONS = 4, (7, 11)


def result(dims=(3, 9), searched=None):
    """Value = 1000·dim + 100·text + 10·location + place of the position."""
    names = np.repeat(list(CATEGORIES), 3)
    index = pd.MultiIndex.from_product([dims, range(LOCATIONS), range(6), POSITIONS], names=["dim", "location", "text", "position"])
    values = index.to_frame(index=False)
    values["category"] = names[values["text"]]
    values["value"] = 1000.0 * values["dim"] + 100 * values["text"] + 10 * values["location"] + (values["position"] == 11)
    means = values.groupby(["dim", "location", "category"], sort=False)["value"].mean().rename("mean").reset_index()
    means = means.assign(low=means["mean"] - 1, high=means["mean"] + 2)
    separation = pd.DataFrame({"dim": np.repeat(dims, LOCATIONS), "location": list(range(LOCATIONS)) * len(dims), "eta2": 0.5})
    separation["p"] = 0.01 * (1 + separation["location"]) + 0.001 * separation["dim"]
    tests = pd.DataFrame({"dim": dims, "location": 2, "eta2": 0.5, "p": [0.01 + 0.001 * dim for dim in dims]})
    config = {"dims": list(dims), "locations": LOCATIONS, "categories": CATEGORIES, "positions": list(POSITIONS), "searched": searched}
    return DimensionTraces(config, {"values": values, "means": means, "separation": separation, "tests": tests})


def searched():
    """Three dimensions, of which the first alone is significant on the other half."""
    table = pd.DataFrame({"dim": [7, 1023, 0], "location": [2, 0, 3], "eta2": [0.9, 0.2, 0.1], "p": [0.01, 0.4, 0.9]})
    table = table.assign(p_uncorrected=table["p"] / 3, eta2_searched=[0.95, 0.9, 0.8], searched="half of texts a, seed 0")
    config = {"categories": CATEGORIES, "positions": list(POSITIONS), "locations": [0, 2, 3], "relabellings": "none"}
    return DimensionSearch(config, {"dimensions": table, "texts": pd.DataFrame({"text": range(12)})})


def test_dimensions_with_a_small_p_on_the_other_half_are_filled():
    on_searched, on_other = plots.dimension_search(searched()).data
    assert list(on_searched.x) == [0.95, 0.9, 0.8]
    assert list(on_other.x) == [0.9, 0.2, 0.1]
    assert [colour == "white" for colour in on_other.marker.color] == [False, True, True]
    assert searched().summary()[-1].startswith("1 of 3 have p ≤ 0.05")


def test_every_text_and_position_is_a_line_and_every_category_a_mean():
    fig = plots.dimension_traces(result())
    thin, thick = [t for t in fig.data if t.hoverinfo == "skip"], [t for t in fig.data if t.hovertext is not None]
    assert [(t.legendgroup, t.yaxis) for t in thin] == [(c, axis) for axis in ("y", "y2") for c in CATEGORIES]
    for i, trace in enumerate(thin):
        dim, first = (3, 9)[i // 2], 3 * (i % 2)
        lines = np.array(trace.y).reshape(6, LOCATIONS + 1)
        assert np.isnan(lines[:, -1]).all()
        expected = [[1000 * dim + 100 * text + 10 * s + at for s in range(LOCATIONS)] for text in range(first, first + 3) for at in (0, 1)]
        np.testing.assert_allclose(lines[:, :-1], expected)
        np.testing.assert_allclose(np.array(trace.x).reshape(6, -1)[0, :-1], range(LOCATIONS))
    for i, trace in enumerate(thick):
        dim, middle = (3, 9)[i // 2], 1 + 3 * (i % 2)
        np.testing.assert_allclose(trace.y, [1000 * dim + 100 * middle + 10 * s + 0.5 for s in range(LOCATIONS)], rtol=1e-4)
        assert trace.line.color == thin[i].line.color
    assert [t.showlegend for t in thick] == [True, True, False, False]
    assert thick[1].name == "&lt;b&gt;C++&lt;/b&gt;"
    assert "after layer 2" in thick[0].hovertext[3]
    assert "before the first block" in thick[0].hovertext[0]
    assert "mean 3.1e+03, 95% interval over texts [3.1e+03, 3.1e+03]" in thick[0].hovertext[0]


def test_titles_give_the_p_value_and_whether_other_texts_were_searched():
    titles = [note.text for note in plots.dimension_traces(result()).layout.annotations]
    assert titles == ["Dimension 3: p = 0.013", "Dimension 9: p = 0.019"]
    titles = [note.text for note in plots.dimension_traces(result(searched=6)).layout.annotations]
    assert titles == ["Dimension 3: p = 0.013 (found on other texts)", "Dimension 9: p = 0.019 (found on other texts)"]
    assert "residual stream" in plots.dimension_traces(result()).layout.yaxis.title.text


@pytest.mark.parametrize("width", ["column", "page"])
@pytest.mark.parametrize("dims", [(3,), (3, 9, 12)])
def test_panels_do_not_overlap_and_locations_are_named(width, dims):
    fig = plots.dimension_traces(result(dims), width=width)
    layout = json.loads(plotly.io.to_json(fig))["layout"]
    assert layout["width"] == pytest.approx({"column": 380.2, "page": 794.9}[width], abs=1)
    boxes = [(*layout[f"xaxis{k}"]["domain"], *layout[f"yaxis{k}"]["domain"]) for k in ["", *(str(i) for i in range(2, len(dims) + 1))]]
    for i, (left, right, low, high) in enumerate(boxes):
        assert all(right <= other[0] or other[1] <= left or high <= other[2] or other[3] <= low for other in boxes[:i])
    assert layout["xaxis"]["ticktext"] == ["emb.", "0", "1", "2"]
    assert layout["xaxis"]["tickvals"] == [0, 1, 2, 3]
