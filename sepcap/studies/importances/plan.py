"""Plan of a comparison of importances: texts, scores that the model allows, and the cost (METHODS 19)."""

import dataclasses
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from sepcap.compiled.load import CompiledModel, load_compiled
from sepcap.evaluation.next_token import evaluate_sample
from sepcap.interventions.trial import check_deletion
from sepcap.models.loading.load import load_model
from sepcap.models.loading.untrained import untrained
from sepcap.models.sites import populations
from sepcap.statistics.backward import check_differentiable
from sepcap.statistics.collect import collect_sample
from sepcap.statistics.gradients import PASSES
from sepcap.studies.base.seed_samples import sample_seeds
from sepcap.studies.base.task_sets import resolved
from sepcap.studies.base.text import counted
from sepcap.studies.importances.config import ABS, LABELLED, LEARNED, RANDOM, ImportanceComparisonConfig, collected_with, in_direction
from sepcap.studies.importances.measures import ROLES, random_scores
from sepcap.studies.pruning.config import DIRECTIONS, Direction
from sepcap.tasks.batches import TokenSample
from sepcap.tasks.load import load_task
from sepcap.tasks.samples import sample_task

REVERSED = {"forget": "retain", "retain": "forget"}

PRUNED_FIRST = ("retain", "shared", "unused", "forget")
"""Labels of a compiled model, those pruned first at the end."""

MOST_PASSES = 10
"""Scores that cost more are not pruned iteratively: they would be collected anew at every step."""


