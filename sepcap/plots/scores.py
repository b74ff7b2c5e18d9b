"""Scores: their distribution layer by layer, and those of heads."""

from typing import Any, Literal

import numpy as np
import plotly.graph_objects as go

from sepcap.plots.ridges import ALL, FILLS, LINES, SELECTED, Binned, Panel, bin_layers, edges_of, ridges
from sepcap.plots.style import FONT_PX, INK, SITE_NAMES, TICK_PX, VERMILLION, Width, capital, every, new_figure, plain, rounded, width_px
from sepcap.selection.importance import IMPORTANCES
from sepcap.selection.neurons import NeuronSet
from sepcap.selection.score import Scores

BALANCE = [[0.0, "#08519c"], [0.25, "#6fa8d3"], [0.5, "#f7f7f7"], [0.75, "#f0a36b"], [1.0, "#b54a00"]]
"""Colours of what lies below and above a middle."""
AMOUNT = [[0.0, "#f7f7f7"], [0.5, "#f0a36b"], [1.0, "#b54a00"]]
CELL_PX = (34, 18)
"""A cell of a heat map from which on a number of three digits can be read in it."""


def score_histograms(
    scores: Scores, site: str | None = None, bins: int = 60, neurons: NeuronSet | None = None, *, width: Width | None = None
) -> go.Figure:
    """Histograms of log10 score, one ridge per layer, one panel per site.

    All layers of a site have the same bins and the same scale. Neurons with score 0 have no logarithm: their share of the
    layer stands beside its ridge. Small strokes on the base line are the lowest and the highest neuron of the layer.

    Args:
        scores: what `sepcap.score` returns.
        site: one site only; default all.
        bins: number of bins over the range of the site.
        neurons: a set whose part of every histogram is coloured; its threshold is drawn where it has one for all layers.
        width: inches, "column" or "page"; default a column for one site.
    """
    if not 2 <= bins <= 200:
        raise ValueError(f"bins={bins}: give 2 to 200")
    shown = {site: scores[site]} if site is not None else dict(scores)
    if not shown:
        raise ValueError("scores hold no site: there is nothing to draw")
    panels = []
    for name, values in shown.items():
        flat = values.detach().cpu().double().flatten(1).numpy()
        selected = None
        binned = bin_scores(flat, bins)
        if neurons is not None and name in neurons.masks:
            selected = bin_scores(np.where(mask_of(neurons, name, flat), flat, np.nan), binned.edges, mask_of(neurons, name, flat))
        said = SITE_NAMES.get(name, plain(name))
        threshold = _threshold(neurons, name)
        panels.append(
            Panel(
                said,
                "log10 score",
                f"log<sub>10</sub> score, {said}",
                _log10(flat),
                tuple(values.shape[1:]),
                binned,
                selected,
                None if threshold is None else (threshold, VERMILLION),
            )
        )
    legend = _legend(any(p.line for p in panels)) if any(p.selected for p in panels) else []
    return ridges(panels, width=width, legend=legend)


def mask_of(neurons: NeuronSet, site: str, flat: np.ndarray) -> np.ndarray:
    """Mask [layer, neuron] of one site, checked to be of the model whose numbers [layer, neuron] are drawn."""
    mask = neurons.masks[site].cpu().flatten(1).numpy()
    if mask.shape != flat.shape:
        raise ValueError(f"neurons: the mask of site {site!r} is {list(mask.shape)} and its scores {list(flat.shape)}: different models")
    return mask


def _log10(scores: np.ndarray) -> np.ndarray:
    usable = np.isfinite(scores) & (scores > 0)
    return np.log10(scores, where=usable, out=np.full(scores.shape, np.nan))


def bin_scores(scores: np.ndarray, bins: int | np.ndarray, among: np.ndarray | None = None) -> Binned:
    """Histograms of log10 score [layer, neuron] over the whole range, or with given edges and among some neurons only."""
    logs = _log10(scores)
    among = np.ones(scores.shape, bool) if among is None else among
    edges = edges_of(logs, bins) if isinstance(bins, int) else bins
    without = {"score 0": among & np.isfinite(scores) & (scores <= 0), "not finite": among & ~np.isfinite(scores)}
    return bin_layers(np.where(among, logs, np.nan), edges, without)


def _threshold(neurons: NeuronSet | None, site: str) -> float | None:
    """log10 of the lowest selected score, where one holds for all layers."""
    if neurons is None or neurons.info.get("per_layer"):
        return None
    value = neurons.info.get("threshold", {}).get(site)
    return float(np.log10(value)) if value is not None and np.isfinite(value) and value > 0 else None


