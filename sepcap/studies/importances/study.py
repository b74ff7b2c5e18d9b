"""Comparison of importances: every score against the exact effect of every neuron, and by pruning trajectories (METHODS 19)."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sepcap.checks import checked
from sepcap.evaluation.result import METRICS, ratio
from sepcap.learning.held_out import area_of, masked_rows
from sepcap.learning.order import Ranked, ranked_of
from sepcap.progress import progress
from sepcap.selection.score import score
from sepcap.statistics.collect import collect_sample
from sepcap.statistics.intervals import cluster_sums
from sepcap.studies.base.folder import Pieces
from sepcap.studies.base.runner import run_study, study
from sepcap.studies.importances.config import (
    ABS,
    LABELLED,
    LEARNED,
    RANDOM,
    ImportanceComparisonConfig,
    NeuronSite,
    collected_with,
    in_direction,
    parsed,
)
from sepcap.studies.importances.measures import ROLES, Effects, random_scores
from sepcap.studies.importances.plan import Plan, plan_comparison
from sepcap.studies.importances.result import ImportanceComparison
from sepcap.studies.importances.tables import Found, result_of
from sepcap.studies.learned.config import LearnedRankingConfig
from sepcap.studies.learned.study import LearnedRanking, learn_ranking
from sepcap.studies.pruning.config import DIRECTIONS, Direction
from sepcap.studies.pruning.plan import plan
from sepcap.studies.pruning.prune import execute
from sepcap.studies.pruning.separability import Separability, separability
from sepcap.studies.single_ablations.config import SingleAblationsConfig
from sepcap.studies.single_ablations.result import SingleAblations
from sepcap.studies.single_ablations.study import ablate_each
from sepcap.tasks.batches import TokenSample
from sepcap.tasks.samples import check_context


@study(ImportanceComparisonConfig, loads=False)
@checked()
def compare_importances(
    model: Any | None, config: ImportanceComparisonConfig, *, out: str | Path | None = None, say: Callable[[str], Any]
) -> ImportanceComparison:
    """Compare importances with the exact effect of every neuron ablated alone, and by how well pruning by them separates two tasks.

    One row per score, site and direction: rank correlation with the exact effects, recall of the neurons with the largest ones, area of
    the pruning trajectory, share of the retained task that is lost where half of the other one is, cost. Also reported are random
    orders, the learned order, the reproducibility of the effects, and the same with random weights. With `out`, every part is written
    before the next one begins: the same call resumes an interrupted one.

    Args:
        model: what `load_model` returns; default is to load `config.model`. It is not changed.
        config: an `ImportanceComparisonConfig`; its fields can also be given as keywords.
        out: folder of the study, which also holds the studies that it is made of; without one, nothing is saved.
        progress: True announces the work and its cost and shows bars, False shows nothing; a function receives the announcements.

    Returns:
        ImportanceComparison with `.table` (the league table), `.tables`, `.summary()` and `.figure()`.

    Raises:
        ValueError: an unknown score, one that the model refuses, the same data twice, too little text, a model beside `compiled`.
        NotImplementedError: a score that is not defined for this architecture and was asked for by name.
        FileExistsError: the folder contains another configuration (the error names the differing fields).

    Source: METHODS section 19.

    Example:
        >>> found = sepcap.compare_importances(sites=("mlp",), sample=500, out="runs/importances")  # doctest: +SKIP
        >>> found.table.query("direction == 'forward'")  # doctest: +SKIP
    """
    prepared = plan_comparison(model, config, say)

    def compute(pieces: Pieces) -> ImportanceComparison:
        return result_of(prepared, _Work(prepared, pieces, say).all())

    return run_study(ImportanceComparison, prepared.resolved, compute, out, prepared.cost, say)


@dataclass(frozen=True, eq=False)
class _Work:
    """All parts of the study; each is a piece, or a study or run in a folder of its own, and is read if it is finished."""

    plan: Plan
    pieces: Pieces
    say: Callable[[str], Any]

    def all(self) -> Found:
        """Every part, one after the other."""
        prepared, c = self.plan, self.plan.config
        found = Found()
        for weights in prepared.weights:
            found.scores |= {(weights, *key): values for key, values in self.scores(weights).items()}
            for site in c.sites:
                found.ablations[weights, site] = self.effects(weights, site)
        if self.separable():
            for site in c.sites:
                for direction in DIRECTIONS:
                    self.trajectories(found, site, direction)
                if c.best:
                    self.iterative(found, site)
        return found

    @cached_property
    def untrained(self) -> Any:
        """The control, made when it is first needed."""
        assert self.plan.control is not None
        return self.plan.control(self.plan.config.seed)

    def model(self, weights: str) -> Any:
        """The model with trained or with random weights."""
        return self.plan.model if weights == "trained" else self.untrained

    def scores(self, weights: str) -> dict[tuple[str, Direction, str], Float[np.ndarray, "seed layer *neuron"]]:
        """(site, direction, score) -> the score of every neuron, by calibration texts."""
        prepared, c = self.plan, self.plan.config
        kinds = list(dict.fromkeys(collected_with(name) for name in prepared.scores))
        found: dict[Any, list[np.ndarray]] = {}
        with progress(total=len(c.seeds) * len(kinds), desc=f"scores, {weights}", unit="piece") as bar:
            for seed in c.seeds:
                for kind in kinds:
                    piece = f"scores/{weights}-{seed}-{kind or 'activations'}"
                    stored, _ = self.pieces.once(piece, partial(self._scored, weights, prepared.calibration[seed], kind))
                    for key, value in stored.items():
                        found.setdefault(tuple(key.split("/")), []).append(value.numpy())
                    bar.update()
        return {key: np.stack(of_seeds) for key, of_seeds in found.items()}

    def _scored(self, weights: str, texts: dict[str, TokenSample], kind: str) -> tuple[dict[str, Tensor], None]:
        """site/direction/score -> values of all scores of one kind of statistics."""
        prepared, c = self.plan, self.plan.config
        how: dict[str, Any] = {"histogram": not kind, "gradients": (kind,) if kind else (), "batch_size": c.batch_size}
        statistics = [collect_sample(self.model(weights), texts[role], c.sites, **how) for role in ROLES]
        found = {}
        for site in c.sites:
            for name in prepared.named(site):
                if collected_with(name) == kind:
                    importance, contrast = parsed(name)
                    for direction in DIRECTIONS:
                        values = score(*in_direction(direction, *statistics), importance, contrast=contrast, sites=(site,))[site]
                        if missing := int(values.isnan().sum()):
                            raise ValueError(f"scores: {missing} of {values.numel()} values of {name!r} at site {site!r} are NaN")
                        found[f"{site}/{direction}/{name}"] = values.detach().double().cpu().contiguous()
        return found, None

    def effects(self, weights: str, site: NeuronSite) -> tuple[np.ndarray, Effects]:
        """Places of the neurons that were ablated alone, and their exact effects on both tasks."""
        c = self.plan.config
        shared: dict[str, Any] = {field: getattr(c, field) for field in ("sample", "seed", "batch_size", "per_document")}
        texts: dict[str, Any] = {"tokens": c.effect_tokens, "reference_tokens": min(c.tokens, c.effect_tokens)}
        texts["context"] = min(c.effect_context, check_context(self.plan.model, c.context))
        config = SingleAblationsConfig(forget=c.forget, retain=c.retain, site=site, **shared, **texts)
        folder = self.pieces.folder / "ablations" / f"{weights}-{site}"
        # a finished one is read without its model
        done = SingleAblations.load(folder) if (folder / "result.json").exists() else None
        found = ablate_each(self.model(weights), config, out=folder, progress=self.say) if done is None else done
        sums = {role: _of_documents(found, role) for role in ROLES}
        predictions = {role: found.before[role].per_cluster[:, 0] for role in ROLES}
        return found.places, Effects(sums, predictions, self.plan.resolved["neurons"][site])

    def separable(self) -> bool:
        """Whether the accuracy of the model is above 0 on both tasks."""
        stored = self._rows("whole", partial(self._masked, self.plan.config.sites[0], torch.zeros(1), self.plan.evaluate, 0))
        return all(float(ratio(rows[0], "top1")) > 0 for rows in stored.values())

    def _rows(self, piece: str, make: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        stored, _ = self.pieces.once(piece, lambda: ({role: torch.from_numpy(value) for role, value in make().items()}, None))
        return {role: value.numpy() for role, value in stored.items()}

    def _masked(self, site: str, values: Tensor, texts: dict[str, TokenSample], steps: int) -> dict[str, np.ndarray]:
        """Evaluation sums of every row with 0 to all neurons of a site masked, in equal steps, the highest values first."""
        ranked: list[Ranked] = ranked_of(self.plan.model, (site,))
        shares = [{site: i / steps} for i in range(1, steps + 1)]
        how: dict[str, Any] = {"constants": None, "batch_size": self.plan.config.batch_size}
        values = values if steps else torch.zeros(ranked[0].shape)
        return masked_rows(self.plan.model, ranked, {site: values}, texts, shares, **how)

    def trajectories(self, found: Found, site: NeuronSite, direction: Direction) -> None:
        """One-shot trajectories of all orders in one direction, and areas on the collection texts."""
        prepared, c = self.plan, self.plan.config
        candidates = prepared.candidates(site) if c.best else []
        orders: list[tuple[str, int]] = [(name, 0) for name in prepared.ordered(site)]
        orders += [(RANDOM, draw) for draw in range(1, len(c.seeds)) if RANDOM in prepared.ordered(site)]
        if LEARNED in prepared.ordered(site):
            found.learned[site, direction] = self.learned(site, direction)
        with progress(total=len(orders) + len(candidates), desc=f"one-shot, {site} {direction}", unit="order") as bar:
            for name, draw in orders:
                values = self._order(found, site, direction, name, draw)
                texts = prepared.texts(direction, prepared.evaluate)
                rows = self._rows(f"one-shot/{site}-{direction}-{name}-{draw}", partial(self._masked, site, values, texts, c.steps))
                found.one_shot.setdefault((site, direction, name), []).append(_separability(rows, texts))
                bar.update()
            for name in candidates:
                values = self._order(found, site, direction, name, -1)
                texts = prepared.texts(direction, prepared.choice)
                rows = self._rows(f"choice/{site}-{direction}-{name}", partial(self._masked, site, values, texts, c.steps))
                found.choice[site, direction, name] = _area(rows)
                bar.update()

    def _order(self, found: Found, site: str, direction: Direction, name: str, draw: int) -> Tensor:
        if name == LEARNED:
            return found.learned[site, direction][site]
        if name == LABELLED:
            return torch.from_numpy(self.plan.by_labels(site, direction))
        if name == RANDOM:
            shape = found.scores["trained", site, direction, ABS].shape[1:]
            return torch.from_numpy(random_scores(shape, draw, self.plan.config.seed))
        # the best are chosen by scores of other texts than those on which they are chosen, if there are two seeds
        return torch.from_numpy(found.scores["trained", site, direction, name][0])

    def learned(self, site: NeuronSite, direction: Direction) -> LearnedRanking:
        """The learned order of a site in one direction."""
        c = self.plan.config
        forget, retain = in_direction(direction, c.forget, c.retain)
        shared: dict[str, Any] = {field: getattr(c, field) for field in ("batch_size", "context", "per_document")}
        budgets: dict[str, Any] = {"steps": c.learn_steps, "tokens": c.tokens * len(c.seeds), "eval_tokens": c.choice_tokens}
        config = LearnedRankingConfig(forget=forget, retain=retain, site=site, seed=c.seeds[0], **shared, **budgets)
        return learn_ranking(self.plan.model, config, out=self.pieces.folder / "learned" / f"{site}-{direction}", progress=self.say)

    def iterative(self, found: Found, site: str) -> None:
        """Iterative runs of abs and of the scores with the largest areas on the collection texts."""
        c = self.plan.config
        areas = {name: np.mean([found.choice[site, way, name] for way in DIRECTIONS]) for name in self.plan.candidates(site)}
        found.chosen[site] = sorted(areas, key=lambda name: -areas[name])[: c.best]
        known: dict[Any, Any] = {}
        jobs: list[tuple[str, Direction, int]] = [
            (name, way, seed) for name in (ABS, *found.chosen[site]) for way in DIRECTIONS for seed in c.seeds
        ]
        with progress(total=len(jobs), desc=f"iterative, {site}", unit="run") as bar:
            for name, way, seed in jobs:
                prepared = plan(self.plan.model, c.pruning(name, site, way, seed), known)
                run = execute(prepared, self.pieces.folder / "iterative" / site / name / f"{way}-{seed}")
                found.iterative.setdefault((site, way, name), []).append(run.separability("top1"))
                bar.update()


def _of_documents(found: SingleAblations, role: str) -> Float[np.ndarray, "unit cluster"]:
    """Changes of the summed loss of every document."""
    change = found.tensors[f"{role}/alone"].numpy()[..., METRICS.index("loss"), None].astype(np.float64)
    return cluster_sums(change, found.tensors[f"{role}/clusters"].numpy())[..., 0]


def _separability(rows: dict[str, np.ndarray], texts: dict[str, TokenSample]) -> Separability:
    forget, retain = (np.stack([cluster_sums(step, texts[role].clusters) for step in rows[role]]) for role in ROLES)
    return separability(forget, retain, "top1", samples=(texts["forget"].fingerprint, texts["retain"].fingerprint))


def _area(rows: dict[str, np.ndarray]) -> float:
    return area_of(rows) if all(float(ratio(rows[role][0], "top1")) > 0 for role in ROLES) else float("nan")
