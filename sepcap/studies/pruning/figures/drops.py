"""Cost of forgetting: drop against drop, and perplexity against perplexity ([SP] figures 1 and 2)."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import plotly.graph_objects as go

from sepcap.checks import checked
from sepcap.drawing.style import Width, every, lower, metric_name, new_figure, plain, rounded
from sepcap.drawing.themes import drawn
from sepcap.errors import unknown
from sepcap.studies.pruning.figures.labels import (
    baselines_first,
    colours,
    guide,
    named,
    run_line,
    scientific,
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
def drop_against_drop(runs: Any, metric: str = "top1", *, width: Width = "column") -> go.Figure:
    """Drop of the forget task against that of the retain task, step by step.

    Drops are relative to the unpruned model, 100·(1 − a_i/a_0) percent: the higher a line above the diagonal, the more selective the
    pruning. The runs may be of different models and over different tasks.

    Args:
        runs: a Run, several, or a mapping from label to Run.
        metric: "top1", "top10", "skip50_top1" or "skip50_top10".
        width: inches, "column" or "page".

    Raises:
        ValueError: an unpruned accuracy of 0.

    Source: [SP] figure 1. The legend gives the maximum differential drop with its 95% interval (METHODS 11).
    """
    if metric not in ACCURACIES:
        raise unknown("metric", metric, ACCURACIES, "Drops are computed from accuracies.")
    by_label = named(runs)
    drops = {label: {role: _drop(run, role, metric) for role in ROLES} for label, run in by_label.items()}
    names, hovers = {}, {}
    for label, run in by_label.items():
        forget, retain = (drops[label][role] for role in ROLES)
        names[label] = f"{label}: {_max_drop(run, metric)}" if len(forget) > 1 else label
        hovers[label] = [
            f"{said}<br>dropped by {f:.1f}% (forget) and {r:.1f}% (retain): {f - r:+.1f} points"
            for said, f, r in zip(step_hovers(label, run, metric), forget, retain, strict=True)
        ]
    every_drop = np.concatenate([values for pair in drops.values() for values in pair.values()])
    # pruning can also help a little at first
    high = max(10.0, 1.06 * float(every_drop.max()))
    low = min(-0.03 * high, 1.1 * float(every_drop.min()))
    diagonal = guide([0.0, high], [0.0, high], "not separable: equal drops")
    layout = _axes(
        by_label, lambda of_task: f"Drop in {lower(metric_name(metric))}, {of_task} (%)", [{"range": [low, high], "nticks": 7}] * 2
    )
    said = any(len(pair["forget"]) > 1 for pair in drops.values())
    if said:
        layout["legend"] = {"title": {"text": "Maximum differential drop, in percentage points"}}
    lines = _lines(by_label, drops, names, hovers)
    return new_figure([diagonal, *lines], layout, width=width, square=True, left=58, legend_rows=len(lines) + 1 + said)


@drawn
@checked()
def perplexity_against_perplexity(runs: Any, *, relative: bool = False, width: Width = "column") -> go.Figure:
    """Perplexity on the forget task against that on the retain task, step by step, on logarithmic axes.

    Both axes have as many decades, so that a step to the upper right at 45° multiplies both perplexities by the same factor: the
    dotted line through every unpruned model.

    Args:
        runs: a Run, several, or a mapping from label to Run; they may be of different models and over different tasks.
        relative: perplexities divided by the unpruned model's.
        width: inches, "column" or "page".

    Raises:
        ValueError: an unpruned model whose perplexity is not finite.

    Source: [SP] figure 2.
    """
    by_label = named(runs)
    values = {label: {role: _perplexity(run, role, relative) for role in ROLES} for label, run in by_label.items()}
    hovers = {}
    for label, run in by_label.items():
        of_role = {role: (_perplexity(run, role, False), _perplexity(run, role, True)) for role in ROLES}
        hovers[label] = [
            said + "".join(f"<br>perplexity ({role}) {p[step]:.4g}, ×{ratio[step]:.4g}" for role, (p, ratio) in of_role.items())
            for step, said in enumerate(step_hovers(label, run, "loss"))
        ]
    starts = sorted({(float(pair["retain"][0]), float(pair["forget"][0])) for pair in values.values()})
    limits = _equal_decades([np.concatenate([pair[role] for pair in values.values()]) for role in reversed(ROLES)])
    x, y = [], []
    for start in starts:
        reach = max(high - math.log10(at) for (_, high), at in zip(limits, start, strict=True))
        x += [start[0], start[0] * 10**reach, None]
        y += [start[1], start[1] * 10**reach, None]
    diagonals = guide(x[:-1], y[:-1], "not separable: equal growth")
    of_what = "Relative perplexity" if relative else "Perplexity"
    layout = _axes(by_label, lambda of_task: f"{of_what}, {of_task}", [_log_axis(*limit) for limit in limits])
    lines = _lines(by_label, values, {label: label for label in by_label}, hovers)
    return new_figure([diagonals, *lines], layout, width=width, square=True, left=58, legend_rows=len(lines) + 1)


def _max_drop(run: RunFolder, metric: str) -> str:
    s = run.separability(metric)
    low, high = s.max_drop_interval
    interval = f" [{low:.1f}, {high:.1f}]" if np.isfinite(low) else ""
    return f"{s.max_drop:.1f}{interval} at step {s.max_drop_step}"


def _drop(run: RunFolder, role: str, metric: str) -> np.ndarray:
    values, _ = series(run, role, metric)
    if values[0] == 0:
        raise ValueError(f"{metric} of the unpruned model is 0 on {tasks_of(run)[role]}: a relative drop is undefined")
    return 100 * (1 - values / values[0])


def _perplexity(run: RunFolder, role: str, relative: bool) -> np.ndarray:
    loss, _ = series(run, role, "loss")
    if not np.isfinite(loss[0]):
        raise ValueError(f"the perplexity of the unpruned model on {tasks_of(run)[role]} is not finite")
    with np.errstate(over="ignore", invalid="ignore"):  # a damaged model can have an infinite one, which cannot be drawn
        return np.exp(loss - loss[0] if relative else loss)


def _axes(runs: Mapping[str, RunFolder], title: Any, axes: list[dict[str, Any]]) -> dict[str, Any]:
    """The retain task on x and the forget task on y, with the task's name if all runs have the same."""
    layout = {}
    for name, role, axis in zip(("xaxis", "yaxis"), reversed(ROLES), axes, strict=True):
        tasks = {run.config[role] for run in runs.values()}
        of_task = f"{plain(tasks.pop(), 22)} ({role})" if len(tasks) == 1 else f"{role} task"
        layout[name] = {"title": {"text": title(of_task)}, **axis}
    return layout


