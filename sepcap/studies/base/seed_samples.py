"""Samples of a task for several seeds: without shared documents if there are enough, else with the share in common (METHODS 12)."""

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from sepcap.errors import warn
from sepcap.tasks.batches import FEW, TokenSample
from sepcap.tasks.samples import sample_task
from sepcap.tasks.task import Task


@dataclass(frozen=True)
class SeedSamples:
    """Samples to collect from, for every seed of a study.

    Attributes:
        by_seed: seed -> its samples, no two of which have a document in common.
        shared: share of their documents that two seeds have in common, mean over all pairs of seeds; 0 for one seed.
    """

    by_seed: dict[int, list[TokenSample]]
    shared: float


def sample_seeds(model: Any, task: Task, config: Any, parts: int = 1) -> SeedSamples:
    """Samples of a task for the seeds of a study.

    Documents are drawn once, with the first seed, and assigned to seeds at random: seeds are then independent repetitions. If a task has
    too few documents for that, every seed draws from all of them, and a warning states the share that two seeds have in common. Another
    states how many documents the sample with the fewest has, if they are few.

    Args:
        model: a hooked model.
        task: what to sample, for collection.
        config: configuration of the study, with tokens, seeds, context and per_document.
        parts: samples per seed.

    Raises:
        ValueError: too little text, or fewer documents than parts.
    """
    seeds, size = config.seeds, config.tokens * parts
    how: dict[str, Any] = {"context": config.context, "per_document": config.per_document}
    if len(seeds) > 1:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a shortage over all seeds is reported below
            whole = sample_task(model, task, "collect", size * len(seeds), seed=seeds[0], **how)
        if whole.tokens == size * len(seeds) and len(np.unique(whole.clusters)) >= parts * len(seeds):
            dealt = disjoint_parts(whole, parts * len(seeds), seed=seeds[0])
            _warn_of_fewest(dealt)
            return SeedSamples({seed: dealt[i * parts : (i + 1) * parts] for i, seed in enumerate(seeds)}, 0.0)
    each = {seed: sample_task(model, task, "collect", size, seed=seed, **how) for seed in seeds}
    shared = shared_documents(list(each.values()))
    if len(seeds) > 1:
        warn(
            f"task {task.name!r} has too few documents for {len(seeds)} seeds of {size:,} tokens without shared ones: any two seeds share "
            f"{shared:.0%} of their documents on average, so that intervals over seeds are too narrow. Give fewer tokens= or seeds="
        )
    if parts == 1:
        return SeedSamples({seed: [s] for seed, s in each.items()}, shared)
    split = {seed: disjoint_parts(s, parts) for seed, s in each.items()}
    _warn_of_fewest([part for of_seed in split.values() for part in of_seed])
    return SeedSamples(split, shared)


def _warn_of_fewest(parts: Sequence[TokenSample]) -> None:
    """Warn once for all parts, of the one with the fewest documents; they are of equal size only to within a document."""
    fewest = min(parts, key=lambda part: len(np.unique(part.clusters)))
    if (n := len(np.unique(fewest.clusters))) < FEW:
        whose = f"the smallest of {len(parts)} samples to {fewest.split} has {fewest.tokens:,} tokens"
        warn(f"task {fewest.task!r}: {whose} of {n} documents that share no row; results of fewer than {FEW} vary from sample to sample")


def shared_documents(samples: Sequence[TokenSample]) -> float:
    """Share of the documents of the smaller one of two samples that are in the other, mean over all pairs; 0 for one sample."""
    documents = [{(i, number) for i, source in enumerate(sample.indices) for number in source} for sample in samples]
    shares = [len(one & other) / min(len(one), len(other)) for one, other in combinations(documents, 2)]
    return float(np.mean(shares)) if shares else 0.0


def disjoint_parts(sample: TokenSample, n: int, seed: int | None = None) -> list[TokenSample]:
    """Split a sample into parts of about equal size in tokens, to within a document; no two parts share a document.

    Args:
        sample: the sample to split.
        n: number of parts.
        seed: assigns documents to parts at random; without one the parts are consecutive.

    Raises:
        ValueError: fewer documents than parts.
    """
    clusters = sample.clusters
    of_cluster = np.bincount(clusters, weights=[len(row) for row in sample.rows])
    order = np.arange(len(of_cluster)) if seed is None else np.random.default_rng(seed).permutation(len(of_cluster))
    part, dealt = np.empty(len(of_cluster), dtype=int), of_cluster[order]
    # a cluster is in the part in which its middle token is
    part[order] = (dealt.cumsum() - dealt / 2) * n // dealt.sum()
    rows = [np.flatnonzero(part[clusters] == i).tolist() for i in range(n)]
    if not all(rows):
        raise ValueError(
            f"task {sample.task!r}: {len(of_cluster)} documents in {sample.tokens:,} tokens cannot be split into {n} disjoint parts, "
            "one for every task scored against it. Give it more documents, more tokens= or a smaller context="
        )
    return [_part(sample, chosen, f"{i + 1}-of-{n}" + ("" if seed is None else f"-{seed}")) for i, chosen in enumerate(rows)]


def _part(sample: TokenSample, rows: list[int], name: str) -> TokenSample:
    found = sample.take(rows)
    if len(sample.indices) == 1:  # documents are numbered in the order of `indices`
        numbers = sorted({d for of_row in found.row_documents for d in of_row}) if found.row_documents is not None else rows
        found = dataclasses.replace(found, indices=([sample.indices[0][number] for number in numbers],))
    return dataclasses.replace(found, fingerprint=f"{sample.fingerprint}-{name}")


def what_seeds_share(shared: Mapping[str, float]) -> str:
    """Share of documents that seeds have in common, for a summary.

    Args:
        shared: task -> share of their documents that two seeds have in common.

    >>> what_seeds_share({"a": 0.0, "b": 0.43})
    'Seeds share 43% of their documents of b, so that intervals over seeds are too narrow.'
    """
    some = [f"{share:.0%} of their documents of {task}" for task, share in shared.items() if share > 0]
    return f"Seeds share {', '.join(some)}, so that intervals over seeds are too narrow." if some else "No two seeds share a document."
