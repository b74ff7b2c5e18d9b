"""Shared code of studies of several tasks: names, samples, statistics and scores per task, and accuracies after deletion."""

import dataclasses
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Float

from sepcap.errors import CorruptFile, warn
from sepcap.evaluation.next_token import evaluate_sample
from sepcap.evaluation.result import COUNTS, columns_of, ratio
from sepcap.interventions.deletion import delete
from sepcap.models.sites import site_shape
from sepcap.models.weights import WeightSnapshot
from sepcap.selection.names import gradients_for
from sepcap.selection.neurons import NeuronSet
from sepcap.selection.score import Scores, score
from sepcap.statistics.collect import collect_sample
from sepcap.statistics.intervals import Interval, bootstrap_interval, bootstrap_weights, ratio_se, summed_interval
from sepcap.statistics.moments import Statistics
from sepcap.studies.base.fields import OTHERS
from sepcap.studies.base.folder import Pieces
from sepcap.studies.base.provenance import made_with
from sepcap.studies.base.seed_samples import sample_seeds
from sepcap.tasks.batches import TokenSample
from sepcap.tasks.load import load_task
from sepcap.tasks.samples import check_context, sample_task
from sepcap.tasks.task import Split, Task

WHOLE = "whole"
"""Name of the unpruned model among the evaluations."""


