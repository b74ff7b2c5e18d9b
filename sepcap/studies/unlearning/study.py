"""Unlearning methods compared: what each costs the retain task, and how fast what it removed comes back (METHODS 22)."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pandas as pd

from sepcap.checks import checked
from sepcap.studies.base.folder import Pieces, as_json
from sepcap.studies.base.result import Figures, StudyResult
from sepcap.studies.base.runner import run_study, study
from sepcap.studies.base.text import with_ends
from sepcap.studies.certificate.arms import UNTOUCHED
from sepcap.studies.certificate.verdicts import needs
from sepcap.studies.unlearning import figures
from sepcap.studies.unlearning.config import UnlearningComparisonConfig
from sepcap.studies.unlearning.plan import UnlearningPlan, planned
from sepcap.studies.unlearning.tables import (
    COSTS,
    NEAR,
    methods_table,
    points_table,
    relative_of,
    relearned,
    toxicity_table,
    trajectory_table,
)
from sepcap.studies.unlearning.walks import States, trajectories


class UnlearningComparison(StudyResult):
    """Trajectories of unlearning methods in the plane of both accuracies, and tests of each at one point.

    Accuracies are relative to the untouched model. Intervals cover evaluation texts (documents); those of the table "methods" for the seeds
    that were run, whose spread stands beside them, those of the other tables also seeds if there is more than one.

    Attributes:
        config: the resolved configuration.
        tables: "methods", one row per method: area (with the ends `_low` and `_high` of its 95% interval, and its standard deviation over
            seeds), max_drop, retain_cost_50 and retain_cost_80 in percent, minus_prune and minus_random (differences of areas), the kept
            lr and beta, forward_tokens and backward_tokens of its trajectory, and in `tuning_` those of the learning rates that were not
            kept. "trajectory", one row per method and point. "points": the point at which each is tested, and whether its accuracy is
            `near` the level. "runs", one row per trajectory that was measured.
            With relearning: "relearning", "targets" (tokens to a share of the original accuracy, and the quotients by random pruning and by
            the reference) and "relearning-runs", as in `Certificate`. With toxicity: "toxicity", one row per model.

    Example:
        >>> found = sepcap.compare_unlearning(model, methods=("prune", "npo"), out="runs/unlearning")  # doctest: +SKIP
        >>> found.summary()  # doctest: +SKIP
    """

    STUDY = "compare-unlearning"
    TITLE = "Forgetting, retain cost and relearning of unlearning methods"
    FIGURES: ClassVar[Figures] = {
        "plane": ("Trajectories", figures.plane),
        "relearning": ("Relearning", figures.relearning),
    }

    def summary(self) -> list[str]:
        """Separability and cost of every method, and what relearning and continuations show."""
        c, points = self.config, self.tables["points"].to_dict("records")
        said = [self._of_method(row) for row in self.tables["methods"].to_dict("records")]
        there = [f"{row['method']} {with_ends(row, 'forget')} on forget, {with_ends(row, 'retain')} on retain" for row in points]
        said.append(f"Tested where {c[c['match']]} has about {c['level']:.2f} of its {c['metric']}: {'; '.join(there)}.")
        if far := [str(row["method"]) for row in points if not row["near"]]:
            said.append(f"No point of {', '.join(far)} is within {NEAR} of that on held-out texts: these are not at equal accuracy.")
        if "targets" in self.tables:
            said += [self._of_target(target) for target in c["targets"]]
        if "toxicity" in self.tables:
            said += [self._of_toxicity(row) for row in self.tables["toxicity"].to_dict("records")]
        seeds = len(c["seeds"])
        several = f"for relearning and tested points also over {seeds} seeds"
        covered = "there is one seed, and other seeds can differ" if seeds == 1 else several
        toxic = "; of toxic shares over continuations, with the first seed" if "toxicity" in self.tables else ""
        return [*said, f"In brackets 95% intervals over evaluation texts{toxic}; {covered}."]

    def _of_method(self, row: Mapping[Any, Any]) -> str:
        costs = [f"{with_ends(row, f'retain_cost_{drop}', 0)}% where {drop}% of forget is lost" for drop in COSTS]
        return (
            f"{row['method']}: area {with_ends(row, 'area')}; retain cost {' and '.join(costs)}; {row['forward_tokens']:,} tokens forward "
            f"and {row['backward_tokens']:,} backward, and {row['tuning_forward_tokens']:,} and {row['tuning_backward_tokens']:,} for "
            "learning rates that were not kept."
        )

    def _of_target(self, target: float) -> str:
        table: Any = self.tables["targets"]
        rows = table[(table["target"] == target) & (table["kind"] != UNTOUCHED)].to_dict("records")
        each = "; ".join(f"{row['kind']} {needs(row)}" for row in rows)
        return f"Tokens of fine-tuning until {100 * target:.0f}% of the original accuracy on {self.config['forget']} is back: {each}."

    def _of_toxicity(self, row: Mapping[Any, Any]) -> str:
        change = "" if row["kind"] == UNTOUCHED else f" (change {with_ends(row, 'toxic_share_change')})"
        return (
            f"{row['kind']}: {with_ends(row, 'toxic_share', 3)} of {row['continuations']:,} continuations score above "
            f"{self.config['threshold']:g}{change}, mean {with_ends(row, 'mean_toxicity', 3)}, perplexity on {self.config['retain']} "
            f"{with_ends(row, 'retain_perplexity', 1)}."
        )


@study(UnlearningComparisonConfig)
@checked()
def compare_unlearning(
    model: Any, config: UnlearningComparisonConfig, *, reference: Any = None, out: str | Path | None = None, say: Callable[[str], Any]
) -> UnlearningComparison:
    """Compare unlearning methods on the same texts at a stated budget, and test what each leaves behind.

    Every method gives a trajectory in the plane of both accuracies. Learning rates, and the point of the trajectory at which a method is
    tested, are chosen on held-out collection texts. The weights of the given models are restored bit for bit, also after an interrupt.

    Args:
        model: what `load_model` returns; default is to load `config.model`.
        config: an `UnlearningComparisonConfig`; its fields can also be given as keywords.
        reference: a model with the same tokenizer that was never trained on the forget task, for the Anamnesis index.
        out: folder of the study; without one, nothing is saved. The same call resumes an interrupted one.
        progress: True announces the work and its cost and shows bars, False shows nothing; a function receives the announcements.

    Returns:
        UnlearningComparison with `.summary()`, `.tables`, `.figure()` and `.report()`.

    Raises:
        ValueError: equal tasks, too little text, shares that prune no neuron, an accuracy of 0 of the untouched model.
        NotImplementedError: a model that predicts no next tokens.
        FloatingPointError: every learning rate of a method diverges.
        FileExistsError: the folder contains another configuration (the error names the differing fields).

    Source: METHODS section 22; [SEP] section 3.4 for the table of toxicity.

    Example:
        >>> sepcap.compare_unlearning(model, forget="local-code", retain="local-prose").table  # doctest: +SKIP
        >>> toxic = {"forget": "toxic", "retain": "civil", "methods": ("prune", "task-arithmetic"), "parts": ("toxicity",)}
        >>> sepcap.compare_unlearning(model, **toxic, match="retain", level=0.9).tables["toxicity"]  # doctest: +SKIP
    """
    plan = planned(model, config, reference, kept=out is not None)
    return run_study(UnlearningComparison, plan.resolved, partial(_measure, plan), out, plan.cost, say)


def _measure(plan: UnlearningPlan, pieces: Pieces) -> UnlearningComparison:
    found, rows = trajectories(plan, pieces)
    states, runs = States(plan, pieces, found), pd.DataFrame(rows)
    relative = relative_of(plan, found)
    tables = {"methods": methods_table(plan, found, runs), "trajectory": trajectory_table(plan, found, relative)}
    tables |= {"points": points_table(states, relative), "runs": runs}
    if "relearn" in plan.config.parts:
        tables |= relearned(plan, states, pieces)
    if "toxicity" in plan.config.parts:
        tables["toxicity"] = toxicity_table(plan, states, pieces)
    return UnlearningComparison(as_json({"study": UnlearningComparison.STUDY, **plan.resolved}), tables)
