"""Figures of scores: distributions of neuron scores per layer, and a heat map of head scores."""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import plotly.graph_objects as go

from sepcap.checks import checked
from sepcap.drawing.parts import colour_bar
from sepcap.drawing.ridges import ALL, FILLS, LINES, SELECTED, Binned, Panel, bin_layers, edges_of, ridges
from sepcap.drawing.style import (
    INK,
    SITE_NAMES,
    TICK_PX,
    VERMILLION,
    Width,
    capital,
    chosen_layers,
    every,
    in_lines,
    layer_ticks,
    new_figure,
    plain,
    rounded,
    width_px,
)
from sepcap.drawing.themes import drawn
from sepcap.selection.importance import IMPORTANCES, get_importance
from sepcap.selection.names import SIGNED
from sepcap.selection.neurons import NeuronSet
from sepcap.statistics.moments import Statistics

BALANCE = [[0.0, "#08519c"], [0.25, "#6fa8d3"], [0.5, "#f7f7f7"], [0.75, "#f0a36b"], [1.0, "#b54a00"]]
"""Diverging colours for values below and above a midpoint."""
AMOUNT = [[0.0, "#f7f7f7"], [0.5, "#f0a36b"], [1.0, "#b54a00"]]
CELL_PX = (34, 18)
"""Smallest cell of a heat map in which a number of three digits is legible."""


@drawn
@checked()
def score_histograms(
    scores: Any,
    site: str | None = None,
    bins: int = 60,
    neurons: NeuronSet | None = None,
    *,
    layers: Sequence[int] | None = None,
    log_counts: bool = False,
    width: Width | None = None,
) -> go.Figure:
    """Histograms of log10 score, one ridge per layer, one panel per site.

    All layers of a site have the same bins and the same scale. Neurons with score 0 have no logarithm: their share of the
    layer is printed beside its ridge. If a site has negative scores, its axis is linear. Small ticks on the base line mark the lowest and
    the highest neuron of the layer.

    Args:
        scores: what `sepcap.score` returns.
        site: one site only; default all.
        bins: number of bins over the range of the site.
        neurons: a set, coloured in every histogram; its threshold is drawn if all layers have the same one.
        layers: layers to draw; default all.
        log_counts: whether heights are logarithms of the number of neurons, so that the few selected ones are visible.
        width: inches, "column" or "page"; default a column for one site.
    """
    if not 2 <= bins <= 200:
        raise ValueError(f"bins={bins}: give 2 to 200")
    shown = {site: scores[site]} if site is not None else dict(scores)
    if not shown:
        raise ValueError("scores contain no site: there is nothing to draw")
    panels = []
    for name, values in shown.items():
        flat = values.detach().cpu().double().flatten(1).numpy()
        selected = None
        numbers = chosen_layers(layers, range(len(flat)))
        mask = mask_of(neurons, name, flat)[numbers] if neurons is not None and name in neurons.masks else None
        flat = flat[numbers]
        signed = bool((flat < 0).any())
        binned = bin_scores(flat, bins, signed=signed)
        if mask is not None:
            selected = bin_scores(np.where(mask, flat, np.nan), binned.edges, mask, signed=signed)
        said = SITE_NAMES.get(name, plain(name))
        threshold = _threshold(neurons, name, signed)
        axis = "score" if signed else "log<sub>10</sub> score"
        panels.append(
            Panel(
                said,
                "score" if signed else "log10 score",
                axis if len(shown) > 1 else f"{axis}, {said}",
                _finite(flat) if signed else _log10(flat),
                tuple(values.shape[1:]),
                binned,
                selected,
                None if threshold is None else (threshold, VERMILLION),
                heading=capital(said) if len(shown) > 1 else "",
                logarithmic=log_counts,
                numbers=numbers,
            )
        )
    legend = _legend(any(p.line for p in panels)) if any(p.selected for p in panels) else []
    return ridges(panels, width=width, legend=legend)


