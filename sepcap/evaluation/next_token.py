"""Evaluation: top-k accuracies, cross-entropy and perplexity of next tokens, masked tokens or image labels (METHODS 9)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sepcap.checks import FROM_0, checked
from sepcap.evaluation.result import COUNTS, Evaluation
from sepcap.evaluation.unembedded import MISS, ranks_and_losses, wide
from sepcap.models.blocks.unembedding import read_or_logits
from sepcap.models.forward import device_of, measuring, output_in_place
from sepcap.progress import progress
from sepcap.statistics.collect import BATCH_SIZE, halving_batches
from sepcap.storage import load_tensors
from sepcap.tasks.batches import Batch, TokenSample
from sepcap.tasks.documents import PerDocument
from sepcap.tasks.load import load_task
from sepcap.tasks.samples import sample_task
from sepcap.workers.engines import Engine
from sepcap.workers.shards import in_shards

AT_ONCE = 2**20
"""Most logits that are ranked at once: 4 MB beside those of the batch, or one row, if that has more."""


@checked(gpus_per_run=FROM_0)
def evaluate(
    model: Any,
    task: Any,
    *,
    tokens: int = 100_000,
    batch_size: int = BATCH_SIZE,
    context: int | None = None,
    seed: int = 0,
    per_document: PerDocument = "row",
    workers: int | None = None,
    engine: Engine = "processes",
    load: Mapping[str, Any] | None = None,
    threads: int = 1,
    gpus_per_run: float | None = None,
) -> Evaluation:
    """Measure accuracy and cross-entropy of predictions on the evaluation part of a task (METHODS 9).

    Every token that is neither BOS nor padding is a target. For a masked language model 15% of the tokens are hidden (80% of them
    replaced by the mask token, 10% by random tokens, 10% unchanged), and only these are scored. An image classifier predicts one
    label per image, and the skip50 metrics leave out no label. At most one batch of logits is in memory.

    Args:
        model: what `load_model` returns, pruned or ablated or neither.
        task: a task name, a path, a `datasets.Dataset`, a list of strings, or a Task.
        tokens: number of targets; number of tokens for a masked language model, of images for an image classifier.
        batch_size: rows per forward pass; halved, with a warning, when memory runs out.
        context: tokens per row; default is the model's context, at most 512.
        seed: sets the order of the documents, the positions of excerpts of long ones and, for a masked language model, which tokens are
            hidden; 0 keeps the original order of the documents.
        per_document: maximum number of tokens of one document: "row" (as many as fit in one row), a number, or None for whole documents.
        workers: cut the rows into eight shards and give them to so many workers; `model` is then a name or a folder, which each of them
            loads. The bits are those of one pass with as many threads.
        engine, load, threads, gpus_per_run: where workers are, what they load the model with, threads and GPUs of each, as for
            `sepcap.sweep`.

    Returns:
        Evaluation with `top1`, `top10`, `skip50_top1`, `skip50_top10`, `loss`, `perplexity`, and `se(metric)`.

    Example:
        >>> sepcap.evaluate(model, "local-prose", tokens=20_000).top1  # doctest: +SKIP
    """
    if workers is not None:
        options = {"tokens": tokens, "batch_size": batch_size, "context": context, "seed": seed, "per_document": per_document}
        options |= {"task": str(task) if isinstance(task, Path) else task}
        where: dict[str, Any] = {"workers": workers, "engine": engine, "load": load, "threads": threads}
        where["gpus_per_run"] = gpus_per_run
        return in_shards("evaluate", "evaluation.shard.EvaluateShards", model, options, _put_together, **where)
    sample = sample_task(model, load_task(task), "evaluate", tokens, context, seed, per_document)
    return evaluate_sample(model, sample, batch_size=batch_size)


def _put_together(files: list[Path], outcomes: list[dict[str, Any]]) -> Evaluation:
    """The evaluation of all rows from the sums of every shard."""
    rows = np.concatenate([load_tensors(file, "shard", ("rows",))[0]["rows"].numpy() for file in files])
    whole = outcomes[0]
    groups = None if whole["groups"] is None else tuple(whole["groups"])
    return Evaluation(whole["task"], rows, tuple(whole["skip"]), whole["info"], np.array(whole["clusters"]), groups)


def evaluate_sample(
    model: Any, sample: TokenSample, *, batch_size: int = BATCH_SIZE, quiet: bool = False, frequent: Mapping[int, int] | None = None
) -> Evaluation:
    """`evaluate` on tokens that are already sampled; `frequent` are the targets that skip50 leaves out, by default those of the sample."""
    frequent = most_frequent_targets(sample) if frequent is None else frequent
    skip = tuple(frequent)

    def one_pass(size: int) -> np.ndarray:
        skip_ids = torch.tensor(skip, dtype=torch.long, device=device_of(model))
        parts = []
        what = f"evaluate {sample.task}"
        bar = progress(total=sample.tokens, desc=what, unit="tok", unit_scale=True, quiet=quiet)
        with measuring(model), bar:
            for batch in sample.batches(size):
                parts.append(evaluate_batch(model, batch.to(device_of(model)), skip_ids).cpu().numpy())
                bar.update(batch.size if sample.after is None else int(batch.asked.sum()))
        return np.concatenate(parts)

    info = evaluated_info(model, sample, frequent)
    return Evaluation(sample.task, halving_batches(one_pass, batch_size), skip, info, **clusters_of(sample))


def evaluated_info(model: Any, sample: TokenSample, frequent: Mapping[int, int]) -> dict[str, Any]:
    """What an evaluation stores of its sample."""
    return {
        "skip_counts": list(frequent.values()),
        "model": str(model.cfg.model_name),
        "asked": sample.asked,
        "tokens": sample.tokens,
        "sample": sample.fingerprint,
        "documents": list(sample.indices),
        "n_documents": sample.n_documents,
    }


def clusters_of(sample: TokenSample) -> dict[str, Any]:
    """The document and the package of every row of a sample, as arguments of `Evaluation`."""
    return {"clusters": sample.clusters, "groups": sample.groups}


def most_frequent_targets(sample: TokenSample, k: int = 50) -> dict[int, int]:
    """The k most frequent target tokens of a sample and their counts; in case of ties the smaller id first."""
    ids, counts = np.unique(sample.targets(), return_counts=True)
    first = np.lexsort((ids, -counts))[:k]
    return dict(zip(ids[first].tolist(), counts[first].tolist(), strict=True))


@torch.inference_mode()
def evaluate_batch(model: Any, batch: Batch, skip_ids: Int[Tensor, " k"]) -> Float[Tensor, "batch count"]:
    """Sums of every row of a batch, in the order of `COUNTS`."""
    with output_in_place(model):
        unembedding, output = read_or_logits(model, batch.inputs, batch.mask)
    answers, asked, skip_ids = (x.to(output.device) for x in (batch.answers, batch.asked, skip_ids))
    if unembedding is None:
        return _sums_of_logits(output, answers, asked, skip_ids)
    row, pos = asked.nonzero(as_tuple=True)
    targets = answers[row, pos]
    columns = _columns(*ranks_and_losses(unembedding, output[row, pos], targets), targets, asked[row, pos], skip_ids)
    sums = columns.new_zeros(*asked.shape, len(COUNTS))
    sums[row.to(sums.device), pos.to(sums.device)] = columns
    return sums.sum(dim=1)


def _sums_of_logits(
    logits: Float[Tensor, "batch pos out"],
    every_answer: Int[Tensor, "batch pos"],
    every_asked: Bool[Tensor, "batch pos"],
    skip_ids: Int[Tensor, " k"],
) -> Float[Tensor, "batch count"]:
    if logits.shape[1] == 1:  # images: one prediction each, so all at once
        return counts(logits[:, 0], every_answer[:, 0], every_asked[:, 0], skip_ids)
    # of a small model many rows at once: one row has few numbers, and the arithmetic would cost less than the calls
    size = max(1, AT_ONCE // logits[0].numel())
    scratch = torch.empty((min(size, len(logits)) * logits.shape[1], logits.shape[2]), dtype=wide(logits.dtype), device=logits.device)
    sums = []
    for start in range(0, len(logits), size):
        rows, answers, asked = (x[start : start + size] for x in (logits, every_answer, every_asked))
        # for a masked model few positions are scored
        kept = asked | (2 * asked.sum(dim=1, keepdim=True) >= asked.shape[1])
        many = kept.sum(dim=1).tolist()
        rows, answers, asked = (x.flatten(0, 1) if sum(many) == kept.numel() else x[kept] for x in (rows, answers, asked))
        found = counts(rows, answers, asked, skip_ids, scratch[: sum(many)])
        sums += [row.sum(dim=0) for row in found.split(many)]
    return torch.stack(sums)


def counts(
    logits: Float[Tensor, "pos vocab"],
    answers: Int[Tensor, " pos"],
    asked: Bool[Tensor, " pos"],
    skip_ids: Int[Tensor, " k"],
    scratch: Float[Tensor, "pos vocab"] | None = None,
) -> Float[Tensor, "pos count"]:
    """Contribution of every position to the sums of `COUNTS`."""
    return _columns(*rank_and_loss(logits, answers, scratch), answers, asked, skip_ids)


def _columns(
    ranks: Int[Tensor, " pos"],
    tied: Int[Tensor, " pos"],
    losses: Float[Tensor, " pos"],
    answers: Int[Tensor, " pos"],
    asked: Bool[Tensor, " pos"],
    skip_ids: Int[Tensor, " k"],
) -> Float[Tensor, "pos count"]:
    rare = asked & ~torch.isin(answers, skip_ids)
    first, tenth = (hits(ranks, tied, k) for k in (1, 10))
    columns = (asked, asked * first, asked * tenth, rare, rare * first, rare * tenth, torch.where(asked, losses, 0))
    if losses.device.type == "mps":  # which has no float64
        columns = [column.cpu() for column in columns]
    return torch.stack([column.double() for column in columns], dim=1)


def rank_and_loss(
    logits: Float[Tensor, "pos vocab"], targets: Int[Tensor, " pos"], scratch: Float[Tensor, "pos vocab"] | None = None
) -> tuple[Int[Tensor, " pos"], Int[Tensor, " pos"], Float[Tensor, " pos"]]:
    """Rank of every target (0 is best), the number of tokens tied with it, and the target's cross-entropy in nats.

    The rank is the number of other tokens whose logit is at least the target's. One comparison gives every top-k. Half-precision
    logits have few digits, so that many are equal: only there are the tokens tied with the target counted, including the target.
    In float32 that number is 1, and ties count against the model: a model that gives every token the same logit has no hits.
    If the target's logit is not finite or another one is NaN, the rank is `MISS`.
    `scratch` is memory for as many logits: allocating it every time would cost more than the arithmetic.
    """
    half = logits.dtype.itemsize == 2
    logits = logits.to(wide(logits.dtype))
    scratch = torch.empty_like(logits) if scratch is None else scratch
    target_logits = logits.gather(1, targets[:, None])
    # comparing into a float buffer: summing booleans is four times slower on a CPU, and floats count exactly to 2^24
    ranks = torch.ge(logits, target_logits, out=scratch).sum(dim=1).long() - 1
    tied = torch.eq(logits, target_logits, out=scratch).sum(dim=1).long() if half else torch.ones_like(ranks)
    losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    # NaN compares false with everything and would rank first
    broken = ~torch.isfinite(target_logits[:, 0]) | losses.isnan()
    return torch.where(broken, MISS, ranks), torch.where(broken, 1, tied), losses


def hits(ranks: Int[Tensor, " pos"], tied: Int[Tensor, " pos"], k: int) -> Float[Tensor, " pos"]:
    """Probability that a target is in the top k if ties are ordered at random: for k = 1, each of two tied best tokens counts 1/2."""
    better = ranks - tied + 1
    return (k - better).clamp_min(0).minimum(tied) / tied
