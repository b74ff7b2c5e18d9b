"""Style of all figures: sizes, colours, the template, and text that is safe to show."""

import base64
import numbers
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go

from sepcap.errors import unknown

PX_PER_INCH = 96 * 1.2
"""Pixels of a figure per printed inch: 12 px, easy to read on a screen, are 7.5 pt on paper."""

FONT_PT = 7.5
"""Size of the text of a figure in print, of ticks and legends a little less."""


@dataclass(frozen=True)
class Paper:
    """Width of a figure, and the size of its text in points."""

    width: str | float
    font_size: float


Width = str | float | Paper
"""Width of a figure: inches, "column" or "page"; with another size of text, a `Paper`."""
WIDTHS = {"column": 3.3, "page": 6.9}
"""Inches of a column and of a page."""
NARROWEST, WIDEST = 2.0, 20.0

FONT_PX = 12
TICK_PX = 11.2
"""7 pt on paper."""
LEGEND_ROW_PX = 19.3
LEGEND_PAD_PX = 12
SLIDER_PX = 62
FONT = "Arial, Helvetica, 'Liberation Sans', sans-serif"

INK = "#222222"
GREY = "#8a8a8a"
FAINT = "#d9d9d9"
BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"
PALETTE = (VERMILLION, BLUE, GREEN, PURPLE, ORANGE, SKY)
"""Colours that are distinguishable with any colour vision (Okabe and Ito)."""
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "triangle-down", "x")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
SHARES = [[0.0, "#ffffff"], [0.1, "#e3edf7"], [0.3, "#b0cfe6"], [0.5, "#6fa8d3"], [0.7, "#3a7fba"], [0.9, "#0f5296"], [1.0, "#08306b"]]
"""Colours of a share from 0 to 1, with evenly decreasing lightness."""

METRIC_NAMES = {
    "top1": "Top-1 accuracy",
    "top10": "Top-10 accuracy",
    "skip50_top1": "Skip-50 top-1 accuracy",
    "skip50_top10": "Skip-50 top-10 accuracy",
    "loss": "Cross-entropy",
}
METRIC_UNITS = {"loss": " (nats)"}
SITE_NAMES = {"mlp": "MLP neurons", "attn_pre_out": "attention pre-out neurons", "attn_value": "attention value neurons", "heads": "heads"}

ESCAPES = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;", "$": "&#36;", "%": "&#37;", "{": "&#123;", "}": "&#125;"})


def plain(text: object, longest: int = 44) -> str:
    """External text, escaped so that plotly shows it verbatim; long text is shortened in the middle.

    plotly interprets HTML tags, `$…$` as TeX and `%{…}` as a template in almost every text.

    >>> plain("a<b>")
    'a&lt;b&gt;'
    """
    line = " ".join(str(text).split())
    if len(line) > longest:
        line = f"{line[: longest - longest // 2 - 1]}…{line[-(longest // 2) :]}"
    return line.translate(ESCAPES)


def rounded(values: Iterable[Any], digits: int = 5) -> list[float | None]:
    """Numbers to significant digits, so that files stay small; None if a number is not finite."""
    return [float(f"{v:.{digits}g}") if np.isfinite(v) else None for v in np.asarray(values, dtype=np.float64).ravel()]


def packed(value: Any) -> Any:
    """An array packed as plotly packs those of traces, for places where plotly does not; other values are unchanged."""
    if not isinstance(value, np.ndarray):
        return value
    spec = {"dtype": f"{value.dtype.kind}{value.dtype.itemsize}", "bdata": base64.b64encode(np.ascontiguousarray(value).tobytes()).decode()}
    return spec if value.ndim == 1 else {**spec, "shape": ", ".join(map(str, value.shape))}


def with_error(value: float, error: float, digits: int = 4) -> str:
    """Value ± standard error for hover texts."""
    return f"{value:.{digits}g} ± {error:.2g}" if np.isfinite(error) else f"{value:.{digits}g} (standard error unknown)"


def every(n: int, most: int) -> int:
    """Tick spacing of 1, 2, 5, 10, … with which n values get at most `most` ticks."""
    steps = (factor * 10**power for power in range(12) for factor in (1, 2, 5))
    return next(step for step in steps if n <= step * max(2, most))


def in_lines(text: str, px: float) -> str:
    """Plain text wrapped to a width in pixels, for example the title next to a short colour bar."""
    return "<br>".join(textwrap.wrap(text, max(8, int(px / 6.4)), break_long_words=False))


