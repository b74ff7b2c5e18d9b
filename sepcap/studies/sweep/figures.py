"""Figures of a sweep: every cell, means over two fields, and trajectories (METHODS 24)."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from sepcap.drawing.heat import heat_panels
from sepcap.drawing.parts import error_bars, row_axis, upright
from sepcap.drawing.style import FAINT, PALETTE, SYMBOLS, Width, new_figure, plain, rounded
from sepcap.drawing.themes import drawn
from sepcap.errors import unknown
from sepcap.studies.base.seeds import seed_interval
from sepcap.studies.pruning.figures.trajectory import trajectory

ROW_PX = 26
MOST_ROWS = 40
MOST_COLOURS = 6
SPREAD = 0.6
"""Height over which the colours of a row are spread."""

TITLES = {
    "separability": "Separability of top-1 (%)",
    "max_drop": "Maximum differential drop of top-1 (points)",
    "retain_cost_50": "Retain task lost at a forget drop of 50% (%)",
    "retain_cost_80": "Retain task lost at a forget drop of 80% (%)",
    "forget_left": "Top-1 left on the forget task (share)",
    "retain_left": "Top-1 left on the retain task (share)",
}


def _values(result: Any, column: str) -> Any:
    """Finished cells with a value of a column."""
    result.check_comparable()
    table = result.finished
    numeric = [name for name in table if pd.api.types.is_numeric_dtype(table[name]) and name not in result.axes]
    if column not in numeric:
        if column in TITLES or not numeric:
            raise ValueError(f"no finished cell of {result.folder} has a {column}")
        raise unknown("column", column, numeric)
    table = table[np.isfinite(table[column].astype(float))]
    if table.empty:
        raise ValueError(f"no finished cell of {result.folder} has a {column}")
    return table


def _field(result: Any, what: str, field: str | None, default: Sequence[str]) -> str | None:
    if field is not None and field not in result.axes:
        raise unknown(what, field, result.axes)
    return field if field is not None else next(iter(default), None)


@drawn
def strip(
    result: Any, column: str = "separability", rows: str | None = None, colour: str | None = None, *, width: Width = "column"
) -> go.Figure:
    """Every finished cell as a dot, a row per value of one field and a colour per value of another.

    The larger marker is the mean of the dots. It has a 95% interval of Student's t over seeds if only seeds differ among them.

    Args:
        result: what `sepcap.sweep` returns.
        column: a column of the table with numbers.
        rows: field of the rows; default the first that is not the seed.
        colour: field of the colours; default the second.
        width: inches, "column" or "page".

    Raises:
        ValueError: no finished cell has the value, or a field has too many values to distinguish.
    """
    table = _values(result, column)
    by = _field(result, "rows", rows, result.settings or list(result.axes))
    others = [name for name in result.settings if name != by]
    coloured = _field(result, "colour", colour, others)
    if coloured == by:
        raise ValueError(f"colour={colour!r}: it is the field of the rows; give another")
    heights = {value: float(-i) for i, value in enumerate(dict.fromkeys(table[by]))}
    kinds = list(dict.fromkeys(table[coloured])) if coloured else [None]
    if len(heights) > MOST_ROWS or len(kinds) > MOST_COLOURS:
        raise ValueError(
            f"{by} has {len(heights)} values and {coloured or 'no field'} {len(kinds)}: at most {MOST_ROWS} rows and {MOST_COLOURS} "
            f"colours can be distinguished; give rows= and colour= other fields of {', '.join(result.axes)}"
        )
    only_seeds = "seed" in result.axes and "seed" not in (by, coloured) and set(result.settings) <= {by, coloured}
    traces: list[Any] = []
    for i, kind in enumerate(kinds):
        of_kind = table if coloured is None else table[table[coloured] == kind]
        shift = 0.0 if len(kinds) == 1 else SPREAD * (0.5 - i / (len(kinds) - 1)) * min(1, (len(kinds) - 1) / 3)
        look = {"color": PALETTE[i], "symbol": SYMBOLS[i]}
        hovers = [_hover(result, row, column) for row in of_kind.to_dict("records")]
        small = look | {"size": 3.5, "opacity": 0.55}
        dots: dict[str, Any] = {"mode": "markers", "marker": small, "hovertext": hovers, "hoverinfo": "text"}
        at = [heights[value] + shift for value in of_kind[by]]
        traces.append(go.Scatter(x=rounded(of_kind[column]), y=at, showlegend=False, cliponaxis=False, **dots))
        of_rows = {value: rows_of[column].to_numpy(float) for value, rows_of in of_kind.groupby(by, sort=False)}
        means = [(value, seed_interval("x", numbers), len(numbers)) for value, numbers in of_rows.items()]
        value, low, high = (np.array([mean[f"x{end}"] for _, mean, _ in means]) for end in ("", "_low", "_high"))
        marks: dict[str, Any] = {"mode": "markers", "marker": look | {"size": 8, "line": {"color": "white", "width": 1}}}
        if only_seeds:
            marks["error_x"] = error_bars(value, low, high, color=PALETTE[i], thickness=1.2, width=0)
        said = [f"mean of {n} cell{'s' * (n != 1)}: {v:.4g}" for v, (_, _, n) in zip(value, means, strict=True)]
        name = plain(f"{coloured} {kind}") if coloured else "mean"
        heights_of = [heights[one] + shift for one, _, _ in means]
        traces.append(go.Scatter(x=rounded(value), y=heights_of, name=name, hovertext=said, hoverinfo="text", cliponaxis=False, **marks))
    low, high = 0.6 - len(heights), 0.6
    title = TITLES.get(column, plain(column.replace("_", " ")))
    layout: dict[str, Any] = {
        "xaxis": {"title": {"text": title}, "showgrid": True, "gridcolor": FAINT, "gridwidth": 0.5},
        "yaxis": row_axis({at: plain(f"{value}", 20) for value, at in heights.items()}, low - 0.2, high) | {"title": {"text": plain(by)}},
        "shapes": [upright(0.0, low - 0.2, high, layer="below")] if column == "separability" else [],
    }
    covers = "large: mean over seeds,<br>with 95% interval over seeds" if only_seeds else "large: mean of the cells"
    layout["legend"] = {"title": {"text": f"Small: cells; {covers}"}}
    longest = max(len(plain(f"{value}", 20)) for value in heights)
    size = {"plot_px": ROW_PX * (len(heights) + 1) + 8 * len(kinds), "left": 44 + 6.4 * longest, "bottom": 58}
    return new_figure(traces, layout, width=width, legend_rows=len(kinds) + 1 + only_seeds, **size)


def _hover(result: Any, row: Any, column: str) -> str:
    fields = ", ".join(f"{name} {row[name]}" for name in result.axes)
    low, high = row.get(f"{column}_low", np.nan), row.get(f"{column}_high", np.nan)
    ends = f" [{low:.4g}, {high:.4g}] over documents" if np.isfinite(low) else ""
    return f"<b>{plain(fields, 80)}</b><br>{row[column]:.4g}{ends}".replace("-", "−")


@drawn
def heat(
    result: Any, column: str = "separability", rows: str | None = None, columns: str | None = None, *, width: Width = "column"
) -> go.Figure:
    """Mean of the finished cells at every pair of values of two fields.

    Args:
        result: what `sepcap.sweep` returns.
        column: a column of the table with numbers.
        rows, columns: fields; default the first two, the seed last.
        width: inches, "column" or "page".

    Raises:
        ValueError: the grid has one field, or no finished cell has the value.
    """
    order = [*result.settings, *(name for name in result.axes if name == "seed")]
    down = _field(result, "rows", rows, [name for name in order if name != columns])
    across = _field(result, "columns", columns, [name for name in order if name != down])
    if across is None or across == down:
        raise ValueError(f"a heat map needs two fields, and the grid has {', '.join(result.axes)}")
    table = _values(result, column)
    mean, n = (table.pivot_table(index=down, columns=across, values=column, aggfunc=how, sort=False) for how in ("mean", "count"))
    values = mean.to_numpy(dtype=float)
    hovers = [
        [
            f"<b>{plain(f'{down} {r}, {across} {c}', 60)}</b><br>mean of {int(n.loc[r, c])} cells: {mean.loc[r, c]:.4g}".replace("-", "−")
            if np.isfinite(mean.loc[r, c])
            else f"<b>{plain(f'{down} {r}, {across} {c}', 60)}</b><br>no finished cell"
            for c in mean.columns
        ]
        for r in mean.index
    ]
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    title = TITLES.get(column, plain(column.replace("_", " ")))
    return heat_panels(
        {"Mean": values},
        list(map(str, mean.index)),
        list(map(str, mean.columns)),
        hovers={"Mean": hovers},
        heading=f"{len(table):,} finished cells",
        title=title,
        row_title=plain(str(down)),
        column_title=plain(across),
        limits=(low, high if high > low else low + 1),
        decimals=2 if high - low < 1 else 1 if high - low < 10 else 0,
        width=width,
    )


@drawn
def trajectories(result: Any, metric: str = "top1", most: int = MOST_COLOURS, *, width: Width = "column", **fields: Any) -> go.Figure:
    """Mean trajectories over seeds of the settings with the highest mean separability, in the plane of both tasks.

    Args:
        result: what `sepcap.sweep` returns.
        metric: an accuracy.
        most: number of settings, at most 6.
        width: inches, "column" or "page".
        fields: restrict the settings to cells with these values.

    Raises:
        ValueError: the cells are no pruning runs, none is finished, or they are of several pairs of tasks.
    """
    if not 1 <= most <= MOST_COLOURS:
        raise ValueError(f"most={most}: give 1 to {MOST_COLOURS}, which can be distinguished")
    result._needs_runs()
    found = [(key, rows) for key, rows in result._groups(**fields) if "separability" in rows and rows["separability"].notna().any()]
    if not found:
        raise ValueError("the model has no accuracy to lose: there are no trajectories")
    found = sorted(found, key=lambda item: -float(item[1]["separability"].mean()))[:most]
    others = [i for i, name in enumerate(result.settings) if name not in fields]
    groups = {", ".join(str(key[i]) for i in others) or f"seeds {len(rows)}": list(result._results(rows)) for key, rows in found}
    return trajectory(groups, metric, width=width)
