"""Progress bars: widgets in notebooks that can show them, text in notebooks that cannot and in terminals, nothing anywhere else."""

import logging
import sys
import warnings
from collections.abc import Iterable
from typing import Any

from tqdm import TqdmWarning
from tqdm import tqdm as text_bar

with warnings.catch_warnings():
    # without ipywidgets a notebook gets text; tqdm would advise everyone to install them
    warnings.simplefilter("ignore", TqdmWarning)
    from tqdm.auto import tqdm

log = logging.getLogger(__name__)


def in_notebook() -> bool:
    """Whether this runs in a kernel of Jupyter, whose output is no terminal, but where somebody looks."""
    return "ipykernel.zmqshell" in sys.modules


def watched() -> bool:
    """Whether somebody sees a bar: in a terminal or a notebook."""
    return in_notebook() or bool(getattr(sys.stderr, "isatty", lambda: False)())


def progress(
    iterable: Iterable[Any] | None = None, *, quiet: bool = False, delay: float = 2, leave: bool | None = False, **how: Any
) -> Any:
    """A bar of tqdm: what is done, of how much, how long it will take. It appears after two seconds, so that short work shows none.

    Args:
        iterable: what is gone through; without it, `total` says how much there is and `.update(n)` what is done.
        quiet: no bar, because a caller has one.
        delay: seconds before it appears.
        leave: whether it stays when all is done; None: where no other is above it.
        how: what else tqdm takes: total, desc, unit, initial.
    """
    return tqdm(iterable, delay=delay, leave=leave, disable=quiet or not watched(), **how)


def tell(text: str, log: logging.Logger = log) -> None:
    """Say what is about to happen and cost: to the log, and to whoever would see a bar."""
    log.info(text)
    if watched():
        text_bar.write(text, file=sys.stderr)
