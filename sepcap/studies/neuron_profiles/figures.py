"""Figures of neuron profiles: histograms and logit effects of one neuron, and all neurons on both tasks (METHODS 23)."""

from typing import Any

import numpy as np
import plotly.graph_objects as go

from sepcap.drawing.parts import above, panel_axes, row_axis
from sepcap.drawing.style import BLUE, GREEN, PURPLE, VERMILLION, Width, new_figure, plain, rounded
from sepcap.drawing.themes import drawn
from sepcap.studies.neuron_profiles.units import ROLES, named_unit

COLOURS = {"forget": VERMILLION, "retain": BLUE}

ROW_PX = 17

FEW = 8
"""Tokens of each list in a figure."""


@drawn
def profile(result: Any, *, neuron: Any = 0, width: Width = "column") -> go.Figure:
    """Histograms of one neuron on both tasks, and the tokens that it promotes and suppresses directly.

    Args:
        result: NeuronProfiles.
        neuron: row of the table, or place.
        width: inches, "column" or "page".
    """
    i = result.number(neuron)
    edges = result.tensors["edges"][i].numpy()
    traces: list[Any] = []
    for role, task in zip(ROLES, result.config["tasks"], strict=True):
        share = result.tensors[f"{role}/histogram"][i].numpy()
        x, y = np.repeat(edges, 2)[1:-1], np.repeat(np.where(share > 0, 100 * share, np.nan), 2)
        line = {"color": COLOURS[role], "width": 1.5}
        hover = f"{plain(task, 20)}: %{{y:.3g}}% at %{{x:.3g}}<extra></extra>"
        traces.append(go.Scatter(x=rounded(x), y=rounded(y), mode="lines", line=line, name=plain(task, 24), hovertemplate=hover))
    unit = result.table.iloc[i]
    logits = _logits(result, i)
    n = len(logits)
    split = (0.4, 0.55) if n else (0.0, 0.0)
    layout = panel_axes(
        "",
        {"title": {"text": f"Activation of {named_unit(unit)}"}},
        {"title": {"text": "Positions (%)"}, "type": "log", "nticks": 5},
        down=(split[1], 1.0),
    )
    if n:
        values = [value for _, value in logits]
        colours = [GREEN if value > 0 else PURPLE for value in values]
        names = {n - 1 - row: plain(repr(text), 16) for row, (text, _) in enumerate(logits)}
        hovers = [f"{plain(repr(text), 30)}: {value:+.3g}" for text, value in logits]
        bars = {"x": rounded(values), "y": list(range(n - 1, -1, -1)), "orientation": "h", "marker": {"color": colours}}
        traces.append(go.Bar(**bars, hovertext=hovers, hoverinfo="text", showlegend=False, xaxis="x2", yaxis="y2"))
        title = {"title": {"text": "Direct logit effect × scale of the norm"}}
        layout |= panel_axes("2", title, row_axis(names, -0.6, n - 0.4), down=(0.0, split[0]))
        layout["annotations"] = [above("Tokens promoted and suppressed", y=split[0])]
    layout["legend"] = {"title": {"text": "Activations on"}}
    return new_figure(traces, layout, width=width, plot_px=190 + (ROW_PX * n * 1.2 + 110) * bool(n), left=96, bottom=52, legend_rows=3)


def _logits(result: Any, i: int) -> list[tuple[str, float]]:
    tokens = result.tables["tokens"]
    here = tokens[(tokens["unit"] == i) & (tokens["rank"] <= FEW)]
    promoted, suppressed = (here[here["list"] == name] for name in ("promoted", "suppressed"))
    return [*zip(promoted["text"], promoted["value"], strict=True), *zip(suppressed["text"][::-1], suppressed["value"][::-1], strict=True)]


@drawn
def both_tasks(result: Any, *, width: Width = "column") -> go.Figure:
    """Mean absolute activation of every unit on both tasks.

    Args:
        result: NeuronProfiles.
        width: inches, "column" or "page".
    """
    table = result.table
    x, y = (table[f"abs_{role}"].to_numpy() for role in ROLES)
    hovers = [
        f"<b>{named_unit(unit)}</b><br>{plain(unit['preferred_forget'], 60)}<br>{plain(unit['preferred_retain'], 60)}"
        for unit in table.to_dict("records")
    ]
    most = float(max(x.max(), y.max())) * 1.05 or 1.0
    points = go.Scatter(
        x=rounded(x), y=rounded(y), mode="markers", marker={"color": BLUE, "size": 6}, hovertext=hovers, hoverinfo="text", showlegend=False
    )
    names = [plain(task, 24) for task in result.config["tasks"]]
    layout = {
        "xaxis": {"title": {"text": f"Mean |activation| on {names[0]}"}, "range": [-0.02 * most, most]},
        "yaxis": {"title": {"text": f"Mean |activation| on {names[1]}"}, "range": [-0.02 * most, most]},
        "shapes": [{"type": "line", "x0": 0, "x1": most, "y0": 0, "y1": most, "line": {"width": 1, "dash": "dot", "color": "#8a8a8a"}}],
    }
    return new_figure([points], layout, width=width, plot_px=260, left=64, bottom=52)
