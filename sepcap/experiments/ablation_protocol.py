"""The protocol of [PEAK]: more and more random neurons gone, every kind of ablation on the same ones (METHODS 8)."""

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
from sepcap.evaluation.next_token import Evaluation, evaluate_sample, ratio
from sepcap.experiments.ablation_config import AblationProtocol
from sepcap.experiments.ablations import balanced
from sepcap.experiments.ablations_fit import fit_constants, spread
from sepcap.experiments.provenance import made_with
from sepcap.experiments.result import (
    FINISHED,
    Figures,
    Pieces,
    Shown,
    finish_study,
    is_finished,
    listed,
    open_study,
    study_config,
    whole_study,
    write_tables,
)
from sepcap.experiments.separability import halves, resampled
from sepcap.interventions.ablation import ablate
from sepcap.models.load import load_model
from sepcap.models.sites import site_shape
from sepcap.progress import progress, tell
from sepcap.selection.neurons import NeuronSet, how_many
from sepcap.statistics.collect import collect_sample
from sepcap.statistics.intervals import Interval, bootstrap_interval, cluster_sums
from sepcap.statistics.moments import Statistics
from sepcap.storage import load_tensors, save_tensors
from sepcap.tasks.batches import TokenSample
from sepcap.tasks.samples import check_context, sample_task
from sepcap.tasks.task import load_task

BEFORE = "before.safetensors"

Cell = tuple[int, int]
"""Seed and step."""

Curve = Float[np.ndarray, "*replica step"]


def _at_half(values: Curve) -> Float[np.ndarray, "*replica"]:
    """Between steps on a straight line, where half of the neurons are gone."""
    middle = (values.shape[-1] - 1) / 2
    below, above = math.floor(middle), math.ceil(middle)
    return (values[..., below] + values[..., above]) / 2


def _share_left(top1: Curve) -> Float[np.ndarray, "*replica"]:
    with np.errstate(invalid="ignore", divide="ignore"):  # a model without any hit has nothing to lose
        return np.trapezoid(top1, dx=1 / (top1.shape[-1] - 1)) / top1[..., 0]


AT_HALF: dict[str, tuple[str, Callable[[Curve], np.ndarray]]] = {
    "top1_at_50": ("top1", _at_half),
    "loss_at_50": ("loss", _at_half),
    "area": ("top1", _share_left),
}
"""What `ProtocolResult.by_kind` has of a kind: metric, and what is computed from it."""


@dataclass(frozen=True, eq=False)
class ProtocolResult(Shown):
    """What is left of a model while random neurons are ablated, per kind of ablation.

    Attributes:
        config: the resolved configuration, with versions and fingerprints.
        before: evaluation of the model as it is.
        per_row: (seed, step) -> sums per row [kind, row, count], in the order of the kinds and of `before.per_row`.

    Example:
        >>> result = ProtocolResult.load("runs/peak")  # doctest: +SKIP
        >>> result.by_kind  # doctest: +SKIP
    """

    STUDY = "ablation-protocol"
    TITLE = "What is left of a model when more and more random neurons are ablated, and by which kind of ablation most?"
    FIGURES: ClassVar[Figures] = {"protocol": ("Top-1 accuracy and cross-entropy while random neurons go", "ablation_protocol")}

    folder = None
    config: Mapping[str, Any]
    before: Evaluation
    per_row: Mapping[Cell, np.ndarray]

    @cached_property
    def table(self) -> pd.DataFrame:
        """One row per seed, step and kind: fraction and number of neurons gone, top1, loss, n, n_documents; fraction 0 is the model as
        it is."""
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
        """One row per kind: top-1 and loss with half of the neurons gone, and the area under top-1 as a share of the unablated model's (1:
        nothing is lost, 0: all at once), each the mean over seeds with the ends `_low` and `_high` of its 95% bootstrap interval, and its
        standard deviation over seeds, `_seeds_sd` (n − 1 in the denominator). The interval is over the documents of the evaluation, for
        the seeds that were run."""
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
        """Sums per document with more and more neurons gone, those of the model as it is first."""
        steps = range(1, self.config["steps"] + 1)
        by_seed = [[self.before.per_row, *(self.per_row[seed, step][kind] for step in steps)] for seed in self.config["seeds"]]
        return cluster_sums(np.array(by_seed), self.before.clusters)

    @property
    def tables(self) -> dict[str, pd.DataFrame]:
        """Both tables by name."""
        return {"by_kind": self.by_kind, "table": self.table}

    def summary(self) -> list[str]:
        """What half of the neurons cost, kind by kind, and whether what one half of the documents ranks first is ahead on the other."""
        c, seeds = self.config, len(self.config["seeds"])
        ranked = self.by_kind.sort_values("top1_at_50", ascending=False).to_dict("records")
        said = [
            f"Random {c['site']} neurons of {c['model']} were ablated in {c['steps']} equal steps up to all {c['neurons']:,}, in {seeds} "
            f"random order{'s' * (seeds > 1)}, every kind on the same ones; measured on {c['task']} ({self.before.n:,} predictions in "
            f"{self.before.n_documents:,} documents), where "
            f"the model as it is has a top-1 accuracy of {self.before.top1:.3f} and a cross-entropy of {self.before.loss:.3f} nats."
        ]
        for row in ranked:
            spread = f"95% interval over texts {row['top1_at_50_low']:.3f} to {row['top1_at_50_high']:.3f}"
            spread += f", standard deviation over seeds {row['top1_at_50_seeds_sd']:.3f}" if seeds > 1 else ""
            area = (
                f"the area under top-1 was {row['area']:.2f} of what nothing lost would be"
                if np.isfinite(row["area"])
                else "there is no area under top-1, because the model as it is has no hit to lose"
            )
            said.append(
                f"{row['kind']}: with half of them gone, top-1 was {row['top1_at_50']:.3f} ({spread}) and cross-entropy "
                f"{row['loss_at_50']:.3f}; {area}."
            )
        if len(ranked) > 1:
            said.append(self._ahead())
        return said

    def _ahead(self) -> str:
        """The first two kinds as one half of the documents ranks them, and their difference on the other half: on the documents that rank
        them, the first is too far ahead."""
        step, kinds = max(1, round(self.config["steps"] / 2)), self.config["kinds"]
        # sums over seeds, so that what is resampled are texts
        sums = np.stack([self._sums(kind)[:, step].sum(0) for kind in range(len(kinds))])
        ranking, other = halves(sums.shape[1], np.random.default_rng(0))
        if len(ranking) < 2:
            return "There are too few documents to rank the kinds on one half of them and measure their difference on the other."
        pair = np.argsort(-ratio(sums[:, ranking], "top1"), kind="stable")[:2]
        measured = sums[pair][:, other]
        (first, second), drawn = ratio(measured, "top1"), resampled(measured, "top1", np.random.default_rng(0))
        low, high = bootstrap_interval(drawn[:, 0] - drawn[:, 1], len(other))
        return (
            f"One half of the documents ranks {kinds[pair[0]]} before {kinds[pair[1]]} at {step / self.config['steps']:.0%} gone; on the "
            f"other half their difference is {first - second:+.4f} of top-1, 95% bootstrap interval over texts "
            f"[{low:+.4f}, {high:+.4f}]{'' if low > 0 or high < 0 else ', which holds 0'}."
        )

    @checked()
    def save(self, folder: str | Path) -> Path:
        """Write the folder that `ablation_protocol(out=…)` writes.

        Raises:
            FileExistsError: the folder holds something else, or a protocol of another configuration.
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
    def load(cls, folder: str | Path) -> "ProtocolResult":
        """Read a finished folder.

        Raises:
            FileNotFoundError: there is no protocol, or some of its steps are missing (the same call goes on with it).
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
            f"ProtocolResult({c['task']!r}, {c['neurons']:,} {c['site']} neurons in {c['steps']} steps, {len(c['seeds'])} seeds, "
            f"{', '.join(c['kinds'])})"
        )

    def _repr_html_(self) -> str:
        from sepcap.storage import html_card

        how = {name: self.config[name] for name in ("model", "task", "site", "steps", "seeds")}
        return html_card("Ablation protocol", how, self.by_kind)


