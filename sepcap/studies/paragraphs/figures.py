"""Figures of a paragraph transfer: distances of generated texts, likelihood over layers and over the paragraph."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from sepcap.checks import checked
from sepcap.drawing.parts import DOTTED, above, axes_of, band, error_bars, layer_axis, panel_axes, row_axis, translucent
from sepcap.drawing.style import (
    BLUE,
    GREEN,
    GREY,
    INK,
    ORANGE,
    PURPLE,
    TICK_PX,
    VERMILLION,
    Width,
    capital,
    chosen_layers,
    is_wide,
    new_figure,
    plain,
    rounded,
)
from sepcap.errors import unknown
from sepcap.studies.paragraphs.conditions import ALONE, ANOTHER, FIRST, LAST, MISMATCHED, NEUTRAL, ORIGINAL, OTHER_KIND, OWN, TRANSFERRED

COLOURS = {ORIGINAL: GREEN, TRANSFERRED: VERMILLION, MISMATCHED: BLUE, OTHER_KIND: PURPLE, NEUTRAL: GREY}
NAMES = {
    ORIGINAL: "whole context",
    TRANSFERRED: "own break",
    MISMATCHED: "another text's break",
    OTHER_KIND: "break of another kind",
    NEUTRAL: "break alone",
}
"""Names of conditions in figures."""
METRICS = {"distance": "1 − cosine to", "overlap": "Unigram F1 with", "bigrams": "Bigram recall of"}
MOST = 200
"""Most values of a condition that a violin is drawn from; of more, this many quantiles."""
DONORS = {OWN: (VERMILLION, "circle", "own break"), ANOTHER: (BLUE, "square", "another text's break (control)")}
PANELS = {ALONE: "This layer alone", FIRST: "Layers {first} to this one", LAST: "This layer to layer {last}"}
GAIN = "Gain over the break alone<br>(nats per token)"
ROW_PX = 30


@checked()
def paragraph_distances(result: Any, metric: str = "distance", *, kind: str = "all", width: Width = "column") -> go.Figure:
    """Distance of generated texts from the true paragraph: a violin per condition over texts, with its median as a line and a number.

    Baselines with given tokens are drawn separately: they are compared with the rest of the paragraph only.

    Args:
        result: what `sepcap.transfer_paragraphs` returns, with generated texts.
        metric: "distance", "overlap" or "bigrams".
        kind: kind of text, or "all".
        width: inches, "column" or "page".

    Raises:
        ValueError: an unknown metric or kind, or a result without generated texts or without distances.
    """
    if metric not in METRICS:
        raise unknown("metric", metric, METRICS)
    if "scores" not in result.tables:
        raise ValueError("this transfer generated no texts: run it with generate=True")
    scores: Any = _of_kind(result, result.tables["scores"], kind)
    own = scores[scores["reference"] == scores["given"]]
    per_text = own.groupby(["condition", "text"], sort=False)[metric].mean().dropna()
    if per_text.empty:
        raise ValueError(f"this transfer has no {metric}: run it with an embedder")
    names = [name for name in dict.fromkeys(own["condition"]) if not name.startswith("layer") and name in per_text.index]
    given = dict(own[own["given"] > 0].groupby("condition")["given"].first())
    rest = [name for name in names if name in given]
    names = [name for name in names if name not in given]
    # a row between the two groups, for the heading of the second
    rows = {name: i for i, name in enumerate(names)} | {name: len(names) + 1 + i for i, name in enumerate(rest)}
    n = max(rows.values()) + 1
    traces, ticks, notes = [], {}, []
    if rest:
        place = {"x": 0, "xref": "paper", "xanchor": "left", "y": n - 1 - len(names), "yanchor": "middle"}
        notes.append({"text": "First tokens given, compared with the rest:", **place, "font": {"size": TICK_PX}})
    for name, i in rows.items():
        values = np.sort(per_text.loc[name].to_numpy(float))
        y = n - 1 - i
        colour, median = COLOURS.get(name, ORANGE), float(np.median(values))
        ticks[y] = capital(_name(name, int(given.get(name, 0))))
        drawn = values if len(values) <= MOST else np.quantile(values, np.linspace(0, 1, MOST))
        look = {"line": {"color": colour, "width": 1}, "fillcolor": translucent(colour), "points": False, "meanline": {"visible": False}}
        shape = {"orientation": "h", "side": "positive", "width": 1.5, "spanmode": "hard", "y0": y, "hoverinfo": "skip"}
        traces.append(go.Violin(x=rounded(drawn, 4), **shape, **look, showlegend=False))
        hover = f"<b>{plain(name)}</b><br>median {median:.3f}, mean {values.mean():.3f}, {len(values):,} texts"
        mark = {"symbol": "line-ns", "size": 12, "line": {"color": INK, "width": 2}}
        traces.append(
            go.Scatter(x=[median], y=[y + 0.1], mode="markers", marker=mark, hovertext=[hover], hoverinfo="text", showlegend=False)
        )
        place = {"x": 1, "xref": "paper", "xanchor": "left", "xshift": 8, "y": y + 0.15, "font": {"size": TICK_PX}}
        notes.append({"text": f"{median:.2f}", **place})
    heading = {"x": 1, "xref": "paper", "xanchor": "left", "xshift": 2, "y": n - 0.15, "yanchor": "bottom"}
    notes.append({"text": "median", **heading, "font": {"size": TICK_PX}})
    counts = per_text.groupby("condition").size()
    n_texts = f"{counts.min():,}" if counts.min() == counts.max() else f"{counts.min():,} to {counts.max():,}"
    by = f"{plain(result.config['embedder'], 60)}; " if metric == "distance" else ""
    by = f"<br>{by}{n_texts} texts"
    layout = {
        "xaxis": {"title": {"text": f"{METRICS[metric]} the true paragraph{by}"}, "nticks": 6},
        "yaxis": row_axis(ticks, -0.25, n + 0.1),
        "annotations": notes,
    }
    return new_figure(traces, layout, width=width, plot_px=ROW_PX * n + 20, left=20, right=50, bottom=62)


@checked()
def paragraph_layers(result: Any, *, kind: str = "all", layers: Sequence[int] | None = None, width: Width = "page") -> go.Figure:
    """Gain in likelihood over the break alone with one layer, the first or the last layers patched; bands are 95% intervals over texts.

    Args:
        result: what `sepcap.transfer_paragraphs` returns.
        kind: kind of text, or "all".
        layers: layers to draw; default all of the profile.
        width: inches, "column" or "page".

    Raises:
        ValueError: an unknown kind, or a result without a profile.
    """
    table: Any = result.tables["layers"]
    if table.empty:
        raise ValueError("this transfer has no profile over layers: run it with profile='likelihood'")
    table = _rows_of(table, kind)
    layers = chosen_layers(layers, sorted(table["layer"].unique().tolist()))
    table = table[table["layer"].isin(layers)]
    gap, beside = 0.05, is_wide(width)
    height = 190 if beside else 110
    total = height if beside else 3 * height + 2 * 28
    share = (1 - 2 * gap) / 3
    traces: list[Any] = []
    layout: dict[str, Any] = {"annotations": [], "shapes": []}
    shown = table[table["donor"].isin(DONORS)]
    low, high = _span(shown[["gain", "low", "high"]].to_numpy(float))
    for i, (part, title) in enumerate(PANELS.items()):
        key, axes = axes_of(i)
        for donor, (colour, symbol, said) in DONORS.items():
            of = shown[(shown["part"] == part) & (shown["donor"] == donor)].sort_values("layer")
            if not of.empty:
                traces += _line(of, "layer", colour, symbol, said, i == 0, axes, lambda row: f"layer {row['layer']}")
        start = i * (share + gap) if beside else 0.0
        top = 1.0 if beside else 1 - i * (height + 28) / total
        x = layer_axis(layers, 0.4, 8) | {"tick0": layers[0], "showticklabels": beside or i == 2}
        x |= {} if beside or i == 2 else {"title": {}}
        y = {"title": {"text": GAIN} if i == (0 if beside else 1) else {}, "range": [low, high], "showticklabels": not beside or i == 0}
        across, down = ((start, start + share), (0, 1)) if beside else ((0, 1), (top - height / total, top))
        layout |= panel_axes(key, x, y, across, down)
        layout["shapes"].append(_zero(key, layers[0] - 0.4, layers[-1] + 0.4))
        text = title.format(first=layers[0], last=layers[-1])
        layout["annotations"].append(above(text, start, top, 4, font={"size": TICK_PX}))
    texts = int(shown["texts"].max())
    layout["legend"] = {"title": {"text": f"Patched from; band: 95% interval over {texts:,} texts"}}
    return new_figure(traces, layout, width=width, plot_px=total, left=74, top=30, legend_rows=3, legend_below=True)


@checked()
def paragraph_positions(result: Any, *, kind: str = "all", width: Width = "column") -> go.Figure:
    """Gain in likelihood over the break alone, by token position in the paragraph; bars are 95% intervals over texts.

    Args:
        result: what `sepcap.transfer_paragraphs` returns.
        kind: kind of text, or "all".
        width: inches, "column" or "page".

    Raises:
        ValueError: an unknown kind.
    """
    table: Any = _rows_of(result.tables["positions"], kind)
    bins = list(dict.fromkeys(zip(table["first"], table["last"], strict=True)))
    conditions = [name for name in COLOURS if name in set(table["condition"])]
    traces = []
    for i, name in enumerate(conditions):
        of = table[table["condition"] == name].copy()
        # side by side, so that the bars do not cover each other
        of["at"] = [bins.index(pair) + 0.14 * (i - (len(conditions) - 1) / 2) for pair in zip(of["first"], of["last"], strict=True)]
        gain, low, high = (of[column].to_numpy(float) for column in ("gain", "low", "high"))
        bars = error_bars(gain, low, high, width=0, thickness=1, color=COLOURS[name])
        hovers = [
            f"<b>{plain(name)}</b>, {_places(row['first'], row['last'])}<br>{row['gain']:+.3f} [{row['low']:.3f}, {row['high']:.3f}] nats"
            for row in of.to_dict("records")
        ]
        look = {"mode": "markers", "marker": {"color": COLOURS[name], "size": 6}, "error_y": bars}
        hover = {"name": capital(_name(name)), "hovertext": hovers, "hoverinfo": "text"}
        traces.append(go.Scatter(x=rounded(of["at"]), y=rounded(gain), **look, **hover, cliponaxis=False))
    layout = {
        "xaxis": {
            "title": {"text": "Token of the next paragraph"},
            "tickvals": list(range(len(bins))),
            "ticktext": [_short(first, last) for first, last in bins],
            "range": [-0.5, len(bins) - 0.5],
        },
        "yaxis": {"title": {"text": GAIN}, "nticks": 7},
        "shapes": [_zero("", -0.5, len(bins) - 0.5)],
        "legend": {"title": {"text": f"Bar: 95% interval over {int(table['texts'].max()):,} texts"}},
    }
    return new_figure(traces, layout, width=width, plot_px=220, left=74, legend_rows=len(conditions) + 1)


def _line(of: Any, x: str, colour: str, symbol: str, said: str, first: bool, axes: dict[str, str], where: Any) -> list[Any]:
    at, gain, low, high = (of[column].to_numpy(float) for column in (x, "gain", "low", "high"))
    common = {"legendgroup": said, **axes}
    traces: list[Any] = []
    if np.isfinite(low).all():
        traces.append(band(at, low, high, translucent(colour), showlegend=False, **common))
    hovers = [
        f"<b>{said}</b>, {where(row)}<br>{row['gain']:+.3f} [{row['low']:.3f}, {row['high']:.3f}] nats per token, {row['texts']} texts"
        for row in of.to_dict("records")
    ]
    look = {"mode": "lines+markers", "line": {"color": colour, "width": 1.5}, "marker": {"color": colour, "size": 6, "symbol": symbol}}
    hover = {"name": capital(said), "showlegend": first, "hovertext": hovers, "hoverinfo": "text"}
    traces.append(go.Scatter(x=rounded(at), y=rounded(gain), **look, **hover, cliponaxis=False, **common))
    return traces


def _name(condition: str, given: int = 0) -> str:
    if given:
        return f"first {given} tokens" if given > 1 else "first token"
    return NAMES.get(condition, plain(condition))


def _zero(key: str, x0: float, x1: float) -> dict[str, Any]:
    place = {"xref": f"x{key}", "yref": f"y{key}", "x0": x0, "x1": x1, "y0": 0, "y1": 0}
    return {"type": "line", **place, "line": DOTTED, "layer": "below"}


def _span(values: np.ndarray) -> tuple[float, float]:
    """Range of the values with some padding; it always includes 0."""
    low, high = float(np.nanmin(values, initial=0)), float(np.nanmax(values, initial=0))
    pad = 0.06 * (high - low) or 1.0
    return low - pad, high + pad


def _places(first: int, last: int) -> str:
    return f"token {first + 1}" if first == last else f"tokens {first + 1} to {last + 1}"


def _short(first: int, last: int) -> str:
    return str(first + 1) if first == last else f"{first + 1}–{last + 1}"


def _rows_of(table: Any, kind: str) -> Any:
    kinds = list(dict.fromkeys(table["kind"]))
    if kind not in kinds:
        raise unknown("kind", kind, kinds)
    return table[table["kind"] == kind]


def _of_kind(result: Any, scores: Any, kind: str) -> Any:
    texts: Any = result.tables["texts"]
    if kind == "all":
        return scores
    chosen = _rows_of(texts, kind)["text"]
    return scores[scores["text"].isin(chosen)]
