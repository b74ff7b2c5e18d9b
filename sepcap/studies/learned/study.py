"""A learned order of neurons, compared with its start on texts that were not used for learning (METHODS 21)."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from sepcap.checks import checked
from sepcap.interventions.optimal import apart
from sepcap.learning.fit import HELD_OUT, HISTORY, LAST_SHARES, ROLES, Learned, learn_order, planned_tokens
from sepcap.learning.fitting import Fitting
from sepcap.learning.held_out import Rows, masked_rows
from sepcap.learning.order import Ranked, ranked_of, scores_of, starting_theta
from sepcap.models.weights import hash_of
from sepcap.selection.figures import score_histograms
from sepcap.selection.names import gradients_for
from sepcap.selection.score import Scores, score
from sepcap.statistics.backward import check_differentiable
from sepcap.statistics.collect import collect_sample
from sepcap.statistics.intervals import as_columns, bootstrap_interval, cluster_sums
from sepcap.studies.base.folder import Pieces, as_json
from sepcap.studies.base.result import Figures, StudyResult
from sepcap.studies.base.runner import run_study, study
from sepcap.studies.base.task_sets import resolved
from sepcap.studies.base.text import with_ends
from sepcap.studies.learned import figures
from sepcap.studies.learned.config import LearnedRankingConfig
from sepcap.studies.pruning.separability import Separability, separability
from sepcap.tasks.batches import TokenSample
from sepcap.tasks.load import load_task
from sepcap.tasks.samples import sample_task
from sepcap.tasks.task import Split

ORDERS = ("start", "learned")

TEXTS = ("evaluation", "held out", "fitted")
"""Texts that both orders are evaluated on; each with its own bootstrap seed, so that areas on different texts are drawn independently."""

COST = 80
"""Drop of the forget task, in percent, at which the cost to the retain task is reported."""


# table, save, load and to_latex are those of a study
class LearnedRanking(StudyResult, Scores):  # pyright: ignore[reportIncompatibleMethodOverride, reportIncompatibleVariableOverride]
    """An order of all neurons learned by gradient descent. It is `Scores`: `.top`, `.heads` and `ablate` take it as any other score.

    Attributes:
        config: the resolved configuration.
        tables: "neurons", one row per neuron, the first in the order first, as `Scores.table`.
            "areas", one row per texts ("evaluation", "held out" and "fitted": the collection texts that decided between the orders, and
            those that were learned from) and order ("start", "learned"): area, max_drop and retain_cost_80, each with the ends `_low` and
            `_high` of a 95% interval over documents, n_documents, and gain (area of learned − start) with its paired interval.
            "gaps", one row per order: area on the fitted texts − area on the evaluation texts, with its interval.
            "trajectory": texts, order, step, share, forget and retain (top-1).
            "history", one row per gradient step: step, share, retain and forget (losses in nats). "held_out": step and area of the orders
            that were compared. "cost": tokens through the model, and passes, the tokens of learning over those of the collection texts.
        info: importance ("learned"), tasks, model, and the step whose order it is (0: the start).

    Example:
        >>> learned = sepcap.learn_ranking(model, forget="local-code", retain="local-prose", out="runs/learned")  # doctest: +SKIP
        >>> learned.top({"mlp": 0.2})  # doctest: +SKIP
    """

    STUDY = "learned-ranking"
    TITLE = "How well can two tasks be separated if the order of the neurons is learned?"
    FIGURES: ClassVar[Figures] = {
        "trajectory": ("Accuracy on both tasks, start and learned order", figures.trajectories),
        "losses": ("Losses while learning", figures.losses),
        "scores": ("Rank in the order, per layer", score_histograms),
    }
    PAGE_TABLES = ("areas", "gaps", "held_out", "cost")

    @property
    def _by_site(self) -> dict[str, Tensor]:
        return {name.removeprefix("scores/"): value for name, value in self.tensors.items() if name.startswith("scores/")}

    @property
    def info(self) -> dict[str, Any]:
        """Tasks and model of the order, and the step at which it was reached."""
        return {"importance": "learned", "learned_step": self.step, **{name: self.config[name] for name in ("forget", "retain", "model")}}

    @property
    def importances(self) -> dict[str, tuple[Tensor, Tensor]]:
        """None: the order is of both tasks together."""
        return {}

    @property
    def constants(self) -> dict[str, Tensor] | None:
        """Site -> what neurons were set to, for `ablate(model, neurons, learned.constants)`; None if it was 0."""
        found = {name.removeprefix("constants/"): value for name, value in self.tensors.items() if name.startswith("constants/")}
        return found or None

    @property
    def step(self) -> int:
        """Number of gradient steps after which this was the order; 0 if no learned order was better than the start."""
        return int(self.tables["cost"]["best_step"].iloc[0])

    @checked()
    def area(self, texts: str = "evaluation", order: str = "learned") -> pd.Series:
        """One row of the table "areas"."""
        return self.tables["areas"].query("texts == @texts and order == @order").iloc[0]

    def summary(self) -> list[str]:
        """Areas, cost to the retain task, gap, and cost of learning, in sentences."""
        c, start, learned = self.config, self.area(order="start"), self.area()
        cost = self.tables["cost"].iloc[0]
        gaps = self.tables["gaps"].set_index("order")
        chosen = (
            f"after {self.step} of {c['steps']} steps" if self.step else "the start itself: no learned order was better on held-out texts"
        )
        return [
            f"Forget {c['forget']}, retain {c['retain']}: area {with_ends(learned, 'area')} on evaluation texts with the learned order "
            f"({chosen}), {with_ends(start, 'area')} with its start ({c['init']}); gain {with_ends(learned, 'gain')}.",
            f"Where {COST}% of the forget task is lost, the retain task has lost {with_ends(learned, 'retain_cost_80', 0)}% (start: "
            f"{with_ends(start, 'retain_cost_80', 0)}%); maximum differential drop {with_ends(learned, 'max_drop', 0)} percentage points "
            f"(start: {with_ends(start, 'max_drop', 0)}).",
            f"Area on the fitted texts minus area on evaluation texts: {with_ends(gaps.loc['learned'], 'gap')} (the start, "
            f"which was not fitted: {with_ends(gaps.loc['start'], 'gap')}).",
            *self._lasting(),
            f"Learning took {cost['passes']:.3g} passes over the {int(cost['collected']):,} tokens of the collection texts.",
        ]


    def _lasting(self) -> list[str]:
        c = self.config
        if c.get("objective", "plain") == "plain":
            return []
        return [
            f"The loss on {c['forget']} was taken after {c['lasting_steps']} simulated steps of fine-tuning on it, and so was the area on "
            "the held-out texts by which the order was chosen; the areas here are those of the masked model as it is."
        ]


@dataclass(frozen=True, eq=False)
class _Plan:
    """All inputs, sampled and checked before anything is written."""

    model: Any
    config: LearnedRankingConfig
    ranked: list[Ranked]
    collect: dict[str, TokenSample]
    evaluate: dict[str, TokenSample]
    resolved: dict[str, Any]

    @property
    def how(self) -> Fitting:
        """How the order is learned."""
        return Fitting(**{field.name: getattr(self.config, field.name) for field in dataclasses.fields(Fitting)})

    def cost(self) -> str:
        """The planned work and its cost, in one sentence."""
        c, evaluated = self.config, sum(sample.tokens for parts in self.texts().values() for sample in parts.values())
        tokens = sum(sample.tokens for sample in self.collect.values()) + planned_tokens(self.collect, self.how)
        tokens += evaluated * (1 + 2 * LAST_SHARES)
        units = ", ".join(f"{one.size:,} {one.key if one.key == 'heads' else one.key + ' neurons'}" for one in self.ranked)
        return (
            f"{self.resolved['model']}: learn the order of {units} in {c.steps} steps of {c.step_tokens:,} tokens per task, from "
            f"{self.resolved['init']}: forget {self.resolved['forget']}, retain {self.resolved['retain']}; about "
            f"{tokens / 1e6:.3g} M tokens through the model"
        )

    def texts(self) -> dict[str, dict[str, TokenSample]]:
        """Texts -> role -> sample, in the order of `TEXTS`."""
        parts = {role: apart(sample, HELD_OUT) for role, sample in self.collect.items()}
        # of the fitted texts as many as were held out
        fitted = {role: fit.take(range(0, len(fit.rows), HELD_OUT - 1)) for role, (fit, _) in parts.items()}
        return dict(zip(TEXTS, (self.evaluate, {role: held for role, (_, held) in parts.items()}, fitted), strict=True))


def _planned(model: Any, config: LearnedRankingConfig) -> _Plan:
    check_differentiable(model)
    ranked = ranked_of(model, config.sites)
    tasks = {"forget": load_task(config.forget), "retain": load_task(config.retain)}
    if tasks["forget"].fingerprint == tasks["retain"].fingerprint:
        raise ValueError(f"forget and retain are the same data ({tasks['forget'].name}): there is nothing to compare")
    budgets: dict[Split, int] = {"collect": config.tokens, "evaluate": config.eval_tokens}
    samples: dict[str, dict[str, TokenSample]] = {}
    for split, budget in budgets.items():
        seed = config.seed if split == "collect" else 0
        samples[split] = {
            role: sample_task(model, task, split, budget, config.context, seed, config.per_document) for role, task in tasks.items()
        }
    for sample in samples["collect"].values():
        apart(sample, HELD_OUT)
    named = dataclasses.replace(config, **{role: task.name for role, task in tasks.items()})
    found = {}
    if not isinstance(config.init, str):
        starting_theta(ranked, config.init)
        named = dataclasses.replace(named, init="abs")  # a copy of the scores is not part of the configuration, but their hash is
        found["init"] = f"scores {hash_of((one.site, config.init[one.site]) for one in ranked)[:16]}"
    found = resolved(model, named, {"site": config.sites}, samples) | found
    return _Plan(model, config, ranked, samples["collect"], samples["evaluate"], found)


@study(LearnedRankingConfig)
@checked()
def learn_ranking(model: Any, config: LearnedRankingConfig, *, out: str | Path | None = None, say: Callable[[str], Any]) -> LearnedRanking:
    """Learn an order of all neurons that separates two tasks, and compare it with the order that it started from.

    Any fixed score gives a lower bound of the separability that a model allows; a learned order gives a better one. In every step a
    random share of the order is masked, and the loss on retain minus that on forget, up to the loss of a unigram model, is minimised with
    straight-through gradients. A part of the collection texts is held out to choose between the start and the learned orders, so that
    the result is never worse than its start there. The evaluation texts are used for measurement only. The weights are not changed.

    Args:
        model: what `load_model` returns; default is to load `config.model`.
        config: a `LearnedRankingConfig`; its fields can also be given as keywords. For the reverse direction, swap forget and retain.
        out: folder of the study; without one, nothing is saved. The same call resumes an interrupted one, with equal bits.
        progress: True announces the work and its cost and shows bars, False shows nothing; a function receives the announcements.

    Returns:
        LearnedRanking: `Scores` (1 for the first neuron in the order, 1/N for the last of the N of its site) with `.area()`, `.summary()`,
        `.tables` and `.figure()`.

    Raises:
        ValueError: a model without gradients, tasks with the same data, too little text, an unpruned accuracy of 0, steps=0.
        NotImplementedError: a site that no gradient reaches.
        FileExistsError: the folder contains another configuration (the error names the differing fields).

    Source: METHODS section 21.

    Example:
        >>> learned = sepcap.learn_ranking(model, forget="local-code", retain="local-prose", steps=60)  # doctest: +SKIP
        >>> learned.area()["gain"], learned.top({"mlp": 0.2})  # doctest: +SKIP
    """
    prepared = _planned(model, config)
    return run_study(LearnedRanking, prepared.resolved, partial(_measure, prepared), out, prepared.cost, say)


def _measure(prepared: _Plan, pieces: Pieces) -> LearnedRanking:
    start, constants = _start(prepared, pieces)
    largest = dict.fromkeys(prepared.config.sites, 1.0)
    how: dict[str, Any] = {"how": prepared.how, "largest": largest, "constants": constants}
    learned = learn_order(prepared.model, prepared.ranked, prepared.collect, start, store=pieces, **how)
    rows = _evaluated(prepared, pieces, {"start": start, "learned": learned.theta}, constants)
    found = _separabilities(prepared, rows)
    tensors = {f"scores/{site}": value for site, value in scores_of(prepared.ranked, learned.theta).items()}
    tensors |= {} if constants is None else {f"constants/{site}": value for site, value in constants.items()}
    tables = {
        "neurons": Scores({name.removeprefix("scores/"): value for name, value in tensors.items() if name.startswith("scores/")}).table,
        "areas": _areas(prepared, found),
        "gaps": _gaps(found),
        "trajectory": _trajectory(found),
        "history": pd.DataFrame(learned.history.numpy(), columns=list(HISTORY)).rename_axis("step").reset_index(),
        "held_out": pd.DataFrame([{"step": step, "area": value} for step, value in learned.held_out.items()]),
        "cost": _cost(prepared, learned),
    }
    tables["history"]["step"] += 1
    return LearnedRanking(as_json({"study": LearnedRanking.STUDY, **prepared.resolved}), tables, tensors)


def _start(prepared: _Plan, pieces: Pieces) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
    """θ before the first step, and what masked neurons are set to."""
    c, sites = prepared.config, tuple(one.site for one in prepared.ranked)
    stored = pieces.get("start")
    if stored is None:
        scored = isinstance(c.init, str)
        roles = ROLES if scored else ("retain",) if c.constants != "zero" else ()
        how: dict[str, Any] = {"batch_size": c.batch_size, "histogram": c.histogram, "gradients": gradients_for(c.init) if scored else ()}
        statistics = {role: collect_sample(prepared.model, prepared.collect[role], sites, **how) for role in roles}
        scores = score(statistics["forget"], statistics["retain"], c.init) if scored else c.init
        tensors = {f"theta/{key}": value for key, value in starting_theta(prepared.ranked, scores).items()}
        if c.constants != "zero":
            tensors |= {f"constants/{site}": statistics["retain"][site].mean for site in sites}
        pieces.put("start", tensors)
        stored = tensors, None
    theta = {one.key: stored[0][f"theta/{one.key}"] for one in prepared.ranked}
    return theta, None if c.constants == "zero" else {site: stored[0][f"constants/{site}"] for site in sites}


def _evaluated(
    prepared: _Plan, pieces: Pieces, orders: Mapping[str, Mapping[str, Tensor]], constants: Mapping[str, Tensor] | None
) -> dict[tuple[str, str], Rows]:
    """(texts, order) -> evaluation sums of every row; each is written before the next is computed."""
    c, found = prepared.config, {}
    shares = [{one.key: i / LAST_SHARES for one in prepared.ranked} for i in range(1, LAST_SHARES + 1)]
    for texts, samples in prepared.texts().items():
        for order, theta in orders.items():
            name = f"{texts}-{order}".replace(" ", "-")
            stored = pieces.get(name)
            if stored is None:
                known = found.get((texts, "start"))
                how: dict[str, Any] = {"constants": constants, "batch_size": c.batch_size, "unpruned": known}
                rows = masked_rows(prepared.model, prepared.ranked, theta, samples, shares, **how)
                pieces.put(name, {role: torch.from_numpy(value) for role, value in rows.items()})
                found[texts, order] = rows
            else:
                found[texts, order] = {role: stored[0][role].numpy() for role in ROLES}
    return found


def _separabilities(prepared: _Plan, rows: Mapping[tuple[str, str], Rows]) -> dict[tuple[str, str], Separability]:
    found = {}
    for (texts, order), sums in rows.items():
        samples = prepared.texts()[texts]
        forget, retain = (np.stack([cluster_sums(step, samples[role].clusters) for step in sums[role]]) for role in ROLES)
        fingerprints = f"{texts} of {samples[ROLES[0]].fingerprint}", f"{texts} of {samples[ROLES[1]].fingerprint}"
        found[texts, order] = separability(forget, retain, "top1", seed=TEXTS.index(texts), samples=fingerprints)
    return found


def _areas(prepared: _Plan, found: Mapping[tuple[str, str], Separability]) -> pd.DataFrame:
    rows = []
    for (texts, order), s in found.items():
        documents = min(sample.n_documents for sample in prepared.texts()[texts].values())
        row: dict[str, Any] = {"texts": texts, "order": order, "n_documents": documents} | as_columns("area", s.area, s.interval)
        row |= as_columns("max_drop", s.max_drop, s.max_drop_interval)
        reached = bool((s.forget <= (1 - COST / 100) * s.forget[0]).any())
        row |= as_columns("retain_cost_80", s.retain_cost(COST), s.retain_cost_interval(COST)) if reached else as_columns("retain_cost_80")
        rows.append(row | (as_columns("gain", *s.minus(found[texts, "start"])) if order == "learned" else as_columns("gain")))
    return pd.DataFrame(rows)


def _gaps(found: Mapping[tuple[str, str], Separability]) -> pd.DataFrame:
    rows = []
    for order in ORDERS:
        fitted, unseen = found["fitted", order], found["evaluation", order]
        drawn = fitted.replicas.area - unseen.replicas.area
        ends = bootstrap_interval(drawn, min(fitted.replicas.clusters, unseen.replicas.clusters))
        rows.append({"order": order} | as_columns("gap", fitted.area - unseen.area, ends))
    return pd.DataFrame(rows)


def _trajectory(found: Mapping[tuple[str, str], Separability]) -> pd.DataFrame:
    rows = []
    for (texts, order), s in found.items():
        for step, (forget, retain) in enumerate(zip(s.forget, s.retain, strict=True)):
            share = step / LAST_SHARES
            rows.append({"texts": texts, "order": order, "step": step, "share": share, "forget": float(forget), "retain": float(retain)})
    return pd.DataFrame(rows)


def _cost(prepared: _Plan, learned: Learned) -> pd.DataFrame:
    collected = sum(sample.tokens for sample in prepared.collect.values())
    counts = {name: getattr(learned, name) for name in ("forward_tokens", "backward_tokens", "check_tokens")}
    row = {"best_step": learned.step, "cap": learned.cap, "collected": collected, **counts, "passes": sum(counts.values()) / collected}
    return pd.DataFrame([row])
