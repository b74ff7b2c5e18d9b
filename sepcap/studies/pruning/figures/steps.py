"""Figures over steps: the metrics of both tasks, and the thresholds of the selection."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import plotly.graph_objects as go

from sepcap.checks import checked
from sepcap.drawing.parts import above, axes_of, band, entry, panel_axes, translucent
from sepcap.drawing.style import (
    BLUE,
    INK,
    METRIC_UNITS,
    PALETTE,
    SITE_NAMES,
    SYMBOLS,
    VERMILLION,
    Width,
    axis_break,
    capital,
    every,
    metric_name,
    new_figure,
    plain,
    rounded,
)
from sepcap.drawing.themes import drawn
from sepcap.errors import unknown
from sepcap.studies.pruning.figures.labels import (
    colours,
    is_random,
    named,
    pruned_total,
    scientific,
    seeds_together,
    series,
    sizes,
    step_hovers,
    symbols,
)
from sepcap.studies.pruning.on_disk.run_folder import RunFolder
from sepcap.studies.pruning.on_disk.step_files import ROLES

AGAINST = ("pruned", "step")


@drawn
@checked()
def metric_over_steps(runs: Any, metric: str = "top1", *, against: str = "pruned", width: Width = "column") -> go.Figure:
    """A metric on both tasks during pruning, with bands of ± one standard error.

    One run gives one panel with a line per task. Several runs give a panel per task with a line per run, in the
    colours of `trajectory`. Several seeds are drawn as their mean with a band from the lowest to the highest.

    Args:
        runs: a Run, several, or a mapping from label to a Run or to a list of runs that differ in their seed.
        metric: "top1", "top10", "skip50_top1", "skip50_top10" or "loss".
        against: x axis, "pruned" for the share of pruned neurons, "step" for the number of the step.
        width: inches, "column" or "page".
    """
    title = metric_name(metric) + METRIC_UNITS.get(metric, "")
    if against not in AGAINST:
        raise unknown("against", against, AGAINST)
    groups = seeds_together(runs)
    by_label = {label: members[0] for label, members in groups.items()}
    alone = len(by_label) == 1
    tasks = [""] if alone else list(dict.fromkeys(run.config[role] for run in by_label.values() for role in ROLES))
    bands: list[Any] = []
    lines: list[Any] = []
    highest, furthest = 0.0, 0.0
    for i, ((label, run), of_run) in enumerate(zip(by_label.items(), colours(by_label), strict=True)):
        pruned, total = pruned_total(run)
        positions = pruned / total if against == "pruned" else np.arange(len(pruned))
        furthest = max(furthest, float(positions.max()))
        hovers = step_hovers(label, run, metric)
        for n, role in enumerate(ROLES):
            task = run.config[role]
            panel = 0 if alone else tasks.index(task)
            values, low, high = _middle(groups[label], role, metric)
            known = np.isfinite(low).all() and np.isfinite(high).all()
            highest = max(highest, float(np.nanmax(high if known else values)))
            colour = (VERMILLION, BLUE)[n] if alone else of_run
            common = {**axes_of(panel)[1], "legendgroup": f"{i} {role}" if alone else str(i)}
            if known:
                bands.append(band(positions, low, high, translucent(colour), showlegend=False, **common))
            lines.append(
                go.Scatter(
                    x=rounded(positions),
                    y=rounded(values),
                    mode="lines+markers",
                    name=f"{plain(task, 32)} ({role})" if alone else label,
                    showlegend=alone or n == 0,
                    line={"color": colour, "width": 1.5},
                    # in the narrow panels markers would hide the bands
                    marker=_marker(colour, SYMBOLS[n] if alone else symbols(by_label)[i], is_random(run), shown=0 if alone else 7),
                    cliponaxis=False,
                    hovertext=hovers,
                    hoverinfo="text",
                    **common,
                )
            )
    layout = _panels(tasks, by_label, against, title, 1.05 * highest, furthest)
    if bands:
        seeds = "; for seeds: lowest to highest" if any(len(members) > 1 for members in groups.values()) else ""
        layout["legend"] = {"title": {"text": f"Band: ± 1 standard error{seeds}"}}
    rows = (len(lines) if alone else len(by_label)) + bool(bands)
    return new_figure(
        [*bands, *lines], layout, width=width, plot_px=220 if alone else 190, right=22, top=12 if alone else 30, legend_rows=rows
    )


def _marker(colour: str, symbol: str, hollow: bool, shown: int = 0) -> dict[str, Any]:
    line = {"color": colour, "width": 1}
    return {"color": "white" if hollow else colour, "size": 5, "symbol": symbol, "line": line, "maxdisplayed": shown}


def _middle(members: list[RunFolder], role: str, metric: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The metric per step with both edges of its band."""
    of_seeds = [series(run, role, metric) for run in members]
    if len(of_seeds) == 1:
        values, errors = of_seeds[0]
        return values, values - errors, values + errors
    every = np.stack([values for values, _ in of_seeds])
    return every.mean(axis=0), every.min(axis=0), every.max(axis=0)


