"""Token sequences packed into rows of one context length.

A row is BOS followed by `context - 1` tokens of the stream of documents; where one document ends and
the next begins inside a row, another BOS stands between them. The tokens that count (towards a
budget, in statistics and as prediction targets) are those that are neither BOS nor padding. Where a
tokenizer has no BOS, the first token of a row follows nothing: it counts in statistics, but it is no target.
"""

import dataclasses
import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor

from sepcap.checks import warn
from sepcap.tasks.hub import Streamed, read_from
from sepcap.tasks.quiet import quietly
from sepcap.tasks.task import Source, Split, Task


def pack(documents: Iterable[list[int]], context: int, bos: int | None) -> Iterator[np.ndarray]:
    """Rows of `context` token ids from tokenised documents (without special tokens of their own).

    Args:
        documents: token ids per document, in the order in which they are to be used.
        context: tokens per row, BOS included.
        bos: id that marks the beginning of a row and of a document; None where the tokenizer has none.

    Returns:
        Full rows [context] of int64; the last one is shorter where the documents end. Empty documents leave no trace.

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
        tokens: tokens there are, BOS and padding not counted (in "evaluate": prediction targets); fewer than asked for
            where the task has no more.
        indices: documents read to fill the rows, per source.
        fingerprint: hash of all rows.
    """

    task: str
    split: str
    rows: tuple[np.ndarray, ...]
    bos: int | None
    asked: int
    tokens: int
    indices: tuple[list[int] | str, ...]
    fingerprint: str

    def batches(self, batch_size: int) -> Iterator["Batch"]:
        """The rows in order, `batch_size` at a time; only the last batch can be smaller or padded."""
        for start in range(0, len(self.rows), batch_size):
            yield make_batch(self.rows[start : start + batch_size], self.bos)

    def targets(self) -> Int[np.ndarray, " prediction"]:
        """All tokens that are predicted."""
        targets = np.concatenate([row[1:] for row in self.rows])
        return targets if self.bos is None else targets[targets != self.bos]

    def take(self, rows: Sequence[int]) -> "TokenSample":
        """Some of the rows, by number."""
        chosen = tuple(self.rows[i] for i in rows)
        return dataclasses.replace(self, rows=chosen, tokens=sum(int((row != self.bos).sum()) for row in chosen))


