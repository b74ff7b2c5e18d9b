"""The overlap study: neuron sets of several tasks, in the trained model and in randomly initialised ones (METHODS 12)."""

import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial, reduce
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool
from torch import Tensor

from sepcap.checks import checked
from sepcap.models.loading.load import load_model
from sepcap.models.loading.untrained import untrained
from sepcap.models.sites import site_shape
from sepcap.selection.neurons import NeuronSet, how_many
from sepcap.selection.overlap import overlap
from sepcap.selection.score import Scores
from sepcap.statistics.moments import Statistics
from sepcap.studies.base.folder import Pieces, as_json, is_finished
from sepcap.studies.base.runner import study, study_folder
from sepcap.studies.base.seeds import bonferroni
from sepcap.studies.base.task_sets import NamedTasks, resolved, scores_of, statistics_of
from sepcap.studies.overlaps.config import OverlapConfig
from sepcap.studies.overlaps.result import COLUMNS, HEADS_AT, Overlap, scored, tensor_name
from sepcap.tasks.batches import TokenSample

__all__ = ["Overlap", "OverlapPlan", "measure_overlap", "plan_overlap", "run_overlap", "selected"]


@dataclass(frozen=True, eq=False)
class OverlapPlan:
    """The study with its samples, all checked; nothing is written yet, and no model is kept.

    Attributes:
        config, tasks: as requested.
        samples: seed -> name -> sample to collect from.
        resolved: the configuration as saved in the folder.
        shapes: site -> shape over the whole model.
        control: creates the randomly initialised model of a seed.
    """

    config: OverlapConfig
    tasks: NamedTasks
    samples: dict[int, dict[str, TokenSample]]
    resolved: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    control: Callable[[int], Any]

    @property
    def weights(self) -> tuple[str, ...]:
        """Kinds of models, the trained one first."""
        return ("trained", "random") if self.config.control else ("trained",)

    def folder(self, out: Path, weights: str, seed: int) -> Path:
        """Folder of the statistics of one repetition."""
        return out / "statistics" / f"{weights}-{seed}"

    def remaining(self, out: Path) -> int:
        """Number of tokens still to be run through models."""
        missing = [
            sample.tokens
            for weights in self.weights
            for seed, samples in self.samples.items()
            for i, sample in enumerate(samples.values())
            if not (self.folder(out, weights, seed) / f"{i}.safetensors").exists()
        ]
        return sum(missing)

    def cost(self) -> str:
        """The planned work and its cost, in one sentence."""
        c = self.config
        sites = ", ".join(f"{int(np.prod(shape)):,} {site} neurons" for site, shape in self.shapes.items())
        every = [sample for samples in self.samples.values() for sample in samples.values()]
        tokens = len(self.weights) * sum(sample.tokens for sample in every)
        bytes_ = len(self.weights) * len(every) * sum(int(np.prod(shape)) for shape in self.shapes.values()) * 56
        control = ", and as many in randomly initialised models" if c.control else ""
        return (
            f"{self.resolved['model']}: select {', '.join(f'{f:.3g}' for f in c.fractions)} of {sites} for {', '.join(self.tasks.names)} "
            f"against {self.tasks.retain_name}, by {c.importance}, in {len(c.seeds)} repetitions with other documents{control}; "
            f"{tokens / 1e6:.3g} M tokens through models, about {bytes_ / 1e6:.2g} MB on disk"
        )


def plan_overlap(model: Any, config: OverlapConfig) -> OverlapPlan:
    """Load tasks and tokens, and check that every selection is possible."""
    tasks = NamedTasks.of(config.tasks, config.retain)
    shapes = {site: site_shape(model, site) for site in scored(config.sites)}
    for site in config.sites:
        units = shapes[HEADS_AT][:2] if site == "heads" else shapes[site]
        for fraction in config.fractions:
            how_many(fraction, int(np.prod(units)), site)
    samples, shared = tasks.seed_samples(model, config, each_its_own=True)
    names = {"tasks": tasks.names, "retain": tasks.retain_name}
    made = resolved(model, config, names, {f"collect, seed {seed}": of_seed for seed, of_seed in samples.items()})
    made |= {"documents_shared": shared}
    return OverlapPlan(config, tasks, samples, made, shapes, untrained(model))


