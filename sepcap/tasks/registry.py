"""The tasks that have a name: a table of rows, not code."""

from dataclasses import dataclass

from sepcap.tasks.local import Kind


@dataclass(frozen=True)
class Row:
    """One named task: the kinds of local text it mixes in equal numbers of tokens, and what they are."""

    kinds: tuple[Kind, ...]
    description: str


TASKS: dict[str, Row] = {
    "local-prose": Row(("prose",), "docstrings, package descriptions and the language reference of this Python installation"),
    "local-python": Row(("python",), "Python sources of the standard library and installed packages, without docstrings and comments"),
    "local-cpp": Row(("cpp",), "the C++ headers that torch ships, without comments"),
    "local-code": Row(("python", "cpp"), "Python and C++ in equal numbers of tokens"),
}


def names() -> list[str]:
    """Names of all tasks."""
    return list(TASKS)
