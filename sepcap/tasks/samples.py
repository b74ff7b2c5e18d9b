"""Samples of a task, in the form that each kind of model takes.

Next-token models take rows of tokens (`TokenSample`), masked language models the same rows with some tokens masked
(`MaskedSample`), image classifiers images (`ImageSample`). All give `Batch`es, so that later code does not depend on the kind.
"""

import dataclasses
import hashlib
import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from transformers import PreTrainedTokenizerBase

from sepcap.models.forward import positions_of
from sepcap.models.kinds import kind_of
from sepcap.tasks.batches import Batch, TokenSample, pad, sample_tokens, warn_of_few
from sepcap.tasks.documents import PerDocument
from sepcap.tasks.images import sample_images
from sepcap.tasks.task import Split, Task

KEPT = 2**25
"""Bytes of samples that are kept in memory: 32 MB. The samples that were not used for the longest time are dropped first."""

_LOCK = threading.Lock()

_DRAWN: OrderedDict[tuple[Any, ...] | None, TokenSample] = OrderedDict()
"""Samples of this process by everything that they depend on: a task that is collected or evaluated again is not read again."""

DEFAULT_CONTEXT = 512
"""Maximum tokens per row by default: longer rows cost more and change statistics little."""

MASKED_SHARE = 0.15
"""Share of a row's tokens that a masked language model predicts (METHODS 9)."""


def check_context(model: Any, context: int | None) -> int:
    """The tokens per row to use, within the model's context."""
    if not hasattr(model, "cfg"):
        raise TypeError(f"model is a {type(model).__name__}; give what sepcap.load_model returns")
    most = positions_of(model)
    context = context or min(most, DEFAULT_CONTEXT)
    if not 2 <= context <= most:
        raise ValueError(f"context={context}: this model sees at most {most} tokens; give 2 to {most}")
    return context


def sample_task(
    model: Any,
    task: Task,
    split: Split,
    budget: int,
    context: int | None = None,
    seed: int = 0,
    per_document: PerDocument = "row",
) -> TokenSample:
    """The first examples of a part of a task, in the form that the model takes: the same call always gives the same sample.

    Samples of texts are kept in memory, by the content of the task and of the tokenizer; the same call in this process reads nothing.

    Args:
        model: a hooked model.
        task: what to sample.
        split: "collect" or "evaluate".
        budget: tokens, or images for an image classifier.
        context: tokens per row; default is the model's context, at most 512.
        seed: of the document order and of the start positions in long documents; 0 keeps the original order. For a masked language
            model, also of the masking.
        per_document: maximum tokens per document: "row" for as many as fit one row, a number, or None for whole documents. An image
            is one document.

    Raises:
        ValueError: too little data, or a task of images for a language model and the reverse.
    """
    kind = kind_of(model)
    check_content(model, task)
    if task.answers_after is not None and kind != "causal":
        raise ValueError(f"task {task.name!r} scores answers (answers_after), but {model.cfg.model_name} does not predict next tokens")
    context = check_context(model, context)
    if kind == "images":
        config = model.original_model.config
        return sample_images(task, split, model.processor, budget, seed, channels=config.num_channels, classes=config.num_labels)
    draw = sample_masked if kind == "masked" else sample_tokens
    how = (split, model.tokenizer, budget, context, seed)
    key = _key(kind, task, model.tokenizer, split, budget, context, seed, per_document)
    with _LOCK:
        if (kept := _DRAWN.get(key)) is not None:
            _DRAWN.move_to_end(key)
    if kept is not None:
        warn_of_few(kept)
        return _copied(kept)
    sample = draw(task, *how, per_document=per_document)
    if key is not None and _size(sample) <= KEPT:
        with _LOCK:
            _DRAWN[key] = _copied(sample)
            while sum(map(_size, _DRAWN.values())) > KEPT:
                _DRAWN.popitem(last=False)
    return sample


def _size(sample: TokenSample) -> int:
    return sum(row.nbytes for row in sample.rows) + (sample.ordinary.nbytes if isinstance(sample, MaskedSample) else 0)


def _key(kind: str, task: Task, tokenizer: Any, *how: Any) -> tuple[Any, ...] | None:
    """Everything that a sample depends on; None if something of it cannot be told."""
    contents = [getattr(source, "content", None) for source in task.sources]
    spelled = getattr(tokenizer, "backend_tokenizer", None)
    own = all(type(source).__module__.startswith("sepcap.") for source in task.sources)
    if not own or None in contents or spelled is None or type(tokenizer).__call__ is not PreTrainedTokenizerBase.__call__:
        return None
    # the tokenizer itself, because it can be changed in place
    state = hashlib.sha256(spelled.to_str().encode()).hexdigest()
    special = (*_ends(tokenizer), tokenizer.pad_token_id, tokenizer.mask_token_id, *tokenizer.all_special_ids)
    special += (getattr(tokenizer, "split_special_tokens", None),)
    return kind, task.name, *contents, task.special_tokens, task.answers_after, type(tokenizer), state, special, *how


def _copied(sample: TokenSample) -> TokenSample:
    """The sample with arrays and lists of its own."""
    return dataclasses.replace(sample, rows=tuple(row.copy() for row in sample.rows), indices=tuple(map(list, sample.indices)))


