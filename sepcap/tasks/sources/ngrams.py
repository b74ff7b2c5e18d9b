"""Runs of 13 words that texts share, and removal of runs that other texts contain (METHODS 9).

A word is a sequence of letters, digits and underscores, or one other character that is not a space; in scripts without spaces between
words, each character is a word. If two texts share 13 consecutive words, one was usually copied from the other ([GPT-3] appendix C
cleans its training text by the same rule). Copies are found first, by all of their runs. Runs shared by 20 or more of the remaining
documents are idiom, such as licences and the beginnings of files; they are counted separately.
"""

import functools
import hashlib
import itertools
import re
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, UInt, UInt32, UInt64

LENGTH = 13
"""Number of words in a run."""

COMMON = 20
"""Minimum number of documents that share a run for it to be idiom."""

SAME = 0.5
"""Share of a document's runs in earlier documents above which it is a copy."""

_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\U00020000-\U0003ffff"
"""Scripts without spaces between words: Thai, Lao, Burmese, Khmer, kana and Chinese characters."""

_WORD = re.compile(rf"[{_UNSPACED}]|(?:(?![{_UNSPACED}])\w)+|[^\w\s]")
_POWERS = np.array([pow(0x9E3779B97F4A7C15, k, 2**64) for k in range(LENGTH)], dtype=np.uint64)


@functools.lru_cache(maxsize=2**18)
def _word_hash(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")


def runs(text: str) -> UInt64[np.ndarray, " run"]:
    """A 64-bit hash of every 13 consecutive words, in reading order; empty if there are fewer words. The same on every machine.

    >>> len(runs("one two three four five six seven eight nine ten eleven twelve thirteen fourteen"))
    2
    """
    words = _WORD.findall(text)
    hashes = np.fromiter(map(_word_hash, words), np.uint64, len(words))
    found = np.zeros(max(0, len(words) - LENGTH + 1), np.uint64)
    for k, power in enumerate(_POWERS):
        found += hashes[k : k + len(found)] * power
    # a sum of products alone would keep patterns of its terms in the low bits
    found ^= found >> np.uint64(31)
    found *= np.uint64(0xBF58476D1CE4E5B9)
    return found ^ (found >> np.uint64(29))


def words_in(shared: Bool[np.ndarray, " run"]) -> Bool[np.ndarray, " word"]:
    """The words that are in at least one of the runs.

    >>> int(words_in(np.array([True, False, False])).sum())
    13
    """
    words = np.zeros(len(shared) + LENGTH - 1 if len(shared) else 0, dtype=bool)
    for k in range(LENGTH):
        words[k : k + len(shared)] |= shared
    return words


def among(found: UInt[np.ndarray, " run"], held: UInt[np.ndarray, " other"]) -> Bool[np.ndarray, " run"]:
    """Which of the runs `found` are in `held`, which is sorted."""
    if not len(held):
        return np.zeros(len(found), dtype=bool)
    return held[np.searchsorted(held, found).clip(max=len(held) - 1)] == found


def united(documents: Sequence[UInt64[np.ndarray, " _"]]) -> UInt64[np.ndarray, " distinct"]:
    """All distinct runs of some documents, sorted."""
    return np.unique(np.concatenate([np.empty(0, np.uint64), *documents]))


def common_runs(documents: Sequence[UInt64[np.ndarray, " _"]]) -> UInt64[np.ndarray, " common"]:
    """The runs that at least 20 of the documents contain, sorted; each document is given by its distinct runs."""
    found, count = np.unique(np.concatenate([np.empty(0, np.uint64), *documents]), return_counts=True)
    return found[count >= COMMON]


def copies(documents: Sequence[UInt64[np.ndarray, " _"]]) -> Bool[np.ndarray, " document"]:
    """Documents with more than half of their distinct runs in earlier documents.

    >>> copies([np.array([1, 2, 3], dtype=np.uint64), np.array([2, 3, 4], dtype=np.uint64)]).tolist()
    [False, True]
    """
    sizes = np.array([len(runs) for runs in documents], dtype=np.int64)
    owner = np.repeat(np.arange(len(documents)), sizes)
    _, first, inverse = np.unique(np.concatenate([np.empty(0, np.uint64), *documents]), return_index=True, return_inverse=True)
    earlier = np.bincount(owner, weights=owner[first][inverse] < owner, minlength=len(documents))
    return earlier > SAME * sizes


def copies_and_idiom(
    *parts: Sequence[UInt64[np.ndarray, " _"]],
) -> tuple[list[Bool[np.ndarray, " document"]], UInt64[np.ndarray, " common"]]:
    """The copies within each part, and the runs that 20 or more of all other documents contain.

    Copies do not make a text idiom: a text that fills most of 60 documents is one document, copied 59 times.

    Args:
        parts: the distinct runs of every document of each part.

    Returns:
        Which documents are copies, for every part, and the idiom, sorted.
    """
    found = [copies(part) for part in parts]
    left = [runs for part, copied in zip(parts, found, strict=True) for runs, copy in zip(part, copied, strict=True) if not copy]
    return found, common_runs(left)


def without(text: str, shared: Bool[np.ndarray, " run"], shortest: int) -> str:
    """A text without the lines that have a word in one of the runs.

    Args:
        text: any text.
        shared: which of `runs(text)` are removed.
        shortest: minimum characters of a piece between two cuts; shorter ones are dropped.

    Returns:
        The remaining pieces, separated by an empty line.
    """
    if not shared.any():
        return text
    found = np.flatnonzero(words_in(shared))
    starts = np.array([match.start() for match in _WORD.finditer(text)])
    lines = text.split("\n")
    line_starts = np.cumsum([0, *(len(line) + 1 for line in lines[:-1])])
    hit = np.zeros(len(lines), dtype=bool)
    hit[np.searchsorted(line_starts, starts[found], side="right") - 1] = True
    groups = itertools.groupby(zip(lines, hit, strict=True), key=lambda item: item[1])
    pieces = ("\n".join(line for line, _ in group).strip("\n") for cut, group in groups if not cut)
    return "\n\n".join(piece for piece in pieces if len(piece) >= shortest)


def sampled(found: UInt64[np.ndarray, " run"]) -> UInt32[np.ndarray, " distinct"]:
    """A sixteenth of the runs, chosen by their hash, as 32 bits each, sorted: small enough to be kept for a whole training corpus.

    With as many runs as a document has, the share of sampled runs found in a corpus is close to that of all its runs.
    """
    chosen = found[found % np.uint64(16) == 0]
    return np.unique((chosen >> np.uint64(32)).astype(np.uint32))
