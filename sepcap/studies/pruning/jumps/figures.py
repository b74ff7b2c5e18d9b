"""Figures of jumps of accuracy: changes and their bigram part, and the targets that changed most (METHODS 11)."""

from typing import Any

import numpy as np
import plotly.graph_objects as go

from sepcap.drawing.parts import DOTTED, row_axis, upright
from sepcap.drawing.style import BLUE, GREY, INK, VERMILLION, Width, new_figure, plain, rounded
from sepcap.drawing.themes import drawn
from sepcap.errors import unknown

ROW_PX = 22


@drawn
def draw_jumps(result: Any, *, width: Width = "column") -> go.Figure:
    """The change of accuracy after every step with its 95% interval, and its part at predictions that the bigram path makes right.

    Args:
        result: what `run.jumps()` returns.
        width: inches, "column" or "page".
    """
    rows = result.tables["jumps"].to_dict("records")
    names = [f"step {row['step']}, {plain(row['task'], 20)}" for row in rows]
    traces: list[Any] = []
    for name, label, colour, shift in (("change", "All predictions", INK, 0.15), ("bigram", "Right by the bigram path", VERMILLION, -0.15)):
        heights = [len(rows) - 1 - i + shift for i in range(len(rows))]
        values = [(100 * row[name], 100 * row[f"{name}_low"], 100 * row[f"{name}_high"]) for row in rows]
        hovers = [
            f"<b>{n}</b><br>{label.lower()}: {value:+.2f} [{low:+.2f}, {high:+.2f}] points<br>{row['gained']:,} gained, {row['lost']:,} "
            f"lost of {row['n']:,} in {row['n_documents']:,} clusters of documents"
            for n, row, (value, low, high) in zip(names, rows, values, strict=True)
        ]
        traces += _points(values, heights, [colour] * len(rows), label, hovers)
    return _figure(traces, names, "Change of top-1 accuracy, percentage points", width, legend_rows=2)


@drawn
def draw_tokens(result: Any, *, step: int | None = None, role: str = "forget", width: Width = "column") -> go.Figure:
    """The targets that gained and lost most in a step: their part of the change of accuracy, with 95% intervals.

    The targets are those with the largest changes, which chance makes larger: intervals are of targets that were chosen beforehand.

    Args:
        result: what `run.jumps()` returns.
        step: default is the one with the largest change.
        role: "forget" or "retain".
        width: inches, "column" or "page".
    """
    jumps, tokens = result.tables["jumps"], result.tables["tokens"]
    if role not in set(jumps["role"]):
        raise unknown("role", role, jumps["role"].unique())
    of_role = jumps[jumps["role"] == role]
    step = int(of_role.loc[of_role["change"].abs().idxmax(), "step"]) if step is None else step
    if step not in set(jumps["step"]):
        raise unknown("step", str(step), map(str, jumps["step"].unique()))
    here = tokens[(tokens["step"] == step) & (tokens["role"] == role)]
    rows = here.sort_values("change", ascending=False, kind="stable").to_dict("records")
    if not rows:
        raise ValueError(f"no target of {role!r} changed in step {step}: there is nothing to draw")
    names = [plain(repr(row["text"]), 20) for row in rows]
    values = [tuple(100 * row[f"change{end}"] for end in ("", "_low", "_high")) for row in rows]
    hovers = [
        f"<b>{name}</b>, token {row['token']}<br>right {row['right_before']:,} times before and {row['right_after']:,} after, of "
        f"{row['count']:,}<br>{value:+.3f} [{low:+.3f}, {high:+.3f}] points"
        for name, row, (value, low, high) in zip(names, rows, values, strict=True)
    ]
    colours = [BLUE if value > 0 else VERMILLION for value, _, _ in values]
    traces = _points(values, [len(rows) - 1 - i for i in range(len(rows))], colours, "", hovers)
    task = plain(str(of_role["task"].iloc[0]), 20)
    return _figure(traces, names, f"Part of the change after step {step} on {task},<br>percentage points", width)


def _points(values: list[Any], heights: list[float], colours: list[str], name: str, hovers: list[str]) -> list[Any]:
    """Values with their intervals. Not error bars: a percentile interval need not contain the value."""
    lines = [
        go.Scatter(x=rounded([low, high]), y=[y, y], mode="lines", line={"color": colour, "width": 1.5}, hoverinfo="skip", showlegend=False)
        for (_, low, high), y, colour in zip(values, heights, colours, strict=True)
    ]
    marker = {"color": colours, "size": 6}
    points = {"mode": "markers", "marker": marker, "hovertext": hovers, "hoverinfo": "text", "name": name, "showlegend": bool(name)}
    return [*lines, go.Scatter(x=rounded([value for value, _, _ in values]), y=heights, **points)]


def _figure(traces: list[Any], names: list[str], title: str, width: Width, legend_rows: int = 0) -> go.Figure:
    n = len(names)
    ends = [0.0, *(x for trace in traces for x in trace.x if np.isfinite(x))]
    room = 0.05 * (max(ends) - min(ends) or 1.0)
    layout = {
        "xaxis": {"title": {"text": title}, "range": [min(ends) - room, max(ends) + room]},
        "yaxis": row_axis(dict(enumerate(reversed(names))), -0.6, n - 0.4),
        "shapes": [upright(0, -0.6, n - 0.4, {**DOTTED, "color": GREY}, layer="below")],
    }
    return new_figure(traces, layout, width=width, plot_px=ROW_PX * n + 16, left=120, bottom=56, legend_rows=legend_rows)
