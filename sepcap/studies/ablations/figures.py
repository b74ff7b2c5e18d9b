"""Figures that compare kinds of ablation: on heads, and on increasing numbers of random neurons."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from sepcap.checks import checked
from sepcap.drawing.parts import above, axes_of, band, colour_bar, panel_axes, row_axis, translucent, upright
from sepcap.drawing.style import (
    BLUE,
    GREY,
    INK,
    METRIC_UNITS,
    PALETTE,
    SITE_NAMES,
    SYMBOLS,
    TICK_PX,
    VERMILLION,
    Width,
    capital,
    chosen_layers,
    every,
    in_lines,
    layer_ticks,
    lower,
    metric_name,
    new_figure,
    plain,
    rounded,
    scale_ticks,
    width_px,
)
from sepcap.errors import unknown
from sepcap.studies.ablations.config import COMPARED

METRICS = ("loss", "top1")
FEW = 4
"""Largest number of targets that are drawn as points with intervals."""
ROW_PX = 22
GAP_PX = 40
LOOK = {kind: (PALETTE[i % len(PALETTE)], SYMBOLS[(i + i // len(PALETTE)) % len(SYMBOLS)]) for i, kind in enumerate(COMPARED)}
"""Colour and symbol of every kind, the same in all figures."""


@checked()
def ablations(comparison: Any, metric: str = "loss", *, layers: Sequence[int] | None = None, width: Width = "column") -> go.Figure:
    """Change in a metric under every kind of ablation: points with 95% intervals for a few heads, else a heat map per kind.

    In a heat map, a dot marks the heads whose interval contains 0.

    Args:
        comparison: what `compare_ablations` returns.
        metric: "loss" or "top1".
        layers: layers of the heat maps; default all.
        width: inches, "column" or "page".
    """
    if metric not in METRICS:
        raise unknown("metric", metric, METRICS)
    alone = all(target is not None and isinstance(target[0], int) for target in comparison.targets)
    if len(comparison.targets) <= FEW or comparison.config["controls"] or not alone:
        return _points(comparison, metric, width)
    return _heat_maps(comparison, metric, layers, width)


def _change(metric: str) -> str:
    return f"Change in {lower(metric_name(metric))}{METRIC_UNITS.get(metric, '')}"


def _points(comparison: Any, metric: str, width: Width) -> go.Figure:
    table = comparison.table
    value, low, high = (f"delta_{metric}{end}" for end in ("", "_low", "_high"))
    each = len(comparison.kinds) + 1
    n = each * len(comparison.targets)
    decimals = _decimals(table[[value, low, high]].to_numpy())
    small, beside = {"size": TICK_PX}, {"xref": "paper", "yref": "y", "xanchor": "left"}
    traces: list[Any] = []
    notes: list[dict[str, Any]] = []
    ticks = {}
    for row, line in enumerate(table.to_dict("records")):
        i, j = divmod(row, len(comparison.kinds))
        y = n - 2 - (i * each + j)
        name, kind = ("random control: " if line["control"] else "") + line["target"], line["kind"]
        if j == 0:
            notes.append({"text": capital(name), "x": 0, "y": y + 1, **beside, "xshift": 4, "font": small})
        ticks[y] = kind
        colour, symbol = LOOK[kind]
        said = f"{line[value]:+.{decimals}f} [{line[low]:.{decimals}f}, {line[high]:.{decimals}f}]".replace("-", "−")
        hover = f"<b>{name}, {kind}</b><br>{_change(metric).lower()} {said}<br>{metric_name(metric)} {line[metric]:.4g}, n {line['n']:,}"
        common = {"showlegend": False, "cliponaxis": False}
        ends = {"symbol": "line-ns", "size": 8, "line": {"color": colour, "width": 1.5}}
        bar = {"mode": "lines+markers", "line": {"color": colour, "width": 1.5}, "marker": ends, "hoverinfo": "skip"}
        traces.append(go.Scatter(x=rounded([line[low], line[high]]), y=[y, y], **bar, **common))
        point = {"mode": "markers", "name": kind, "marker": {"color": colour, "size": 7, "symbol": symbol}}
        traces.append(go.Scatter(x=rounded([line[value]]), y=[y], **point, hovertext=[hover], hoverinfo="text", **common))
        notes.append({"text": said, "x": 1, "y": y, **beside, "xshift": 8, "font": small})
    layout = {
        "xaxis": {
            "title": {"text": f"{_change(metric)}<br>{_measured(comparison)}, with 95% intervals"},
            "nticks": 5,
            "range": _range(table[[value, low, high]].to_numpy()),
        },
        "yaxis": row_axis(ticks, -0.7, n - 0.3),
        "annotations": notes,
        "shapes": [
            upright(0, top - len(comparison.kinds) + 0.4, top + 0.6, layer="below")
            for top in (n - 2 - i * each for i in range(len(comparison.targets)))
        ],
    }
    return new_figure(traces, layout, width=width, plot_px=ROW_PX * n + 10, left=20, right=148, bottom=62)


def _measured(comparison: Any) -> str:
    """The task, predictions and documents of the evaluation."""
    return f"{plain(comparison.before.task, 24)}, n = {comparison.before.n:,} in {comparison.before.n_documents:,} documents"


def _decimals(values: np.ndarray) -> int:
    """Decimals, the same for all numbers, with which the largest number has three significant digits."""
    largest = np.nanmax(np.abs(values), initial=0)
    return int(np.clip(2 - np.floor(np.log10(largest)), 0, 6)) if largest > 0 else 3


def _range(values: np.ndarray) -> list[float]:
    """Axis range from the lowest to the highest value, padded, and always including 0."""
    numbers = np.append(values, 0)
    low, high = np.nanmin(numbers), np.nanmax(numbers)
    pad = 0.06 * (high - low) or 1.0
    return [float(low - pad), float(high + pad)]


def _heat_maps(comparison: Any, metric: str, of_layers: Sequence[int] | None, width: Width) -> go.Figure:
    table: Any = comparison.table
    shown = chosen_layers(of_layers, range(int(table["layer"].max()) + 1))
    table = table[table["layer"].isin(shown)]
    at = {name: table[name].to_numpy(dtype=np.int64) for name in ("layer", "head")}
    at["layer"] = np.searchsorted(shown, at["layer"])
    layers, heads = len(shown), int(at["head"].max()) + 1
    changes = table[[f"delta_{metric}{end}" for end in ("", "_low", "_high")]].to_numpy()
    columns = min(3, len(comparison.kinds))
    rows = -(-len(comparison.kinds) // columns)
    height = min(320, max(90, 16 * layers))
    total = rows * height + (rows - 1) * GAP_PX
    gap = 26 / (width_px(width) - 48 - 90)
    share = (1 - gap * (columns - 1)) / columns
    name = _change(metric)
    hover = (
        f"layer %{{customdata[2]}}, head %{{x}}<br>{name.lower()} %{{z:+.4f}}<br>"
        "95% interval [%{customdata[0]:.4f}, %{customdata[1]:.4f}]"
        "<extra></extra>"
    )
    traces: list[Any] = []
    said = f"{_measured(comparison)}; • 95% interval contains 0"
    below = {"x": 0, "xref": "paper", "xanchor": "left", "y": 0, "yref": "paper", "yanchor": "top"}
    layout: dict[str, Any] = {"annotations": [{"text": said, **below, "yshift": -46, "font": {"size": TICK_PX}}]}
    for i, kind in enumerate(comparison.kinds):
        row, column = divmod(i, columns)
        key, axes = axes_of(i)
        of_kind = (table["kind"] == kind).to_numpy()
        cells = np.full((3, layers, heads), np.nan)
        cells[:, at["layer"][of_kind], at["head"][of_kind]] = changes[of_kind].T
        ends = [[[*rounded(pair, 4), n] for pair in line] for n, line in zip(shown, cells[1:].transpose(1, 2, 0), strict=True)]
        z = [rounded(line, 4) for line in cells[0]]
        look = {"coloraxis": "coloraxis", "hovertemplate": f"<b>{kind}</b>, {hover}", "hoverongaps": False}
        traces.append(go.Heatmap(z=z, customdata=ends, **look, **axes))
        unsure = np.argwhere((cells[1] <= 0) & (cells[2] >= 0))
        if len(unsure):
            dots = {"color": INK, "size": 3}
            where = {"x": unsure[:, 1].tolist(), "y": unsure[:, 0].tolist()}
            traces.append(go.Scatter(**where, mode="markers", marker=dots, hoverinfo="skip", showlegend=False, **axes))
        top, left = total - row * (height + GAP_PX), column * (share + gap)
        # the last row may have fewer panels than the row above
        last, first = i + columns >= len(comparison.kinds), column == 0
        x = {"title": {"text": "Head"} if last else {}, "range": [-0.5, heads - 0.5], "showticklabels": last, "tick0": 0}
        y = {"title": {"text": "Layer"} if first else {}, "range": [-0.5, layers - 0.5], "showticklabels": first}
        x, y = x | {"dtick": every(heads, 5)}, y | layer_ticks(shown, height / 14)
        layout |= panel_axes(key, x, y, (left, left + share), ((top - height) / total, top / total))
        layout["annotations"].append(above(capital(kind), left, top / total))
    scale, ticks = _diverging(changes[:, 0])
    layout["coloraxis"] = {**scale, "colorbar": colour_bar(in_lines(name, total), **ticks)}
    return new_figure(traces, layout, width=width, plot_px=total, left=48, right=90, top=26, bottom=64)


def _diverging(values: np.ndarray) -> tuple[dict[str, Any], dict[str, Any]]:
    """Colour scale and ticks: white at 0, blue below, vermilion above, saturated beyond 95% of the cells; steeper near 0."""
    finite = np.abs(values[np.isfinite(values)])
    far = float(np.quantile(finite, 0.95)) if finite.size else 0.0
    far = far or float(finite.max(initial=0)) or 1.0
    at = np.linspace(-1, 1, 17)
    scale = [[(v + 1) / 2, _tint(BLUE if v < 0 else VERMILLION, abs(v) ** 0.6)] for v in at]
    return {"colorscale": scale, "cmin": -far, "cmax": far}, scale_ticks(values[np.isfinite(values)], -far, far)


def _tint(colour: str, strength: float) -> str:
    mixed = (round(255 + (int(colour[i : i + 2], 16) - 255) * strength) for i in (1, 3, 5))
    return f"rgb({', '.join(map(str, mixed))})"


@checked()
def ablation_sweep(result: Any, *, width: Width = "column") -> go.Figure:
    """Top-1 and loss against the share of ablated random neurons, one line per kind; bands range from the lowest to the highest seed.

    The lower panel shows top-1 under every kind minus top-1 under `mean` on the same neurons, seed by seed: what they share cancels.

    Args:
        result: what `sweep_ablation` returns.
        width: inches, "column" or "page".
    """
    config = result.config
    several: dict[Any, dict[str, Any]] = {kind: _by_seed(result, kind) for kind in config["kinds"]}
    reference = "mean" if "mean" in several else config["kinds"][0]
    traces: list[Any] = []
    layout: dict[str, Any] = {}
    gap, high, between = 0.23, 170, 62
    total = 2 * high + between
    panels = (("top1", (0.0, (1 - gap) / 2), 1), ("loss", ((1 + gap) / 2, 1.0), 1), ("top1", (0.0, 1.0), 0))
    for i, (metric, across, row) in enumerate(panels):
        (key, axes), paired = axes_of(i), row == 0
        for kind in config["kinds"]:
            values = several[kind][metric]
            if paired:
                if kind == reference:
                    continue
                values = values - several[reference][metric]
            traces += _with_band(kind, values, metric, f"minus {reference}" if paired else "", config, axes, i == 0)
        x = {"title": {"text": "Share ablated"}, "tickformat": ".0%", "range": [0, 1]}
        x["tickvals"] = [0, 0.25, 0.5, 0.75, 1] if paired else [0, 0.5, 1]
        title = metric_name(metric) + METRIC_UNITS.get(metric, "")
        said = f"{title}<br>minus {reference} ablation" if paired else title
        y = {"zeroline": True, "zerolinecolor": GREY, "zerolinewidth": 1} if paired else {"rangemode": "tozero"}
        down = (0, high / total) if paired else (1 - high / total, 1)
        layout |= panel_axes(key, x, {"title": {"text": said}, "nticks": 6, **y}, across, down)
    n = len(config["seeds"])
    said = f"<br>band: lowest to highest of {n} seeds" if n > 1 else "<br>one seed"
    layout["legend"] = {"title": {"text": f"{plain(config['task'])}<br>{SITE_NAMES[config['site']]}{said}"}}
    return new_figure(traces, layout, width=width, plot_px=total, right=20, legend_rows=len(config["kinds"]) + 3)


def _by_seed(result: Any, kind: Any) -> dict[str, Any]:
    """Metric -> table of the share ablated × seed."""
    table = result.table[result.table["kind"] == kind]
    return {metric: table.pivot(index="fraction", columns="seed", values=metric) for metric in ("top1", "loss")}


def _with_band(kind: Any, seeds: Any, metric: str, minus: str, config: Any, axes: dict[str, str], first: bool) -> list[Any]:
    """The mean of one kind over seeds, and its band."""
    colour, symbol = LOOK[kind]
    ablated, values = seeds.index.to_numpy(), seeds.to_numpy()
    low, mean, high = values.min(axis=1), values.mean(axis=1), values.max(axis=1)
    hovers = [
        f"<b>{kind} {minus}</b><br>{share:.0%} of {config['neurons']:,} {SITE_NAMES[config['site']]} ablated<br>"
        f"{metric_name(metric)} {mean[k]:.4g}, seeds {low[k]:.4g} to {high[k]:.4g}"
        for k, share in enumerate(ablated)
    ]
    look = {"mode": "lines+markers", "line": {"color": colour, "width": 1.5}, "marker": {"color": colour, "size": 5, "symbol": symbol}}
    hover = {"name": kind, "legendgroup": kind, "showlegend": first, "hovertext": hovers, "hoverinfo": "text"}
    return [
        band(ablated, low, high, translucent(colour, 0.18), legendgroup=kind, showlegend=False, **axes),
        go.Scatter(x=rounded(ablated), y=rounded(mean), **look, **hover, cliponaxis=False, **axes),
    ]
