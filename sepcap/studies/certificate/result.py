"""Result of a certificate (METHODS 22)."""

from typing import Any, ClassVar

import pandas as pd

from sepcap.studies.base.result import Figures, StudyResult
from sepcap.studies.certificate import figures
from sepcap.studies.certificate.verdicts import verdicts


class Certificate(StudyResult):
    """Whether a pruned capability is gone: what tests of the pruned model find, beside the same tests of controls.

    Accuracies are relative: divided by that of the untouched model on the same evaluation texts. Intervals cover evaluation texts
    (documents), and seeds if there is more than one.

    Attributes:
        config: the resolved configuration.
        tables: "models", one row per kind of model: forget and retain (relative accuracies before any test, each with the ends `_low` and
            `_high` of a 95% interval), neurons, and for random pruning of equal effect whether one was found (`reached`).
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
    TITLE = "Is it really gone?"
    FIGURES: ClassVar[Figures] = {
        "relearning": ("Relearning", figures.relearning),
        "layers": ("Layers that relearned the task", figures.layers),
        "before-after": ("Before and after rounding, examples and re-formatting", figures.before_after),
        "profile": ("What is left inside, by layer", figures.profile),
    }
    PAGE_TABLES = ("models", "targets", "relearning", "layers", "quantised", "elicited", "lens", "probes")

    def summary(self) -> list[str]:
        """A verdict per test, with its numbers."""
        return verdicts(self)

    def target(self, target: float, kind: str = "pruned", variant: str = "all") -> pd.Series:
        """One row of the table "targets"."""
        table: Any = self.tables["targets"]
        return table.query("target == @target and kind == @kind and variant == @variant").iloc[0]
