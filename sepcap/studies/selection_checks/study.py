"""Complementary checks of a selection: kept alone, in small steps, layer by layer, and against the opposite direction."""

from collections.abc import Callable, Mapping
from functools import partial
from itertools import permutations
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd

from sepcap.checks import checked
from sepcap.interventions.trial import check_deletion
from sepcap.models.sites import bind, site_shape
from sepcap.progress import progress
from sepcap.selection.neurons import how_many
from sepcap.studies.base.fields import OTHERS
from sepcap.studies.base.folder import Pieces, as_json
from sepcap.studies.base.result import Figures, StudyResult
from sepcap.studies.base.runner import run_study, study
from sepcap.studies.base.task_sets import LesionPlan, NamedTasks, scores_and_lesions, what_intervals_cover
from sepcap.studies.base.text import p_in_words
from sepcap.studies.selection_checks import figures
from sepcap.studies.selection_checks.config import SelectionChecksConfig
from sepcap.studies.selection_checks.parts import OTHER_TEXTS, Bench, Tables, equal_number, keep_only, layers, meeting, step_size

PARTS: dict[str, Callable[[Bench], Tables]] = {"keep-only": keep_only, "step-size": step_size, "layers": layers, "meeting": meeting}
"""Every check by its name in the configuration."""


class SelectionChecks(StudyResult):
    """The checks of one pair of tasks.

    Every table of accuracies has the columns evaluated, relative (accuracy divided by the unpruned model's), random (the same with as
    many random neurons, mean over seeds) and minus_random, each with the ends `_low` and `_high` of a 95% interval over documents, and
    also over the seeds of the random neurons if `random_covers` states it.

    Attributes:
        config: the resolved configuration.
        tables: of the checks that were run.
            "keep_only": kept (whose neurons), fraction, n: all others of the site are deleted.
            "steps": pruned, run, steps, n: accuracies at the end of runs that prune equally many neurons; minus_first is the
            difference from the run with the fewest steps. "step_overlaps": pruned, and the sets of every two runs, with the columns of
            `sepcap.selection.overlap.overlap` and `log10_p_corrected` (Bonferroni over all pairs of both tasks).
            "layers": pruned (whose neurons), layers (how many, from the last), first_layer, n.
            "curves": pruned, fraction, n: accuracies of both tasks along both directions. "shared": number of neurons in both selections,
            that number for random sets of the same layers (`both_by_chance`), and number in neither.
            "meeting": what, value, low, high, random, random_low, random_high (lowest and highest seed).

    Example:
        >>> import sepcap
        >>> config = sepcap.SelectionChecksConfig(checks=("keep-only",), tokens=5_000, eval_tokens=5_000)
        >>> sepcap.check_selection(model, config, out="runs/checks").summary()  # doctest: +SKIP
    """

    STUDY = "selection-checks"
    TITLE = "Does a selection pass complementary checks?"
    FIGURES: ClassVar[Figures] = {
        "keep-only": ("Only the selected neurons kept", figures.selection_checks_keep),
        "step-size": ("Small steps against large ones", figures.selection_checks_steps),
        "step-overlaps": ("Neurons shared by small and large steps", figures.selection_checks_step_overlaps),
        "layers": ("Accuracy after pruning the last k layers", figures.selection_checks_layers),
        "curves": ("Accuracy along both directions", figures.selection_checks_curves),
        "meeting": ("Where both directions meet", figures.selection_checks_meeting),
    }

    @checked()
    def figure(self, kind: str | None = None, **options: Any) -> Any:
        """One of the figures, by the name of its check; default is that of the first check run."""
        return super().figure(self.config["checks"][0] if kind is None else kind, **options)

    @property
    def pair(self) -> tuple[str, str]:
        """Names of both tasks."""
        return self.config["forget"], self.config["retain"]

    def summary(self) -> list[str]:
        """The result of every check, with intervals and the random control."""
        said = {"keep-only": _said_of_keep, "step-size": _said_of_steps, "layers": _said_of_layers, "meeting": _said_of_meeting}
        found = [sentence for check in self.config["checks"] for sentence in said[check](self)]
        return [*found, what_intervals_cover(len(self.config["seeds"]))]


