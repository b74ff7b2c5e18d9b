"""Small heat maps, side by side or stacked, with named rows and columns and the number in every cell."""

import html
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from sepcap.drawing.parts import above, axes_of, colour_bar, panel_axes
from sepcap.drawing.style import FAINT, GREY, SHARES, TICK_PX, Width, in_lines, new_figure, plain, rounded, width_px

CELL_PX = 34
GAP_PX = 22
ROW_GAP_PX = 30
BAR_PX = 74
LETTER_PX = 6.2


def heat_panels(
    panels: Mapping[str, np.ndarray],
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    hovers: Mapping[str, Sequence[Sequence[str]]],
    heading: str,
    title: str,
    row_title: str,
    column_title: str,
    limits: tuple[float, float],
    decimals: int | None = 2,
    width: Width = "column",
) -> go.Figure:
    """One panel per entry, all on one colour scale; NaN cells are empty and grey.

    Panels are side by side if their cells are wide enough for a number, otherwise stacked.

    Args:
        panels: title of the panel -> values [row, column].
        rows, columns: names; the first row is at the top.
        hovers: title of the panel -> hover text of every cell.
        heading: one line above the panels, for what they have in common.
        title: of the colour bar, with its unit.
        row_title, column_title: titles of the axes.
        limits: lowest and highest value of the colour scale.
        decimals: digits after the point in the cells; None for cells without numbers.
        width: inches, "column" or "page".
    """
    names, columns_named = [plain(name, 18) for name in rows], [plain(name, 18) for name in columns]
    left = 34 + LETTER_PX * _longest(names)
    room = width_px(width) - left - BAR_PX
    across = len(panels)
    cell = (room - GAP_PX * (across - 1)) / (across * len(columns))
    if cell < CELL_PX:
        across, cell = 1, room / len(columns)
    down = len(panels) // across
    turned = _longest(columns_named) * LETTER_PX > cell
    below = 46 + LETTER_PX * _longest(columns_named) * turned
    each = max(CELL_PX, min(cell, 60 if down == 1 else 40)) * len(rows)
    height = down * each + (down - 1) * ROW_GAP_PX
    share, gap = cell * len(columns) / room, GAP_PX / room
    traces: list[Any] = []
    layout: dict[str, Any] = {"annotations": [above(heading, shift=24, xshift=-left + 8, align="left")]}
    for i, (label, values) in enumerate(panels.items()):
        (key, axes), (row, column) = axes_of(i), divmod(i, across)
        start, top = column * (share + gap), 1 - row * (each + ROW_GAP_PX) / height
        z = [rounded(line, 4) for line in values]
        look = {"coloraxis": "coloraxis", "hoverinfo": "text", "hovertext": hovers[label], "hoverongaps": False, "xgap": 1, "ygap": 1}
        traces.append(go.Heatmap(z=z, x=list(range(len(columns))), y=list(range(len(rows))), **look, **axes))
        where = {"xref": f"x{key}", "yref": f"y{key}"}
        layout["annotations"] += [
            {"text": _number(value, decimals), "x": c, "y": r, **where, "font": {"size": TICK_PX, "color": _ink(value, limits)}}
            for (r, c), value in np.ndenumerate(values)
            if decimals is not None and cell >= LETTER_PX * (decimals + 2)
        ]
        layout["annotations"].append(above(plain(label), start, top))
        x = {
            "title": {"text": column_title if row == down - 1 else ""},
            "showticklabels": row == down - 1,
            "tickvals": list(range(len(columns))),
            "ticktext": columns_named,
            "tickangle": -90 if turned else 0,
            "range": [-0.5, len(columns) - 0.5],
            "ticks": "",
            "showline": False,
        }
        y = {
            "title": {"text": row_title if column == 0 else ""},
            "tickvals": list(range(len(rows))),
            "ticktext": names,
            "showticklabels": column == 0,
            "range": [len(rows) - 0.5, -0.5],
            "ticks": "",
            "showline": False,
        }
        layout |= panel_axes(key, x, y, (start, start + share), (top - each / height, top))
    bar = colour_bar(title if "<" in title else in_lines(title, height), nticks=6)
    layout["coloraxis"] = {"colorscale": SHARES, "cmin": limits[0], "cmax": limits[1], "colorbar": bar}
    layout["plot_bgcolor"] = FAINT
    return new_figure(
        traces, layout, width=width, plot_px=height, left=left, right=BAR_PX, top=48 + 15 * heading.count("<br>"), bottom=below
    )


def _longest(names: Sequence[str]) -> int:
    """Number of letters of the longest name as displayed."""
    return max(len(html.unescape(name)) for name in names)


def _number(value: float, decimals: int) -> str:
    return f"{value:.{decimals}f}".replace("-", "−") if np.isfinite(value) else "–"


def _ink(value: float, limits: tuple[float, float]) -> str:
    if not np.isfinite(value):
        return GREY
    low, high = limits
    return "white" if (value - low) / (high - low) > 0.55 else "#222222"
