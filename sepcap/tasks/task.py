"""Tasks: what a model is measured on, from a name, a path, a Dataset or a list of strings.

A task is `datasets` underneath. Its documents are cut once and for all into a part for collecting
statistics and a part for evaluation, which never share a text (METHODS 9).
"""

import contextlib
import difflib
import functools
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

from sepcap.checks import checked
from sepcap.errors import unknown
from sepcap.tasks import local
from sepcap.tasks.files import KINDS, PACKED, READ, checked_text, choose_column, name_of, read_files
from sepcap.tasks.given import dataset_of, plain, saved_dataset
from sepcap.tasks.quiet import quietly

Split = Literal["train", "collect", "evaluate"]


@runtime_checkable
class Source(Protocol):
    """One stream of documents with a split."""

    @property
    def fingerprint(self) -> str:
        """Changes when the documents do."""
        ...

    def documents(self, split: Split) -> Any:
        """`datasets.Dataset` with a column `text`, in the order in which it is to be used."""
        ...

    def indices(self, split: Split, n: int) -> list[int] | str:
        """Which rows of the underlying data the first `n` documents of the split are."""
        ...


@dataclass(frozen=True)
class Task:
    """Named examples with a deterministic collect/evaluate split.

    Attributes:
        name: what tables and figures call it.
        sources: one stream of documents, or several that are mixed in equal numbers of tokens.
        content: "text", or "images" with a label each.
        special_tokens: whether what is spelled like a special token in a text becomes one.
    """

    name: str
    sources: tuple[Source, ...]
    content: Literal["text", "images"] = "text"
    special_tokens: bool = False

    @property
    def fingerprint(self) -> str:
        """Hash of the documents: two tasks with the same fingerprint are the same data."""
        return "-".join([*(source.fingerprint for source in self.sources), *(["special"] if self.special_tokens else [])])


@dataclass(frozen=True)
class LocalSource:
    """Text and code of the running Python installation (`sepcap.tasks.local`)."""

    kind: local.Kind

    @property
    def fingerprint(self) -> str:
        """Hash of names and sizes of the files."""
        return self._files

    @functools.cached_property
    def _files(self) -> str:  # walking through all folders takes half a second, so once per task
        return f"local-{self.kind}-{local.fingerprint(local.find_files(self.kind))}"

    def documents(self, split: Split) -> Any:
        """Cleaned documents in path-hash order; read once, then taken from the cache of `datasets`."""
        import datasets

        # a tuple: `datasets` takes every element of a list for a shard, and would read all once for each
        earlier = tuple(text for part in local.before(split) for text in self.documents(part)["text"])
        return quietly(
            datasets.Dataset.from_generator,
            local.documents,
            gen_kwargs={"kind": self.kind, "split": split, "earlier": earlier},
            features=datasets.Features({"text": datasets.Value("string"), "name": datasets.Value("string")}),
            fingerprint=hashlib.sha256(f"{local.VERSION}{self.fingerprint}{split}".encode()).hexdigest()[:16],
        )

    def indices(self, split: Split, n: int) -> list[int] | str:
        """The first n in path-hash order."""
        return f"0:{n}"


PARTS: tuple[Split, Split] = ("collect", "evaluate")


class DataSource:
    """A user's own texts: distinct documents in the order of a hash of their content, whose parity decides about the part.

    The same text is thus in the same part of every task; only where that would leave one part with less than a
    third of the documents (there are but a few), they are dealt out in turn.

    Texts that differ only in white space are one document. A single document is cut in two near its middle, at a line
    break if there is one in the middle half, else at a space.
    """

    def __init__(self, dataset: Any, column: str | None = None, called: str = "the dataset") -> None:
        import datasets

        dataset = plain(dataset)
        column = text_column(dataset, column)
        texts = dataset[column]
        distinct: dict[str, tuple[bytes, int]] = {}
        for i, text in enumerate(texts):
            words = words_digest(checked_text(text, f"row {i}", column))
            if words is not None:
                key = words.hex()
                # of variants in white space the one with the smallest hash stays, so that their order does not matter
                distinct[key] = min(distinct.get(key, (b"\xff" * 33, i)), (_digest(text), i))
        if not distinct:
            raise ValueError(f"{called} has no text: {len(dataset)} rows, none with anything in column {column!r}")
        ranked = sorted(distinct.items())
        self.fingerprint = hashlib.sha256("".join(key for key, _ in ranked).encode()).hexdigest()[:16]
        if len(ranked) == 1:
            i = ranked[0][1][1]
            halves = _halves(texts[i])
            self._rows = {"collect": [i], "evaluate": [i]}
            self._parts = {s: datasets.Dataset.from_dict({"text": [t]}) for s, t in zip(self._rows, halves, strict=True)}
            return
        # by the hash of the text alone, so that a text that is in two tasks is in the same part of both
        self._rows = {split: [i for key, (_, i) in ranked if int(key, 16) % 2 == parity] for parity, split in enumerate(PARTS)}
        if min(map(len, self._rows.values())) < max(2, len(ranked) / 3):
            # of a few texts the hashes can put nearly all on one side: deal them out in turn
            rows = [i for _, (_, i) in ranked]
            self._rows = {"collect": rows[0::2], "evaluate": rows[1::2]}
        texts_only = dataset.select_columns([column])
        if column != "text":
            texts_only = texts_only.rename_column(column, "text")
        self._parts = {split: texts_only.select(chosen) for split, chosen in self._rows.items()}

    def documents(self, split: Split) -> Any:
        """The documents dealt to one part."""
        if split not in self._parts:
            raise unknown("split", split, self._parts, "Only the local tasks have a train split.")
        return self._parts[split]

    def indices(self, split: Split, n: int) -> list[int] | str:
        """Row numbers in the user's dataset."""
        return self._rows[split][:n]


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def words_digest(text: str) -> bytes | None:
    """Hash of the words of a text with one space between any two, in pieces so that a long text takes little memory; None for no word.

    >>> words_digest(" two  words\\n") == hashlib.sha256(b"two words").digest()
    True
    """
    digest, empty, apart = hashlib.sha256(), True, False
    for start in range(0, len(text), 2**20):
        piece = text[start : start + 2**20]
        if words := piece.split():
            if not empty and (apart or piece[0].isspace()):
                digest.update(b" ")
            digest.update(" ".join(words).encode())
            empty = False
        apart = piece[-1].isspace()
    return None if empty else digest.digest()


