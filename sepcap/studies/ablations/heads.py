"""Comparison of ablation kinds on the same heads: paired changes in loss and top-1 (METHODS 8, 9)."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch

from sepcap.checks import ANY, checked
from sepcap.errors import unknown
from sepcap.evaluation.next_token import evaluate_batch, most_frequent_targets
from sepcap.evaluation.result import Evaluation
from sepcap.interventions.ablation import WITHOUT_REFERENCE, ablate
from sepcap.models.forward import Hook, device_of, measuring, with_hooks
from sepcap.models.partial import recording, starting_from
from sepcap.progress import progress
from sepcap.selection.neurons import NeuronSet
from sepcap.statistics.collect import collect_sample, halving_batches
from sepcap.statistics.moments import Statistics
from sepcap.studies.ablations import figures
from sepcap.studies.ablations.config import AblationComparisonConfig
from sepcap.studies.ablations.fit import constants_of_targets, first_layer, spread
from sepcap.studies.ablations.sums import RowSums, samples_of
from sepcap.studies.ablations.targets import Target, controls_of, target_in, target_name, targets_of
from sepcap.studies.base.folder import Pieces
from sepcap.studies.base.result import Figures
from sepcap.studies.base.runner import run_study, study
from sepcap.tasks.batches import TokenSample


class AblationComparison(RowSums):
    """Effects of several kinds of ablation of the same heads, on the same tokens.

    Attributes:
        config: the resolved configuration; with `targets`, what was ablated at once, the controls at the end.
        tables: "ablations", one row per target and kind: target (in words), layer and head (if it is one head), control (whether it is a
            random other head), kind, loss and top1 (each with `delta_`, and the ends `_low` and `_high` of its 95% bootstrap interval over
            documents, which are the same for both evaluations), n (number of predictions) and n_documents.
        tensors: sums per row, in the order of `COUNTS`: `before` [row, count] of the unablated model and `per_row`
            [target, kind, row, count]; `clusters` [row], the document of every row.

    Example:
        >>> found = sepcap.compare_ablations(model, layer=3, head=1)  # doctest: +SKIP
        >>> found.table[["kind", "delta_loss", "delta_loss_low", "delta_loss_high"]]  # doctest: +SKIP
    """

    STUDY = "compare-ablations"
    TITLE = "How does each kind of ablation of the same heads change loss and accuracy?"
    FIGURES: ClassVar[Figures] = {
        "loss": ("Change in cross-entropy", figures.ablations),
        "top1": ("Change in top-1 accuracy", partial(figures.ablations, metric="top1")),
    }

    @property
    def targets(self) -> tuple[Target, ...]:
        """(layer, head) of every head ablated alone, a tuple of such pairs for heads ablated together, one None for a neuron set."""
        return tuple(map(target_in, self.config["targets"]))

    @property
    def kinds(self) -> tuple[str, ...]:
        """Names of the kinds."""
        return tuple(self.config["kinds"])

    @checked(layer=ANY, head=ANY)
    def evaluation(self, kind: str, layer: int | None = None, head: int | None = None) -> Evaluation:
        """The evaluation with one head ablated in one way; layer and head may be omitted if there is one target."""
        if kind not in self.kinds:
            raise unknown("kind", kind, self.kinds)
        wanted = self.targets[0] if len(self.targets) == 1 and layer is None else (layer, head)
        if wanted not in self.targets:
            raise ValueError(f"layer={layer}, head={head} was not ablated; there are {len(self.targets)} targets, see .table")
        return self._evaluation(self.tensors["per_row"][self.targets.index(wanted), self.kinds.index(kind)])

    def _tables(self) -> dict[str, pd.DataFrame]:
        rows, targets = [], self.targets
        for i, target in enumerate(targets):
            for j, kind in enumerate(self.kinds):
                after = self._evaluation(self.tensors["per_row"][i, j])
                layer, head = target if isinstance(target, tuple) and isinstance(target[0], int) else (None, None)
                control = i >= len(targets) - self.config["controls"]
                row: dict[str, Any] = {"target": target_name(target), "layer": layer, "head": head, "control": control, "kind": kind}
                for metric in ("loss", "top1"):
                    delta, (low, high) = after.difference(self.before, metric)
                    row |= {metric: after.value(metric), f"delta_{metric}": delta}
                    row |= {f"delta_{metric}_low": low, f"delta_{metric}_high": high}
                rows.append(row | {"n": after.n, "n_documents": after.n_documents})
        return {"ablations": pd.DataFrame(rows).astype({"layer": "Int64", "head": "Int64"})}

    def summary(self) -> list[str]:
        """The changes under every kind, in increasing order of the change in loss."""
        controls = self.config["controls"]
        asked = self.targets[: len(self.targets) - controls]
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
            if controls:
                control = beside.loc[beside["kind"] == kind, "delta_loss"].to_numpy()
                spread = f"{control.min():+.4f} to {control.max():+.4f}" if len(control) > 1 else f"{control[0]:+.4f}"
                sentence += f" Random control{'s' * (controls > 1)} with the same number of other heads: {spread}."
            said.append(sentence)
        return said


@study(AblationComparisonConfig)
@checked()
def compare_ablations(
    model: Any,
    config: AblationComparisonConfig,
    *,
    neurons: NeuronSet | None = None,
    reference: Statistics | None = None,
    out: str | Path | None = None,
    say: Callable[[str], Any],
) -> AblationComparison:
    """Ablate heads one at a time in several ways, and measure the change in loss and top-1.

    Every kind is evaluated on the same tokens of the evaluation part; means, medians, peaks and fitted constants are computed on the
    collection part. For each batch, the whole model is run once, then for every ablation only the layers from the ablated one on.

    Args:
        model: what `load_model` returns; other ablations may be active around this call. Default is to load `config.model`.
        config: an `AblationComparisonConfig`; its fields can also be given as keywords.
        neurons: a neuron set to ablate as a whole, instead of heads.
        reference: statistics with histograms from which the constants are computed; by default they are collected.
        out: folder of the study; a finished one is read instead of recomputed. Without one, nothing is saved.
        progress: True announces the work and its cost and shows bars, False shows nothing; a function receives the announcements.

    Returns:
        AblationComparison with `.table`, `.evaluation()`, `.summary()` and `.figure()`.

    Raises:
        ValueError: both heads and neurons, an unknown kind, too little text, a reference without histograms.
        IndexError: a head that does not exist.
        FileExistsError: `out` contains something else, or a comparison with another configuration; nothing is computed then.

    Source: [PEAK] section 3, [OA]; METHODS sections 8 and 9.

    Example:
        >>> sepcap.compare_ablations(model, task="local-code", layer=3, head=1).figure()  # doctest: +SKIP
    """
    kinds = config.kinds
    targets = targets_of(model, config.layer, config.head, neurons, config.together)
    targets |= controls_of(model, targets, config.controls, config.seed)
    constants = bool(set(kinds) - set(WITHOUT_REFERENCE)) and (reference is None or "optimal" in kinds)
    sample, collected, resolved = samples_of(model, config, constants=constants)
    # these fields state which heads, as targets does
    resolved = {name: value for name, value in resolved.items() if name not in ("layer", "head", "together")} | {"targets": list(targets)}
    resolved["reference"] = None if reference is None else dict(reference.info)
    if neurons is not None:
        resolved["neurons"] = {site: sha256(mask.cpu().numpy().tobytes()).hexdigest()[:16] for site, mask in neurons.masks.items()}
    if reference is not None:
        for kind in kinds:  # rejects one without histograms before any work begins; fits start from a peak
            ablate(model, next(iter(targets.values())), "peak" if kind == "optimal" else kind, reference=reference, seed=config.seed)

    def cost() -> str:
        collecting = 0 if collected is None or reference is not None else collected.tokens
        return (
            f"{len(targets)} set{'s' * (len(targets) > 1)} of neurons to ablate in {len(kinds)} ways on {sample.tokens:,} tokens of "
            f"{sample.task}, each from its first layer on; {collecting:,} tokens to collect"
            f"{f'; fits on {config.fit_tokens:,} tokens' * ('optimal' in kinds)}"
        )

    def compute(_: Pieces) -> AblationComparison:
        before, per_row = _computed(model, config, sample, collected, targets, reference)
        return AblationComparison.of(resolved, before, per_row, sample.clusters)

    return run_study(AblationComparison, resolved, compute, out, cost, say)


def _computed(
    model: Any,
    config: AblationComparisonConfig,
    sample: TokenSample,
    collected: TokenSample | None,
    targets: Mapping[Target, NeuronSet],
    reference: Statistics | None,
) -> tuple[np.ndarray, np.ndarray]:
    """Sums per row of the unablated model [row, count], and with every target ablated in every way [target, kind, row, count]."""
    fitted, size = {}, config.batch_size
    if collected is not None and reference is None:
        sites = tuple(dict.fromkeys(site for chosen in targets.values() for site in chosen.masks))
        reference = collect_sample(model, collected, sites, batch_size=size, histogram=True)
    if "optimal" in config.kinds:
        assert collected is not None
        assert reference is not None
        fitted = constants_of_targets(model, spread(collected, config.fit_tokens), targets, reference, batch_size=size)

    def one_pass(size: int) -> tuple[np.ndarray, np.ndarray]:
        jobs = []
        for name, chosen in targets.items():
            for kind in config.kinds:
                how = fitted[name] if kind == "optimal" else kind
                jobs.append((first_layer(chosen), ablate(model, chosen, how, reference=reference, seed=config.seed).fwd_hooks))
        return _measure(model, sample, jobs, balanced(len(sample.rows), size))

    before, per_row = halving_batches(one_pass, size)
    return before, per_row.reshape(len(targets), len(config.kinds), *per_row.shape[1:])


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
