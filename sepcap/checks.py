"""Checks of arguments, shared by functions, configurations and the command line.

An argument is checked against its annotation and, for numbers, against the bounds of its name in `BOUNDS`. Every error states the
argument, the value given and the valid values. Numpy numbers and flags become Python's own; `~` in a path becomes the home folder.
"""

import dataclasses
import functools
import inspect
import math
import os
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal, NamedTuple, ParamSpec, TypeVar

from sepcap.errors import unknown
from sepcap.torch_defaults import torch_defaults

P = ParamSpec("P")
R = TypeVar("R")


class WrongKind(TypeError, ValueError):
    """An argument of the wrong kind, such as a word instead of a number or a fraction instead of a whole number."""


class Bounds(NamedTuple):
    """The range of valid numbers; `above` excludes its lower end, `below` its upper end."""

    least: float = -math.inf
    most: float = math.inf
    above: bool = False
    below: bool = False

    def hold(self, value: float) -> bool:
        """Whether a number is in the range."""
        return (value > self.least if self.above else value >= self.least) and (value < self.most if self.below else value <= self.most)

    def words(self, kind: str) -> str:
        """The valid numbers in words, such as "a whole number, 0 or more"."""
        low, high = f"{self.least:g}", f"{self.most:g}"
        if self.most < math.inf and self.least > -math.inf:
            if self.above and self.below:
                return f"{kind} between {low} and {high}"
            return f"{kind} {'above' if self.above else 'from'} {low} {'below' if self.below else 'to'} {high}"
        if self.least > -math.inf:
            return f"{kind} above {low}" if self.above else f"{kind}, {low} or more"
        return kind if self.most == math.inf else f"{kind}, at most {high}"


ANY, FROM_0, FROM_1, FROM_2 = Bounds(), Bounds(0), Bounds(1), Bounds(2)
POSITIVE = Bounds(0, above=True)
SHARE = Bounds(0, 1)
BETWEEN_0_AND_1 = Bounds(0, 1, above=True, below=True)
FRACTION = Bounds(0, 1, above=True)

BOUNDS: dict[str, Bounds] = {
    **dict.fromkeys(
        ("seed", "seeds", "skip", "layer", "head", "heads", "controls", "replicates", "b", "dims", "locations", "num_fewshot"), FROM_0
    ),
    **dict.fromkeys(
        ("tokens", "eval_tokens", "reference_tokens", "fit_tokens", "prompt_tokens", "paragraph_tokens", "batch_size", "steps", "n",
         "n_init", "max_iter", "draws", "k", "rows", "samples", "per_category", "following", "permutations", "tolerance", "limit",
         "bins", "differ_within", "per_document", "baseline_seeds", "baseline_steps", "top"),
        FROM_1,
    ),
    "context": FROM_2,
    **dict.fromkeys(("eps", "lr"), POSITIVE),
    **dict.fromkeys(("temperature", "lam"), FROM_0),
    "q": SHARE,
}  # fmt: skip
"""Default bounds of numeric arguments with these names; a function or configuration can set others."""


def shown(value: object) -> str:
    """The value given, short enough for a message."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:79]}…"


def wrong(name: str, value: object, right: str) -> WrongKind:
    """The error for an argument of the wrong kind; it shows plain values, and names the class of others."""
    plain = value is None or isinstance(value, str | bytes | Real | list | tuple | set | dict | range | os.PathLike)
    came = f"{name}={shown(value)}:" if plain else f"{name} is a {type(value).__name__};"
    return WrongKind(f"{came} give {right}")


def flag(name: str, value: Any) -> bool:
    """True or False; not 1, and not "no"."""
    if isinstance(value, bool):
        return value
    if type(value).__module__ == "numpy" and type(value).__name__ in ("bool", "bool_"):
        return bool(value)
    raise wrong(name, value, "True or False")


def whole(name: str, value: Any, bounds: Bounds = ANY) -> int:
    """A whole number, Python's or numpy's; not True, 1.5 or "3"."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise wrong(name, value, bounds.words("a whole number"))
    if not bounds.hold(int(value)):
        least = bounds.least if bounds.most == math.inf else 0
        raise ValueError(f"{name}={shown(value)}: give {f'at least {least:g}' if least > 0 else bounds.words('a whole number')}")
    return int(value)


