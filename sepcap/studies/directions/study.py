"""The main experiment: one pair of tasks pruned in both directions, against random baselines."""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pandas as pd

from sepcap.checks import checked
from sepcap.errors import CorruptFile, unknown
from sepcap.statistics.intervals import in_percent
from sepcap.storage import make_folder, sole_writer
from sepcap.studies.base.folder import identity_of
from sepcap.studies.base.result import Figures
from sepcap.studies.base.runner import study
from sepcap.studies.directions.config import DirectionComparisonConfig
from sepcap.studies.pruning.check_run import is_left
from sepcap.studies.pruning.config import DIRECTIONS, Direction
from sepcap.studies.pruning.figures.areas import areas
from sepcap.studies.pruning.figures.steps import metric_over_steps
from sepcap.studies.pruning.figures.trajectory import trajectory
from sepcap.studies.pruning.plan import Plan, plan, tokens_per_second
from sepcap.studies.pruning.planned import RunsResult, name_study
from sepcap.studies.pruning.prune import execute
from sepcap.studies.pruning.random_neurons.above_random import few_steps, folder_of, over_seeds
from sepcap.studies.pruning.random_neurons.baselines import baseline_config
from sepcap.studies.pruning.run import Run
from sepcap.studies.pruning.separability import BASELINES, Separability
from sepcap.studies.pruning.trackers import Trackers, trackers_of
from sepcap.tasks.load import load_task


