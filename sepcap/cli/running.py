"""Running a command: errors and interruptions are reported in one line, without a traceback unless --debug is given."""

import contextlib
import io
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

EXPECTED = (ValueError, TypeError, OSError, ImportError, RuntimeError, FloatingPointError, IndexError, MemoryError)
"""Errors raised for wrong input, a full disk or a missing package; any other error is a bug in sepcap."""


def parsed(parser: Callable[[], Any], asked: str, words: Sequence[str] = ()) -> Any:
    """The result of a tyro parser for the words after `asked`; errors are reported in one line, without a box.

    Raises:
        SystemExit: 2 for wrong words, 0 after --help.
    """
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return parser()
    except SystemExit as end:
        if end.code:
            print(f"sepcap: {unboxed(said.getvalue())}.{_dashed(words)} For help: {asked} --help", file=sys.stderr)
        raise


def _dashed(words: Sequence[str]) -> str:
    """How to give a value that begins with a dash, if one was taken for an option; else empty."""
    option = ""
    for word in words:
        if word.startswith("--"):
            option = word.partition("=")[0]
        elif option and re.match(r"-[^-]", word):
            return f" A value that begins with a dash is given as {option}={word}, or a file as ./{word}."
    return ""


def unboxed(text: str) -> str:
    """The error in a box of tyro as one line, without the help text that follows.

    >>> unboxed("╭─ Value error ─╮\\n│ Error parsing --tokens: give │\\n│ a number │\\n│ ─── │\\n│ Argument helptext: │\\n╰──╯")
    '--tokens: give a number'
    """
    inside = "\n".join(line.strip("│| ") for line in text.splitlines() if not line.startswith(("╭", "╰", "+")))
    first, *others = [" ".join(section.split()) for section in re.split(r"^[─-]+$", inside, flags=re.M)]
    if not text.startswith("╭") and others:  # on a terminal without boxes, the title is a separate section
        first, *others = others
    said = re.sub(r"^Error parsing ([A-Z]\w*: )?", "", first).rstrip(".")
    said = re.sub(r"invalid literal for int\(\) with base 10: (.*)", r"\1 is not a whole number", said)
    said = re.sub(r"could not convert string to float: (.*)", r"\1 is not a number", said)
    said = re.sub(r"no type matching .*\{row\}.*?: *('[^']*'|\S+).*", r"give a whole number, row or None", said)
    near = [found[1] for other in others if (found := re.match(r"Perhaps you meant: (--[\w-]+)", other))]
    choices = [other for other in others if other.startswith("Available")]
    return ". ".join([said, *(f"Perhaps you meant {name}" for name in near), *choices])


def left_by(command: Any, error: BaseException, by: str) -> str:
    """What was stopped, what is kept, and how to continue."""
    study = command if isinstance(getattr(command, "study", ""), str) else command.study
    what = "" if command is None else f"{type(study).__name__} was "
    if isinstance(error, KeyboardInterrupt) and str(error):
        return f"{what}stopped by {by}: {error}"
    folder = getattr(study, "out", None) or getattr(study, "comparison", None)
    if getattr(study, "RESUMES", False) and folder is not None:
        return f"{what}stopped by {by}: finished parts are kept in {folder}; the same command resumes from there"
    return f"{what}stopped by {by}: nothing is kept; the same command starts over"


def versions() -> str:
    """Versions of sepcap and of the packages that its results depend on, without importing them."""
    from importlib.metadata import PackageNotFoundError, version

    import sepcap

    said = [f"sepcap {sepcap.__version__}", f"Python {sys.version.split()[0]}"]
    for package in ("torch", "transformers", "transformer-lens"):
        try:
            said.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            said.append(f"{package} is not installed")
    return "\n".join(said)


def ended(error: BaseException, command: Any, stopped: Sequence[Any], *, debug: bool) -> NoReturn:
    """Print in one line what ended a command, and exit with a status: 2 for an expected error, 1 for a bug, 128 + n for a signal."""
    if debug:
        traceback.print_exc()
    if isinstance(error, BrokenPipeError):  # the reader of the output has closed the pipe
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + 13)
    if stopped or isinstance(error, KeyboardInterrupt):
        by, number = (stopped[-1].by, stopped[-1].number) if stopped else ("Ctrl-C", 2)
        print(f"\nsepcap: {left_by(command, error, by)}", file=sys.stderr)
        sys.exit(128 + number)
    said = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, EXPECTED):
        print(f"sepcap: {said}", file=sys.stderr)
        sys.exit(2)
    print(f"sepcap: unexpected {type(error).__name__}: {said}. With --debug the same command shows the traceback", file=sys.stderr)
    sys.exit(1)
