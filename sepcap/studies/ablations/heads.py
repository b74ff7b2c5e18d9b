"""Comparison of ablation kinds on the same heads: paired changes in loss and top-1 (METHODS 8, 9)."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float

from sepcap.checks import checked
from sepcap.errors import unknown
from sepcap.evaluation.next_token import clusters_of, evaluate_batch, most_frequent_targets
from sepcap.evaluation.result import Evaluation
from sepcap.interventions.ablation import ablate
from sepcap.models.forward import Hook, device_of, measuring, with_hooks
from sepcap.models.partial import recording, starting_from
from sepcap.progress import progress, tell
from sepcap.selection.neurons import NeuronSet
from sepcap.statistics.collect import BATCH_SIZE, collect_sample, halving_batches
from sepcap.statistics.moments import Statistics
from sepcap.storage import html_card, load_tensors, save_tensors
from sepcap.studies.ablations import figures
from sepcap.studies.ablations.config import COMPARED
from sepcap.studies.ablations.fit import constants_of_targets, first_layer, spread
from sepcap.studies.ablations.targets import Head, Target, controls_of, target_in, target_name, targets_of
from sepcap.studies.base.folder import Pieces, finish_study, is_finished, listed, open_study, study_config, whole_study, write_tables
from sepcap.studies.base.provenance import made_with
from sepcap.studies.base.result import Figures, Shown
from sepcap.tasks.batches import TokenSample
from sepcap.tasks.documents import PerDocument
from sepcap.tasks.load import load_task
from sepcap.tasks.samples import sample_task

SUMS = "comparison.safetensors"
"""File of the sums per row in the folder of a comparison."""


@dataclass(frozen=True, eq=False)
class AblationComparison(Shown):
    """Effects of several kinds of ablation of the same heads, on the same tokens.

    Attributes:
        targets: (layer, head) of every head ablated alone, or a tuple of such pairs for heads ablated together; one None for a
            neuron set.
        controls: number of targets, at the end, that are random other heads.
        kinds: names of the kinds.
        before: evaluation of the unablated model.
        per_row: sums per row with one target ablated in one way, in the order of `before.per_row`.
        info: tokens, reference and seed, and the model and versions used.

    Example:
        >>> found = sepcap.compare_ablations(model, "local-code", layer=3, head=1)  # doctest: +SKIP
        >>> found.table[["kind", "delta_loss", "delta_loss_low", "delta_loss_high"]]  # doctest: +SKIP
    """

    STUDY = "compare-ablations"
    TITLE = "How does each kind of ablation of the same heads change loss and accuracy?"
    FIGURES: ClassVar[Figures] = {
        "loss": ("Change in cross-entropy", figures.ablations),
        "top1": ("Change in top-1 accuracy", figures.ablations),
    }

    folder = None
    targets: tuple[Target, ...]
    kinds: tuple[str, ...]
    before: Evaluation
    per_row: Float[np.ndarray, "target kind row count"]
    info: dict[str, Any]
    controls: int = 0

    def evaluation(self, kind: str, layer: int | None = None, head: int | None = None) -> Evaluation:
        """The evaluation with one head ablated in one way; layer and head may be omitted if there is one target."""
        if kind not in self.kinds:
            raise unknown("kind", kind, self.kinds)
        wanted = self.targets[0] if len(self.targets) == 1 and layer is None else (layer, head)
        if wanted not in self.targets:
            raise ValueError(f"layer={layer}, head={head} was not ablated; there are {len(self.targets)} targets, see .table")
        return self._evaluation(self.targets.index(wanted), self.kinds.index(kind))

    def _evaluation(self, target: int, kind: int) -> Evaluation:
        return dataclasses.replace(self.before, per_row=self.per_row[target, kind])

    @property
    def table(self) -> pd.DataFrame:
        """One row per target and kind: target (in words), layer and head (if it is one head), control (whether it is a random other
        head), kind, loss and top1 (each with `delta_`, and the ends `_low` and `_high` of its 95% bootstrap interval over documents,
        which are the same for both evaluations), n (number of predictions) and n_documents."""
        return self._table

    @cached_property
    def _table(self) -> pd.DataFrame:
        rows = []
        for i, target in enumerate(self.targets):
            for j, kind in enumerate(self.kinds):
                after = self._evaluation(i, j)
                layer, head = target if isinstance(target, tuple) and isinstance(target[0], int) else (None, None)
                control = i >= len(self.targets) - self.controls
                row: dict[str, Any] = {"target": target_name(target), "layer": layer, "head": head, "control": control, "kind": kind}
                for metric in ("loss", "top1"):
                    delta, (low, high) = after.difference(self.before, metric)
                    row |= {metric: after.value(metric), f"delta_{metric}": delta}
                    row |= {f"delta_{metric}_low": low, f"delta_{metric}_high": high}
                rows.append(row | {"n": after.n, "n_documents": after.n_documents})
        return pd.DataFrame(rows).astype({"layer": "Int64", "head": "Int64"})

    @property
    def config(self) -> dict[str, Any]:
        """Everything that determines the numbers."""
        return _config(self.before.task, self.targets, self.controls, self.kinds, self.before.info, self.info)

    @property
    def tables(self) -> dict[str, pd.DataFrame]:
        """The only table, by name."""
        return {"ablations": self.table}

    def summary(self) -> list[str]:
        """The changes under every kind, in increasing order of the change in loss."""
        asked = self.targets[: len(self.targets) - self.controls]
        what = f"{target_name(asked[0])} was ablated" if len(asked) == 1 else f"{len(asked)} heads were ablated one at a time"
        said = [
            f"{what[:1].upper()}{what[1:]} in {len(self.kinds)} ways, each evaluated on the same {self.before.n:,} predictions in "
            f"{self.before.n_documents:,} documents of {self.before.task}. "
            f"The unablated model has a cross-entropy of {self.before.loss:.3f} nats and a top-1 accuracy of {self.before.top1:.3f}."
        ]
        table, beside = self.table[~self.table["control"]], self.table[self.table["control"]]
        by_kind = {str(kind): pd.DataFrame(rows) for kind, rows in table.groupby("kind", sort=False)}
        for kind, rows in sorted(by_kind.items(), key=lambda item: item[1]["delta_loss"].mean()):
            change, low, high = (rows[f"delta_loss{end}"].to_numpy() for end in ("", "_low", "_high"))
            if len(asked) == 1:
                interval = f"95% bootstrap interval {low[0]:+.4f} to {high[0]:+.4f}"
                sentence = f"{kind}: cross-entropy {change[0]:+.4f} ({interval}), top-1 {rows['delta_top1'].to_numpy()[0]:+.4f}."
            else:
                unsure = np.count_nonzero((low <= 0) & (high >= 0))
                sentence = (
                    f"{kind}: cross-entropy {change.mean():+.4f} on average over heads ({change.min():+.4f} to {change.max():+.4f}); "
                    f"the 95% interval contains 0 for {unsure} of {len(asked)} heads."
                )
            if self.controls:
                control = beside.loc[beside["kind"] == kind, "delta_loss"].to_numpy()
                spread = f"{control.min():+.4f} to {control.max():+.4f}" if len(control) > 1 else f"{control[0]:+.4f}"
                sentence += f" Random control{'s' * (self.controls > 1)} with the same number of other heads: {spread}."
            said.append(sentence)
        return said

    def figure(self, kind: str | None = "loss", **options: Any) -> Any:
        """Change in "loss" or "top1": points with intervals for a few heads, else a heat map per kind."""
        return figures.ablations(self, kind or "loss", **options)

    @checked()
    def save(self, folder: str | Path) -> Path:
        """Write a folder with config.json, comparison.safetensors and the table as parquet.

        Raises:
            FileExistsError: the folder contains something else.
        """
        with open_study(folder, self.STUDY, self.config) as pieces:
            self._write(pieces)
        return Path(folder)

    def _write(self, pieces: Pieces) -> None:
        folder = pieces.folder
        meta = {"kind": "ablations", "targets": self.targets, "controls": self.controls, "kinds": self.kinds, "info": self.info}
        meta |= {"task": self.before.task, "skip_tokens": self.before.skip_tokens, "sample": self.before.info}
        meta |= {"groups": self.before.groups}
        tensors = {"before": torch.from_numpy(self.before.per_row), "per_row": torch.from_numpy(self.per_row)}
        tensors |= {"clusters": torch.from_numpy(self.before.clusters)}
        save_tensors(folder / SUMS, tensors, meta)
        write_tables(folder, self.tables)
        finish_study(pieces, self.tables)
        object.__setattr__(self, "folder", folder)

    @classmethod
    @checked()
    def load(cls, folder: str | Path) -> "AblationComparison":
        """Read a folder written by `save` or `out=`."""
        folder = Path(folder)
        held = whole_study(folder, study_config(folder, cls.STUDY))
        names = ("before", "per_row", "clusters")
        tensors, meta = load_tensors(listed(folder, held, SUMS), "ablations", names)
        rows, per_row, clusters = (tensors[name].numpy() for name in names)
        groups = None if meta.get("groups") is None else tuple(meta["groups"])
        before = Evaluation(meta["task"], rows, tuple(meta["skip_tokens"]), meta["sample"], clusters, groups)
        targets = tuple(map(target_in, meta["targets"]))
        result = cls(targets, tuple(meta["kinds"]), before, per_row, meta["info"], meta["controls"])
        object.__setattr__(result, "folder", folder)
        return result

    def __repr__(self) -> str:
        asked = self.targets[: len(self.targets) - self.controls]
        what = target_name(asked[0]) if len(asked) == 1 else f"{len(asked)} heads"
        what += f" and {self.controls} controls" * bool(self.controls)
        return f"AblationComparison({self.before.task!r}, {what}, {', '.join(self.kinds)}, n={self.before.n:,})"

    def _repr_html_(self) -> str:
        means = self.table.groupby("kind", sort=False)[["delta_loss", "delta_top1"]].agg(["mean", "min", "max"])
        means.columns = [" ".join(name) for name in means.columns]
        how = {"task": self.before.task, "targets": len(self.targets), "predictions": f"{self.before.n:,}"}
        return html_card("AblationComparison", how, means.reset_index())


@checked()
def compare_ablations(
    model: Any,
    task: Any,
    *,
    layer: int | Sequence[int] | None = None,
    head: int | Sequence[int] | Sequence[Head] | None = None,
    neurons: NeuronSet | None = None,
    together: bool = False,
    controls: int = 0,
    kinds: Sequence[str] = COMPARED,
    reference: Statistics | None = None,
    tokens: int = 15_000,
    reference_tokens: int = 20_000,
    fit_tokens: int = 10_000,
    seed: int = 0,
    batch_size: int = BATCH_SIZE,
    context: int | None = None,
    per_document: PerDocument = "row",
    out: str | Path | None = None,
) -> AblationComparison:
    """Ablate heads one at a time in several ways, and measure the change in loss and top-1.

    Every kind is evaluated on the same tokens of the evaluation part; means, medians, peaks and fitted constants are computed on the
    collection part. For each batch, the whole model is run once, then for every ablation only the layers from the ablated one on.

    Args:
        model: what `load_model` returns; other ablations may be active around this call.
        task: a task name, a path, a `datasets.Dataset`, a list of strings, or a Task.
        layer: layer or layers of the heads; without `head`, all their heads.
        head: one or more heads of every `layer`, or (layer, head) pairs without `layer`. Without both, every head of the model.
        neurons: a neuron set to ablate as a whole, instead of heads.
        together: ablate all these heads at once, as one set, instead of one at a time.
        controls: number of random other heads to ablate as controls, drawn from the whole model with `seed`; with `together`, number
            of random sets of as many other heads.
        kinds: names of kinds of ablation.
        reference: statistics with histograms from which the constants are computed; by default they are collected.
        tokens: number of predictions to evaluate on.
        reference_tokens: token positions from which `reference` is collected.
        fit_tokens: tokens that "optimal" is fitted to, spread over the `reference_tokens`; a third of their documents is held out of
            the fit for early stopping.
        seed: of resampling.
        batch_size: rows per pass; "resample" draws from the rows of one batch. Halved, with a warning, when memory runs out.
        context: tokens per row; default is the model's context, at most 512.
        per_document: maximum tokens per document: "row" for as many as fit one row, a number, or None for whole documents.
        out: folder for the result; a finished result of the same call is read instead of recomputed.

    Returns:
        AblationComparison with `.table` and `.figure()`.

    Raises:
        ValueError: both heads and neurons, an unknown kind, too little text, a reference without histograms.
        IndexError: a head that does not exist.
        FileExistsError: `out` contains something else, or a comparison with another configuration; nothing is computed then.

    Source: [PEAK] section 3, [OA]; METHODS sections 8 and 9.

    Example:
        >>> sepcap.compare_ablations(model, "local-code", layer=3, head=1).figure()  # doctest: +SKIP
    """
    task = load_task(task)
    kinds = _checked(kinds)
    targets = targets_of(model, layer, head, neurons, together)
    targets |= controls_of(model, targets, controls, seed)
    sample, collected = sample_task(model, task, "evaluate", tokens, context, per_document=per_document), None
    if set(kinds) - {"zero", "resample"} and (reference is None or "optimal" in kinds):
        collected = sample_task(model, task, "collect", reference_tokens, context, per_document=per_document)
    if reference is not None:
        for kind in kinds:  # rejects one without histograms before any work begins; fits start from a peak
            ablate(model, next(iter(targets.values())), "peak" if kind == "optimal" else kind, reference=reference, seed=seed)
    frequent = most_frequent_targets(sample)
    info = {
        "model": str(model.cfg.model_name),
        "asked": sample.asked,
        "tokens": sample.tokens,
        "sample": sample.fingerprint,
        "documents": list(sample.indices),
        "n_documents": sample.n_documents,
        "skip_counts": list(frequent.values()),
    }
    measured: dict[str, Any] = {"seed": seed, "batch_size": batch_size, "fit_tokens": fit_tokens, "collected": None, "reference": None}
    if collected is not None:
        measured["collected"] = {"tokens": collected.tokens, "sample": collected.fingerprint}
    if reference is not None:
        measured["reference"] = dict(reference.info)
    if neurons is not None:
        measured["neurons"] = {site: sha256(mask.cpu().numpy().tobytes()).hexdigest()[:16] for site, mask in neurons.masks.items()}
    measured |= made_with(model)

    def computed() -> AblationComparison:
        collecting = 0 if collected is None or reference is not None else collected.tokens
        tell(
            f"{len(targets)} sets of neurons to ablate in {len(kinds)} ways on {sample.tokens:,} tokens of {sample.task}, each from its "
            f"first layer on; {collecting:,} tokens to collect" + (f"; fits on {fit_tokens:,} tokens" if "optimal" in kinds else "")
        )
        before, per_row = _computed(model, sample, collected, targets, kinds, reference, fit_tokens, seed, batch_size)
        evaluation = Evaluation(sample.task, before, tuple(frequent), info, **clusters_of(sample))
        return AblationComparison(tuple(targets), kinds, evaluation, per_row, measured, controls)

    if out is None:
        return computed()
    with open_study(out, AblationComparison.STUDY, _config(sample.task, tuple(targets), controls, kinds, info, measured)) as pieces:
        if is_finished(pieces):
            return AblationComparison.load(pieces.folder)
        result = computed()
        result._write(pieces)
    return result


def _config(
    task: str, targets: Sequence[Target], controls: int, kinds: Sequence[str], sample: Mapping[str, Any], info: Mapping[str, Any]
) -> dict:
    sample = {name: value for name, value in sample.items() if name != "skip_counts"}
    return {"task": task, "targets": list(targets), "controls": controls, "kinds": list(kinds), **sample, **info}


def _computed(
    model: Any,
    sample: TokenSample,
    collected: TokenSample | None,
    targets: Mapping[Target, NeuronSet],
    kinds: Sequence[str],
    reference: Statistics | None,
    fit_tokens: int,
    seed: int,
    batch_size: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Sums per row of the unablated model [row, count], and with every target ablated in every way [target, kind, row, count]."""
    fitted = {}
    if collected is not None and reference is None:
        sites = tuple(dict.fromkeys(site for chosen in targets.values() for site in chosen.masks))
        reference = collect_sample(model, collected, sites, batch_size=batch_size, histogram=True)
    if "optimal" in kinds:
        assert collected is not None
        assert reference is not None
        fitted = constants_of_targets(model, spread(collected, fit_tokens), targets, reference, batch_size=batch_size)

    def one_pass(size: int) -> tuple[np.ndarray, np.ndarray]:
        jobs = []
        for name, chosen in targets.items():
            for kind in kinds:
                how = fitted[name] if kind == "optimal" else kind
                jobs.append((first_layer(chosen), ablate(model, chosen, how, reference=reference, seed=seed).fwd_hooks))
        return _measure(model, sample, jobs, balanced(len(sample.rows), size))

    before, per_row = halving_batches(one_pass, batch_size)
    return before, per_row.reshape(len(targets), len(kinds), *per_row.shape[1:])


