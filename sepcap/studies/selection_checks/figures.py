"""Figures of the selection checks of a pair of tasks, one per check (METHODS 11, 12)."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from sepcap.checks import checked
from sepcap.drawing.heat import heat_panels
from sepcap.drawing.parts import above, axes_of, band, error_bars, panel_axes
from sepcap.drawing.style import (
    BLUE,
    FAINT,
    GREY,
    INK,
    SITE_NAMES,
    VERMILLION,
    Width,
    capital,
    every,
    metric_name,
    new_figure,
    plain,
    rounded,
)
from sepcap.studies.base.text import p_in_words
from sepcap.studies.selection_checks.parts import OTHER_TEXTS

GAP = 0.16
RANDOM = "random neurons"


@checked()
def selection_checks_keep(result: Any, *, width: Width = "column") -> go.Figure:
    """Accuracy left on both tasks when only the highest-scoring neurons of one task are kept, against keeping random ones."""
    table = _table(result, "keep_only")
    lines = {f"kept for {task}": table[table["kept"] == task] for task in result.pair}
    x = {"title": {"text": "Neurons kept"}, "tickformat": ".0%", "range": [0, 1.03], "tickvals": [0, 0.5, 1]}
    return _panels(result, lines, "fraction", x, width, random=f"{RANDOM} kept")


@checked()
def selection_checks_curves(result: Any, *, width: Width = "column") -> go.Figure:
    """Accuracy left on both tasks as the neurons of one task, of the other, or random ones are pruned."""
    table = _table(result, "curves")
    lines = {f"forget {task}": table[table["pruned"] == task] for task in result.pair}
    x = {"title": {"text": "Neurons pruned"}, "tickformat": ".0%", "range": [0, 1.03], "tickvals": [0, 0.5, 1]}
    return _panels(result, lines, "fraction", x, width)


@checked()
def selection_checks_layers(result: Any, *, width: Width = "column") -> go.Figure:
    """Accuracy left on both tasks when the same share of the last layer, the last two, and so on is pruned."""
    table = _table(result, "layers")
    lines = {f"forget {task}": table[table["pruned"] == task] for task in result.pair}
    depth = int(np.max(table["layers"]))
    share = 100 * result.config["layer_fraction"]
    title = f"Last layers<br>({share:.3g}% of each pruned)"
    x = {"title": {"text": title}, "range": [0.6, depth + 0.4], "tick0": 1, "dtick": every(depth, 7)}
    return _panels(result, lines, "layers", x, width)


@checked()
def selection_checks_steps(result: Any, *, width: Width = "column") -> go.Figure:
    """Accuracy left on both tasks with equally many neurons pruned, against the number of steps; open: one step on other texts."""
    table = _table(result, "steps")
    other = table["run"] == OTHER_TEXTS
    places = {steps: i for i, steps in enumerate(sorted(table.loc[~other, "steps"].unique()))}
    table = table.assign(place=table["steps"].map(places).where(~other, places.get(1, 0)))
    lines = {f"forget {task}": table[~other & (table["pruned"] == task)].sort_values("steps") for task in result.pair}
    beside = dict(zip(result.pair, (-0.4, -0.25), strict=True))
    apart = {task: table[other & (table["pruned"] == task)] for task in result.pair}
    open_ = {f"forget {task}, {OTHER_TEXTS}": rows.assign(place=rows["place"] + beside[task]) for task, rows in apart.items()}
    share = 100 * table["fraction"].iloc[0]
    x = {
        "title": {"text": f"Steps ({share:.3g}% pruned)"},
        "range": [-0.6, len(places) - 0.6],
        "tickvals": list(places.values()),
        "ticktext": [str(steps) for steps in places],
    }
    return _panels(result, lines | open_, "place", x, width, open_=tuple(open_))


@checked()
def selection_checks_step_overlaps(result: Any, *, width: Width = "column") -> go.Figure:
    """Overlap of every two runs that prune equally many neurons: few large steps, many small ones, other texts.

    Args:
        result: what `sepcap.check_selection` returns.
        width: inches, "column" or "page".
    """
    table = _table(result, "step_overlaps")
    runs = list(dict.fromkeys([*table["first"], *table["second"]]))
    panels = {f"forget {task}": np.full((len(runs), len(runs)), np.nan) for task in result.pair}
    hovers = {label: [["" for _ in runs] for _ in runs] for label in panels}
    for row in table.to_dict("records"):
        label, i, j = f"forget {row['pruned']}", runs.index(row["first"]), runs.index(row["second"])
        said = (
            f"<b>{plain(label)}</b><br>{row['first']} and {row['second']}: {row['both']:,} of {row['a']:,}"
            f"<br>{row['ratio']:.3g} times chance, corrected p {p_in_words(row['log10_p_corrected'])}"
        )
        for one, two in ((i, j), (j, i)):
            panels[label][one, two], hovers[label][one][two] = 100 * row["share"], said
    n, share = int(table["a"].iloc[0]), float(table["a"].iloc[0] / table["neurons"].iloc[0])
    what = SITE_NAMES[result.config["site"]]
    named = ["1, other texts" if run == OTHER_TEXTS else run.split()[0] for run in runs]
    return heat_panels(
        panels, named, named, hovers=hovers, heading=f"{n:,} {what} pruned; {100 * share:.3g}% shared by chance",
        title="Shared neurons (%)", row_title="Steps", column_title="Steps", limits=(0.0, 100.0), decimals=0, width=width,
    )  # fmt: skip


def _table(result: Any, name: str) -> Any:
    if name not in result.tables:
        raise ValueError(f"this study did not run the check of table {name!r}; it has {', '.join(result.tables)}")
    return result.tables[name]


def _panels(
    result: Any,
    lines: Mapping[str, Any],
    x: str,
    xaxis: dict[str, Any],
    width: Width,
    *,
    random: str = RANDOM,
    open_: Sequence[str] = (),
) -> go.Figure:
    """One panel per evaluated task; lines with 95% intervals, random neurons as a grey band; lines in `open_` have open markers."""
    traces: list[Any] = []
    layout: dict[str, Any] = {"annotations": []}
    share = (1 - GAP) / 2
    top = max(1.05, 1.05 * float(np.nanmax([rows[["relative", "random"]].max().max() for rows in lines.values()])))
    for i, task in enumerate(result.pair):
        (key, axes), start = axes_of(i), i * (share + GAP)
        for j, (label, rows) in enumerate(lines.items()):
            here = rows[rows["evaluated"] == task]
            if j == 0:
                traces += _band(here, x, axes, i == 0, random)
            traces.append(_line(here, x, label, (VERMILLION, BLUE)[j % 2], axes, i == 0, task, label in open_))
        layout |= panel_axes(key, xaxis, {"range": [0, top], "nticks": 6, "showticklabels": i == 0}, (start, start + share))
        layout["annotations"].append(above(f"Evaluated: {plain(task, 22)}", start))
    layout["yaxis"]["title"] = {"text": f"{metric_name(result.config['metric'])} left (share)"}
    layout["legend"] = {"title": {"text": f"{capital(SITE_NAMES[result.config['site']])}, with 95% intervals"}}
    margins: dict[str, Any] = {"top": 28, "right": 20, "bottom": 46 + 15 * xaxis["title"]["text"].count("<br>")}
    return new_figure(traces, layout, width=width, plot_px=200, legend_rows=len(lines) + 2, legend_below=True, **margins)


def _line(rows: Any, x: str, label: str, colour: str, axes: Mapping[str, str], shown: bool, task: str, open_: bool) -> go.Scatter:
    said = [
        f"<b>{plain(task)}</b>, {plain(label)}, {row['n']:,} neurons"
        f"<br>{row['relative']:.3f} left [{row['relative_low']:.3f}, {row['relative_high']:.3f}]"
        f"<br>minus random {row['minus_random']:+.3f} [{row['minus_random_low']:+.3f}, {row['minus_random_high']:+.3f}]"
        for row in rows.to_dict("records")
    ]
    marker = {"size": 6, "color": "white" if open_ else colour, "line": {"color": colour, "width": 1.3}}
    look = {"mode": "markers" if len(rows) == 1 else "lines+markers", "line": {"color": colour, "width": 1.5}, "marker": marker}
    look["error_y"] = _bars(rows, "relative", colour)
    hover = {"name": plain(label), "legendgroup": label, "showlegend": shown, "hovertext": said, "hoverinfo": "text"}
    return go.Scatter(x=rounded(rows[x]), y=rounded(rows["relative"]), cliponaxis=False, **look, **hover, **axes)


def _bars(rows: Any, column: str, colour: str) -> dict[str, Any]:
    # explicit colour: error bars would inherit that of the marker, which is white if open
    return error_bars(rows[column], rows[f"{column}_low"], rows[f"{column}_high"], thickness=1, width=2, color=colour)


def _band(rows: Any, x: str, axes: Mapping[str, str], shown: bool, name: str) -> list[go.Scatter]:
    at = rounded(rows[x])
    if len(rows) == 1:  # a line or band needs two points
        look = {"mode": "markers", "marker": {"color": GREY, "size": 6, "symbol": "square"}, "error_y": _bars(rows, "random", GREY)}
        hover = {"name": name, "showlegend": shown, "legendgroup": RANDOM, "hoverinfo": "skip"}
        return [go.Scatter(x=at, y=rounded(rows["random"]), cliponaxis=False, **look, **hover, **axes)]
    low, high = (rows[f"random_{end}"].to_numpy() for end in ("low", "high"))
    area = band(rows[x].to_numpy(), low, high, FAINT, showlegend=False, legendgroup=RANDOM, **axes)
    look = {"mode": "lines", "line": {"color": GREY, "width": 1.3, "dash": "dot"}, "legendgroup": RANDOM, "hoverinfo": "skip"}
    return [area, go.Scatter(x=at, y=rounded(rows["random"]), name=name, showlegend=shown, **look, **axes)]


@checked()
def selection_checks_meeting(result: Any, *, width: Width = "column") -> go.Figure:
    """Both trajectories in the plane of both relative accuracies, random neurons dotted, with the point where they meet.

    Args:
        result: what `sepcap.check_selection` returns.
        width: inches, "column" or "page".
    """
    table = _table(result, "curves")
    first, second = result.pair
    traces: list[Any] = []
    for task, colour in zip(result.pair, (VERMILLION, BLUE), strict=True):
        x, y = (_along(table, task, evaluated, "relative") for evaluated in result.pair)
        fractions = [0.0, *table.query("pruned == @task and evaluated == @first")["fraction"]]
        said = [
            f"<b>forget {plain(task)}</b><br>{100 * f:.3g}% pruned<br>{plain(first)} {a:.3f}, {plain(second)} {b:.3f}"
            for f, a, b in zip(fractions, x, y, strict=True)
        ]
        look = {"mode": "lines+markers", "line": {"color": colour, "width": 1.5}, "marker": {"color": colour, "size": 5}}
        traces.append(go.Scatter(x=rounded(x), y=rounded(y), name=plain(f"forget {task}"), hovertext=said, hoverinfo="text", **look))
    x, y = (_along(table, first, evaluated, "random") for evaluated in result.pair)
    traces.append(go.Scatter(x=rounded(x), y=rounded(y), mode="lines", line={"color": GREY, "width": 1.3, "dash": "dot"}, name=RANDOM))
    found = {row["what"]: row for row in result.tables["meeting"].to_dict("records")}
    point = [found[f"trajectories meet: accuracy on {task}"] for task in result.pair]
    if np.isfinite(point[0]["value"]):
        share = [100 * found[f"trajectories meet: share of {task} neurons"]["value"] for task in result.pair]
        traces.append(_meeting_point(point, f"they meet with {share[0]:.0f}% and {share[1]:.0f}% of the neurons pruned"))
    most = max(1.05, 1.05 * float(np.nanmax(table["relative"])))
    name = metric_name(result.config["metric"]).lower()
    layout = {
        "xaxis": {"title": {"text": f"{capital(name)} left, {plain(first)} (share)"}, "range": [-0.02, most], "nticks": 6},
        "yaxis": {"title": {"text": f"{capital(name)} left, {plain(second)} (share)"}, "range": [-0.02, most], "nticks": 6},
        "legend": {"title": {"text": capital(SITE_NAMES[result.config["site"]])}},
    }
    return new_figure(traces, layout, width=width, square=True, left=58, legend_rows=len(traces) + 1)


def _along(table: Any, pruned: str, evaluated: str, column: str) -> list[float]:
    rows = table[(table["pruned"] == pruned) & (table["evaluated"] == evaluated)]
    return [1.0, *rows[column]]


def _meeting_point(point: Sequence[Mapping[Any, Any]], label: str) -> go.Scatter:
    values, low, high = (np.array([[row[name]] for row in point]) for name in ("value", "low", "high"))
    ends = [error_bars(values[i], low[i], high[i], thickness=1, width=3, color=INK) for i in (0, 1)]
    marker = {"symbol": "diamond-open", "size": 10, "color": INK, "line": {"width": 1.6}}
    where = {"x": rounded([point[0]["value"]]), "y": rounded([point[1]["value"]])}
    return go.Scatter(**where, mode="markers", marker=marker, error_x=ends[0], error_y=ends[1], name=label)