@drawn
@checked()
def importance_histograms(
    forget: Statistics,
    retain: Statistics,
    importance: str = "abs",
    site: str = "mlp",
    bins: int = 60,
    *,
    layers: Sequence[int] | None = None,
    log_counts: bool = False,
    width: Width = "page",
) -> go.Figure:
    """Histograms of log10 importance on both tasks side by side, one ridge per layer, the same bins for both.

    Args:
        forget, retain: statistics of both tasks, as for `sepcap.score`.
        importance: any importance that gives a number for each task, "abs", "sqrt", "rms", "std", "std_common" or "freq".
        site: which neurons.
        bins: number of bins over the range of both tasks.
        layers: layers to draw; default all.
        log_counts: whether heights are logarithms of the number of neurons.
        width: inches, "column" or "page".

    Raises:
        ValueError: an importance of the pair of tasks, such as "mean_shift".

    Source: METHODS 4.
    """
    row = get_importance(importance)
    if row.pair is not None or importance in SIGNED:
        why = "is a score of both tasks together" if row.pair is not None else "can be negative, and has no logarithm"
        raise ValueError(f"importance={importance!r} {why}; give an importance of a single task that is not negative")
    values = [value.cpu().double() for value in row.values(forget[site], retain[site])]
    numbers = chosen_layers(layers, range(len(values[0])))
    flats = [v[numbers].flatten(1).numpy() for v in values]
    edges = edges_of(np.concatenate([_log10(flat) for flat in flats]), bins)
    panels = []
    for flat, of, role in zip(flats, (forget, retain), ("forget", "retain"), strict=True):
        logs, none = _log10(flat), {f"{importance} = 0": flat <= 0}
        panels.append(
            Panel(
                SITE_NAMES.get(site, plain(site)),
                f"log10 {importance}",
                f"log<sub>10</sub> {importance}",
                logs,
                tuple(values[0].shape[1:]),
                bin_layers(logs, edges, none),
                heading=f"{plain(of.info.get('task', 'merged'), 22)} ({role})",
                logarithmic=log_counts,
                numbers=numbers,
            )
        )
    return ridges(panels, width=width)


def mask_of(neurons: NeuronSet, site: str, flat: np.ndarray) -> np.ndarray:
    """Mask [layer, neuron] of one site, after a check that its shape is that of the values [layer, neuron] to draw."""
    mask = neurons.masks[site].cpu().flatten(1).numpy()
    if mask.shape != flat.shape:
        raise ValueError(f"neurons: the mask of site {site!r} is {list(mask.shape)} but its scores {list(flat.shape)}: different models")
    return mask


def _log10(scores: np.ndarray) -> np.ndarray:
    usable = np.isfinite(scores) & (scores > 0)
    return np.log10(scores, where=usable, out=np.full(scores.shape, np.nan))


def _finite(scores: np.ndarray) -> np.ndarray:
    return np.where(np.isfinite(scores), scores, np.nan)


def bin_scores(scores: np.ndarray, bins: int | np.ndarray, among: np.ndarray | None = None, *, signed: bool = False) -> Binned:
    """Histograms of log10 score [layer, neuron], or of signed scores, over the whole range, or with given edges and among some neurons."""
    logs = _finite(scores) if signed else _log10(scores)
    among = np.ones(scores.shape, bool) if among is None else among
    edges = edges_of(logs, bins) if isinstance(bins, int) else bins
    zero = {} if signed else {"score = 0": among & np.isfinite(scores) & (scores <= 0)}
    without = zero | {"not finite": among & ~np.isfinite(scores)}
    return bin_layers(np.where(among, logs, np.nan), edges, without)


def _threshold(neurons: NeuronSet | None, site: str, signed: bool = False) -> float | None:
    """log10 of the lowest selected score, or the score itself, if all layers have the same threshold."""
    if neurons is None or neurons.info.get("per_layer"):
        return None
    value = neurons.info.get("threshold", {}).get(site)
    if signed:
        return float(value) if value is not None and np.isfinite(value) else None
    return float(np.log10(value)) if value is not None and np.isfinite(value) and value > 0 else None


def _legend(threshold: bool) -> list[go.Scatter]:
    entries = []
    for name, said in ((ALL, "all neurons"), (SELECTED, "selected; dashed: lowest selected score" if threshold else "selected")):
        marker = {"symbol": "square", "size": 10, "color": FILLS[name], "line": {"color": LINES[name], "width": 0.75}}
        entries.append(go.Scatter(x=[None], y=[None], mode="markers", marker=marker, name=said, legendgroup=name))
    return entries


