"""The cells of a sweep: a base configuration, and for every cell the fields in which it differs."""

import dataclasses
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_type_hints

from sepcap.checks import ANY, conform, shown, wrong
from sepcap.errors import unknown
from sepcap.learning.fit import planned_tokens
from sepcap.storage import digest_of
from sepcap.studies.catalog import FUNCTIONS
from sepcap.studies.pruning.config import PruningConfig
from sepcap.studies.pruning.plan import fitting_of, more_passes
from sepcap.workers.engines import named

Grid = Mapping[str, Any] | Sequence[Mapping[str, Any]]
"""Field -> its values, of which all combinations are cells; or several of these, whose cells are joined."""

MOST_CELLS = 100_000

NAME = 90
"""Maximum length of the readable part of the name of a cell."""


@dataclass(frozen=True)
class Cell:
    """One configuration of a sweep.

    Attributes:
        name: name of its folder in `cells/`: the fields, and a digest of the whole configuration.
        fields: the fields that the grid sets, with their values as JSON.
        config: all fields, as JSON.
        tokens: tokens through the model, at most; None if the study does not say so beforehand.
        shares: cells with the same text share measurements of the unpruned model, or at least the model.
    """

    name: str
    fields: Mapping[str, Any]
    config: Mapping[str, Any]
    tokens: int | None
    shares: str


def given(config: Any) -> dict[str, Any]:
    """The fields that a configuration is made of, by name."""
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(config) if field.init}


def config_of(kind: str, fields: Mapping[str, Any]) -> Any:
    """A configuration from its fields, as they are in JSON, which has no tuples."""
    cls = named(FUNCTIONS[kind]).CONFIG
    kinds = get_type_hints(cls)
    return cls(**{name: conform(name, value, kinds[name], ANY) for name, value in fields.items()})


def check_base(base: Any) -> None:
    """Check that a study takes a configuration, and that all of it can be written as JSON.

    Raises:
        TypeError: another object, or a field that is an object of Python, such as a Dataset.
    """
    kind = type(base).__name__
    if kind not in FUNCTIONS or named(FUNCTIONS[kind]).CONFIG is not type(base):
        raise wrong("base", base, f"a configuration of a study, such as sepcap.PruningConfig(...); there are {', '.join(FUNCTIONS)}")
    for name, value in given(base).items():
        plain("base", name, value)


def plain(what: str, field: str, value: Any) -> Any:
    """A value of a field as JSON.

    Raises:
        TypeError: it is an object that JSON does not have.
    """
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError):
        right = "names, paths, numbers or lists of them: cells are written as JSON, and other processes read them"
        raise wrong(f"{what}.{field}", value, right) from None


def cells_of(base: Any, grid: Grid) -> list[Cell]:
    """All cells of a grid, in the order of its fields and values.

    Args:
        base: configuration whose fields are those of every cell, if the grid does not set them.
        grid: see `Grid`.

    Raises:
        ValueError: an unknown field, no values, a repeated value or cell, or a combination that the configuration refuses.
        TypeError: values that are not in a list, or of the wrong kind.

    >>> from sepcap.studies.pruning.config import PruningConfig
    >>> [dict(cell.fields) for cell in cells_of(PruningConfig(), {"importance": ["abs"], "seed": [0, 1]})]
    [{'importance': 'abs', 'seed': 0}, {'importance': 'abs', 'seed': 1}]
    """
    check_base(base)
    kind, cells = type(base).__name__, dict[str, Cell]()
    for part in _parts(grid):
        axes = {name: _values(base, name, values) for name, values in part.items()}
        if len(cells) + (n := _size(axes)) > MOST_CELLS:
            raise ValueError(f"grid: {len(cells) + n:,} cells; give at most {MOST_CELLS:,}")
        for values in itertools.product(*axes.values()):
            cell = _cell(base, kind, dict(zip(axes, values, strict=True)))
            if (same := cells.setdefault(digest_of(cell.config), cell)) is not cell:
                also = "" if same.fields == cell.fields else f", also as {in_words(same.fields)}"
                raise ValueError(f"grid: the cell {in_words(cell.fields)} is given twice{also}")
    return list(cells.values())


def _size(axes: Mapping[str, Sequence[Any]]) -> int:
    n = 1
    for values in axes.values():
        n *= len(values)
    return n


