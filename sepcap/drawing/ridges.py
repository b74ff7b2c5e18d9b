"""Ridge plots: one histogram per layer, stacked, binned before drawing."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go

from sepcap.drawing.parts import above, axes_of, entry, panel_axes
from sepcap.drawing.style import FAINT, INK, TICK_PX, VERMILLION, Width, in_lines, layer_ticks, new_figure, rounded, width_px

LEFT_PX = 46
RIDGE = 0.9
"""Height of the highest bin of a panel, in units of the layer spacing: below 1, so that no ridge hides the one above."""
ALL, SELECTED = "all", "selected"
FILLS = {ALL: "#9fc3dc", SELECTED: VERMILLION}
LINES = {ALL: INK, SELECTED: VERMILLION}


@dataclass(frozen=True)
class Binned:
    """Histograms of a value per neuron, with the same bins in all layers.

    Attributes:
        edges: [bin + 1].
        counts: [layer, bin] neurons.
        beside: label next to the ridges -> [layer] number of neurons to which it applies.
        per_layer: number of neurons in a layer.
    """

    edges: np.ndarray
    counts: np.ndarray
    beside: Mapping[str, np.ndarray]
    per_layer: int


def edges_of(values: np.ndarray, bins: int) -> np.ndarray:
    """Equal bins over the range of the finite values."""
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (-1.0, 1.0)
    if high - low < 1e-6:
        low, high = low - 0.5, high + 0.5
    return np.linspace(low, high, bins + 1)


def bin_layers(values: np.ndarray, edges: np.ndarray, beside: Mapping[str, np.ndarray]) -> Binned:
    """Histogram per layer of values [layer, neuron]; NaN is not binned. `beside` maps a label to a mask [layer, neuron]."""
    counts = np.stack([np.histogram(layer[np.isfinite(layer)], edges)[0] for layer in values])
    return Binned(edges, counts, {said: mask.sum(1) for said, mask in beside.items()}, values.shape[1])


@dataclass(frozen=True)
class Panel:
    """What one panel shows.

    Attributes:
        what: name of the neurons, for hover texts.
        quantity: name of the value, for hover texts.
        title: of the x axis.
        values: [layer, neuron] that were binned; NaN is not binned.
        shape: of one layer, (neuron,) or (head, d_head).
        binned: all neurons.
        selected: the coloured part of them.
        line: position and colour of a vertical line.
        heading: text above the panel, if there are several.
        logarithmic: whether the heights of bins are logarithms, log(1 + neurons).
        numbers: layer numbers; default 0, 1, ...
    """

    what: str
    quantity: str
    title: str
    values: np.ndarray
    shape: tuple[int, ...]
    binned: Binned
    selected: Binned | None = None
    line: tuple[float, str] | None = None
    heading: str = ""
    logarithmic: bool = False
    numbers: Sequence[int] | None = None

    def heights(self, counts: np.ndarray) -> np.ndarray:
        """Heights of bins, relative to the highest in the panel."""
        highest = max(1, int(self.binned.counts.max()))
        return RIDGE * (np.log1p(counts) / np.log1p(highest) if self.logarithmic else counts / highest)

    @property
    def layers(self) -> list[int]:
        """The numbers of the layers that are shown."""
        return list(range(len(self.binned.counts)) if self.numbers is None else self.numbers)


def neuron_name(layer: int, position: int, shape: Sequence[int]) -> str:
    """Layer, head and neuron in words; `shape` is that of one layer, (neuron,) or (head, d_head)."""
    within = np.unravel_index(position, tuple(shape))
    return f"layer {layer}, " + ", ".join(f"{word} {i}" for word, i in zip(("head", "neuron")[-len(within) :], within, strict=True))


def ridges(panels: Sequence[Panel], *, width: Width | None, legend: Sequence[go.Scatter] = ()) -> go.Figure:
    """Panels of ridges side by side, with the labels of the ridges at the right of each panel."""
    tallest = max(_top(p.binned) for p in panels)
    row_px = 34 if tallest <= 10 else 26 if tallest <= 18 else 17
    traces: list[Any] = []
    layout: dict[str, Any] = {"annotations": [], "shapes": []}
    width = width or ("column" if len(panels) == 1 else "page")
    gap = 0.09 if len(panels) > 1 else 0.0
    share = (1 - gap * (len(panels) - 1)) / len(panels)
    headings = [in_lines(panel.heading, (share + gap) * (width_px(width) - LEFT_PX)) for panel in panels]
    for i, panel in enumerate(panels):
        b = panel.binned
        key, axes = axes_of(i)
        start = i * (share + gap)
        # the column of shares takes its space from the panel, so that panels stay apart
        room = (0.14 if len(panels) == 1 else 0.26) if _said(b) else 0.0
        end = min(1.0, start + share * (1 - room))
        traces += [*_outlines(panel, axes), _ends(panel, axes)]
        y = {"range": [-0.15, tallest], **layer_ticks(panel.layers, 16), "title": {"text": "Layer"} if i == 0 else {}, "showline": False}
        layout |= panel_axes(key, {"title": {"text": panel.title}, "range": [b.edges[0], b.edges[-1]]}, y, (start, end))
        layout["annotations"] += _shares(b, key, end)
        if panel.heading:
            layout["annotations"].append(above(headings[i], start, shift=4, align="left"))
        if panel.line is not None:
            x, colour = panel.line
            place = {"xref": f"x{key}", "yref": f"y{key} domain", "x0": x, "x1": x, "y0": 0, "y1": 1}
            layout["shapes"].append({"type": "line", **place, "line": {"color": colour, "width": 1, "dash": "3px,3px"}})
    plot_px = row_px * (tallest + 0.15)
    lines = max(heading.count("<br>") for heading in headings)
    margins: dict[str, Any] = {"left": LEFT_PX, "top": 30 + 15 * lines if any(headings) else 14}
    strokes = {"symbol": "line-ns", "size": 8, "line": {"color": INK, "width": 1}}
    entries = [*legend, entry("lowest and highest neuron of the layer", mode="markers", marker=strokes)]
    said = _explained(panels)
    layout["legend"] = {"title": {"text": "<br>".join(said)}}
    rows = len(entries) + len(said)
    return new_figure([*traces, *entries], layout, width=width, plot_px=plot_px, legend_rows=rows, legend_below=True, **margins)


def _explained(panels: Sequence[Panel]) -> list[str]:
    """The meaning of the heights and of the numbers at the right."""
    highest = sorted({int(p.binned.counts.max()) for p in panels})
    how = "logarithm of the neurons per bin" if panels[0].logarithmic else "neurons per bin"
    said = [f"Height: {how}, at most {' and '.join(f'{n:,}' for n in highest)}"]
    beside = dict.fromkeys(text for p in panels for text in _said(p.binned))
    return said + ([f"At the right: share of neurons with {' / '.join(beside)}"] if beside else [])


def _said(b: Binned) -> dict[str, np.ndarray]:
    return {said: numbers for said, numbers in b.beside.items() if numbers.any()}


def _top(b: Binned) -> float:
    """Upper end of the y axis: above every ridge and the heading of the shares."""
    return len(b.counts) - 1 + (1.3 if _said(b) else 1.0)


def _outlines(panel: Panel, axes: dict[str, str]) -> list[go.Scatter]:
    b = panel.binned
    highest = max(1, int(b.counts.max()))
    ends = rounded(b.edges[[0, -1]], 7)
    step = float(b.edges[1] - b.edges[0])
    traces = []
    # from the top down, so that a high ridge is in front of the layer above it
    for layer in reversed(range(len(b.counts))):
        base = go.Scatter(
            x=ends, y=[layer, layer], mode="lines", line={"color": FAINT, "width": 1}, hoverinfo="skip", showlegend=False, **axes
        )
        traces.append(base)
        for part, name in ((b, ALL), (panel.selected, SELECTED)):
            if part is None or not part.counts[layer].any():
                continue
            filled = np.flatnonzero(part.counts[layer])
            first, counts = int(filled[0]), part.counts[layer, filled[0] : filled[-1] + 1]
            # the outline follows the base line for one bin, then the bins, and returns to the base line
            traces.append(
                go.Scatter(
                    x0=round(float(b.edges[first]) - step, 7),
                    dx=step,
                    y=np.concatenate([[layer], layer + panel.heights(counts), [layer]]).astype(np.float32),
                    customdata=np.concatenate([[0], counts, [0]]).astype(np.min_scalar_type(highest)),
                    mode="lines",
                    line={"shape": "hv", "color": LINES[name], "width": 0.75},
                    fill="toself",
                    fillcolor=FILLS[name],
                    hoveron="points",
                    name=name,
                    legendgroup=name,
                    showlegend=False,
                    hovertemplate=_hover(panel, layer, part, name),
                    **axes,
                )
            )
    return traces


def _hover(panel: Panel, layer: int, part: Binned, name: str) -> str:
    lines = [
        f"<b>{panel.what}, layer {panel.layers[layer]}</b> ({name})",
        f"{panel.quantity} from %{{x:.4g}}, bin width {part.edges[1] - part.edges[0]:.2g}",
        f"%{{customdata:,}} of {part.per_layer:,} neurons",
    ]
    for said in _said(panel.binned):
        lines.append(f"{said}: {part.beside[said][layer]:,} ({part.beside[said][layer] / part.per_layer:.2%} of the layer)")
    return "<br>".join(lines) + "<extra></extra>"


def _ends(panel: Panel, axes: dict[str, str]) -> go.Scatter:
    """The lowest and the highest neuron of every layer, by name."""
    x, y, hovers = [], [], []
    for layer, values in enumerate(panel.values):
        if not np.isfinite(values).any():
            continue
        for said, position in (("lowest", int(np.nanargmin(values))), ("highest", int(np.nanargmax(values)))):
            x.append(float(values[position]))
            y.append(layer)
            where = f"{panel.what}, {neuron_name(panel.layers[layer], position, panel.shape)}"
            hovers.append(f"<b>{where}</b><br>{said} {panel.quantity}: {values[position]:.4g}")
    return go.Scatter(
        x=rounded(x),
        y=y,
        mode="markers",
        marker={"symbol": "line-ns", "size": 5, "line": {"color": INK, "width": 1}},
        hovertext=hovers,
        hoverinfo="text",
        name="lowest and highest",
        cliponaxis=False,
        showlegend=False,
        **axes,
    )


def _shares(b: Binned, key: str, end: float) -> list[dict[str, Any]]:
    """The labels next to every ridge: share of the layer to which each text applies."""
    parts = _said(b)
    if not parts:
        return []
    column = {"x": end, "xref": "paper", "xanchor": "left", "xshift": 6, "yref": f"y{key}", "font": {"size": TICK_PX}}
    notes = [{**column, "text": " / ".join(parts), "y": len(b.counts) - 0.4, "yanchor": "bottom"}]
    for layer in range(len(b.counts)):
        text = " / ".join(_percent(numbers[layer] / b.per_layer) for numbers in parts.values())
        notes.append({**column, "text": text, "y": layer, "yanchor": "bottom", "yshift": -6})
    return notes


def _percent(share: float) -> str:
    return "0" if share == 0 else "&lt;0.1%" if share < 0.001 else f"{share:.1%}"