def chosen_layers(layers: Iterable[int] | None, there: Sequence[int]) -> list[int]:
    """The layers to draw, in the order of the model; None means all layers."""
    if layers is None:
        return list(there)
    asked = list(layers)
    if not asked or any(isinstance(n, bool) or n not in there for n in asked):
        raise ValueError(f"layers={asked}: give some of {', '.join(map(str, there))}")
    return [n for n in there if n in set(asked)]


def layer_ticks(layers: Sequence[int], most: float) -> dict[str, Any]:
    """Ticks of rows that represent layers, labelled with the layer numbers."""
    at = range(0, len(layers), every(len(layers), int(most)))
    return {"tickvals": list(at), "ticktext": [str(layers[i]) for i in at]}


def scale_ticks(values: np.ndarray, low: float, high: float) -> dict[str, Any]:
    """Ticks of a colour bar: round numbers and both ends, which are marked with ≤ or ≥ if there are cells beyond them."""
    step = 10.0 ** np.floor(np.log10((high - low) / 2))
    step *= next(times for times in (1, 2, 5, 10) if (high - low) / (step * times) <= 6)
    between = [float(at) + 0.0 for at in step * np.arange(np.ceil(low / step), high / step) if low + 0.4 * step < at < high - 0.4 * step]
    under, over = "≤ " * bool(values.min(initial=low) < low), "≥ " * bool(values.max(initial=high) > high)
    said = [f"{under}{low:.2g}", *(f"{at:.6g}" for at in between), f"{over}{high:.2g}"]
    return {"tickvals": [low, *between, high], "ticktext": [text.replace("-", "−") for text in said]}


def axis_break(axis: str, at: float, other: str) -> dict[str, Any]:
    """Two strokes across an axis that separate 0 from the logarithms; `axis` and `other` are names such as "x2" and "y2"."""
    along, across = axis[0], other[0]
    place = {along: at, f"{along}ref": axis, across: 0, f"{across}ref": f"{other} domain"}
    return {"text": "//", **place, "xanchor": "center", "yanchor": "middle", "bgcolor": "white", "borderpad": 0, "font": {"size": 9}}


def power_of_ten(exponent: int) -> str:
    """A tick of a logarithmic axis."""
    return f"10<sup>{exponent}</sup>".replace("-", "−")


def capital(text: str) -> str:
    """The text with a capital first letter and the rest unchanged."""
    return text[0].upper() + text[1:]


def lower(text: str) -> str:
    """The text with a small first letter and the rest unchanged."""
    return text[0].lower() + text[1:]


def metric_name(metric: str) -> str:
    """Name of a metric in titles; an unknown metric is an error."""
    if metric not in METRIC_NAMES:
        raise unknown("metric", metric, METRIC_NAMES)
    return METRIC_NAMES[metric]


def width_px(width: Width) -> float:
    """Width of a figure in its own pixels: 12 of them are one size of text."""
    if isinstance(width, Paper):
        inches = width_px(width.width) / PX_PER_INCH
        if inches / width.font_size < NARROWEST / FONT_PT:
            most = inches / NARROWEST * FONT_PT
            raise ValueError(f"font_size={width.font_size:g}: a figure of {inches:g} inches has space for at most {most:.3g} points")
        return inches * PX_PER_INCH * FONT_PT / width.font_size
    if isinstance(width, str):
        if width not in WIDTHS:
            raise unknown("width", width, WIDTHS, "A column is 3.3 inches wide, a page 6.9; or give inches.")
        return WIDTHS[width] * PX_PER_INCH
    if isinstance(width, bool) or not isinstance(width, numbers.Real) or not NARROWEST <= width <= WIDEST:
        raise ValueError(f'width={width!r}: give inches from {NARROWEST:g} to {WIDEST:g}, "column" (3.3) or "page" (6.9)')
    return float(width) * PX_PER_INCH


def font_size_of(fig: go.Figure) -> float:
    """Size of the text of a figure in points."""
    meta: Any = fig.layout.meta
    return meta.get("sepcap", {}).get("font_size", FONT_PT) if isinstance(meta, dict) else FONT_PT


def px_per_inch(fig: go.Figure) -> float:
    """Pixels of a figure per printed inch."""
    return PX_PER_INCH * FONT_PT / font_size_of(fig)


def is_wide(width: Width) -> bool:
    """Whether there is space for the legend beside the plot, and for several panels side by side."""
    return width_px(width) > (width_px("column") + width_px("page")) / 2


