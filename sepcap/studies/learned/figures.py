"""Figures of a learned order: its trajectory and that of its start, and the losses while it was learned (METHODS 21)."""

from typing import Any

import plotly.graph_objects as go

from sepcap.drawing.style import PALETTE, SYMBOLS, Width, new_figure, plain
from sepcap.drawing.themes import drawn

NAMES = {"learned": "Learned order", "start": "Start"}


@drawn
def trajectories(result: Any, texts: str = "evaluation", *, width: Width = "column") -> go.Figure:
    """Accuracy on both tasks, relative to the whole model, with growing shares of the order masked.

    Args:
        result: what `sepcap.learn_ranking` returns.
        texts: "evaluation", "held out" or "fitted".
        width: inches, "column" or "page".
    """
    traces = []
    for i, (order, name) in enumerate(NAMES.items()):
        rows, area = result.tables["trajectory"].query("texts == @texts and order == @order"), result.area(texts, order)
        x, y = (rows[role] / rows[role].iloc[0] for role in ("forget", "retain"))
        look = {"color": PALETTE[i], "symbol": SYMBOLS[i], "size": 6}
        hovers = [f"<b>{name}</b>, {100 * share:.0f}% masked" for share in rows["share"]]
        name = f"{name}: area {area['area']:.2f} [{area['area_low']:.2f}, {area['area_high']:.2f}]"
        how: dict[str, Any] = {"mode": "lines+markers", "marker": look, "line": {"color": PALETTE[i]}, "hovertext": hovers}
        traces.append(go.Scatter(x=x, y=y, name=name, hoverinfo="text+x+y", **how))
    axis = {"range": [-0.03, 1.1], "dtick": 0.2, "tickformat": ".1f"}
    layout = {
        f"{axis_name}axis": axis | {"title": {"text": f"Relative top-1 accuracy,<br>{plain(result.config[role], 22)} ({role})"}}
        for axis_name, role in (("x", "forget"), ("y", "retain"))
    }
    return new_figure(traces, layout, width=width, square=True, left=68, legend_rows=2)


@drawn
def losses(result: Any, *, width: Width = "column") -> go.Figure:
    """Loss on both tasks at every gradient step, against the share that was masked in it; darker is later.

    Args:
        result: what `sepcap.learn_ranking` returns.
        width: inches, "column" or "page".
    """
    table, cap = result.tables["history"], float(result.tables["cost"]["cap"].iloc[0])
    traces = []
    for i, role in enumerate(("forget", "retain")):
        name, n = f"{plain(result.config[role], 22)} ({role})", len(table)
        hovers = [f"<b>{name}</b>, step {step}: {loss:.3g} nats" for step, loss in zip(table["step"], table[role], strict=True)]
        look = {"color": PALETTE[i], "symbol": SYMBOLS[i], "size": 5, "opacity": [0.25 + 0.75 * step / n for step in table["step"]]}
        traces.append(
            go.Scatter(x=table["share"], y=table[role], mode="markers", name=name, marker=look, hovertext=hovers, hoverinfo="text")
        )
    ends = {"x": [0, 1], "y": [cap, cap], "mode": "lines", "line": {"color": PALETTE[0], "dash": "dot"}}
    traces.append(go.Scatter(name="unigram model of forget", hoverinfo="skip", **ends))
    layout = {"xaxis": {"title": {"text": "Share of the order masked"}}, "yaxis": {"title": {"text": "Loss [nats]"}}}
    return new_figure(traces, layout, width=width, plot_px=190, legend_rows=3)
