"""Distributions of activations of chosen neurons or of a head on two tasks, in one basis or in two (METHODS 8 and 13)."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go

from sepcap.checks import ANY, checked
from sepcap.drawing.parts import DOTTED, above, axes_of, colour_bar, entry, panel_axes
from sepcap.drawing.style import (
    BLUE,
    FONT_PX,
    GREY,
    INK,
    ORANGE,
    SHARES,
    SITE_NAMES,
    TICK_PX,
    VERMILLION,
    Width,
    capital,
    every,
    is_wide,
    new_figure,
    plain,
    power_of_ten,
    rounded,
    width_px,
)
from sepcap.drawing.themes import drawn
from sepcap.statistics.moments import NeuronStatistics, Statistics

FEW = 8
"""Largest number of neurons with a panel each; more become rows of a heat map."""
MOST = 256
CELLS = 30_000
"""Maximum number of cells in all heat maps of a figure together, to keep it small."""
COLOURS = (VERMILLION, BLUE)
PANEL_PX, GAP_PX = 96, 44


@dataclass(frozen=True)
class Shown:
    """One task in one basis: density [neuron, bin] per unit of activation, peak and mean [neuron]."""

    density: np.ndarray
    peak: np.ndarray
    mean: np.ndarray


@dataclass(frozen=True)
class Basis:
    """Both tasks in one basis and in the same bins; edges [neuron, bin + 1]."""

    name: str
    edges: np.ndarray
    tasks: tuple[Shown, Shown]
    positions: int


@drawn
@checked(layer=ANY, head=ANY)
def activation_distributions(
    forget: Statistics,
    retain: Statistics,
    *,
    layer: int,
    head: int | None = None,
    neurons: Iterable[int] | None = None,
    site: str | None = None,
    rotated: tuple[Statistics, Statistics] | None = None,
    bins: int = 100,
    width: Width | None = None,
) -> go.Figure:
    """Density of activations on two tasks, on a logarithmic scale, with zero, means and peaks marked.

    Up to 8 neurons have a panel each. More, such as those of a whole head, become rows of a heat map for each task, below the
    density of all neurons together. Both tasks have the same bins, from the smallest to the largest activation of the neuron
    or, in heat maps, of all neurons shown. The peak is the one used by `ablate`, in the neuron's own 100 bins (METHODS 8).

    Args:
        forget, retain: statistics with histograms, `sepcap.collect(..., histogram=True)`.
        layer: which layer.
        head: which head, for an attention site.
        neurons: which neurons of the head or, for mlp, of the layer; default the whole head.
        site: default "mlp", or with a head "attn_pre_out".
        rotated: the same two tasks collected with `rotation=...`, drawn beside the original basis. Its neurons have the
            same indices but are other directions.
        bins: bins of a panel; the heat maps of many neurons have fewer.
        width: inches, "column" or "page"; default is a page if there are two bases.

    Raises:
        ValueError: no histograms, no or too many neurons, or a `rotated` that is not the same tasks in another basis.
        IndexError: a layer, head or neuron that does not exist.

    Source: [PEAK] and [OPT]; METHODS 7, 8 and 13.

    Example:
        >>> forget, retain = (sepcap.collect(model, t, histogram=True) for t in ("local-code", "local-prose"))  # doctest: +SKIP
        >>> sepcap.plots.activation_distributions(forget, retain, layer=3, head=1)  # doctest: +SKIP
    """
    site = site or ("mlp" if head is None else "attn_pre_out")
    if not 2 <= bins <= 500:
        raise ValueError(f"bins={bins}: give 2 to 500")
    pairs = {"" if rotated is None else "original basis": (forget[site], retain[site])}
    if rotated is not None:
        _check_rotated((forget, retain), rotated, site)
        pairs["rotated basis"] = (rotated[0][site], rotated[1][site])
    chosen = _chosen(forget[site].shape, site, layer, head, neurons)
    many = len(chosen) > FEW
    if many:
        bins = min(bins, CELLS // (2 * len(pairs) * len(chosen)))
    bases = [_basis(name, pair, layer, head, chosen, bins, shared=many) for name, pair in pairs.items()]
    tasks = [plain(s.info.get("task", "merged"), 22) for s in (forget, retain)]
    where = f"{capital(SITE_NAMES[site])}, layer {layer}" + ("" if head is None else f", head {head}")
    width = width or ("column" if rotated is None else "page")
    return (_maps if many else _panels)(bases, tasks, chosen, where, width)


def _chosen(shape: tuple[int, ...], site: str, layer: int, head: int | None, neurons: Iterable[int] | None) -> list[int]:
    """Indices of the neurons within the head or layer; all are checked to exist."""
    if (head is None) != (len(shape) == 2):
        raise ValueError(f"head={head}: site {site!r} has {'no heads' if len(shape) == 2 else f'{shape[1]} heads, give one'}")
    if neurons is None and head is None:
        raise ValueError(f"neurons is None: give up to {MOST} of the {shape[1]} neurons of the layer, or a head")
    chosen = list(range(shape[-1])) if neurons is None else list(dict.fromkeys(int(n) for n in neurons))
    for name, value, size in (("layer", layer, shape[0]), ("head", head or 0, shape[1]), *(("neurons", n, shape[-1]) for n in chosen)):
        if not 0 <= value < size:
            raise IndexError(f"{name}: {value} does not exist, site {site!r} has 0 to {size - 1}")
    if not 1 <= len(chosen) <= MOST:
        raise ValueError(f"neurons: {len(chosen)} of them; give 1 to {MOST}")
    return chosen


def _check_rotated(original: Sequence[Statistics], rotated: Sequence[Statistics], site: str) -> None:
    if site == "mlp":
        raise ValueError("rotated: mlp neurons have only one basis; rotations apply to attention sites")
    marks = [s.info.get("rotation") for s in rotated]
    if len(marks) != 2 or marks[0] is None or marks[0] != marks[1]:
        raise ValueError("rotated: give two statistics, forget and retain, collected with the same rotation=...")
    tasks = [[s.info.get("task") for s in pair] for pair in (original, rotated)]
    if tasks[0] != tasks[1]:
        raise ValueError(f"rotated: statistics of {tasks[1]}, but forget and retain are {tasks[0]}")


def _basis(name: str, pair: Sequence[NeuronStatistics], layer: int, head: int | None, chosen: list[int], bins: int, shared: bool) -> Basis:
    where = (layer,) if head is None else (layer, head)
    low = np.min([s.low[where][chosen].cpu().double().numpy() for s in pair], axis=0)
    high = np.max([s.high[where][chosen].cpu().double().numpy() for s in pair], axis=0)
    if shared:
        low, high = np.full_like(low, low.min()), np.full_like(high, high.max())
    # a constant neuron still needs a bin
    flat = high - low <= 1e-6 * np.maximum(np.abs(high), np.abs(low))
    room = np.where(flat, 0.5 * np.maximum(np.abs(high), 1e-3), 0.0)
    edges = np.linspace(low - room, high + room, bins + 1, axis=1)
    first = 0 if head is None else head * pair[0].shape[-1]
    tasks = []
    for s in pair:
        histogram = s.require_histogram()
        shares = [histogram.density(layer, (*where[1:], n), e) for n, e in zip(chosen, edges, strict=True)]
        peaks = [float(histogram.part(layer, slice(first + n, first + n + 1)).peak()) for n in chosen]
        # the rounding error of a difference of equal counts is no activation
        density = np.where(np.array(shares) > 1e-9, shares, 0) / np.diff(edges, axis=1)
        tasks.append(Shown(density, np.array(peaks), s.mean[where][chosen].cpu().numpy()))
    return Basis(name, edges, (tasks[0], tasks[1]), min(s.count for s in pair))


def _steps(basis: Basis, of: int, neuron: int | None, hover: str, name: str, axes: dict[str, str], floor: float) -> go.Scatter:
    """The outline of one density; `neuron=None` pools all neurons."""
    shown = basis.tasks[of].density
    density = shown.mean(0) if neuron is None else shown[neuron]
    edges = basis.edges[neuron or 0]
    # bins without activations are below the axis, so that the outline reaches it
    return go.Scatter(
        x0=float(edges[0]),
        dx=float(edges[1] - edges[0]),
        y=np.maximum(np.append(density, density[-1]), floor / 10).astype(np.float32),
        customdata=np.append(density, density[-1]).astype(np.float32),
        mode="lines",
        line={"shape": "hv", "color": COLOURS[of], "width": 1.25},
        name=name,
        legendgroup=name,
        showlegend=False,
        hovertemplate=f"{hover}<br>bin from %{{x:.4g}}: density %{{customdata:.3g}}<extra></extra>",
        **axes,
    )


def _axes(basis: Basis, neuron: int, floor: float, top: float) -> tuple[dict[str, Any], dict[str, Any]]:
    """An x axis that includes zero, and a logarithmic y axis."""
    low, high = min(float(basis.edges[neuron, 0]), 0.0), max(float(basis.edges[neuron, -1]), 0.0)
    room = 0.02 * (high - low)
    decades = np.log10(top / floor)
    powers = range(int(np.ceil(np.log10(floor))), int(np.floor(np.log10(top))) + 1)[:: max(1, round(decades / 3))]
    y = {"type": "log", "range": [float(np.log10(floor)), float(np.log10(top) + 0.15 * decades)]}
    ticks = {"tickvals": [10.0**p for p in powers], "ticktext": [power_of_ten(p) for p in powers]}
    return {"range": [low - room, high + room], "nticks": 6}, y | ticks


def _floor(basis: Basis, neurons: slice) -> float:
    """Slightly less than the density of a single position."""
    return float(0.7 / (basis.positions * np.diff(basis.edges[neurons], axis=1).max()))


def _zero(key: str) -> dict[str, Any]:
    return {"type": "line", "x0": 0, "x1": 0, "y0": 0, "y1": 1, "xref": f"x{key}", "yref": f"y{key} domain", "line": DOTTED}


def _panels(bases: list[Basis], tasks: list[str], chosen: list[int], where: str, width: Width) -> go.Figure:
    """A panel per neuron; with two bases a row per neuron and a column per basis."""
    across = len(bases) if len(bases) > 1 else min(len(chosen), 4 if is_wide(width) else 2)
    rows = -(-len(chosen) * len(bases) // across)
    panel_px = PANEL_PX if rows > 1 else 1.6 * PANEL_PX
    total = rows * panel_px + (rows - 1) * GAP_PX
    gap = 0.12 if across <= 2 else 0.07
    share = (1 - gap * (across - 1)) / across
    traces: list[Any] = []
    layout: dict[str, Any] = {"annotations": [above(where, shift=22, font={"size": FONT_PX})], "shapes": []}
    for i in range(len(chosen) * len(bases)):
        neuron, basis = i // len(bases), bases[i % len(bases)]
        key, axes = axes_of(i)
        row, column = divmod(i, across)
        top = 1 - row * (panel_px + GAP_PX) / total
        start = column * (share + gap)
        floor = _floor(basis, slice(neuron, neuron + 1))
        highest = max(float(t.density[neuron].max()) for t in basis.tasks)
        said = f"neuron {chosen[neuron]}" + (f", {basis.name}" if basis.name else "")
        x, y = _axes(basis, neuron, floor, highest)
        for of, (task, name) in enumerate(zip(basis.tasks, tasks, strict=True)):
            hover = f"<b>{where}, {said}</b><br>{name}"
            traces.append(_steps(basis, of, neuron, hover, name, axes, floor))
            marks = {"peak": task.peak[neuron], "mean": task.mean[neuron]}
            traces += [_mark(kind, float(v), 10 ** y["range"][1], 10 ** y["range"][0], of, hover, axes) for kind, v in marks.items()]
        last = row == rows - 1 or i + across >= len(chosen) * len(bases)
        x, y = {"title": {"text": "Activation"} if last else {}, **x}, {"title": {"text": "Density"} if column == 0 else {}, **y}
        layout |= panel_axes(key, x, y, (start, start + share), (top - panel_px / total, top))
        layout["annotations"].append(above(capital(said), start, top, font={"size": TICK_PX}))
        layout["shapes"].append(_zero(key))
    entries = _entries(tasks)
    margins = {"left": 62, "right": 14, "top": 46, "legend_rows": len(entries), "legend_below": True}
    return new_figure([*traces, *entries], layout, width=width, plot_px=total, **margins)


def _mark(kind: str, at: float, top: float, bottom: float, of: int, hover: str, axes: dict[str, str]) -> go.Scatter:
    """The peak as a triangle at the top, the second task's below the first's; the mean as a vertical line."""
    common = {"name": kind, "showlegend": False, "hovertemplate": f"{hover}<br>{kind} {at:.4g}<extra></extra>", "cliponaxis": False, **axes}
    if kind == "peak":
        marker = {"symbol": "triangle-down", "size": 8, "color": COLOURS[of], "line": {"color": "white", "width": 0.5}}
        height = top * (bottom / top) ** (0.09 * of)
        return go.Scatter(x=[at], y=[height], mode="markers", marker=marker, **common)
    return go.Scatter(x=[at, at], y=[top, bottom], mode="lines", line={"color": COLOURS[of], "width": 1, "dash": "dash"}, **common)


def _entries(tasks: list[str]) -> list[go.Scatter]:
    return [
        *(entry(t, mode="lines", line={"color": c, "width": 1.5}, legendgroup=t) for c, t in zip(COLOURS, tasks, strict=True)),
        entry("peak", mode="markers", marker={"symbol": "triangle-down", "size": 8, "color": GREY}),
        entry("mean", mode="lines", line={"color": GREY, "width": 1, "dash": "dash"}),
        entry("zero", mode="lines", line=DOTTED),
    ]


def _maps(bases: list[Basis], tasks: list[str], chosen: list[int], where: str, width: Width) -> go.Figure:
    """The density of all neurons together, above one heat map per task with a row per neuron."""
    row_px = min(12.0, max(2.5, 300 / len(chosen)))
    map_px = row_px * len(chosen)
    total = PANEL_PX + GAP_PX + map_px
    gap_px, pair_gap_px = 14, 66
    left, right = 62, 78
    plot = width_px(width) - left - right
    each = (plot - pair_gap_px * (len(bases) - 1) - gap_px * len(bases)) / (2 * len(bases))
    traces: list[Any] = []
    layout: dict[str, Any] = {"annotations": [above(where, shift=22 if len(bases) > 1 else 3, font={"size": FONT_PX})], "shapes": []}
    spread = [t.density[t.density > 0] for b in bases for t in b.tasks]
    floor_of = [_floor(b, slice(None)) for b in bases]
    low, high = np.log10(min(floor_of)), float(np.log10(max(s.max() for s in spread)))
    for i, (basis, floor) in enumerate(zip(bases, floor_of, strict=True)):
        start = i * (2 * each + gap_px + pair_gap_px) / plot
        stop = start + (2 * each + gap_px) / plot
        pooled, axes = axes_of(3 * i)
        highest = max(float(t.density.mean(0).max()) for t in basis.tasks)
        x, y = _axes(basis, 0, floor / len(chosen), highest)
        for of, (task, name) in enumerate(zip(basis.tasks, tasks, strict=True)):
            hover = f"<b>{where}, {len(chosen)} neurons together</b><br>{name}"
            traces.append(_steps(basis, of, None, hover, name, axes, floor / len(chosen)))
            key, of_map = axes_of(3 * i + 1 + of)
            traces += _map(basis, task, chosen, f"<b>{where}, neuron %{{y}}</b><br>{name}", of_map)
            begin = start + of * (each + gap_px) / plot
            rows = {"type": "category", "range": [len(chosen) - 0.5, -0.5], **_rows(chosen, row_px), "showticklabels": of == 0}
            rows |= {"title": {"text": "Neuron"} if of == 0 else {}}
            along = {"title": {"text": "Activation"}, **x, "nticks": 4}
            layout |= panel_axes(key, along, rows, (begin, begin + each / plot), (0, map_px / total))
            layout["annotations"].append(above(name, begin, map_px / total, font={"size": TICK_PX}))
            layout["shapes"].append(_zero(key))
        layout |= panel_axes(pooled, x, {"title": {"text": "Density"}, **y}, (start, stop), (1 - PANEL_PX / total, 1))
        layout["shapes"].append(_zero(pooled))
        if basis.name:
            layout["annotations"].append(above(capital(basis.name), start, font={"size": TICK_PX}))
    bar = colour_bar("log<sub>10</sub> density", dtick=1, len=map_px, lenmode="pixels", y=0, yanchor="bottom")
    bar["title"]["font"] = {"size": FONT_PX}
    layout["coloraxis"] = {"colorscale": SHARES, "cmin": float(low), "cmax": high, "colorbar": bar}
    entries = [*_entries(tasks)[:2], *_map_entries()]
    margins = {"left": left, "right": right, "top": 46 if len(bases) > 1 else 26, "legend_rows": len(entries), "legend_below": True}
    return new_figure([*traces, *entries], layout, width=width, plot_px=total, **margins)


def _rows(chosen: list[int], row_px: float) -> dict[str, Any]:
    """Ticks of a heat map, labelled with the neurons of its rows."""
    at = list(range(0, len(chosen), every(len(chosen), int(len(chosen) * row_px / 15))))
    return {"tickvals": at, "ticktext": [str(chosen[i]) for i in at]}


def _map(basis: Basis, task: Shown, chosen: list[int], hover: str, axes: dict[str, str]) -> list[Any]:
    edges = basis.edges[0]
    logs = np.log10(task.density, where=task.density > 0, out=np.full(task.density.shape, np.nan))
    step = float(edges[1] - edges[0])
    names = [str(n) for n in chosen]
    heat = go.Heatmap(
        z=logs.astype(np.float32),
        x0=float(edges[0]) + step / 2,
        dx=step,
        y=names,
        coloraxis="coloraxis",
        hovertemplate=f"{hover}<br>around %{{x:.4g}}: log10 density %{{z:.2f}}<extra></extra>",
        hoverongaps=False,
        **axes,
    )
    marks = [
        go.Scatter(
            x=rounded(values),
            y=names,
            mode="markers",
            marker=MARKS[kind],
            name=kind,
            showlegend=False,
            hovertemplate=f"{hover}<br>{kind} %{{x:.4g}}<extra></extra>",
            **axes,
        )
        for kind, values in (("mean", task.mean), ("peak", task.peak))
    ]
    return [heat, *marks]


MARKS = {
    "peak": {"symbol": "circle", "size": 3.5, "color": ORANGE, "line": {"width": 0}},
    "mean": {"symbol": "circle", "size": 4, "color": "white", "line": {"color": INK, "width": 0.75}},
}


def _map_entries() -> list[go.Scatter]:
    marks = [entry(kind, mode="markers", marker=mark | {"size": 6}) for kind, mark in MARKS.items()]
    return [*marks, entry("zero", mode="lines", line=DOTTED)]
