"""Relearning: fine-tune the models of a certificate, and see how fast the forgotten task returns (METHODS 22)."""

from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from sepcap.evaluation.result import ratio
from sepcap.learning.finetune import adapters, fine_tuned
from sepcap.learning.fit import ROLES
from sepcap.learning.fitting import Tuning
from sepcap.models.sites import populations
from sepcap.progress import progress
from sepcap.selection.names import gradients_for
from sepcap.selection.score import score
from sepcap.statistics.collect import collect_sample
from sepcap.studies.base.folder import Pieces
from sepcap.studies.base.seeds import seed_interval
from sepcap.studies.certificate.arms import PRUNED, REFERENCE, UNTOUCHED, Arm, Arms, Compared
from sepcap.studies.certificate.measured import Sums, before, mean_columns, measured, relative_to_untouched
from sepcap.studies.certificate.plan import Plan, site_names
from sepcap.studies.certificate.times import Curve, times_of


@dataclass(frozen=True)
class Run:
    """One fine-tuning.

    Attributes:
        kind: of the model, one of `sepcap.studies.certificate.arms.NAMES`.
        variant: how it is fine-tuned, see `CertificateConfig.variants`.
        seed: of random neurons and of the order of the texts.
        lr: learning rate.
    """

    kind: str
    variant: str
    seed: int
    lr: float

    @property
    def role(self) -> str:
        """The task that is fine-tuned on."""
        return "retain" if self.variant == "retain" else "forget"

    @property
    def name(self) -> str:
        """Name of its piece."""
        return f"relearn/{self.kind}-{self.variant}-{self.seed}-{self.lr!r}"


def relearned(plan: Plan, arms: Arms, pieces: Pieces) -> dict[str, pd.DataFrame]:
    """Fine-tune every model with every seed.

    Returns:
        Tables "relearning", "targets", "runs" and, if the pruned neurons are known, "layers".
    """
    c = plan.config
    pairs = [(kind, "all") for kind in [*arms.kinds, *([REFERENCE] if plan.reference is not None else [])]]
    pairs += [(PRUNED, variant) for variant in c.variants if variant != "all" and (variant != "held" or plan.neurons is not None)]
    curves, runs = curves_of(plan, arms, pieces, pairs)
    whole = before(plan, arms, pieces, Arm(UNTOUCHED, c.seeds[0]))
    tables = {"relearning": relearning_table(plan, curves, whole), "targets": times_of(plan, curves, whole), "runs": runs}
    if plan.neurons is not None and not curves[PRUNED, "all"][-1].diverged:
        tables["layers"] = _layers(plan, arms, pieces, [curve.scores for curve in curves[PRUNED, "all"]])
    return tables


def curves_of(
    plan: Plan, arms: Compared, pieces: Pieces, pairs: Sequence[tuple[str, str]]
) -> tuple[dict[tuple[str, str], list[Curve]], pd.DataFrame]:
    """Fine-tune pairs of a kind of model and a variant with every seed, at the learning rate that is best on held-out collection texts.

    A rate at which the loss of a seed is NaN or infinite is not kept, unless that is so at every rate.

    Returns:
        Pair -> the curve of every seed, and a table with one row per fine-tuning. If every rate diverges, the last curve has diverged.
    """
    c = plan.config
    curves: dict[tuple[str, str], list[Curve]] = {}
    rows = []
    with progress(total=len(pairs) * (len(c.lrs) + len(c.seeds) - 1), desc="relearn", unit="fine-tuning") as bar:

        def curve(pair: tuple[str, str], seed: int, lr: float) -> Curve:
            found = _curve(plan, arms, pieces, Run(*pair, seed, lr))
            bar.update()
            return found

        for pair in pairs:
            tried = {lr: [curve(pair, c.seeds[0], lr)] for lr in c.lrs}
            ranked = sorted(tried, key=lambda lr: (-tried[lr][0].held_out(c.metric), lr))
            best = ranked[0]
            for lr, of_rate in ((lr, tried[lr]) for lr in ranked):
                for seed in c.seeds[1:]:
                    if not of_rate[-1].diverged:
                        of_rate.append(curve(pair, seed, lr))
                if not of_rate[-1].diverged:
                    best = lr
                    break
            rows += [one.row(c.metric) | {"kept": lr == best} for lr, of_rate in tried.items() for one in of_rate]
            curves[pair] = tried[best]
    return curves, pd.DataFrame(rows)


def _curve(plan: Plan, arms: Compared, pieces: Pieces, run: Run) -> Curve:
    def make() -> tuple[dict[str, Tensor], dict[str, Any]]:
        first = before(plan, arms, pieces, Arm(run.kind, run.seed))
        steps, seen = [first], [0]
        scores: dict[str, Tensor] = {}
        diverged = False
        with closing(_steps(plan, arms, run)) as measurements:  # an interrupt restores the model at once
            try:
                for tokens, sums, found in measurements:
                    if not all(np.isfinite(values).all() for values in sums.values()):  # of the last step, whose loss is not computed
                        raise FloatingPointError
                    steps.append(sums)
                    seen.append(tokens)
                    scores |= found
            except FloatingPointError:
                diverged = True
        tensors = {f"sums/{name}": torch.from_numpy(np.stack([step[name] for step in steps])) for name in first}
        tensors |= {f"scores/{site}": value for site, value in scores.items()}
        return tensors, {"seen": seen, "diverged": diverged}

    tensors, note = pieces.once(run.name, make)
    sums = {name.removeprefix("sums/"): value.numpy() for name, value in tensors.items() if name.startswith("sums/")}
    scores = {name.removeprefix("scores/"): value for name, value in tensors.items() if name.startswith("scores/")}
    return Curve(run.kind, run.variant, run.role, run.seed, run.lr, tuple(note["seen"]), sums, scores, note["diverged"])