def check_content(model: Any, task: Task) -> None:
    """Raise an error if a task consists of texts and the model takes images, or the reverse."""
    takes = "images" if kind_of(model) == "images" else "text"
    if task.content != takes:
        raise ValueError(f"task {task.name!r} is made of {task.content}, but {model.cfg.model_name} takes {takes}")


@dataclass(frozen=True, eq=False)
class MaskedSample(TokenSample):
    """Rows of a masked language model: beginning token, text, end token; documents are separated by an end token.

    Which tokens of a row are predicted, and what replaces them, depends only on the row and the seed, not on the batch,
    its position in the sample or the budget.

    Attributes:
        special: ids that are never predicted and do not count in statistics.
        mask: id of the mask token.
        padding: id that fills short rows.
        ordinary: ids from which a random token is drawn.
        seed: of the masking.
    """

    special: tuple[int, ...]
    mask: int
    padding: int
    ordinary: Int[np.ndarray, " token"]
    seed: int = 0

    def hidden(self, row: Int[np.ndarray, " pos"]) -> tuple[Int[np.ndarray, " pos"], Bool[np.ndarray, " pos"]]:
        """The model's input for a row, and the positions to predict.

        These are 15% of the row's tokens, rounded down or up so that the share is right on average over rows (but at least one), of
        which 80% become the mask token, 10% a random one and 10% are unchanged.
        """
        digest, own = hashlib.sha256(row.tobytes()).digest(), [self.seed] if self.seed else []
        rng, luck = (np.random.default_rng([*part, *own]) for part in (digest[:16], digest[16:]))
        free = np.flatnonzero(~np.isin(row, self.special))
        wanted = int(MASKED_SHARE * len(free) + luck.random())
        asked = rng.choice(free, max(1, wanted), replace=False)
        draw = rng.random(len(asked))
        seen, chosen = row.copy(), np.zeros(len(row), dtype=bool)
        seen[asked[draw < 0.8]] = self.mask
        others = asked[(draw >= 0.8) & (draw < 0.9)]
        seen[others] = rng.choice(self.ordinary, len(others))
        chosen[asked] = True
        return seen, chosen

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """The rows in order, `batch_size` at a time."""
        for start in range(0, len(self.rows), batch_size):
            rows = self.rows[start : start + batch_size]
            seen, chosen = zip(*map(self.hidden, rows), strict=True)
            inputs, real = pad(seen, self.padding)
            answers, _ = pad(rows, self.padding)
            asked, _ = pad(chosen, False)
            keep = real & ~torch.isin(answers, torch.tensor(self.special))
            yield Batch(inputs, keep, real, asked, answers, None if bool(real.all()) else real)

    def targets(self) -> Int[np.ndarray, " prediction"]:
        """All prediction targets."""
        return np.concatenate([row[self.hidden(row)[1]] for row in self.rows])

    def _size(self, row: Int[np.ndarray, " pos"]) -> int:
        return int((~np.isin(row, self.special)).sum())


def sample_masked(
    task: Task, split: Split, tokenizer: Any, tokens: int, context: int, seed: int = 0, per_document: PerDocument = "row"
) -> MaskedSample:
    """`sample_tokens` for a masked language model.

    Args:
        task: what to sample.
        split: "collect" or "evaluate".
        tokenizer: a Hugging Face tokenizer with a mask token.
        tokens: budget, special tokens not counted; in "evaluate" too, where 15% of them are predicted.
        context: tokens per row, beginning and end token included.
        seed: of the document order, of the start positions in long documents, and of the masking.
        per_document: maximum tokens per document: "row" for as many as fit one row, a number, or None for whole documents.
    """
    begin, end = (first if first is not None else second for first, second in _ends(tokenizer))
    if begin is None or end is None or tokenizer.mask_token_id is None:
        raise ValueError("the tokenizer of this masked language model has no beginning, end or mask token; is it the model's own?")
    if context < 4:
        raise ValueError(f"context={context}: a row of a masked language model needs at least 4 tokens")
    special = tuple(sorted({*tokenizer.all_special_ids, begin, end}))
    options: dict[str, Any] = {"per_document": per_document, "bos": begin, "uncounted": special}
    plain = sample_tokens(task, split, tokenizer, tokens, context - 1, seed, **options)

    def closed(row: Int[np.ndarray, " pos"]) -> Int[np.ndarray, " longer"]:
        row = np.append(row, end)
        row[1:][row[1:] == begin] = end
        return row

    ordinary = np.setdiff1d(np.arange(len(tokenizer)), special)
    padding = end if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    fields = {part.name: getattr(plain, part.name) for part in dataclasses.fields(plain)} | {"rows": tuple(map(closed, plain.rows))}
    if seed:  # the same rows with other tokens masked are another sample
        fields["fingerprint"] = hashlib.sha256(f"{plain.fingerprint} {seed}".encode()).hexdigest()[:16]
    ids = {"special": special, "mask": tokenizer.mask_token_id, "padding": padding, "ordinary": ordinary}
    return MaskedSample(**fields, **ids, seed=seed)


def _ends(tokenizer: Any) -> tuple[tuple[int | None, int | None], tuple[int | None, int | None]]:
    return (tokenizer.cls_token_id, tokenizer.bos_token_id), (tokenizer.sep_token_id, tokenizer.eos_token_id)
