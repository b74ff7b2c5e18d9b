"""Figures of the overlap of task neurons, in the trained and the randomly initialised model (METHODS 12)."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from sepcap.checks import ANY, checked
from sepcap.drawing.heat import heat_panels
from sepcap.drawing.parts import error_bars, layer_axis, level, row_axis, upright
from sepcap.drawing.style import DASHES, GREY, INK, PALETTE, SITE_NAMES, SYMBOLS, Width, capital, chosen_layers, new_figure, plain, rounded
from sepcap.errors import unknown
from sepcap.studies.base.text import p_in_words, with_ends

ROW_PX = 26

CLEAR = "rgba(0,0,0,0)"
"""Fill of open symbols: transparent, because they may overlap others."""

MEASURES = {
    "share": ("Share of the first task's neurons", 2),
    "iou": ("Intersection over union", 2),
    "ratio": ("Ratio to random sets of the same layers", 1),
    "ratio_matched": ("Ratio to random sets of the same layers and activity", 1),
    "log10_p_corrected": ("−log<sub>10</sub> p, Bonferroni", 1),
}
"""What a heat map can show: its title and number of decimals."""

NAMES = {"trained": "Trained", "random": "Random weights"}

SERIES = {
    ("trained", "ratio"): ("trained vs random sets of the same layers", PALETTE[0], PALETTE[0], SYMBOLS[0]),
    ("trained", "ratio_matched"): ("trained vs random sets of the same layers and activity", PALETTE[0], CLEAR, SYMBOLS[0]),
    ("random", "ratio"): ("random weights vs random sets of the same layers", PALETTE[1], PALETTE[1], SYMBOLS[1]),
    ("random", "ratio_matched"): ("random weights vs random sets of the same layers and activity", PALETTE[1], CLEAR, SYMBOLS[1]),
}
"""Weights and ratio -> name in the legend, colour, fill and symbol."""

SHIFT = 0.17
"""Distance between the points of one pair, in rows, so that their intervals do not overlap."""


@checked(layer=ANY)
def overlap(
    result: Any,
    measure: str = "share",
    *,
    site: str | None = None,
    fraction: float | None = None,
    layer: int | None = None,
    width: Width = "column",
) -> go.Figure:
    """Overlap, task × task, of the trained and the randomly initialised model, each the mean over seeds.

    "share" is the share of the neurons of the row's task that the column's task also has. It is the only measure that depends on the
    order of the tasks, and only if the sets differ in size, as they do within a layer. The diagonal, a set with itself, is left out.

    Args:
        result: what `sepcap.measure_overlap` returns.
        measure: "share", "iou", "ratio", "ratio_matched" or "log10_p_corrected".
        site: default the first one of the study.
        fraction: one of the shares of the study; default the smallest.
        layer: default all layers together.
        width: inches, "column" or "page".

    Raises:
        ValueError: a measure, site, fraction or layer that is not in the study.

    Source: [MOD].
    """
    if measure not in MEASURES:
        raise unknown("measure", measure, MEASURES)
    site, fraction = chosen(result, site, fraction)
    table: Any = result.table[(result.table["site"] == site) & (result.table["fraction"] == fraction)]
    here = table[table["layer"].isna()] if layer is None else table[table["layer"] == layer]
    if not len(here):
        raise ValueError(f"layer={layer}: this study has layers 0 to {table['layer'].max()}, or None for all together")
    tasks = list(result.config["tasks"])
    n = here["seed"].nunique()
    groups = {label: here[here["weights"] == weights] for weights, label in NAMES.items() if (here["weights"] == weights).any()}
    panels = {label: _matrix(rows, tasks, measure) for label, rows in groups.items()}
    hovers = {label: _cells(label, rows, tasks) for label, rows in groups.items()}
    name, decimals = MEASURES[measure]
    values = np.concatenate([panel[np.isfinite(panel)] for panel in panels.values()])
    top = 1.0 if measure in ("share", "iou") else max(1.0, float(values.max(initial=0)))
    where = f"{capital(SITE_NAMES[site])}, {100 * fraction:.3g}% selected{'' if layer is None else f', layer {layer}'}"
    where += f"; mean of {n} seeds" * (n > 1)
    return heat_panels(
        panels, tasks, tasks, hovers=hovers, heading=where, title=name, row_title="First task", column_title="Second task",
        limits=(0.0, top), decimals=decimals, width=width,
    )  # fmt: skip


def chosen(result: Any, site: str | None, fraction: float | None) -> tuple[str, float]:
    """The site and the fraction to draw, checked."""
    sites, fractions = result.config["sites"], result.config["fractions"]
    site = str(sites[0] if site is None else site)
    if site not in sites:
        raise unknown("site", site, sites)
    fraction = min(fractions) if fraction is None else fraction
    if fraction not in fractions:
        raise ValueError(f"fraction={fraction} is not in this study; it has {', '.join(f'{f:.3g}' for f in fractions)}")
    return site, fraction


def _matrix(rows: Any, tasks: list[str], measure: str) -> np.ndarray:
    values = np.full((len(tasks), len(tasks)), np.nan)
    for (first, second), of_pair in rows.groupby(["first", "second"]):
        i, j = tasks.index(first), tasks.index(second)
        values[i, j] = of_pair[measure].mean()
        values[j, i] = of_pair["share_of_second" if measure == "share" else measure].mean()
    return -values if measure.startswith("log10_p") else values


def _cells(label: str, rows: Any, tasks: list[str]) -> list[list[str]]:
    texts = [["" for _ in tasks] for _ in tasks]
    for (first, second), of_pair in rows.groupby(["first", "second"]):
        row = of_pair.mean(numeric_only=True)
        said = (
            f"<b>{plain(label)}</b><br>{plain(first)} ({row['a']:,.0f}) and {plain(second)} ({row['b']:,.0f}): {row['both']:,.1f} in both"
            f"<br>{row['ratio']:.3g} times random sets of the same layers, {row['ratio_matched']:.3g} times those also of the same activity"
            f"<br>IoU {row['iou']:.3g}"
            f"<br>p {p_in_words(row['log10_p'])}, corrected {p_in_words(row['log10_p_corrected'])}"
        )
        texts[tasks.index(first)][tasks.index(second)] = texts[tasks.index(second)][tasks.index(first)] = said
    return texts


@checked()
def overlap_ratios(result: Any, *, fraction: float | None = None, width: Width = "column") -> go.Figure:
    """Ratio of the overlap to that of random sets for every pair of tasks and site, with 95% intervals over seeds.

    Filled symbols: random sets with as many neurons in every layer; open symbols: also matched on activity on the retain task.

    Args:
        result: what `sepcap.measure_overlap` returns.
        fraction: one of the shares of the study; default the smallest.
        width: inches, "column" or "page".

    Source: [MOD].
    """
    _, fraction = chosen(result, None, fraction)
    estimates: Any = result.estimates()
    estimates = estimates[estimates["fraction"] == fraction]
    keys = list(dict.fromkeys(zip(estimates["site"], estimates["first"], estimates["second"], strict=True)))
    heights = {key: len(keys) - 1 - i for i, key in enumerate(keys)}
    shown = {key: look for key, look in SERIES.items() if key[0] in set(estimates["weights"])}
    traces = []
    for i, ((weights, measure), (label, colour, fill, symbol)) in enumerate(shown.items()):
        rows = estimates[estimates["weights"] == weights].to_dict("records")
        value, low, high = (np.array([row[f"{measure}{end}"] for row in rows]) for end in ("", "_low", "_high"))
        shift = SHIFT * ((len(shown) - 1) / 2 - i)
        traces.append(
            go.Scatter(
                x=rounded(value),
                y=[heights[row["site"], row["first"], row["second"]] + shift for row in rows],
                error_x=error_bars(value, low, high, thickness=1, width=2, color=colour),
                mode="markers",
                name=label,
                marker={"symbol": symbol, "size": 6, "color": fill, "line": {"color": colour, "width": 1.3}},
                hovertext=[
                    f"<b>{label}</b><br>{SITE_NAMES[row['site']]}, {plain(row['first'])} and {plain(row['second'])}"
                    f"<br>{row['both']:,.4g} of {row['a']:,.4g} in both: {100 * row['share']:.1f}%"
                    f"<br>ratio {with_ends(row, measure)}"
                    for row in rows
                ],
                hoverinfo="text",
                cliponaxis=False,
            )
        )
    ends = estimates[[f"{measure}{end}" for measure in ("ratio", "ratio_matched") for end in ("", "_high", "_low")]].to_numpy(dtype=float)
    least, most = min(0.0, float(np.nanmin(ends))), max(1.0, float(np.nanmax(ends)))
    what = "neurons" if len(result.config["sites"]) > 1 else SITE_NAMES[result.config["sites"][0]]
    title = f"Shared {what}, ratio to random sets<br>({100 * fraction:.3g}% selected; dotted: ratio 1)"
    several = len({site for site, _, _ in heights}) > 1
    top = len(keys) - 0.5
    seeds = len(result.config["seeds"])
    title = f"95% intervals over {seeds} seeds" if seeds > 1 else "one seed: no intervals"
    layout = {
        "legend": {"title": {"text": title}},
        "xaxis": {"title": {"text": title}, "range": [1.06 * least, 1.06 * most]},
        "yaxis": row_axis({y: plain(f"{a}, {b}" + f" ({site})" * several) for (site, a, b), y in heights.items()}, -0.5, top),
        "shapes": [
            upright(1, -0.5, top),
            *(level(y, {"color": GREY, "width": 0.4}, layer="below") for y in heights.values()),
        ],
    }
    return new_figure(traces, layout, width=width, plot_px=ROW_PX * len(keys) + 10, left=20, bottom=62, legend_rows=len(traces) + 1)


@checked()
def overlap_layers(
    result: Any,
    measure: str = "iou",
    *,
    site: str | None = None,
    fraction: float | None = None,
    layers: Sequence[int] | None = None,
    width: Width = "column",
) -> go.Figure:
    """A measure per layer, mean over seeds, one line per pair of tasks; randomly initialised models are dotted.

    Args:
        result: what `sepcap.measure_overlap` returns.
        measure: "share", "iou", "ratio", "ratio_matched" or "log10_p_corrected".
        site: default the first one of the study.
        fraction: one of the shares of the study; default the smallest.
        layers: layers to draw; default all.
        width: inches, "column" or "page".
    """
    if measure not in MEASURES:
        raise unknown("measure", measure, MEASURES)
    site, fraction = chosen(result, site, fraction)
    table: Any = result.table[(result.table["site"] == site) & (result.table["fraction"] == fraction) & result.table["layer"].notna()]
    shown = chosen_layers(layers, range(int(table["layer"].max()) + 1))
    traces: list[Any] = []
    for i, ((first, second), of_pair) in enumerate(table.groupby(["first", "second"], sort=False)):
        for trained in (True, False):
            rows = of_pair[(of_pair["weights"] == "trained") == trained]
            if not len(rows):
                continue
            values = rows.groupby("layer")[measure].mean().reindex(shown).to_numpy(dtype=float)
            colour = PALETTE[i % len(PALETTE)]
            look = {"color": colour, "width": 1.6 if trained else 1, "dash": "solid" if trained else DASHES[2]}
            outline = {"color": colour, "width": 1}
            marker = {"color": colour if trained else "white", "size": 6, "symbol": SYMBOLS[i % len(SYMBOLS)], "line": outline}
            label = f"{first}, {second}"
            said = [
                f"<b>{plain(label)}{'' if trained else ', random weights'}</b><br>layer {k}: {v:.3g}"
                for k, v in zip(shown, values, strict=True)
            ]
            hover = {"name": plain(label), "showlegend": trained, "legendgroup": label, "hovertext": said, "hoverinfo": "text"}
            y = rounded(-values if measure.startswith("log10_p") else values)
            traces.append(go.Scatter(x=shown, y=y, mode="lines+markers", line=look, marker=marker, cliponaxis=False, **hover))
    name = MEASURES[measure][0]
    layout = {
        "xaxis": layer_axis(shown, 0.2, 10),
        "yaxis": {"title": {"text": name}, "rangemode": "tozero", "nticks": 6},
        "legend": {"title": {"text": f"{SITE_NAMES[site]}, {100 * fraction:.3g}% selected<br>solid: trained, dotted: random weights"}},
    }
    if measure.startswith("ratio"):
        layout["shapes"] = [level(1, {"color": INK, "width": 0.8, "dash": "dash"}, layer="below")]
    pairs = len(set(zip(table["first"], table["second"], strict=True)))
    return new_figure(traces, layout, width=width, plot_px=220, right=20, legend_rows=pairs + 2)
