"""Figures of a comparison of importances: agreement of every score, effects against a score, trajectories (METHODS 19)."""

from typing import Any

import numpy as np
import plotly.graph_objects as go
from scipy.stats import rankdata

from sepcap.drawing.parts import above, axes_of, colour_bar, entry, error_bars, panel_axes, row_axis, upright
from sepcap.drawing.style import BLUE, FAINT, GREY, INK, PALETTE, SYMBOLS, VERMILLION, Width, is_wide, new_figure, plain, rounded
from sepcap.drawing.themes import drawn
from sepcap.errors import unknown
from sepcap.studies.importances.config import ABS, CEILING, LEARNED
from sepcap.studies.pruning.config import DIRECTIONS

ROW_PX = 20
SHIFT = 0.17
PANEL_PX = 200
GAP = 0.14

COLUMNS = {
    "spearman_difference": "Rank correlation with the exact effect,<br>Δ<sub>forget</sub> − Δ<sub>retain</sub>",
    "spearman_forget": "Rank correlation with the exact effect, Δ<sub>forget</sub>",
    "recall_1": "Recall of the 1% with the largest Δ<sub>forget</sub> − Δ<sub>retain</sub>",
    "recall_2": "Recall of the 2% with the largest Δ<sub>forget</sub> − Δ<sub>retain</sub>",
    "recall_5": "Recall of the 5% with the largest Δ<sub>forget</sub> − Δ<sub>retain</sub>",
    "one_shot_area": "Area of the one-shot trajectory",
    "iterative_area": "Area of the iterative trajectory",
}
"""Columns of the league table that `ranks` draws, with their titles."""


def _site(result: Any, site: str | None) -> str:
    sites = list(result.config["neurons"])
    if site is not None and site not in sites:
        raise unknown("site", site, sites)
    return sites[0] if site is None else site


def _says(result: Any, direction: str) -> str:
    return f"forget {plain(result.config['forget' if direction == DIRECTIONS[0] else 'retain'], 24)}"


@drawn
def ranks(result: Any, site: str | None = None, column: str = "spearman_difference", *, width: Width = "column") -> go.Figure:
    """One column of the league table with its 95% intervals, the best score above; dotted lines: a score without error.

    Args:
        result: what `sepcap.compare_importances` returns.
        site: a site; default the first.
        column: one of spearman_difference, spearman_forget, recall_1, recall_2, recall_5, one_shot_area and iterative_area.
        width: inches, "column" or "page".

    Source: METHODS 19.
    """
    if column not in COLUMNS:
        raise unknown("column", column, COLUMNS)
    site = _site(result, site)
    table = result.table.query("site == @site and score != @CEILING")
    table = table[np.isfinite(table[column])]
    if table.empty:
        raise ValueError(f"the table has no {column} of site {site!r}")
    order = table.groupby("score")[column].mean().sort_values(kind="stable").index.tolist()
    heights = {name: float(i) for i, name in enumerate(order)}
    traces: list[Any] = []
    lines = [upright(0.0 if "area" not in column else 1.0, -0.6, len(order) - 0.4, {"color": FAINT, "width": 1}, layer="below")]
    for direction, colour, symbol, up in zip(DIRECTIONS, (VERMILLION, BLUE), SYMBOLS, (SHIFT, -SHIFT), strict=False):
        rows = table.query("direction == @direction")
        value, low, high = (rows[f"{column}{end}"].to_numpy() for end in ("", "_low", "_high"))
        at = [heights[name] + up for name in rows["score"]]
        hovers = [
            f"<b>{name}</b>, {_says(result, direction)}<br>{v:.3f} [{a:.3f}, {b:.3f}]<br>{cost:,.3g} forward passes".replace("-", "−")
            for name, v, a, b, cost in zip(rows["score"], value, low, high, rows["passes"], strict=True)
        ]
        look = {"symbol": symbol, "size": 5, "color": colour}
        bars = error_bars(value, low, high, color=colour, thickness=1, width=0)
        drawn: dict[str, Any] = {"mode": "markers", "marker": look, "error_x": bars, "hovertext": hovers, "hoverinfo": "text"}
        traces.append(go.Scatter(x=rounded(value), y=at, name=_says(result, direction), cliponaxis=False, **drawn))
        ceiling = result.row(site, direction, CEILING)[column]
        if np.isfinite(ceiling):
            lines.append(upright(float(ceiling), -0.6, len(order) - 0.4, {"color": colour, "width": 1, "dash": "dot"}, layer="below"))
    labels = {at: f"<b>{name}</b>" if name == ABS else name for name, at in heights.items()}
    layout = {
        "xaxis": {"title": {"text": COLUMNS[column]}, "showgrid": True, "gridcolor": FAINT, "gridwidth": 0.5},
        "yaxis": row_axis(labels, -0.6, len(order) - 0.4),
        "shapes": lines,
        "annotations": [above(f"{site}, {len(result.tensors[f'{site}/places']):,} neurons")],
        "legend": {"title": {"text": "With 95% interval; dotted: a score without error"}},
    }
    return new_figure(traces, layout, width=width, plot_px=ROW_PX * (len(order) + 1), left=122, top=24, bottom=58, legend_rows=3)


