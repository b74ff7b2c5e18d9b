"""Residual dimensions over the layers, one thin line per text and position."""

from typing import Any

import numpy as np
import plotly.graph_objects as go

from sepcap.checks import checked
from sepcap.drawing.parts import above, axes_of, panel_axes, row_axis
from sepcap.drawing.style import BLUE, GREY, PALETTE, SYMBOLS, Width, every, is_wide, new_figure, plain, rounded, width_px
from sepcap.drawing.themes import drawn
from sepcap.models.blocks.places import location_name

HEIGHT_PX = 170
GAP_PX = 84
ROW_GAP_PX = 80
LEFT_PX, RIGHT_PX = 76, 20


@drawn
@checked()
def dimension_traces(result: Any, *, width: Width = "page") -> go.Figure:
    """Value of every dimension from the embedding to the last layer, one panel per dimension.

    Thin lines are single positions of single texts, in the colour of the category; thick lines are the category means.

    Args:
        result: what `sepcap.trace_dimensions` returns.
        width: inches, "column" or "page".
    """
    dims, categories = result.dims, list(result.config["categories"])
    inside = width_px(width) - LEFT_PX - RIGHT_PX
    columns = min(2 if is_wide(width) else 1, len(dims))
    rows = -(-len(dims) // columns)
    share = (1 - (columns - 1) * GAP_PX / inside) / columns
    total = rows * HEIGHT_PX + (rows - 1) * ROW_GAP_PX
    values, means = result.tables["values"], result.tables["means"]
    locations = list(range(result.config["locations"]))
    step = every(len(locations) - 1, 12)
    ticks = [0, *range(1, len(locations), step)]
    thin: list[Any] = []
    thick: list[Any] = []
    layout: dict[str, Any] = {"annotations": []}
    for i, dim in enumerate(dims):
        row, column = divmod(i, columns)
        key, axes = axes_of(i)
        for number, category in enumerate(categories):
            of_category = (values["dim"] == dim) & (values["category"] == category)
            look = {"colour": PALETTE[number % len(PALETTE)], "symbol": SYMBOLS[number % len(SYMBOLS)]}
            thin.append(_lines(values[of_category], locations, look["colour"], category, axes))
            own = means[(means["dim"] == dim) & (means["category"] == category)]
            thick.append(_mean(own, dim, category, look, axes, first=i == 0))
        left, top = column * (share + GAP_PX / inside), 1 - row * (HEIGHT_PX + ROW_GAP_PX) / total
        x = {"title": {"text": "After layer"}, "range": [-0.3, locations[-1] + 0.3], "tickvals": ticks, "tickangle": 0}
        x["ticktext"] = ["emb.", *(str(location - 1) for location in ticks[1:])]
        y = {"title": {"text": "Value in the<br>residual stream"}, "nticks": 6}
        layout |= panel_axes(key, x, y, (left, left + share), (top - HEIGHT_PX / total, top))
        # with one column of panels a title can be as wide as the figure
        begin = 8 - LEFT_PX if columns == 1 else 0
        layout["annotations"].append(above(f"Dimension {dim}{_test(result, i)}", left, top, 4, xshift=begin))
    layout["legend"] = {"title": {"text": "Thin: one position of one text; thick: mean"}}
    options = {"left": LEFT_PX, "right": RIGHT_PX, "top": 26, "legend_rows": len(categories) + 1, "legend_below": True}
    return new_figure(thin + thick, layout, width=width, plot_px=total, **options)


@drawn
@checked()
def dimension_search(result: Any, *, width: Width = "column") -> go.Figure:
    """η² of every dimension on the searched half of the texts and on the other half, at the location where it was found.

    Filled markers have a corrected p of at most 0.05 on the other half.

    Args:
        result: what `sepcap.find_dimensions` returns.
        width: inches, "column" or "page".
    """
    table = result.table
    rows = {i: f"{row['dim']}, {_short(row['location'])}" for i, row in enumerate(table.to_dict("records"))}
    at = list(rows)
    small = table["p"] <= 0.05
    hovers = [
        f"<b>dimension {row['dim']}</b>, {location_name(row['location'])}<br>η² {row['eta2_searched']:.3f} on the searched half, "
        f"{row['eta2']:.3f} on the other half<br>p {row['p']:.2g}, corrected for {len(table)} dimensions"
        for row in table.to_dict("records")
    ]
    hover = {"hovertext": hovers, "hoverinfo": "text", "cliponaxis": False, "mode": "markers", "y": at}
    searched = {"symbol": "diamond-open", "size": 7, "color": GREY}
    other = {"symbol": "circle", "size": 7, "color": [BLUE if ok else "white" for ok in small], "line": {"color": BLUE, "width": 1.3}}
    traces = [
        go.Scatter(x=rounded(table["eta2_searched"]), marker=searched, name="searched half, highest of all", **hover),
        go.Scatter(x=rounded(table["eta2"]), marker=other, name="other half (filled: p ≤ 0.05)", **hover),
    ]
    layout = {
        "xaxis": {"title": {"text": "η², share of variance between texts"}, "range": [-0.02, 1.02], "tickvals": [0, 0.25, 0.5, 0.75, 1]},
        "yaxis": {"title": {"text": "Dimension, after layer"}, **row_axis(rows, len(rows) - 0.4, -0.6)},
    }
    return new_figure(traces, layout, width=width, plot_px=max(130, 17 * len(rows)), left=84, legend_rows=2)


def _short(location: int) -> str:
    return "emb." if location == 0 else str(location - 1)


def _lines(values: Any, locations: list[int], colour: str, category: str, axes: dict[str, str]) -> go.Scatter:
    by_line = values.pivot(index=["text", "position"], columns="location", values="value").to_numpy()
    broken = np.hstack([by_line, np.full((len(by_line), 1), np.nan)])
    x = np.tile([*locations, np.nan], len(by_line)).astype(np.float32)
    line = {"color": colour, "width": 0.7}
    common = {"mode": "lines", "opacity": 0.3, "hoverinfo": "skip", "showlegend": False, "legendgroup": category}
    return go.Scatter(x=x, y=broken.ravel().astype(np.float32), line=line, **common, **axes)


def _mean(own: Any, dim: int, category: str, look: dict[str, str], axes: dict[str, str], *, first: bool) -> go.Scatter:
    hovers = [
        f"<b>{plain(category)}, dimension {dim}</b><br>{location_name(row['location'])}<br>"
        f"mean {row['mean']:.3g}, 95% interval over texts [{row['low']:.3g}, {row['high']:.3g}]".replace("-", "−")
        for row in own.to_dict("records")
    ]
    marker = {"color": look["colour"], "size": 6, "symbol": look["symbol"]}
    drawn = {"mode": "lines+markers", "line": {"color": look["colour"], "width": 2.2}, "marker": marker}
    hover = {"hovertext": hovers, "hoverinfo": "text", "name": plain(category), "legendgroup": category, "showlegend": first}
    return go.Scatter(x=own["location"].tolist(), y=rounded(own["mean"]), cliponaxis=False, **drawn, **hover, **axes)


def _test(result: Any, i: int) -> str:
    """End of a panel title: the p-value, and whether the dimension was found on other texts."""
    p = result.tables["tests"]["p"].iloc[i]
    return f": p = {p:.2g}{' (found on other texts)' * bool(result.config['searched'])}"
