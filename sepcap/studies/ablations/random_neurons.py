"""The [PEAK] protocol: increasing numbers of random neurons ablated, the same neurons under every kind (METHODS 8)."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float

from sepcap.checks import checked
from sepcap.errors import CorruptFile
from sepcap.evaluation.next_token import evaluate_sample
from sepcap.evaluation.result import Evaluation, ratio
from sepcap.interventions.ablation import ablate
from sepcap.models.loading.load import load_model
from sepcap.models.sites import site_shape
from sepcap.progress import progress, tell
from sepcap.selection.neurons import NeuronSet, how_many
from sepcap.statistics.collect import collect_sample
from sepcap.statistics.intervals import Interval, bootstrap_interval, cluster_sums
from sepcap.statistics.moments import Statistics
from sepcap.storage import html_card, load_tensors, save_tensors
from sepcap.studies.ablations import figures
from sepcap.studies.ablations.config import AblationSweepConfig
from sepcap.studies.ablations.fit import constants_of_targets, spread
from sepcap.studies.ablations.heads import balanced
from sepcap.studies.base.folder import (
    FINISHED,
    Pieces,
    finish_study,
    is_finished,
    listed,
    open_study,
    study_config,
    whole_study,
    write_tables,
)
from sepcap.studies.base.provenance import made_with
from sepcap.studies.base.result import Figures, Shown
from sepcap.studies.pruning.separability import halves, resampled
from sepcap.tasks.batches import TokenSample
from sepcap.tasks.load import load_task
from sepcap.tasks.samples import check_context, sample_task

BEFORE = "before.safetensors"

Cell = tuple[int, int]
"""Seed and step."""

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


@dataclass(frozen=True, eq=False)
class AblationSweep(Shown):
    """Accuracy and loss as random neurons are ablated, per kind of ablation.

    Attributes:
        config: the resolved configuration, with versions and fingerprints.
        before: evaluation of the unablated model.
        per_row: (seed, step) -> sums per row [kind, row, count], in the order of the kinds and of `before.per_row`.

    Example:
        >>> result = AblationSweep.load("runs/peak")  # doctest: +SKIP
        >>> result.by_kind  # doctest: +SKIP
    """

    STUDY = "ablation-protocol"
    TITLE = "How much of a model is left as more random neurons are ablated, and which kind of ablation leaves the most?"
    FIGURES: ClassVar[Figures] = {"protocol": ("Top-1 accuracy and cross-entropy against ablated neurons", figures.ablation_protocol)}

    folder = None
    config: Mapping[str, Any]
    before: Evaluation
    per_row: Mapping[Cell, np.ndarray]

    @property
    def table(self) -> pd.DataFrame:
        """One row per seed, step and kind: fraction and number of ablated neurons, top1, loss, n, n_documents; fraction 0 is the
        unablated model."""
        return self._table

    @cached_property
    def _table(self) -> pd.DataFrame:
        rows = []
        for seed in self.config["seeds"]:
            for step in range(self.config["steps"] + 1):
                for j, kind in enumerate(self.config["kinds"]):
                    after = dataclasses.replace(self.before, per_row=self.per_row[seed, step][j]) if step else self.before
                    fraction = step / self.config["steps"]
                    row = {"fraction": fraction, "neurons": int(fraction * self.config["neurons"] + 1e-9), "seed": seed, "kind": kind}
                    rows.append(row | {"top1": after.top1, "loss": after.loss, "n": after.n, "n_documents": after.n_documents})
        return pd.DataFrame(rows)

    @cached_property
    def by_kind(self) -> pd.DataFrame:
        """One row per kind: top-1 and loss with half of the neurons ablated, and the area under top-1 divided by the unablated top-1 (1:
        nothing is lost, 0: everything at once). Each is the mean over seeds with the ends `_low` and `_high` of its 95% bootstrap
        interval, and its standard deviation over seeds, `_seeds_sd` (n − 1 in the denominator). The interval is over the documents of
        the evaluation, for the seeds that were run."""
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
        steps = range(1, self.config["steps"] + 1)
        by_seed = [[self.before.per_row, *(self.per_row[seed, step][kind] for step in steps)] for seed in self.config["seeds"]]
        return cluster_sums(np.array(by_seed), self.before.clusters)

    @property
    def tables(self) -> dict[str, pd.DataFrame]:
        """Both tables by name."""
        return {"by_kind": self.by_kind, "table": self.table}

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

    @checked()
    def save(self, folder: str | Path) -> Path:
        """Write the same folder as `sweep_ablation(out=…)`.

        Raises:
            FileExistsError: the folder contains something else, or a protocol with another configuration.
        """
        with open_study(folder, self.STUDY, self.config) as pieces:
            self.before.save(pieces.folder / BEFORE)
            for cell, rows in self.per_row.items():
                _write_cell(pieces.folder, cell, rows)
            self._finish(pieces)
        return Path(folder)

    def _finish(self, pieces: Pieces) -> None:
        write_tables(pieces.folder, self.tables)
        finish_study(pieces, self.tables)
        object.__setattr__(self, "folder", pieces.folder)

    @classmethod
    @checked()
    def load(cls, folder: str | Path) -> "AblationSweep":
        """Read a finished folder.

        Raises:
            FileNotFoundError: there is no protocol, or some of its steps are missing (the same call resumes it).
        """
        folder = Path(folder)
        config = study_config(folder, cls.STUDY)
        cells = {cell: _cell_path(folder, cell) for cell in _cells(config)}
        missing = [cell for cell, path in cells.items() if not path.exists()]
        if missing and not (folder / FINISHED).exists():
            seed, step = missing[0]
            raise FileNotFoundError(f"{folder} is not finished: {len(missing)} sets are missing, the first is seed {seed}, step {step}")
        held = whole_study(folder, config)
        for path in (folder / BEFORE, *cells.values()):
            listed(folder, held, path.relative_to(folder).as_posix())
        result = cls(config, Evaluation.load(folder / BEFORE), {cell: _read_cell(path, cell) for cell, path in cells.items()})
        object.__setattr__(result, "folder", folder)
        return result

    def __repr__(self) -> str:
        c = self.config
        return (
            f"AblationSweep({c['task']!r}, {c['neurons']:,} {c['site']} neurons in {c['steps']} steps, {len(c['seeds'])} seeds, "
            f"{', '.join(c['kinds'])})"
        )

    def _repr_html_(self) -> str:
        how = {name: self.config[name] for name in ("model", "task", "site", "steps", "seeds")}
        return html_card("Ablation protocol", how, self.by_kind)


@checked()
def sweep_ablation(model: Any = None, config: AblationSweepConfig | None = None, *, out: str | Path | None = None) -> AblationSweep:
    """Ablate random neurons in equal steps up to all of them, in several ways, and measure top-1 and loss.

    All kinds ablate the same neurons; each step includes the neurons of the previous step. With `out`, every set is written
    before the next begins, the same call resumes an interrupted one, and a finished folder is read.

    Args:
        model: what `load_model` returns; default is to load `config.model`.
        config: the protocol; default is that of [PEAK] on the embedded model.
        out: folder for config.json, the sums per row of every set, the statistics, and the tables.

    Returns:
        AblationSweep with `.table`, `.by_kind`, `.summary()`, `.figure()` and `.report()`.

    Raises:
        ValueError: steps too small to contain a neuron, too little text.
        FileExistsError: the folder contains something else (the error names the differing fields).

    Source: [PEAK] section 3; METHODS section 8.

    Example:
        >>> config = AblationSweepConfig(task="local-prose", steps=5)  # doctest: +SKIP
        >>> sweep_ablation(model, config, out="runs/peak").by_kind  # doctest: +SKIP
    """
    config = config or AblationSweepConfig()
    model = load_model(config.model if model is None else model)
    total = math.prod(site_shape(model, config.site))
    how_many(1 / config.steps, total, config.site)
    task = load_task(config.task)
    context = check_context(model, config.context)
    sample = sample_task(model, task, "evaluate", config.tokens, context, per_document=config.per_document)
    collected = sample_task(model, task, "collect", config.reference_tokens, context, per_document=config.per_document)
    resolved = dataclasses.asdict(dataclasses.replace(config, task=task.name)) | {
        "context": context,
        **made_with(model),
        "neurons": total,
        "samples": {"collect": collected.fingerprint, "evaluate": sample.fingerprint},
        "documents": {"collect": list(collected.indices), "evaluate": list(sample.indices)},
        "n_documents": {"collect": collected.n_documents, "evaluate": sample.n_documents},
    }
    with nullcontext() if out is None else open_study(out, AblationSweep.STUDY, resolved) as pieces:
        return _Protocol(model, config, sample, collected, pieces, resolved).run()


@dataclass
class _Protocol:
    """A protocol in progress."""

    model: Any
    config: AblationSweepConfig
    sample: TokenSample
    collected: TokenSample
    pieces: Pieces | None
    resolved: dict[str, Any]

    @property
    def folder(self) -> Path | None:
        """The output folder, or None."""
        return None if self.pieces is None else self.pieces.folder

    def run(self) -> AblationSweep:
        if self.pieces is not None and is_finished(self.pieces):
            return AblationSweep.load(self.pieces.folder)
        cells = _cells(self.resolved)
        paths = {} if self.folder is None else {cell: _cell_path(self.folder, cell) for cell in cells}
        per_row = {cell: _read_cell(path, cell) for cell, path in paths.items() if path.exists()}
        before = self._before()
        reference = self._reference() if len(per_row) < len(cells) else None
        passes = len(self.config.kinds)
        total, done = len(cells) * passes, len(per_row) * passes
        tell(f"{total - done} evaluations on {self.sample.tokens:,} tokens of {self.sample.task}, {total} in all")
        with progress(total=total, initial=done, desc=f"ablate {self.sample.task}", unit="pass", leave=True, delay=0) as bar:
            for cell in cells:
                if cell in per_row:
                    continue
                per_row[cell] = self._ablated(cell, reference, bar)
                if self.folder is not None:
                    _write_cell(self.folder, cell, per_row[cell])
        if self.pieces is None:
            return AblationSweep(self.resolved, before, per_row)
        result = AblationSweep(study_config(self.pieces.folder, AblationSweep.STUDY), before, per_row)
        result._finish(self.pieces)
        return result

    @property
    def _batch_size(self) -> int:
        return balanced(len(self.sample.rows), self.config.batch_size)

    def _before(self) -> Evaluation:
        path = None if self.folder is None else self.folder / BEFORE
        if path is not None and path.exists():
            return Evaluation.load(path)
        before = evaluate_sample(self.model, self.sample, batch_size=self._batch_size)
        if path is not None:
            before.save(path)
        return before

    def _reference(self) -> Statistics | None:
        if not set(self.config.kinds) - {"zero", "resample"}:
            return None
        path = None if self.folder is None else self.folder / "reference.safetensors"
        if path is not None and path.exists():
            return Statistics.load(path)
        reference = collect_sample(self.model, self.collected, (self.config.site,), batch_size=self.config.batch_size, histogram=True)
        if path is not None:
            reference.save(path)
        return reference

    def _ablated(self, cell: Cell, reference: Statistics | None, bar: Any) -> np.ndarray:
        seed, step = cell
        # for one seed, a larger share includes every smaller one
        neurons = NeuronSet.random(self.model, {self.config.site: step / self.config.steps}, seed=seed)
        rows = []
        for kind in self.config.kinds:
            how: Any = kind
            if kind == "optimal":
                assert reference is not None
                fit = spread(self.collected, self.config.fit_tokens)
                how = constants_of_targets(self.model, fit, {None: neurons}, reference, batch_size=self.config.batch_size)[None]
            with ablate(self.model, neurons, how, reference=reference, seed=seed):
                rows.append(evaluate_sample(self.model, self.sample, batch_size=self._batch_size, quiet=True).per_row)
            bar.update()
        return np.stack(rows)


def _cells(config: Mapping[str, Any]) -> list[Cell]:
    return [(seed, step) for seed in config["seeds"] for step in range(1, config["steps"] + 1)]


def _cell_path(folder: Path, cell: Cell) -> Path:
    return folder / "rows" / f"seed-{cell[0]}-step-{cell[1]:03d}.safetensors"


def _read_cell(path: Path, cell: Cell) -> np.ndarray:
    tensors, meta = load_tensors(path, "protocol")
    if meta.get("cell") != list(cell):
        raise CorruptFile(f"{path} contains another seed or step; delete it, and the same call recreates it")
    return tensors["per_row"].numpy()


def _write_cell(folder: Path, cell: Cell, rows: np.ndarray) -> None:
    save_tensors(_cell_path(folder, cell), {"per_row": torch.from_numpy(rows)}, {"kind": "protocol", "cell": list(cell)})
