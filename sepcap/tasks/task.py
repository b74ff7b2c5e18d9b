"""Tasks: the data on which a model is measured.

A task is based on `datasets`. Its documents are split once and for all into a part for collecting
statistics and a part for evaluation, which never share a text (METHODS 9).
"""

from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

Split = Literal["train", "collect", "evaluate"]

PARTS: tuple[Split, Split] = ("collect", "evaluate")


@runtime_checkable
class Source(Protocol):
    """One stream of documents with a split."""

    @property
    def fingerprint(self) -> str:
        """Changes when the documents do."""
        ...

    def documents(self, split: Split) -> Any:
        """`datasets.Dataset` with a column `text`, in order of use."""
        ...

    def indices(self, split: Split, n: int) -> list[int] | str:
        """Rows of the first `n` documents of the split in the underlying data."""
        ...


@dataclass(frozen=True)
class Task:
    """Named examples with a deterministic collect/evaluate split.

    Attributes:
        name: name in tables and figures.
        sources: one stream of documents, or several that are mixed in equal numbers of tokens.
        content: "text", or "images" with labels.
        special_tokens: whether text spelled like a special token becomes one.
        answers_after: if given, only tokens after the first such word of a document are prediction targets, and every document has rows
            of its own.
    """

    name: str
    sources: tuple[Source, ...]
    content: Literal["text", "images"] = "text"
    special_tokens: bool = False
    answers_after: str | None = None

    @property
    def fingerprint(self) -> str:
        """Hash of the documents: two tasks with the same fingerprint are the same data."""
        options = [*(["special"] if self.special_tokens else []), *([f"after {self.answers_after}"] if self.answers_after else [])]
        return "-".join([*(source.fingerprint for source in self.sources), *options])
