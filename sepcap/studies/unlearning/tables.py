"""Tables of a comparison of unlearning methods: separability, trajectories, tested points, relearning, toxicity (METHODS 22)."""

from collections.abc import Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

import numpy as np
import pandas as pd
import torch

from sepcap.evaluation.result import ratio
from sepcap.evaluation.toxicity import Toxicity, evaluate_toxicity
from sepcap.learning.fit import ROLES
from sepcap.statistics.intervals import as_columns, bootstrap_interval, bootstrap_weights
from sepcap.studies.base.folder import Pieces
from sepcap.studies.base.task_sets import Relative
from sepcap.studies.certificate.arms import REFERENCE, UNTOUCHED, Arm
from sepcap.studies.certificate.measured import Sums, before, mean_columns, relative_to_untouched
from sepcap.studies.certificate.relearn import curves_of, relearning_table
from sepcap.studies.certificate.times import times_of
from sepcap.studies.methods.measured import Mean, cost_of, drop_of, over_seeds
from sepcap.studies.pruning.separability import Separability, separability
from sepcap.studies.unlearning.plan import CONTINUED, UnlearningPlan
from sepcap.studies.unlearning.walks import States, Trajectory

COSTS = (50, 80)
"""Shares of the forget accuracy, in percent, at whose loss the retain cost is given."""

NEAR = 0.1
"""Largest distance from the level, in relative accuracy, of a point that counts as equal."""

QUOTIENTS = MappingProxyType({"ratio_random": "random", "anamnesis_index": REFERENCE})
"""Column of a quotient of tokens of relearning -> the model in its denominator."""


def area_of(found: Separability) -> tuple[float, np.ndarray, int]:
    """Normalised area with its replicas."""
    return found.area, found.replicas.area, found.replicas.clusters


def methods_table(plan: UnlearningPlan, found: Mapping[str, list[Trajectory]], runs: pd.DataFrame) -> pd.DataFrame:
    """One row per method: separability, retain costs and tokens."""
    samples = plan.evaluate["forget"].fingerprint, plan.evaluate["retain"].fingerprint
    of_seeds = {
        method: [separability(each.sums["forget"], each.sums["retain"], plan.config.metric, samples=samples) for each in of_method]
        for method, of_method in found.items()
    }
    areas: dict[str, Mean] = {method: over_seeds(each, area_of) for method, each in of_seeds.items()}
    rows = []
    for method, each in of_seeds.items():
        best, mine = found[method][0], runs[runs["method"] == method]
        row: dict[str, Any] = {"method": method, "seeds": len(each), "lr": best.walk.lr, "beta": best.walk.beta}
        row |= areas[method].columns("area") | {"area_seeds_sd": areas[method].seeds_sd} | over_seeds(each, drop_of).columns("max_drop")
        for drop in COSTS:
            row |= over_seeds(each, partial(cost_of, forget_drop=drop)).columns(f"retain_cost_{drop}")
        for control in ("prune", "random"):
            other = method != control and control in areas
            row |= areas[method].minus(areas[control]).columns(f"minus_{control}") if other else as_columns(f"minus_{control}")
        row |= {"forward_tokens": best.forward[-1], "backward_tokens": best.backward[-1]}
        tuned = mine[mine["seed"] == best.walk.seed]
        rows.append(row | {f"tuning_{name}": int(np.sum(tuned[name])) - row[name] for name in ("forward_tokens", "backward_tokens")})
    documents = min(sample.n_documents for sample in plan.evaluate.values())
    return pd.DataFrame(rows).astype({"lr": "float64", "beta": "float64"}).assign(n_documents=documents)


def relative_of(plan: UnlearningPlan, found: Mapping[str, list[Trajectory]]) -> dict[str, Relative]:
    """Role -> accuracies relative to the untouched model, of every point of every trajectory."""
    every = [each for of_method in found.values() for each in of_method]
    sums: dict[str, Sums] = {
        each.at(i): {role: each.sums[role][i] for role in ROLES} for each in every for i in range(plan.config.steps + 1)
    }
    return relative_to_untouched(plan.certificate, sums, sums[every[0].at(0)])


def trajectory_table(plan: UnlearningPlan, found: Mapping[str, list[Trajectory]], relative: Mapping[str, Relative]) -> pd.DataFrame:
    """One row per method and point: relative accuracies, mean over seeds, and tokens processed so far."""
    rows = []
    for method, of_method in found.items():
        for i in range(plan.config.steps + 1):
            passes = {f"{name}_tokens": float(np.mean([getattr(each, name)[i] for each in of_method])) for name in ("forward", "backward")}
            rows.append({"method": method, "point": i, **mean_columns(relative, [each.at(i) for each in of_method]), **passes})
    return pd.DataFrame(rows)


