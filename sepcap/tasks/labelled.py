"""Labelled texts of several kinds, on which the geometry of activations is measured (METHODS 13)."""

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Int

from sepcap.checks import checked
from sepcap.models.forward import positions_of
from sepcap.models.kinds import architecture_of, kind_of
from sepcap.storage import html_card
from sepcap.tasks.batches import separator_of
from sepcap.tasks.documents import Named, Spelling, documents_in_turn, in_rounds, named_documents
from sepcap.tasks.labelled_config import PER_CATEGORY, LabelledTextsConfig
from sepcap.tasks.load import load_task
from sepcap.tasks.samples import check_content, check_context
from sepcap.tasks.sources import local
from sepcap.tasks.sources.local import LocalSource
from sepcap.tasks.task import Split

REFERENCE = "stdlib:pydoc_data/topics.py"
"""Name of the language reference in offline prose; the chapter follows after a #."""

OFFLINE = ("prose", "language reference", "Python", "C++")
"""Categories of the default texts: docstrings and package descriptions, chapters of the language reference, and two languages."""

FEWEST = 3
"""Minimum number of texts per category: if one is left out, there must still be a pair."""

HELD_OUT: tuple[Split, ...] = ("evaluate", "collect")

OFFLINE_KINDS: dict[str, tuple[local.Kind, int, tuple[Split, ...]]] = {
    "prose": ("prose", 1, HELD_OUT),
    "Python": ("python", 1, HELD_OUT[::-1]),
    "C++": ("cpp", 5, HELD_OUT),
}
"""Kind of local text, depth of the folders that must differ (all C++ is from one package), and splits in order of use. A file is in
the same split for prose and for Python, so that with the orders reversed no prose text has the docstrings of the code of another text."""