@checked()
def ablation_protocol(model: Any = None, config: AblationProtocol | None = None, *, out: str | Path | None = None) -> ProtocolResult:
    """Ablate random neurons in equal steps up to all of them, in several ways, and measure top-1 and loss.

    All kinds are measured on the same neurons; the neurons of a step are among those of the next. With `out`, every set is
    written before the next begins, the same call goes on where an interrupted one stopped, and a finished folder is read.

    Args:
        model: what `load_model` returns; default is to load `config.model`.
        config: what to do; default is [PEAK]'s protocol on the embedded model.
        out: folder for config.json, the sums per row of every set, the statistics, and the tables.

    Returns:
        ProtocolResult with `.table`, `.by_kind`, `.summary()`, `.figure()` and `.report()`.

    Raises:
        ValueError: steps so small that they hold no neuron, too little text.
        FileExistsError: the folder holds something else (the differing fields are named).

    Source: [PEAK] section 3; METHODS section 8.

    Example:
        >>> config = AblationProtocol(task="local-prose", steps=5)  # doctest: +SKIP
        >>> ablation_protocol(model, config, out="runs/peak").by_kind  # doctest: +SKIP
    """
    config = config or AblationProtocol()
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
    with nullcontext() if out is None else open_study(out, ProtocolResult.STUDY, resolved) as pieces:
        return _Protocol(model, config, sample, collected, pieces, resolved).run()


@dataclass
class _Protocol:
    """One protocol while it is carried out."""

    model: Any
    config: AblationProtocol
    sample: TokenSample
    collected: TokenSample
    pieces: Pieces | None
    resolved: dict[str, Any]

    @property
    def folder(self) -> Path | None:
        """Where it is written, if anywhere."""
        return None if self.pieces is None else self.pieces.folder

    def run(self) -> ProtocolResult:
        if self.pieces is not None and is_finished(self.pieces):
            return ProtocolResult.load(self.pieces.folder)
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
            return ProtocolResult(self.resolved, before, per_row)
        result = ProtocolResult(study_config(self.pieces.folder, ProtocolResult.STUDY), before, per_row)
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
        # of the same random ranks a larger share holds the smaller one
        neurons = NeuronSet.random(self.model, {self.config.site: step / self.config.steps}, seed=seed)
        rows = []
        for kind in self.config.kinds:
            how: Any = kind
            if kind == "optimal":
                assert reference is not None
                fit = spread(self.collected, self.config.fit_tokens)
                how = fit_constants(self.model, fit, {None: neurons}, reference, batch_size=self.config.batch_size)[None]
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
        raise CorruptFile(f"{path} holds another seed or step; delete it, and the same call makes it again")
    return tensors["per_row"].numpy()


def _write_cell(folder: Path, cell: Cell, rows: np.ndarray) -> None:
    save_tensors(_cell_path(folder, cell), {"per_row": torch.from_numpy(rows)}, {"kind": "protocol", "cell": list(cell)})
