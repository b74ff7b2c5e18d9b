"""Token sequences packed into rows of one context length.

A row is BOS followed by at most `context - 1` tokens: a part of one document, or several whole short documents separated by BOS.
Tokens count (towards a budget, in statistics and as prediction targets) if they are neither BOS nor padding. If a tokenizer has no
BOS, nothing precedes the first token of a row: it counts in statistics, but it is not a prediction target.
"""

import dataclasses
import hashlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor

from sepcap.errors import warn
from sepcap.tasks.documents import Document, Documents, PerDocument, Spelling, in_rounds
from sepcap.tasks.sources.hub import read_from
from sepcap.tasks.task import Split, Task

FEW = 50
"""Samples with fewer clusters cause a warning: what the texts of each cluster share then affects results strongly."""


def pack(documents: Iterable[list[int]], context: int, bos: int | None) -> Iterator[np.ndarray]:
    """Rows of `context` token ids from tokenised documents (without special tokens of their own).

    Args:
        documents: token ids per document, in order of use.
        context: tokens per row, BOS included.
        bos: id that marks the beginning of a row and of a document; None if the tokenizer has none.

    Returns:
        Full rows [context] of int64; the last one can be shorter. Empty documents are skipped.

    >>> [row.tolist() for row in pack([[5, 6, 7], [8, 9]], context=4, bos=0)]
    [[0, 5, 6, 7], [0, 8, 9]]
    """
    row: list[int] = [] if bos is None else [bos]
    for ids in documents:
        if not ids:
            continue
        if bos is not None and len(row) > 1:
            row.append(bos)
            if len(row) >= context:
                yield np.array(row[:context], dtype=np.int64)
                row = [bos]
        position = 0
        while position < len(ids):
            taken = ids[position : position + context - len(row)]
            row.extend(taken)
            position += len(taken)
            if len(row) >= context:
                yield np.array(row, dtype=np.int64)
                row = [] if bos is None else [bos]
    if len(row) > (0 if bos is None else 1):
        yield np.array(row, dtype=np.int64)


@dataclass(frozen=True, eq=False)
class TokenSample:
    """A fixed number of tokens of one part of a task, packed into rows.

    Attributes:
        task: name of the task.
        split: "collect" or "evaluate".
        rows: token ids, at most `context` each.
        bos: id that opens rows and documents, or None.
        asked: tokens asked for.
        tokens: tokens in the sample, BOS and padding not counted (in "evaluate": prediction targets); fewer than asked for
            if the task has no more.
        indices: documents that the tokens are from, per source.
        fingerprint: hash of all rows.
        row_documents: documents of every row, numbered over the sample; by default every row is a document of its own.
        origins: source of every document, by its place in the task, and its number in the source; in the order of `row_documents`.
        groups: package of every row if the documents have names and no row mixes packages; else None.
        after: id after which tokens are prediction targets, from the first one in a row on; None if all are.
        limit: maximum number of tokens of one document; None for whole documents.
    """

    task: str
    split: str
    rows: tuple[np.ndarray, ...]
    bos: int | None
    asked: int
    tokens: int
    indices: tuple[list[int], ...]
    fingerprint: str
    row_documents: tuple[tuple[int, ...], ...] | None = field(default=None, kw_only=True)
    origins: tuple[tuple[int, int], ...] | None = field(default=None, kw_only=True)
    groups: tuple[str, ...] | None = field(default=None, kw_only=True)
    after: int | None = field(default=None, kw_only=True)
    limit: int | None = field(default=None, kw_only=True)

    @property
    def n_documents(self) -> int:
        """Number of documents with tokens in the rows."""
        return len(self.rows) if self.row_documents is None else len(set(itertools.chain.from_iterable(self.row_documents)))

    @property
    def clusters(self) -> Int[np.ndarray, " row"]:
        """The cluster of every row, numbered in the order of their first rows.

        Rows that share a document are in one cluster, and so are rows linked by a chain of such rows: clusters are the connected
        components of rows and documents. Rows of different clusters have no document in common.
        """
        return np.arange(len(self.rows)) if self.row_documents is None else components(self.row_documents)

    def batches(self, batch_size: int) -> Iterator["Batch"]:
        """The rows in order, `batch_size` at a time; only the last batch can be smaller or padded."""
        for start in range(0, len(self.rows), batch_size):
            yield make_batch(self.rows[start : start + batch_size], self.bos, self.after)

    def targets(self) -> Int[np.ndarray, " prediction"]:
        """All prediction targets."""
        targets = np.concatenate([row[1:][answers(row, self.after)[1:]] for row in self.rows])
        return targets if self.bos is None else targets[targets != self.bos]

    def take(self, rows: Sequence[int]) -> "TokenSample":
        """The sample restricted to some rows, given by number."""
        chosen: dict[str, Any] = {
            name: None if values is None else tuple(values[i] for i in rows)
            for name in ("rows", "row_documents", "groups")
            for values in [getattr(self, name)]
        }
        return dataclasses.replace(self, **chosen, tokens=sum(map(self._size, chosen["rows"])))

    def _size(self, row: Int[np.ndarray, " pos"]) -> int:
        """Number of tokens of a row that count."""
        return int(((row != self.bos) & answers(row, self.after if self.split == "evaluate" else None)).sum())