def _with_interval(row: Mapping[Any, Any], name: str) -> str:
    # + 0.0: no minus sign before a value that rounds to zero
    value, low, high = (f"{round(row[name + end], 2) + 0.0:.2f}".replace("-", "−") for end in ("", "_low", "_high"))
    return f"{value} [{low}, {high}]"


def _said_of_keep(result: SelectionChecks) -> list[str]:
    table = result.tables["keep_only"]
    at = np.unique(table["fraction"])
    # the share closest to one half: as many neurons are kept as deleted
    fraction = float(at[np.abs(at - 0.5).argmin()])
    said = []
    for kept, other in permutations(result.pair):
        rows = table.query("kept == @kept and fraction == @fraction").to_dict("records")
        words = "; ".join(
            f"{r['evaluated']} {_with_interval(r, 'relative')} (with as many random neurons kept {_with_interval(r, 'random')})"
            for r in rows
        )
        said.append(
            f"When only the {100 * fraction:.3g}% of {result.config['site']} neurons with the highest scores for {kept} against {other} "
            f"are kept, the share of {result.config['metric']} left is: {words}."
        )
    return said


def _said_of_steps(result: SelectionChecks) -> list[str]:
    table, overlaps = result.tables["steps"], result.tables["step_overlaps"]
    first, *others = dict.fromkeys(table["run"])
    last, n, said = ([first, *others])[-2], int(table["n"].iloc[0]), []
    for pruned in result.pair:
        pairs = overlaps.query("pruned == @pruned and first == @first").set_index("second").to_dict("index")
        same = "; ".join(
            f"{first} and {other} share {100 * pairs[other]['share']:.0f}% ({pairs[other]['ratio']:.1f} times chance, corrected p "
            f"{p_in_words(pairs[other]['log10_p_corrected'])})"
            for other in dict.fromkeys((*(() if last == first else (last,)), OTHER_TEXTS))
        )
        said.append(f"Of the {n:,} neurons pruned for {pruned}, {same}.")
        for row in table.query("pruned == @pruned and run == @last").to_dict("records"):
            left, random = (_with_interval(row, name) for name in ("relative", "random"))
            less = "" if last == first else f"; difference from {first} {_with_interval(row, 'minus_first')}"
            after = f"After {last} of forgetting {pruned}, the share of accuracy left on {row['evaluated']} is {left}"
            said.append(f"{after}, with as many random neurons pruned {random}{less}.")
    return said