@dataclass(frozen=True)
class NamedTasks:
    """The tasks of a study by name, and what each is scored against.

    Attributes:
        by_name: name -> task, in the order of the configuration.
        retain: the common retain task; None if each task is scored against all others together.
    """

    by_name: dict[str, Task]
    retain: Task | None

    @classmethod
    def of(cls, tasks: Sequence[Any], retain: Any = OTHERS) -> "NamedTasks":
        """Load the tasks of a configuration.

        Raises:
            ValueError: two tasks have the same name or the same data.
        """
        loaded = [load_task(task) for task in tasks]
        common = None if isinstance(retain, str) and retain == OTHERS else load_task(retain)
        every = [*loaded, *([] if common is None else [common])]
        for i, one in enumerate(every):
            for other in every[:i]:
                shared = {source.fingerprint for source in one.sources} & {source.fingerprint for source in other.sources}
                if one.fingerprint == other.fingerprint:
                    raise ValueError(f"tasks: {other.name!r} and {one.name!r} are the same data: there is nothing to compare")
                if one.name == other.name:
                    raise ValueError(f"tasks: two are called {one.name!r}; rename one with load_task(..., name=...)")
                if shared:
                    warn(
                        f"tasks: {other.name!r} and {one.name!r} share documents, so that what their neurons have "
                        "in common is not a finding; leave out the mixture or its parts"
                    )
        return cls({task.name: task for task in loaded}, common)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the tasks, without the retain task."""
        return tuple(self.by_name)

    @property
    def retain_name(self) -> str:
        """Name of the retain task, or "others"."""
        return OTHERS if self.retain is None else self.retain.name

    def samples(self, model: Any, split: Split, budget: int, config: Any) -> dict[str, TokenSample]:
        """Name -> sample as configured; includes the retain task if the split is "collect"."""
        tasks = self.by_name | ({self.retain.name: self.retain} if self.retain is not None and split == "collect" else {})
        how = {"context": config.context, "per_document": config.per_document}
        return {name: sample_task(model, task, split, budget, **how) for name, task in tasks.items()}

    def against(self, name: str) -> str:
        """Name of the retain sample that only one task is scored against."""
        return f"{self.retain_name} for {name}"

    def seed_samples(self, model: Any, config: Any, *, each_its_own: bool) -> tuple[dict[int, dict[str, TokenSample]], dict[str, float]]:
        """Samples to collect from for every seed, and the share of documents per task that two seeds have in common (`sample_seeds`).

        Args:
            model: a hooked model.
            config: configuration of the study.
            each_its_own: whether every task is scored against its own documents of the retain task. If two tasks were scored against the
                same documents, their noise would be in both scores, and the sets would share more neurons than random ones even if the
                tasks had nothing in common.

        Returns:
            Seed -> name -> sample, and name of the task -> share.
        """
        samples: dict[int, dict[str, TokenSample]] = {seed: {} for seed in config.seeds}
        shared: dict[str, float] = {}
        jobs = [(task, [name]) for name, task in self.by_name.items()]
        if self.retain is not None:
            jobs.append((self.retain, [self.against(name) for name in self.names] if each_its_own else [self.retain.name]))
        for task, names in jobs:
            found = sample_seeds(model, task, config, len(names))
            shared[task.name] = found.shared
            for seed, parts in found.by_seed.items():
                samples[seed] |= dict(zip(names, parts, strict=True))
        return samples, shared


def resolved(model: Any, config: Any, names: Mapping[str, Any], samples: Mapping[str, Mapping[str, TokenSample]]) -> dict[str, Any]:
    """The configuration of a study as stored in its folder: names in place of tasks, and everything that determines the numbers."""
    return dataclasses.asdict(dataclasses.replace(config, **names)) | {
        "context": check_context(model, config.context),
        **made_with(model),
        "samples": {split: {name: s.fingerprint for name, s in by_name.items()} for split, by_name in samples.items()},
        "documents": {split: {name: list(s.indices) for name, s in by_name.items()} for split, by_name in samples.items()},
        "n_documents": {split: {name: s.n_documents for name, s in by_name.items()} for split, by_name in samples.items()},
    }


def statistics_of(
    model: Any, samples: Mapping[str, TokenSample], sites: tuple[str, ...], folder: Path, config: Any
) -> dict[str, Statistics]:
    """Statistics of every task; each is written before the next is collected, and those in the folder are read."""
    found = {}
    for i, (name, sample) in enumerate(samples.items()):
        path = folder / f"{i}.safetensors"
        if not path.exists():
            collect_sample(model, sample, sites, batch_size=config.batch_size, gradients=gradients_for(config.importance)).save(path)
        found[name] = Statistics.load(path)
        if found[name].info.get("sample") != sample.fingerprint:
            raise CorruptFile(f"{path} holds other statistics than those of {name}; delete it, and the same call recreates it")
    return found


def scores_of(statistics: Mapping[str, Statistics], tasks: NamedTasks, importance: str) -> dict[str, Scores]:
    """The scores of every task, against the common retain task or against the tokens of all other tasks together (METHODS 5).

    If a task has its own documents of the retain task, these are used, see `NamedTasks.seed_samples`.
    """
    scores = {}
    for name in tasks.names:
        if tasks.retain is not None:
            against = statistics.get(tasks.against(name)) or statistics[tasks.retain.name]
        else:
            against = reduce(Statistics.merge, (statistics[other] for other in tasks.names if other != name))
        scores[name] = score(statistics[name], against, importance)
    return scores


LesionPlanKind = TypeVar("LesionPlanKind", bound="LesionPlan")


@dataclass(frozen=True, eq=False)
class LesionPlan:
    """Samples and checked inputs of a study that deletes neurons; nothing is written yet."""

    config: Any
    model: Any
    tasks: NamedTasks
    collect: dict[str, TokenSample]
    evaluate: dict[str, TokenSample]
    resolved: dict[str, Any]

    @classmethod
    def sampled(cls: type[LesionPlanKind], model: Any, config: Any, tasks: NamedTasks, names: Mapping[str, Any]) -> LesionPlanKind:
        """A plan with samples of all tasks; `names` are the tasks' names, by the fields of the configuration."""
        collect = tasks.samples(model, "collect", config.tokens, config)
        evaluate = tasks.samples(model, "evaluate", config.eval_tokens, config)
        made = resolved(model, config, names, {"collect": collect, "evaluate": evaluate})
        return cls(config, model, tasks, collect, evaluate, made)

    @property
    def neurons(self) -> int:
        """Neurons of the site."""
        return int(np.prod(site_shape(self.model, self.config.site)))


