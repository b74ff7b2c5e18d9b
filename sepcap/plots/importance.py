"""Importance on the forget task against importance on the retain task, neuron by neuron (METHODS 4 and 5)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go

from sepcap.checks import checked
from sepcap.drawing.cells import Grid, counts_bar, logarithmic
from sepcap.drawing.parts import DOTTED, above, axes_of, entry, panel_axes
from sepcap.drawing.style import (
    GREY,
    INK,
    SITE_NAMES,
    TICK_PX,
    VERMILLION,
    Width,
    axis_break,
    capital,
    chosen_layers,
    new_figure,
    packed,
    plain,
    power_of_ten,
    rounded,
    width_px,
)
from sepcap.drawing.themes import drawn
from sepcap.models.sites import get_site
from sepcap.selection.figures import mask_of
from sepcap.selection.importance import IMPORTANCES, get_importance
from sepcap.selection.names import resolve_contrast
from sepcap.selection.neurons import NeuronSet
from sepcap.selection.score import score
from sepcap.statistics.moments import Statistics

MOST_POINTS = 600
"""Largest number of chosen neurons of all sites that are drawn one by one; with more, every cell that contains some is marked."""
NAMED = 2
"""Number of neurons with the highest, and with the lowest, scores of every layer that are always drawn one by one."""
BYTES = 155_000
"""Maximum size of all numbers of a figure before packing; it determines how fine the cells of single layers are."""
MARKED_BINS = 40
"""Maximum number of cells along an axis if they have marks."""
LEFT, RIGHT, GAP = 62, 78, 66
CHOSEN, POINTS, LOWEST, EQUAL = "chosen", "points", "lowest chosen score", "equal on both tasks"


@dataclass(frozen=True)
class Site:
    """One site: importances and scores [layer, neuron], chosen neurons, and the lowest score at which they are chosen."""

    name: str
    shape: tuple[int, ...]
    forget: np.ndarray
    retain: np.ndarray
    scores: np.ndarray
    chosen: np.ndarray
    eps: float
    threshold: float | None
    crowded: bool
    numbers: list[int]

    def extremes(self, layer: int) -> np.ndarray:
        """Neurons of a layer with its lowest and highest scores."""
        scores = self.scores[layer]
        ranked = scores.argsort(kind="stable")
        ranked = ranked[scores[ranked] > 0]
        return np.unique(np.concatenate([ranked[:NAMED], ranked[-NAMED:]]))

    def points(self, layer: int) -> np.ndarray:
        """Neurons of a layer that are drawn one by one."""
        named = self.extremes(layer)
        return named if self.crowded else np.union1d(named, np.flatnonzero(self.chosen[layer]))


@drawn
@checked()
def importance_scatter(
    forget: Statistics,
    retain: Statistics,
    importance: str = "abs",
    neurons: NeuronSet | None = None,
    *,
    site: str | None = None,
    layers: Sequence[int] | None = None,
    eps: float | None = None,
    bins: int = 60,
    width: Width | None = None,
) -> go.Figure:
    """Importance of every neuron on the forget task against that on the retain task, both logarithmic, one panel per site.

    Neurons are counted in cells. Chosen neurons and those with the highest and lowest scores are points with names; if more than
    600 are chosen, every cell that contains some has a mark whose size shows their share of the cell.
    Neurons with importance 0 are beyond the axis break, at the tick 0. A slider shows single layers, with coarser cells.

    Args:
        forget, retain: statistics of both tasks, as for `sepcap.score`.
        importance: any importance that gives a number for each task, "abs", "sqrt", "rms", "std", "std_common" or "freq".
        neurons: chosen neurons. If they have the highest scores of this importance over all layers, the line of the
            lowest chosen score is drawn.
        site: one site only; default all.
        layers: layers to draw; default all.
        eps: ε of the score, default that of the site (METHODS 5).
        bins: number of cells along each axis.
        width: inches, "column" or "page"; default a column for one site.

    Raises:
        ValueError: an importance defined only for the pair of tasks, such as "mean_shift".

    Source: [SP] definition 2; METHODS 5.
    """
    row = get_importance(importance)
    if row.pair is not None:
        alone = [name for name in IMPORTANCES if resolve_contrast(name) == "ratio"]
        raise ValueError(f"importance={importance!r} is defined only for both tasks together; use one of {', '.join(alone)}")
    if resolve_contrast(importance) != "ratio":
        raise ValueError(f"importance={importance!r} has no ratio of both tasks, which this figure draws; 'abs' has one")
    if not 2 <= bins <= 100:
        raise ValueError(f"bins={bins}: give 2 to 100")
    names = [site] if site is not None else list(forget)
    scores = score(forget, retain, importance, eps=eps, sites=names)
    if row.relative_eps and eps is None:
        raise ValueError(f"eps is missing: importance={importance!r} has no ε of its own for all sites; give eps=")
    crowded = neurons is not None and sum(neurons.count(name) for name in names) > MOST_POINTS
    sites = []
    for name in names:
        values = scores[name].cpu().flatten(1).numpy()
        f, r = (value.cpu().double().flatten(1).numpy() for value in scores.importances[name])
        chosen = mask_of(neurons, name, f) if neurons is not None and name in neurons.masks else np.zeros(f.shape, bool)
        shape, constant = tuple(forget[name].shape[1:]), get_site(name).eps if eps is None else eps
        numbers, threshold = chosen_layers(layers, range(len(f))), _threshold(neurons, name, values, chosen)
        f, r, values, chosen = (each[numbers] for each in (f, r, values, chosen))
        sites.append(Site(name, shape, f, r, values, chosen, constant, threshold, crowded, numbers))
    width = width or ("column" if len(sites) == 1 else "page")
    return _figure(sites, bins, width, importance, [plain(s.info.get("task", "merged"), 18) for s in (forget, retain)])


def _threshold(neurons: NeuronSet | None, site: str, scores: np.ndarray, chosen: np.ndarray) -> float | None:
    """The lowest chosen score, if the set records that it was chosen by this score over all layers."""
    if neurons is None or neurons.info.get("per_layer") or not chosen.any():
        return None
    stated, lowest = neurons.info.get("threshold", {}).get(site), float(scores[chosen].min())
    return lowest if stated is not None and np.isclose(stated, lowest, rtol=1e-6) and lowest > 0 else None


def _figure(sites: list[Site], bins: int, width: Width, importance: str, tasks: list[str]) -> go.Figure:
    layers = len(sites[0].scores)
    total = width_px(width) - LEFT - RIGHT
    panel = (total - GAP * (len(sites) - 1)) / len(sites)
    views: list[list[dict[str, Any]]] = [[] for _ in range(layers + 1 if layers > 1 else 1)]  # the same traces for all layers and for each
    drawn: list[tuple[Site, Grid, dict[str, str]]] = []
    lines: list[Any] = []
    layout: dict[str, Any] = {"annotations": []}
    fullest = 1
    for i, s in enumerate(sites):
        key, axes = axes_of(i)
        grid = _grid(s, min(bins, MARKED_BINS) if s.crowded else bins)
        drawn.append((s, grid, axes))
        counts, chosen = _counts(s, slice(None), grid)
        fullest = max(fullest, int(counts.max()))
        views[0] += _traces(s, range(layers), grid, counts, chosen, panel, axes)
        lines += _lines(s, grid, axes)
        zeros = bool((s.forget == 0).any() or (s.retain == 0).any())
        axis = _axis(grid, panel, zeros)
        if zeros:
            apart = (grid.zero[1] + grid.low) / 2
            layout["annotations"] += [axis_break(f"x{key}", apart, f"y{key}"), axis_break(f"y{key}", apart, f"x{key}")]
        start = i * (panel + GAP) / total
        x = {"title": {"text": f"{importance} on {tasks[1]} (retain)"}, **axis}
        y = {"title": {"text": f"{importance} on {tasks[0]} (forget)"} if i == 0 else {}, **axis}
        layout |= panel_axes(key, x, y, (start, start + panel / total))
        layout["annotations"].append(above(capital(SITE_NAMES[s.name]), start, shift=4))
    if layers > 1:
        # the data of all layers together are in the figure twice, and their points also in the views of single layers
        room = (BYTES - sum(2 * _bytes(t) + (t["name"] == POINTS) * _bytes(t) for t in views[0])) // len(sites)
        for s, grid, axes in drawn:
            for layer, view in enumerate(_by_layer(s, grid, room)):
                fullest = max(fullest, int(view[1].max()))
                views[layer + 1] += _traces(s, [layer], *view, panel, axes)
        layout["sliders"] = [_slider(views)]
    layout["coloraxis"] = {"cmin": 0, "cmax": fullest, "colorscale": logarithmic(fullest), "showscale": False}
    layout["coloraxis2"] = {"cmin": 0, "cmax": 1, "colorscale": [[0, INK], [1, VERMILLION]], "showscale": False}
    entries = _entries(sites)
    margins = {"left": LEFT, "right": RIGHT, "top": 26, "legend_rows": len(entries), "legend_below": True}
    traces = [*views[0], *lines, *entries, counts_bar(fullest)]
    return new_figure(traces, layout, width=width, plot_px=panel, slider=layers > 1, **margins)


def _bytes(trace: dict[str, Any]) -> int:
    return sum(value.nbytes for value in trace.values() if isinstance(value, np.ndarray))


def _slider(views: list[list[dict[str, Any]]]) -> dict[str, Any]:
    """One step per view, which replaces what differs between views in the first traces of the figure."""
    steps = []
    for traces in views:
        new = {key: [packed(t.get(key)) for t in traces] for key in ("name", "z", "x", "y", "customdata")}
        for key in ("size", "color", "line.width"):
            new[f"marker.{key}"] = [packed(_marker_of(t, key)) for t in traces]
        label = traces[0]["name"].split()[-1]
        steps.append({"label": label.replace("layers", "all"), "method": "restyle", "args": [new, list(range(len(traces)))]})
    return {"active": 0, "currentvalue": {"prefix": "Layer: ", "font": {"size": TICK_PX}}, "font": {"size": TICK_PX}, "steps": steps}


def _marker_of(trace: dict[str, Any], key: str) -> Any:
    value: Any = trace.get("marker", {})
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _grid(s: Site, bins: int) -> Grid:
    both = np.concatenate([s.forget.ravel(), s.retain.ravel()])
    logs = np.log10(both[both > 0]) if (both > 0).any() else np.zeros(1)
    low, high = float(logs.min()), float(logs.max())
    # a little more than the range, so that the extremes are not on the frame
    room = max(0.01 * (high - low), 0.01)
    low, step = low - room, (high - low + 2 * room) / bins
    return Grid(low, step, bins, (low - 2 * step, low - step))


def _counts(s: Site, layer: slice | int, grid: Grid) -> tuple[np.ndarray, np.ndarray]:
    forget, retain, chosen = s.forget[layer].ravel(), s.retain[layer].ravel(), s.chosen[layer].ravel()
    return grid.count(forget, retain), grid.count(forget[chosen], retain[chosen])


View = tuple[Grid, np.ndarray, np.ndarray]


def _by_layer(s: Site, grid: Grid, room: int) -> list[View]:
    """Cells of single layers with all and with chosen neurons, as fine as `room` allows."""
    views: list[View] = []
    for bins in (60, 48, 36, 28, 22, 16, 12, 8):
        cells = grid.with_bins(bins)
        views = [(cells, *_counts(s, layer, cells)) for layer in range(len(s.scores))]
        marks = sum(int((chosen > 0).sum()) for *_, chosen in views) if s.crowded else 0
        if sum(counts.nbytes for _, counts, _ in views) + 11 * marks <= room:
            break
    return views


def _traces(
    s: Site, layers: Sequence[int], cells: Grid, counts: np.ndarray, chosen: np.ndarray, panel_px: float, axes: dict[str, str]
) -> list[dict[str, Any]]:
    """Traces of some layers: cells, marks of chosen neurons in them if there are many, and points."""
    heat = {
        "type": "heatmap",
        "name": "all layers" if len(layers) == len(s.scores) else f"layer {s.numbers[layers[0]]}",
        "z": counts,
        "x": cells.edges,
        "y": cells.edges,
        "coloraxis": "coloraxis",
        "hovertemplate": "<b>%{fullData.name}</b>: %{z:,} neurons<br>log10 forget %{y:.2f}, retain %{x:.2f}<extra></extra>",
        **axes,
    }
    if not s.crowded:
        return [heat, _points(s, layers, cells, axes)]
    y, x = np.nonzero(chosen)
    middle = (cells.edges[1:] + cells.edges[:-1]) / 2
    share = chosen[y, x] / counts[y, x]
    size = np.round(panel_px / (cells.bins + 2) * np.sqrt(share)).clip(1)
    marks = {
        "type": "scatter",
        "x": middle[x],
        "y": middle[y],
        "customdata": chosen[y, x],
        "mode": "markers",
        "marker": {"symbol": "square", "color": VERMILLION, "size": size.astype(np.uint8), "opacity": 0.7, "line": {"width": 0}},
        "name": CHOSEN,
        "showlegend": False,
        "hovertemplate": "%{customdata:,} chosen neurons in this cell<extra></extra>",
        **axes,
    }
    return [heat, marks, _points(s, layers, cells, axes)]


def _points(s: Site, layers: Sequence[int], grid: Grid, axes: dict[str, str]) -> dict[str, Any]:
    at = [s.points(layer) for layer in layers]
    layer, neuron = np.repeat(layers, [len(a) for a in at]), np.concatenate(at).astype(np.int64)
    extreme = np.concatenate([np.isin(a, s.extremes(n)) for n, a in zip(layers, at, strict=True)])
    # the extremes are drawn above the others
    order = np.argsort(extreme, kind="stable")
    layer, neuron, extreme = layer[order], neuron[order], extreme[order]
    forget, retain = s.forget[layer, neuron], s.retain[layer, neuron]
    named = [np.asarray(s.numbers)[layer], *np.unravel_index(neuron, s.shape), forget, retain]
    words = ["layer", "neuron"] if len(s.shape) == 1 else ["layer", "head", "neuron"]
    where = ", ".join(f"{word} %{{customdata[{i}]}}" for i, word in enumerate(words))
    first, second = (f"%{{customdata[{len(words) + i}]:.4g}}" for i in range(2))
    return {
        "type": "scatter",
        "x": grid.place(retain).astype(np.float32),
        "y": grid.place(forget).astype(np.float32),
        "customdata": np.stack(named, axis=1).astype(np.float32),
        "mode": "markers",
        "marker": {
            "color": s.chosen[layer, neuron].astype(np.uint8),
            "coloraxis": "coloraxis2",
            "size": np.where(extreme, 6, 3.5).astype(np.float32),
            "line": {"color": INK, "width": extreme.astype(np.uint8)},
            "opacity": 1,
        },
        "name": POINTS,
        "showlegend": False,
        "hovertemplate": f"<b>{where}</b><br>forget {first}, retain {second}<extra></extra>",
        **axes,
    }


def _lines(s: Site, grid: Grid, axes: dict[str, str]) -> list[go.Scatter]:
    """Equal importance, and the lowest chosen score t: I_forget = t (I_retain + ε)."""
    low, high = grid.low, grid.low + grid.bins * grid.step
    common = {"mode": "lines", "showlegend": False, "hoverinfo": "skip", **axes}
    lines = [go.Scatter(x=[low, high], y=[low, high], line={**DOTTED, "color": GREY}, name=EQUAL, **common)]
    if s.threshold is not None:
        x = np.linspace(low, high, 80)
        y = np.log10(s.threshold * (10**x + s.eps))
        lines.append(go.Scatter(x=rounded(x), y=rounded(y), line={"color": INK, "width": 1, "dash": "dash"}, name=LOWEST, **common))
    return lines


def _axis(grid: Grid, panel_px: float, zeros: bool) -> dict[str, Any]:
    """Ticks at powers of ten, or at 1, 2 and 5 times them if there are few, and one for 0."""
    high = grid.low + grid.bins * grid.step
    powers = range(int(np.ceil(grid.low)), int(np.floor(high)) + 1)
    if len(powers) >= 3:
        shown = powers[:: -(-len(powers) * 36 // int(panel_px))]
        values, texts = [float(p) for p in shown], [power_of_ten(p) for p in shown]
    else:
        fine = [f * 10.0**p for p in range(int(np.floor(grid.low)), int(np.ceil(high)) + 1) for f in (1, 2, 5)]
        fine = [v for v in fine if grid.low <= np.log10(v) <= high]
        values, texts = [float(np.log10(v)) for v in fine], [f"{v:g}" for v in fine]
    lowest = grid.low
    if zeros:
        lowest = grid.zero[0]
        # a power next to the 0 would overlap it
        apart = [(v, t) for v, t in zip(values, texts, strict=True) if (v - lowest) / (high - lowest) * panel_px > 30]
        values, texts = [float(np.mean(grid.zero)), *(v for v, _ in apart)], ["0", *(t for _, t in apart)]
    return {"range": [lowest, high], "tickvals": values, "ticktext": texts, "tickangle": 0}


def _entries(sites: list[Site]) -> list[go.Scatter]:
    """The legend."""
    entries = []
    total = sum(int(s.chosen.sum()) for s in sites)
    if total:
        crowded = ", size: share of the cell" if any(s.crowded for s in sites) else ""
        entries.append(entry(f"{CHOSEN} ({total:,}){crowded}", mode="markers", marker={"color": VERMILLION, "size": 5}))
    said = f"highest {NAMED}, lowest {NAMED} of a layer{'; ringed: chosen' if total else ''}"
    entries.append(entry(said, mode="markers", marker={"color": INK, "size": 7}))
    if any(s.threshold is not None for s in sites):
        entries.append(entry(LOWEST, mode="lines", line={"color": INK, "width": 1, "dash": "dash"}))
    return [*entries, entry(EQUAL, mode="lines", line={**DOTTED, "color": GREY})]