def _parts(grid: Any) -> Iterator[Mapping[str, Any]]:
    parts = [grid] if isinstance(grid, Mapping) else grid
    if isinstance(parts, str | bytes) or not isinstance(parts, Sequence):
        raise wrong("grid", grid, "fields with their values, {'importance': ['abs', 'rms'], 'seed': [0, 1, 2]}, or a list of these")
    if not parts or not all(isinstance(part, Mapping) and part for part in parts):
        raise ValueError(f"grid={shown(grid)}: give at least one field with its values, {{'seed': [0, 1, 2]}}")
    yield from parts


def _values(base: Any, name: str, values: Any) -> list[Any]:
    known = given(base)
    if name not in known:
        raise unknown("a field of the grid", name, known, f"It must be a field of {type(base).__name__}.")
    if isinstance(values, str | bytes | Mapping) or not (hasattr(values, "__iter__") and hasattr(values, "__len__")):
        raise wrong(f"grid[{name!r}]", values, "its values in a list")
    found = list(values.tolist() if hasattr(values, "tolist") else values)
    if not found:
        raise ValueError(f"grid[{name!r}]={shown(values)}: give at least one value")
    keys = [json.dumps(plain("grid", name, value), sort_keys=True) for value in found]
    if twice := next((key for i, key in enumerate(keys) if key in keys[:i]), None):
        raise ValueError(f"grid[{name!r}]={shown(values)}: {twice} is given twice")
    return found


def _cell(base: Any, kind: str, fields: dict[str, Any]) -> Cell:
    try:
        config = dataclasses.replace(base, **fields)
    except (ValueError, TypeError) as error:
        raise type(error)(f"cell {in_words(fields)}: {error}") from None
    whole = {name: plain("grid", name, value) for name, value in given(config).items()}
    own = {name: whole[name] for name in fields}
    return Cell(name_of(own, digest_of({"kind": kind, **whole})), own, whole, tokens_of(config), str(shares(config)))


MEASURED_APART = ("model", "rotation", "tokens", "eval_tokens", "batch_size", "context", "per_document")
"""Fields of a pruning run on which measurements of the unpruned model depend and which `Plan.once` does not distinguish."""


def shares(config: Any) -> tuple[Any, ...]:
    """Cells with the same value share statistics of step 0, or at least the loaded model."""
    if type(config) is not PruningConfig:
        return (getattr(config, "model", None),)
    return (*measured_apart(config), config.seed, str(config.forget), str(config.retain))


def measured_apart(config: PruningConfig) -> tuple[Any, ...]:
    """Runs with the same value can have one cache of `Plan.once`."""
    return (*(getattr(config, name) for name in MEASURED_APART), config.sites)


def tokens_of(config: Any) -> int | None:
    """Tokens of a pruning run through the model, if there is enough text."""
    if type(config) is not PruningConfig:
        return None
    first, again = len(config.unpruned_roles), (config.steps - 1) * len(config.collected_roles) * config.recollect
    collected = (first + again) * (1 + more_passes(config)) + first * (config.positions == "correct")
    learned = planned_tokens(2 * config.tokens, fitting_of(config)) if config.importance == "learned" else 0
    return collected * config.tokens + learned + 2 * (config.steps + 1) * config.eval_tokens


def name_of(fields: Mapping[str, Any], digest: str) -> str:
    """Name of the folder of a cell.

    >>> name_of({"importance": "abs", "seed": 0}, "0123456789abcdef")
    'importance-abs_seed-0_0123456789'
    """
    words = re.sub(r"[^\w.+=-]+", "", "_".join(f"{name}-{value_in_words(value)}" for name, value in fields.items()), flags=re.ASCII)
    return f"{words[:NAME]}_{digest[:10]}"


def value_in_words(value: Any) -> str:
    """A value of a field, short: `mlp=0.02` for a share of the mlp neurons.

    >>> value_in_words({"mlp": 0.02, "heads": 1}), value_in_words(["a", "b"]), value_in_words(None)
    ('mlp=0.02,heads=1', 'a+b', 'None')
    """
    if isinstance(value, Mapping):
        return ",".join(f"{key}={value_in_words(one)}" for key, one in value.items())
    return "+".join(map(value_in_words, value)) if isinstance(value, list | tuple) else str(value)


def in_words(fields: Mapping[str, Any]) -> str:
    """The fields of a cell in words.

    >>> in_words({"importance": "abs", "seed": 0})
    'importance=abs, seed=0'
    """
    return ", ".join(f"{name}={value_in_words(value)}" for name, value in fields.items())
