"""Similarity of texts: matrices with their category blocks, and the gap between blocks over layers."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from sepcap.checks import checked
from sepcap.drawing.parts import above, axes_of, band, colour_bar, layer_axis, level, panel_axes
from sepcap.drawing.style import (
    BLUE,
    FAINT,
    GREY,
    INK,
    SHARES,
    VERMILLION,
    Width,
    chosen_layers,
    every,
    is_wide,
    new_figure,
    plain,
    rounded,
    scale_ticks,
    width_px,
)

PANELS = 12
"""Most layers drawn by default, evenly spaced."""
MAX_SIDE = 80
"""Most cells per side of a matrix; to stay within it, neighbouring positions of a text are averaged, down to one cell per text."""
BELOW = [[0.0, "#ffffff"], [0.3, "#fbd3b4"], [0.6, "#f0a36b"], [1.0, "#b54a00"]]
"""Colours of negative similarities, from 0 to the lowest."""
GAP_PX = 30
LEFT_PX, RIGHT_PX = 84, 96
UPRIGHT_PX = 56
"""If the columns of a category are narrower on average, category names are rotated."""


@checked()
def similarity(result: Any, *, layers: Sequence[int] | None = None, width: Width = "page") -> go.Figure:
    """Similarity of every (text, position) to every other, one panel per layer, with lines between the categories.

    Args:
        result: what `sepcap.compare_activations` returns.
        layers: layers to draw; default is all, or twelve evenly spaced ones if there are more.
        width: inches, "column" or "page".

    Raises:
        ValueError: a layer that was not compared.
    """
    there = result.tables["layers"]["layer"].tolist()
    shown = _some(there) if layers is None else list(layers)
    if not shown or set(shown) - set(there):
        raise ValueError(f"layers={shown}: give some of the layers that were compared: {', '.join(map(str, there))}")
    texts, positions = result.tables["texts"], result.config["positions"]
    names, groups = _cell_names(texts["category"].tolist(), positions)
    cells = {layer: _binned(result.tensors["similarity"][there.index(layer)].numpy(), groups) for layer in shown}
    sizes = np.array(list(result.config["categories"].values())) * (len(names) // len(texts))
    inside = width_px(width) - LEFT_PX - RIGHT_PX
    across = 3 if is_wide(width) else 2
    columns = min(across, len(shown))
    rows = -(-len(shown) // columns)
    side = (inside - GAP_PX * (across - 1)) / across
    total = rows * side + (rows - 1) * GAP_PX
    turned = side / len(sizes) < UPRIGHT_PX
    kind = "Scaled cosine" if result.config["scaled"] else "Cosine"
    traces: list[Any] = []
    layout: dict[str, Any] = {"annotations": [], "shapes": []}
    for i, layer in enumerate(shown):
        row, column = divmod(i, columns)
        key, axes = axes_of(i)
        hover = f"<b>layer {layer}</b><br>%{{y}}<br>%{{x}}<br>{kind.lower()} similarity %{{z:.3f}}<extra></extra>"
        traces.append(go.Heatmap(z=cells[layer].astype(np.float32), x=names, y=names, coloraxis="coloraxis", hovertemplate=hover, **axes))
        left, top = column * (side + GAP_PX) / inside, 1 - row * (side + GAP_PX) / total
        lowest = i + columns >= len(shown)
        x_axis, y_axis = _axes(result, names, sizes, left_most=column == 0, lowest=lowest, turned=turned)
        layout |= panel_axes(key, x_axis, y_axis, (left, left + side / inside), (top - side / total, top))
        layout["shapes"] += _edges(sizes, len(names), axes)
        layout["annotations"].append(above(f"Layer {layer}", left, top, 2))
    bar = colour_bar(f"{kind} similarity", x=(columns * (side + GAP_PX) - GAP_PX) / inside)
    longest = max(len(word) for name in result.config["categories"] for word in name.split())
    bottom = 16 + 7 * longest if turned else 46
    drawn = np.stack(list(cells.values()))
    colours = _colours(drawn)
    layout["coloraxis"] = {**colours, "colorbar": bar | scale_ticks(drawn, colours["cmin"], colours["cmax"])}
    return new_figure(traces, layout, width=width, plot_px=total, left=LEFT_PX, right=RIGHT_PX, top=24, bottom=bottom)


def _some(layers: list[int]) -> list[int]:
    at = np.unique(np.linspace(0, len(layers) - 1, min(PANELS, len(layers))).round().astype(int))
    return [layers[i] for i in at]


def _cell_names(categories: list[str], positions: list[int]) -> tuple[list[str], list[list[int]]]:
    """Names of the rows and columns, and the groups of positions that are averaged."""
    bins = min(len(positions), max(1, MAX_SIDE // len(categories)))
    groups = [part.tolist() for part in np.array_split(np.arange(len(positions)), bins)]
    spans = [f"{positions[part[0]]}–{positions[part[-1]]}" if len(part) > 1 else str(positions[part[0]]) for part in groups]
    numbers = [categories[:i].count(category) + 1 for i, category in enumerate(categories)]
    return [f"{plain(c)} {i}, token {span}" for c, i in zip(categories, numbers, strict=True) for span in spans], groups


def _binned(matrix: np.ndarray, groups: list[list[int]]) -> np.ndarray:
    positions = sum(map(len, groups))
    starts = [text * positions + part[0] for text in range(len(matrix) // positions) for part in groups]
    counts = np.diff([*starts, len(matrix)])
    sums = np.add.reduceat(np.add.reduceat(matrix.astype(np.float64), starts, axis=0), starts, axis=1)
    return sums / np.outer(counts, counts)


def _colours(cells: np.ndarray) -> dict[str, Any]:
    """White at 0 and a symmetric range if the lower end is negative; else white at the lower end.

    The ends are the 0.5% and 99.5% quantiles off the diagonal: similarities of vectors to themselves would hide all other differences.
    """
    low, high = np.quantile(cells[:, ~np.eye(cells.shape[1], dtype=bool)], [0.005, 0.995]).tolist()
    if high <= low:
        low, high = low - 0.5, low + 0.5
    if low >= 0:
        return {"cmin": low, "cmax": high, "colorscale": SHARES}
    far = max(-low, high)
    below = [[0.5 - at / 2, colour] for at, colour in reversed(BELOW)]
    return {"cmin": -far, "cmax": far, "colorscale": below + [[0.5 + at / 2, colour] for at, colour in SHARES[1:]]}


def _axes(
    result: Any, names: list[str], sizes: np.ndarray, *, left_most: bool, lowest: bool, turned: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    middles = np.cumsum(sizes) - (sizes + 1) // 2
    common = {"ticks": "", "showline": False, "constrain": "domain"}
    labels = {"tickvals": [names[i] for i in middles], "ticktext": [_in_lines(name) for name in result.config["categories"]]}
    return (
        {**common, "showticklabels": lowest, "tickangle": -90 if turned else 0, **labels},
        {**common, "autorange": "reversed", "showticklabels": left_most, **labels},
    )


def _in_lines(category: str) -> str:
    """The words of a name, one per line."""
    return plain(category, 24).replace(" ", "<br>")


def _edges(sizes: np.ndarray, side: int, axes: dict[str, str]) -> list[dict[str, Any]]:
    line = {"type": "line", "xref": axes["xaxis"], "yref": axes["yaxis"], "line": {"color": INK, "width": 1}}
    edges = [0, *np.cumsum(sizes).tolist()]
    ends = {"a0": -0.5, "a1": side - 0.5}
    across = [{**line, "x0": ends["a0"], "x1": ends["a1"], "y0": edge - 0.5, "y1": edge - 0.5} for edge in edges]
    return across + [{**line, "y0": ends["a0"], "y1": ends["a1"], "x0": edge - 0.5, "x1": edge - 0.5} for edge in edges]


@checked()
def similarity_profile(
    result: Any,
    *,
    control: Any | None = None,
    control_name: str = "random weights",
    layers: Sequence[int] | None = None,
    width: Width = "column",
) -> go.Figure:
    """Within- minus between-category similarity over layers, with 95% intervals and the range for relabelled texts.

    Args:
        result: what `sepcap.compare_activations` returns.
        control: the result of another model on the same texts, drawn beside it.
        control_name: its name in the legend; the range for relabelled texts is that of `result`.
        layers: layers to draw; default all that were compared.
        width: inches, "column" or "page".
    """
    table: Any = result.tables["layers"]
    layers = chosen_layers(layers, table["layer"].tolist())
    table = table[table["layer"].isin(layers)]
    traces: list[Any] = [band(layers, table["null_low"].to_numpy(), table["null_high"], FAINT, name="relabelled texts, 95%")]
    reached = {"mode": "lines", "line": {"color": GREY, "width": 1, "dash": "dot"}, "hoverinfo": "skip"}
    if np.isfinite(table["critical"]).any():
        traces.append(go.Scatter(x=layers, y=rounded(table["critical"]), name="p = 0.05, corrected for layers", **reached))
    traces.append(_with_intervals(result, layers, "true labels" if control is None else "this model", VERMILLION, "circle"))
    if control is not None:
        traces.append(_with_intervals(control, layers, plain(control_name), BLUE, "square"))
    kind = "scaled cosine" if result.config["scaled"] else "cosine"
    layout = {
        "xaxis": layer_axis(layers, 0.3) | {"dtick": every(len(layers), 12)},
        "yaxis": {"title": {"text": f"Within − between<br>({kind} similarity)"}, "nticks": 6},
        "shapes": [level(0, {"color": INK, "width": 1})],
    }
    return new_figure(traces, layout, width=width, plot_px=190, left=76, legend_rows=len(traces))


def _with_intervals(result: Any, layers: list[int], name: str, colour: str, symbol: str) -> go.Scatter:
    table: Any = result.tables["layers"]
    table = table[table["layer"].isin(layers)]
    hovers = [
        f"<b>{name}, layer {row['layer']}</b><br>within {row['within']:.3f}, between {row['between']:.3f}<br>"
        f"gap {row['gap']:.3f} [{row['low']:.3f}, {row['high']:.3f}]<br>p {row['p']:.2g}, corrected for layers".replace("-", "−")
        for row in table.to_dict("records")
    ]
    up, down = (rounded(np.abs(table[end] - table["gap"])) for end in ("high", "low"))
    ends = {"array": up, "arrayminus": down, "symmetric": False, "thickness": 1.2, "width": 4}
    look = {"mode": "lines+markers", "line": {"color": colour, "width": 1.5}, "marker": {"color": colour, "size": 6, "symbol": symbol}}
    hover = {"hovertext": hovers, "hoverinfo": "text", "name": name, "cliponaxis": False}
    return go.Scatter(x=table["layer"].tolist(), y=rounded(table["gap"]), error_y=ends, **look, **hover)
