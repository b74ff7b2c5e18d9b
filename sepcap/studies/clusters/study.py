"""The modularity study: concentration of task neurons in MoEfication clusters, with controls (METHODS 12)."""

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from sepcap.checks import checked
from sepcap.models.blocks.views import mlp_input_weights
from sepcap.models.loading.untrained import untrained
from sepcap.models.sites import n_layers, site_shape
from sepcap.progress import progress
from sepcap.selection.clusters import Clusters, check_clustering, cluster_layer, input_fingerprint, labels_by_index, seconds_per_start
from sepcap.selection.concentration import ACTIVITY, LAYER, measure_concentration
from sepcap.selection.matching import chosen_by_activity
from sepcap.selection.names import gradients_for
from sepcap.selection.neurons import NeuronSet, how_many
from sepcap.selection.score import score
from sepcap.statistics.collect import collect_sample
from sepcap.studies.base.folder import Pieces, study_config
from sepcap.studies.base.provenance import made_with
from sepcap.studies.base.runner import run_study, study
from sepcap.studies.base.task_sets import NamedTasks
from sepcap.studies.clusters.config import LEAST, MOST, SCORE, ModularityConfig
from sepcap.studies.clusters.result import Modularity, Weights
from sepcap.tasks.batches import TokenSample
from sepcap.tasks.load import load_task
from sepcap.tasks.samples import check_context


@dataclass(frozen=True, eq=False)
class ModularityPlan:
    """The study with its samples, all checked; nothing is written yet."""

    config: ModularityConfig
    model: Any
    tasks: tuple[str, ...]
    samples: dict[tuple[str, int], TokenSample]
    resolved: dict[str, Any]

    @property
    def cells(self) -> list[tuple[Weights, int]]:
        """Weights and seed of every repetition."""
        kinds: tuple[Weights, ...] = ("trained", "random") if self.config.control else ("trained",)
        return [(weights, seed) for weights in kinds for seed in self.config.seeds]

    def tokens(self) -> int:
        """Number of tokens run through the models, without BOS and padding."""
        return sum(sample.tokens for sample in self.samples.values()) * (1 + self.config.control)

    def cost(self) -> str:
        """The planned work and its cost, in one sentence."""
        c, (layers, width) = self.config, site_shape(self.model, "mlp")
        d_model = mlp_input_weights(self.model, 0).shape[1]
        minutes = len(self.cells) * layers * c.n_init * seconds_per_start(width, d_model, c.k) / 60
        control = " and one randomly initialised model per seed" if c.control else ""
        seeds = f"{len(c.seeds)} seed{'s' * (len(c.seeds) > 1)}"
        return (
            f"{self.model.cfg.model_name}{control}, {seeds}: cluster {layers} layers of {width:,} neurons × {d_model:,} into "
            f"{c.k} each, about {minutes:.2g} min on one core; select neurons for {', '.join(self.tasks)} against "
            f"{self.resolved['retain']}, by {c.importance}: {self.tokens() / 1e6:.3g} M tokens through the models"
        )


def plan_modularity(model: Any, config: ModularityConfig) -> ModularityPlan:
    """Load tasks and tokens, and check that every selection and clustering is possible."""
    for fraction in config.fractions:
        how_many(fraction, int(np.prod(site_shape(model, "mlp"))), "mlp")
    check_clustering(model, config.k)
    if config.control:
        untrained(model)  # an error must come now, not after the trained model is done
    context = check_context(model, config.context)
    retain = load_task(config.retain)
    named = NamedTasks.of(config.tasks, retain)
    by_seed, shared = named.seed_samples(model, config, each_its_own=False)
    samples = {(name, seed): sample for seed, of_seed in by_seed.items() for name, sample in of_seed.items()}
    resolved = dataclasses.asdict(dataclasses.replace(config, tasks=named.names, retain=retain.name)) | {
        "context": context,
        **made_with(model),
        "samples": {f"{name}-{seed}": sample.fingerprint for (name, seed), sample in samples.items()},
        "documents": {f"{name}-{seed}": list(sample.indices) for (name, seed), sample in samples.items()},
        "n_documents": {f"{name}-{seed}": sample.n_documents for (name, seed), sample in samples.items()},
        "documents_shared": shared,
    }
    return ModularityPlan(config, model, named.names, samples, resolved)


@study(ModularityConfig)
@checked()
def measure_modularity(model: Any, config: ModularityConfig, *, out: str | Path | None = None, say: Callable[[str], Any]) -> Modularity:
    """Select the neurons of every task, cluster the mlp neurons of every layer, and measure how concentrated task neurons are in clusters.

    Controls: random sets in the same clusters, with as many neurons in every layer, and also matched on activity on the retain task;
    sets chosen by that activity alone; clusters by index mod k; and a randomly initialised model of the same configuration (with its own
    clusters and task neurons). With `out`, the clusters of every layer and the neurons of every task are written before the next ones,
    the same call resumes an interrupted one, and a finished folder is read.

    Args:
        model: what `load_model` returns; default is to load `config.model`.
        config: a `ModularityConfig`; its fields can also be given as keywords.
        out: folder of the study.
        progress: True announces the work and its cost and shows bars, False shows nothing; a function receives the announcements.

    Returns:
        Modularity with `.summary()`, `.estimates()`, `.differences()` and `.figure()`.

    Raises:
        ImportError: without the extra `clusters`.
        ValueError: a share that selects no neuron, more clusters than neurons, too little text.
        FileExistsError: the folder contains something else (the error names the differing fields).

    Source: METHODS section 12; [MOE], [MOD].

    Example:
        >>> found = sepcap.measure_modularity(config=sepcap.ModularityConfig(seeds=(0, 1, 2)), out="runs/modules")  # doctest: +SKIP
        >>> print(*found.summary(), sep="\\n")  # doctest: +SKIP
    """
    prepared = plan_modularity(model, config)
    return run_study(Modularity, prepared.resolved, partial(_measure, prepared), out, prepared.cost, say)