def answers(ids: Int[np.ndarray, "... pos"], after: int | None) -> Bool[np.ndarray, "... pos"]:
    """The positions after the first token `after` of each row; all of them if it is None.

    >>> answers(np.array([0, 5, 3, 6, 3]), after=3).tolist()
    [False, False, False, True, True]
    """
    return np.ones(ids.shape, dtype=bool) if after is None else (np.cumsum(ids == after, axis=-1) - (ids == after)) > 0


@dataclass(frozen=True, eq=False)
class Batch:
    """The inputs of one forward pass, and the answers against which its outputs are scored.

    Attributes:
        inputs: token ids [batch, pos], or pixels [batch, channel, height, width].
        keep: positions that count in statistics: neither BOS nor another special token nor padding. For images, all count.
        real: positions that are not padding.
        asked: positions whose output is scored.
        answers: the correct answers there: a token id, or the label of the image.
        mask: attention mask, if the model would attend to the padding without one.
    """

    inputs: Shaped[Tensor, "batch ..."]
    keep: Bool[Tensor, "batch pos"]
    real: Bool[Tensor, "batch pos"]
    asked: Bool[Tensor, "batch pos"]
    answers: Int[Tensor, "batch pos"]
    mask: Bool[Tensor, "batch pos"] | None = None

    def to(self, device: str | torch.device) -> "Batch":
        """The same batch on another device."""
        moved: dict[str, Any] = {name: None if value is None else value.to(device) for name, value in vars(self).items()}
        return Batch(**moved)

    @property
    def size(self) -> int:
        """Number of tokens, or images, that count towards a budget."""
        return int(self.keep.sum())


def pad(rows: Sequence[np.ndarray], filling: int) -> tuple[Shaped[Tensor, "batch pos"], Bool[Tensor, "batch pos"]]:
    """Rows padded on the right to the longest, and a mask of the positions that are not padding."""
    filled = torch.full((len(rows), max(map(len, rows))), filling, dtype=torch.from_numpy(rows[0]).dtype)
    real = torch.zeros(filled.shape, dtype=torch.bool)
    for i, row in enumerate(rows):
        filled[i, : len(row)] = torch.from_numpy(row)
        real[i, : len(row)] = True
    return filled, real


def make_batch(rows: Sequence[np.ndarray], bos: int | None, after: int | None = None) -> Batch:
    """Batch of rows for a next-token model, padded on the right. With causal attention no kept position attends to padding."""
    ids, real = pad(rows, 0 if bos is None else bos)
    keep = real & (ids != bos) if bos is not None else real.clone()
    asked = torch.zeros_like(keep)
    asked[:, :-1] = (keep & torch.from_numpy(answers(ids.numpy(), after)))[:, 1:]
    return Batch(ids, keep, real, asked, ids.roll(-1, dims=1))