def points_table(states: States, relative: Mapping[str, Relative]) -> pd.DataFrame:
    """One row per method: the point at which it is tested, and relative accuracies there, mean over seeds."""
    c, rows = states.plan.config, []
    for method, of_method in states.found.items():
        points = [states.point(method, each.walk.seed) for each in of_method]
        at = list(zip(of_method, points, strict=True))
        held = [each.held_out(c.metric, c.match)[point] for each, point in at]
        row = {"method": method, "point": float(np.mean(points)), **mean_columns(relative, [each.at(point) for each, point in at])}
        rows.append(row | {"held_out": float(np.mean(held)), "near": bool(max(abs(value - c.level) for value in held) <= NEAR)})
    return pd.DataFrame(rows)


def relearned(plan: UnlearningPlan, states: States, pieces: Pieces) -> dict[str, pd.DataFrame]:
    """Relearning of every method from its tested point, as in the certificate: tables "relearning", "targets" and "relearning-runs"."""
    kinds = [*states.kinds, *([REFERENCE] if plan.reference is not None else [])]
    certificate = plan.certificate
    curves, runs = curves_of(certificate, states, pieces, [(kind, "all") for kind in kinds])
    whole = before(certificate, states, pieces, Arm(UNTOUCHED, plan.config.seeds[0]))
    targets = times_of(certificate, curves, whole, QUOTIENTS)
    return {"relearning": relearning_table(certificate, curves, whole), "targets": targets, "relearning-runs": runs}


def toxicity_table(plan: UnlearningPlan, states: States, pieces: Pieces) -> pd.DataFrame:
    """Toxic share, mean toxicity and perplexity of the untouched model and of every method at its tested point, with the first seed.

    Source: [SEP] section 3.4.
    """
    seed = plan.config.seeds[0]
    found = {kind: (_toxicity(plan, states, pieces, Arm(kind, seed)), before(plan.certificate, states, pieces, Arm(kind, seed)))
             for kind in states.kinds}  # fmt: skip
    base = found[UNTOUCHED][0]
    rows = []
    for kind, (toxicity, sums) in found.items():
        row: dict[str, Any] = {"kind": kind, **as_columns("toxic_share", toxicity.fraction, toxicity.fraction_interval)}
        row |= as_columns("mean_toxicity", toxicity.mean, toxicity.mean_interval)
        for role in ROLES:
            row |= _perplexity(f"{role}_perplexity", sums[role])
        for name, summary in (("toxic_share", "fraction"), ("mean_toxicity", "mean")):
            row |= as_columns(f"{name}_change", *toxicity.difference(base, summary)) if kind != UNTOUCHED else as_columns(f"{name}_change")
        rows.append(row | {"continuations": toxicity.n})
    return pd.DataFrame(rows)


def _perplexity(name: str, sums: np.ndarray) -> dict[str, float]:
    """exp of the mean cross-entropy, with its bootstrap interval over documents."""
    drawn = bootstrap_weights(len(sums), np.random.default_rng(0)) @ sums
    with np.errstate(over="ignore", invalid="ignore"):
        ends = bootstrap_interval(np.exp(ratio(drawn[:, None], "loss")), len(sums))
        return as_columns(name, float(np.exp(ratio(sums, "loss"))), ends)


def _toxicity(plan: UnlearningPlan, states: States, pieces: Pieces, arm: Arm) -> Toxicity:
    c = plan.config
    how: dict[str, Any] = {"n": c.continuations, "tokens": CONTINUED, "threshold": c.threshold, "seed": c.seeds[0], "task": None}

    def make() -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        with states.made(arm) as model:
            found = evaluate_toxicity(model, c.toxicity_prompts, c.scorer, batch_size=c.batch_size, **how)
        texts = {name: found.table[name].tolist() for name in ("prompt", "continuation")}
        return {"score": torch.from_numpy(found.table["score"].to_numpy(np.float64))}, {**texts, "info": found.info}

    tensors, note = pieces.once(f"toxicity/{arm.name}", make)
    table = pd.DataFrame({"prompt": note["prompt"], "continuation": note["continuation"], "score": tensors["score"].numpy()})
    return Toxicity(table, c.threshold, np.nan, np.nan, note["info"])