def _panels(tasks: list[str], runs: Mapping[str, RunFolder], against: str, title: str, highest: float, furthest: float) -> dict[str, Any]:
    """Axes of panels side by side, with the same ranges."""
    layout: dict[str, Any] = {"annotations": []}
    gap = 0.14
    share = (1 - gap * (len(tasks) - 1)) / len(tasks)
    if against == "step":
        x = {"title": {"text": "Pruning step"}, "dtick": every(int(furthest) + 1, 10 // len(tasks)), "range": [0, 1.03 * max(1, furthest)]}
    else:
        sites = list(dict.fromkeys(SITE_NAMES[site] for run in runs.values() for site in sizes(run)))
        said = sites[0] if len(sites) == 1 else "neurons"
        x = {
            "title": {"text": f"{capital(said)} pruned"},
            "tickformat": ".0%",
            "dtick": _share_step(furthest, 6 // len(tasks)),
            "range": [0, 1.03 * furthest or 1],
        }
    for i, task in enumerate(tasks):
        start = i * (share + gap)
        y = {"title": {"text": title} if i == 0 else {}, "range": [0, highest or 1], "showticklabels": i == 0}
        layout |= panel_axes(axes_of(i)[0], x, y, (start, start + share))
        if task:
            layout["annotations"].append(above(plain(task, 24), start, shift=4))
    return layout


def _share_step(furthest: float, most: int) -> float:
    """Distance of ticks on an axis of shares: at least three ticks, at most `most` besides 0."""
    return next((step for step in (0.01, 0.02, 0.05, 0.1, 0.2, 0.25, 0.5) if furthest / step <= max(3, most)), 0.5)


@drawn
@checked()
def thresholds(run: RunFolder, *, width: Width = "column") -> go.Figure:
    """The lowest selected score per step and site; logarithmic if all are positive.

    Args:
        run: a run with at least one pruning step.
        width: inches, "column" or "page".

    Raises:
        ValueError: a random run (its scores are random numbers), or one without a pruning step.
    """
    named(run)
    if is_random(run):
        raise ValueError(f"the run in {run.folder} is random: it has no thresholds, its scores are random numbers")
    if run.steps_done < 1:
        raise ValueError(f"the run in {run.folder} has no pruning step yet: there is no threshold to draw")
    records = [run.record(step) for step in range(1, run.steps_done + 1)]
    names = {site: SITE_NAMES.get(site, plain(site)) for record in records for site in record["thresholds"]}
    # a step of a schedule may select nothing at a site
    values = {site: np.array([record["thresholds"].get(site, math.nan) for record in records], dtype=np.float64) for site in names}
    pruned, total = pruned_total(run)
    every_value = np.concatenate(list(values.values()))
    axis, zero = _score_axis(every_value[~np.isnan(every_value)])
    traces = []
    for i, (site, of_site) in enumerate(values.items()):
        colour, symbol = PALETTE[(i + 1) % len(PALETTE)], SYMBOLS[i % len(SYMBOLS)]
        hovers = [
            f"<b>{names[site]}</b>, step {step}<br>lowest selected score {value:.4g}<br>{pruned[step]:,} of {total:,} neurons pruned"
            for step, value in enumerate(of_site, start=1)
        ]
        known = ~np.isnan(of_site)
        on_axis = known & (of_site > 0) if zero else known
        common = {"cliponaxis": False, "hoverinfo": "text", "legendgroup": site}
        for part, hollow in ((on_axis, False), (known & ~on_axis, True)):
            if hollow and not part.any():
                continue
            traces.append(
                go.Scatter(
                    x=(1 + np.flatnonzero(part)).tolist(),
                    y=[zero] * int(part.sum()) if hollow else rounded(of_site[part]),
                    mode="markers" if hollow else "lines+markers",
                    name=names[site],
                    showlegend=not hollow and len(names) > 1,
                    line={"color": colour, "width": 1.5},
                    marker=_marker(colour, symbol, hollow),
                    hovertext=[hovers[j] for j in np.flatnonzero(part)],
                    **common,
                )
            )
    n = run.steps_done
    of_what = f" of {next(iter(names.values()))}" if len(names) == 1 else ""
    layout: dict[str, Any] = {
        "xaxis": {"title": {"text": "Pruning step"}, "range": [0, n + 0.5], "dtick": every(n + 1, 12), "tick0": 0},
        "yaxis": {"title": {"text": f"Lowest selected score{of_what}"}, **axis},
    }
    rows = len(names) if len(names) > 1 else 0
    if zero:
        layout["annotations"] = [axis_break("y", math.log10(zero) + 0.45 * (math.log10(axis["tickvals"][1]) - math.log10(zero)), "x")]
        marker = {"color": "white", "symbol": "circle", "size": 5, "line": {"color": INK, "width": 1}}
        traces.append(entry("open: the lowest selected score is 0", mode="markers", marker=marker))
        rows += 1
    return new_figure(traces, layout, width=width, plot_px=220, legend_rows=rows)


def _score_axis(values: np.ndarray) -> tuple[dict[str, Any], float | None]:
    """A logarithmic axis with ticks at powers of ten, or at 1, 2 and 5 if there are few of those.

    Scores of 0 get their own position below it, marked "0", which is returned too. Linear if a score is negative or
    infinite, or if all are 0.
    """
    positive = values[values > 0]
    if (values < 0).any() or not np.isfinite(values).all() or not len(positive):
        return {"type": "linear"}, None
    low, high = math.log10(positive.min()), math.log10(positive.max())
    pad = max(0.06 * (high - low), 0.05)
    low, high = low - pad, high + pad
    factors = (1,) if high - low > 2 else (1, 2, 5)
    ticks = [factor * 10.0**power for power in range(math.floor(low), math.ceil(high) + 1) for factor in factors]
    ticks = [tick for tick in ticks if low <= math.log10(tick) <= high]
    ticks = ticks[:: every(len(ticks), 9)] or [10.0 ** ((low + high) / 2)]
    texts = [_tick(tick) for tick in ticks]
    zero = None
    if len(positive) < len(values):
        zero = 10.0 ** (low - 0.08 * (high - low))
        low -= 0.14 * (high - low)
        ticks, texts = [zero, *ticks], ["0", *texts]
    return {"type": "log", "range": [low, high], "tickvals": ticks, "ticktext": texts}, zero


def _tick(value: float) -> str:
    if 1e-3 <= value < 1e5:
        return f"{value:.3g}" if value < 1000 else f"{value:.0f}"
    return scientific(value)