class Lesions:
    """Evaluate a model after deleting sets of its neurons; its weights are restored after every evaluation.

    Args:
        model: a hooked model.
        samples: name -> sample to evaluate on.
        sites: sites whose neurons are deleted.
        pieces: store of evaluations; each is written before the next one begins, and stored ones are read.
        batch_size: rows per forward pass.
    """

    def __init__(self, model: Any, samples: Mapping[str, TokenSample], sites: tuple[str, ...], pieces: Pieces, batch_size: int) -> None:
        self.model, self.samples, self.sites, self.pieces, self.batch_size = model, samples, sites, pieces, batch_size
        self.evaluated = 0
        self._snapshot = WeightSnapshot(model, sites)

    def whole(self) -> dict[str, Float[np.ndarray, "cluster count"]]:
        """Sums per document of the unpruned model, by task."""
        return self.without(WHOLE, NeuronSet.empty(self.model, self.sites))

    def without(self, name: str, neurons: NeuronSet, tasks: Sequence[str] | None = None) -> dict[str, Float[np.ndarray, "cluster count"]]:
        """Sums per document after deleting neurons, by task.

        Args:
            name: name of the piece; the same name must mean the same set.
            neurons: neurons to delete.
            tasks: names of the tasks to evaluate on; default all.
        """
        asked = tuple(self.samples if tasks is None else tasks)
        numbers = [list(self.samples).index(task) for task in asked]
        held = {i: self.pieces.get(f"sums/{name}-{i}") for i in numbers}
        left = [i for i, piece in held.items() if piece is None]
        try:
            if left and neurons:
                delete(self.model, neurons)
            for i in left:
                sample = self.samples[list(self.samples)[i]]
                sums = evaluate_sample(self.model, sample, batch_size=self.batch_size).per_cluster
                self.pieces.put(f"sums/{name}-{i}", {"sums": torch.from_numpy(sums)}, list(COUNTS))
                held[i] = self.pieces.get(f"sums/{name}-{i}")
                self.evaluated += 1
        finally:
            self._snapshot.restore()
        found = {task: held[i] for task, i in zip(asked, numbers, strict=True)}
        return {task: piece[0]["sums"].numpy() for task, piece in found.items() if piece is not None}