def template() -> go.layout.Template:
    """White paper, thin axes on two sides, one font."""
    axis = {
        "showline": True,
        "linecolor": INK,
        "linewidth": 1,
        "ticks": "outside",
        "ticklen": 4,
        "tickwidth": 1,
        "tickcolor": INK,
        "tickfont": {"size": TICK_PX},
        "title": {"font": {"size": FONT_PX}, "standoff": 8},
        "showgrid": False,
        "zeroline": False,
        "automargin": True,
        "minor": {"ticks": ""},
    }
    return go.layout.Template(
        layout={
            "font": {"family": FONT, "size": FONT_PX, "color": INK},
            "paper_bgcolor": "white",
            "plot_bgcolor": "white",
            "colorway": list(PALETTE),
            "xaxis": axis,
            "yaxis": axis,
            "legend": {
                "bgcolor": "rgba(0,0,0,0)",
                "borderwidth": 0,
                "font": {"size": TICK_PX},
                "title": {"font": {"size": TICK_PX}},
                "itemwidth": 30,
                "tracegroupgap": 0,
            },
            "hoverlabel": {
                "bgcolor": "white",
                "bordercolor": FAINT,
                "font": {"family": FONT, "size": FONT_PX, "color": INK},
                "align": "left",
                "namelength": 0,
            },
            "hovermode": "closest",
            "coloraxis": {
                "colorbar": {"thickness": 10, "outlinewidth": 0, "ticks": "outside", "ticklen": 3, "tickfont": {"size": TICK_PX}}
            },
            "annotationdefaults": {"showarrow": False, "font": {"size": FONT_PX}},
        }
    )


def new_figure(
    data: list[Any],
    layout: dict[str, Any],
    *,
    width: Width,
    plot_px: int | float = 0,
    left: int | float = 62,
    right: int | float = 14,
    top: int | float = 12,
    bottom: int | float = 46,
    square: bool = False,
    legend_rows: int = 0,
    legend_below: bool = False,
    slider: bool = False,
) -> go.Figure:
    """A figure with its template and its printed size.

    Args:
        data: traces.
        layout: axes, annotations and shapes.
        width: inches, "column" or "page".
        plot_px: height of the plotting area, unless it is square.
        left, right, top, bottom: margins around it, without the legend.
        square: whether the plotting area is as wide as a column even on a page, with the legend beside it.
        legend_rows: lines of the legend with its title; 0 for none.
        legend_below: whether the legend is below the plot even on a page, because the plot needs the whole width.
        slider: whether the layout has a slider, which is placed at the very bottom.
    """
    fig = go.Figure(data=data, layout={**layout, "template": template()})
    # kept with the figure, so that `save` can lay it out again for another width
    place = {"plot": plot_px, "margin": [left, right, top, bottom], "square": square, "legend_rows": legend_rows}
    place |= {"legend_below": legend_below, "slider": slider, "font_size": width.font_size if isinstance(width, Paper) else FONT_PT}
    fig.update_layout(meta={"sepcap": place}, showlegend=legend_rows > 0)
    return lay_out(fig, width)


def lay_out(fig: go.Figure, width: Width) -> go.Figure:
    """Set the size of a figure for a width; those of `new_figure` also get their legend below (column) or beside the plot (page)."""
    total = width_px(width)
    layout: Any = fig.layout
    place = layout.meta.get("sepcap") if isinstance(layout.meta, dict) else None
    if place is None:
        layout.width = total
        return fig
    left, right, top, bottom = place["margin"]
    plot, beside = place["plot"], is_wide(width) and not place["legend_below"]
    if place["square"]:
        plot = min(total, width_px("column")) - left - right
        right = total - left - plot
    rows = place["legend_rows"]
    legend_px = 0 if beside or not rows else rows * LEGEND_ROW_PX + LEGEND_PAD_PX
    slider_px = SLIDER_PX if place["slider"] else 0
    below = bottom + legend_px + slider_px
    layout.update(width=total, height=top + plot + below, margin={"l": left, "r": right, "t": top, "b": below, "pad": 0})
    if place["slider"]:
        layout.sliders[0].update(x=0, y=-(bottom + legend_px) / plot, yanchor="top", pad={"t": 0, "b": 0})
    if beside:
        layout.legend.update(orientation="v", x=1 + 16 / (total - left - right), xanchor="left", y=1, yanchor="top", yref="paper")
    else:
        layout.legend.update(orientation="v", x=0, xanchor="left", y=-bottom / plot, yanchor="top", yref="paper")
    return fig


def without_slider(fig: go.Figure) -> go.Figure:
    """The figure for print: without its slider and the space for it."""
    layout: Any = fig.layout
    layout.sliders = []
    place = layout.meta.get("sepcap") if isinstance(layout.meta, dict) else None
    if place is not None and place["slider"]:
        layout.meta = {**layout.meta, "sepcap": {**place, "slider": False}}
        lay_out(fig, layout.width / PX_PER_INCH)
    return fig
