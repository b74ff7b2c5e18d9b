"""Error messages: the argument, the value given, the valid values, and the nearest valid name."""

import difflib
import os
import sys
import traceback
import warnings
from collections.abc import Iterable
from pathlib import Path

SHOWN = 20
"""Most valid names listed in an error; a longer list would bury the message."""


class UnknownName(ValueError, KeyError):
    """An unknown name. It is also a KeyError, because `in` and `get` of the mappings that raise it rely on that."""

    __str__ = ValueError.__str__  # a KeyError shows its text in quotes


def unknown(argument: str, got: object, valid: Iterable[str], hint: str = "") -> UnknownName:
    """A `ValueError` for an unknown name, with the nearest valid names.

    >>> str(unknown("site", "mpl", ["mlp", "attn_value"]))
    "site='mpl' is not known. Did you mean 'mlp'? Valid: 'attn_value', 'mlp'."
    """
    names = sorted(valid)
    near = difflib.get_close_matches(str(got), names, n=2, cutoff=0.5)
    meant = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
    listed = ", ".join(map(repr, names[:SHOWN])) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
    return UnknownName(f"{argument}={got!r} is not known.{meant} Valid: {listed}." + (f" {hint}" if hint else ""))


def missing_extra(package: str, extra: str, purpose: str) -> ImportError:
    """An `ImportError` that names the extra with which to install an optional package."""
    return ImportError(f"{purpose} needs the package {package!r}. Install it with: pip install 'sepcap[{extra}]'")


class CorruptFile(RuntimeError):
    """A file of a run, of statistics or of a neuron set that cannot be read."""


def warn(message: str) -> None:
    """Warn at the line of the user's code that called the package, however deep in the package the cause is."""
    frames = [frame for frame, _ in traceback.walk_stack(sys._getframe())]
    home = str(Path(__file__).parent) + os.sep
    last = max(i for i, frame in enumerate(frames) if frame.f_code.co_filename.startswith(home))
    user = next((i for i in range(last + 1, len(frames)) if not _is_wrapper(frames[i].f_code.co_filename)), last)
    warnings.warn(message, stacklevel=user + 1)


def _is_wrapper(file: str) -> bool:
    """Whether this file contains wrappers that decorators put around the package's functions."""
    return file.startswith("<@beartype") or "/jaxtyping/" in file or file.endswith("contextlib.py")
