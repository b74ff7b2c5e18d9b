"""Overlap of the texts of a task: copies within a part, and text that its two parts share (METHODS 9)."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import UInt64

from sepcap.checks import checked
from sepcap.errors import warn
from sepcap.latex import latex_table
from sepcap.storage import html_card
from sepcap.tasks.documents import documents_in_turn
from sepcap.tasks.load import load_task
from sepcap.tasks.sources.ngrams import COMMON, LENGTH, among, copies_and_idiom, runs, united, words_in
from sepcap.tasks.task import PARTS

TOLERATED = 0.05
"""Share of words, or of documents, above which a warning is given."""


@dataclass(frozen=True)
class TextOverlap:
    """Overlap of the documents of a task.

    Attributes:
        task: its name.
        documents: number of documents read, per part ("collect" and "evaluate").
        copies: documents with more than half of their 13-grams in earlier documents of the same part.
        shared: share of the words of the evaluation documents that are in 13-grams of a collection document, without idiom;
            NaN if no evaluation document has 13 words.
        idiom: share of those words in 13-grams that at least 20 of all documents contain, copies excluded: licences, beginnings of files.
    """

    task: str
    documents: dict[str, int]
    copies: dict[str, int]
    shared: float
    idiom: float

    @property
    def table(self) -> Any:
        """A DataFrame with a row per part: documents, copies, shared and idiom (of evaluation documents)."""
        import pandas as pd

        rows = [{"part": part, "documents": n, "copies": self.copies[part]} for part, n in self.documents.items()]
        rows[-1] |= {"shared": self.shared, "idiom": self.idiom}
        return pd.DataFrame(rows)

    def to_latex(self, **options: Any) -> str:
        """`.table` for a paper, see `sepcap.latex.latex_table`."""
        return latex_table(self.table, **options)

    def _repr_html_(self) -> str:
        return html_card("Overlap of texts", {"task": self.task}, self.table)


@checked()
def check_overlap(task: Any, *, documents: int = 5_000) -> TextOverlap:
    """Measure the overlap within the texts of a task and between its two parts, and warn if it is above 5%.

    Evaluating on a text that was used for collection adds no information; two copies of a text are one document, however many rows
    they fill; a beginning shared by 20 documents is easy to predict in each. 13-grams are hashed; only the hashes are kept.

    Args:
        task: a task name, a path, a `datasets.Dataset`, a list of strings, or a Task; of texts, not of images.
        documents: maximum number read from each part, in the order in which samples use them.

    Returns:
        TextOverlap with the number of documents and copies of each part, and the shares of words that the parts share and that are idiom.

    Raises:
        ValueError: a task of images.

    Example:
        >>> texts = [f"Text {i} has words of its own, and there are enough of them to be read: {i * 7}." for i in range(40)]
        >>> check_overlap(texts).shared
        0.0
    """
    loaded = load_task(task)
    if loaded.content != "text":
        raise ValueError(f"task={loaded.name!r} is made of {loaded.content}; the overlap of 13-grams is defined for texts only")
    found = {part: [runs(text) for _, text in itertools.islice(documents_in_turn(loaded, part), documents)] for part in PARTS}
    result = measured(loaded.name, found["evaluate"], {"collect": found["collect"]})
    found_shares = {
        "evaluation words are in 13-grams of collection documents": result.shared,
        f"evaluation words are in 13-grams that {COMMON} or more documents contain": result.idiom,
    }
    for part, n in result.documents.items():
        found_shares[f"documents to {part} are copies of earlier ones"] = result.copies[part] / max(1, n)
    for what, share in found_shares.items():
        if math.isnan(share):
            warn(f"task {loaded.name!r}: no evaluation document has {LENGTH} words, so the overlap of its parts is unknown")
            break
        if share > TOLERATED:
            warn(f"task {loaded.name!r}: {share:.0%} of the {what}; results on it rest on less text than they seem to")
    return result


def measured(
    name: str, evaluated: Sequence[UInt64[np.ndarray, " _"]], others: dict[str, Sequence[UInt64[np.ndarray, " _"]]]
) -> TextOverlap:
    """The overlap of evaluation documents with all documents of other parts, from their 13-grams."""
    parts = {**others, "evaluate": evaluated}
    distinct = {part: [united([each]) for each in found] for part, found in parts.items()}
    copied, common = copies_and_idiom(*distinct.values())
    held = united([each for part in others for each in distinct[part]])
    words = shared = idiom = 0
    for each in evaluated:
        usual = among(each, common)
        words += len(words_in(usual))
        idiom += int(words_in(usual).sum())
        shared += int(words_in(among(each, held) & ~usual).sum())
    return TextOverlap(
        name,
        {part: len(found) for part, found in parts.items()},
        {part: int(found.sum()) for part, found in zip(parts, copied, strict=True)},
        shared / words if words else math.nan,
        idiom / words if words else math.nan,
    )
