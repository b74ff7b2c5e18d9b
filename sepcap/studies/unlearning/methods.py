"""The methods of unlearning, each a generator that changes a model in place and stops at every point of its trajectory (METHODS 22)."""

import math
from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from sepcap.interventions.deletion import delete
from sepcap.learning.finetune import Term, fine_tuned
from sepcap.learning.fitting import Tuning
from sepcap.learning.unlearn import NegativePreference, TaskVector, reference_of
from sepcap.models.sites import populations
from sepcap.selection.names import gradients_for
from sepcap.selection.neurons import NeuronSet, how_many
from sepcap.selection.score import score
from sepcap.statistics.collect import collect_sample
from sepcap.studies.unlearning.config import TRAINED, UnlearningComparisonConfig
from sepcap.studies.unlearning.plan import UnlearningPlan


@dataclass(frozen=True)
class Walk:
    """One trajectory.

    Attributes:
        method: name of the method.
        seed: of the order of the texts, or of random neurons.
        lr: learning rate; None if the method has none.
        beta: inverse temperature of negative preference optimisation, or None.
    """

    method: str
    seed: int
    lr: float | None = None
    beta: float | None = None

    @property
    def name(self) -> str:
        """Name of its piece."""
        setting = [repr(value) for value in (self.lr, self.beta) if value is not None]
        return "-".join([self.method, str(self.seed), *setting])


def tried(config: UnlearningComparisonConfig, method: str) -> list[Walk]:
    """The trajectories of a method with the first seed, from which its learning rate is chosen."""
    lrs = config.lrs if method in TRAINED else (None,)
    betas = config.betas if method == "npo" else (None,)
    return [Walk(method, config.seeds[0], lr, beta) for lr, beta in product(lrs, betas)]


def seeds_of(config: UnlearningComparisonConfig, method: str) -> tuple[int, ...]:
    """Seeds of a method: pruning without fine-tuning has no random choice."""
    return config.seeds[:1] if method == "prune" else config.seeds


def _prune(plan: UnlearningPlan, model: Any, walk: Walk) -> Generator[None, None, None]:
    """Collect, score, select, delete, at every step anew (METHODS 10)."""
    for _ in _pruned(plan, model):
        yield


def _pruned(plan: UnlearningPlan, model: Any) -> Generator[NeuronSet, None, None]:
    """Prune step by step; all neurons that are pruned so far."""
    c = plan.config
    how: dict[str, Any] = {"batch_size": c.batch_size, "gradients": gradients_for(c.importance)}
    gone = NeuronSet.empty(model, c.sites)
    for _ in range(c.steps):
        statistics = {role: collect_sample(model, sample, c.sites, **how) for role, sample in plan.fit.items()}
        new = score(statistics["forget"], statistics["retain"], c.importance).top(c.fractions, exclude=gone)
        gone = gone | new
        delete(model, new)
        yield gone


def _prune_and_repair(plan: UnlearningPlan, model: Any, walk: Walk) -> Generator[None, None, None]:
    """Prune, and after every step fine-tune all weights on retain, with the pruned neurons held at 0."""
    gone = NeuronSet.empty(model, plan.config.sites)
    of_sites = populations(model, plan.config.sites)

    def hold() -> None:
        for site, layer, mask in gone.by_layer():
            of_sites[site].delete(layer, mask)

    steps = fine_tuned(model, plan.fit["retain"], _tuning(plan, walk), plan.points, after_step=hold, desc=walk.name)
    for pruned in _pruned(plan, model):
        gone = pruned
        next(steps)
        yield


def _random(plan: UnlearningPlan, model: Any, walk: Walk) -> Generator[None, None, None]:
    """Delete as many random neurons as are pruned; the sets of a seed are nested."""
    c = plan.config
    bound = populations(model, c.sites)
    each = {
        name: how_many(share, math.prod(bound["attn_pre_out"].shape[:2]) if name == "heads" else bound[name].size, name)
        for name, share in c.fractions.items()
    }
    for step in range(1, c.steps + 1):
        delete(model, NeuronSet.random(model, {name: step * count for name, count in each.items()}, seed=walk.seed))
        yield


def _gradient_ascent(plan: UnlearningPlan, model: Any, walk: Walk) -> Generator[None, None, None]:
    """Raise the loss on forget, and lower that on retain."""
    yield from _trained(plan, model, walk, Term(plan.fit["forget"], -1.0))


def _negative_preference(plan: UnlearningPlan, model: Any, walk: Walk) -> Generator[None, None, None]:
    """Negative preference optimisation against the untouched model."""
    assert walk.beta is not None
    reference = reference_of(model, plan.fit["forget"], plan.config.batch_size)
    yield from _trained(plan, model, walk, Term(plan.fit["forget"], 1.0, NegativePreference(walk.beta, reference)))


def _trained(plan: UnlearningPlan, model: Any, walk: Walk, forget: Term) -> Generator[None, None, None]:
    weight = plan.config.retain_weight
    terms = [forget, *([Term(plan.fit["retain"], weight)] if weight else [])]
    for _ in fine_tuned(model, terms, _tuning(plan, walk), plan.points, desc=walk.name):
        yield


def _task_arithmetic(plan: UnlearningPlan, model: Any, walk: Walk) -> Generator[None, None, None]:
    """Fine-tune on forget, and subtract the change of the weights at growing scales."""
    c, vector = plan.config, TaskVector(model)
    for _ in fine_tuned(model, plan.fit["forget"], _tuning(plan, walk), plan.points[-1:], desc=walk.name):
        vector.take()
    for step in range(1, c.steps + 1):
        vector.subtract(c.largest_scale * step / c.steps)
        yield


def _tuning(plan: UnlearningPlan, walk: Walk) -> Tuning:
    c = plan.config
    assert walk.lr is not None
    return replace(Tuning(), lr=walk.lr, step_tokens=c.step_tokens, batch_size=c.batch_size, seed=walk.seed, optimiser=c.optimiser)


METHODS: dict[str, Callable[[UnlearningPlan, Any, Walk], Generator[None, None, None]]] = {
    "prune": _prune,
    "prune+retain-finetune": _prune_and_repair,
    "gradient-ascent": _gradient_ascent,
    "npo": _negative_preference,
    "task-arithmetic": _task_arithmetic,
    "random": _random,
}
"""Name of a method -> the generator that carries it out."""