@drawn
def effects(result: Any, site: str | None = None, score: str | None = None, *, width: Width = "page") -> go.Figure:
    """Rank of the exact effect Δ_forget − Δ_retain of every neuron against the rank of its score, a panel per direction.

    Args:
        result: what `sepcap.compare_importances` returns.
        site: a site; default the first.
        score: a score; default the one with the highest mean rank correlation of both directions.
        width: inches, "column" or "page".
    """
    site = _site(result, site)
    names = [name for name in result.table["score"].unique() if f"{site}/scores/{DIRECTIONS[0]}/{name}" in result.tensors]
    if score is None:
        of_site = result.table.query("site == @site and score in @names")
        score = str(of_site.groupby("score")["spearman_difference"].mean().idxmax())
    if score not in names:
        raise unknown("score", score, names)
    delta = {role: result.tensors[f"{site}/delta/{role}"].numpy() for role in ("forget", "retain")}
    places = result.tensors[f"{site}/places"].numpy()
    traces: list[Any] = []
    layout: dict[str, Any] = {"annotations": []}
    share = (1 - GAP) / 2
    for i, direction in enumerate(DIRECTIONS):
        key, axes = axes_of(i)
        values = result.tensors[f"{site}/scores/{direction}/{score}"].numpy()
        change = (delta["forget"] - delta["retain"]) * (1 if i == 0 else -1)
        hovers = [
            f"<b>layer {place[0]}, {', '.join(map(str, place[1:]))}</b><br>Δ_forget − Δ_retain {d:+.2e}, score {v:.3g}".replace("-", "−")
            for place, d, v in zip(places.tolist(), change, values, strict=True)
        ]
        ranks_of = [100 * (rankdata(of) - 0.5) / len(of) for of in (values, change)]
        look = {"color": places[:, 0], "colorscale": "Viridis", "size": 3, "opacity": 0.6, "showscale": i == 1}
        look |= {"colorbar": colour_bar("Layer", thickness=8)} if i == 1 else {}
        points: dict[str, Any] = {"mode": "markers", "marker": look, "hovertext": hovers, "hoverinfo": "text", "showlegend": False}
        traces.append(go.Scatter(x=rounded(ranks_of[0], 4), y=rounded(ranks_of[1], 4), **points, **axes))
        x = {"title": {"text": f"Rank of the score<br>{score} (%)"}, "range": [-2, 102]}
        title = "Rank of Δ<sub>forget</sub> − Δ<sub>retain</sub> (%)" if i == 0 else ""
        y = {"title": {"text": title}, "range": [-2, 102], "showticklabels": i == 0}
        start = i * (share + GAP / 2)
        layout |= panel_axes(key, x, y, (start, start + share))
        r = result.row(site, direction, score)["spearman_difference"]
        layout["annotations"].append(above(f"{site}, ρ = {r:.2f}".replace("-", "−") + f"<br>{_says(result, direction)}", start))
    return new_figure(traces, layout, width=width, plot_px=PANEL_PX, left=58, right=60, top=44, bottom=58)


