"""Figures of single ablations: the effect against a score, both tasks against each other, layers, and pairs (METHODS 19)."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from sepcap.drawing.heat import heat_panels
from sepcap.drawing.parts import above, axes_of, layer_axis, level, panel_axes, upright
from sepcap.drawing.style import (
    BLUE,
    FAINT,
    METRIC_UNITS,
    TICK_PX,
    VERMILLION,
    Width,
    chosen_layers,
    lower,
    metric_name,
    new_figure,
    plain,
    rounded,
)
from sepcap.drawing.themes import drawn

MOST = 6_000
"""Largest number of points of a figure."""

ROLES = {"forget": VERMILLION, "retain": BLUE}
PANEL_PX = 120
GAP_PX = 46
ACROSS = 3
NAMED = 24
"""Largest number of neurons in a heat map of pairs."""


NEAR = 0.2
"""Share of half an axis within which no tick but 0 is labelled."""


class SignedLog:
    """A logarithmic axis on both sides of 0, linear between −unit and unit: sign(v) · log10(1 + |v| / unit)."""

    def __init__(self, values: np.ndarray) -> None:
        size = np.abs(values[np.isfinite(values) & (values != 0)])
        self.unit = 10.0 ** np.floor(np.log10(np.median(size))) if size.size else 1.0
        self.most = float(size.max(initial=self.unit))

    def of(self, values: Any) -> np.ndarray:
        """Places of values on the axis."""
        values = np.asarray(values, dtype=float)
        return np.asarray(np.sign(values) * np.log10(1 + np.abs(values) / self.unit))

    def axis(self, title: str) -> dict[str, Any]:
        """The axis, with ticks at 0 and at powers of ten."""
        first, last = int(np.log10(self.unit)), int(np.floor(np.log10(self.most)))
        sizes = [10.0**e for e in range(first, last + 1, max(1, (last - first + 1) // 3))]
        far = 1.06 * float(self.of(self.most))
        sizes = [size for size in sizes if self.of(size) > NEAR * far] or sizes[-1:]  # the label of one nearer to 0 would lie on that of 0
        ticks = [-size for size in sizes[::-1]] + [0.0] + sizes
        said = [f"{tick:g}".replace("-", "−") for tick in ticks]
        return {"title": {"text": title}, "tickvals": rounded(self.of(ticks)), "ticktext": said, "range": [-far, far]}


def _shown(values: np.ndarray) -> np.ndarray:
    """Numbers of the points to draw: all, or half of them the largest effects and half evenly spaced over the rest."""
    if len(values) <= MOST:
        return np.arange(len(values))
    order = np.argsort(-np.abs(values), kind="stable")
    rest = order[MOST // 2 :]
    return np.sort(np.concatenate([order[: MOST // 2], rest[:: -(-len(rest) // (MOST // 2))]]))


def _change(result: Any, task: str, metric: str) -> str:
    return f"Change of {lower(metric_name(metric))} on<br>{plain(result.config[task], 22)}{METRIC_UNITS.get(metric, '')}"


def _places(result: Any, numbers: Any) -> list[str]:
    names = [name for name in ("layer", "head", "neuron") if name in result.tables["neurons"]]
    return [", ".join(f"{name} {n}" for name, n in zip(names, result.places[i], strict=False)) for i in numbers]


def _points(result: Any, x: np.ndarray, y: np.ndarray, numbers: np.ndarray, said: list[str], colour: str, **more: Any) -> go.Scatter:
    hover = [f"<b>{place}</b><br>{text}" for place, text in zip(_places(result, numbers), said, strict=True)]
    marker = {"color": colour, "size": 4, "opacity": 0.5}
    return go.Scatter(x=rounded(x), y=rounded(y), mode="markers", marker=marker, hovertext=hover, hoverinfo="text", **more)


def _heading(result: Any, shown: int) -> str:
    n = len(result.places)
    some = f"; {shown:,} shown, among them the largest effects" if shown < n else ""
    return f"{n:,} {result.config['site']} {result.unit}s, each ablated alone ({result.config['kind']}){some}"


@drawn
def effect_and_score(
    result: Any, task: str = "forget", metric: str = "loss", *, layers: Sequence[int] | None = None, width: Width = "page"
) -> go.Figure:
    """Change of a metric when each neuron alone is ablated, against its score; a panel per layer.

    Args:
        result: what `sepcap.ablate_each` returns.
        task: "forget" or "retain".
        metric: "loss" or "top1".
        layers: layers to draw; default all that were ablated.
        width: inches, "column" or "page".

    Source: METHODS 19.
    """
    table = result.tables["neurons"]
    values, scores = table[f"delta_{metric}_{task}"].to_numpy(), table["score"].to_numpy()
    there = chosen_layers(layers, sorted(table["layer"].unique().tolist()))
    drawn = _shown(values)
    scale, across = SignedLog(values), min(ACROSS, len(there))
    positive = bool((scores >= 0).all())
    low = np.log10(scores[scores > 0].min(initial=1.0)) - 0.3 if positive else 0.0
    x_of = (lambda s: np.log10(np.maximum(s, 10.0**low))) if positive else SignedLog(scores).of
    rows = -(-len(there) // across)
    total = rows * PANEL_PX + (rows - 1) * GAP_PX
    share = (1 - 0.04 * (across - 1)) / across
    ends = (float(x_of(scores).min()), float(x_of(scores).max()))
    room = 0.05 * (ends[1] - ends[0] or 1.0)
    traces: list[Any] = []
    layout: dict[str, Any] = {"annotations": [above(_heading(result, len(drawn)), shift=22, font={"size": TICK_PX})], "shapes": []}
    for i, layer in enumerate(there):
        (key, axes), (row, column) = axes_of(i), divmod(i, across)
        here = drawn[result.places[drawn, 0] == layer]
        said = [f"{lower(metric_name(metric))} {values[n]:+.3g}, score {scores[n]:.3g}" for n in here]
        traces.append(_points(result, x_of(scores[here]), scale.of(values[here]), here, said, ROLES[task], showlegend=False, **axes))
        start, top = column * (share + 0.04), 1 - row * (PANEL_PX + GAP_PX) / total
        bottom = i + across >= len(there)
        name = f"{'log<sub>10</sub> ' if positive else ''}score ({result.config['importance']})"
        x = {"title": {"text": name if bottom else ""}, "range": [ends[0] - room, ends[1] + room], "nticks": 5}
        y = {**scale.axis(_change(result, task, metric) if column == 0 else ""), "showticklabels": column == 0}
        layout |= panel_axes(key, x, y, (start, start + share), (top - PANEL_PX / total, top))
        layout["annotations"].append(above(f"Layer {layer}", start, top))
        layout["shapes"].append(upright_zero(key))
    return new_figure(traces, layout, width=width, plot_px=total, left=76, top=42, bottom=48)


def upright_zero(key: str) -> dict[str, Any]:
    """A faint line at an effect of 0."""
    where = {"xref": f"x{key} domain", "yref": f"y{key}", "x0": 0, "x1": 1, "y0": 0, "y1": 0}
    return {"type": "line", **where, "line": {"color": FAINT, "width": 1}, "layer": "below"}


@drawn
def both_tasks(result: Any, metric: str = "loss", *, width: Width = "column") -> go.Figure:
    """Change of a metric on the task to retain against that on the task to forget, a point per neuron.

    Args:
        result: what `sepcap.ablate_each` returns.
        metric: "loss" or "top1".
        width: inches, "column" or "page".
    """
    table = result.tables["neurons"]
    x, y = (table[f"delta_{metric}_{task}"].to_numpy() for task in ("forget", "retain"))
    scale, drawn = SignedLog(np.concatenate([x, y])), _shown(np.maximum(np.abs(x), np.abs(y)))
    said = [f"{plain(result.config['forget'])} {x[n]:+.3g}<br>{plain(result.config['retain'])} {y[n]:+.3g}" for n in drawn]
    far = scale.axis("")["range"][1]
    layout = {
        "xaxis": scale.axis(_change(result, "forget", metric)),
        "yaxis": scale.axis(_change(result, "retain", metric)),
        "shapes": [
            level(0, {"color": FAINT, "width": 1}, layer="below"),
            upright(0, -far, far, {"color": FAINT, "width": 1}, layer="below"),
            {
                "type": "line",
                "x0": -far,
                "y0": -far,
                "x1": far,
                "y1": far,
                "line": {"color": FAINT, "width": 1, "dash": "dot"},
                "layer": "below",
            },
        ],
        "annotations": [above(_heading(result, len(drawn)).replace(", each", ",<br>each"), align="left", font={"size": TICK_PX})],
    }
    traces = [_points(result, scale.of(x[drawn]), scale.of(y[drawn]), drawn, said, BLUE)]
    return new_figure(traces, layout, width=width, left=76, top=40, bottom=60, square=True)


@drawn
def over_layers(result: Any, metric: str = "loss", *, width: Width = "column") -> go.Figure:
    """Median and the middle 90% of the changes in every layer, on both tasks, and the largest one.

    Args:
        result: what `sepcap.ablate_each` returns.
        metric: "loss" or "top1".
        width: inches, "column" or "page".
    """
    table = result.tables["neurons"]
    layers = sorted(table["layer"].unique().tolist())
    every = np.concatenate([table[f"delta_{metric}_{task}"].to_numpy() for task in ROLES])
    scale = SignedLog(every)
    traces: list[Any] = []
    for (task, colour), shift in zip(ROLES.items(), (-0.12, 0.12), strict=True):
        of = [table.loc[table["layer"] == layer, f"delta_{metric}_{task}"].to_numpy() for layer in layers]
        q = np.array([np.quantile(values, (0.05, 0.5, 0.95)) for values in of])
        at, middle = np.array(layers) + shift, scale.of(q[:, 1])
        bars = {
            "type": "data",
            "symmetric": False,
            "array": rounded(scale.of(q[:, 2]) - middle),
            "arrayminus": rounded(middle - scale.of(q[:, 0])),
        }
        said = [
            f"<b>layer {layer}</b>, {len(v):,} {result.unit}s<br>median {m[1]:+.2g}, 5% {m[0]:+.2g}, 95% {m[2]:+.2g}"
            for layer, v, m in zip(layers, of, q, strict=True)
        ]
        name = f"{plain(result.config[task], 24)}: median, middle 90%"
        look = {"mode": "markers", "marker": {"color": colour, "size": 6}, "error_y": {**bars, "width": 0}}
        traces.append(go.Scatter(x=rounded(at), y=rounded(middle), name=name, hovertext=said, hoverinfo="text", **look))
        most = np.array([values.max() for values in of])
        marker = {"color": colour, "size": 6, "symbol": "triangle-up-open"}
        said = [f"<b>layer {layer}</b>: largest {value:+.3g}" for layer, value in zip(layers, most, strict=True)]
        name = f"{plain(result.config[task], 24)}: largest"
        traces.append(
            go.Scatter(x=rounded(at), y=rounded(scale.of(most)), mode="markers", marker=marker, name=name, hovertext=said, hoverinfo="text")
        )
    title = f"Change of {lower(metric_name(metric))}{METRIC_UNITS.get(metric, '')}"
    layout = {
        "xaxis": layer_axis(layers, 0.5),
        "yaxis": scale.axis(title),
        "shapes": [level(0, {"color": FAINT, "width": 1}, layer="below")],
    }
    return new_figure(traces, layout, width=width, plot_px=200, left=66, legend_rows=len(traces))


@drawn
def backups(result: Any, task: str = "forget", metric: str = "loss", *, width: Width = "column") -> go.Figure:
    """Synergy of pairs, Δ(n, m) − Δ(n) − Δ(m), as a matrix: above 0, each of the two compensates for the loss of the other.

    Args:
        result: what `sepcap.ablate_each` returns, with `pairs=`.
        task: "forget" or "retain".
        metric: "loss" or "top1".
        width: inches, "column" or "page".

    Raises:
        ValueError: no pairs were ablated.

    Source: [SEP] 3.5.1; METHODS 19.
    """
    value, low, high = result.synergy(task, metric)
    pairs = result.tensors["pairs"].numpy()
    strength = np.bincount(pairs.ravel(), np.repeat(np.abs(value), 2))
    members = np.unique(pairs)
    shown = np.sort(members[np.argsort(-strength[members], kind="stable")[:NAMED]])
    at = {int(n): i for i, n in enumerate(shown)}
    cells = np.full((len(shown), len(shown)), np.nan)
    hovers = [["" for _ in shown] for _ in shown]
    places = dict(zip(shown.tolist(), _places(result, shown), strict=True))
    for (a, b), v, begin, end in zip(pairs.tolist(), value, low, high, strict=True):
        if a in at and b in at:
            for i, j in ((at[a], at[b]), (at[b], at[a])):
                cells[i, j] = v
                hovers[i][j] = f"<b>{places[a]} and {places[b]}</b><br>synergy {v:+.3g} [{begin:+.3g}, {end:+.3g}]"
    # on a scale of its own: most synergies are small beside the largest
    scale = SignedLog(cells)
    placed = np.where(np.isfinite(cells), scale.of(np.nan_to_num(cells)), np.nan)
    far = float(np.nanmax(np.abs(placed), initial=0.0)) or 1.0
    names = [".".join(map(str, result.places[n])) for n in shown]
    left_out = f"<br>the {len(shown)} with the largest synergies of {len(members)}" if len(shown) < len(members) else ""
    figure = heat_panels(
        {"Synergy": placed},
        names,
        names,
        hovers={"Synergy": hovers},
        heading=f"{plain(result.config[task], 24)}; {lower(metric_name(metric))}{METRIC_UNITS.get(metric, '')}{left_out}",
        title=f"Synergy{METRIC_UNITS.get(metric, '')}",
        row_title=f"{result.unit.capitalize()} ({'.'.join(n for n in ('layer', 'head', 'neuron') if n in result.tables['neurons'])})",
        column_title=f"{result.unit.capitalize()}",
        limits=(-far, far),
        decimals=None,
        width=width,
    )
    layout: Any = figure.layout
    axis = scale.axis("")
    layout.coloraxis.colorbar.update(tickvals=axis["tickvals"], ticktext=axis["ticktext"])
    layout.coloraxis.colorscale = [[0.0, BLUE], [0.5, "#ffffff"], [1.0, VERMILLION]]
    return figure
