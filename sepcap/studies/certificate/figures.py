"""Figures of a certificate (METHODS 22)."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from sepcap.drawing.parts import above, axes_of, band, error_bars, layer_axis, level, panel_axes, row_axis, translucent, upright
from sepcap.drawing.style import (
    DASHES,
    GREY,
    PALETTE,
    SITE_NAMES,
    SYMBOLS,
    Width,
    capital,
    chosen_layers,
    metric_name,
    new_figure,
    plain,
    rounded,
)
from sepcap.drawing.themes import drawn
from sepcap.studies.certificate.arms import MATCHED, NAMES, PRUNED, RANDOM, REFERENCE, UNTOUCHED

COLOURS: dict[str, str] = dict(zip((PRUNED, UNTOUCHED, MATCHED, RANDOM, REFERENCE), PALETTE, strict=False))
SIGNS: dict[str, str] = dict(zip((PRUNED, UNTOUCHED, MATCHED, RANDOM, REFERENCE), SYMBOLS, strict=False))
PANEL_PX, GAP_PX = 150, 46
GAP = 0.11
"""Between panels side by side, as a share of the figure."""

VARIANTS = {"all": "", "held": ", pruned neurons held at 0", "lora": ", LoRA", "retain": ", retain texts only"}


def part_of(result: Any, table: str, part: str) -> Any:
    """A table of the result.

    Raises:
        ValueError: the part of the study that makes it was not asked for.
    """
    if table not in result.tables:
        raise ValueError(f"this result has no table {table!r}: parts={tuple(result.config['parts'])}; it comes with part {part!r}")
    return result.tables[table]


@drawn
def relearning(result: Any, role: str = "forget", *, width: Width = "column") -> go.Figure:
    """Relative accuracy against the number of tokens of fine-tuning; bands are 95% intervals.

    Args:
        result: what `sepcap.certify` returns.
        role: "forget" or "retain".
        width: inches, "column" or "page".
    """
    looks = {kind: {"name": capital(name), "color": COLOURS[kind], "symbol": SIGNS[kind]} for kind, name in NAMES.items()}
    return curves(result, part_of(result, "relearning", "relearn"), role, looks, width)


def curves(result: Any, table: pd.DataFrame, role: str, looks: Mapping[str, Mapping[str, str]], width: Width) -> go.Figure:
    """The figure of a table of relearning; `looks` are the name, the colour and the symbol of every kind of model."""
    traces, shown = [], 0
    groups: Any = table.groupby(["kind", "variant"], sort=False)
    for (kind, variant), rows in groups:
        colour, symbol, dash = looks[kind]["color"], looks[kind]["symbol"], DASHES[list(VARIANTS).index(variant)]
        name = looks[kind]["name"] + VARIANTS[variant]
        if rows[f"{role}_low"].notna().all():
            traces.append(band(rows["tokens"], rows[f"{role}_low"], rows[f"{role}_high"], translucent(colour, 0.12), showlegend=False))
        hovers = [f"<b>{name}</b><br>{tokens:,} tokens: {value:.3f}" for tokens, value in zip(rows["tokens"], rows[role], strict=True)]
        look = {"color": colour, "symbol": symbol, "size": 5}
        line = {"color": colour, "dash": dash, "width": 1.5}
        x, y = rounded(rows["tokens"]), rounded(rows[role])
        traces.append(go.Scatter(x=x, y=y, mode="lines+markers", name=name, marker=look, line=line, hovertext=hovers, hoverinfo="text"))
        shown += 1
    layout = {
        "xaxis": {"title": {"text": "Tokens of fine-tuning"}, "rangemode": "tozero", "nticks": 6},
        "yaxis": {"title": {"text": f"Relative {metric_name(result.config['metric']).lower()},<br>{plain(result.config[role], 22)}"}},
        "shapes": [level(1.0)],
    }
    return new_figure(traces, layout, width=width, plot_px=210, left=68, legend_rows=shown)


@drawn
def relearned_layers(result: Any, *, layers: Sequence[int] | None = None, width: Width = "column") -> go.Figure:
    """Neurons per layer that score above the median of the pruned ones: in the whole, the pruned and the relearned model.

    Args:
        result: what `sepcap.certify` returns.
        layers: layers to draw; default all.
        width: inches, "column" or "page".
    """
    table = part_of(result, "layers", "relearn")
    table = table[table["layer"].isin(chosen_layers(layers, sorted(set(table["layer"].tolist()))))]
    sites = list(table["site"].unique())
    height = len(sites) * PANEL_PX + (len(sites) - 1) * GAP_PX
    traces: list[Any] = []
    layout: dict[str, Any] = {"annotations": []}
    for i, site in enumerate(sites):
        rows = table[table["site"] == site]
        key, axes = axes_of(i)
        high = 1 - i * (PANEL_PX + GAP_PX) / height
        low = high - PANEL_PX / height
        y = {"title": {"text": "Neurons"}, "rangemode": "tozero"}
        x = layer_axis(list(rows["layer"]), 0.4) | ({"title": {"text": ""}} if i < len(sites) - 1 else {})
        layout |= panel_axes(key, x, y, down=(low, high))
        if len(sites) > 1:
            layout["annotations"].append(above(capital(SITE_NAMES[site]), y=high))
        for (column, name), look in zip(_counts(), _looks(), strict=True):
            bars = error_bars(rows[column], rows["relearned_low"], rows["relearned_high"]) if column == "relearned" else None
            traces.append(
                go.Scatter(x=list(rows["layer"]), y=rounded(rows[column]), name=name, showlegend=i == 0, error_y=bars, **axes, **look)
            )
    layout["legend"] = {"title": {"text": "Score above the median of the pruned neurons"}}
    return new_figure(traces, layout, width=width, plot_px=height, top=26 if len(sites) > 1 else 12, left=68, legend_rows=5)


def _counts() -> list[tuple[str, str]]:
    names = {"whole": "Whole model", "pruned": "Pruned neurons, any score", "remaining": "Pruned model", "relearned": "After relearning"}
    return list(names.items())


def _looks() -> Iterator[dict[str, Any]]:
    for i, colour in enumerate((PALETTE[1], GREY, PALETTE[2], PALETTE[0])):
        yield {"mode": "lines+markers", "line": {"color": colour}, "marker": {"symbol": SYMBOLS[i], "size": 6, "color": colour}}


@drawn
def before_after(result: Any, *, width: Width = "page") -> go.Figure:
    """Relative accuracy on forget as it is, with rounded weights, with examples in the context, and with re-formatted texts.

    Args:
        result: what `sepcap.certify` returns.
        width: inches, "column" or "page".
    """
    parts = []
    if "quantised" in result.tables:
        table = result.tables["quantised"]
        parts.append(table.assign(condition=table["bits"].astype("Int64").astype("string").add(" bits").fillna("full precision")))
    if "elicited" in result.tables:
        parts.append(result.tables["elicited"].assign(condition=lambda rows: rows["condition"].replace("plain", "plain, half a context")))
    if not parts:
        part_of(result, "quantised", "quantise")
    rows = pd.concat(parts, ignore_index=True)
    conditions = list(dict.fromkeys(rows["condition"]))
    kinds = list(dict.fromkeys(rows["kind"]))
    traces = []
    for i, kind in enumerate(kinds):
        of_kind = rows[rows["kind"] == kind]
        at = [-conditions.index(name) + 0.3 - 0.6 * i / max(1, len(kinds) - 1) for name in of_kind["condition"]]
        bars = error_bars(of_kind["forget"], of_kind["forget_low"], of_kind["forget_high"], thickness=1, width=2)
        hovers = [f"<b>{NAMES[kind]}</b>, {name}: {value:.3f}" for name, value in zip(of_kind["condition"], of_kind["forget"], strict=True)]
        look = {"color": COLOURS[kind], "symbol": SIGNS[kind], "size": 6}
        how: dict[str, Any] = {"mode": "markers", "marker": look, "error_x": bars, "hovertext": hovers, "hoverinfo": "text"}
        traces.append(go.Scatter(x=rounded(of_kind["forget"]), y=at, name=capital(NAMES[kind]), **how))
    title = f"Relative {metric_name(result.config['metric']).lower()}, {plain(result.config['forget'], 22)}"
    layout = {
        "xaxis": {"title": {"text": title}, "rangemode": "tozero", "nticks": 7},
        "yaxis": row_axis({-i: plain(name) for i, name in enumerate(conditions)}, -len(conditions) + 0.4, 0.6),
        "shapes": [upright(1.0, -len(conditions) + 0.4, 0.6)],
    }
    return new_figure(traces, layout, width=width, plot_px=34 * len(conditions), left=116, legend_rows=len(kinds), legend_below=True)


@drawn
def profile(result: Any, *, layers: Sequence[int] | None = None, width: Width = "page") -> go.Figure:
    """By layer: accuracy of the logit lens, and of both probes with random labels beside them.

    Args:
        result: what `sepcap.certify` returns.
        layers: layers to draw, as in the tables: 0 is the embedding, k the stream after block k − 1; default all.
        width: inches, "column" or "page".
    """
    lens, probes = part_of(result, "lens", "inside"), part_of(result, "probes", "inside")
    shown = chosen_layers(layers, sorted(set(lens["layer"].tolist())))
    lens, probes = (table[table["layer"].isin(shown)] for table in (lens, probes))
    panels = [("Logit lens<br>(relative)", lens, "forget", None)]
    panels += [(f"Probe:<br>{name}", probes[probes["probe"] == name], "accuracy", "control") for name in dict.fromkeys(probes["probe"])]
    traces: list[Any] = []
    layout: dict[str, Any] = {"annotations": []}
    for i, (title, table, column, control) in enumerate(panels):
        key, axes = axes_of(i)
        start = i * (1 + GAP) / len(panels)
        x: dict[str, Any] = layer_axis(shown, 0.4, 6) | {"title": {"text": "After block"}}
        ticks = range(shown[0], shown[-1] + 1, x["dtick"])
        x |= {"tickvals": list(ticks), "ticktext": ["emb." if layer == 0 else str(layer - 1) for layer in ticks]}
        y = {"title": {"text": "Accuracy" if i == 0 else ""}, "rangemode": "tozero", "nticks": 6}
        layout |= panel_axes(key, x, y, across=(start, start + (1 - GAP * (len(panels) - 1)) / len(panels)))
        layout["annotations"].append(above(title, x=start, y=1, align="left"))
        for kind, rows in table.groupby("kind", sort=False):
            line = {"color": COLOURS[kind], "width": 1.5}
            look = {"color": COLOURS[kind], "symbol": SIGNS[kind], "size": 5}
            bars = error_bars(rows[column], rows[f"{column}_low"], rows[f"{column}_high"], thickness=1, width=2)
            how: dict[str, Any] = {"x": list(rows["layer"]), "mode": "lines+markers", "line": line, "marker": look, **axes}
            traces.append(go.Scatter(y=rounded(rows[column]), error_y=bars, name=capital(NAMES[kind]), showlegend=i == 0, **how))
            if control and kind == PRUNED:
                dotted = {**how, "mode": "lines", "line": {"color": COLOURS[kind], "dash": "dot", "width": 1.5}}
                traces.append(go.Scatter(y=rounded(rows[control]), name="Pruned model, random labels", showlegend=i == 1, **dotted))
    kinds = lens["kind"].nunique()
    return new_figure(traces, layout, width=width, plot_px=170, top=42, left=56, legend_rows=kinds + 1, legend_below=True)
