"""The trajectory of pruning runs in the plane of their two tasks (METHODS 11)."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from sepcap.checks import checked
from sepcap.drawing.parts import band, translucent
from sepcap.drawing.style import INK, TICK_PX, Width, lower, metric_name, new_figure, plain
from sepcap.drawing.themes import drawn
from sepcap.errors import unknown
from sepcap.studies.pruning.figures.labels import (
    baselines_first,
    colours,
    guide,
    run_line,
    seeds_together,
    separability_said,
    series,
    step_hovers,
    symbols,
    tasks_of,
)
from sepcap.studies.pruning.on_disk.run_folder import RunFolder
from sepcap.studies.pruning.on_disk.step_files import ROLES
from sepcap.studies.pruning.separability import ACCURACIES


@drawn
@checked()
def trajectory(runs: Any, metric: str = "top1", normalised: bool = True, *, width: Width = "column") -> go.Figure:
    """Accuracy on one task against accuracy on the other, step by step.

    If all runs forget the same task, it is on the x axis, and the retain task on the y axis. If runs go in both
    directions, each task keeps its axis: the first run's forget task is on the x axis. The legend gives the separability of
    every run in percent with its 95% bootstrap interval over texts. Runs in a list that differ only in their seed are one line, the
    mean over seeds, with a band from the lowest to the highest; give a mapping to draw each separately.

    Args:
        runs: a Run, several, or a mapping from label to a Run or to a list of runs that differ in their seed.
        metric: "top1", "top10", "skip50_top1" or "skip50_top10".
        normalised: performance relative to the unpruned model, a_i/a_0; else the accuracy itself.
        width: inches, "column" or "page".

    Raises:
        ValueError: runs over different tasks, or an unpruned accuracy of 0.
    """
    if metric not in ACCURACIES:
        raise unknown("metric", metric, ACCURACIES, "Trajectories are drawn from accuracies.")
    groups = seeds_together(runs)
    by_label = {label: members[0] for label, members in groups.items()}
    axes = _axes({f"{label} {i}": run for label, members in groups.items() for i, run in enumerate(members)})
    lines: list[go.Scatter] = []
    bands: list[go.Scatter] = []
    points: dict[str, list[np.ndarray]] = {}
    starts = set()
    for i, ((label, members), colour) in enumerate(zip(groups.items(), colours(by_label), strict=True)):
        several = [[_performance(run, axes[f"{label} {k}"][j], metric, normalised) for j in (0, 1)] for k, run in enumerate(members)]
        steps = min(len(x) for x, _ in several)
        cut = np.array([[values[:steps] for values in pair] for pair in several]) if len(members) > 1 else np.array(several)
        points[label] = list(cut.mean(axis=0))
        starts |= {(round(float(x[0]), 5), round(float(y[0]), 5)) for x, y in cut}
        said = _separability(members, metric)
        name = f"{label}: {said}" if said else label
        hovers = (
            step_hovers(label, members[0], metric)[:steps] if len(members) == 1 else [f"<b>{label}</b>, step {n}" for n in range(steps)]
        )
        look = {"name": name, "colour": colour, "symbol": symbols(by_label)[i], "hovers": hovers}
        lines.append(run_line(i, members[0], *points[label], **look))
        if len(members) > 1:
            y = cut[:, 1]
            bands.append(band(points[label][0], y.min(axis=0), y.max(axis=0), translucent(colour), showlegend=False))
    limits = [1.1 * max(float(np.nanmax(p[i])) for p in points.values()) for i in (0, 1)]
    if normalised:
        limits = [max(limits)] * 2
    layout: dict[str, Any] = {}
    for name, i in (("xaxis", 0), ("yaxis", 1)):
        layout[name] = {"title": {"text": _title(by_label, i, metric, normalised)}, "range": [-0.025 * limits[i], limits[i]]}
        layout[name] |= {"dtick": 0.2, "tickformat": ".1f"} if normalised else {"nticks": 6}
    said = any(run.steps_done for run in by_label.values())
    if said:
        title = "Separability, with 95% interval over texts" if len(bands) < len(by_label) else "Separability"
        if bands:
            title += "<br>(seeds: mean; band: lowest to highest)"
        layout["legend"] = {"title": {"text": title}}
    traces = [*bands, _diagonal(sorted(starts)), *baselines_first(lines, by_label), _unpruned(sorted(starts))]
    return new_figure(traces, layout, width=width, square=True, left=58, legend_rows=len(lines) + 1 + said + bool(bands))


def _separability(members: Sequence[RunFolder], metric: str) -> str:
    """Separability with its interval for one run, the mean and the range over seeds for several."""
    if len(members) == 1:
        return separability_said(members[0], metric)
    if any(run.steps_done < 1 for run in members):
        return ""
    # signed: without separability, absolute values would not have the mean 0
    percents = [100 * (run.separability(metric).area - 1) for run in members]
    return f"{np.mean(percents):.0f}% (seeds {min(percents):.0f} to {max(percents):.0f})"


def _axes(runs: Mapping[str, RunFolder]) -> dict[str, tuple[str, str]]:
    """Label -> the roles on x and on y."""
    names = {label: (run.config["forget"], run.config["retain"]) for label, run in runs.items()}
    x, y = next(iter(names.values()))
    axes = {}
    for label, pair in names.items():
        if pair == (x, y):
            axes[label] = ("forget", "retain")
        elif pair == (y, x):
            axes[label] = ("retain", "forget")
        else:
            raise ValueError(
                f"runs are over different tasks: {x!r} and {y!r}, but {pair[0]!r} and {pair[1]!r}. One figure shows one pair of tasks."
            )
    return axes


def _performance(run: RunFolder, role: str, metric: str, normalised: bool) -> np.ndarray:
    values, _ = series(run, role, metric)
    if not normalised:
        return values
    if values[0] == 0:
        raise ValueError(
            f"{metric} of the unpruned model is 0 on {tasks_of(run)[role]}: relative accuracy is undefined; use normalised=False"
        )
    return values / values[0]


def _title(runs: Mapping[str, RunFolder], axis: int, metric: str, normalised: bool) -> str:
    role = ROLES[axis]
    task = plain(tasks_of(next(iter(runs.values())))[role], 22)
    # with runs in both directions a task has no role
    of_task = task if len({run.config["forget"] for run in runs.values()}) > 1 else f"{task} ({role})"
    name = metric_name(metric)
    return f"Relative {lower(name)}, {of_task}" if normalised else f"{name}, {of_task}"


def _diagonal(starts: list[tuple[float, float]]) -> go.Scatter:
    x = [v for start in starts for v in (0.0, start[0], None)]
    y = [v for start in starts for v in (0.0, start[1], None)]
    return guide(x[:-1], y[:-1], "not separable (0%)")


def _unpruned(starts: list[tuple[float, float]]) -> go.Scatter:
    x, y = zip(*starts, strict=True)
    return go.Scatter(
        x=x,
        y=y,
        mode="markers+text",
        text=["unpruned"] + [""] * (len(x) - 1),
        textposition="top center",
        textfont={"size": TICK_PX},
        marker={"color": "white", "size": 9, "line": {"color": INK, "width": 1.5}},
        hoverinfo="skip",
        showlegend=False,
        cliponaxis=False,
    )
