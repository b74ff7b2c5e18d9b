"""Increasing numbers of random neurons ablated, the same neurons under every kind: the protocol of [PEAK] (METHODS 8)."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from sepcap.checks import checked
from sepcap.evaluation.next_token import evaluate_sample
from sepcap.evaluation.result import ratio
from sepcap.interventions.ablation import WITHOUT_REFERENCE, ablate
from sepcap.models.sites import site_shape
from sepcap.progress import progress
from sepcap.selection.neurons import NeuronSet, how_many
from sepcap.statistics.collect import collect_sample
from sepcap.statistics.intervals import Interval, bootstrap_interval, cluster_sums
from sepcap.statistics.moments import Statistics
from sepcap.studies.ablations import figures
from sepcap.studies.ablations.config import AblationSweepConfig
from sepcap.studies.ablations.fit import constants_of_targets, spread
from sepcap.studies.ablations.heads import balanced
from sepcap.studies.ablations.sums import RowSums, samples_of
from sepcap.studies.base.folder import Pieces
from sepcap.studies.base.result import Figures
from sepcap.studies.base.runner import run_study, study
from sepcap.studies.pruning.separability import halves, resampled
from sepcap.tasks.batches import TokenSample

CELLS = "cells"
"""Folder, among the pieces of a sweep, of the sets that are evaluated: one for every seed and step."""

Curve = Float[np.ndarray, "*replica step"]


def _at_half(values: Curve) -> Float[np.ndarray, "*replica"]:
    """Value with half of the neurons ablated, interpolated linearly between steps."""
    middle = (values.shape[-1] - 1) / 2
    below, above = math.floor(middle), math.ceil(middle)
    return (values[..., below] + values[..., above]) / 2


def _share_left(top1: Curve) -> Float[np.ndarray, "*replica"]:
    with np.errstate(invalid="ignore", divide="ignore"):  # the unablated top-1 may be 0
        return np.trapezoid(top1, dx=1 / (top1.shape[-1] - 1)) / top1[..., 0]


AT_HALF: dict[str, tuple[str, Callable[[Curve], np.ndarray]]] = {
    "top1_at_50": ("top1", _at_half),
    "loss_at_50": ("loss", _at_half),
    "area": ("top1", _share_left),
}
"""Columns of `AblationSweep.by_kind`: metric, and what is computed from it."""


class AblationSweep(RowSums):
    """Accuracy and loss as random neurons are ablated, per kind of ablation.

    Attributes:
        config: the resolved configuration, with versions and fingerprints; `neurons` is the number of neurons of the site.
        tables: "by_kind", one row per kind: top-1 and loss with half of the neurons ablated, and the area under top-1 divided by the
            unablated top-1 (1: nothing is lost, 0: everything at once). Each is the mean over seeds with the ends `_low` and `_high` of
            its 95% bootstrap interval, and its standard deviation over seeds, `_seeds_sd` (n − 1 in the denominator). The interval is
            over the documents of the evaluation, for the seeds that were run.
            "table", one row per seed, step and kind: fraction and number of ablated neurons, top1, loss, n, n_documents; fraction 0 is
            the unablated model.
        tensors: sums per row, in the order of `COUNTS`: `before` [row, count] of the unablated model and `per_row`
            [seed, step, kind, row, count]; `clusters` [row], the document of every row.

    Example:
        >>> result = AblationSweep.load("runs/peak")  # doctest: +SKIP
        >>> result.by_kind  # doctest: +SKIP
    """

    STUDY = "ablation-sweep"
    TITLE = "How much of a model is left as more random neurons are ablated, and which kind of ablation leaves the most?"
    FIGURES: ClassVar[Figures] = {"sweep": ("Top-1 accuracy and cross-entropy against ablated neurons", figures.ablation_sweep)}

    @property
    def table(self) -> pd.DataFrame:
        """One row per seed, step and kind."""
        return self.tables["table"]

    @property
    def by_kind(self) -> pd.DataFrame:
        """One row per kind."""
        return self.tables["by_kind"]

    def _tables(self) -> dict[str, pd.DataFrame]:
        return {"by_kind": self._by_kind(), "table": self._steps()}

    def _steps(self) -> pd.DataFrame:
        rows, c = [], self.config
        for i, seed in enumerate(c["seeds"]):
            for step in range(c["steps"] + 1):
                for j, kind in enumerate(c["kinds"]):
                    after = self._evaluation(self.tensors["per_row"][i, step - 1, j]) if step else self.before
                    fraction = step / c["steps"]
                    row = {"fraction": fraction, "neurons": int(fraction * c["neurons"] + 1e-9), "seed": seed, "kind": kind}
                    rows.append(row | {"top1": after.top1, "loss": after.loss, "n": after.n, "n_documents": after.n_documents})
        return pd.DataFrame(rows)

    def _by_kind(self) -> pd.DataFrame:
        rows = []
        for j, kind in enumerate(self.config["kinds"]):
            sums = self._sums(j)
            row: dict[str, Any] = {"kind": kind}
            for name, (metric, measure) in AT_HALF.items():
                of_seeds = measure(ratio(sums, metric))
                drawn = [measure(resampled(of_seed, metric, np.random.default_rng(0))) for of_seed in sums]
                found = Interval(float(of_seeds.mean()), *bootstrap_interval(np.mean(drawn, axis=0), self.before.n_clusters))
                row |= found.columns(name) | {f"{name}_seeds_sd": np.std(of_seeds, ddof=1) if len(of_seeds) > 1 else np.nan}
            rows.append(row | {"seeds": len(sums), "n_documents": self.before.n_documents})
        return pd.DataFrame(rows)

    def _sums(self, kind: int) -> Float[np.ndarray, "seed step cluster count"]:
        """Sums per document at every step, starting with the unablated model."""
        rows = self.tensors["per_row"][:, :, kind].numpy()
        start = np.broadcast_to(self.before.per_row, rows[:, :1].shape)
        return cluster_sums(np.concatenate([start, rows], axis=1), self.before.clusters)

    def summary(self) -> list[str]:
        """Top-1 and loss with half of the neurons ablated, by kind, and whether the best kind on half the documents leads on the rest."""
        c, seeds = self.config, len(self.config["seeds"])
        ranked = self.by_kind.sort_values("top1_at_50", ascending=False).to_dict("records")
        said = [
            f"Random {c['site']} neurons of {c['model']} were ablated in {c['steps']} equal steps up to all {c['neurons']:,}, in {seeds} "
            f"random order{'s' * (seeds > 1)}, the same neurons for every kind. On {c['task']} ({self.before.n:,} predictions in "
            f"{self.before.n_documents:,} documents), "
            f"the unablated model has a top-1 accuracy of {self.before.top1:.3f} and a cross-entropy of {self.before.loss:.3f} nats."
        ]
        for row in ranked:
            spread = f"95% interval over texts {row['top1_at_50_low']:.3f} to {row['top1_at_50_high']:.3f}"
            spread += f", standard deviation over seeds {row['top1_at_50_seeds_sd']:.3f}" if seeds > 1 else ""
            area = (
                f"the area under top-1 was {row['area']:.2f} of the area without any loss"
                if np.isfinite(row["area"])
                else "the area under top-1 is undefined, because the top-1 accuracy of the unablated model is 0"
            )
            said.append(
                f"{row['kind']}: with half of the neurons ablated, top-1 was {row['top1_at_50']:.3f} ({spread}) and cross-entropy "
                f"{row['loss_at_50']:.3f}; {area}."
            )
        if len(ranked) > 1:
            said.append(self._ahead())
        return said

    def _ahead(self) -> str:
        """The two highest kinds on one half of the documents, and their difference on the other half: on the documents used for the
        ranking, the difference is biased upwards."""
        step, kinds = max(1, round(self.config["steps"] / 2)), self.config["kinds"]
        # sums over seeds, so that texts are resampled
        sums = np.stack([self._sums(kind)[:, step].sum(0) for kind in range(len(kinds))])
        ranking, other = halves(sums.shape[1], np.random.default_rng(0))
        if len(ranking) < 2:
            return "There are too few documents to rank the kinds on one half and measure their difference on the other."
        pair = np.argsort(-ratio(sums[:, ranking], "top1"), kind="stable")[:2]
        measured = sums[pair][:, other]
        (first, second), drawn = ratio(measured, "top1"), resampled(measured, "top1", np.random.default_rng(0))
        low, high = bootstrap_interval(drawn[:, 0] - drawn[:, 1], len(other))
        return (
            f"On one half of the documents, {kinds[pair[0]]} ranks before {kinds[pair[1]]} at {step / self.config['steps']:.0%} ablated; "
            f"on the other half, their difference in top-1 is {first - second:+.4f}, 95% bootstrap interval over texts "
            f"[{low:+.4f}, {high:+.4f}]{'' if low > 0 or high < 0 else ', which contains 0'}."
        )


@study(AblationSweepConfig)
@checked()
def sweep_ablation(model: Any, config: AblationSweepConfig, *, out: str | Path | None = None, say: Callable[[str], Any]) -> AblationSweep:
    """Ablate random neurons in equal steps up to all of them, in several ways, and measure top-1 and loss.

    All kinds ablate the same neurons; each step includes the neurons of the previous step. With `out`, every set is written
    before the next begins, the same call resumes an interrupted one, and a finished folder is read.

    Args:
        model: what `load_model` returns; default is to load `config.model`.
        config: an `AblationSweepConfig`; its fields can also be given as keywords. The defaults are the protocol of [PEAK].
        out: folder of the study, with the sums per row of every set; without one, nothing is saved.
        progress: True announces the work and its cost and shows bars, False shows nothing; a function receives the announcements.

    Returns:
        AblationSweep with `.table`, `.by_kind`, `.summary()`, `.figure()` and `.report()`.

    Raises:
        ValueError: steps too small to contain a neuron, too little text.
        FileExistsError: the folder contains something else (the error names the differing fields).

    Source: [PEAK] section 3; METHODS section 8.

    Example:
        >>> sepcap.sweep_ablation(model, task="local-prose", steps=5, out="runs/peak").by_kind  # doctest: +SKIP
    """
    total = math.prod(site_shape(model, config.site))
    how_many(1 / config.steps, total, config.site)
    constants = bool(set(config.kinds) - set(WITHOUT_REFERENCE))
    sample, collected, resolved = samples_of(model, config, constants=constants)
    resolved |= {"neurons": total}

    def cost() -> str:
        seeds = len(config.seeds)
        sets = seeds * config.steps
        tokens = (1 + sets * len(config.kinds)) * sample.tokens + (0 if collected is None else collected.tokens)
        return (
            f"{resolved['model']}: {total:,} {config.site} neurons ablated in {config.steps} steps in {seeds} random "
            f"order{'s' * (seeds > 1)}, {sets} sets in {len(config.kinds)} ways on {sample.tokens:,} tokens of {sample.task}: "
            f"{tokens / 1e6:.3g} M tokens through the model"
        )

    def compute(pieces: Pieces) -> AblationSweep:
        before, per_row = _Sweep(model, config, sample, collected, pieces).run()
        return AblationSweep.of(resolved, before.numpy(), per_row.numpy(), sample.clusters)

    return run_study(AblationSweep, resolved, compute, out, cost, say)


@dataclass(frozen=True, eq=False)
class _Sweep:
    """A sweep in progress."""

    model: Any
    config: AblationSweepConfig
    sample: TokenSample
    collected: TokenSample | None
    pieces: Pieces

    def run(self) -> tuple[Float[Tensor, "row count"], Float[Tensor, "seed step kind row count"]]:
        """Sums per row of the unablated model and of every set; those that are stored are read."""
        c, per_row = self.config, []
        before = self._kept("before", lambda: evaluate_sample(self.model, self.sample, batch_size=self._batch_size).per_row)
        sets = [(seed, step) for seed in c.seeds for step in range(1, c.steps + 1)]
        passes = len(c.kinds)
        with progress(total=len(sets) * passes, desc=f"ablate {self.sample.task}", unit="pass", leave=True, delay=0) as bar:
            for seed, step in sets:
                name = f"{CELLS}/seed-{seed}-step-{step:03d}"
                if self.pieces.get(name) is not None:
                    bar.update(passes)
                per_row.append(self._kept(name, partial(self._ablated, seed, step, bar)))
        return before, torch.stack(per_row).unflatten(0, (len(c.seeds), c.steps))

    def _kept(self, name: str, compute: Callable[[], np.ndarray]) -> Tensor:
        if (kept := self.pieces.get(name)) is not None:
            return kept[0]["per_row"]
        per_row = torch.from_numpy(compute())
        self.pieces.put(name, {"per_row": per_row})
        return per_row

    @property
    def _batch_size(self) -> int:
        return balanced(len(self.sample.rows), self.config.batch_size)

    @cached_property
    def _reference(self) -> Statistics | None:
        if self.collected is None:
            return None
        path = self.pieces.folder / "reference.safetensors"
        if not path.exists():
            size = self.config.batch_size
            collect_sample(self.model, self.collected, (self.config.site,), batch_size=size, histogram=True).save(path)
        return Statistics.load(path)

    def _ablated(self, seed: int, step: int, bar: Any) -> np.ndarray:
        # for one seed, a larger share includes every smaller one
        neurons = NeuronSet.random(self.model, {self.config.site: step / self.config.steps}, seed=seed)
        rows, reference = [], self._reference
        for kind in self.config.kinds:
            how: Any = kind
            if kind == "optimal":
                assert reference is not None
                assert self.collected is not None
                fit = spread(self.collected, self.config.fit_tokens)
                how = constants_of_targets(self.model, fit, {None: neurons}, reference, batch_size=self.config.batch_size)[None]
            with ablate(self.model, neurons, how, reference=reference, seed=seed):
                rows.append(evaluate_sample(self.model, self.sample, batch_size=self._batch_size, quiet=True).per_row)
            bar.update()
        return np.stack(rows)
