"""Cells with neuron counts, on logarithmic axes and with logarithmic colours."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.colors import sample_colorscale

from sepcap.drawing.parts import colour_bar
from sepcap.drawing.style import FONT_PX, SHARES, TICK_PX, rounded


@dataclass(frozen=True)
class Grid:
    """Cells in the plane of both logarithms, with the same bins on both axes.

    Row and column 0 contain the neurons with importance 0, which has no logarithm; row and column 1 separate them from the rest.

    Attributes:
        low, step, bins: start of the first cell and width of a cell, in units of log10, and number of cells.
        zero: start and end of row and column 0.
    """

    low: float
    step: float
    bins: int
    zero: tuple[float, float]

    @property
    def edges(self) -> np.ndarray:
        """Edges of all rows or columns, [bins + 3]."""
        return np.concatenate([self.zero, self.low + self.step * np.arange(self.bins + 1)]).astype(np.float32)

    def place(self, importance: np.ndarray) -> np.ndarray:
        """log10 of the importance; for importance 0 the middle of row or column 0."""
        return np.log10(importance, where=importance > 0, out=np.full(importance.shape, np.mean(self.zero)))

    def index(self, importance: np.ndarray) -> np.ndarray:
        """Row or column of every importance."""
        inside = np.floor((self.place(importance) - self.low) / self.step).astype(np.int64).clip(0, self.bins - 1)
        return np.where(importance > 0, inside + 2, 0)

    def count(self, forget: np.ndarray, retain: np.ndarray) -> np.ndarray:
        """Neurons per cell, [forget, retain]."""
        n = self.bins + 2
        counts = np.bincount(self.index(forget) * n + self.index(retain), minlength=n * n).reshape(n, n)
        return counts.astype(np.min_scalar_type(counts.max()))

    def with_bins(self, bins: int) -> "Grid":
        """The same range with another number of cells."""
        return Grid(self.low, self.step * self.bins / bins, bins, self.zero)


def _colours(share: np.ndarray) -> Any:
    # the lightest must be visible on white
    return sample_colorscale(SHARES, list(0.12 + 0.88 * share))


def logarithmic(fullest: int) -> list[list[Any]]:
    """Colour scale of the logarithm of a count; a cell without neurons is transparent."""
    nothing = "rgba(255,255,255,0)"
    share = np.linspace(0, 1, 12)
    colours = _colours(share)
    if fullest == 1:
        return [[0, nothing], [0.5, nothing], [0.5, colours[-1]], [1, colours[-1]]]
    stops = [[min(1.0, float(fullest**t / fullest)), colour] for t, colour in zip(share, colours, strict=True)]
    first = 0.5 / fullest
    return [[0, nothing], [first, nothing], [first, colours[0]], *stops]


def counts_bar(fullest: int) -> go.Scatter:
    """The logarithmic colour bar: the cells' own colour bar would be linear."""
    ticks = [f * 10**p for p in range(7) for f in ((1,) if fullest >= 100 else (1, 2, 5)) if f * 10**p <= fullest]
    share = np.linspace(0, 1, 12)
    labels = {"tickvals": rounded(np.log10(ticks)), "ticktext": [f"{t:,}" for t in ticks], "tickfont": {"size": TICK_PX}}
    bar = colour_bar("Neurons per cell", thickness=10, outlinewidth=0, ticks="outside", ticklen=3, **labels)
    bar["title"]["font"] = {"size": FONT_PX}
    scale = [[t, colour] for t, colour in zip(share, _colours(share), strict=True)]
    top = max(float(np.log10(fullest)), 0.3)
    marker = {"color": [0], "cmin": 0, "cmax": top, "colorscale": scale, "showscale": True, "colorbar": bar}
    return go.Scatter(x=[None], y=[None], mode="markers", marker=marker, showlegend=False, hoverinfo="skip")
