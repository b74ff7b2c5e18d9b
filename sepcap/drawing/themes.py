"""Options that every figure has: the size of its text, and a light or a dark theme."""

import functools
import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np
import plotly.graph_objects as go

from sepcap.checks import Bounds, conform
from sepcap.drawing.ridges import ALL, FILLS
from sepcap.drawing.style import BLUE, FAINT, FONT_PT, INK, SHARES, Paper, px_per_inch

Theme = Literal["light", "dark"]

DARK_SHARES = ("#1f242a", "#20374d", "#27557c", "#367ab0", "#65a3d4", "#a0cae9", "#e4f1fb")
DARK = {INK: "#e6e8ea", FAINT: "#4a525b", "white": "#16191d", BLUE: "#4298dd", FILLS[ALL]: "#35607f"}
DARK |= {light: dark for (_, light), dark in zip(SHARES, DARK_SHARES, strict=True)}
DARK |= {"#f7f7f7": "#1f242a", "#fbd3b4": "#4d3320", "#f0a36b": "#a3632f", "#b54a00": "#f6b07c", "#08519c": "#8fc3ec"}
"""Colour of the figures -> its replacement in the dark theme; other colours suit both themes."""

POINTS = Bounds(5, 14)


def drawn(function: Callable[..., go.Figure]) -> Callable[..., go.Figure]:
    """Give a function that draws a figure two more options: `font_size`, in points, and `theme`, "light" or "dark"."""
    own = inspect.signature(function)

    @functools.wraps(function)
    def draw(*args: Any, font_size: float = FONT_PT, theme: Theme = "light", **options: Any) -> go.Figure:
        points = conform("font_size", font_size, float, POINTS)
        conform("theme", theme, Theme)
        if points != FONT_PT:
            width = options.get("width", own.parameters["width"].default)
            if width is None:  # chosen by the function itself
                fig: Any = function(*args, **options)
                width = fig.layout.width / px_per_inch(fig)
            options["width"] = Paper(width, points)
        fig = function(*args, **options)
        return dark(fig) if theme == "dark" else fig

    added = [("font_size", FONT_PT, float), ("theme", "light", Theme)]
    more = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=value, annotation=kind) for name, value, kind in added]
    # keywords of any name come last
    ordered = sorted([*own.parameters.values(), *more], key=lambda parameter: parameter.kind)
    described: Any = draw  # the type of a function does not declare that it may have a signature of its own
    described.__signature__ = own.replace(parameters=ordered)
    return draw


def dark(fig: go.Figure) -> go.Figure:
    """The same figure with light text on a dark background; only colours are replaced, so a task may be called "white"."""
    return go.Figure(_recoloured(fig.to_plotly_json(), ""))


def _recoloured(value: Any, name: str) -> Any:
    if isinstance(value, str):
        return DARK.get(value, value) if re.search("color", name) else value
    if isinstance(value, Mapping):
        return {key: _recoloured(inner, str(key)) for key, inner in value.items()}
    if isinstance(value, list | tuple) or (isinstance(value, np.ndarray) and value.dtype.kind in "OU"):
        return [_recoloured(inner, name) for inner in value]
    return value