@drawn
@checked()
def head_scores(
    scores: Any,
    aggregate: Literal["mean", "median"] = "mean",
    site: str = "attn_pre_out",
    neurons: NeuronSet | None = None,
    *,
    layers: Sequence[int] | None = None,
    width: Width = "column",
) -> go.Figure:
    """Score of every head as a heat map, layer × head.

    Ratios have a logarithmic colour scale with white at 1 and equal colour strength for 10 and 1/10; scores that are not
    ratios (`mean_shift`, divergences) have a scale from 0, and those with negative values one with white at 0.

    Args:
        scores: what `sepcap.score` returns, with an attention site.
        aggregate: the score of a head is the mean or the median over its d_head neurons (METHODS 5).
        site: "attn_pre_out" or "attn_value".
        neurons: a set; heads that are entirely in it are framed.
        layers: layers to draw; default all.
        width: inches, "column" or "page".

    Source: METHODS 5.
    """
    heads = scores.heads(aggregate, site).detach().cpu().numpy()
    numbers = chosen_layers(layers, range(len(heads)))
    frames = _frames(neurons, site, heads, numbers)
    heads = heads[numbers]
    row = IMPORTANCES.get(scores.info.get("importance", ""))
    ratio = scores.info.get("contrast", "ratio" if row is not None and row.of is not None else None) == "ratio"
    signed = ratio or bool((heads < 0).any())
    shown = _log10(heads) if ratio else np.where(np.isfinite(heads), heads, np.nan)
    if ratio:
        # a head with score 0 gets the colour of the lowest score
        shown = np.where(heads == 0, np.nanmin(shown) if np.isfinite(shown).any() else 0.0, shown)
    most = float(np.nanmax(np.abs(shown))) if np.isfinite(shown).any() else 0.0
    most = most or 1.0  # all scores equal
    rows, n = heads.shape
    cell = (width_px(width) - 48 - 84) / n
    row_px = min(28.0, max(520 / rows, 10.0))
    text = [[f"{v:#.3g}" for v in line] for line in heads]
    hover = (
        f"<b>layer %{{customdata}}, head %{{x}}</b><br>{aggregate} score of its {scores[site].shape[-1]} neurons: %{{text}}"
        f"<br>{capital(SITE_NAMES[site])}<extra></extra>"
    )
    trace = go.Heatmap(
        z=[rounded(line, 4) for line in shown],
        text=text,
        customdata=[[layer] * n for layer in numbers],
        texttemplate="%{text}" if cell >= CELL_PX[0] and row_px >= CELL_PX[1] else None,
        textfont={"size": TICK_PX},
        coloraxis="coloraxis",
        hovertemplate=hover,
    )
    bar = colour_bar(in_lines(f"Score, {aggregate} of head", rows * row_px))
    if ratio:
        ticks = _ratio_ticks(most)
        bar |= {"tickvals": rounded(np.log10(ticks)), "ticktext": [f"{v:g}" for v in ticks]}
    bare = {"tick0": 0, "showline": False, "ticks": ""}
    layout = {
        "xaxis": {"title": {"text": "Head"}, "dtick": every(n, int(n * cell / 22)), **bare},
        "yaxis": {"title": {"text": "Layer"}, **layer_ticks(numbers, rows * row_px / 14), "showline": False, "ticks": ""},
        "coloraxis": {"colorscale": BALANCE if signed else AMOUNT, "cmin": -most if signed else 0, "cmax": most, "colorbar": bar},
        "shapes": frames,
    }
    return new_figure([trace], layout, width=width, plot_px=rows * row_px, left=48, right=84, top=12)


def _ratio_ticks(most: float) -> list[float]:
    """Round ratios on both sides of 1, within 10^-most to 10^most; at least three."""
    for factors in ((1,), (1, 2, 5), (1, 1.5, 2, 3, 5, 7), [1 + i / 10 for i in range(90)], [1 + i / 100 for i in range(900)]):
        inside = [f * 10.0**p for p in range(-int(most) - 2, int(most) + 2) for f in factors]
        inside = [float(f"{v:.6g}") for v in inside if abs(np.log10(v)) <= most * 1.001]
        if len(inside) >= 3 and min(inside) < 1 < max(inside):
            step = -(-(len(inside) // 2) // 3)
            middle = inside.index(1.0)
            return inside[middle % step :: step]
    return [1.0]


def _frames(neurons: NeuronSet | None, site: str, heads: np.ndarray, numbers: Sequence[int]) -> list[dict[str, Any]]:
    if neurons is None or site not in neurons.masks:
        return []
    mask = neurons.masks[site].cpu().numpy()
    if mask.shape[:2] != heads.shape:
        raise ValueError(f"neurons: the mask of site {site!r} has {list(mask.shape[:2])} heads, not {list(heads.shape)}")
    line = {"color": INK, "width": 1.5}
    return [
        {"type": "rect", "x0": h - 0.46, "x1": h + 0.46, "y0": layer - 0.42, "y1": layer + 0.42, "line": line}
        for layer, h in np.argwhere(np.asarray(mask.all(-1))[list(numbers)]).tolist()
    ]
