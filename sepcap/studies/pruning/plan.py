"""Plan of a pruning run: everything is sampled and checked before anything is written; cost estimates (METHODS 10)."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np

from sepcap.evaluation.generation import prompt_of
from sepcap.evaluation.next_token import evaluate_sample
from sepcap.evaluation.result import COUNTS
from sepcap.interventions.deletion import check_output_biases
from sepcap.interventions.optimal import apart
from sepcap.interventions.rotation import check_rotation
from sepcap.interventions.trial import check_deletion
from sepcap.learning.fit import HELD_OUT, planned_tokens
from sepcap.learning.fitting import Fitting
from sepcap.models.kinds import inner, kind_of
from sepcap.models.sites import Population, bind, output_biases, populations
from sepcap.selection.neurons import amount_in_words, how_many
from sepcap.statistics.backward import check_differentiable
from sepcap.statistics.gradients import MEASURED, PASSES
from sepcap.statistics.histogram import BINS
from sepcap.studies.base.provenance import made_with
from sepcap.studies.pruning.check_run import check_run
from sepcap.studies.pruning.config import PruningConfig
from sepcap.studies.pruning.random_neurons.baselines import Matched, matched_with
from sepcap.tasks.batches import TokenSample
from sepcap.tasks.load import load_task
from sepcap.tasks.samples import check_context, sample_task
from sepcap.tasks.task import Split

T = TypeVar("T")

RECORD_BYTES = 3_000
"""Estimated size of the record of a step, the headers of its two tensor files and its rows of the table."""

RUN_BYTES = 15_000
"""Estimated size of configuration, log and the frame of the table."""


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """Everything a run needs, sampled and checked before the first step; nothing is written yet."""

    config: PruningConfig
    model: Any
    populations: dict[str, Population]
    collect: dict[str, TokenSample]
    evaluate: dict[str, TokenSample]
    resolved: dict[str, Any]
    matched: Matched | None = None
    """The run whose neurons a baseline is matched with."""
    known: dict[Any, Any] = dataclasses.field(default_factory=dict)
    """Cache shared by the runs of a comparison: samples, and measurements on the unpruned model."""

    def once(self, what: tuple[Any, ...], make: Callable[[], T]) -> T:
        """Return a cached value, or compute and cache it."""
        if what not in self.known:
            self.known[what] = make()
        return self.known[what]

    def tokens(self) -> int:
        """Tokens processed by the model in the whole run, BOS and padding not counted.

        The statistics of step 0 are used in step 1 too; with `recollect`, every later step collects its own.
        """
        right = self.collected * (self.config.positions == "correct")
        learned = planned_tokens(self.collected, fitting_of(self.config)) if self.config.importance == "learned" else 0
        evaluated = sum(s.tokens for s in self.evaluate.values()) * (self.config.steps + 1)
        return self.collected + right + self.again + learned + evaluated

    def work(self) -> int:
        """The same, with every further pass that gradients need counted as a forward pass (METHODS 19)."""
        return self.tokens() + more_passes(self.config) * (self.collected + self.again)

    @property
    def again(self) -> int:
        """Tokens from which later steps collect statistics."""
        return (self.config.steps - 1) * self.recollected if self.config.recollect else 0

    def cost(self) -> str:
        """The work of the run and its cost, in one sentence."""
        c, m = self.config, self.model
        neurons = {site: population.size for site, population in self.populations.items()}
        parameters = sum(p.numel() for p in inner(m).parameters())
        extras = {"rotation": c.rotation, "offset": c.offset, **c.contrasted}
        right = ["from positions that the unpruned model predicts right"] * (c.positions == "correct")
        drawn = f"{c.importance}, matched {c.baseline} with {c.matched}" if self.matched else c.importance
        how = ", ".join([f"by {drawn}", *(f"{name} {value}" for name, value in extras.items() if value != "none"), *right])
        return (
            f"{m.cfg.model_name} ({parameters / 1e6:.3g} M parameters, {', '.join(f'{n:,} {s} neurons' for s, n in neurons.items())}): "
            f"forget {self.resolved['forget']}, retain {self.resolved['retain']}, {c.pace.words(amount_in_words)}, {how}; "
            f"{self.work() / 1e6:.3g} M tokens through the model{', counted forward' * bool(more_passes(c))}, "
            f"about {self.disk() / 1e6:.2g} MB on disk"
        )

    @property
    def collected(self) -> int:
        """Tokens of one collection on both tasks."""
        return sum(s.tokens for s in self.collect.values())

    @property
    def recollected(self) -> int:
        """Tokens of one collection at a later step."""
        return sum(self.collect[role].tokens for role in self.config.collected_roles)

    def disk(self) -> int:
        """Bytes of the finished run, to within a third: statistics, and per step masks, sums per row and a record."""
        neurons = sum(population.size for population in self.populations.values())
        rows = sum(len(s.rows) for s in self.evaluate.values())
        slopes = 8 * len(MEASURED[self.config.gradients[0]]) if self.config.gradients else 0
        if "snip" in self.config.gradients:  # a number for every weight that a neuron reads and writes with
            slopes = 8 * 2 * (self.model.cfg.d_model + 1)
        statistics = sum(neurons * (6 * 8 + 2 * 4 + slopes + (4 * BINS + 16) * self.config.histogram(role)) for role in self.collect)
        step = neurons + rows * len(COUNTS) * 8 + RECORD_BYTES
        if self.config.offset != "none":
            step += sum(bias.nbytes for bias in output_biases(self.populations.values()).values())
        rotation = 0
        if self.config.rotation != "none":
            layers, heads, d_head = bind(self.model, "attn_value").shape
            rotation = layers * (2 * heads * d_head * (d_head + 1) + self.model.cfg.d_model) * 8
        if self.config.positions == "correct":
            statistics += sum(len(s.rows) * max(map(len, s.rows)) for s in self.collect.values())
        return statistics + rotation + (self.config.steps + 1) * step + RUN_BYTES


def plan(model: Any, config: PruningConfig, known: dict[Any, Any] | None = None) -> Plan:
    """Load tasks and tokens, and check that every step is possible.

    Args:
        model: what `load_model` returns.
        config: configuration of the run.
        known: cache of the plan of a run that differs only in direction, importance, baseline and seed, so that nothing is sampled or
            measured twice.
    """
    known = {} if known is None else known
    if not isinstance(config, PruningConfig):
        raise TypeError(f"config is a {type(config).__name__}; give a sepcap.PruningConfig")
    tasks = {"forget": load_task(config.forget), "retain": load_task(config.retain)}
    if tasks["forget"].fingerprint == tasks["retain"].fingerprint:
        raise ValueError(f"forget and retain are the same data ({tasks['forget'].name}): there is nothing to compare")
    if tasks["forget"].name == tasks["retain"].name:
        # two files with the same name: tables and figures must distinguish them
        tasks = {role: dataclasses.replace(task, name=f"{task.name}-{task.fingerprint[:6]}") for role, task in tasks.items()}
    bound = populations(model, config.sites)
    if config.importance == "learned":
        check_differentiable(model)
    for site, population in bound.items():
        check_deletion(population)
        shape = population.shape
        for name, fraction in config.fractions.items():
            if (name == site and name != "heads") or (name == "heads" and site == "attn_pre_out"):
                layers = 1 if config.per_layer else shape[0]
                of_layer = int(np.prod(shape[1:2] if name == "heads" else shape[1:]))
                total, of = layers * of_layer, "of a layer" if config.per_layer else ""
                if config.schedule:
                    taken = sum(how_many(config.pace.at(n)[name], total, name, of) for n in config.pace.steps_of(name))
                    if taken > total:
                        raise ValueError(f"schedule: its steps prune {taken:,} {name}, more than there are: {total:,} {of or name}")
                elif how_many(fraction, total, name, of) * config.steps > total:
                    raise ValueError(
                        f"fractions[{name!r}]={fraction} in {config.steps} steps prunes more than there are: {total:,} {of or name}. "
                        f"At most {total // how_many(fraction, total, name, of)} steps, or {total // config.steps} a step."
                    )
    if config.rotation != "none":
        check_rotation(model, config.rotation)
    if config.offset != "none":
        check_output_biases(bound.values())
    matched = None
    if config.matched is not None:
        matched = matched_with(config)
        check_run(matched.run)
    context = check_context(model, config.context)
    budgets: dict[Split, int] = {"collect": config.tokens, "evaluate": config.eval_tokens}
    samples: dict[Split, dict[str, TokenSample]] = {split: {} for split in budgets}
    for split, budget in budgets.items():
        for role in config.unpruned_roles if split == "collect" else tasks:
            task, seed = tasks[role], config.seed if split == "collect" else 0
            key = ("sample", split, task.name, task.fingerprint, seed)
            if key not in known:
                known[key] = sample_task(model, task, split, budget, context, seed, config.per_document)
            samples[split][role] = known[key]
    if config.importance == "learned":
        for sample in samples["collect"].values():
            apart(sample, HELD_OUT)  # before anything is written
    resolved = dataclasses.asdict(dataclasses.replace(config, forget=tasks["forget"].name, retain=tasks["retain"].name))
    for name in ("contrast", "lam", "q"):
        del resolved[name]
    resolved |= config.contrasted
    if config.importance != "random":
        del resolved["baseline"]  # other importances have no baseline
    if not config.schedule:
        del resolved["schedule"]
    if config.positions == "all":
        del resolved["positions"]
    if config.importance != "learned":
        del resolved["learning_steps"]
    if matched is None:
        del resolved["matched"]
    else:
        resolved["matched_neurons"] = matched.digest
    resolved |= {
        "context": context,
        **made_with(model),
        "task_fingerprints": {role: task.fingerprint for role, task in tasks.items()},
        "samples": {split: {role: s.fingerprint for role, s in by_role.items()} for split, by_role in samples.items()},
        "documents": {split: {role: list(s.indices) for role, s in by_role.items()} for split, by_role in samples.items()},
        "n_documents": {split: {role: s.n_documents for role, s in by_role.items()} for split, by_role in samples.items()},
        "tokens_found": {split: {role: s.tokens for role, s in by_role.items()} for split, by_role in samples.items()},
    }
    if kind_of(model) == "causal":
        resolved["prompts"] = {role: prompt_of(sample, model.tokenizer) for role, sample in samples["evaluate"].items()}
    if matched is not None and matched.run.config["model_fingerprint"] != resolved["model_fingerprint"]:
        raise ValueError(f"matched={config.matched!r}: that run was made with a model of other weights than {model.cfg.model_name} has")
    return Plan(config, model, bound, samples["collect"], samples["evaluate"], resolved, matched, known)


def more_passes(config: PruningConfig) -> int:
    """Cost of the gradients of one collection, in forward passes over its texts."""
    every = len(config.sites) if "ig" in config.gradients else 1  # a path of its own for every site
    return sum(PASSES[name] - 1 for name in config.gradients) * every


def fitting_of(config: PruningConfig) -> Fitting:
    """How an order is learned."""
    return Fitting(steps=config.learning_steps, batch_size=config.batch_size, seed=config.seed)


def tokens_per_second(prepared: Plan) -> float:
    """Tokens per second of an evaluation pass on this machine, from one batch after a warm-up batch."""
    sample = next(iter(prepared.evaluate.values()))
    few = sample.take(range(min(len(sample.rows), prepared.config.batch_size)))
    evaluate_sample(prepared.model, few, batch_size=prepared.config.batch_size, quiet=True)
    started = time.perf_counter()
    evaluate_sample(prepared.model, few, batch_size=prepared.config.batch_size, quiet=True)
    return few.tokens / (time.perf_counter() - started)