def _lines(
    runs: Mapping[str, RunFolder], values: Mapping[str, Mapping[str, np.ndarray]], names: Mapping[str, str], hovers: Mapping[str, list[str]]
) -> list[go.Scatter]:
    """One line per run."""
    lines = []
    for i, ((label, run), colour) in enumerate(zip(runs.items(), colours(runs), strict=True)):
        look = {"name": names[label], "colour": colour, "symbol": symbols(runs)[i], "hovers": hovers[label]}
        lines.append(run_line(i, run, values[label]["retain"], values[label]["forget"], **look))
    return baselines_first(lines, runs)


def _equal_decades(values: list[np.ndarray]) -> list[tuple[float, float]]:
    """log10 of both ends of axes that contain the values and are equally long."""
    ends = [(float(np.log10(v.min())), float(np.log10(v.max()))) for v in (v[np.isfinite(v)] for v in values)]
    longest = max(0.2, *(high - low for low, high in ends))
    pad = 0.06 * longest
    return [(low - pad, low + longest + pad) for low, _ in ends]


def _log_axis(low: float, high: float) -> dict[str, Any]:
    """Ticks at powers of ten; at 1, 2 and 5 if there are few of those; at equal distances if there are few of these."""
    if high - low > 0.8:
        factors = (1,) if high - low > 2.3 else (1, 2, 5)
        ticks = [factor * 10.0**power for power in range(math.floor(low), math.ceil(high) + 1) for factor in factors]
    else:
        step = 10.0 ** math.floor(low) * every(math.ceil((10**high - 10**low) * 100 / 10.0 ** math.floor(low)), 5) / 100
        ticks = [step * i for i in range(math.floor(10**low / step), math.ceil(10**high / step) + 1)]
    ticks = [tick for tick in ticks if 10**low <= tick <= 10**high]
    ticks = ticks[:: every(len(ticks), 7)]
    return {"type": "log", "range": [low, high], "tickvals": rounded(ticks), "ticktext": [_tick(tick) for tick in ticks]}


def _tick(value: float) -> str:
    if value < 1e5:
        return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
    return scientific(value)