@dataclass(frozen=True, eq=False)
class Batch:
    """What a model takes in one pass, and what it is asked.

    Attributes:
        inputs: token ids [batch, pos], or pixels [batch, channel, height, width].
        keep: positions that count in statistics: neither BOS nor another special token nor padding. Images have all counted.
        real: positions that are not padding.
        asked: positions whose output is scored.
        answers: what is right there: a token id, or the label of the image.
        mask: attention mask, where the model would see the padding without one.
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
        """What it adds to a budget: tokens, or images."""
        return int(self.keep.sum())


def pad(rows: Sequence[np.ndarray], filling: int) -> tuple[Shaped[Tensor, "batch pos"], Bool[Tensor, "batch pos"]]:
    """Rows filled on the right to the longest, and which positions are theirs."""
    filled = torch.full((len(rows), max(map(len, rows))), filling, dtype=torch.from_numpy(rows[0]).dtype)
    real = torch.zeros(filled.shape, dtype=torch.bool)
    for i, row in enumerate(rows):
        filled[i, : len(row)] = torch.from_numpy(row)
        real[i, : len(row)] = True
    return filled, real


def make_batch(rows: Sequence[np.ndarray], bos: int | None) -> Batch:
    """Rows of a next-token model, padded on the right. Under causal attention no kept position sees the padding."""
    ids, real = pad(rows, 0 if bos is None else bos)
    keep = real & (ids != bos) if bos is not None else real.clone()
    asked = torch.zeros_like(keep)
    asked[:, :-1] = keep[:, 1:]
    return Batch(ids, keep, real, asked, ids.roll(-1, dims=1))


def sample_tokens(
    task: Task,
    split: Split,
    tokenizer: Any,
    tokens: int,
    context: int,
    seed: int = 0,
    *,
    bos: int | None = None,
    uncounted: Sequence[int] | None = None,
) -> TokenSample:
    """The first `tokens` tokens of a part of a task: the same call always gives the same tokens.

    The next row of a mixture comes from the source that has given the fewest tokens, so that all give the same number
    to within one row; the sample ends where the shortest of them does. A smaller budget gives a prefix of what a larger one gives.

    Args:
        task: what to sample.
        split: "collect" or "evaluate".
        tokenizer: a Hugging Face tokenizer.
        tokens: budget, BOS and padding not counted; in "evaluate", the number of prediction targets.
        context: tokens per row, BOS included.
        seed: order of the documents; 0 takes them as they come, any other shuffles those of the split.
        bos: id that opens rows and documents; default is the tokenizer's BOS, else its end-of-text token, else none.
        uncounted: ids that do not count towards the budget, wherever they stand; default is `bos` alone.

    Raises:
        ValueError: less text than one row.
    """
    if tokens < 1:
        raise ValueError(f"tokens={tokens}: give at least 1")
    if context < 2:
        raise ValueError(f"context={context}: a prediction needs at least 2 tokens")
    bos = separator_of(tokenizer) if bos is None else bos
    # where a row's first token does not count, as few as half of those that are read may do so
    spelling = Spelling(tokenizer, task.special_tokens)
    streams = [_Stream(source, split, spelling, 2 * tokens, context, bos, seed) for source in task.sources]
    rows: list[np.ndarray] = []
    given = [0] * len(streams)
    while (missing := tokens - sum(given)) > 0:
        turn = given.index(min(given))
        row = next(streams[turn], None)
        if row is None:
            break
        if uncounted is not None:
            counted = np.cumsum(~np.isin(row, uncounted))
        else:
            counted = np.cumsum(row != bos) if bos is not None else np.arange(len(row)) + (split != "evaluate")
        row = row[: int(np.searchsorted(counted, missing)) + 1]
        if counted[len(row) - 1]:
            rows.append(row)
            given[turn] += int(counted[len(row) - 1])
    have = sum(given)
    found = f"{sum(s.documents_used for s in streams)} documents with {have:,} tokens"
    if have < tokens and (min(given) == 0 or max(map(len, rows)) < context):
        raise ValueError(
            f"task {task.name!r} has too little text to {split}: {found}, less than one context of {context} tokens{read_from(task)}. "
            "A task is cut into a part to collect from and one to evaluate on. Give more text or a smaller context."
        )
    if have < tokens:
        warn(f"task {task.name!r} has fewer tokens to {split} than the {tokens:,} asked for: {found}; going on with those")
    digest = hashlib.sha256(b"".join(row.tobytes() for row in rows)).hexdigest()[:16]
    indices = tuple(stream.indices() for stream in streams)
    return TokenSample(task.name, split, tuple(rows), bos, tokens, have, indices, digest)


def separator_of(tokenizer: Any) -> int | None:
    """The token that opens rows and documents: BOS, else end-of-text, else none."""
    return tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id


AT_ONCE = 2**16
"""Characters of a document that are tokenised first; four times as many each time that more of it is needed."""

MARGIN = 64
"""Tokens before a cut that are not used: those directly before it can be others than in the whole text."""


@dataclass(frozen=True)
class Spelling:
    """How a text becomes tokens: without special tokens of its own, and no further into a long one than is needed (METHODS 9).

    Attributes:
        tokenizer: a Hugging Face tokenizer.
        special_tokens: whether what is spelled like a special token becomes one, or is text like any other.
    """

    tokenizer: Any
    special_tokens: bool = False

    def ids(self, texts: list[str]) -> list[list[int]]:
        """Token ids of whole texts."""
        options = {} if self.special_tokens else {"split_special_tokens": True}
        return self.tokenizer(texts, add_special_tokens=False, verbose=False, **options)["input_ids"]

    def beginning(self, text: str, needed: int, known: list[int] | None = None) -> list[int]:
        """The first tokens of a text: all, or at least `needed`, the same as those of the whole text.

        Args:
            text: of any length; of a long one at most 4·(`AT_ONCE` + characters of the tokens needed) are read in the last attempt.
            needed: tokens.
            known: those of its first `AT_ONCE` characters, where they are known.
        """
        characters = AT_ONCE
        ids = self.ids([text[:characters]])[0] if known is None else known
        while characters < len(text) and len(ids) - MARGIN < needed:
            characters *= 4
            ids = self.ids([text[:characters]])[0]
        return ids if characters >= len(text) else ids[: max(0, len(ids) - MARGIN)]

    @property
    def fingerprint(self) -> str:
        """Changes with all that decides about the tokens."""
        return hashlib.sha256(tokenizer_text(self.tokenizer) + f"{AT_ONCE} {self.special_tokens}".encode()).hexdigest()


def tokens_folder() -> str:
    """Where tokenised documents are kept: in the cache of `datasets`, never beside the data they are of."""
    from datasets import config

    return os.path.join(config.HF_DATASETS_CACHE, "sepcap-tokens")


class _Stream:
    """Packed rows of one source, tokenised a few hundred documents at a time; kept in a cache where the documents are files."""

    SLICE = 256

    def __init__(self, source: Source, split: Split, spelling: Spelling, needed: int, context: int, bos: int | None, seed: int) -> None:
        self._source, self._spelling, self._needed, self._seed = source, spelling, needed, seed
        self._split: Split = split
        self._order: list[int] | None = None
        self._streamed: list[int] = []
        self.documents_used = 0
        self._rows = pack(self._documents(), context, bos)

    def _slices(self) -> Iterator[Any]:
        if isinstance(self._source, Streamed):
            for part in self._source.slices(self._split, self._seed):
                self._streamed.extend(part["row"])
                yield part
            return
        dataset = self._source.documents(self._split)
        if self._seed:
            self._order = np.random.default_rng(self._seed).permutation(len(dataset)).tolist()
            key = hashlib.sha256(f"{dataset._fingerprint}order{self._seed}".encode()).hexdigest()[:16]
            dataset = dataset.select(self._order, new_fingerprint=key)
        for start in range(0, len(dataset), self.SLICE):
            yield dataset.select(range(start, min(start + self.SLICE, len(dataset))))

    def _documents(self) -> Iterator[list[int]]:
        for part in self._slices():
            texts = part["text"]
            for i, row in enumerate(self._encoded(part)):
                self.documents_used += 1
                ids = row["input_ids"]
                if row["cut"]:
                    ids = self._spelling.beginning(texts[i], self._needed, ids)
                self._needed = max(0, self._needed - len(ids))
                yield ids

    def _encoded(self, part: Any) -> Any:
        """Tokens of the first characters of every document, and whether it has more of them.

        Named after the texts themselves: `datasets` takes the fingerprint of saved data from a file beside them, whatever they hold.
        """
        if not part.cache_files:  # nothing on disk: no copy there either
            file, key = None, "in-memory"
        else:
            key = self._key(part)
            os.makedirs(tokens_folder(), exist_ok=True)
            file = os.path.join(tokens_folder(), f"{key}.arrow")
        options = {"batched": True, "batch_size": 64, "remove_columns": part.column_names}
        return quietly(part.map, self._encode, cache_file_name=file, new_fingerprint=key, **options)

    def _key(self, part: Any) -> str:
        digest = hashlib.sha256(self._spelling.fingerprint.encode())
        for text in part["text"]:
            digest.update(hashlib.sha256(text[: AT_ONCE + 1].encode()).digest())
        return digest.hexdigest()[:32]

    def _encode(self, rows: Mapping[str, Any]) -> dict[str, Any]:
        cut = [text[:AT_ONCE] for text in rows["text"]]
        return {"input_ids": self._spelling.ids(cut), "cut": [len(text) > AT_ONCE for text in rows["text"]]}

    def __next__(self) -> np.ndarray:
        return next(self._rows)

    def __iter__(self) -> Iterator[np.ndarray]:
        return self

    def indices(self) -> list[int] | str:
        if self._streamed:
            return self._streamed[: self.documents_used]
        if self._order is None:
            return self._source.indices(self._split, self.documents_used)
        used = self._order[: self.documents_used]
        rows = self._source.indices(self._split, len(self._order))
        return used if isinstance(rows, str) else [rows[i] for i in used]


def tokenizer_text(tokenizer: Any) -> bytes:
    """All that decides about how a tokenizer cuts texts, special tokens apart."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        return backend.to_str().encode()
    return repr((type(tokenizer).__name__, sorted(tokenizer.get_vocab().items()))).encode()
