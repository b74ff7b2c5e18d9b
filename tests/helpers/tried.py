"""A trial deletion on a model with the same parts and the same bits as one that has passed it is not run again.

It takes four to six passes, at the first deletion from every copy of a tiny model: more than most tests do otherwise.
"""

import functools
from collections.abc import Callable
from typing import Any

from shared_models import HOOKS

from sepcap.interventions import trial
from sepcap.models.weights import hash_of

_PASSED: set[tuple[Any, ...]] = set()


def state_of(model: Any) -> tuple[Any, ...]:
    """All that the outcome of a trial follows from: classes of modules, what stands in each, their hooks, and every weight."""
    parts = tuple(
        (name, type(module), *vars(module), *(len(getattr(module, kind)) for kind in HOOKS)) for name, module in model.named_modules()
    )
    return parts, hash_of([*model.named_parameters(), *model.named_buffers()])


def once(try_deletion: Callable[..., None]) -> Callable[..., None]:
    """The trial, unless it has passed on a model like this; one that fails is run again each time."""

    @functools.wraps(try_deletion)
    def tried(population: Any, offset: bool, what: str) -> None:
        key = (population.site.name, offset, state_of(population.model))
        if key not in _PASSED:
            try_deletion(population, offset, what)
            _PASSED.add(key)

    return tried


def keep_trials() -> None:
    """From now on."""
    trial._try_deletion = once(trial._try_deletion)