@drawn
def trajectories(result: Any, site: str | None = None, direction: str = DIRECTIONS[0], *, width: Width = "column") -> go.Figure:
    """Accuracy on both tasks along the trajectories of abs, of the scores that were chosen, and of the learned order.

    Iterative trajectories are means over their seeds; the learned order is one-shot, and so is abs beside it (dashed).

    Args:
        result: what `sepcap.compare_importances` returns.
        site: a site; default the first.
        direction: "forward" or "reverse".
        width: inches, "column" or "page".

    Raises:
        ValueError: there are no trajectories: the model has no accuracy to lose.
    """
    site = _site(result, site)
    if direction not in DIRECTIONS:
        raise unknown("direction", direction, DIRECTIONS)
    table = result.tables["trajectory"].query("site == @site and direction == @direction")
    if table.empty:
        raise ValueError("there are no trajectories: the model has no top-1 accuracy to lose on a task")
    wanted = [("iterative", name) for name in (ABS, *result.chosen(site))] if "iterative" in set(table["kind"]) else []
    wanted += [("one-shot", name) for name in (ABS, LEARNED) if name in set(table["score"])]
    traces: list[Any] = []
    for i, (kind, name) in enumerate(wanted):
        rows = table.query("kind == @kind and score == @name")
        of_steps = rows.groupby("step")[["forget", "retain"]].mean()
        x, y = (of_steps[role] / of_steps[role].iloc[0] for role in ("forget", "retain"))
        row, column = result.row(site, direction, name), f"{kind.replace('-', '_')}_area"
        ends = f" [{row[f'{column}_low']:.2f}, {row[f'{column}_high']:.2f}]"
        colour = GREY if (kind, name) == ("one-shot", ABS) else INK if name == LEARNED else PALETTE[i % len(PALETTE)]
        line = {"color": colour, "width": 1.5, "dash": "dash" if kind == "one-shot" else "solid"}
        label = f"{name}, {kind}: {row[column]:.2f}{ends if np.isfinite(row[f'{column}_low']) else ''}"
        hovers = [f"<b>{name}</b>, {kind}, step {step}" for step in of_steps.index]
        marker = {"color": colour, "symbol": SYMBOLS[i % len(SYMBOLS)], "size": 5}
        drawn: dict[str, Any] = {"mode": "lines+markers", "line": line, "marker": marker, "hovertext": hovers, "hoverinfo": "text+x+y"}
        traces.append(go.Scatter(x=rounded(x), y=rounded(y), name=label, cliponaxis=False, **drawn))
    traces.append(entry("both drop together", mode="lines", line={"color": FAINT, "width": 1}))
    axis = {"range": [-0.03, 1.1], "dtick": 0.2, "tickformat": ".1f"}
    roles = ("forget", "retain") if direction == DIRECTIONS[0] else ("retain", "forget")
    layout: dict[str, Any] = {
        f"{name}axis": axis | {"title": {"text": f"Relative top-1 accuracy, {plain(result.config[role], 16)}"}}
        for name, role in zip("xy", roles, strict=True)
    }
    layout["shapes"] = [{"type": "line", "x0": 0, "y0": 0, "x1": 1, "y1": 1, "line": {"color": FAINT, "width": 1}, "layer": "below"}]
    layout["legend"] = {"title": {"text": f"{site}: area, with 95% interval"}}
    return new_figure(traces, layout, width=width, square=not is_wide(width), plot_px=PANEL_PX * 1.5, left=68, legend_rows=len(traces) + 1)
