"""Figures of the effect of pruning one task on the others (METHODS 12)."""

from typing import Any

import numpy as np
import plotly.graph_objects as go

from sepcap.checks import checked
from sepcap.drawing.heat import heat_panels
from sepcap.drawing.parts import level
from sepcap.drawing.style import PALETTE, SITE_NAMES, SYMBOLS, Width, capital, metric_name, new_figure, plain, rounded
from sepcap.drawing.themes import drawn

SHOWN = {"relative": "Selected neurons", "random": "Random neurons"}


@drawn
@checked()
def cross_task(result: Any, *, width: Width = "column") -> go.Figure:
    """Pruned task × evaluated task: relative accuracy with selected neurons pruned, and with as many random ones.

    Args:
        result: what `sepcap.prune_across_tasks` returns.
        width: inches, "column" or "page".

    Source: [MOD].
    """
    tasks, config = list(result.config["tasks"]), result.config
    panels = {label: result.matrix(column).to_numpy(dtype=float) for column, label in SHOWN.items()}
    hovers = {label: _cells(result, column, label) for column, label in SHOWN.items()}
    metric = metric_name(config["metric"])
    seeds = len(config["seeds"])
    named = f"{metric}, {SITE_NAMES[config['site']]}; target {100 * config['target']:.3g}%"
    heading = f"{named}<br>random: mean of {seeds} seed{'s' * (seeds > 1)}"
    top = max(1.0, float(np.nanmax([panel.max() for panel in panels.values()])))
    return heat_panels(
        panels,
        tasks,
        tasks,
        hovers=hovers,
        heading=heading,
        title="Relative accuracy",
        row_title="Pruned for",
        column_title="Evaluated on",
        limits=(0.0, top),
        width=width,
    )


def _cells(result: Any, column: str, label: str) -> list[list[str]]:
    tasks = list(result.config["tasks"])
    said = {}
    for row in result.tables["matrix"].to_dict("records"):
        whose = f" for {plain(row['pruned'])}" if column == "relative" else ""
        said[row["pruned"], row["evaluated"]] = (
            f"<b>{plain(row['evaluated'])}</b>, {row['n']:,} neurons pruned ({100 * row['fraction']:.1f}%), {label.lower()}{whose}"
            f"<br>relative accuracy {row[column]:.3f} [{row[f'{column}_low']:.3f}, {row[f'{column}_high']:.3f}]"
            f"<br>pruned minus random {row['minus_random']:+.3f} [{row['minus_random_low']:+.3f}, {row['minus_random_high']:+.3f}]"
        )
    return [[said[pruned, evaluated] for evaluated in tasks] for pruned in tasks]


@drawn
@checked()
def cross_task_bisection(result: Any, *, width: Width = "column") -> go.Figure:
    """Every evaluation of the bisections: relative accuracy on a task against the share of pruned neurons, result filled.

    Args:
        result: what `sepcap.prune_across_tasks` returns.
        width: inches, "column" or "page".
    """
    config, bisection = result.config, result.tables["bisection"]
    trace: Any = result.tables["trace"]
    traces: list[Any] = []
    for i, found in enumerate(bisection.to_dict("records")):
        colour, symbol = PALETTE[i % len(PALETTE)], SYMBOLS[i % len(SYMBOLS)]
        points = trace[trace["task"] == found["task"]].sort_values("n")
        neurons = found["n"] / found["fraction"]
        fills = [colour if n == found["n"] else "white" for n in points["n"]]
        said = [
            f"<b>{plain(found['task'])}</b><br>{n:,} neurons pruned<br>relative accuracy {v:.3f}"
            for n, v in zip(points["n"], points["relative"], strict=True)
        ]
        marker = {"symbol": symbol, "size": 7, "color": ["white", *fills], "line": {"color": colour, "width": 1.3}}
        line = {"color": colour, "width": 1}
        x, y = rounded([0, *(points["n"] / neurons)]), rounded([1, *points["relative"]])
        traces.append(
            go.Scatter(
                x=x, y=y, mode="lines+markers", line=line, marker=marker, name=plain(f"{found['task']}: {found['n']:,}"),
                hovertext=["the unpruned model", *said], hoverinfo="text", cliponaxis=False,
            )
        )  # fmt: skip
    layout = {
        "xaxis": {"title": {"text": f"{capital(SITE_NAMES[config['site']])} pruned"}, "tickformat": ".0%", "range": [-0.02, 1.02]},
        "yaxis": {"title": {"text": f"{metric_name(config['metric'])} left (share)"}, "rangemode": "tozero", "nticks": 6},
        "shapes": [level(config["target"])],
        "legend": {"title": {"text": f"Neurons pruned at {100 * config['target']:.3g}% (filled marker)"}},
    }
    return new_figure(traces, layout, width=width, plot_px=220, legend_rows=len(traces) + 1)