@dataclass(frozen=True, eq=False)
class LabelledTexts:
    """Texts grouped by category.

    Attributes:
        texts: category -> texts.
        names: category -> source of each of its texts.

    Raises:
        ValueError: fewer than two categories, a category with fewer than three texts, or a text that occurs twice.

    Example:
        >>> LabelledTexts({"a": ("one", "two", "three"), "b": ("I", "II", "III")}).labels.tolist()
        [0, 0, 0, 1, 1, 1]
    """

    texts: Mapping[str, tuple[str, ...]]
    names: Mapping[str, tuple[str, ...]] | None = None

    def __post_init__(self) -> None:
        if len(self.texts) < 2:
            raise ValueError(f"texts: {len(self.texts)} categories ({', '.join(self.texts)}); comparing kinds of text needs two or more")
        first: dict[str, str] = {}
        for category, text in ((category, text) for category, texts in self.texts.items() for text in texts):
            if text in first:
                raise ValueError(f"texts: one text occurs twice, in {first[text]!r} and in {category!r} ({text[:40]!r}…)")
            first[text] = category
        for category, texts in self.texts.items():
            if len(texts) < FEWEST:
                raise ValueError(
                    f"texts: category {category!r} has {len(texts)}; measuring its similarity with an uncertainty needs {FEWEST} or more"
                )

    @property
    def categories(self) -> tuple[str, ...]:
        """Names of the categories, in order."""
        return tuple(self.texts)

    @property
    def labels(self) -> Int[np.ndarray, " text"]:
        """Category number of every text, in the order of the texts in all results."""
        return np.repeat(np.arange(len(self.texts)), [len(texts) for texts in self.texts.values()])

    @cached_property
    def fingerprint(self) -> str:
        """Hash of categories and texts."""
        digest = hashlib.sha256()
        for category, texts in self.texts.items():
            for part in (category, *texts):
                digest.update(hashlib.sha256(part.encode()).digest())
        return digest.hexdigest()[:16]

    @cached_property
    def table(self) -> pd.DataFrame:
        """One row per text: text (its number), category, name, characters."""
        rows = []
        for category, texts in self.texts.items():
            names = self.names[category] if self.names else [f"{category} {i + 1}" for i in range(len(texts))]
            rows += [{"category": category, "name": name, "characters": len(text)} for name, text in zip(names, texts, strict=True)]
        return pd.DataFrame(rows).reset_index(names="text")

    @checked()
    def halves(self, seed: int = 0) -> tuple["LabelledTexts", "LabelledTexts"]:
        """Two halves with no text in common, each with half of the texts of every category: one to search, one to test the result.

        Args:
            seed: decides which text is in which half; the same seed gives the same halves.

        Raises:
            ValueError: a category with too few texts for two halves.

        Example:
            >>> texts = LabelledTexts({name: tuple(f"{name} {i}" for i in range(6)) for name in "ab"})
            >>> [half.labels.tolist() for half in texts.halves()]
            [[0, 0, 0, 1, 1, 1], [0, 0, 0, 1, 1, 1]]
        """
        rng, names = np.random.default_rng(seed), self.table["name"].to_numpy()
        halves: tuple[dict[str, list[Named]], dict[str, list[Named]]] = ({}, {})
        for number, (category, texts) in enumerate(self.texts.items()):
            if len(texts) < 2 * FEWEST:
                raise ValueError(
                    f"texts: category {category!r} has {len(texts)}; one half is searched and the other tests the result, which needs "
                    f"{2 * FEWEST} or more. Give more texts, or per_category={2 * FEWEST} or more if they are taken from a task"
                )
            named = list(zip(names[self.labels == number], texts, strict=True))
            order = rng.permutation(len(named))
            for half, chosen in zip(halves, (order[: len(named) // 2], order[len(named) // 2 :]), strict=True):
                half[category] = [named[i] for i in sorted(chosen)]
        return _of_named(halves[0]), _of_named(halves[1])

    @checked()
    def rows(self, model: Any, length: int) -> Int[np.ndarray, "text pos"]:
        """Token ids of every text: the opening token if the model has one, and the first tokens up to `length`.

        A row of a masked language model also ends with its closing token.

        Raises:
            ValueError: a text that is too short, or two that begin with the same tokens.
        """
        opening, closing = _ends(model)
        inside = length - len(opening) - len(closing)
        rows: list[list[int]] = []
        first: dict[tuple[int, ...], str] = {}
        whole = (text for texts in self.texts.values() for text in texts)
        for text, category, name in zip(whole, self.table["category"], self.table["name"], strict=True):
            ids = _token_ids(model.tokenizer, text, inside)
            if len(ids) < inside:
                raise ValueError(
                    f"texts: a text of {category!r} ({text[:40]!r}…) has {len(ids)} tokens, and {inside} are needed for the positions "
                    "asked for. Give longer texts, a smaller context= or earlier positions="
                )
            this = f"{name!r} of {category!r}"
            if tuple(ids) in first:
                raise ValueError(
                    f"texts: {first[tuple(ids)]} and {this} begin with the same {inside} tokens ({text[:40]!r}…), and nothing after them "
                    "would be read. Give a larger context=, later positions=, or another text for one of them"
                )
            first[tuple(ids)] = this
            rows.append([*opening, *ids, *closing])
        return np.array(rows, dtype=np.int64)

    def __repr__(self) -> str:
        return f"LabelledTexts({', '.join(f'{category} {len(texts)}' for category, texts in self.texts.items())})"

    def _repr_html_(self) -> str:
        return html_card("LabelledTexts", {"fingerprint": self.fingerprint}, self.table)


@checked()
def load_labelled_texts(
    model: Any,
    texts: LabelledTexts | Mapping[str, Any] | None = None,
    *,
    per_category: int = PER_CATEGORY,
    skip: int = 0,
    context: int | None = None,
    differ_within: int | None = None,
) -> LabelledTexts:
    """Texts of several categories, each long enough for the model's context.

    Args:
        model: what `load_model` returns; its tokenizer decides what is long enough.
        texts: category -> list of texts, all of which are used; or category -> a task (its name, path, Dataset or Task), of which the
            first `per_category` texts are used that are long enough and begin differently from those before them. Default is texts of
            the running Python installation: docstrings and package descriptions, the language reference, Python and C++, first from
            the parts that the embedded model was not trained on.
        per_category: texts per category, if not all are used.
        skip: texts per category to skip first: skip=per_category gives other texts than skip=0.
        context: tokens that a text must fill, including the opening token; default is the model's context, at most 512.
        differ_within: number of first tokens within which texts chosen here must differ; default is `context`. If only the first
            tokens are read, texts with the same beginning are one text.

    Raises:
        ValueError: too few texts that are long enough, see also `LabelledTexts`.
        NotImplementedError: an image classifier.

    Source: [OPT]; METHODS section 13.

    Example:
        >>> sepcap.load_labelled_texts(model)  # doctest: +SKIP
        LabelledTexts(prose 5, language reference 5, Python 5, C++ 5)
    """
    check_reads_text(model)
    if isinstance(texts, LabelledTexts):
        return texts
    if per_category < FEWEST or skip < 0:
        raise ValueError(f"per_category={per_category}, skip={skip}: a category needs {FEWEST} texts or more, and skip must be 0 or more")
    context = check_context(model, context)
    found: dict[str, list[Named]] = {}
    taken = _Beginnings(model, context, context if differ_within is None else differ_within)
    for category, source in (dict.fromkeys(OFFLINE) if texts is None else texts).items():
        if isinstance(source, list | tuple):
            if not all(isinstance(text, str) for text in source):
                kinds = ", ".join(sorted({type(text).__name__ for text in source}))
                raise TypeError(f"texts[{category!r}] is a list of {kinds}; a list must contain only strings")
            found[category] = [(f"{category} {i + 1}", text) for i, text in enumerate(source)]
            taken.add(source)
        else:
            documents = _offline(category) if source is None else _of_task(model, category, source)
            found[category] = _fitting(documents, category, skip, skip + per_category, taken)
    return _of_named(found)


def _of_named(found: Mapping[str, list[Named]]) -> LabelledTexts:
    names, texts = ({category: tuple(each[i] for each in named) for category, named in found.items()} for i in (0, 1))
    return LabelledTexts(texts, names)


def texts_of(model: Any, config: LabelledTextsConfig) -> tuple[LabelledTexts, tuple[int, ...], int]:
    """The texts of a configuration, the positions to use, and the length of the rows that they need.

    Raises:
        ValueError: two tasks of one name; as `load_labelled_texts` and `check_positions`.
    """
    positions, length = check_positions(model, config.positions, config.context)
    texts = config.texts
    if config.tasks:
        texts = {Path(task).stem if isinstance(task, str | Path) else load_task(task).name: task for task in config.tasks}
        if len(texts) < len(config.tasks):
            raise ValueError(f"tasks={config.tasks}: two have the same name; give each once")
    chosen = {"per_category": config.per_category, "skip": config.skip, "context": config.context, "differ_within": length}
    return load_labelled_texts(model, texts, **chosen), positions, length


def check_reads_text(model: Any) -> None:
    """Raise an error if a model has no token positions.

    Raises:
        NotImplementedError: an image classifier.
    """
    if not hasattr(model, "cfg"):
        raise TypeError(f"model is a {type(model).__name__}; give what sepcap.load_model returns")
    if kind_of(model) == "images":
        raise NotImplementedError(
            f"{architecture_of(model)} is an image classifier: there are no texts and no token positions to compare; give a language model"
        )


def last_positions(model: Any, context: int | None = None) -> tuple[int, ...]:
    """Every fourth position up to the last one of the context, ten of them if there is room: 475, 479, … 511 of 512 [OPT].

    They never include the first position, which has the opening token, or the closing token of a masked language model.
    """
    last = check_context(model, context) - len(_ends(model)[1]) - 1
    return tuple(reversed(range(last, 0, -4)[:10]))


def check_positions(model: Any, positions: Iterable[int] | None, context: int | None) -> tuple[tuple[int, ...], int]:
    """The positions to use, in order, and the length of the rows that they need: later positions are not computed.

    Raises:
        ValueError: no position, one twice, or one outside the model's context.
        NotImplementedError: an image classifier.
    """
    check_reads_text(model)
    closing = len(_ends(model)[1])
    chosen = last_positions(model, context) if positions is None else tuple(int(position) for position in positions)
    most = (positions_of(model) if context is None else check_context(model, context)) - closing
    if not chosen or len(set(chosen)) < len(chosen) or not 0 <= min(chosen) <= max(chosen) < most:
        raise ValueError(f"positions={list(chosen)}: give distinct ones from 0 to {most - 1}, at least one")
    return tuple(sorted(chosen)), max(2, max(chosen) + 1) + closing


def _ends(model: Any) -> tuple[list[int], list[int]]:
    """Ids of the opening and the closing token of a row; only masked language models have the latter."""
    tokenizer = model.tokenizer
    if kind_of(model) == "masked":
        opening = tokenizer.bos_token_id if tokenizer.cls_token_id is None else tokenizer.cls_token_id
        closing = tokenizer.eos_token_id if tokenizer.sep_token_id is None else tokenizer.sep_token_id
        return [opening], [closing]
    separator = separator_of(tokenizer)
    return ([] if separator is None else [separator]), []


def _token_ids(tokenizer: Any, text: str, most: int) -> list[int]:
    return Spelling(tokenizer).beginning(text, most)[:most]


class _Beginnings:
    """First tokens of the texts chosen so far."""

    def __init__(self, model: Any, context: int, differ_within: int) -> None:
        ends = sum(map(len, _ends(model)))
        self.needed, self._within = max(context, differ_within) - ends, differ_within - ends
        if self._within < 1:
            raise ValueError(f"differ_within={differ_within}: give {ends + 1} or more")
        self._tokenizer = model.tokenizer
        self._seen: set[tuple[int, ...]] = set()

    def new(self, text: str) -> bool:
        """Whether a text is long enough and begins differently from all before it; if so, its beginning is recorded."""
        ids = tuple(_token_ids(self._tokenizer, text, self.needed))
        begins = ids[: self._within]
        if len(ids) < self.needed or begins in self._seen:
            return False
        self._seen.add(begins)
        return True

    def add(self, texts: Iterable[str]) -> None:
        """Record the beginnings of texts that are used regardless of how they begin."""
        self._seen.update(tuple(_token_ids(self._tokenizer, text, self._within)) for text in texts)


def _fitting(documents: Iterable[Named], category: str, start: int, stop: int, taken: _Beginnings) -> list[Named]:
    found = list(itertools.islice((named for named in documents if taken.new(named[1])), stop))
    if len(found) < stop:
        raise ValueError(
            f"texts: {category!r} has only {len(found)} texts of {taken.needed} tokens or more, and {stop} were asked for; texts with "
            "the same beginning count as one. Give a smaller per_category=, skip= or context=, or other texts"
        )
    return found[start:]


def _of_task(model: Any, category: str, source: Any) -> Iterator[Named]:
    task = load_task(source)
    check_content(model, task)
    yield from itertools.chain.from_iterable(documents_in_turn(task, split) for split in HELD_OUT)


def _offline(category: str) -> Iterator[Named]:
    if category == "language reference":
        return _reference()
    kind, depth, splits = OFFLINE_KINDS[category]
    return itertools.chain.from_iterable(_spread(named_documents(LocalSource(kind), split), depth) for split in splits)


def _spread(documents: Iterable[Named], depth: int) -> Iterator[Named]:
    """Documents outside the language reference; one from every folder at that depth before a second one from any.

    Files of one package resemble each other.
    """
    folders: dict[str, list[Named]] = {}
    for name, text in documents:
        if name.startswith(REFERENCE):
            continue
        folders.setdefault("/".join(name.split("/")[:-1][:depth]), []).append((name, text))
    yield from in_rounds(map(iter, folders.values()))


def _reference() -> Iterator[Named]:
    """Chapters of the language reference, those of the held-out splits first, without paragraphs of earlier chapters."""
    from pydoc_data.topics import topics

    seen: set[str] = set()
    names = {topic: f"{REFERENCE}#{topic}" for topic in topics}
    order = [*HELD_OUT, "train"]
    for topic in sorted(topics, key=lambda topic: (order.index(local.split_of(names[topic])), local.bucket(names[topic]), topic)):
        paragraphs = [p for p in local.clean_prose(topics[topic]).split("\n\n") if p not in seen]
        seen.update(paragraphs)
        yield names[topic], "\n\n".join(paragraphs)
