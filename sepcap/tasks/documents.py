"""The documents of a task, limited to a few tokens each, in an order that spreads a sample over packages (METHODS 9)."""

import hashlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import numpy as np

from sepcap.tasks.sources.hub import Streamed
from sepcap.tasks.task import Source, Split, Task

T = TypeVar("T")

Named = tuple[str, str]
"""Source of a text, and the text."""

PerDocument = int | Literal["row"] | None
"""Maximum tokens per document in a sample: a number, "row" for as many as fit one row, None for whole documents."""

AT_ONCE = 2**16
"""Characters of a whole document that are tokenised first; quadrupled each time more of it is needed."""

MARGIN = 64
"""Tokens before a cut that are not used: they can differ from those of the whole text."""

PER_TOKEN = 8
"""Characters read per token of a part of a document; a token of English text or of code has 3 to 5."""


@dataclass(frozen=True)
class Spelling:
    """How a text is tokenised: without special tokens of its own, and a long text only as far as needed (METHODS 9).

    Attributes:
        tokenizer: a Hugging Face tokenizer.
        special_tokens: whether text spelled like a special token becomes one, or is ordinary text.
    """

    tokenizer: Any
    special_tokens: bool = False

    def ids(self, text: str) -> list[int]:
        """Token ids of a whole text."""
        options = {} if self.special_tokens else {"split_special_tokens": True}
        return self.tokenizer([text], add_special_tokens=False, verbose=False, **options)["input_ids"][0]

    def beginning(self, text: str, needed: int, start: int = 0, characters: int | None = None) -> list[int]:
        """The first tokens of `text[start:]`: all, or at least `needed`, the same as if all of it were tokenised.

        Args:
            text: of any length; at most 4·(`characters` + characters of the tokens needed) are read in the last attempt.
            needed: number of tokens.
            start: first character.
            characters: number of characters tokenised first; default is `AT_ONCE`.
        """
        characters = characters or AT_ONCE
        ids = self.ids(text[start : start + characters])
        while start + characters < len(text) and len(ids) - MARGIN < needed:
            characters *= 4
            ids = self.ids(text[start : start + characters])
        return ids if start + characters >= len(text) else ids[: max(0, len(ids) - MARGIN)]

    def part(self, text: str, limit: int, seed: int = 0) -> tuple[list[int], bool]:
        """At most `limit` tokens of a text, and whether it has more of them.

        A longer text gives exactly `limit` tokens. They start at a position that depends only on the seed and the text: uniform over
        the text, then moved on to the next line or word. They are the tokens of the text from that position on. A long text costs no
        more than a short one.
        """
        place = int.from_bytes(hashlib.sha256(f"{seed} {text}".encode()).digest()[:8], "big") / 2**64
        at_once = characters = PER_TOKEN * (limit + MARGIN)
        while True:
            # measured at the position itself, because characters per token differ between code and prose
            first = int(place * max(0, len(text) - characters))
            ids = self.ids(text[first : first + characters])
            if len(ids) > limit:
                break
            if characters >= len(text):
                return ids, False
            characters *= 4
        length = math.ceil(min(characters, len(text)) * limit / len(ids))
        near = max(16, length // 4)
        start = _next_break(text, int(place * (len(text) - length + 1)), near)
        while len(ids := self.beginning(text, limit, start, at_once)) < limit and start:
            # too near the end: move back by at least one character
            start = _next_break(text, max(0, start - near), near - 1)
        return ids[:limit], True


def _next_break(text: str, start: int, near: int) -> int:
    """Position of the first character of the next line, else of the next word, if it is near; else `start`."""
    for separator in ("\n", " "):
        at = text.find(separator, max(0, start - 1), start + near)
        if start and at >= 0:
            return at + 1
    return start


def package_of(name: str) -> str:
    """The package of a file of a local task: the first folder, or for torch's C++ headers the one below torch/include.

    >>> [package_of(name) for name in ("sympy/core/add.py", "stdlib:json/decoder.py", "six.py", "torch/include/ATen/Context.h")]
    ['sympy', 'stdlib:json', 'six', 'ATen']
    """
    name = name.removeprefix("torch/include/")
    return name.split("/")[0].removesuffix(".py")


@dataclass(frozen=True, eq=False)
class Document:
    """The part of a document that a sample uses.

    Attributes:
        number: row of the underlying data, or of the split if the data has no row numbers.
        ids: token ids.
        cut: whether the document has more tokens than these.
    """

    number: int
    ids: list[int]
    cut: bool


@dataclass(frozen=True)
class Documents:
    """Reads the documents of one part of a source.

    Attributes:
        source: stream of documents.
        split: part of the source.
        spelling: how texts are tokenised.
        limit: maximum tokens per document; None for all.
        needed: maximum number of tokens that may be asked for in total.
        seed: of the order and of the start positions in long documents; 0 keeps the original order.
    """

    source: Source
    split: Split
    spelling: Spelling
    limit: int | None
    needed: int
    seed: int

    def by_package(self) -> list[tuple[str | None, Iterator[Document]]]:
        """Name and documents of every package, in order of use.

        A single package without a name if the documents have no names, or if they are used whole in their order.
        """
        if isinstance(self.source, Streamed):
            parts = self.source.slices(self.split, self.seed)
            return [(None, self._read(pair for part in parts for pair in zip(part["row"], part["text"], strict=True)))]
        dataset = self.source.documents(self.split)
        order = np.random.default_rng(self.seed).permutation(len(dataset)).tolist() if self.seed else range(len(dataset))
        packages: dict[str | None, list[int]] = {}
        names = dataset["name"][:] if self.limit is not None and "name" in dataset.column_names else None
        for i in order:
            packages.setdefault(None if names is None else package_of(names[i]), []).append(i)
        rows = self.source.indices(self.split, len(dataset))
        numbers = range(len(dataset)) if isinstance(rows, str) else rows
        return [(name, self._read((numbers[i], dataset[i]["text"]) for i in chosen)) for name, chosen in packages.items()]

    def _read(self, texts: Iterable[tuple[int, str]]) -> Iterator[Document]:
        needed = self.needed
        for number, text in texts:
            if self.limit is None:
                ids, cut = self.spelling.beginning(text, needed), False
                needed = max(0, needed - len(ids))
            else:
                ids, cut = self.spelling.part(text, self.limit, self.seed)
            if ids:
                yield Document(number, ids, cut)


def documents_in_turn(task: Task, split: Split) -> Iterator[Named]:
    """The documents of a split, read only as far as needed; for a mixture, one from each source in turn."""
    return in_rounds(named_documents(source, split) for source in task.sources)


def named_documents(source: Source, split: Split) -> Iterator[Named]:
    """The documents of one source, each with its name, or else its number."""
    parts: Iterable[Any] = source.slices(split) if isinstance(source, Streamed) else [source.documents(split)]
    for part in parts:
        for i, row in enumerate(part):
            yield str(row.get("name") or f"{split} {row.get('row', i)}"), row["text"]


def in_rounds(streams: Iterable[Iterator[T]]) -> Iterator[T]:
    """The first item of each stream, then the second of each, and so on.

    >>> "".join(in_rounds(map(iter, ("ad", "b", "cef"))))
    'abcdef'
    """
    waiting = list(streams)
    while waiting:
        for stream in list(waiting):
            for item in stream:
                yield item
                break
            else:
                waiting.remove(stream)
