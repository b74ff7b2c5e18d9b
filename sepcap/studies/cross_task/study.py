"""Accuracy on every task after each one is pruned to a target, against as many random neurons (METHODS 5, 12)."""

import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd

from sepcap.checks import checked
from sepcap.evaluation.result import ratio
from sepcap.evaluation.trajectory import Bracket, bisect
from sepcap.interventions.trial import check_deletion
from sepcap.models.sites import bind
from sepcap.progress import progress
from sepcap.selection.score import Scores
from sepcap.studies.base.folder import Pieces, as_json
from sepcap.studies.base.result import Figures, StudyResult
from sepcap.studies.base.runner import run_study, study
from sepcap.studies.base.task_sets import (
    WHOLE,
    LesionPlan,
    Lesions,
    NamedTasks,
    Relative,
    n_highest,
    n_random,
    scores_and_lesions,
    what_intervals_cover,
)
from sepcap.studies.cross_task import figures
from sepcap.studies.cross_task.config import CrossTaskConfig


class CrossTaskPruning(StudyResult):
    """Accuracy left on every task after each one is pruned to a target accuracy.

    Attributes:
        config: the resolved configuration.
        tables: "matrix", one row per pruned and evaluated task: pruned, evaluated, n (pruned neurons), fraction (of the site), before and
            after (accuracies), relative (after/before), random (the same with as many random neurons, mean over seeds) and minus_random,
            the last three each with the ends `_low` and `_high` of a 95% interval over the documents that all evaluations share, and also
            over the seeds of the random neurons if `random_covers` states it.
            "bisection", one row per pruned task: task, target, n, fraction, relative, above (the largest number of neurons found to
            leave more than the target), relative_above, evaluations, reached. "trace", one row per evaluation of a bisection.

    Example:
        >>> found = sepcap.prune_across_tasks(model, sepcap.CrossTaskConfig(eval_tokens=5_000), out="runs/cross")  # doctest: +SKIP
        >>> found.matrix("relative")  # doctest: +SKIP
    """

    STUDY = "cross-task"
    TITLE = "How does pruning one task affect the others?"
    FIGURES: ClassVar[Figures] = {
        "matrix": ("Accuracy on every task after pruning each one", figures.cross_task),
        "bisection": ("Number of neurons needed", figures.cross_task_bisection),
    }

    @checked()
    def matrix(self, column: str = "relative") -> pd.DataFrame:
        """One column of the table as pruned task × evaluated task."""
        tasks = list(self.config["tasks"])
        return self.tables["matrix"].pivot(index="pruned", columns="evaluated", values=column).loc[tasks, tasks]

    def summary(self) -> list[str]:
        """Per pruned task: number of neurons, accuracy left on it and on the others, and the same with random neurons."""
        said = []
        table, target = self.tables["matrix"], self.config["target"]
        for found in self.tables["bisection"].to_dict("records"):
            rows = table.query("pruned == @found['task']").to_dict("records")
            own = next(row for row in rows if row["evaluated"] == found["task"])
            begin = f"{found['task']} falls to {_interval(own, 'relative')} of its {self.config['metric']}"
            if not found["reached"]:
                begin = (
                    f"{found['task']} does not fall to {target:.3g} of its {self.config['metric']}: {_interval(own, 'relative')} is left"
                )
            others = "; ".join(
                f"{row['evaluated']} keeps {_interval(row, 'relative')} (random {_interval(row, 'random')})"
                for row in rows
                if row is not own
            )
            said.append(
                f"{begin} after pruning {found['n']:,} {self.config['site']} neurons ({100 * found['fraction']:.1f}%; as many random ones: "
                f"{_interval(own, 'random')}); {others}."
            )
        return [*said, what_intervals_cover(len(self.config["seeds"]))]


def _interval(row: Mapping[Any, Any], name: str) -> str:
    return f"{row[name]:.2f} [{row[f'{name}_low']:.2f}, {row[f'{name}_high']:.2f}]"


class CrossTaskPlan(LesionPlan):
    """A plan with the cost of the study."""

    config: CrossTaskConfig

    @property
    def halvings(self) -> int:
        """Maximum number of evaluations of one bisection."""
        return 1 + math.ceil(math.log2(self.neurons / self.config.tolerance))

    def tokens(self) -> int:
        """Maximum number of tokens run through the model."""
        every = sum(sample.tokens for sample in self.evaluate.values())
        others = len(self.evaluate) * (1 + len(self.config.seeds)) * every
        return sum(sample.tokens for sample in self.collect.values()) + every * (1 + self.halvings) + others

    def cost(self) -> str:
        """The planned work and its cost, in one sentence."""
        c = self.config
        return (
            f"{self.resolved['model']}: prune {', '.join(self.tasks.names)}, each against {self.tasks.retain_name}, to {c.target:.3g} of "
            f"its {c.metric} by up to {self.halvings} evaluations of {self.neurons:,} {c.site} neurons, then evaluate all, with "
            f"{len(c.seeds)} random controls; at most {self.tokens() / 1e6:.3g} M tokens through the model"
        )


def plan_cross_task(model: Any, config: CrossTaskConfig) -> CrossTaskPlan:
    """Load tasks and tokens, and check that the neurons can be deleted."""
    check_deletion(bind(model, config.site))
    tasks = NamedTasks.of(config.tasks, config.retain)
    return CrossTaskPlan.sampled(model, config, tasks, {"tasks": tasks.names, "retain": tasks.retain_name})


