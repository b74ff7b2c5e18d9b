"""The removal certificate: is a pruned capability gone? (METHODS 22)"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pandas as pd

from sepcap.checks import checked
from sepcap.selection.neurons import NeuronSet
from sepcap.statistics.intervals import as_columns
from sepcap.studies.base.folder import Pieces, as_json
from sepcap.studies.base.result import Figures, StudyResult
from sepcap.studies.base.runner import run_study, study
from sepcap.studies.certificate import figures
from sepcap.studies.certificate.arms import MATCHED, PRUNED, RANDOM, REFERENCE, UNTOUCHED, Arm, Arms
from sepcap.studies.certificate.config import CertificateConfig
from sepcap.studies.certificate.elicit import elicited
from sepcap.studies.certificate.inside import looked_inside
from sepcap.studies.certificate.measured import before, change, mean_columns, relative_to_untouched
from sepcap.studies.certificate.plan import Plan, model_of, planned
from sepcap.studies.certificate.quantise import rounded
from sepcap.studies.certificate.relearn import relearned
from sepcap.studies.certificate.verdicts import verdicts


class Certificate(StudyResult):
    """Whether a pruned capability is gone: what tests of the pruned model find, beside the same tests of controls.

    Accuracies are relative: divided by that of the untouched model on the same evaluation texts. Intervals cover evaluation texts
    (documents), and seeds if there is more than one.

    Attributes:
        config: the resolved configuration.
        tables: "models", one row per kind of model: forget and retain (relative accuracies before any test, each with the ends `_low` and
            `_high` of a 95% interval), minus_pruned (forget minus that of the pruned model, paired over documents), neurons, and for random
            pruning of equal effect whether one was found (`reached`).
            "relearning", one row per kind of model, variant and number of tokens seen: forget, retain, lr, seeds.
            "targets", one row per kind of model, variant and target: tokens until this share of the original accuracy is reached
            (infinite if `censored`), the quotients `ratio_matched` (by random pruning of equal effect), `ratio_random` (by as many random
            neurons) and `anamnesis_index` (by the reference model), and in `_bound` whether a quotient is only a bound.
            "layers", one row per site and layer: neurons with a score above the median of the pruned ones in the whole, the pruned and the
            relearned model. "runs", one row per fine-tuning.
            "quantised": relative accuracies with rounded weights (`bits` is missing for those as they are), and the change by rounding.
            "elicited": the same with examples in front of a text, and with re-formatted texts. "lens": relative accuracy of the logit lens
            after every layer (0 is the embedding). "probes": accuracy of linear probes after every layer, and with random labels.

    Example:
        >>> certificate = sepcap.certify(model, neurons=neurons, out="runs/certificate")  # doctest: +SKIP
        >>> certificate.summary()  # doctest: +SKIP
    """

    STUDY = "certificate"
    TITLE = "Can the pruned capability be recovered?"
    FIGURES: ClassVar[Figures] = {
        "relearning": ("Relearning", figures.relearning),
        "layers": ("Layers that relearned the task", figures.relearned_layers),
        "before-after": ("Before and after rounding, examples and re-formatting", figures.before_after),
        "profile": ("Accuracy of logit lens and linear probes, by layer", figures.profile),
    }
    PAGE_TABLES = ("models", "targets", "relearning", "layers", "quantised", "elicited", "lens", "probes")

    def summary(self) -> list[str]:
        """A verdict per test, with its numbers."""
        return verdicts(self)

    @checked()
    def target(self, target: float, kind: str = "pruned", variant: str = "all") -> pd.Series:
        """One row of the table "targets"."""
        table: Any = self.tables["targets"]
        return table.query("target == @target and kind == @kind and variant == @variant").iloc[0]


PARTS: dict[str, Callable[[Plan, Arms, Pieces], dict[str, pd.DataFrame]]] = {
    "relearn": relearned,
    "quantise": rounded,
    "elicit": elicited,
    "inside": looked_inside,
}
"""Part -> function that carries it out and returns its tables."""


@study(CertificateConfig, model_of=model_of)
@checked()
def certify(
    model: Any,
    config: CertificateConfig,
    *,
    neurons: NeuronSet | None = None,
    pruned: Any = None,
    reference: Any = None,
    out: str | Path | None = None,
    say: Callable[[str], Any],
) -> Certificate:
    """Test whether a capability is gone from a pruned model, and make the same tests of controls.

    A fall of accuracy does not show that a capability is gone: it can come back after few steps of fine-tuning, by rounding the weights,
    or with examples in the context, and can still be read from the residual stream. Every test is also carried out on the untouched model,
    with as many random neurons pruned, and with random neurons pruned until the forget accuracy is the same. The weights of the given
    models are restored bit for bit, also after an interrupt.

    Args:
        model: the untouched model, as `load_model` returns it; default is to load `config.model`, or that of the run.
        config: a `CertificateConfig`; its fields can also be given as keywords. `run_folder` and `step` name a pruned model.
        neurons: the pruned neurons, in place of `run_folder`.
        pruned: an edited copy of the model, in place of `neurons` and `run_folder`; there is then no control with as many random neurons.
        reference: a model with the same tokenizer that was never trained on the forget task, for the Anamnesis index.
        out: folder of the study; without one, nothing is saved. The same call resumes an interrupted one.
        progress: True announces the work and its cost and shows bars, False shows nothing; a function receives the announcements.

    Returns:
        Certificate with `.summary()`, `.tables`, `.figure()` and `.report()`.

    Raises:
        ValueError: no pruned model or several, a step without neurons, a run of another model, equal tasks, too little text to fine-tune.
        ImportError: an extra that a part needs is not installed; it is named.
        NotImplementedError: a model that does not predict next tokens.
        FileExistsError: the folder contains another configuration (the error names the differing fields).

    Source: METHODS section 22; [SP] further work; Chundawat 2023, Zero-shot machine unlearning (Anamnesis index).

    Example:
        >>> sepcap.certify(model, neurons=scores.top({"mlp": 0.4}), forget="local-code", retain="local-prose")  # doctest: +SKIP
    """
    plan = planned(model, config, neurons, pruned, reference)
    return run_study(Certificate, plan.resolved, partial(_measure, plan), out, plan.cost, say)


def _measure(plan: Plan, pieces: Pieces) -> Certificate:
    c = plan.config
    texts = [sample["forget"] for sample in (plan.fit, plan.held)]
    arms = Arms(plan.model, plan.pruning, texts, plan.reference, c.metric, pieces, c.batch_size)
    tables = {"models": _models(plan, arms, pieces)}
    for part in PARTS:
        if part in c.parts:
            tables |= PARTS[part](plan, arms, pieces)
    return Certificate(as_json({"study": Certificate.STUDY, **plan.resolved}), tables)


def _models(plan: Plan, arms: Arms, pieces: Pieces) -> pd.DataFrame:
    """Relative accuracies of every kind of model before any test, mean over seeds."""
    kinds = [*arms.kinds, *([REFERENCE] if plan.reference is not None else [])]
    every = {kind: [Arm(kind, seed) for seed in plan.config.seeds] for kind in kinds}
    sums = {arm.name: before(plan, arms, pieces, arm) for of_kind in every.values() for arm in of_kind}
    relative = relative_to_untouched(plan, sums, sums[every[UNTOUCHED][0].name])
    rows = []
    for kind, of_kind in every.items():
        found = [arms.matched(seed) for seed in plan.config.seeds] if kind == MATCHED else []
        pruned = len(plan.neurons) if kind in (RANDOM, PRUNED) and plan.neurons is not None else 0
        neurons = sum(sum(one["neurons"].values()) for one in found) / len(found) if found else pruned
        row = {"kind": kind, **mean_columns(relative, [arm.name for arm in of_kind]), "neurons": float(neurons)}
        mine, theirs = ([arm.name for arm in every[one]] for one in (kind, PRUNED))
        row |= as_columns("minus_pruned") if kind == PRUNED else change(relative["forget"], mine, theirs, column="minus_pruned")
        rows.append(row | {"reached": all(one["reached"] for one in found), "seeds": len(of_kind)})
    return pd.DataFrame(rows).assign(n_documents=min(sample.n_documents for sample in plan.evaluate.values()))