def _steps(plan: Plan, arms: Compared, run: Run) -> Generator[tuple[int, Sums, dict[str, Tensor]], None, None]:
    """Tokens seen, evaluation, and, at the last checkpoint of the pruned model, the scores of its neurons."""
    c = plan.config
    how = Tuning(run.lr, c.step_tokens, c.batch_size, run.seed)
    with arms.made(Arm(run.kind, run.seed)) as model, adapters(model, how, c.lora_rank if run.variant == "lora" else None) as trained:
        after = (lambda: _hold(plan, model)) if run.variant == "held" else None
        what: dict[str, Any] = {"parameters": trained, "after_step": after, "desc": f"{run.kind}, {run.variant}, lr {run.lr:g}"}
        for place, seen in enumerate(fine_tuned(model, plan.fit[run.role], how, c.checkpoints, **what), start=1):
            last = place == len(c.checkpoints) and (run.kind, run.variant) == (PRUNED, "all") and plan.neurons is not None
            yield seen, measured(plan, model), _scores(plan, model) if last else {}


def _hold(plan: Plan, model: Any) -> None:
    """Set the weights of the pruned neurons to 0 again."""
    assert plan.neurons is not None
    of_sites = populations(model, plan.neurons.masks)
    for site, layer, mask in plan.neurons.by_layer():
        of_sites[site].delete(layer, mask)


def _scores_of(plan: Plan, arms: Arms, kind: str) -> tuple[dict[str, Tensor], None]:
    with arms.made(Arm(kind, plan.config.seeds[0])) as model:
        if kind == UNTOUCHED:
            plan.pruning.rotate(model)  # the pruned neurons are of this basis
        return _scores(plan, model), None


def _scores(plan: Plan, model: Any) -> dict[str, Tensor]:
    """Scores of all neurons, on held-out collection texts."""
    c, sites = plan.config, site_names(plan.neurons, plan.model)
    how: dict[str, Any] = {"batch_size": c.batch_size, "gradients": gradients_for(c.importance)}
    forget, retain = (collect_sample(model, plan.held[role], sites, **how) for role in ROLES)
    found = score(forget, retain, c.importance)
    return {site: found[site].detach().double().cpu() for site in sites}


def relearning_table(plan: Plan, curves: Mapping[tuple[str, str], list[Curve]], whole: Sums) -> pd.DataFrame:
    """Relative accuracies on both tasks after every number of tokens, mean over seeds; the last rows are missing where it diverged."""
    c = plan.config
    every = {curve.at(i): curve.step(i) for of_pair in curves.values() for curve in of_pair for i in range(len(curve.seen))}
    relative = relative_to_untouched(plan, every, whole)
    rows = []
    for (kind, variant), of_pair in curves.items():
        for i in range(min(len(curve.seen) for curve in of_pair)):
            row: dict[str, Any] = {"kind": kind, "variant": variant, "lr": of_pair[0].lr, "tokens": of_pair[0].seen[i]}
            row |= mean_columns(relative, [curve.at(i) for curve in of_pair])
            accuracies = {f"{role}_accuracy": float(np.mean([ratio(curve.step(i)[role], c.metric) for curve in of_pair])) for role in ROLES}
            rows.append(row | accuracies | {"seeds": len(of_pair), "diverged": of_pair[-1].diverged})
    return pd.DataFrame(rows)


def _layers(plan: Plan, arms: Arms, pieces: Pieces, after: Sequence[Mapping[str, Tensor]]) -> pd.DataFrame:
    """Neurons per layer with a score above the median of the pruned ones: in the whole, the pruned and the relearned model."""
    assert plan.neurons is not None
    states = {}
    for kind in (UNTOUCHED, PRUNED):
        states[kind] = pieces.once(f"scores/{kind}", partial(_scores_of, plan, arms, kind))[0]
    rows = []
    for site in after[0]:
        mask = plan.neurons.masks[site].flatten(1).cpu()
        whole, left, *relearned = (each[site].flatten(1) for each in (states[UNTOUCHED], states[PRUNED], *after))
        cut = whole[mask].median()
        for layer in range(len(mask)):
            above = np.array([float((each[layer] >= cut).sum()) for each in relearned])
            regained = np.array([float((each[layer] >= cut)[mask[layer]].sum()) for each in relearned])
            row = {"site": site, "layer": layer, "pruned": int(mask[layer].sum()), "threshold": float(cut)}
            row |= {"whole": int((whole[layer] >= cut).sum()), "remaining": int((left[layer] >= cut).sum())}
            rows.append(row | seed_interval("relearned", above) | seed_interval("regained", regained))
    return pd.DataFrame(rows)
