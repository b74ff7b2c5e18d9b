"""Loads a task from a name, a path, a Dataset or a list of strings."""

import contextlib
import difflib
import os
from pathlib import Path
from typing import Any, Literal

from sepcap.checks import checked
from sepcap.errors import unknown
from sepcap.tasks.images import DigitsSource, ImageSource, has_images
from sepcap.tasks.registry import TASKS, DigitsRow, LocalRow, Row
from sepcap.tasks.sources.files import KINDS, PACKED, READ, name_of, read_files
from sepcap.tasks.sources.given import dataset_of, plain, saved_dataset
from sepcap.tasks.sources.hub import HubSource
from sepcap.tasks.sources.local import LocalSource
from sepcap.tasks.sources.texts import DataSource
from sepcap.tasks.task import Source, Task


@checked()
def load_task(
    task: Any, *, column: str | None = None, name: str | None = None, special_tokens: bool = False, answers_after: str | None = None
) -> Task:
    """Load a `Task` from a name, a path or data.

    Args:
        task: the name of a task, offline or of the hub (`sepcap.tasks.registry.table()`); the path of a .txt, .jsonl, .json, .csv,
            .parquet or .arrow file (all but the last two also packed: .jsonl.gz, .jsonl.zst), of a folder with one kind of them, or
            of a folder saved by `datasets`; a `datasets.Dataset`; a list, array or column of strings; or a Task. The data of a hub
            task is not read before its documents are needed.
        column: column with the texts, if it is not "text".
        name: name in tables and figures.
        special_tokens: whether text spelled like a special token, such as `<s>` in a page of HTML, becomes that token. By default it
            is ordinary text.
        answers_after: for questions with answers, the word between the two, a single token of the model's tokenizer: only the tokens
            after the first one in a document are prediction targets. Statistics are of all tokens. Every document has rows of its own.

    Raises:
        ValueError: an unknown name (nearest names suggested), no text, a column that does not exist, or a file that cannot be read.
        TypeError: anything other than a task, or a row whose text is not a string.

    Example:
        >>> load_task(["One text.", "Another."], name="two").name
        'two'
    """
    if isinstance(task, Task):
        return task
    if isinstance(task, str) and task in TASKS:
        return Task(name or task, _sources(TASKS[task]), TASKS[task].content, special_tokens, answers_after)
    if isinstance(task, str | os.PathLike):
        path = _path_of(task)
        data = saved_dataset(path) if path.is_dir() else None
        source = _source(data, column) if data is not None else DataSource(read_files(path, column), None, str(path))
        return Task(name or name_of(path), (source,), _content(source), special_tokens, answers_after)
    data = dataset_of(task)
    source = _source(data, column)
    # named after its content: the fingerprint in `datasets` can differ in the next process
    kind = "images" if _content(source) == "images" else "dataset" if data is task else "texts"
    return Task(name or f"{kind}-{source.fingerprint[:8]}", (source,), _content(source), special_tokens, answers_after)


def _sources(row: Row) -> tuple[Source, ...]:
    """The sources of a task in the registry."""
    if isinstance(row, LocalRow):
        return tuple(LocalSource(kind) for kind in row.kinds)
    return (DigitsSource(row.digits),) if isinstance(row, DigitsRow) else (HubSource(row),)


def _source(data: Any, column: str | None) -> Source:
    return ImageSource(plain(data)) if has_images(data) else DataSource(data, column)


def _content(source: Source) -> Literal["text", "images"]:
    return "text" if isinstance(source, DataSource) else "images"


def _path_of(task: Any) -> Path:
    """The path of a task; an unknown name is an error that suggests the nearest known one."""
    path = Path(task)
    if _exists(path):
        return path
    with contextlib.suppress(RuntimeError):  # ~unknown: no such home folder
        if _exists(path.expanduser()):
            return path.expanduser()
    if not isinstance(task, str) or (len(task) <= 200 and (len(path.parts) > 1 or path.suffix.lower() in {*KINDS, *PACKED})):
        raise FileNotFoundError(f"task={str(task)!r}: there is no such file or folder")
    hint = f"`sepcap tasks` lists all names. A path must be that of an existing {READ} file or folder. Give texts themselves as a list."
    shown = task if len(task) <= 100 else f"{task[:100]}…"
    likely = {*difflib.get_close_matches(shown, TASKS), *(known for known in TASKS if known.startswith("local-"))}
    raise unknown("task", shown, likely, hint)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a name too long for the file system, or with a NUL, is not a file
        return False
