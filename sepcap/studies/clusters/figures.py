"""Concentration of task neurons in clusters: over clusters, and over layers (METHODS 12)."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from sepcap.checks import checked
from sepcap.drawing.parts import band, error_bars, layer_axis, level, translucent
from sepcap.drawing.style import (
    BLUE,
    DASHES,
    GREEN,
    GREY,
    INK,
    ORANGE,
    PURPLE,
    SKY,
    SYMBOLS,
    VERMILLION,
    Width,
    chosen_layers,
    new_figure,
    plain,
    rounded,
)
from sepcap.errors import unknown
from sepcap.selection.concentration import ACTIVITY, LAYER, Null
from sepcap.studies.clusters.config import LEAST, MOST, SCORE

LOOK = {
    ("trained", "moefied", SCORE): ("MoEfication clusters", VERMILLION, SYMBOLS[0], DASHES[0]),
    ("trained", "index", SCORE): ("arbitrary clusters (neuron index modulo k)", BLUE, SYMBOLS[1], DASHES[1]),
    ("random", "moefied", SCORE): ("MoEfication, random weights", GREEN, SYMBOLS[2], DASHES[3]),
    ("trained", "moefied", LEAST): ("neurons least active on retain", PURPLE, SYMBOLS[3], DASHES[4]),
    ("trained", "moefied", MOST): ("neurons most active on retain", SKY, SYMBOLS[4], DASHES[5]),
}
"""Weights, clusters and choice of neurons -> name of the line, colour, symbol and dash."""

CHANCE = {
    ("trained", LAYER): ("random sets, as many per layer", GREY),
    ("trained", ACTIVITY): ("random sets, matched on activity too", INK),
    ("random", LAYER): ("random sets per layer, random weights", ORANGE),
}
"""Weights and what random sets are matched on -> name of the line and its colour."""

SHIFT = 0.16
"""Distance between the points of one layer, in layers, so that their intervals do not overlap."""


@checked()
def concentration_curve(result: Any, *, fraction: float | None = None, task: str | None = None, width: Width = "column") -> go.Figure:
    """Cumulative share of the task neurons over clusters, fullest clusters first, mean over seeds, tasks and layers.

    For comparison: sets of as many neurons in every layer, chosen by their activity on the retain task alone. Dotted lines are means
    of random sets with as many neurons in every layer, or also in every bin of activity; their bands contain 95% of single random sets.
    The model with random weights has its own random sets, because its task neurons are in other layers. The legend gives the area
    under each line; the axis ends after all lines have reached 100%.

    Args:
        result: what `sepcap.measure_modularity` returns.
        fraction: selected share of the mlp neurons; default is the middle one of the configuration.
        task: a single task; default is the mean over all.
        width: inches, "column" or "page".

    Source: [MOD]; METHODS section 12.
    """
    fraction, chosen = _chosen(result, fraction, task)
    totals: Any = result.tables["areas"]
    totals = totals[totals["layer"].isna()].reset_index(drop=True)
    mine = ((totals["fraction"] == fraction) & totals["task"].isin(chosen) & (totals["neurons"] > 0)).to_numpy()
    curves, chance = result.tensors["curves"].numpy(), result.tensors["chance"].numpy()
    points = np.linspace(0, 100, curves.shape[1])
    x = rounded(points)
    lines: list[Any] = []
    bands: list[Any] = []
    for (weights, clusters, how), (name, colour, _, dash) in LOOK.items():
        of = (totals["weights"] == weights) & (totals["clusters"] == clusters) & (totals["chosen"] == how)
        rows = mine & of.to_numpy() & (totals["null"] == LAYER).to_numpy()
        if not rows.any():
            continue
        lines.append(
            (name, 100 * curves[rows].mean(axis=0), totals.loc[rows, "area"].mean(), {"color": colour, "width": 1.8, "dash": dash})
        )
        for (of_weights, null), (said, tint) in CHANCE.items():
            rows = mine & of.to_numpy() & (totals["null"] == null).to_numpy()
            if of_weights != weights or (clusters, how) != ("moefied", SCORE) or not rows.any():
                continue
            mean, low, high = 100 * chance[rows].mean(axis=0)
            bands.append(band(x, low, high, translucent(tint), showlegend=False))
            lines.append((said, mean, totals.loc[rows, "chance"].mean(), {"color": tint, "width": 1, "dash": DASHES[2]}))
    traces = list(bands)
    for name, y, area, line in lines:
        hover = f"<b>{name}</b><br>%{{y:.1f}}% in %{{x:.0f}}% of the clusters<extra></extra>"
        shown = {"name": f"{name}: {area:.3f}", "hovertemplate": hover}
        traces.append(go.Scatter(x=x, y=rounded(y), mode="lines", line=line, **shown))
    # the axis ends after all lines have reached 100%
    arrived = max(points[np.argmax(y > 99.9)] for _, y, _, _ in lines)
    far = next(end for end in (25, 50, 75, 100) if end >= arrived)
    layout = {
        "xaxis": {"title": {"text": "Clusters, fullest first (%)"}, "range": [0, far], "nticks": 6},
        "yaxis": {"title": {"text": "Task neurons in these clusters (%)"}, "range": [0, 101], "tickvals": [0, 25, 50, 75, 100]},
        "legend": {
            "title": {
                "text": _title(result, fraction, task)
                + "<br>numbers: area under the line (0.5: even, 1: one cluster)<br>bands: 95% of single random sets"
            }
        },
    }
    return new_figure(traces, layout, width=width, plot_px=250, right=22, legend_rows=len(lines) + 4)


@checked()
def concentration_profile(
    result: Any,
    *,
    fraction: float | None = None,
    task: str | None = None,
    layers: Sequence[int] | None = None,
    null: Null = ACTIVITY,
    width: Width = "column",
) -> go.Figure:
    """Concentration of the task neurons layer by layer: mean over seeds, pooled over tasks, with 95% intervals over seeds.

    0 is the value of random sets, 1 the maximum for this number of neurons. Intervals are drawn between −1 and 1; a triangle marks an
    interval that continues beyond that end.

    Args:
        result: what `sepcap.measure_modularity` returns.
        fraction: selected share of the mlp neurons; default is the middle one of the configuration.
        task: a single task; default is all, pooled.
        layers: layers to draw; default all.
        null: what the random sets are matched on: "layer and activity", or "layer", which includes sets chosen by activity alone.
        width: inches, "column" or "page".

    Source: [MOD]; METHODS section 12.
    """
    if null not in (LAYER, ACTIVITY):
        raise unknown("null", null, (LAYER, ACTIVITY))
    fraction, _ = _chosen(result, fraction, task)
    table: Any = result.estimates(("layer",) if task is None else ("task", "layer"))
    table = table[(table["fraction"] == fraction) & (table["null"] == null) & np.isfinite(table["concentration"])]
    if task is not None:
        table = table[table["task"] == task]
    shown_layers = chosen_layers(layers, range(result.tensors[f"labels-trained-{result.config['seeds'][0]}"].shape[0]))
    table = table[table["layer"].isin(shown_layers)]
    traces: list[Any] = []
    cut: list[Any] = []
    ends: list[float] = [-0.1, 0.1]
    bounds = (min(-1.0, *table["concentration"]), 1.0)
    there = dict(iter(table.groupby(["weights", "clusters", "chosen"], sort=False)))
    shown = [key for key in LOOK if key in there]
    for i, key in enumerate(shown):
        name, colour, symbol, dash = LOOK[key]
        rows = there[key].to_dict("records")
        value, whole_low, whole_high = (np.array([row[f"concentration{end}"] for row in rows]) for end in ("", "_low", "_high"))
        low, high = (np.clip(whole, *bounds) for whole in (whole_low, whole_high))
        x = np.array([row["layer"] + SHIFT * (i - (len(shown) - 1) / 2) for row in rows])
        for outside, bound, triangle in ((whole_low < low, bounds[0], "triangle-down"), (whole_high > high, bounds[1], "triangle-up")):
            cut += [_goes_on(x[outside], bound, triangle, colour)] if outside.any() else []
        ends += [float(v) for v in (*value, *low, *high) if np.isfinite(v)]
        traces.append(
            go.Scatter(
                x=x.tolist(),
                y=rounded(value),
                error_y=error_bars(value, low, high, thickness=1.2, width=2, color=colour),
                mode="lines+markers",
                name=name,
                line={"color": colour, "width": 1, "dash": dash},
                marker={"color": colour, "size": 6, "symbol": symbol},
                hovertext=[_hover(name, row) for row in rows],
                hoverinfo="text",
                cliponaxis=False,
            )
        )
    pad = 0.05 * (max(ends) - min(ends))
    seeds = len(result.config["seeds"])
    notes = "<br>random sets matched on " + null
    notes += f"<br>95% intervals over {seeds} seeds" if seeds > 1 else "<br>one seed: no intervals"
    notes += "<br>triangles: the interval continues" if cut else ""
    empty = [str(n) for n in shown_layers if n not in set(table.loc[table["weights"] == "trained", "layer"])]
    notes += f"<br>no selected neurons in layer {', '.join(empty[:6])}{', …' * (len(empty) > 6)}" if empty else ""
    layout = {
        "xaxis": layer_axis(shown_layers, 0.5),
        "yaxis": {"title": {"text": "Concentration (0: random, 1: maximum)"}, "range": [min(ends) - pad, max(ends) + pad], "dtick": 0.25},
        "shapes": [level(0, layer="below")],
        "legend": {"title": {"text": _title(result, fraction, task) + notes}},
    }
    return new_figure([*traces, *cut], layout, width=width, plot_px=230, legend_rows=len(traces) + 4 + bool(cut) + bool(empty))


def _goes_on(x: np.ndarray, bound: float, triangle: str, colour: str) -> go.Scatter:
    """Marks at the ends of intervals that continue beyond the axis."""
    marker = {"symbol": triangle, "size": 7, "color": colour}
    y = [bound] * len(x)
    return go.Scatter(x=x.tolist(), y=y, mode="markers", marker=marker, hoverinfo="skip", showlegend=False, cliponaxis=False)


def _chosen(result: Any, fraction: float | None, task: str | None) -> tuple[float, list[str]]:
    fractions, tasks = result.config["fractions"], result.config["tasks"]
    if fraction is not None and fraction not in fractions:
        raise ValueError(f"fraction={fraction}: the study has {', '.join(map(str, fractions))}")
    if task is not None and task not in tasks:
        raise unknown("task", task, tasks)
    return fractions[len(fractions) // 2] if fraction is None else fraction, list(tasks) if task is None else [task]


def _title(result: Any, fraction: float, task: str | None) -> str:
    tasks = result.config["tasks"]
    what = task if task is not None else tasks[0] if len(tasks) == 1 else f"{len(tasks)} tasks"
    how = f"top {100 * fraction:.3g}% of the MLP neurons; k = {result.config['k']} clusters per layer"
    return f"{plain(what)} against {plain(result.config['retain'])}<br>{how}"


def _hover(name: str, row: dict[str, Any]) -> str:
    ends = f" [{row['concentration_low']:.3f}, {row['concentration_high']:.3f}]" if np.isfinite(row["concentration_low"]) else ""
    return (
        f"<b>{name}</b>, layer {row['layer']}<br>concentration {row['concentration']:.3f}{ends}".replace("-", "−")
        + f"<br>area {row['area']:.3f}, random sets {row['chance']:.3f}<br>{row['neurons']:.3g} task neurons per seed"
    )
