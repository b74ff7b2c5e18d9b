"""Distribution of scores, layer by layer: one ridge per layer, binned before anything is drawn."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go

from sepcap.plots.style import FAINT, INK, SITE_NAMES, TICK_PX, VERMILLION, every, new_figure, plain, rounded
from sepcap.selection.neurons import NeuronSet
from sepcap.selection.score import Scores

RIDGE = 1.6
"""Height of the highest bin of a site, in distances between layers."""
ALL, SELECTED = "all", "selected"
FILLS = {ALL: "#9fc3dc", SELECTED: VERMILLION}
LINES = {ALL: INK, SELECTED: VERMILLION}


@dataclass(frozen=True)
class Binned:
    """Histograms of log10 score of one site.

    Attributes:
        edges: [bin + 1] of log10 score, the same in all layers.
        counts: [layer, bin] neurons.
        zero: [layer] neurons without a logarithm: score 0 or below.
        unbounded: [layer] neurons with an infinite or undefined score.
        per_layer: neurons of a layer.
    """

    edges: np.ndarray
    counts: np.ndarray
    zero: np.ndarray
    unbounded: np.ndarray
    per_layer: int


def score_histograms(
    scores: Scores, site: str | None = None, bins: int = 60, neurons: NeuronSet | None = None, *, width: str | None = None
) -> go.Figure:
    """Histograms of log10 score, one ridge per layer, one panel per site.

    All layers of a site have the same bins and the same scale. Neurons with score 0 have no logarithm: their share of the
    layer stands beside its ridge.

    Args:
        scores: what `sepcap.score` returns.
        site: one site only; default all.
        bins: number of bins over the range of the site.
        neurons: a set whose part of every histogram is coloured; its threshold is drawn where it has one for all layers.
        width: "column" or "page"; default a column for one site.
    """
    if not 2 <= bins <= 200:
        raise ValueError(f"bins={bins}: give 2 to 200")
    shown = {site: scores[site]} if site is not None else dict(scores)
    if not shown:
        raise ValueError("scores hold no site: there is nothing to draw")
    binned, selected = {}, {}
    for name, values in shown.items():
        flat = values.detach().cpu().double().flatten(1).numpy()
        binned[name] = bin_scores(flat, bins)
        if neurons is not None and name in neurons.masks:
            mask = neurons.masks[name].cpu().flatten(1).numpy()
            if mask.shape != flat.shape:
                raise ValueError(
                    f"neurons: the mask of site {name!r} is {list(mask.shape)} and its scores {list(flat.shape)}: different models"
                )
            selected[name] = _selected(flat, mask, binned[name].edges)
    tallest = max(_top(b) for b in binned.values())
    row_px = 28 if tallest <= 10 else 24 if tallest <= 18 else 17
    traces: list[Any] = []
    layout: dict[str, Any] = {"annotations": [], "shapes": []}
    gap = 0.09 if len(binned) > 1 else 0.0
    share = (1 - gap * (len(binned) - 1)) / len(binned)
    for i, (name, b) in enumerate(binned.items()):
        key = "" if i == 0 else str(i + 1)
        start = i * (share + gap)
        # the column of shares takes its room from the panel, so that panels stay apart
        room = (0.14 if len(binned) == 1 else 0.26) if (b.zero + b.unbounded).any() else 0.0
        end = start + share * (1 - room)
        traces += _ridges(name, b, selected.get(name), key)
        said = SITE_NAMES.get(name, plain(name))
        layout[f"xaxis{key}"] = {
            "domain": [start, end],
            "title": {"text": f"log<sub>10</sub> score, {said}"},
            "range": [b.edges[0], b.edges[-1]],
            "anchor": f"y{key}",
        }
        layout[f"yaxis{key}"] = {
            "anchor": f"x{key}",
            "range": [-0.15, tallest],
            "tickvals": list(range(0, len(b.counts), every(len(b.counts), 16))),
            "title": {"text": "Layer"} if i == 0 else {},
            "showline": False,
        }
        layout["annotations"] += _shares(b, key, end)
        threshold = _threshold(neurons, name)
        if threshold is not None:
            line = {"color": VERMILLION, "width": 1, "dash": "3px,3px"}
            place = {"xref": f"x{key}", "yref": f"y{key} domain", "x0": threshold, "x1": threshold, "y0": 0, "y1": 1}
            layout["shapes"].append({"type": "line", **place, "line": line})
    if selected:
        traces += _legend(bool(layout["shapes"]))
    width = width or ("column" if len(binned) == 1 else "page")
    return new_figure(traces, layout, width=width, plot_px=row_px * (tallest + 0.15), left=46, top=14, legend_rows=2 if selected else 0)


def _top(b: Binned) -> float:
    """Upper end of the y axis: above every ridge and the heading of the shares."""
    ridges = np.arange(len(b.counts)) + RIDGE * b.counts.max(1) / max(1, b.counts.max())
    return float(max(ridges.max() + 0.1, len(b.counts) - 1 + (1.3 if (b.zero + b.unbounded).any() else 0.2)))


def bin_scores(scores: np.ndarray, bins: int) -> Binned:
    """Histograms of log10 score over the whole range of a site; scores [layer, neuron]."""
    usable = np.isfinite(scores) & (scores > 0)
    logs = np.log10(scores, where=usable, out=np.full(scores.shape, np.nan))
    low, high = (float(logs[usable].min()), float(logs[usable].max())) if usable.any() else (-1.0, 1.0)
    if high - low < 1e-6:
        low, high = low - 0.5, high + 0.5
    edges = np.linspace(low, high, bins + 1)
    counts = np.stack([np.histogram(layer[ok], edges)[0] for layer, ok in zip(logs, usable, strict=True)])
    unbounded = ~np.isfinite(scores)
    return Binned(edges, counts, (~usable & ~unbounded).sum(1), unbounded.sum(1), scores.shape[1])


def _selected(scores: np.ndarray, mask: np.ndarray, edges: np.ndarray) -> Binned:
    usable = np.isfinite(scores) & (scores > 0)
    counts = np.stack([np.histogram(np.log10(layer[keep]), edges)[0] for layer, keep in zip(scores, mask & usable, strict=True)])
    unbounded = mask & ~np.isfinite(scores)
    return Binned(edges, counts, (mask & ~usable & ~unbounded).sum(1), unbounded.sum(1), scores.shape[1])


def _threshold(neurons: NeuronSet | None, site: str) -> float | None:
    """log10 of the lowest selected score, where one holds for all layers."""
    if neurons is None or neurons.info.get("per_layer"):
        return None
    value = neurons.info.get("threshold", {}).get(site)
    return float(np.log10(value)) if value is not None and np.isfinite(value) and value > 0 else None


def _ridges(site: str, b: Binned, chosen: Binned | None, key: str) -> list[go.Scatter]:
    highest = max(1, int(b.counts.max()))
    axes = {"xaxis": f"x{key}", "yaxis": f"y{key}"}
    step = float(b.edges[1] - b.edges[0])
    ends = [round(float(b.edges[0]), 6), round(float(b.edges[-1]), 6)]
    traces = []
    # from the top down, so that a high ridge lies before the layer above it
    for layer in reversed(range(len(b.counts))):
        base = go.Scatter(
            x=ends, y=[layer, layer], mode="lines", line={"color": FAINT, "width": 1}, hoverinfo="skip", showlegend=False, **axes
        )
        traces.append(base)
        for part, name in ((b, ALL), (chosen, SELECTED)):
            if part is None or not part.counts[layer].any():
                continue
            filled = np.flatnonzero(part.counts[layer])
            first, counts = int(filled[0]), part.counts[layer, filled[0] : filled[-1] + 1]
            start = round(float(b.edges[first]), 6)
            # the outline goes up from the base line, over the bins, and down again
            traces.append(
                go.Scatter(
                    x=[start, *rounded(b.edges[first : first + len(counts) + 1], 5)],
                    y=[layer, *rounded(layer + RIDGE * counts / highest), layer],
                    customdata=[int(counts[0]), *counts.tolist(), 0],
                    mode="lines",
                    line={"shape": "hv", "color": LINES[name], "width": 0.75},
                    fill="toself",
                    fillcolor=FILLS[name],
                    hoveron="points",
                    name=name,
                    legendgroup=name,
                    showlegend=False,
                    hovertemplate=_hover(site, layer, part, name, step),
                    **axes,
                )
            )
    return traces


def _legend(threshold: bool) -> list[go.Scatter]:
    entries = []
    for name, said in ((ALL, "all neurons"), (SELECTED, "selected; dashed: lowest selected score" if threshold else "selected")):
        marker = {"symbol": "square", "size": 10, "color": FILLS[name], "line": {"color": LINES[name], "width": 0.75}}
        entries.append(go.Scatter(x=[None], y=[None], mode="markers", marker=marker, name=said, legendgroup=name))
    return entries


def _hover(site: str, layer: int, part: Binned, name: str, step: float) -> str:
    lines = [
        f"<b>{SITE_NAMES.get(site, plain(site))}, layer {layer}</b> ({name})",
        f"log10 score from %{{x:.2f}} in a bin of {step:.2g}",
        f"%{{customdata:,}} of {part.per_layer:,} neurons",
        f"score 0: {part.zero[layer]:,} ({part.zero[layer] / part.per_layer:.2%} of the layer)",
    ]
    if part.unbounded[layer]:
        lines.append(f"not finite: {part.unbounded[layer]:,}")
    return "<br>".join(lines) + "<extra></extra>"


def _shares(b: Binned, key: str, end: float) -> list[dict[str, Any]]:
    """Beside every ridge, where a site has neurons without a logarithm: their share of the layer."""
    parts = [(part, said) for part, said in ((b.zero, "score 0"), (b.unbounded, "not finite")) if part.any()]
    if not parts:
        return []
    column = {"x": end, "xref": "paper", "xanchor": "left", "xshift": 6, "yref": f"y{key}", "font": {"size": TICK_PX}}
    notes = [{**column, "text": " / ".join(said for _, said in parts), "y": len(b.counts) - 0.4, "yanchor": "bottom"}]
    for layer in range(len(b.counts)):
        text = " / ".join(_percent(part[layer] / b.per_layer) for part, _ in parts)
        notes.append({**column, "text": text, "y": layer, "yanchor": "bottom", "yshift": -6})
    return notes


def _percent(share: float) -> str:
    return "0" if share == 0 else "&lt;0.1%" if share < 0.001 else f"{share:.1%}"