def components(row_documents: Sequence[Sequence[int]]) -> Int[np.ndarray, " row"]:
    """Connected components of rows and documents, numbered in the order of their first rows.

    >>> components([(0,), (1, 2), (3,), (2, 3)]).tolist()
    [0, 1, 1, 1]
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    n = len(row_documents)
    links = [(row, n + document) for row, documents in enumerate(row_documents) for document in documents]
    if not links:
        return np.arange(n)
    ends = np.array(links)
    size = int(ends.max()) + 1
    _, labels = connected_components(coo_array((np.ones(len(ends)), tuple(ends.T)), shape=(size, size)), directed=False)
    _, first, numbers = np.unique(labels[:n], return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[numbers]


NOBODY = -1
"""Replaces the document number at positions with BOS."""


@dataclass(frozen=True, eq=False)
class _Row:
    """Token ids, the document number of each, and the package of the documents."""

    ids: np.ndarray
    owners: np.ndarray
    package: str | None


def _rows(documents: Documents, context: int, bos: int | None, apart: bool) -> Iterator[_Row]:
    """Rows of one source; if documents have a limit, rows from each package in turn. Documents share no rows if `apart`."""
    whole = documents.limit is None
    streams = [
        _rows_of([[one] for one in read] if apart else [read] if whole else bundles(read, context, bos), context, bos, package)
        for package, read in documents.by_package()
    ]
    return itertools.chain.from_iterable(in_rounds(streams))


def _rows_of(
    bundles_of: Iterable[Iterable[Document]], context: int, bos: int | None, package: str | None
) -> Iterator[Iterator[_Row]]:
    """The rows of each bundle of documents; documents of different bundles share no rows."""
    for bundle in bundles_of:
        ids, numbers = itertools.tee(bundle)
        packed = pack((document.ids for document in ids), context, bos)
        owners = pack(([document.number] * len(document.ids) for document in numbers), context, None if bos is None else NOBODY)
        yield (_Row(*pair, package) for pair in zip(packed, owners, strict=True))


def bundles(documents: Iterable[Document], context: int, bos: int | None) -> Iterator[list[Document]]:
    """Documents that are packed into the same rows: several whole ones that fit one row, or one that is cut or longer than a row.

    Args:
        documents: in order of use.
        context: tokens per row, BOS included.
        bos: id placed before every document; None if the tokenizer has none.
    """
    mark = int(bos is not None)
    together: list[Document] = []
    length = 0
    for document in documents:
        size = mark + len(document.ids)
        if document.cut or size > context:
            yield [document]
            continue
        if length + size > context:
            yield together
            together, length = [], 0
        together.append(document)
        length += size
    if together:
        yield together


def sample_tokens(
    task: Task,
    split: Split,
    tokenizer: Any,
    tokens: int,
    context: int,
    seed: int = 0,
    *,
    per_document: PerDocument = "row",
    bos: int | None = None,
    uncounted: Sequence[int] | None = None,
) -> TokenSample:
    """The first `tokens` tokens of a part of a task: the same call always gives the same tokens.

    The next row of a mixture is taken from the source with the fewest tokens so far, so that all sources contribute equally
    to within one row; the sample ends when the shortest source does. The sample of a smaller budget is a prefix of that of a larger one.

    Args:
        task: what to sample.
        split: "collect" or "evaluate".
        tokenizer: a Hugging Face tokenizer.
        tokens: budget, BOS and padding not counted; in "evaluate", the number of prediction targets.
        context: tokens per row, BOS included.
        seed: of the document order and of the start positions in long documents; 0 keeps the original order, any other seed shuffles
            the documents of the split.
        per_document: maximum tokens per document: "row" for as many as fit one row, or a number. A longer document contributes this
            many from some position in it; documents are taken from all packages in turn. None takes whole documents in their order.
        bos: id that opens rows and documents; default is the tokenizer's BOS, else its end-of-text token, else none.
        uncounted: ids that do not count towards the budget at any position; default is `bos` alone.

    Raises:
        ValueError: less text than one row.
    """
    if tokens < 1:
        raise ValueError(f"tokens={tokens}: give at least 1")
    if context < 2:
        raise ValueError(f"context={context}: a prediction needs at least 2 tokens")
    bos = separator_of(tokenizer) if bos is None else bos
    room = context - (bos is not None)
    limit = room if per_document == "row" else per_document
    # if a row's first token does not count, as few as half of the tokens read may count
    documents = [Documents(source, split, Spelling(tokenizer, task.special_tokens), limit, 2 * tokens, seed) for source in task.sources]
    after = None if task.answers_after is None else _token(task.answers_after, tokenizer)
    streams = [_rows(each, context, bos, after is not None) for each in documents]
    rows: list[_Row] = []
    numbers: dict[tuple[int, int], int] = {}
    row_documents: list[tuple[int, ...]] = []
    given = [0] * len(streams)
    while (missing := tokens - sum(given)) > 0:
        turn = given.index(min(given))
        row = next(streams[turn], None)
        if row is None:
            break
        if uncounted is not None:
            counted = np.cumsum(~np.isin(row.ids, uncounted))
        elif after is not None and split == "evaluate":
            counted = np.cumsum((row.ids != bos) & answers(row.ids, after))
        else:
            counted = np.cumsum(row.ids != bos) if bos is not None else np.arange(len(row.ids)) + (split != "evaluate")
        length = min(len(row.ids), int(np.searchsorted(counted, missing)) + 1)
        if counted[length - 1]:
            owners = row.owners[:length]
            rows.append(_Row(row.ids[:length], owners, row.package))
            of = [(turn, int(number)) for number in dict.fromkeys(owners[owners != NOBODY].tolist())]
            row_documents.append(tuple(numbers.setdefault(each, len(numbers)) for each in of))
            given[turn] += int(counted[length - 1])
    ids = tuple(row.ids for row in rows)
    scored = b"" if after is None else f"after {after}".encode()
    packages = tuple(row.package for row in rows if row.package is not None)
    sample = TokenSample(
        *(task.name, split, ids, bos, tokens, sum(given)),
        tuple([number for source, number in numbers if source == i] for i in range(len(streams))),
        hashlib.sha256(b"".join([*(row.tobytes() for row in ids), scored])).hexdigest()[:16],
        row_documents=tuple(row_documents),
        origins=tuple(numbers),
        groups=packages if len(packages) == len(rows) else None,
        after=after,
        limit=limit,
    )
    if sample.tokens < tokens and (min(given) == 0 or sample.tokens < room):
        raise ValueError(
            f"task {task.name!r} has too little text to {split}: {_documents(sample)[0]} with {sample.tokens:,} tokens, less than one "
            f"context of {context} tokens{read_from(task)}. A task is split into a part for collecting statistics and one for evaluation. "
            "Give more text or a smaller context."
        )
    warn_of_few(sample)
    return sample


def _documents(sample: TokenSample) -> tuple[str, int]:
    documents, clusters = len(sample.origins or ()), len(np.unique(sample.clusters))
    joined = "" if clusters == documents else f" in {clusters} cluster{'s' * (clusters != 1)} (documents that share rows)"
    return f"{documents} documents{joined}", clusters


def warn_of_few(sample: TokenSample) -> None:
    """Warn of fewer tokens than were asked for, or of so few clusters that intervals are wide."""
    documents, clusters = _documents(sample)
    wide = f"; intervals over fewer than {FEW} are wide" if clusters > 1 else "; a single one has no standard error and no interval"
    wide, have, to = wide if clusters < FEW else "", f"{sample.tokens:,} tokens", f"to {sample.split}"
    if sample.tokens < sample.asked:
        most = "" if sample.limit is None else f", at most {sample.limit:,} of each (per_document=None takes whole documents)"
        less = f"has fewer tokens {to} than the {sample.asked:,} asked for: {documents} with {have}{most}; continuing with those"
        warn(f"task {sample.task!r} {less}{wide}")
    elif wide:
        warn(f"task {sample.task!r}: {have} {to} come from {documents}{wide}")


def _token(word: str, tokenizer: Any) -> int:
    """The id of the word that precedes answers."""
    ids = Spelling(tokenizer).ids(word)
    if len(ids) != 1:
        raise ValueError(f"answers_after={word!r} is {len(ids)} tokens of this tokenizer; give a word that is one")
    return ids[0]


def separator_of(tokenizer: Any) -> int | None:
    """The token that opens rows and documents: BOS, else end-of-text, else none."""
    return tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id


def warn_of_less(task: str, split: str, have: int, asked: int, what: str) -> None:
    """Warn that a task has less data than was asked for."""
    warn(f"task {task!r} has fewer {what} to {split} than the {asked:,} asked for: {have:,}; continuing with those")