def _said_of_layers(result: SelectionChecks) -> list[str]:
    table = result.tables["layers"]
    depth, share = int(np.max(table["layers"])), 100 * result.config["layer_fraction"]
    said = []
    for pruned in result.pair:
        words = []
        for last in sorted({1, (depth + 1) // 2, depth}):
            (row,) = table.query("pruned == @pruned and evaluated == @pruned and layers == @last").to_dict("records")
            words.append(f"{_with_interval(row, 'relative')} (random {_with_interval(row, 'random')}) for the last {last}")
        said.append(
            f"With {share:.3g}% of each of the last layers pruned for {pruned}, the share of its accuracy left is "
            f"{', '.join(words)} of {depth} layers."
        )
    return said


def _said_of_meeting(result: SelectionChecks) -> list[str]:
    said = []
    for row in result.tables["meeting"].to_dict("records"):
        interval = "" if pd.isna(row["low"]) else f" [{row['low']:.3f}, {row['high']:.3f}]"
        random = (
            "" if pd.isna(row["random"]) else f" (random rankings {row['random']:.3f}, {row['random_low']:.3f} to {row['random_high']:.3f})"
        )
        value = "never" if pd.isna(row["value"]) else f"{row['value']:.3f}"
        said.append(f"Forget {result.pair[0]} and forget {result.pair[1]}, {row['what']}: {value}{interval}{random}.")
    return said


class SelectionChecksPlan(LesionPlan):
    """A plan with the cost of the study."""

    config: SelectionChecksConfig

    def sets(self) -> int:
        """Number of neuron sets without which both tasks are evaluated, including the steps of pruning runs."""
        c = self.config
        each = 2 + len(c.seeds)
        of_check = {
            "keep-only": len(c.fractions) * each,
            "meeting": len(c.fractions) * each,
            "layers": site_shape(self.model, c.site)[0] * each,
            # a run of k steps evaluates k + 1 times; one more run of a single step; in both directions
            "step-size": len(c.seeds) + 2 * (sum(c.steps) + len(c.steps) + 2),
        }
        return 1 + sum(of_check[check] for check in c.checks)

    def tokens(self) -> int:
        """Number of tokens run through the model."""
        collected = sum(sample.tokens for sample in self.collect.values())
        again = 2 * (sum(self.config.steps) + 1) if "step-size" in self.config.checks else 0
        return collected * (1 + again) + self.sets() * sum(sample.tokens for sample in self.evaluate.values())

    def cost(self) -> str:
        """The planned work and its cost, in one sentence."""
        c = self.config
        return (
            f"{self.resolved['model']}: {', '.join(c.checks)} of {self.neurons:,} {c.site} neurons, {' and '.join(self.tasks.names)}, with "
            f"{len(c.seeds)} random controls; {self.sets():,} sets evaluated, {self.tokens() / 1e6:.3g} M tokens through the model"
        )


def plan_selection_checks(model: Any, config: SelectionChecksConfig) -> SelectionChecksPlan:
    """Load tasks and tokens, and check that every selection is possible."""
    population = bind(model, config.site)
    check_deletion(population)
    neurons = population.size
    for fraction in config.fractions:
        how_many(fraction, neurons, config.site)
    if "layers" in config.checks:
        how_many(config.layer_fraction, neurons // len(population.layers), config.site, "of a layer")
    if "step-size" in config.checks:
        equal_number(config, neurons)
    tasks = NamedTasks.of((config.forget, config.retain), OTHERS)
    return SelectionChecksPlan.sampled(model, config, tasks, {"forget": tasks.names[0], "retain": tasks.names[1]})


@study(SelectionChecksConfig)
@checked()
def check_selection(
    model: Any, config: SelectionChecksConfig, *, out: str | Path | None = None, say: Callable[[str], Any]
) -> SelectionChecks:
    """Run complementary checks of the neurons selected for each task of a pair against the other.

    "keep-only": delete all but the selected neurons of the site, and evaluate both tasks. "step-size": compare the sets and accuracies
    of pruning runs with few large and many small steps, with equally many neurons pruned. "layers": delete the same share of the last
    layer, the last two, and so on. "meeting": find where the selections, the accuracies and the trajectories of both directions meet.
    All are compared with as many random neurons. The weights of the model are restored. With `out`, every evaluation and every step is
    written before the next begins: the same call resumes an interrupted one.

    Args:
        model: what `load_model` returns; default is to load `config.model`.
        config: a `SelectionChecksConfig`; its fields can also be given as keywords.
        out: folder of the study; without one, nothing is saved.
        progress: True announces the work and its cost and shows bars, False shows nothing; a function receives the announcements.

    Returns:
        SelectionChecks with `.tables`, `.summary()` and `.figure(check)`.

    Raises:
        ValueError: tasks with the same data or name, a share that selects nothing, an unpruned accuracy of 0.
        FileExistsError: the folder contains another configuration (the error names the differing fields).

    Source: METHODS sections 5, 11 and 12; the open questions of [SEP] and [SP].

    Example:
        >>> import sepcap
        >>> config = sepcap.SelectionChecksConfig(fractions=(0.25, 0.5, 0.75, 1.0), tokens=5_000, eval_tokens=5_000)
        >>> sepcap.check_selection(model, config).figure("meeting")  # doctest: +SKIP
    """
    prepared = plan_selection_checks(model, config)
    return run_study(SelectionChecks, prepared.resolved, partial(_measure, prepared), out, prepared.cost, say)


def _measure(prepared: SelectionChecksPlan, pieces: Pieces) -> SelectionChecks:
    scores, lesions = scores_and_lesions(prepared, pieces)
    tables: Tables = {}
    with progress(total=prepared.sets(), desc="selection-checks", unit="set") as bar:
        bench = Bench(prepared.config, prepared.model, prepared.tasks, scores, lesions, prepared.neurons, bar)
        for check in prepared.config.checks:
            tables |= PARTS[check](bench)
    return SelectionChecks(as_json({"study": SelectionChecks.STUDY, **prepared.resolved}), tables)
