"""Samples and checked inputs of a comparison of unlearning methods, and its cost (METHODS 22)."""

import dataclasses
import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from sepcap.evaluation.sampling import check_room
from sepcap.evaluation.scorers import get_scorer, scorer_digest
from sepcap.evaluation.toxicity import read_prompts
from sepcap.interventions.optimal import apart
from sepcap.interventions.trial import check_deletion
from sepcap.learning.fit import HELD_OUT, ROLES
from sepcap.models.forward import device_of
from sepcap.models.kinds import check_wraps, kind_of
from sepcap.models.sites import populations
from sepcap.models.weights import fingerprint
from sepcap.selection.neurons import how_many
from sepcap.statistics.backward import check_differentiable
from sepcap.storage import digest_of
from sepcap.studies.base.task_sets import resolved
from sepcap.studies.certificate.arms import Pruning
from sepcap.studies.certificate.config import CertificateConfig
from sepcap.studies.certificate.plan import Plan, check_reference
from sepcap.studies.unlearning.config import TRAINED, UnlearningComparisonConfig
from sepcap.tasks.batches import TokenSample
from sepcap.tasks.load import load_task
from sepcap.tasks.samples import sample_task
from sepcap.tasks.task import Split, Task

CONTINUED = 20
"""Maximum number of tokens of a continuation."""


@dataclass(frozen=True, eq=False)
class UnlearningPlan:
    """Everything that a comparison needs; nothing is computed or written yet.

    Attributes:
        model: the untouched model.
        reference: a model never trained on the forget task, or None.
        tasks: role -> task.
        fit, held: role -> collection texts to work on, and those held out of it.
        evaluate: role -> evaluation texts.
        resolved: the configuration to store.
    """

    model: Any
    config: UnlearningComparisonConfig
    reference: Any
    tasks: dict[str, Task]
    fit: dict[str, TokenSample]
    held: dict[str, TokenSample]
    evaluate: dict[str, TokenSample]
    resolved: dict[str, Any]

    @property
    def points(self) -> tuple[int, ...]:
        """Tokens trained on at every point of a trajectory of a method with gradient steps."""
        c = self.config
        return tuple(max(1, c.budget * step // c.steps) for step in range(1, c.steps + 1))

    @cached_property
    def certificate(self) -> Plan:
        """The plan of the removal certificate's relearning, on the same texts."""
        c = self.config
        shared = ("metric", "seeds", "tokens", "eval_tokens", "checkpoints", "targets", "step_tokens", "batch_size", "context")
        config = CertificateConfig(parts=("relearn",), variants=("all",), lrs=c.relearn_lrs, **{name: getattr(c, name) for name in shared})
        return Plan(self.model, config, Pruning(_nothing), self.reference, self.tasks, self.fit, self.held, self.evaluate, self.resolved)

    def cost(self) -> str:
        """The planned work and its cost, in one sentence."""
        c = self.config
        seeds = len(c.seeds)
        trained = {m: len(c.lrs) * (len(c.betas) if m == "npo" else 1) + seeds - 1 for m in c.methods if m in TRAINED}
        untrained = {m: seeds if m == "random" else 1 for m in c.methods if m not in TRAINED}
        walks, others = sum(trained.values()), sum(untrained.values())
        measured = c.steps * sum(s.tokens for part in (self.evaluate, self.held) for s in part.values())
        collected = sum(n for m, n in (trained | untrained).items() if m.startswith("prune"))
        pruned = c.steps * sum(s.tokens for s in self.fit.values()) * collected
        tokens = walks * 3 * c.budget + (walks + others) * measured + pruned
        said = f"{self.resolved['model']}: forget {self.resolved['forget']}, retain {self.resolved['retain']} by {', '.join(c.methods)}; "
        said += f"{walks + others} trajectories of {c.steps} points"
        if "relearn" in c.parts:
            runs = (len(c.methods) + 1 + (self.reference is not None)) * (len(c.relearn_lrs) + seeds - 1)
            tokens += runs * (3 * c.checkpoints[-1] + len(c.checkpoints) * measured // c.steps)
            said += f", then {runs} times {c.checkpoints[-1]:,} tokens of relearning"
        if "toxicity" in c.parts:
            said += f", then {c.continuations:,} continuations of {len(c.methods) + 1} models"
        return f"{said}: about {tokens / 1e6:.3g} M tokens, counted forward"


def _nothing(model: Any) -> None:
    """No pruning: the models of the comparison are made elsewhere."""


def planned(model: Any, config: UnlearningComparisonConfig, reference: Any, kept: bool = False) -> UnlearningPlan:
    """Load texts and check everything before anything is computed; `kept`: whether the study is stored, and can be resumed.

    Raises:
        ValueError: equal tasks, too little text, shares that prune no neuron, an unknown scorer, or one that cannot be told from others.
        NotImplementedError: a model that predicts no next tokens.
    """
    if kind_of(model) != "causal":
        raise NotImplementedError(f"model={model.cfg.model_name!r} does not predict next tokens; give a causal language model")
    check_differentiable(model)
    bound = populations(model, config.sites)
    for name, share in config.fractions.items():
        population = bound["attn_pre_out" if name == "heads" else name]
        check_deletion(population)
        total = math.prod(population.shape[:2]) if name == "heads" else population.size
        if how_many(share, total, name) * config.steps > total:
            raise ValueError(f"fractions[{name!r}]={share} in {config.steps} steps prunes more than there are: {total:,}")
    found: dict[str, Any] = {}
    if "toxicity" in config.parts:
        check_wraps(model, "toxicity")
        found["scorer"] = get_scorer(config.scorer, None, device_of(model))[1]
        found["scorer_digest"] = scorer_digest(config.scorer) if kept or not callable(config.scorer) else None
        begun = read_prompts(model, config.toxicity_prompts, config.continuations)
        check_room(model, [ids for _, ids in begun], CONTINUED)
        found["prompts_digest"] = digest_of([text for text, _ in begun])  # a path or a name says nothing of the content
    tasks = {role: load_task(getattr(config, role)) for role in ROLES}
    if tasks["forget"].fingerprint == tasks["retain"].fingerprint:
        raise ValueError(f"forget and retain are the same data ({tasks['forget'].name}): there is nothing to tell apart")
    budgets: dict[Split, int] = {"collect": config.tokens, "evaluate": config.eval_tokens}
    how: dict[str, Any] = {"context": config.context, "per_document": config.per_document}
    samples = {split: {r: sample_task(model, task, split, n, **how) for r, task in tasks.items()} for split, n in budgets.items()}
    parts = {role: apart(sample, HELD_OUT) for role, sample in samples["collect"].items()}
    names = {role: task.name for role, task in tasks.items()} | {"scorer": None, "toxicity_prompts": _prompts(config.toxicity_prompts)}
    found = resolved(model, dataclasses.replace(config, **names), {}, samples) | found
    if reference is not None:
        check_reference(model, reference, tasks["forget"], samples["evaluate"]["forget"], config)
        found["reference"] = fingerprint(reference)
    fit, held = ({role: pair[which] for role, pair in parts.items()} for which in (0, 1))
    return UnlearningPlan(model, config, reference, tasks, fit, held, samples["evaluate"], found)


def _prompts(given: Any) -> Any:
    """Prompts in the form of a stored configuration."""
    if given is None or isinstance(given, list | tuple):
        return given if given is None else list(given)
    return str(getattr(given, "name", given))
