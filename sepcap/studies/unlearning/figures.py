"""Figures of a comparison of unlearning methods (METHODS 22)."""

from typing import Any

import plotly.graph_objects as go

from sepcap.drawing.parts import level
from sepcap.drawing.style import GREY, INK, PALETTE, SYMBOLS, Width, metric_name, new_figure, plain, rounded
from sepcap.drawing.themes import drawn
from sepcap.studies.certificate.arms import NAMES as OTHERS
from sepcap.studies.certificate.arms import REFERENCE, UNTOUCHED
from sepcap.studies.certificate.figures import curves, part_of

NAMES = {
    "prune": "Selective pruning",
    "prune+retain-finetune": "Pruning and fine-tuning on retain",
    "gradient-ascent": "Gradient ascent",
    "npo": "Negative preference optimisation",
    "task-arithmetic": "Negated task vector",
    "random": "Random pruning",
}
"""Method -> its name in figures."""

LOOKS = {
    kind: {"name": name, "color": colour, "symbol": symbol}
    for (kind, name), colour, symbol in zip(NAMES.items(), PALETTE, SYMBOLS, strict=True)
} | {
    UNTOUCHED: {"name": "Untouched model", "color": INK, "symbol": "cross"},
    REFERENCE: {"name": OTHERS[REFERENCE].capitalize(), "color": GREY, "symbol": "star"},
}
"""Kind of model -> its name, colour and symbol."""


@drawn
def plane(result: Any, *, width: Width = "column") -> go.Figure:
    """Trajectories in the plane of accuracies relative to the untouched model, mean over seeds; large symbols are the tested points.

    Args:
        result: what `sepcap.compare_unlearning` returns.
        width: inches, "column" or "page".
    """
    traces: list[Any] = []
    areas, points = (result.tables[name].set_index("method") for name in ("methods", "points"))
    for method, rows in result.tables["trajectory"].groupby("method", sort=False):
        look, area = LOOKS[method], areas.loc[method]
        name = f"{look['name']}: area {area['area']:.2f} [{area['area_low']:.2f}, {area['area_high']:.2f}]"
        hovers = [
            f"<b>{look['name']}</b>, point {row['point']}: {row['backward_tokens']:,.0f} tokens backward" for row in rows.to_dict("records")
        ]
        marker = {"color": look["color"], "symbol": look["symbol"], "size": 5}
        line = {"color": look["color"], "width": 1.5}
        how: dict[str, Any] = {"mode": "lines+markers", "marker": marker, "line": line, "cliponaxis": False}
        x, y = rounded(rows["forget"]), rounded(rows["retain"])
        traces.append(go.Scatter(x=x, y=y, name=name, hovertext=hovers, hoverinfo="text+x+y", **how))
        at = points.loc[method]
        large = {"color": look["color"], "symbol": look["symbol"], "size": 10, "line": {"color": INK, "width": 1}}
        traces.append(go.Scatter(x=[at["forget"]], y=[at["retain"]], mode="markers", marker=large, showlegend=False, hoverinfo="skip"))
    axis = {"rangemode": "tozero", "dtick": 0.2, "tickformat": ".1f"}
    layout: dict[str, Any] = {
        f"{name}axis": axis | {"title": {"text": f"Relative {metric_name(result.config['metric']).lower()},<br>{_task(result, role)}"}}
        for name, role in (("x", "forget"), ("y", "retain"))
    }
    layout["shapes"] = [level(1.0)]
    return new_figure(traces, layout, width=width, square=True, left=68, legend_rows=len(areas), legend_below=True)


def _task(result: Any, role: str) -> str:
    return f"{plain(result.config[role], 22)} ({role})"


@drawn
def relearning(result: Any, role: str = "forget", *, width: Width = "column") -> go.Figure:
    """Relative accuracy against the number of tokens of fine-tuning on forget, from the tested points; bands are 95% intervals.

    Args:
        result: what `sepcap.compare_unlearning` returns.
        role: "forget" or "retain".
        width: inches, "column" or "page".
    """
    return curves(result, part_of(result, "relearning", "relearn"), role, LOOKS, width)