@dataclass(frozen=True, eq=False)
class Plan:
    """All inputs, sampled and checked before anything is written.

    Attributes:
        config: with tasks in place of their names, so that they are read once.
        model: a hooked model.
        compiled: the compiled model, if it is one.
        calibration: seed -> role -> texts from which scores are computed.
        choice: role -> collection texts on which the best scores are chosen.
        evaluate: role -> evaluation texts of the trajectories.
        scores: the scores that the model allows, without random and learned.
        resolved: the configuration to store.
        control: makes the model with random weights of a seed; None if there is no control.
    """

    config: ImportanceComparisonConfig
    model: Any
    compiled: CompiledModel | None
    calibration: dict[int, dict[str, TokenSample]]
    choice: dict[str, TokenSample]
    evaluate: dict[str, TokenSample]
    scores: tuple[str, ...]
    resolved: dict[str, Any]
    control: Callable[[int], Any] | None

    @property
    def weights(self) -> tuple[str, ...]:
        """ "trained" and, with a control, "untrained"."""
        return ("trained", "untrained") if self.control is not None else ("trained",)

    def named(self, site: str) -> tuple[str, ...]:
        """Fixed scores of a site."""
        return tuple(name for name in self.scores if site == "mlp" or name.partition("-")[0] != "freq")

    def ordered(self, site: str) -> tuple[str, ...]:
        """All orders of a site that have a trajectory."""
        known = (LABELLED,) if self.compiled is not None else ()
        return (*self.named(site), *(name for name in (RANDOM, LEARNED) if name in self.resolved["scores"]), *known)

    def labelled(self, direction: Direction) -> CompiledModel:
        """The compiled model, its labels swapped in the reverse direction."""
        assert self.compiled is not None
        if direction == DIRECTIONS[0]:
            return self.compiled
        labels = {REVERSED.get(name, name): neurons for name, neurons in self.compiled.labels.items()}
        return dataclasses.replace(self.compiled, labels=labels)

    def by_labels(self, site: str, direction: Direction) -> Float[np.ndarray, "layer *neuron"]:
        """The order that the labels give: neurons of the forget program, unused, shared, of the retain program; at random within each."""
        labels = self.labelled(direction).labels
        rank = np.sum([i * labels[label].masks[site].numpy() for i, label in enumerate(PRUNED_FIRST)], axis=0)
        return rank + random_scores(rank.shape, 0, self.config.seed)

    def cost_of(self, name: str) -> int:
        """Cost of a fixed score in forward passes over the calibration texts."""
        return 0 if name == RANDOM else PASSES.get(collected_with(name), 1)

    def texts(self, direction: Direction, of: Mapping[str, TokenSample]) -> dict[str, TokenSample]:
        """Role in a direction -> texts."""
        return dict(zip(ROLES, in_direction(direction, *(of[role] for role in ROLES)), strict=True))

    def candidates(self, site: str) -> list[str]:
        """Scores that can be chosen for iterative pruning."""
        return [name for name in self.named(site) if name != ABS and self.cost_of(name) <= MOST_PASSES]

    def tokens(self) -> dict[str, float]:
        """Tokens through the model, by part; an upper limit for single ablations, because values that cannot change are not recomputed."""
        c = self.config
        kinds = {(collected_with(name), site if collected_with(name) == "ig" else "") for site in c.sites for name in self.named(site)}
        collected = sum(PASSES.get(kind, 1) for kind, _ in kinds) * sum(s.tokens for of in self.calibration.values() for s in of.values())
        sizes = self.resolved["neurons"]
        ablated = sum(min(size, c.sample or size) for size in sizes.values()) * 2 * c.effect_tokens
        evaluated, chosen = (sum(s.tokens for s in of.values()) for of in (self.evaluate, self.choice))
        one_shot = sum(len(self.ordered(site)) + (len(c.seeds) - 1) * (RANDOM in self.ordered(site)) for site in c.sites)
        found: dict[str, float] = {
            "scores": collected * len(self.weights),
            "single ablations": ablated * len(self.weights),
            "one-shot": one_shot * 2 * c.steps * evaluated,
        }
        if c.best:
            runs = (1 + c.best) * 2 * len(c.seeds) * len(c.sites)
            a_run = c.steps * 2 * (2 * c.tokens) + (c.steps + 1) * evaluated
            found["choice"] = sum(len(self.candidates(site)) for site in c.sites) * 2 * c.steps * chosen
            found["iterative"] = runs * a_run
        if LEARNED in self.resolved["scores"]:
            found["learned"] = 2 * len(c.sites) * (4 * c.learn_steps * 2_048 + 50 * chosen)
        return found

    def cost(self) -> str:
        """The planned work and its cost, from the measured rate of one batch."""
        c, parts = self.config, self.tokens()
        sites = ", ".join(f"{n:,} {site} neurons" for site, n in self.resolved["neurons"].items())
        each = "all" if c.sample is None else f"{c.sample:,} of them at random"
        said = ", ".join(f"{name} {tokens / 1e6:.3g} M" for name, tokens in parts.items())
        rate = _rate(self.model, next(iter(self.evaluate.values())), c.batch_size)
        return (
            f"{self.resolved['model']} ({sites}; {each} ablated alone): {counted(len(self.resolved['scores']), 'score')}, forget "
            f"{self.resolved['forget']} and retain {self.resolved['retain']} and the reverse, {counted(len(c.seeds), 'seed')}"
            f"{', and random weights' if self.control else ''}; tokens through the model: {said}; at most "
            f"{sum(parts.values()) / rate / 60:,.0f} minutes at the {rate:,.0f} tokens per second just measured here"
        )


def _rate(model: Any, sample: TokenSample, batch_size: int) -> float:
    few = sample.take(range(min(len(sample.rows), batch_size)))
    evaluate_sample(model, few, batch_size=batch_size, quiet=True)  # warms up
    started = time.perf_counter()
    evaluate_sample(model, few, batch_size=batch_size, quiet=True)
    return sum(map(len, few.rows)) / (time.perf_counter() - started)