def _checked(kinds: Sequence[str]) -> tuple[str, ...]:
    chosen = (kinds,) if isinstance(kinds, str) else tuple(dict.fromkeys(kinds))
    if not chosen:
        raise ValueError(f"kinds is empty; give one or more of {', '.join(map(repr, COMPARED))}")
    for kind in chosen:
        if kind not in COMPARED:
            raise unknown("kind", kind, COMPARED)
    return chosen


def balanced(rows: int, batch_size: int) -> int:
    """The batch size that splits rows evenly into as few batches: a last batch of one row would leave nothing to resample from."""
    return math.ceil(rows / math.ceil(rows / batch_size))


def _measure(model: Any, sample: TokenSample, jobs: Sequence[tuple[int, Sequence[Hook]]], batch_size: int) -> tuple[Any, Any]:
    """Sums per row without ablation [row, count] and with each [job, row, count]; keeps the residual streams of one batch at a time."""
    skip_ids = torch.tensor(list(most_frequent_targets(sample)), dtype=torch.long, device=device_of(model))
    before, after = [], []
    total = math.ceil(len(sample.rows) / batch_size) * len(jobs)
    bar = progress(total=total, desc=f"ablate {sample.task}", unit="pass")
    with measuring(model), bar:
        for batch in sample.batches(batch_size):
            batch = batch.to(device_of(model))
            with recording(model, {layer for layer, _ in jobs}) as entering:
                before.append(evaluate_batch(model, batch, skip_ids))
            sums = []
            for layer, hooks in jobs:
                with starting_from(model, entering[layer]), with_hooks(model, hooks):
                    sums.append(evaluate_batch(model, batch, skip_ids))
                bar.update()
            after.append(torch.stack(sums))
    return torch.cat(before).cpu().numpy(), torch.cat(after, dim=1).cpu().numpy()
