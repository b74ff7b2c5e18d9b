"""Tasks: what a model is measured on, from a name, a path, a Dataset or a list of strings.

A task is `datasets` underneath. Its documents are cut once and for all into a part for collecting
statistics and a part for evaluation, which never share a text (METHODS 9).
"""

import difflib
import functools
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

from sepcap.checks import checked
from sepcap.errors import unknown
from sepcap.tasks import local

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
    """

    name: str
    sources: tuple[Source, ...]
    content: Literal["text", "images"] = "text"

    @property
    def fingerprint(self) -> str:
        """Hash of the documents: two tasks with the same fingerprint are the same data."""
        return "-".join(source.fingerprint for source in self.sources)


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

        return quietly(
            datasets.Dataset.from_generator,
            local.documents,
            gen_kwargs={"kind": self.kind, "split": split},
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

    def __init__(self, dataset: Any, column: str | None = None) -> None:
        import datasets

        column = text_column(dataset, column)
        texts = dataset[column]
        distinct: dict[str, tuple[bytes, int]] = {}
        for i, text in enumerate(texts):
            if not isinstance(text, str):
                raise TypeError(f"row {i} of column {column!r} is a {type(text).__name__}, not a text")
            words = text.split()
            if words:
                key = _digest(" ".join(words)).hex()
                # of variants in white space the one with the smallest hash stays, so that their order does not matter
                distinct[key] = min(distinct.get(key, (b"\xff" * 33, i)), (_digest(text), i))
        if not distinct:
            raise ValueError(f"the dataset has no text: {len(dataset)} rows, none with anything in column {column!r}")
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
    if column is not None:
        if column not in names:
            raise unknown("column", column, names)
        return column
    if "text" in names:
        return "text"
    strings = [n for n in names if getattr(dataset.features[n], "dtype", "") in ("string", "large_string")]
    if len(strings) == 1:
        return strings[0]
    images = [n for n in names if type(dataset.features[n]).__name__ == "Image"]
    if images:
        raise ValueError(
            f"column {images[0]!r} holds images: a Dataset of images has them in a column 'image' and their classes, as whole numbers, "
            f"in a column 'label' (dataset.rename_columns({{{images[0]!r}: 'image', …: 'label'}})); the columns are {names}"
        )
    raise ValueError(f"no column named 'text'; the columns are {names}. Say which one holds the texts: load_task(data, column=...)")


@checked()
def load_task(task: Any, *, column: str | None = None, name: str | None = None) -> Task:
    """A `Task` from whatever names one.

    Args:
        task: the name of a task, offline or of the hub (`sepcap.tasks.registry.table()`), the path of a .txt, .jsonl or
            .parquet file or of a folder of such files, a `datasets.Dataset`, a list of strings, or a Task. Of a hub task
            nothing is read before its documents are needed.
        column: column with the texts, where it is not "text".
        name: what tables and figures shall call it.

    Raises:
        ValueError: an unknown name (nearest names suggested), no text, or a column that is not there.

    Example:
        >>> load_task(["One text.", "Another."], name="two").name
        'two'
    """
    import datasets

    from sepcap.tasks.registry import TASKS

    if isinstance(task, Task):
        return task
    if isinstance(task, str) and task in TASKS:
        return Task(name or task, TASKS[task].sources(), TASKS[task].content)
    if isinstance(task, str | Path):
        path = Path(task)
        if not _exists(path):
            looks_like_one = len(str(task)) <= 200 and (len(path.parts) > 1 or path.suffix in (".txt", ".jsonl", ".parquet"))
            if isinstance(task, Path) or looks_like_one:
                raise FileNotFoundError(f"task={str(task)!r}: there is no such file or folder")
            hint = (
                "`sepcap tasks` lists all. Or the path of a .txt, .jsonl or .parquet file or folder, which must exist. "
                "Texts themselves go in a list."
            )
            shown = str(task) if len(str(task)) <= 100 else f"{str(task)[:100]}…"
            likely = {*difflib.get_close_matches(shown, TASKS), *(known for known in TASKS if known.startswith("local-"))}
            raise unknown("task", shown, likely, hint)
        return Task(name or path.stem, (DataSource(read_files(path), column),))
    from sepcap.tasks.images import ImageSource, has_images

    if isinstance(task, datasets.Dataset) and has_images(task):
        images = ImageSource(task)
        return Task(name or f"images-{images.fingerprint[:8]}", (images,), "images")
    if isinstance(task, datasets.Dataset):
        source = DataSource(task, column)
        # named after its content: the fingerprint that `datasets` gives can be another one in the next process
        return Task(name or f"dataset-{source.fingerprint[:8]}", (source,))
    if isinstance(task, datasets.DatasetDict):
        raise TypeError(f"task is a DatasetDict; choose one of its splits: {', '.join(f'data[{s!r}]' for s in task)}")
    if isinstance(task, list | tuple):
        if not all(isinstance(text, str) for text in task):
            kinds = sorted({type(text).__name__ for text in task})
            raise TypeError(f"task is a list of {', '.join(kinds)}; a list must hold strings only")
        source = DataSource(datasets.Dataset.from_dict({"text": list(task)}))
        return Task(name or f"texts-{source.fingerprint[:8]}", (source,))
    raise TypeError(f"task is a {type(task).__name__}; give a name, a path, a datasets.Dataset or a list of strings")


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name too long for the file system is no file
        return False


READERS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}


def read_files(path: Path) -> Any:
    """All texts of a file or of a folder of files (each .txt file is one document)."""
    import datasets
    from datasets.exceptions import DatasetGenerationError

    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.suffix.lower() in READERS and p.is_file())
    kinds = {READERS.get(p.suffix.lower()) for p in files}
    if not files or None in kinds:
        raise ValueError(f"{path} is no .txt, .jsonl or .parquet file and holds none")
    if len(kinds) > 1:
        raise ValueError(f"{path} mixes {sorted(map(str, kinds))} files; point at one kind of them")
    kind = kinds.pop()
    options = {"sample_by": "document"} if kind == "text" else {}
    try:
        return quietly(datasets.load_dataset, kind, data_files=[str(p) for p in files], split="train", **options)
    except (DatasetGenerationError, ValueError) as error:  # what pyarrow raises is a ValueError
        raise ValueError(f"{path} cannot be read as {kind} files: {error.__cause__ or error}") from error


def quietly(function: Any, *args: Any, **kwargs: Any) -> Any:
    """Call a function of `datasets` without its own progress bars, which tell a user of sepcap nothing."""
    from datasets.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled

    shown = is_progress_bar_enabled()
    disable_progress_bar()
    try:
        return function(*args, **kwargs)
    finally:
        if shown:
            enable_progress_bar()