class Relative:
    """Accuracies on one task after deleting each of several sets of neurons, divided by that of the unpruned model.

    The documents of the sample are drawn with replacement, the same ones for every set and for the unpruned model, so that shared
    variation cancels (METHODS 9). The interval of a mean over two or more seeds covers the variation over texts and over seeds: Student's
    t, with the squared standard errors of both added. With one seed it covers only texts.

    Args:
        sums: name of the set -> sums per document; `WHOLE` must be among them.
        metric: an accuracy.
        sample: fingerprint of the evaluated sample. It seeds the bootstrap: the same sample always has the same draws, and two samples
            have independent ones.

    Raises:
        ValueError: an unpruned accuracy of 0.
    """

    def __init__(self, sums: Mapping[str, Float[np.ndarray, "cluster count"]], metric: str, sample: str) -> None:
        stacked = np.stack(list(sums.values()))
        self.index = {name: i for i, name in enumerate(sums)}
        self.n_clusters = stacked.shape[1]
        self.values = ratio(stacked, metric)
        whole = self.index[WHOLE]
        if not self.values[whole] > 0:
            raise ValueError(f"{metric} of the unpruned model is 0: no accuracy to lose")
        # all sets are evaluated on the same predictions, so that a ratio of accuracies is a ratio of hits
        self.hits, _ = columns_of(stacked, metric)
        seed = int.from_bytes(hashlib.sha256(sample.encode()).digest()[:8], "big")
        self.weights = bootstrap_weights(self.n_clusters, np.random.default_rng(seed))
        drawn = self.weights @ self.hits.T
        with np.errstate(divide="ignore", invalid="ignore"):
            self.replicas = drawn / drawn[:, [whole]]
        self.values = self.values / self.values[whole]

    def of(self, name: str) -> Interval:
        """The relative accuracy after deleting one set."""
        return self.interval(self.values[self.index[name]], self.replicas[:, self.index[name]])

    def mean(self, names: Sequence[str]) -> Interval:
        """The mean over several sets: the seeds of a control."""
        return self._over_seeds(names, self.hits[self._at(names)].mean(axis=0))

    def difference(self, name: str, others: Sequence[str]) -> Interval:
        """The relative accuracy after deleting one set, minus the mean over several."""
        return self._over_seeds(others, self.hits[self.index[name]] - self.hits[self._at(others)].mean(axis=0))

    def _at(self, names: Sequence[str]) -> list[int]:
        return [self.index[name] for name in names]

    def _over_seeds(self, names: Sequence[str], hits: Float[np.ndarray, " cluster"]) -> Interval:
        """Σ hits / Σ hits of the unpruned model; `hits` contain the mean over the seeds in `names`."""
        whole, of_seeds = self.hits[self.index[WHOLE]], self.values[self._at(names)]
        value = float(hits.sum() / whole.sum())
        if len(names) == 1:
            with np.errstate(divide="ignore", invalid="ignore"):
                return self.interval(value, (self.weights @ hits) / (self.weights @ whole))
        errors = ratio_se(hits, whole), float(of_seeds.std(ddof=1)) / math.sqrt(len(of_seeds))
        return Interval(value, *summed_interval(value, errors, (self.n_clusters, len(of_seeds))))

    def columns(self, name: str, randoms: Sequence[str]) -> dict[str, Any]:
        """Relative accuracy after deleting one set, its mean after deleting random sets, and their difference, as columns of a table.

        The interval of `relative` covers texts; `random_covers` states what those of `random` and `minus_random` cover. `random_seeds` is
        the number of seeds, `random_seeds_sd` the standard deviation over seeds alone, `n_clusters` the number of clusters of documents.
        """
        found = {"relative": self.of(name), "random": self.mean(randoms), "minus_random": self.difference(name, randoms)}
        columns: dict[str, Any] = {key: value for column, interval in found.items() for key, value in interval.columns(column).items()}
        of_seeds, several = self.values[self._at(randoms)], len(randoms) > 1
        columns |= {"n_clusters": self.n_clusters, "random_seeds": len(randoms)}
        columns |= {"random_covers": "texts and seeds" if several else "texts"}
        return columns | {"random_seeds_sd": float(of_seeds.std(ddof=1)) if several else float("nan")}

    def interval(self, value: float, replicas: Float[np.ndarray, " replica"]) -> Interval:
        """A value computed from the relative accuracies, with its 95% bootstrap interval."""
        return Interval(float(value), *bootstrap_interval(replicas, self.n_clusters))

    def along(self, names: Sequence[str]) -> tuple[Float[np.ndarray, " set"], Float[np.ndarray, "replica set"]]:
        """The relative accuracies after deleting each of several sets, and their bootstrap replicas."""
        at = self._at(names)
        return self.values[at], self.replicas[:, at]


def what_intervals_cover(seeds: int) -> str:
    """Which variation the intervals of `Relative.columns` cover, for a summary."""
    if seeds == 1:
        return "In brackets 95% intervals over texts only, also for random neurons: these have one seed, and other seeds can differ."
    return f"In brackets 95% intervals: over texts, and for random neurons over texts and {seeds} seeds."


def n_highest(scores: Scores, site: str, n: int) -> NeuronSet:
    """The n neurons of a site with the highest scores."""
    values = scores[site]
    return scores.top({site: n / values.numel()}) if n else NeuronSet({site: torch.zeros_like(values, dtype=torch.bool)})


def n_random(model: Any, site: str, n: int, total: int, seed: int) -> NeuronSet:
    """n neurons of a site drawn uniformly; a smaller n with the same seed gives a subset."""
    return NeuronSet.random(model, {site: n / total}, seed=seed) if n else NeuronSet.empty(model, site)


def scores_and_lesions(prepared: LesionPlan, pieces: Pieces) -> tuple[dict[str, Scores], Lesions]:
    """The scores of every task of a plan, and the evaluation of the tasks after deleting sets of neurons."""
    config, sites = prepared.config, (prepared.config.site,)
    statistics = statistics_of(prepared.model, prepared.collect, sites, pieces.folder / "statistics", config)
    lesions = Lesions(prepared.model, prepared.evaluate, sites, pieces, config.batch_size)
    return scores_of(statistics, prepared.tasks, config.importance), lesions