def plan_comparison(model: Any, config: ImportanceComparisonConfig, say: Callable[[str], Any]) -> Plan:
    """Load the model, tasks and texts, and leave out the default scores that the model does not allow."""
    compiled = None
    if config.compiled is not None:
        if model is not None:
            raise ValueError(f"compiled={config.compiled!r} and a model are both given: the compiled model has its own; give one of them")
        compiled = load_compiled(config.compiled)
        model = compiled.model
        config = dataclasses.replace(config, model=compiled.name, **{role: compiled.tasks[role] for role in ROLES})
    else:
        model = load_model(config.model if model is None else model)
    tasks = {role: load_task(getattr(config, role)) for role in ROLES}
    if tasks["forget"].fingerprint == tasks["retain"].fingerprint:
        raise ValueError(f"forget and retain are the same data ({tasks['forget'].name}): there is nothing to compare")
    config = dataclasses.replace(config, **tasks)
    bound = populations(model, config.sites)
    for population in bound.values():
        check_deletion(population)
    sizes = {site: population.size for site, population in bound.items()}
    for site, size in sizes.items():
        if config.sample is not None and config.sample > size:
            raise ValueError(f"sample={config.sample}: site {site!r} has {size:,} neurons; give at most that, or leave it out for all")
    control = untrained(model) if config.control else None
    calibration: dict[int, dict[str, TokenSample]] = {seed: {} for seed in config.seeds}
    shared = {}
    for role, task in tasks.items():
        found = sample_seeds(model, task, config)
        shared[task.name] = found.shared
        for seed, (sample,) in found.by_seed.items():
            calibration[seed][role] = sample
    choice = {role: _first(sample, config.choice_tokens) for role, sample in calibration[config.seeds[-1]].items()}
    how = {"context": config.context, "per_document": config.per_document}
    evaluate = {role: sample_task(model, task, "evaluate", config.eval_tokens, **how) for role, task in tasks.items()}
    allowed = _allowed(model, config, calibration[config.seeds[0]]["forget"], say)
    samples = {f"collect, seed {seed}": of_seed for seed, of_seed in calibration.items()} | {"choice": choice, "evaluate": evaluate}
    named = {role: task.name for role, task in tasks.items()}
    made = resolved(model, dataclasses.replace(config, **named), {}, samples)
    made |= {"scores": list(allowed), "neurons": sizes, "documents_shared": shared}
    if compiled is not None:
        made["model"] = compiled.name
    fixed = tuple(name for name in allowed if name not in (RANDOM, LEARNED))
    return Plan(config, model, compiled, calibration, choice, evaluate, fixed, made, control)


def _first(sample: TokenSample, tokens: int) -> TokenSample:
    """The first rows with so many tokens, at least one row."""
    before = np.cumsum([0, *map(len, sample.rows[:-1])])
    return sample.take(np.flatnonzero(before < tokens).tolist())


def _allowed(model: Any, config: ImportanceComparisonConfig, sample: TokenSample, say: Callable[[str], Any]) -> tuple[str, ...]:
    """The scores that the model allows; one that it refuses is left out if it is a default, and an error if it was asked for."""
    refused: dict[str, Exception] = {}
    few = sample.take([0])
    for kind in dict.fromkeys(collected_with(name) for name in config.names if name not in (RANDOM, LEARNED)):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of one row, with one point of integration
                collect_sample(model, few, config.sites, gradients=(kind,) if kind else (), k=1, batch_size=1, quiet=True)
        except (NotImplementedError, ValueError) as error:
            refused[kind] = error
    if LEARNED in config.names:
        try:
            check_differentiable(model)
        except ValueError as error:
            refused[LEARNED] = error
    kept = []
    for name in config.names:
        kind = name if name in (RANDOM, LEARNED) else collected_with(name)
        if kind not in refused and not (name == "freq" and "mlp" not in config.sites):
            kept.append(name)
        elif kind in refused and name in config.scores:
            raise refused[kind]
    for kind, error in refused.items():
        say(f"scores by {kind or 'activations'} are left out: {error}")
    return tuple(kept)
