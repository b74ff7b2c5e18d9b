"""The lists of frequent targets that the skip50 metrics leave out, per tokenizer and task, kept for the next time (METHODS 9).

A list is the count of the targets of an evaluation sample. To count them takes milliseconds; to read and tokenise the texts takes
seconds or minutes, and an evaluation has to do that anyway. So evaluations count, and what is kept here is for looking at a list.
"""

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

from sepcap.checks import checked
from sepcap.evaluation.next_token import frequent_table, most_frequent_targets
from sepcap.models.kinds import kind_of
from sepcap.storage import write_atomically
from sepcap.tasks import local
from sepcap.tasks.batches import sample_tokens
from sepcap.tasks.documents import PerDocument, tokenizer_text
from sepcap.tasks.hub import VERSION as HUB_VERSION
from sepcap.tasks.samples import DEFAULT_CONTEXT, check_context, sample_task
from sepcap.tasks.task import Task, load_task

log = logging.getLogger(__name__)

FORMAT = 3
"""Raised when lists are made in another way, so that no old one is taken."""


@checked()
def skip50(model: object, task: Any, *, tokens: int = 100_000, context: int | None = None, per_document: PerDocument = "row") -> Any:
    """The 50 most frequent targets of a task's evaluation part: what `evaluate` with the same arguments leaves out as skip50.

    Made once per tokenizer, task, `tokens` and `context`, and kept in a file under the cache folder of Hugging Face (`HF_HOME`):
    then neither texts are tokenised nor the model run. Where that folder cannot be written or a file in it is damaged, the list is
    made anew.

    Args:
        model: what `load_model` returns, or a Hugging Face tokenizer (taken as that of a causal language model).
        task: a task name, a path, a `datasets.Dataset`, a list of strings, or a Task.
        tokens: size of the evaluation sample, in predictions.
        context: tokens per row; default is the model's context, at most 512.
        per_document: most tokens of one document: "row" for what fits one row, a number, or None for whole documents.

    Returns:
        DataFrame of token (id), text and count, the most frequent first; of two equal ones the smaller id first.

    Raises:
        ValueError: an image classifier or a task of images (no label is left out), an unknown task, too little text.

    Source: [SP] section 3; METHODS section 9.

    Example:
        >>> sepcap.skip50(model, "local-code").head(3)  # doctest: +SKIP
    """
    owner: Any = model
    is_model = hasattr(owner, "cfg")
    tokenizer = owner.tokenizer if is_model else owner
    kind = kind_of(model) if is_model else "causal"
    task = load_task(task)
    if kind == "images" or task.content == "images":
        raise ValueError("skip50 lists are of tokens: of images no label is left out")
    if not callable(tokenizer) or not hasattr(tokenizer, "decode"):
        raise TypeError(f"model is a {type(model).__name__}; give what sepcap.load_model returns, or a tokenizer")
    context = check_context(model, context) if is_model else context or DEFAULT_CONTEXT
    path = _path(tokenizer, kind, task, (tokens, context, per_document))
    counts = None if path is None else _read(path)
    if counts is None:
        sample = (
            sample_task(model, task, "evaluate", tokens, context, per_document=per_document)
            if is_model
            else sample_tokens(task, "evaluate", tokenizer, tokens, context, per_document=per_document)
        )
        counts = most_frequent_targets(sample)
        if path is not None:
            _keep(path, counts)
    return frequent_table(tokenizer, counts)


def cache_folder() -> Path:
    """Where lists are kept: beside the caches of models and data sets, so that one setting moves all."""
    from huggingface_hub import constants

    return Path(constants.HF_HOME) / "sepcap" / "skip50"


def _path(tokenizer: Any, kind: str, task: Task, size: tuple[int, int, PerDocument]) -> Path | None:
    """The file of a list, named after all that decides about it; None where the state of the data cannot be known."""
    if any(getattr(source, "commit", "") is None for source in task.sources):
        return None
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id, sorted(tokenizer.all_special_ids)]
    versions = [FORMAT, local.VERSION, HUB_VERSION]
    what = [hashlib.sha256(tokenizer_text(tokenizer)).hexdigest(), special, kind, task.fingerprint, "evaluate", *size, versions]
    return cache_folder() / f"{hashlib.sha256(json.dumps(what).encode()).hexdigest()[:32]}.json"


def _read(path: Path) -> dict[int, int] | None:
    try:
        pairs = json.loads(path.read_bytes())
        counts = {int(token): int(count) for token, count in pairs}
    except (OSError, ValueError, TypeError):
        return None
    in_order = list(counts.values()) == sorted(counts.values(), reverse=True)
    return counts if 0 < len(counts) <= 50 and in_order and min(counts.values()) > 0 else None


def _keep(path: Path, counts: dict[int, int]) -> None:
    try:
        write_atomically(path, json.dumps(list(counts.items())).encode())
    except OSError as error:
        log.info("the skip50 list is not kept: %s", error)
