"""Separability areas of several runs side by side (METHODS 11)."""

import html
import textwrap
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from sepcap.checks import checked
from sepcap.drawing.parts import DOTTED, row_axis, upright
from sepcap.drawing.style import GREY, INK, TICK_PX, Width, lower, metric_name, new_figure, plain, rounded
from sepcap.drawing.themes import drawn
from sepcap.statistics.intervals import in_percent
from sepcap.studies.pruning.figures.labels import colours, is_random, seeds_together
from sepcap.studies.pruning.on_disk.run_folder import RunFolder
from sepcap.studies.pruning.random_neurons.above_random import OverSeeds, over_seeds

ROW_PX = 36
"""Height of a row, which has two lines of text."""


@drawn
@checked()
def areas(runs: Any, metric: str = "top1", *, width: Width = "column") -> go.Figure:
    """Area under every run's trajectory with its 95% bootstrap interval, and a line at 1 (not separable).

    The task that a run forgets is its x axis: 1 means that both tasks drop together, 2 that the retain task is kept to the end.

    Several seeds are shown as their mean with its interval over texts, and as small dots.

    Args:
        runs: a Run, several, or a mapping from label to a Run or to a list of runs that differ in their seed; their tasks
            may differ.
        metric: "top1", "top10", "skip50_top1" or "skip50_top10".
        width: inches, "column" or "page".
    """
    groups = seeds_together(runs)
    by_label = {label: members[0] for label, members in groups.items()}
    found = {label: over_seeds(members, metric) for label, members in groups.items()}
    n = len(found)
    low = min(0.92, *(min(*s.areas, s.interval[0]) - 0.05 for s in found.values()))
    high = max(2.03, *(max(*s.areas, s.interval[1]) + 0.05 for s in found.values()))
    top = n - 0.45
    traces: list[Any] = []
    notes: list[dict[str, Any]] = []
    small = {"size": TICK_PX}
    for row, ((label, s), colour) in enumerate(zip(found.items(), colours(by_label), strict=True)):
        run, y = by_label[label], n - 1 - row
        said, drop = _said(groups[label], s, metric)
        hover = (
            f"<b>{label}</b><br>forget {plain(run.config['forget'])}, retain {plain(run.config['retain'])}"
            f"<br>area {s.mean:.3f} [{s.interval[0]:.3f}, {s.interval[1]:.3f}]<br>separability {said}<br>{drop}"
            f"<br>intervals over {s.n_clusters[0]:,} and {s.n_clusters[1]:,} clusters of documents"
        )
        common = {"showlegend": False, "cliponaxis": False}
        # not error bars of the point: a percentile interval need not contain it
        ends = {"symbol": "line-ns", "size": 8, "line": {"color": colour, "width": 1.5}}
        line = {"color": colour, "width": 1.5}
        traces.append(go.Scatter(x=rounded(s.interval), y=[y, y], mode="lines+markers", line=line, marker=ends, hoverinfo="skip", **common))
        marker = {"color": "white" if is_random(run) else colour, "size": 6, "line": {"color": colour, "width": 1.2}}
        point = {"mode": "markers", "name": label, "marker": marker, "hovertext": [hover], "hoverinfo": "text"}
        traces.append(go.Scatter(x=rounded([s.mean]), y=[y], **point, **common))
        if len(s.areas) > 1:
            dots = {"mode": "markers", "marker": {"color": colour, "size": 3, "opacity": 0.6}, "hoverinfo": "skip"}
            traces.append(go.Scatter(x=rounded(s.areas), y=[y] * len(s.areas), **dots, **common))
        beside = {"x": 1.0, "xref": "paper", "xanchor": "left", "xshift": 10, "y": y, "yref": "y"}
        notes.append({"text": said.replace(" [", "<br>["), **beside, "font": small})
    for text, x, ref, anchor, shift in (("Separability", 1.0, "paper", "left", 10), ("not separable", 1.0, "x", "center", 0)):
        above = {"x": x, "xref": ref, "xanchor": anchor, "xshift": shift, "y": top, "yref": "y", "yanchor": "bottom"}
        notes.append({"text": text, **above, "font": small})
    texts = {row: _wrapped(label) for row, label in enumerate(reversed(found))}
    title = f"Area of {lower(metric_name(metric))}, with 95% interval<br>(2: fully separable)"
    layout = {
        "xaxis": {"title": {"text": title}, "range": [low, high], "dtick": 0.5},
        "yaxis": row_axis(texts, -0.6, top),
        "annotations": notes,
        "shapes": [upright(x, -0.6, top, {**DOTTED, "color": colour}, layer="below") for x, colour in ((1, INK), (2, GREY))],
    }
    return new_figure(traces, layout, width=width, plot_px=ROW_PX * n + 10, left=20, right=96, top=26, bottom=62)


def _said(members: Sequence[RunFolder], found: OverSeeds, metric: str) -> tuple[str, str]:
    """Separability in percent with its interval, and another line of the hover text."""
    if len(members) > 1:
        low, high = (100 * (end - 1) for end in found.interval)
        return in_percent(100 * (found.mean - 1), (low, high)), f"{len(members)} seeds, standard deviation {found.sd:.3f}"
    s = members[0].separability(metric)
    drop = f"largest differential drop {s.max_drop:.1f} [{s.max_drop_interval[0]:.1f}, {s.max_drop_interval[1]:.1f}] points, step"
    return in_percent(s.percent, s.percent_interval), f"{drop} {s.max_drop_step}"


def _wrapped(label: str) -> str:
    """An escaped label over at most two lines."""
    lines = textwrap.wrap(html.unescape(label), 26, break_on_hyphens=False)
    first, rest = lines[0], " ".join(lines[1:])
    return plain(first) + (f"<br>{plain(rest, 26)}" if rest else "")
