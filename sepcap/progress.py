"""Progress bars: widgets in notebooks that support them, text in other notebooks and in terminals, nothing elsewhere."""

import contextlib
import contextvars
import logging
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from tqdm import TqdmWarning
from tqdm import tqdm as text_bar

with warnings.catch_warnings():
    # without ipywidgets a notebook gets text; tqdm would advise everyone to install them
    warnings.simplefilter("ignore", TqdmWarning)
    from tqdm.auto import tqdm

log = logging.getLogger(__name__)

_silent = contextvars.ContextVar("silent", default=False)


@contextlib.contextmanager
def silent(on: bool = True) -> Iterator[None]:
    """A context in which no function of the package shows a progress bar."""
    before = _silent.set(on or _silent.get())
    try:
        yield
    finally:
        _silent.reset(before)


@contextlib.contextmanager
def reporting(progress: bool | Callable[[str], Any]) -> Iterator[Callable[[str], Any]]:
    """A context that yields the function to announce with, given a `progress` argument; with False it also has no progress bars."""
    with silent(progress is False):
        yield {True: tell, False: _nothing}[progress] if isinstance(progress, bool) else progress


def _nothing(text: str) -> None:
    """Announce nothing."""


def in_notebook() -> bool:
    """Whether this runs in a Jupyter kernel, whose output is not a terminal but is shown to the user."""
    return "ipykernel.zmqshell" in sys.modules


def watched() -> bool:
    """Whether a bar would be visible: in a terminal or a notebook."""
    return in_notebook() or bool(getattr(sys.stderr, "isatty", lambda: False)())


def progress(
    iterable: Iterable[Any] | None = None, *, quiet: bool = False, delay: float = 2, leave: bool | None = False, **how: Any
) -> Any:
    """A tqdm bar: work done, total, and time left. It appears after two seconds, so that short work shows none.

    Args:
        iterable: what is iterated over; without it, pass `total` and call `.update(n)`.
        quiet: no bar, because a caller shows one.
        delay: seconds before it appears.
        leave: whether it stays at the end; None: only if no other bar is above it.
        how: other arguments of tqdm: total, desc, unit, initial.
    """
    return tqdm(iterable, delay=delay, leave=leave, disable=quiet or _silent.get() or not watched(), **how)


def tell(text: str, log: logging.Logger = log) -> None:
    """Announce the next work and its cost: in the log, and wherever a bar would be visible."""
    log.info(text)
    if watched():
        text_bar.write(text, file=sys.stderr)