@study(OverlapConfig, loads=False)
@checked()
def measure_overlap(model: Any | None, config: OverlapConfig, *, out: str | Path | None = None, say: Callable[[str], Any]) -> Overlap:
    """Select the neurons of several tasks and compare every pair of sets, in the trained model and in randomly initialised ones.

    Every seed is one repetition with other documents, in the trained model and in one with other random weights. Every task is scored
    against its own documents of the retain task. Sets of all sizes use the same scores. With `out`, the statistics of every task are
    written before those of the next are collected: the same call resumes an interrupted one, and a finished study is read.

    Args:
        model: what `load_model` returns; default is to load `config.model`, which is then freed before the control is created.
        config: an `OverlapConfig`; its fields can also be given as keywords.
        out: folder of the study; without one, nothing is saved.
        progress: True announces the work and its cost and shows bars, False shows nothing; a function receives the announcements.

    Returns:
        Overlap with `.table`, `.totals()`, `.estimates()`, `.differences()`, `.neurons(task, fractions)`, `.summary()` and `.figure()`.

    Raises:
        ValueError: a share that selects nothing, tasks with the same data or name, too little text, fewer documents of the retain task
            than tasks.
        FileExistsError: the folder contains another configuration (the error names the differing fields).

    Source: METHODS section 12; [MOD].

    Example:
        >>> import sepcap
        >>> config = sepcap.OverlapConfig(tasks=("local-python", "local-cpp"), fractions=(0.02, 0.1), tokens=10_000)
        >>> sepcap.measure_overlap(model, config).figure("maps", measure="iou", fraction=0.1)  # doctest: +SKIP
    """
    load = partial(load_model, config.model) if model is None else lambda: model

    def announce(prepared: OverlapPlan, _model: Any, left: int) -> None:
        say(prepared.cost() if left else f"{out}: all statistics are collected; no model is run again")

    return run_overlap(load, config, out, announce)


def run_overlap(
    load: Callable[[], Any], config: OverlapConfig, out: str | Path | None, announce: Callable[[OverlapPlan, Any, int], None]
) -> Overlap:
    """`measure_overlap` with a model that is loaded here, so that it is freed before the control is created.

    Args:
        load: returns the model.
        config: the study.
        out: folder of the study, or None.
        announce: receives the plan, the model and the number of remaining tokens, before the work begins.
    """
    model = load()
    prepared = plan_overlap(model, config)
    with study_folder(out, Overlap, prepared.resolved) as pieces:
        announce(prepared, model, 0 if is_finished(pieces) else prepared.remaining(pieces.folder))
        if is_finished(pieces):
            return Overlap.load(pieces.folder)
        parts, tensors = [], {}
        for weights in prepared.weights:
            for seed in config.seeds:
                if weights == "random":
                    model = None
                    gc.collect()
                    if torch.cuda.is_available():
                        torch.cuda.empty_cache()
                    model = prepared.control(seed)
                scores, activity = _scores(prepared, model, pieces, weights, seed)
                documents = min(sample.n_documents for sample in prepared.samples[seed].values())
                parts.append(_table(config, scores, activity).assign(weights=weights, seed=seed, n_documents=documents))
                tensors |= {
                    tensor_name(weights, seed, task, site): values for task, of_task in scores.items() for site, values in of_task.items()
                }
    table = pd.concat(parts, ignore_index=True).reindex(columns=list(COLUMNS))
    result = Overlap(as_json({"study": Overlap.STUDY, **prepared.resolved}), {"overlap": table}, tensors)
    tables = {"estimates": result.estimates(), "differences": result.differences()}
    result = Overlap(result.config, {"overlap": table} | {name: found for name, found in tables.items() if len(found)}, tensors)
    return result if out is None else Overlap.load(result.save(out))


def _scores(prepared: OverlapPlan, model: Any, pieces: Pieces, weights: str, seed: int) -> tuple[dict[str, Scores], dict[str, Tensor]]:
    """The scores of every task, and the activity of every neuron: on the retain task, or on all tasks if there is none."""
    folder, tasks = prepared.folder(pieces.folder, weights, seed), prepared.tasks
    statistics = statistics_of(model, prepared.samples[seed], tuple(prepared.shapes), folder, prepared.config)
    names = tasks.names if tasks.retain is None else map(tasks.against, tasks.names)
    together = reduce(Statistics.merge, (statistics[name] for name in names))
    return scores_of(statistics, tasks, prepared.config.importance), {site: together[site].abs for site in prepared.shapes}


def selected(scores: Scores, site: str, fraction: float) -> Bool[Tensor, "layer unit"]:
    """Mask of the neurons of a site, or of the heads, with the highest scores; each head is one unit."""
    if site == "heads":
        return scores.top({"heads": fraction}).masks[HEADS_AT][..., 0]
    return scores.top({site: fraction}).masks[site].flatten(1)


def _table(config: OverlapConfig, scores: Mapping[str, Scores], activity: Mapping[str, Tensor]) -> pd.DataFrame:
    """All overlaps of one repetition."""
    parts = []
    for site in config.sites:
        # for heads and neurons, a set is a mask of units per layer, as for mlp neurons
        unit_activity = activity[HEADS_AT].mean(dim=-1) if site == "heads" else activity[site].flatten(1)
        for fraction in config.fractions:
            sets = {task: NeuronSet({"mlp": selected(of_task, site, fraction)}) for task, of_task in scores.items()}
            for first, second in combinations(sets, 2):
                where = {"site": site, "fraction": fraction, "first": first, "second": second}
                parts.append(overlap(sets[first], sets[second], matched={"mlp": unit_activity}).assign(**where))
    table = pd.concat(parts, ignore_index=True)
    return table.assign(
        share_of_second=(table["both"] / table["b"]).where(table["b"] > 0),
        log10_p_corrected=bonferroni(table["log10_p"]),
        log10_p_matched_corrected=bonferroni(table["log10_p_matched"]),
    )
