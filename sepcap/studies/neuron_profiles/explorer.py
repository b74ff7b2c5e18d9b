"""The page to look through profiles: one file without external resources (METHODS 23)."""

import base64
import hashlib
import json
import math
from importlib.resources import files
from typing import Any

import numpy as np
import pandas as pd

from sepcap.studies.neuron_profiles.units import GROUPS, ROLES, named_unit

ASSETS = files("sepcap") / "assets"

LEVELS = 99
"""Levels of the colour of a token: its activation over the highest of the unit, to so many steps."""

START = "\nexplore(document.getElementById('explorer'), JSON.parse(document.getElementById('data').textContent), null, document);\n"

NAMES = {
    "score": "score",
    "rank": "rank",
    "abs": "mean |activation|",
    "mean": "mean activation",
    "positive": "share above 0",
    "strongest": "strongest",
    "importance": "importance",
    "delta_loss": "Δ cross-entropy",
    "delta_top1": "Δ top-1",
}
"""Column of the table without its role -> its heading."""


def asset(name: str) -> str:
    """Text of a file of the view."""
    return (ASSETS / f"explorer.{name}").read_text(encoding="utf-8")


def explorer_page(result: Any) -> str:
    """HTML of the page of some profiles."""
    import jinja2
    from markupsafe import Markup

    script = asset("js") + START
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(asset("html"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return template.render(
        title=result.TITLE,
        summary=result.summary(),
        style=Markup(asset("css")),
        script=Markup(script),
        # the page allows only this script, whatever external text contains
        allowed=Markup(f"'sha256-{digest}'"),
        # inside a script element only "<" can begin markup
        data=Markup(json.dumps(explorer_data(result), separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")),
    )


def explorer_data(result: Any) -> dict[str, Any]:
    """What the view shows, as JSON values: words once, and everything else as numbers."""
    config, table = result.config, result.tables["neurons"]
    vocabulary = result.tables["vocabulary"]
    place = {int(token): i for i, token in enumerate(vocabulary["token"])}
    columns = [name for name in table if _heading(name, config) is not None]
    ends = [name for name in table if str(name).endswith(("_low", "_high"))]
    parts = _Parts(result, place)
    units = [
        {
            "name": named_unit(unit),
            "values": {name: _number(unit[name]) for name in [*columns, *ends]},
            **parts.unit(i),
        }
        for i, unit in enumerate(table.to_dict("records"))
    ]
    return {
        "tasks": [str(task) for task in config["tasks"]],
        "groups": list(GROUPS),
        "columns": [[name, _heading(name, config), next((role for role in ROLES if str(name).endswith(role)), "")] for name in columns],
        "words": [str(text) for text in vocabulary["text"]],
        "notes": [f"{note[0].upper()}{note[1:]}." for note in result.tables["notes"]["note"]],
        "units": units,
    }


def _heading(column: Any, config: Any) -> str | None:
    name = str(column)
    for role, task in zip(ROLES, config["tasks"], strict=True):
        if name.endswith(f"_{role}") and name.removesuffix(f"_{role}") in NAMES:
            return f"{NAMES[name.removesuffix(f'_{role}')]}, {task}"
    return NAMES.get(name)


def _number(value: Any) -> float | int | None:
    if pd.isna(value) or not math.isfinite(value):
        return None
    return int(value) if isinstance(value, int | np.integer) else float(f"{float(value):.5g}")


class _Parts:
    """The tensors of profiles as nested lists."""

    def __init__(self, result: Any, place: dict[int, int]) -> None:
        self.of = {name: tensor.numpy() for name, tensor in result.tensors.items()}
        self.place = place

    def unit(self, i: int) -> dict[str, Any]:
        """Everything of one unit but its name and values."""
        edges = self.of["edges"][i]
        scale = float(max(abs(edges[0]), abs(edges[-1]))) or 1.0
        found: dict[str, Any] = {"scale": scale, "edges": [_number(edges[0]), _number(edges[-1])], "tasks": []}
        for name in ("promoted", "suppressed"):
            found[name] = self._pairs(f"{name}/token", f"{name}/effect", i)
        for role in ROLES:
            samples = [[self._context(f"{role}/sample", (i, g, s), scale) for s in range(n)] for g, n in self._sizes(f"{role}/sample", i)]
            found["tasks"].append(
                {
                    "histogram": [_number(x) for x in self.of[f"{role}/histogram"][i]],
                    "preferred": self._pairs(f"{role}/preferred/token", f"{role}/preferred/lift", i, f"{role}/preferred/count"),
                    "top": [self._context(f"{role}/top", (i, r), scale) for r in range(int((self.of[f"{role}/top/row"][i] >= 0).sum()))],
                    "samples": samples,
                }
            )
        return found

    def _sizes(self, name: str, i: int) -> list[tuple[int, int]]:
        return list(enumerate((self.of[f"{name}/row"][i] >= 0).sum(1).tolist()))

    def _pairs(self, token: str, value: str, i: int, count: str = "") -> list[list[Any]]:
        if token not in self.of:
            return []
        ids, values = self.of[token][i], self.of[value][i]
        counts = self.of[count][i] if count else ids
        rows = ([self.place[int(t)], _number(v), int(n)] for t, v, n in zip(ids, values, counts, strict=True) if t >= 0)
        return [row if count else row[:2] for row in rows]

    def _context(self, name: str, at: tuple[int, ...], scale: float) -> dict[str, Any]:
        ids, window = self.of[f"{name}/tokens"][at], self.of[f"{name}/window"][at]
        inside = np.flatnonzero(ids >= 0)
        ids, window = ids[inside], window[inside]
        levels = np.rint(LEVELS * window / scale)
        position = int(self.of[f"{name}/position"][at])
        found: dict[str, Any] = {
            "w": [self.place[int(t)] for t in ids],
            "a": [None if np.isnan(a) else int(a) for a in levels],
            "at": position - int(self.of[f"{name}/start"][at]) - int(inside[0]),
            "act": _number(self.of[f"{name}/activation"][at]),
            "doc": int(self.of[f"{name}/document"][at]),
            "pos": position,
        }
        source = self.of.get(f"{name}/source_token")
        if source is not None and source[at] >= 0:
            contribution = _number(self.of[f"{name}/contribution"][at])
            found["src"] = [self.place[int(source[at])], int(self.of[f"{name}/source"][at]), contribution]
        return found