@dataclasses.dataclass(frozen=True, eq=False)
class DirectionComparison(RunsResult):
    """Selective pruning of a pair of tasks in both directions, with random baselines for each.

    Attributes:
        folder: contains the runs `forward` and `reverse`, and the baselines as `random-KIND-DIRECTION-SEED`.
        forward: forgets the configuration's forget task.
        reverse: forgets its retain task.
        baselines: kind ("uniform", "per_layer", "activity") -> direction -> random runs that differ in their seed. Those drawn uniformly
            have no direction, unless they have an offset: the same runs are baselines of both.
    """

    STUDY = "compare-directions"
    TITLE = "Can the neurons of one task be removed without harm to the other?"
    FIGURES: ClassVar[Figures] = {
        "trajectory": ("Trajectory: accuracy on both tasks", trajectory),
        "areas": ("Area under the trajectory, with its interval", areas),
        "metric": ("Top-1 accuracy during pruning", metric_over_steps),
    }

    folder: Path
    forward: Run
    reverse: Run
    baselines: Mapping[str, Mapping[Direction, Sequence[Run]]]

    @property
    def selective(self) -> dict[Direction, Run]:
        """The two selective runs, by direction."""
        return {"forward": self.forward, "reverse": self.reverse}

    @property
    def groups(self) -> dict[str, list[Run]]:
        """The two selective runs, and the seeds of each baseline together, under their names in figures."""
        groups = {f"forget {run.config['forget']}": [run] for run in self.selective.values()}
        for kind, of_kind in self.baselines.items():
            name = f"random {BASELINES[kind]}".rstrip()
            if list(of_kind["forward"]) == list(of_kind["reverse"]):  # the same runs are baselines of both directions
                groups[name] = list(of_kind["forward"])
            else:
                groups |= {f"{name}, {self.selective[direction].config['forget']}": list(runs) for direction, runs in of_kind.items()}
        return groups

    @property
    def runs(self) -> dict[str, Run]:
        """All runs, each seed of a baseline by itself."""
        selective = self.selective.values()
        return {
            name if run in selective else f"{name}, seed {run.config['seed']}": run for name, runs in self.groups.items() for run in runs
        }

    @classmethod
    def _from_runs(cls, folder: Path, runs: Mapping[str, Run]) -> "DirectionComparison":
        baselines: dict[str, dict[Direction, list[Run]]] = {}
        for name, run in runs.items():
            if name in DIRECTIONS:
                continue
            if (named := re.fullmatch(rf"random-({'|'.join(BASELINES)})-(?:({'|'.join(DIRECTIONS)})-)?\d+", name)) is None:
                raise CorruptFile(f"{name!r} is not a run of a comparison of directions")
            of_kind = baselines.setdefault(named[1], {direction: [] for direction in DIRECTIONS})
            for direction in DIRECTIONS:
                if named[2] in (None, direction):
                    of_kind[direction].append(run)
        return cls(folder, runs["forward"], runs["reverse"], baselines)

    @property
    def config(self) -> dict[str, Any]:
        """The configuration of the forward run; the others differ only in direction and importance."""
        return self.forward.config

    @property
    def tables(self) -> dict[str, pd.DataFrame]:
        """`by_metric()` by its name."""
        return {"runs": self.by_metric()}

    def summary(self) -> list[str]:
        """Separability of both directions, against random neurons."""
        said = [
            f"Neurons of {self.config['model']} were removed in {self.config['steps']} steps: those with the highest importance on one "
            f"task relative to the other, in both directions{', and as many at random' * bool(self.baselines)}."
        ]
        without = self.inseparable("top1")
        for (name, _), (direction, run) in zip(self.groups.items(), self.selective.items(), strict=False):
            what = f"To forget {run.config['forget']} and retain {run.config['retain']}"
            if name in without:
                said.append(f"{what}: separability is not known, because {without[name]}.")
                continue
            s = run.separability("top1")
            (low, high), (least, most) = s.percent_interval, s.max_drop_interval
            said.append(
                f"{what}: separability of top-1 is {s.percent:.1f}% (95% bootstrap interval {low:.1f}% to {high:.1f}%). At the "
                f"step where they are furthest apart on one half of the documents (on all of them step {s.max_drop_step}), the first has "
                f"lost {s.max_drop_lost[0]:.1f}% of accuracy and the second {s.max_drop_lost[1]:.1f}%, measured on the other half: a "
                f"maximum differential drop of {s.max_drop:.1f} points ({least:.1f} to {most:.1f})."
            )
            for of_kind in self.baselines.values():
                said.append(f"The area is {run.separability('top1', baseline=of_kind[direction]).above_random_in_words()}.")
        return said

    @checked()
    def figure(self, kind: str | None = None, **options: Any) -> Any:
        """ "trajectory", "areas" or "metric", of all runs; the seeds of a baseline are drawn together."""
        kind = kind or "trajectory"
        if kind not in self.FIGURES:
            raise unknown("figure", kind, self.FIGURES)
        return self.FIGURES[kind][1](self.groups, **options)

    @checked()
    def separabilities(self, metric: str = "top1") -> dict[str, Separability]:
        """Separability per run, with the forget task as the specific task; for neurons drawn uniformly, that of `forward`."""
        return {name: run.separability(metric) for name, run in self.runs.items()}

    @checked()
    def by_metric(self, metric: str = "top1") -> pd.DataFrame:
        """One row per direction: the unpruned metric of both tasks and its loss at the maximum differential drop, area,
        separability, and the area above that of each baseline; one row per baseline and direction: the mean area over its seeds.

        Losses and drop are measured on the half of the documents that the step was not chosen on; `at step` is that of all documents.
        `n_documents` is that of the task with fewer. In brackets are 95% bootstrap intervals over texts; ± is a standard deviation over
        seeds. If the unpruned metric is 0, there are no areas (see `inseparable`): the metric is then of the last step.
        """
        rows = []
        without = self.inseparable(metric)
        for name, runs in self.groups.items():
            run = runs[0]
            if name in without:
                rows.append({"run": name, **_first_and_last(run, metric), "at step": run.steps_done, "area": "–", "separability": "–"})
            elif run not in self.selective.values():
                found = over_seeds(runs, metric)
                percent, (low, high) = 100 * (found.mean - 1), (100 * (end - 1) for end in found.interval)
                area = f"{found.mean:.2f} [{found.interval[0]:.2f}, {found.interval[1]:.2f}]"
                spread = f" ± {found.sd:.2f}, {len(runs)} seeds" if len(runs) > 1 else ""
                rows.append({"run": name, "area": area + spread, "separability": in_percent(percent, (low, high))})
            else:
                rows.append({"run": name, **self._selective_row(run, metric)})
        documents = [_documents(self.groups[row["run"]]) for row in rows]
        return pd.DataFrame(rows, dtype=object).assign(n_documents=documents).fillna("–")

    def _selective_row(self, run: Run, metric: str) -> dict[str, Any]:
        s = run.separability(metric)
        row = {
            f"forget {metric}": f"{s.forget[0]:.3f}, {s.max_drop_lost[0]:.1f}% lost",
            f"retain {metric}": f"{s.retain[0]:.3f}, {s.max_drop_lost[1]:.1f}% lost",
            "at step": s.max_drop_step,
            "differential drop": f"{s.max_drop:.1f} [{s.max_drop_interval[0]:.1f}, {s.max_drop_interval[1]:.1f}]",
            "area": f"{s.area:.2f} [{s.interval[0]:.2f}, {s.interval[1]:.2f}]",
            "separability": in_percent(s.percent, s.percent_interval),
        }
        for kind, of_kind in self.baselines.items():
            found = run.separability(metric, baseline=of_kind["forward" if run is self.forward else "reverse"])
            low, high = found.above_random_interval
            row[f"above random {BASELINES[kind]}".rstrip()] = f"{found.above_random:+.2f} [{low:+.2f}, {high:+.2f}]"
        return row

    @checked()
    def inseparable(self, metric: str = "top1") -> dict[str, str]:
        """Runs that have no areas, and why: the unpruned model has an accuracy of 0."""
        reasons = {}
        for name, runs in self.groups.items():
            try:
                runs[0].separability(metric)
            except ValueError as error:
                reasons[name] = str(error)
        return reasons