def _legend(threshold: bool) -> list[go.Scatter]:
    entries = []
    for name, said in ((ALL, "all neurons"), (SELECTED, "selected; dashed: lowest selected score" if threshold else "selected")):
        marker = {"symbol": "square", "size": 10, "color": FILLS[name], "line": {"color": LINES[name], "width": 0.75}}
        entries.append(go.Scatter(x=[None], y=[None], mode="markers", marker=marker, name=said, legendgroup=name))
    return entries


def head_scores(
    scores: Scores,
    aggregate: Literal["mean", "median"] = "mean",
    site: str = "attn_pre_out",
    neurons: NeuronSet | None = None,
    *,
    width: Width = "column",
) -> go.Figure:
    """Score of every head as a heat map, layer × head.

    Ratios have a logarithmic colour scale with white at 1, the same colour strength for ten times as much as for a tenth;
    scores that are no ratio (`mean_shift`, divergences) have a scale from 0.

    Args:
        scores: what `sepcap.score` returns, with an attention site.
        aggregate: the score of a head is the mean or the median over its d_head neurons (METHODS 5).
        site: "attn_pre_out" or "attn_value".
        neurons: a set; heads of which it holds every neuron get a frame.
        width: inches, "column" or "page".

    Source: METHODS 5.
    """
    heads = scores.heads(aggregate, site).detach().cpu().numpy()
    row = IMPORTANCES.get(scores.info.get("importance", ""))
    ratio = row is not None and row.of is not None
    shown = _log10(heads) if ratio else np.where(np.isfinite(heads), heads, np.nan)
    if ratio:
        # a head whose score is 0 gets the colour of the lowest
        shown = np.where(heads == 0, np.nanmin(shown) if np.isfinite(shown).any() else 0.0, shown)
    most = float(np.nanmax(np.abs(shown))) if np.isfinite(shown).any() else 0.0
    most = most or 1.0  # all alike
    layers, n = heads.shape
    cell = (width_px(width) - 48 - 84) / n
    row_px = min(28.0, max(520 / layers, 10.0))
    text = [[f"{v:#.3g}" for v in line] for line in heads]
    hover = (
        f"<b>layer %{{y}}, head %{{x}}</b><br>{aggregate} score of its {scores[site].shape[-1]} neurons: %{{text}}"
        f"<br>{capital(SITE_NAMES[site])}<extra></extra>"
    )
    trace = go.Heatmap(
        z=[rounded(line, 4) for line in shown],
        text=text,
        texttemplate="%{text}" if cell >= CELL_PX[0] and row_px >= CELL_PX[1] else None,
        textfont={"size": TICK_PX - 1},
        coloraxis="coloraxis",
        hovertemplate=hover,
    )
    bar: dict[str, Any] = {
        "title": {"text": f"Score, {aggregate} of head", "side": "right", "font": {"size": FONT_PX}},
        "len": 1,
        "xpad": 6,
        "ypad": 0,
    }
    if ratio:
        ticks = most * np.linspace(-1, 1, 5)
        bar |= {"tickvals": rounded(ticks), "ticktext": [f"{v:.2g}" for v in 10**ticks]}
    bare = {"tick0": 0, "showline": False, "ticks": ""}
    layout = {
        "xaxis": {"title": {"text": "Head"}, "dtick": every(n, int(n * cell / 22)), **bare},
        "yaxis": {"title": {"text": "Layer"}, "dtick": every(layers, int(layers * row_px / 16)), **bare},
        "coloraxis": {"colorscale": BALANCE if ratio else AMOUNT, "cmin": -most if ratio else 0, "cmax": most, "colorbar": bar},
        "shapes": _frames(neurons, site, heads),
    }
    return new_figure([trace], layout, width=width, plot_px=layers * row_px, left=48, right=84, top=12)


def _frames(neurons: NeuronSet | None, site: str, heads: np.ndarray) -> list[dict[str, Any]]:
    if neurons is None or site not in neurons.masks:
        return []
    mask = neurons.masks[site].cpu().numpy()
    if mask.shape[:2] != heads.shape:
        raise ValueError(f"neurons: the mask of site {site!r} is of {list(mask.shape[:2])} heads, not {list(heads.shape)}")
    line = {"color": INK, "width": 1.5}
    return [
        {"type": "rect", "x0": h - 0.46, "x1": h + 0.46, "y0": layer - 0.42, "y1": layer + 0.42, "line": line}
        for layer, h in np.argwhere(mask.all(-1)).tolist()
    ]
