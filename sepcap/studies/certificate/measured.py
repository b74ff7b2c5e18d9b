"""Evaluations of the models of a certificate, each stored before the next begins, and their accuracies relative to the untouched model."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from sepcap.evaluation.next_token import evaluate_sample
from sepcap.learning.fit import ROLES
from sepcap.studies.base.folder import Pieces
from sepcap.studies.base.task_sets import WHOLE, Relative
from sepcap.studies.certificate.arms import UNTOUCHED, Arm, Arms
from sepcap.studies.certificate.plan import Plan

Sums = dict[str, Float[np.ndarray, "cluster count"]]
"""Texts ("forget", "retain", "held-forget", "held-retain") -> evaluation sums per document."""


def measured(plan: Plan, model: Any, quiet: bool = True, held: bool = True) -> Sums:
    """Evaluate a model as it is now."""
    samples = dict(plan.evaluate) | ({f"held-{role}": sample for role, sample in plan.held.items()} if held else {})
    how: dict[str, Any] = {"batch_size": plan.config.batch_size, "quiet": quiet}
    return {name: evaluate_sample(model, sample, **how).per_cluster for name, sample in samples.items()}


def before(plan: Plan, arms: Arms, pieces: Pieces, arm: Arm) -> Sums:
    """The sums of a model before anything else is done to it."""
    name = "before/" + (arm.kind if arm.kind in (UNTOUCHED, "pruned", "reference") else arm.name)
    stored = pieces.get(name)
    if stored is None:
        with arms.made(arm) as model:
            pieces.put(name, {key: torch.from_numpy(value) for key, value in measured(plan, model).items()})
        stored = pieces.get(name)
        assert stored is not None
    return {key: value.numpy() for key, value in stored[0].items()}


def relative_to_untouched(plan: Plan, sums: Mapping[str, Sums], whole: Sums) -> dict[str, Relative]:
    """Role -> accuracies relative to the untouched model, of every named model."""
    named = {WHOLE: whole, **sums}
    of_role = {role: {name: one[role] for name, one in named.items()} for role in ROLES}
    return {role: Relative(of_role[role], plan.config.metric, plan.evaluate[role].fingerprint) for role in ROLES}


def mean_columns(relative: Mapping[str, Relative], names: Sequence[str]) -> dict[str, float]:
    """Columns forget and retain of a mean over seeds: relative accuracies with the ends of their 95% intervals."""
    return {key: value for role, one in relative.items() for key, value in one.mean(names).columns(role).items()}