def _documents(runs: Sequence[Run]) -> Any:
    return min(runs[0].n_documents or ["–"])


def _first_and_last(run: Run, metric: str) -> dict[str, str]:
    values = run.trajectory.pivot(index="step", columns="role", values=metric)
    return {f"{role} {metric}": f"{values[role].iloc[0]:.3f} → {values[role].iloc[-1]:.3f}" for role in ("forget", "retain")}


@study(DirectionComparisonConfig)
@checked()
def compare_directions(
    model: Any, config: DirectionComparisonConfig, *, out: str | Path, tracker: Trackers = "jsonl", say: Callable[[str], Any]
) -> DirectionComparison:
    """Prune both directions of a pair of tasks, and random baselines of each, every run in its own folder.

    The same call resumes an interrupted comparison; finished runs are not recomputed.

    Args:
        model: what `load_model` returns, and is left unchanged; default is to load `config.model`.
        config: a `DirectionComparisonConfig`; its fields can also be given as keywords.
        out: folder for the runs `forward`, `reverse` and `random-…`.
        tracker: where the metrics of every step are sent, as in `sepcap.prune`.
        progress: True announces the work and its cost and shows bars, False shows nothing; a function receives the announcements, and
            every step if no bar shows it.

    Returns:
        DirectionComparison with `.table`, `.separabilities()`, `.figure(kind)` and `.report()`.

    Raises:
        ValueError: bad configuration, forget and retain the same, too little text, an unknown tracker.
        FileExistsError: the folder holds a run of another configuration (the differing fields are named).

    Source: [SP] section 4, [SEP] section 3.

    Example:
        >>> import sepcap
        >>> sepcap.compare_directions(model, steps=10, fractions={"mlp": 0.1}, out="runs/demo").table  # doctest: +SKIP
    """
    folder, trackers = Path(out), trackers_of(tracker)
    steps = few_steps(config.steps) if config.baseline_steps is None else config.baseline_steps
    # read, sampled, and measured before anything is pruned, once for all
    config = dataclasses.replace(config, forget=load_task(config.forget), retain=load_task(config.retain))
    known: dict[Any, Any] = {}
    plans = {name: plan(model, config.pruning(name), known) for name in DIRECTIONS}
    for name, prepared in plans.items():
        is_left(folder / name, prepared.resolved)  # raises an error for a damaged or different run, before any is computed
        say(f"{name}: {prepared.cost()}")
    drawn: dict[str, tuple[str, Direction, int]] = {
        folder_of(kind, direction, seed): (kind, direction or "forward", seed)
        for kind in config.baselines
        for direction in (DIRECTIONS if kind != "uniform" or config.offset != "none" else (None,))
        for seed in range(config.baseline_seeds)
    }
    # the unpruned model is evaluated once for all
    each = sum(sample.tokens for sample in plans["forward"].evaluate.values())
    total = sum(p.work() - each for p in plans.values()) + each * (1 + steps * len(drawn))
    speed = tokens_per_second(plans["forward"])
    say(
        f"{len(drawn)} random baselines ({', '.join(config.baselines)}; {config.baseline_seeds} seeds) are evaluated at {steps} steps. In "
        f"total: {total / 1e6:.3g} M tokens through the model, about {total / speed / 60:.1f} minutes at the {speed:,.0f} tokens per "
        f"second just measured here; finished steps in {folder} are not recomputed."
    )
    make_folder(folder)
    with sole_writer(folder):
        # the identity of a matched baseline is known when the run that it is matched with is finished
        planned = {name: identity_of(prepared.resolved) for name, prepared in plans.items()}
        name_study(folder, DirectionComparison.STUDY, {**planned, **dict.fromkeys(drawn)})
        runs: dict[str, Run] = {name: execute(prepared, folder / name, trackers, say) for name, prepared in plans.items()}
        baselines: dict[str, Plan] = {}
        for name, (kind, direction, seed) in drawn.items():
            at = None if kind == "uniform" else folder / direction
            baselines[name] = plan(model, baseline_config(config.pruning(direction), kind, seed, steps, at), known)
            is_left(folder / name, baselines[name].resolved)  # raises an error for a different run, before the plan is written
        known_now = {name: identity_of(prepared.resolved) for name, prepared in baselines.items()}
        name_study(folder, DirectionComparison.STUDY, known_now, whole=False)
        runs |= {name: execute(prepared, folder / name, trackers, say) for name, prepared in baselines.items()}
    return DirectionComparison._from_runs(folder, runs)
