"""Comparison of pruning methods: separability per method and direction, grouped by what is pruned (METHODS 11)."""

from itertools import groupby
from typing import Any

import numpy as np
import plotly.graph_objects as go

from sepcap.checks import checked
from sepcap.drawing.parts import entry, level, row_axis, upright
from sepcap.drawing.style import BLUE, FAINT, GREY, INK, SYMBOLS, TICK_PX, VERMILLION, Width, lower, metric_name, new_figure, plain, rounded
from sepcap.drawing.themes import drawn
from sepcap.studies.methods.config import METHODS
from sepcap.studies.pruning.config import DIRECTIONS

ROW_PX = 24
SHIFT = 0.2
TITLES = {"mlp": "MLP neurons", "attention": "Attention pre-out neurons", "heads": "Attention heads", "both": "MLP and attention"}


@drawn
@checked()
def methods(result: Any, metric: str = "top1", *, width: Width = "column") -> go.Figure:
    """Separability 100·(A − 1) of every method, mean over seeds, with its 95% bootstrap interval over texts; single seeds are small dots.

    0 means that both tasks drop together, 100 that the retain task is kept to the end. Open symbols are the random neurons of each method,
    with the same offset and in the same basis, the mean over their seeds.

    Args:
        result: what `compare_methods` returns.
        metric: "top1", "top10", "skip50_top1" or "skip50_top10".
        width: inches, "column" or "page".
    """
    name = metric_name(metric)
    table = result.by_metric(metric).to_dict("records")
    names = list(dict.fromkeys(row["method"] for row in table))
    heights: dict[str, float] = {}
    headings: list[tuple[str, float]] = []
    y = 0.0
    for site, of_site in groupby(names, key=lambda method: METHODS[method].site):
        headings.append((TITLES[site], y))
        for method in of_site:
            y -= 1
            heights[method] = y
        y -= 1
    traces: list[Any] = []
    for direction, colour, symbol, up in zip(DIRECTIONS, (VERMILLION, BLUE), SYMBOLS, (SHIFT, -SHIFT), strict=False):
        label = f"forget {result.task(direction)}"
        rows = [row for row in table if row["direction"] == label]
        at = [heights[row["method"]] + up for row in rows]
        ends: list[Any] = [[], []]
        dots: list[Any] = [[], []]
        for row, height in zip(rows, at, strict=True):
            ends[0] += [*rounded((row["low"], row["high"])), None]
            ends[1] += [height, height, None]
            by_seed = [100 * (s.area - 1) for s in result.separabilities(row["method"], direction, metric)]
            dots[0] += rounded(by_seed)
            dots[1] += [height] * len(by_seed)
        quiet = {"legendgroup": label, "showlegend": False, "hoverinfo": "skip", "cliponaxis": False}
        traces.append(go.Scatter(x=ends[0], y=ends[1], mode="lines", line={"color": colour, "width": 1.3}, **quiet))
        traces.append(go.Scatter(x=dots[0], y=dots[1], mode="markers", marker={"color": colour, "size": 3, "opacity": 0.6}, **quiet))
        filled = {"symbol": symbol, "size": 6, "color": colour, "line": {"color": colour, "width": 1.3}}
        shown: dict[str, Any] = {"y": at, "mode": "markers", "hoverinfo": "text", "showlegend": False, "cliponaxis": False}
        if any(np.isfinite(row["random_separability"]) for row in rows):
            values, texts = [row["random_separability"] for row in rows], [_hover_random(row) for row in rows]
            traces.append(go.Scatter(x=rounded(values), marker=filled | {"color": "white"}, hovertext=texts, **shown))
        values, texts = [row["separability"] for row in rows], [_hover(row) for row in rows]
        traces.append(go.Scatter(x=rounded(values), marker=filled, hovertext=texts, **shown))
        traces.append(entry(plain(label), mode="markers", marker={"symbol": symbol, "size": 6, "color": colour}))
    bounds = [row[column] for row in table for column in ("low", "high", "separability", "random_separability")]
    low, high = np.nanmin([0.0, *bounds]), np.nanmax([10.0, *bounds])
    margin = 0.04 * (high - low)
    layout = {
        "xaxis": {
            "title": {"text": f"Separability, {lower(name)} (%)"},
            "range": [low - margin, high + margin],
            "showgrid": True,
            "gridcolor": FAINT,
            "gridwidth": 0.5,
        },
        "yaxis": row_axis({at: METHODS[method].label for method, at in heights.items()}, y + 0.5, 0.6),
        "legend": {
            "title": {"text": "Mean over seeds, with 95% interval over texts<br>small dots: single seeds; open symbols: random neurons"}
        },
        "annotations": [
            {"text": f"<b>{text}</b>", "x": 0, "xref": "paper", "xanchor": "right", "xshift": -4, "y": at, "font": {"size": TICK_PX}}
            for text, at in headings
        ],
        "shapes": [
            upright(0, y + 0.5, 0.6, {"color": INK, "width": 1}, layer="below"),
            *(level(at, {"color": GREY, "width": 0.5}, layer="below") for _, at in headings[1:]),
        ],
    }
    return new_figure(traces, layout, width=width, plot_px=ROW_PX * (0.1 - y), left=150, legend_rows=4)


def _hover(row: dict[str, Any]) -> str:
    lines = [
        f"<b>{METHODS[row['method']].label}</b>, {TITLES[row['site']]}",
        plain(row["direction"]),
        f"separability {row['separability']:.1f}% [{row['low']:.1f}, {row['high']:.1f}]",
        f"largest differential drop {row['max_drop']:.1f} [{row['max_drop_low']:.1f}, {row['max_drop_high']:.1f}] points, "
        f"step {row['max_drop_step']:.1f}",
        f"intervals over {row['n_clusters']:,.0f} clusters of documents",
    ]
    if np.isfinite(row["seeds_sd"]):
        lines.append(f"standard deviation over {row['seeds']} seeds {row['seeds_sd']:.1f}")
    if np.isfinite(row["minus_random"]):
        gain = f"{row['minus_random']:.1f} [{row['minus_random_low']:.1f}, {row['minus_random_high']:.1f}]"
        lines.append(f"minus random neurons ({row['random']}) {gain}")
    return "<br>".join(lines)


def _hover_random(row: dict[str, Any]) -> str:
    spread = f", standard deviation {row['random_seeds_sd']:.1f}" if np.isfinite(row["random_seeds_sd"]) else ""
    return (
        f"<b>random neurons for {METHODS[row['method']].label}</b> ({row['random']})<br>separability {row['random_separability']:.1f}% "
        f"[{row['random_low']:.1f}, {row['random_high']:.1f}]<br>{row['random_seeds']} seeds{spread}"
    )