def _halves(text: str) -> tuple[str, str]:
    middle, quarter = len(text) // 2, len(text) // 4
    for separator in ("\n", " "):
        breaks = [text.rfind(separator, quarter, middle), text.find(separator, middle, middle + quarter)]
        if max(breaks) >= 0:
            at = min((b for b in breaks if b >= 0), key=lambda b: abs(b - middle))
            return text[:at], text[at + 1 :]
    return text[:middle], text[middle:]


def text_column(dataset: Any, column: str | None) -> str:
    """The column that holds the texts; an error lists the columns there are."""
    names = list(dataset.column_names)
    strings = [n for n in names if getattr(dataset.features[n], "dtype", "") in ("string", "large_string")]
    images = [n for n in names if type(dataset.features[n]).__name__ == "Image"]
    if column is None and "text" not in names and len(strings) != 1 and images:
        raise ValueError(
            f"column {images[0]!r} holds images: a Dataset of images has them in a column 'image' and their classes, as whole numbers, "
            f"in a column 'label' (dataset.rename_columns({{{images[0]!r}: 'image', …: 'label'}})); the columns are {names}"
        )
    return choose_column(names, strings, column)


@checked()
def load_task(task: Any, *, column: str | None = None, name: str | None = None, special_tokens: bool = False) -> Task:
    """A `Task` from whatever names one.

    Args:
        task: the name of a task, offline or of the hub (`sepcap.tasks.registry.table()`); the path of a .txt, .jsonl, .json, .csv,
            .parquet or .arrow file (of lines also packed: .jsonl.gz, .jsonl.zst), of a folder of one kind of them, or of a folder that
            `datasets` saved; a `datasets.Dataset`; a list, array or column of strings; or a Task. Of a hub task nothing is read
            before its documents are needed.
        column: column with the texts, where it is not "text".
        name: what tables and figures shall call it.
        special_tokens: whether what is spelled like a special token in a text, such as `<s>` in a page of HTML, becomes that token.
            By default it is text like any other.

    Raises:
        ValueError: an unknown name (nearest names suggested), no text, a column that is not there, or a file that cannot be read.
        TypeError: something else than a task, or a row whose text is none.

    Example:
        >>> load_task(["One text.", "Another."], name="two").name
        'two'
    """
    from sepcap.tasks.registry import TASKS

    if isinstance(task, Task):
        return task
    if isinstance(task, str) and task in TASKS:
        return Task(name or task, TASKS[task].sources(), TASKS[task].content, special_tokens)
    if isinstance(task, str | os.PathLike):
        path = _path_of(task)
        data = saved_dataset(path) if path.is_dir() else None
        source = _source(data, column) if data is not None else DataSource(read_files(path, column), None, str(path))
        return Task(name or name_of(path), (source,), _content(source), special_tokens)
    data = dataset_of(task)
    source = _source(data, column)
    # named after its content: the fingerprint that `datasets` gives can be another one in the next process
    kind = "images" if _content(source) == "images" else "dataset" if data is task else "texts"
    return Task(name or f"{kind}-{source.fingerprint[:8]}", (source,), _content(source), special_tokens)


def _source(data: Any, column: str | None) -> Source:
    from sepcap.tasks.images import ImageSource, has_images

    return ImageSource(plain(data)) if has_images(data) else DataSource(data, column)


def _content(source: Source) -> Literal["text", "images"]:
    return "text" if isinstance(source, DataSource) else "images"


def _path_of(task: Any) -> Path:
    """The path that a task is named by; a name that is not there is an error with the nearest known one."""
    from sepcap.tasks.registry import TASKS

    path = Path(task)
    if _exists(path):
        return path
    with contextlib.suppress(RuntimeError):  # ~nobody: there is no such home
        if _exists(path.expanduser()):
            return path.expanduser()
    if not isinstance(task, str) or (len(task) <= 200 and (len(path.parts) > 1 or path.suffix.lower() in {*KINDS, *PACKED})):
        raise FileNotFoundError(f"task={str(task)!r}: there is no such file or folder")
    hint = f"`sepcap tasks` lists all. Or the path of a {READ} file or folder, which must exist. Texts themselves go in a list."
    shown = task if len(task) <= 100 else f"{task[:100]}…"
    likely = {*difflib.get_close_matches(shown, TASKS), *(known for known in TASKS if known.startswith("local-"))}
    raise unknown("task", shown, likely, hint)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a name too long for the file system, or with a NUL, is no file
        return False
