"""The run-time type checker of the tests."""

from collections.abc import Callable
from typing import Any

import jaxtyping
from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
"""An int is welcome where a float is annotated, as it is to users and to pyright."""

_with_shapes: Callable[..., Any] = jaxtyping.jaxtyped


def jaxtyped(*args: Any, typechecker: Any) -> Any:
    """`jaxtyping.jaxtyped` for signatures with shapes; the others need no table of dimensions, which takes most of the time of a call.

    A function without shapes inside another one is made again at every call of that one, at 1 ms a check: it is not checked.
    """

    def decorate(function: Any) -> Any:
        annotations = getattr(function, "__annotations__", {}).values()
        if isinstance(function, type) or any("jaxtyping" in repr(annotation) for annotation in annotations):
            return _with_shapes(function, typechecker=typechecker)
        return function if "<locals>" in function.__qualname__ else typechecker(function)

    return decorate(*args) if args else decorate