def number(name: str, value: Any, bounds: Bounds = ANY) -> float:
    """A finite number; integers stay integers. Not True, NaN, infinite or "0.5"."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise wrong(name, value, bounds.words("a finite number"))
    if not math.isfinite(value) or not bounds.hold(float(value)):
        raise ValueError(f"{name}={shown(value)}: give {bounds.words('a finite number')}")
    return int(value) if isinstance(value, Integral) else float(value)


def text(name: str, value: Any) -> str:
    """A string; not a number and not a path object."""
    if not isinstance(value, str):
        raise wrong(name, value, "a string")
    return value


def path(name: str, value: Any) -> Any:
    """A path, as a string or a path object, whose class is kept; `~` is expanded to the home folder."""
    if not isinstance(value, str | Path):
        raise wrong(name, value, "a path")
    return Path(value).expanduser() if isinstance(value, Path) else os.path.expanduser(value)


def distinct(name: str, values: Sequence[Any], fewest: int = 1) -> None:
    """Raise if a tuple has fewer values than `fewest`, or a repeated value."""
    # compared one by one, so that unhashable values are covered too
    if len(values) < fewest or any(value in values[:i] for i, value in enumerate(values)):
        many = {0: "(empty for none)", 1: "of at least one"}.get(fewest, f"of at least {fewest}")
        raise ValueError(f"{name}={shown(values)}: give a tuple {many}, without repeats")


def conform(name: str, value: Any, kind: Any, bounds: Bounds | None = None) -> Any:
    """The value, checked against its annotation and converted where needed.

    Args:
        name: name of the argument, for the error.
        value: the value given.
        kind: an annotation. Any, the array types of jaxtyping and names in quotes allow every value.
        bounds: bounds of the numbers in the value; default is those of the name.

    Raises:
        WrongKind: a value of another kind; it is a TypeError and a ValueError.
        ValueError: a number out of bounds, or an unknown name.

    >>> conform("tokens", 1.5, int)
    Traceback (most recent call last):
    sepcap.checks.WrongKind: tokens=1.5: give a whole number, 1 or more
    """
    bounds = BOUNDS.get(name, ANY) if bounds is None else bounds
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        return conform(name, value, inner[0], bounds)
    if origin in (typing.Union, types.UnionType):
        return _one_of_kinds(name, value, inner, bounds)
    if origin is Literal:
        return _one_of_names(name, value, inner)
    if kind in _PLAIN:
        return _PLAIN[kind][0](name, value, bounds)
    if origin is tuple and inner[-1:] == (Ellipsis,):
        return _several(name, value, inner[0], bounds)
    if origin is tuple:  # a tuple of fixed length, whose entries the caller checks
        return value
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return _mapping(name, value, inner, bounds)
    if isinstance(origin, type) and issubclass(origin, Iterable):
        return _iterable(name, value, inner[0], bounds)
    asked = origin or kind
    if _is_class(asked) and asked not in (object, Any) and not _of_arrays(asked) and not isinstance(value, asked):
        raise wrong(name, value, _words(kind, bounds))
    return value


_PLAIN: dict[Any, tuple[Callable[[str, Any, Bounds], Any], str]] = {
    bool: (lambda name, value, bounds: flag(name, value), "True or False"),
    int: (whole, "a whole number"),
    float: (number, "a finite number"),
    str: (lambda name, value, bounds: text(name, value), "a string"),
    Path: (lambda name, value, bounds: path(name, value), "a path"),
}
"""Annotation of a single kind -> its check, and the words for it."""


def _is_class(kind: Any) -> bool:
    """Whether `isinstance` accepts it: in Python 3.10 list[int] is a type too, but not one that `isinstance` accepts."""
    return isinstance(kind, type) and typing.get_origin(kind) is None


def _one_of_kinds(name: str, value: Any, kinds: tuple[Any, ...], bounds: Bounds) -> Any:
    if value is None and type(None) in kinds:
        return None
    kinds = tuple(kind for kind in kinds if kind is not type(None))
    if Path in kinds and isinstance(value, str | Path):
        return path(name, value)
    last: Exception | None = None
    for kind in kinds:
        try:
            return conform(name, value, kind, bounds)
        except WrongKind as error:
            last = error
        except ValueError as error:  # the right kind, but an invalid number or name
            if typing.get_origin(kind) is Literal and type(value) not in map(type, typing.get_args(kind)):
                last = error
                continue
            if not any(isinstance(value, other) for other in kinds if _is_class(other) and other is not kind):
                raise
            last = error
    if len(kinds) == 1 and last is not None:
        raise last
    words = list(dict.fromkeys(_words(kind, bounds) for kind in kinds))
    raise wrong(name, value, " or ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else words[0])


def _one_of_names(name: str, value: Any, valid: tuple[Any, ...]) -> Any:
    if not any(value is one or (type(value) is type(one) and value == one) for one in valid):
        raise unknown(name, value, map(str, valid))
    return value


def _several(name: str, values: Any, kind: Any, bounds: Bounds) -> tuple[Any, ...]:
    if isinstance(values, str | bytes | Mapping) or not (hasattr(values, "__len__") and hasattr(values, "__getitem__")):
        raise wrong(name, values, f"a tuple of {_plural(kind, bounds)}")
    try:
        return tuple(conform(name, value, kind, bounds) for value in values)
    except ValueError as error:
        if typing.get_origin(kind) is Literal or isinstance(error, KeyError):
            raise
        raise type(error)(f"{name}={shown(values)}: give a tuple of {_plural(kind, bounds)}") from None


def _mapping(name: str, value: Any, kinds: tuple[Any, ...], bounds: Bounds) -> Any:
    if not isinstance(value, Mapping):
        raise wrong(name, value, f"a mapping from {_words(kinds[0], ANY)} to {_words(kinds[1], bounds)}")
    conformed = {key: conform(f"{name}[{key!r}]", one, kinds[1], bounds) for key, one in value.items()}
    for key in value:
        conform(f"a key of {name}", key, kinds[0], ANY)
    same = all(one is value[key] for key, one in conformed.items())
    return value if same or type(value) is not dict else conformed


def _iterable(name: str, values: Any, kind: Any, bounds: Bounds) -> Any:
    if isinstance(values, str | bytes) or not isinstance(values, Iterable):
        raise wrong(name, values, f"several {_plural(kind, bounds)}, in a list")
    if isinstance(values, list | tuple):
        for value in values:
            try:
                conform(name, value, kind, bounds)
            except WrongKind:
                raise wrong(name, values, f"several {_plural(kind, bounds)}, in a list") from None
    return values


def _of_arrays(kind: type) -> bool:
    """Whether a class is an array annotation of jaxtyping, which is not checked here."""
    return type(kind).__module__.startswith("jaxtyping") or kind.__module__.startswith("jaxtyping")


def _words(kind: Any, bounds: Bounds) -> str:
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if kind in (int, float):
        return bounds.words(_PLAIN[kind][1])
    if kind in _PLAIN:
        return _PLAIN[kind][1]
    if origin is Literal:
        return " or ".join(map(repr, inner))
    if origin is Callable or kind is Callable:
        return "a function"
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return "a mapping"
    if inner and isinstance(origin, type) and issubclass(origin, Iterable):
        return f"several {_plural(inner[0], bounds)}"
    return _article(getattr(kind, "__name__", str(kind)))


def _article(name: str) -> str:
    return f"a{'n' * (name[:1] in 'AEIO')} {name}"


def _plural(kind: Any, bounds: Bounds) -> str:
    words = {int: "whole numbers", float: "numbers", str: "strings"}
    if kind in (int, float):
        return bounds.words(words[kind])
    if typing.get_origin(kind) is Literal:
        return _words(kind, bounds)
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return " or ".join(_plural(one, bounds) for one in typing.get_args(kind))
    return words.get(kind) or f"{getattr(kind, '__name__', kind)} objects"


def check_fields(config: Any, /, **bounds: Bounds) -> None:
    """Check every field of a dataclass by its annotation, in its `__post_init__`; numpy's numbers, lists and `~` are converted.

    Args:
        config: the dataclass, frozen or not.
        bounds: bounds of fields whose numbers have others than in `BOUNDS`.
    """
    kinds = _kinds(type(config))
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name == "model" and isinstance(value, Path):
            value = str(value)
        conformed = conform(field.name, value, kinds.get(field.name, Any), bounds.get(field.name))
        if conformed is not getattr(config, field.name):
            object.__setattr__(config, field.name, conformed)


def checked(*, stopped: str = "", **bounds: Bounds) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Check the arguments of a public function, run it under `torch_defaults`, and report on Ctrl-C what is kept and how to resume.

    Args:
        stopped: what is kept after an interrupt, if it does not follow from the argument `out`.
        bounds: bounds of arguments whose numbers have others than in `BOUNDS`.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            try:
                given = signature.bind(*args, **kwargs)
            except TypeError:
                return function(*args, **kwargs)  # Python's own error names the missing or surplus argument
            _conform_all(function, signature, given.arguments, bounds)
            try:
                with torch_defaults():
                    return function(*given.args, **given.kwargs)
            except KeyboardInterrupt as stop:
                _note(stop, function.__name__, given.arguments, stopped)
                raise

        return call

    return decorate


def _conform_all(
    function: Callable[..., Any], signature: inspect.Signature, arguments: dict[str, Any], bounds: Mapping[str, Bounds]
) -> None:
    kinds = _kinds(function)
    for name, value in arguments.items():
        parameter = signature.parameters[name]
        if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL) or value is parameter.default:
            continue
        kind = kinds.get(name, Any)
        if name == "model" and kind is Any and parameter.default is parameter.empty and arguments.get("workers") is None:
            _check_model(value, arguments)
        arguments[name] = conform(name, value, kind, bounds.get(name))


def _check_model(model: Any, arguments: Mapping[str, Any]) -> None:
    """Raise if the value given as a hooked model has none of a model's attributes."""
    if any(hasattr(model, part) for part in ("cfg", "blocks", "original_model")):
        return
    swapped = [name for name, value in arguments.items() if hasattr(value, "cfg")]
    hint = f" (and {swapped[0]} is a model: the two are swapped)" if swapped else ""
    raise WrongKind(f"model is a {type(model).__name__}; give what sepcap.load_model returns{hint}")


@functools.cache
def _kinds(owner: Any) -> dict[str, Any]:
    """Annotations of a function or class; if one uses a name that is not imported, annotations in quotes count as Any."""
    try:
        return typing.get_type_hints(owner, include_extras=True)
    except NameError:
        owners = reversed(owner.__mro__) if isinstance(owner, type) else [owner]
        raw = {name: kind for one in owners for name, kind in getattr(one, "__annotations__", {}).items()}
        return {name: Any if isinstance(kind, str) else kind for name, kind in raw.items()}


def _note(stop: KeyboardInterrupt, name: str, arguments: Mapping[str, Any], stopped: str) -> None:
    """Add a note to an interrupt on what is kept; the outermost function's note replaces the others. Python 3.10 has no notes."""
    if stop.args or not hasattr(stop, "add_note"):
        return
    out = arguments.get("out")
    if not stopped and out is not None:
        stopped = f"finished work is kept in {out}; the same call resumes from there"
    stop.__dict__["__notes__"] = [f"sepcap.{name} was stopped: {stopped or 'nothing is kept; call it again'}"]
