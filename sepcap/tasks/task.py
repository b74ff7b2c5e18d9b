"""Tasks: what a model is measured on, from a name, a path, a Dataset or a list of strings.

A task is `datasets` underneath. Its documents are cut once and for all into a part for collecting
statistics and a part for evaluation, which never share a text (METHODS 9).
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

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
    """

    name: str
    sources: tuple[Source, ...]

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


class DataSource:
    """A user's own texts: distinct documents, ranked by a hash of their content, dealt alternately to the two parts.

    A single document is cut in two at the line break nearest to its middle.
    """

    def __init__(self, dataset: Any, column: str | None = None) -> None:
        import datasets

        column = text_column(dataset, column)
        texts = dataset[column]
        first_at: dict[str, int] = {}
        for i, text in enumerate(texts):
            if not isinstance(text, str):
                raise TypeError(f"row {i} of column {column!r} is a {type(text).__name__}, not a text")
            if text.strip():
                first_at.setdefault(hashlib.sha256(text.encode()).hexdigest(), i)
        if not first_at:
            raise ValueError(f"the dataset has no text: {len(dataset)} rows, none with anything in column {column!r}")
        ranked = sorted(first_at.items())
        self.fingerprint = hashlib.sha256("".join(h for h, _ in ranked).encode()).hexdigest()[:16]
        if len(ranked) == 1:
            i = ranked[0][1]
            halves = _halves(texts[i])
            self._rows = {"collect": [i], "evaluate": [i]}
            self._parts = {s: datasets.Dataset.from_dict({"text": [t]}) for s, t in zip(self._rows, halves, strict=True)}
            return
        rows = [i for _, i in ranked]
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


def _halves(text: str) -> tuple[str, str]:
    middle = len(text) // 2
    breaks = [text.rfind("\n", 0, middle), text.find("\n", middle)]
    at = min((b for b in breaks if b > 0), key=lambda b: abs(b - middle), default=middle)
    return text[:at], text[at:]


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
    raise ValueError(f"no column named 'text'; the columns are {names}. Say which one holds the texts: load_task(data, column=...)")


def load_task(task: Any, *, column: str | None = None, name: str | None = None) -> Task:
    """A `Task` from whatever names one.

    Args:
        task: the name of a task (`sepcap.tasks.registry.names()`), the path of a .txt, .jsonl or .parquet file or of a
            folder of such files, a `datasets.Dataset`, a list of strings, or a Task.
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
        return Task(name or task, tuple(LocalSource(kind) for kind in TASKS[task].kinds))
    if isinstance(task, str | Path):
        path = Path(task)
        if not path.exists():
            raise unknown("task", str(task), TASKS, "Or the path of a .txt, .jsonl or .parquet file or folder, which must exist.")
        return Task(name or path.stem, (DataSource(read_files(path), column),))
    if isinstance(task, datasets.Dataset):
        return Task(name or f"dataset-{task._fingerprint[:8]}", (DataSource(task, column),))
    if isinstance(task, list | tuple):
        if not all(isinstance(text, str) for text in task):
            kinds = sorted({type(text).__name__ for text in task})
            raise TypeError(f"task is a list of {', '.join(kinds)}; a list must hold strings only")
        source = DataSource(datasets.Dataset.from_dict({"text": list(task)}))
        return Task(name or f"texts-{source.fingerprint[:8]}", (source,))
    raise TypeError(f"task is a {type(task).__name__}; give a name, a path, a datasets.Dataset or a list of strings")


READERS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}


def read_files(path: Path) -> Any:
    """All texts of a file or of a folder of files (each .txt file is one document)."""
    import datasets

    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.suffix in READERS)
    kinds = {READERS.get(p.suffix) for p in files}
    if not files or None in kinds:
        raise ValueError(f"{path} is no .txt, .jsonl or .parquet file and holds none")
    if len(kinds) > 1:
        raise ValueError(f"{path} mixes {sorted(map(str, kinds))} files; point at one kind of them")
    kind = kinds.pop()
    options = {"sample_by": "document"} if kind == "text" else {}
    return quietly(datasets.load_dataset, kind, data_files=[str(p) for p in files], split="train", **options)


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
