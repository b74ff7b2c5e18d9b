"""Parts that many figures have: axes of panels, error bars, bands, lines across, entries of the legend."""

from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from sepcap.drawing.style import FONT_PX, INK, TICK_PX, every, rounded

DOTTED = {"color": INK, "width": 1, "dash": "dot"}


def axes_of(i: int) -> tuple[str, dict[str, str]]:
    """The key of a panel, "" or its number, and the axes of its traces."""
    key = "" if i == 0 else str(i + 1)
    return key, {"xaxis": f"x{key}", "yaxis": f"y{key}"}


def panel_axes(
    key: str, x: Mapping[str, Any], y: Mapping[str, Any], across: tuple[float, float] | None = None, down: tuple[float, float] | None = None
) -> dict[str, Any]:
    """Both axes of a panel in a layout; `across` and `down` are its ends as shares of the figure, which rounding can exceed."""
    axes: dict[str, Any] = {f"xaxis{key}": {"anchor": f"y{key}", **x}, f"yaxis{key}": {"anchor": f"x{key}", **y}}
    if across is not None:
        axes[f"xaxis{key}"]["domain"] = [across[0], min(1.0, across[1])]
    if down is not None:
        axes[f"yaxis{key}"]["domain"] = [max(0.0, down[0]), down[1]]
    return axes


def above(text: str, x: float = 0, y: float = 1, shift: float = 3, **look: Any) -> dict[str, Any]:
    """A text above the point (x, y) of the figure, such as the title of a panel."""
    place = {"x": x, "xref": "paper", "xanchor": "left", "y": y, "yref": "paper", "yanchor": "bottom", "yshift": shift}
    return {"text": text, **place, **look}


def layer_axis(layers: Sequence[int], room: float, most: int = 12) -> dict[str, Any]:
    """The axis of consecutive layers, with some room at both ends."""
    first, last = min(layers), max(layers)
    return {"title": {"text": "Layer"}, "range": [first - room, last + room], "tick0": 0, "dtick": every(last - first + 1, most)}


def row_axis(rows: Mapping[Any, str], low: float, high: float) -> dict[str, Any]:
    """A vertical axis without a line, with a text at the height of every row."""
    return {"range": [low, high], "tickvals": list(rows), "ticktext": list(rows.values()), "ticks": "", "showline": False}


def colour_bar(title: str, **look: Any) -> dict[str, Any]:
    """A colour bar as high as the plot, with its title beside it."""
    fonts = {"title": {"text": title, "side": "right", "font": {"size": FONT_PX}}, "tickfont": {"size": TICK_PX}}
    return {**fonts, "len": 1, "xpad": 6, "ypad": 0, **look}


def level(y: float, line: Mapping[str, Any] = DOTTED, **more: Any) -> dict[str, Any]:
    """A horizontal line through the whole plot."""
    return {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": y, "y1": y, "line": line, **more}


def upright(x: float, low: float, high: float, line: Mapping[str, Any] = DOTTED, **more: Any) -> dict[str, Any]:
    """A vertical line."""
    return {"type": "line", "x0": x, "x1": x, "y0": low, "y1": high, "line": line, **more}


def error_bars(value: Any, low: Any, high: Any, **look: Any) -> dict[str, Any]:
    """Bars from the values to both ends of their intervals."""
    return {"type": "data", "symmetric": False, "array": rounded(high - value), "arrayminus": rounded(value - low), **look}


def band(x: Any, low: Any, high: Any, colour: str, **more: Any) -> go.Scatter:
    """The area between two lines, without hover texts."""
    edge = {"x": rounded([*x, *x[::-1]]), "y": rounded([*high, *low[::-1]])}
    return go.Scatter(**edge, mode="lines", line={"width": 0}, fill="toself", fillcolor=colour, hoverinfo="skip", **more)


def translucent(colour: str, share: float = 0.2) -> str:
    """A colour that lets others through, for bands."""
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{share})"


def entry(name: str, **look: Any) -> go.Scatter:
    """An entry of the legend without points."""
    return go.Scatter(x=[None], y=[None], name=name, **look)
