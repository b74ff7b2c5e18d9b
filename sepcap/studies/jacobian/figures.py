"""Spectra of the Jacobians of attention or mlp blocks, and their ranks over layers."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from sepcap.checks import checked
from sepcap.drawing.parts import DOTTED, entry, error_bars, layer_axis, level
from sepcap.drawing.style import BLUE, GREY, INK, VERMILLION, Width, chosen_layers, new_figure, plain, power_of_ten, rounded
from sepcap.drawing.themes import drawn
from sepcap.errors import unknown
from sepcap.studies.base.text import between, counted
from sepcap.studies.jacobian.config import RANDOM, TRAINED

MEASURES = {
    "rank": "Rank",
    "stable_rank": "Stable rank",
    "participation_ratio": "Participation ratio<br>of squared singular values",
    "effective_rank": "Effective rank",
}
PARTS = {"attn": "attention", "mlp": "mlp"}
LOOK = {TRAINED: (VERMILLION, "circle", "trained"), RANDOM: (BLUE, "square", "random weights")}
UPWARDS = {TRAINED: "triangle-up", RANDOM: "triangle-up-open"}
"""Markers of ranks that are only lower bounds."""
POINTS = 160
"""Most points drawn per spectrum, half spaced evenly and half logarithmically, so that the leading values are all drawn."""
NAMED = 8
"""Most layers that the legend names one by one; of more, it names the first, the middle and the last."""
SCALE = ((86, 180, 233), (0, 114, 178), (60, 20, 90))
"""Colours from the first layer to the last: lightness falls evenly."""


@drawn
@checked()
def jacobian_ranks(result: Any, measure: str = "rank", *, layers: Sequence[int] | None = None, width: Width = "column") -> go.Figure:
    """Rank over layers, trained and with random weights: means over rows of tokens with 95% intervals, and the largest rank possible.

    If the rank of a row is only a lower bound, the mean is a triangle that points up ("at least"), without interval and without a line
    to its neighbours, since their differences are not meaningful. Intervals are cut at the largest rank possible; if that differs between
    rows, its mean is drawn, and intervals are cut at the upper end of its interval (see `JacobianSpectrum.by_layer`).

    Args:
        result: what `sepcap.jacobian_spectrum` returns.
        measure: "rank", "stable_rank", "participation_ratio" or "effective_rank".
        layers: layers to draw; default all of the study.
        width: inches, "column" or "page".
    """
    if measure not in MEASURES:
        raise unknown("measure", measure, MEASURES)
    table: Any = result.by_layer
    c = result.config
    shown = chosen_layers(layers, c["layers"])
    table = table[table["layer"].isin(shown)]
    traces: list[Any] = []
    highest, open_ended = 0.0, False
    for weights, (colour, symbol, name) in LOOK.items():
        lines = [line for line in table.to_dict("records") if line["weights"] == weights]
        if not lines:
            continue
        mean, low, high = (np.array([line[f"{measure}{end}"] for line in lines], dtype=float) for end in ("", "_low", "_high"))
        # shifted apart, so that intervals do not hide each other
        x = [line["layer"] + _shift(weights, c) for line in lines]
        at_least = [bool(line["at_least"]) and measure == "rank" for line in lines]
        open_ended |= any(at_least)
        hovers = [
            f"<b>layer {line['layer']}, {name}</b><br>{MEASURES[measure].lower()} {'at least ' * at_least[k]}{between(line, measure)}"
            f"<br>largest possible rank {line['bound']:,.4g}<br>{counted(line['rows'], 'row')} of {counted(c['tokens'], 'token')}"
            for k, line in enumerate(lines)
        ]
        traces.append(
            go.Scatter(
                x=rounded(x),
                y=rounded(mean),
                error_y=error_bars(mean, low, high, width=3, visible=bool(np.isfinite(high).any())),
                mode="markers" if any(at_least) else "lines+markers",
                name=name,
                line={"color": colour, "width": 1.5},
                marker={
                    "color": colour,
                    "opacity": 1,  # plotly lowers it for markers of several sizes
                    "size": [10 if more else 7 for more in at_least],
                    "symbol": [UPWARDS[weights] if more else symbol for more in at_least],
                },
                hovertext=hovers,
                hoverinfo="text",
                cliponaxis=False,
            )
        )
        highest = max(highest, float(np.nan_to_num([mean, high]).max()))
    if open_ended:
        arrow = {"symbol": "triangle-up", "size": 10, "color": INK}
        traces.append(entry("lower bound on the rank", mode="markers", marker=arrow, hoverinfo="skip"))
    if measure == "rank":
        traces.append(_bounds(result, table))
        highest = max(highest, float(table["bound"].to_numpy().max()))
    title = f"Rank: singular values above<br>{c['threshold']:g} of the largest" if measure == "rank" else MEASURES[measure]
    layout = {
        "xaxis": layer_axis(shown, 0.4),
        "yaxis": {"title": {"text": title}, "range": [0, 1.06 * highest or 1]},
        "legend": {"title": {"text": _said(result)}},
    }
    return new_figure(traces, layout, width=width, plot_px=210, left=76, legend_rows=len(traces) + 2)


def _shift(weights: str, config: Any) -> float:
    return {TRAINED: -0.07, RANDOM: 0.07}[weights] if config["control"] else 0.0


def _bounds(result: Any, table: Any) -> go.Scatter:
    """The largest rank possible, a dash per layer: it often equals the rank, which a line would hide."""
    x = [layer + _shift(weights, result.config) for weights, layer in zip(table["weights"], table["layer"], strict=True)]
    differs = bool((result.tables["jacobians"].groupby(["weights", "layer"])["bound"].nunique() > 1).any())
    name = "largest possible" + ", mean over rows" * differs
    dash = {"symbol": "line-ew", "size": 15, "line": {"color": INK, "width": 1.5}}
    return go.Scatter(x=rounded(x), y=rounded(table["bound"]), mode="markers", name=name, marker=dash, hoverinfo="skip")


@drawn
@checked()
def jacobian_spectra(result: Any, *, control: bool = True, layers: Sequence[int] | None = None, width: Width = "column") -> go.Figure:
    """Singular values as shares of the largest, one line per layer (medians over rows), with the threshold of the rank.

    Args:
        result: what `sepcap.jacobian_spectrum` returns.
        control: also draw the model with random weights: the median over its layers and rows, dashed.
        layers: layers to draw; default all of the study.
        width: inches, "column" or "page".
    """
    c = result.config
    traces: list[Any] = []
    lowest = c["threshold"]
    shares = {weights: _shares(result.tensors[weights].double().numpy()) for weights in LOOK if weights in result.tensors}
    number = _places(shares[TRAINED].shape[-1])
    layers = chosen_layers(layers, c["layers"])
    named = range(len(layers)) if len(layers) <= NAMED else (0, len(layers) // 2, len(layers) - 1)
    for i, layer in enumerate(layers):
        y = np.median(shares[TRAINED][c["layers"].index(layer)], axis=0)[number - 1]
        template = f"<b>layer {layer}</b><br>σ at index %{{x:,}} is %{{y:.2e}} of the largest<extra></extra>"
        look = {"mode": "lines", "name": f"layer {layer}", "line": {"color": _shade(i, len(layers)), "width": 1.4}}
        traces.append(go.Scatter(x=number.tolist(), y=_positive(y), hovertemplate=template, showlegend=i in named, **look))
        lowest = min([lowest, *y[y > 0]])
    if control and RANDOM in shares:
        y = np.median(shares[RANDOM], axis=(0, 1))[number - 1]
        template = "<b>random weights</b><br>σ at index %{x:,} is %{y:.2e} of the largest<extra></extra>"
        look = {"mode": "lines", "name": "random weights, all layers", "line": {"color": GREY, "width": 1.6, "dash": "dash"}}
        traces.append(go.Scatter(x=number.tolist(), y=_positive(y), hovertemplate=template, **look))
    bottom = max(-9, int(np.floor(np.log10(lowest))))
    step = max(1, -bottom // 5)
    powers = list(range(0, bottom - 1, -step))
    traces.append(entry(f"threshold of the rank, {c['threshold']:g}", mode="lines", line=DOTTED))
    layout = {
        "xaxis": {"title": {"text": "Index of the singular value"}, "range": [0, float(number[-1])], "nticks": 6},
        "yaxis": {
            "title": {"text": "Singular value (share of the largest)"},
            "type": "log",
            "range": [bottom, 0.15],
            "tickvals": [10.0**power for power in powers],
            "ticktext": [power_of_ten(power) if power else "1" for power in powers],
        },
        "shapes": [level(c["threshold"])],
        "legend": {"title": {"text": _said(result)}},
    }
    return new_figure(traces, layout, width=width, plot_px=230, right=24, legend_rows=len(named) + len(traces) - len(layers) + 2)


def _shares(values: np.ndarray) -> np.ndarray:
    """σ/σ₁ [layer, row, value]; 0 for a Jacobian of zeros."""
    return np.divide(values, values[..., :1], out=np.zeros_like(values), where=values[..., :1] > 0)


def _positive(values: np.ndarray) -> list[float | None]:
    """Values for a logarithmic axis: those that are not positive are left out."""
    return rounded(np.where(values > 0, values, np.nan), 3)


def _places(n: int) -> np.ndarray:
    """Indices of the singular values that are drawn, from 1 to n."""
    return np.unique(np.concatenate([np.geomspace(1, n, POINTS // 2), np.linspace(1, n, POINTS // 2)]).round().astype(int))


def _shade(i: int, n: int) -> str:
    at = (len(SCALE) - 1) * (i / max(1, n - 1))
    j = min(int(at), len(SCALE) - 2)
    mixed = (round(a + (b - a) * (at - j)) for a, b in zip(SCALE[j], SCALE[j + 1], strict=True))
    return f"rgb({', '.join(map(str, mixed))})"


def _said(result: Any) -> str:
    c = result.config
    model = "the embedded model" if c["model"] == "default" else plain(c["model"], 24)
    what = f"{PARTS[c['part']]} of {model}, without residual"
    return f"{what}<br>{counted(c['tokens'], 'token')}, {counted(c['rows'], 'row')} of {plain(c['task'], 24)}"
