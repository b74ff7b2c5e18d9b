"""The run-time type checker of the tests."""

import functools
from collections import Counter
from collections.abc import Callable
from typing import Any

import jaxtyping
from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
"""An int is welcome where a float is annotated, as it is to users and to pyright."""

_with_shapes: Callable[..., Any] = jaxtyping.jaxtyped

CALLS: Counter[str] = Counter()
"""How often every function with shapes was called in the present test; emptied before each."""

MOST = 8
"""Calls of a function that are checked in a test. Checks of later ones, of the same shapes, took a tenth of the time of all tests."""


def jaxtyped(*args: Any, typechecker: Any) -> Any:
    """`jaxtyping.jaxtyped` for signatures with shapes; the others need no table of dimensions, which takes most of the time of a call.

    A function without shapes inside another one is made again at every call of that one, at 1 ms a check: it is not checked.
    """

    def decorate(function: Any) -> Any:
        annotations = getattr(function, "__annotations__", {}).values()
        if isinstance(function, type):
            return _with_shapes(function, typechecker=typechecker)
        if any("jaxtyping" in repr(annotation) for annotation in annotations):
            return _first_calls(function, _with_shapes(function, typechecker=typechecker))
        return function if "<locals>" in function.__qualname__ else typechecker(function)

    return decorate(*args) if args else decorate


def _first_calls(function: Callable[..., Any], checked: Callable[..., Any]) -> Callable[..., Any]:
    """The checked function in its first calls of a test, and the function itself in all later ones."""
    name = f"{function.__module__}.{function.__qualname__}"

    @functools.wraps(checked)
    def call(*args: Any, **kwargs: Any) -> Any:
        CALLS[name] += 1
        return (checked if CALLS[name] <= MOST else function)(*args, **kwargs)

    return call