def _measure(prepared: ModularityPlan, pieces: Pieces) -> Modularity:
    config = prepared.config
    tables, clustered, curves, chances, labels = [], [], [], [], {}
    work = len(prepared.cells) * (n_layers(prepared.model) + len(prepared.tasks))
    with progress(total=work, desc="modularity", unit="piece", leave=True) as bar:
        for weights, seed in prepared.cells:
            cell = _Cell(prepared, pieces, weights, seed, bar)
            moefied, chosen, activity = cell.clusters(), cell.neurons(), cell.activity()
            index = Clusters(labels_by_index(moefied.labels >= 0, config.k), config.k, moefied.fingerprint, {"method": "index"})
            labels[f"labels-{weights}-{seed}"] = moefied.labels.int()
            rows = {"layer": range(len(moefied.labels)), "inertia": moefied.info["inertia"], "fingerprint": moefied.fingerprint}
            clustered.append(pd.DataFrame({"weights": weights, "seed": seed} | rows))
            for (task, fraction), neurons in chosen.items():
                for clusters, how, null, members in _compared(moefied, index, neurons, activity):
                    matched = {"mlp": activity} if null == ACTIVITY else None
                    found = measure_concentration(members, clusters, draws=config.draws, seed=seed, matched=matched)
                    keys = {"weights": weights, "seed": seed, "clusters": clusters.info["method"], "chosen": how, "null": null}
                    keys |= {"task": task, "fraction": fraction}
                    tables.append(found.table.assign(**keys)[[*keys, *found.table.columns]])
                    curves.append(found.curve)
                    chances.append(found.chance)
    tensors = {"curves": torch.from_numpy(np.stack(curves)), "chance": torch.from_numpy(np.stack(chances))}
    found = {name: pd.concat(parts, ignore_index=True) for name, parts in (("areas", tables), ("clusters", clustered))}
    result = Modularity(study_config(pieces.folder, Modularity.STUDY), found, tensors | labels)
    estimated = {"estimates": result.estimates(("task",)), "differences": result.differences(("task",))}
    return dataclasses.replace(result, tables=estimated | found)


def _compared(
    moefied: Clusters, index: Clusters, neurons: NeuronSet, activity: Float[Tensor, "layer neuron"]
) -> Iterator[tuple[Clusters, str, str, NeuronSet]]:
    """For each measurement of one set: clusters, how neurons are chosen, what random sets are matched on, and the neurons."""
    for null in (LAYER, ACTIVITY):
        for clusters in (moefied, index):
            yield clusters, SCORE, null, neurons
    for how in (LEAST, MOST):
        mask = chosen_by_activity(activity, neurons.per_layer("mlp"), most=how == MOST)
        yield moefied, how, LAYER, NeuronSet({"mlp": mask})


@dataclass
class _Cell:
    """One repetition in progress: a model, its clusters, and the neurons of every task."""

    prepared: ModularityPlan
    pieces: Pieces
    weights: Weights
    seed: int
    bar: Any

    @cached_property
    def model(self) -> Any:
        return self.prepared.model if self.weights == "trained" else untrained(self.prepared.model)(self.seed)

    @cached_property
    def fingerprint(self) -> str:
        return input_fingerprint(self.model)

    def clusters(self) -> Clusters:
        c = self.prepared.config
        labels, inertia, note = [], [], {}
        for layer in range(n_layers(self.prepared.model)):
            name = f"clusters-{self.weights}-{self.seed}-{layer:03d}"
            if (done := self.pieces.get(name)) is None:
                found, squares = cluster_layer(self.model, layer, c.k, seed=self.seed, n_init=c.n_init)
                done = {"labels": found}, {"inertia": squares, "fingerprint": self.fingerprint}
                self.pieces.put(name, *done)
            tensors, note = done
            labels.append(tensors["labels"])
            inertia.append(note["inertia"])
            self.bar.update()
        return Clusters(torch.stack(labels), c.k, note["fingerprint"], {"method": "moefied", "inertia": inertia})

    def neurons(self) -> dict[tuple[str, float], NeuronSet]:
        """(task, fraction) -> its neurons."""
        return {
            (task, fraction): NeuronSet({"mlp": masks[str(fraction)]})
            for task, masks in self._masks()
            for fraction in self.prepared.config.fractions
        }

    def activity(self) -> Float[Tensor, "layer neuron"]:
        """Mean absolute activation of every neuron on the retain task."""
        name = f"activity-{self.weights}-{self.seed}"
        if (done := self.pieces.get(name)) is None:
            done = {"abs": self._retain["mlp"].abs}, None
            self.pieces.put(name, *done)
        return done[0]["abs"]

    def _masks(self) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
        c = self.prepared.config
        for i, task in enumerate(self.prepared.tasks):
            name = f"neurons-{self.weights}-{self.seed}-{i:03d}"
            if (done := self.pieces.get(name)) is None:
                scores = score(self._collect(task), self._retain, c.importance)
                done = {str(fraction): scores.top({"mlp": fraction}).masks["mlp"] for fraction in c.fractions}, {"task": task}
                self.pieces.put(name, *done)
            self.bar.update()
            yield task, done[0]

    @cached_property
    def _retain(self) -> Any:
        return self._collect(self.prepared.resolved["retain"])

    def _collect(self, task: str) -> Any:
        sample = self.prepared.samples[task, self.seed]
        config = self.prepared.config
        slopes = gradients_for(config.importance)
        return collect_sample(self.model, sample, ("mlp",), batch_size=config.batch_size, quiet=True, gradients=slopes)
