"""Evaluations of the models of a certificate, each stored before the next begins, and their accuracies relative to the untouched model."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from sepcap.evaluation.next_token import evaluate_sample
from sepcap.learning.fit import ROLES
from sepcap.statistics.intervals import as_columns, summed_interval
from sepcap.studies.base.folder import Pieces
from sepcap.studies.base.task_sets import WHOLE, Relative
from sepcap.studies.certificate.arms import Arm, Arms, Compared, different
from sepcap.studies.certificate.plan import Plan

Sums = dict[str, Float[np.ndarray, "cluster count"]]
"""Texts ("forget", "retain", "held-forget", "held-retain") -> evaluation sums per document."""


def measured(plan: Plan, model: Any, quiet: bool = True, held: bool = True) -> Sums:
    """Evaluate a model as it is now."""
    samples = dict(plan.evaluate) | ({f"held-{role}": sample for role, sample in plan.held.items()} if held else {})
    how: dict[str, Any] = {"batch_size": plan.config.batch_size, "quiet": quiet}
    return {name: evaluate_sample(model, sample, **how).per_cluster for name, sample in samples.items()}


def before(plan: Plan, arms: Compared, pieces: Pieces, arm: Arm) -> Sums:
    """The sums of a model before anything else is done to it."""
    name = "before/" + (arm.name if arms.seeded(arm.kind) else arm.kind)

    def make() -> tuple[dict[str, torch.Tensor], None]:
        with arms.made(arm) as model:
            return {key: torch.from_numpy(value) for key, value in measured(plan, model).items()}, None

    return {key: value.numpy() for key, value in pieces.once(name, make)[0].items()}


def of_every_arm(
    plan: Plan, arms: Arms, pieces: Pieces, part: str, make: Callable[[Any], dict[str, torch.Tensor]]
) -> tuple[dict[str, dict[str, np.ndarray]], dict[str, list[str]]]:
    """What `make` finds of every model, stored as a piece each, by name of the model; and the names of every kind of model."""
    found: dict[str, dict[str, np.ndarray]] = {}
    every: dict[str, list[str]] = {}

    def made(arm: Arm) -> tuple[dict[str, torch.Tensor], None]:
        with arms.made(arm) as model:
            return make(model), None

    for kind in arms.kinds:
        for arm in different(arms, kind, plan.config.seeds):
            stored, _ = pieces.once(f"{part}/{arm.name}", partial(made, arm))
            found[arm.name] = {name: value.numpy() for name, value in stored.items()}
            every.setdefault(kind, []).append(arm.name)
    return found, every


def relative_to_untouched(plan: Plan, sums: Mapping[str, Sums], whole: Sums) -> dict[str, Relative]:
    """Role -> accuracies relative to the untouched model, of every named model."""
    named = {WHOLE: whole, **sums}
    of_role = {role: {name: one[role] for name, one in named.items()} for role in ROLES}
    return {role: Relative(of_role[role], plan.config.metric, plan.evaluate[role].fingerprint) for role in ROLES}


def mean_columns(relative: Mapping[str, Relative], names: Sequence[str]) -> dict[str, float]:
    """Columns forget and retain of a mean over seeds: relative accuracies with the ends of their 95% intervals."""
    return {key: value for role, one in relative.items() for key, value in one.mean(names).columns(role).items()}


def change(
    relative: Relative, names: Sequence[str], others: Sequence[str], of: Relative | None = None, column: str = "change"
) -> dict[str, float]:
    """Mean over seeds of a relative accuracy minus that of the same seeds in another state, with both ends of its interval, as columns.

    Args:
        relative: accuracies of the same documents, for both states or for the first.
        names, others: the models in both states.
        of: accuracies in the other state, if they are relative to others.
        column: name of the columns.
    """
    new, old = relative.along(names), (of or relative).along(others)
    each, replicas = new[0] - old[0], (new[1] - old[1]).mean(axis=1)
    if len(each) == 1:
        return relative.interval(each[0], replicas).columns(column)
    errors = float(replicas.std(ddof=1)), float(each.std(ddof=1)) / np.sqrt(len(each))
    return as_columns(column, float(each.mean()), summed_interval(float(each.mean()), errors, (relative.n_clusters, len(each))))