@study(CrossTaskConfig)
@checked()
def prune_across_tasks(
    model: Any, config: CrossTaskConfig, *, out: str | Path | None = None, say: Callable[[str], Any]
) -> CrossTaskPruning:
    """Prune every task separately to a target accuracy, and measure the accuracy left on all of them.

    The neurons of a task are ranked once, by its score against the common retain task or against all other tasks together; the n
    highest are deleted at once, and n is found by bisection. The weights of the model are restored. With `out`, every evaluation is
    written before the next one begins: the same call resumes an interrupted one.

    Args:
        model: what `load_model` returns; default is to load `config.model`.
        config: a `CrossTaskConfig`; its fields can also be given as keywords.
        out: folder of the study; without one, nothing is saved.
        progress: True announces the work and its cost and shows bars, False shows nothing; a function receives the announcements.

    Returns:
        CrossTaskPruning with `.matrix()`, `.tables`, `.summary()` and `.figure()`.

    Raises:
        ValueError: tasks with the same data or name, too little text, an unpruned accuracy of 0.
        FileExistsError: the folder contains another configuration (the error names the differing fields).

    Source: METHODS sections 5 and 12; [MOD].

    Example:
        >>> import sepcap
        >>> config = sepcap.CrossTaskConfig(tasks=("local-python", "local-cpp"), target=0.5, tokens=5_000, eval_tokens=5_000)
        >>> sepcap.prune_across_tasks(model, config).matrix()  # doctest: +SKIP
    """
    prepared = plan_cross_task(model, config)
    return run_study(CrossTaskPruning, prepared.resolved, partial(_measure, prepared), out, prepared.cost, say)


def _measure(prepared: CrossTaskPlan, pieces: Pieces) -> CrossTaskPruning:
    scores, lesions = scores_and_lesions(prepared, pieces)
    return CrossTaskPruning(as_json({"study": CrossTaskPruning.STUDY, **prepared.resolved}), _tables(prepared, scores, lesions))


def _tables(prepared: CrossTaskPlan, scores: Mapping[str, Scores], lesions: Lesions) -> dict[str, pd.DataFrame]:
    config, names = prepared.config, prepared.tasks.names
    whole = lesions.whole()
    rows: dict[str, dict[str, Any]] = {name: {WHOLE: whole[name]} for name in names}
    found: dict[str, Bracket] = {}
    steps = len(names) * (prepared.halvings + 1 + len(config.seeds))
    with progress(total=steps, desc="cross-task", unit="set") as bar:
        for i, name in enumerate(names):
            found[name] = _to_target(prepared, i, scores[name], lesions, whole[name], bar)
            bar.update(prepared.halvings - len(found[name].trace))
            n = found[name].n
            sets = {_pruned(i, n): n_highest(scores[name], config.site, n)}
            sets |= {_random(n, seed): n_random(prepared.model, config.site, n, prepared.neurons, seed) for seed in config.seeds}
            for key, neurons in sets.items():
                for task, sums in lesions.without(key, neurons).items():
                    rows[task][key] = sums
                bar.update()
    relative = {task: Relative(of_task, config.metric, prepared.evaluate[task].fingerprint) for task, of_task in rows.items()}
    return {
        "matrix": _matrix(prepared, found, rows, relative),
        "bisection": _found(prepared, found, relative),
        "trace": pd.DataFrame([{"task": name, "n": n, "relative": v} for name, bracket in found.items() for n, v in bracket.trace]),
    }


def _pruned(task: int, n: int) -> str:
    return f"pruned-{task}-{n}"


def _random(n: int, seed: int) -> str:
    return f"random-{n}-{seed}"


def _to_target(prepared: CrossTaskPlan, task: int, scores: Scores, lesions: Lesions, whole: np.ndarray, bar: Any) -> Bracket:
    config, name = prepared.config, prepared.tasks.names[task]
    before = float(ratio(whole, config.metric))
    if not before > 0:
        raise ValueError(f"{config.metric} of the unpruned model is 0 on {name}: there is nothing to lose")

    def value(n: int) -> float:
        neurons = n_highest(scores, config.site, n)
        after = float(ratio(lesions.without(_pruned(task, n), neurons, [name])[name], config.metric))
        bar.update()
        return after / before

    return bisect(value, config.target, prepared.neurons, config.tolerance)


def _matrix(
    prepared: CrossTaskPlan, found: Mapping[str, Bracket], rows: Mapping[str, Any], relative: Mapping[str, Relative]
) -> pd.DataFrame:
    config, table = prepared.config, []
    for i, (pruned, bracket) in enumerate(found.items()):
        key, randoms = _pruned(i, bracket.n), [_random(bracket.n, seed) for seed in config.seeds]
        for task, of_task in relative.items():
            before, after = (float(ratio(rows[task][name], config.metric)) for name in (WHOLE, key))
            where = {"pruned": pruned, "evaluated": task, "n": bracket.n, "fraction": bracket.n / prepared.neurons}
            where["n_documents"] = prepared.evaluate[task].n_documents
            table.append(where | {"before": before, "after": after} | of_task.columns(key, randoms))
    return pd.DataFrame(table)


def _found(prepared: CrossTaskPlan, found: Mapping[str, Bracket], relative: Mapping[str, Relative]) -> pd.DataFrame:
    table = []
    for i, (task, bracket) in enumerate(found.items()):
        values = dict(bracket.trace) | {0: 1.0}
        row = {"task": task, "target": prepared.config.target, "n": bracket.n, "fraction": bracket.n / prepared.neurons}
        row |= relative[task].of(_pruned(i, bracket.n)).columns("relative")
        row |= {"above": bracket.above, "relative_above": values[bracket.above]}
        table.append(row | {"evaluations": len(bracket.trace), "reached": bracket.reached})
    return pd.DataFrame(table)
