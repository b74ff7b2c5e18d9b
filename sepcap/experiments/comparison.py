"""The main job: one pair of tasks pruned in both directions, against the random baseline."""

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pandas as pd

from sepcap.checks import checked
from sepcap.errors import unknown
from sepcap.evaluation.generation import continuation
from sepcap.evaluation.next_token import evaluate_sample
from sepcap.experiments.check_run import is_left
from sepcap.experiments.config import PruningConfig
from sepcap.experiments.planned import name_study, planned_runs
from sepcap.experiments.pruning import Plan, execute, plan
from sepcap.experiments.result import Figures, Shown
from sepcap.experiments.run import Run
from sepcap.experiments.separability import Separability
from sepcap.experiments.step_files import identity_of
from sepcap.experiments.trackers import Trackers, trackers_of
from sepcap.models.kinds import kind_of
from sepcap.models.weights import WeightSnapshot
from sepcap.progress import tell
from sepcap.storage import make_folder, sole_writer
from sepcap.tasks.task import load_task


@dataclasses.dataclass(frozen=True, eq=False)
class Comparison(Shown):
    """Selective pruning of a pair of tasks in both directions, and the random baseline of both.

    Attributes:
        folder: holds the runs `forward`, `reverse` and `random`.
        forward: forgets the configuration's forget task.
        reverse: forgets its retain task.
        random: removes as many random neurons; the baseline of both directions.
    """

    STUDY = "compare-directions"
    TITLE = "Can the neurons of one task be removed without harm to the other?"
    FIGURES: ClassVar[Figures] = {
        "trajectory": ("Trajectory: accuracy on both tasks", "trajectory"),
        "areas": ("Area under the trajectory, with its interval", "areas"),
        "metric": ("Top-1 accuracy while neurons go", "metric_over_steps"),
    }

    folder: Path
    forward: Run
    reverse: Run
    random: Run

    @property
    def runs(self) -> dict[str, Run]:
        """The runs under the names that figures call them."""
        return {
            f"forget {self.forward.config['forget']}": self.forward,
            f"forget {self.reverse.config['forget']}": self.reverse,
            "random": self.random,
        }

    @classmethod
    @checked()
    def load(cls, folder: str | Path) -> "Comparison":
        """Read the three runs.

        Raises:
            FileNotFoundError: there is no comparison, or one of its runs is not finished.
        """
        return cls(Path(folder), **planned_runs(Path(folder), cls.STUDY))

    @property
    def config(self) -> dict[str, Any]:
        """The configuration of the forward run; the others differ in direction and importance alone."""
        return self.forward.config

    @property
    def tables(self) -> dict[str, pd.DataFrame]:
        """`table()` by its name."""
        return {"runs": self.table()}

    def summary(self) -> list[str]:
        """Separability of both directions, against random neurons."""
        said = [
            f"Neurons of {self.config['model']} were removed in {self.config['steps']} steps: those that matter for one task and not for "
            "the other, in both directions, and as many at random."
        ]
        without = self.inseparable("top1")
        for name, run in self.runs.items():
            if run is self.random:
                continue
            if name in without:
                what = f"To forget {run.config['forget']} and retain {run.config['retain']}"
                said.append(f"{what}: separability is not known, because {without[name]}.")
                continue
            s = run.separability("top1", baseline=self.random)
            drops = [100 * (1 - values[s.max_drop_step] / values[0]) for values in (s.forget, s.retain)]
            (low, high), (below, above), (least, most) = s.percent_interval, s.above_random_interval, s.max_drop_interval
            said.append(
                f"To forget {run.config['forget']} and retain {run.config['retain']}: separability of top-1 is {s.percent:.0f}% (95% "
                f"bootstrap interval {low:.0f}% to {high:.0f}%), the area {s.above_random:+.2f} from that of random neurons "
                f"({below:+.2f} to {above:+.2f}). They were furthest apart after step {s.max_drop_step}: {drops[0]:.1f}% of accuracy "
                f"lost on the one, {drops[1]:.1f}% on the other; the maximum differential drop, with its step chosen on the other half of "
                f"the documents, is {s.max_drop:.1f} points ({least:.1f} to {most:.1f})."
            )
        return said

    def figure(self, kind: str | None = None, **options: Any) -> Any:
        """ "trajectory", "areas" or "metric", of all three runs."""
        from sepcap import plots

        kind = kind or "trajectory"
        if kind not in self.FIGURES:
            raise unknown("figure", kind, self.FIGURES)
        return getattr(plots, self.FIGURES[kind][1])(self.runs, **options)

    def separabilities(self, metric: str = "top1") -> dict[str, Separability]:
        """Separability per run, the specific task being the one to forget; for random, `forward`'s."""
        return {name: run.separability(metric) for name, run in self.runs.items()}

    def table(self, metric: str = "top1") -> pd.DataFrame:
        """One row per run: the metric of both tasks unpruned and at the maximum differential drop, area, separability.

        Where the unpruned metric is 0 there are no areas (`inseparable` says so): the metric is then of the last step.
        """
        rows = []
        without = self.inseparable(metric)
        for name, run in self.runs.items():
            if name in without:
                rows.append({"run": name, **_first_and_last(run, metric), "at step": run.steps_done, "area": "–", "separability": "–"})
                continue
            s = run.separability(metric)
            gone = int(run.record(s.max_drop_step)["step"])
            rows.append(
                {
                    "run": name,
                    f"forget {metric}": f"{s.forget[0]:.3f} → {s.forget[gone]:.3f}",
                    f"retain {metric}": f"{s.retain[0]:.3f} → {s.retain[gone]:.3f}",
                    "at step": gone,
                    "differential drop": f"{s.max_drop:.1f} [{s.max_drop_interval[0]:.1f}, {s.max_drop_interval[1]:.1f}]",
                    "area": f"{s.area:.2f} [{s.interval[0]:.2f}, {s.interval[1]:.2f}]",
                    "separability": f"{s.percent:.0f}% [{s.percent_interval[0]:.0f}, {s.percent_interval[1]:.0f}]",
                }
            )
        return pd.DataFrame(rows).fillna("–")

    def inseparable(self, metric: str = "top1") -> dict[str, str]:
        """Runs that have no areas, and why: an unpruned model that has nothing to lose."""
        reasons = {}
        for name, run in self.runs.items():
            try:
                run.separability(metric)
            except ValueError as error:
                reasons[name] = str(error)
        return reasons


def _first_and_last(run: Run, metric: str) -> dict[str, str]:
    values = run.trajectory.pivot(index="step", columns="role", values=metric)
    return {f"{role} {metric}": f"{values[role].iloc[0]:.3f} → {values[role].iloc[-1]:.3f}" for role in ("forget", "retain")}


def compare(
    model: Any, config: PruningConfig, folder: str | Path, *, tracker: Trackers = "jsonl", say: Callable[[str], None] = tell
) -> Comparison:
    """Prune both directions of a pair of tasks and the random baseline, each run in a folder of its own.

    Args:
        model: what `load_model` returns; it is given back unchanged.
        config: the forward run; the other two differ in direction and importance alone.
        folder: gets the subfolders `forward`, `reverse` and `random`; interrupted or finished runs in it are taken up.
        tracker: who follows every run, as in `sepcap.prune`.
        say: receives what is about to happen and cost, before it does.
    """
    folder, trackers = Path(folder), trackers_of(tracker)
    # read, sampled, and measured before anything is pruned, once for the three
    config = dataclasses.replace(config, forget=load_task(config.forget), retain=load_task(config.retain))
    known: dict[Any, Any] = {}
    configs = {
        "forward": config,
        "reverse": dataclasses.replace(config, forget=config.retain, retain=config.forget),
        "random": dataclasses.replace(config, importance="random"),
    }
    plans = {name: plan(model, c, known) for name, c in configs.items()}
    for name, prepared in plans.items():
        is_left(folder / name, prepared.resolved)  # refuses one that is damaged or another, before any is computed
        say(f"{name}: {prepared.cost()}")
    speed = tokens_per_second(plans["forward"])
    total = sum(p.tokens() for p in plans.values())
    say(
        f"About {total / speed / 60:.1f} minutes at the {speed:,.0f} tokens per second just measured here; "
        f"finished steps in {folder} are not computed again."
    )
    make_folder(folder)
    with sole_writer(folder):
        name_study(folder, Comparison.STUDY, {name: identity_of(prepared.resolved) for name, prepared in plans.items()})
        runs = {name: execute(prepared, folder / name, trackers, say) for name, prepared in plans.items()}
    return Comparison(folder, **runs)


def tokens_per_second(prepared: Plan) -> float:
    """Speed of an evaluation pass on this machine, from one batch after one to warm up."""
    sample = next(iter(prepared.evaluate.values()))
    few = sample.take(range(min(len(sample.rows), prepared.config.batch_size)))
    evaluate_sample(prepared.model, few, batch_size=prepared.config.batch_size, quiet=True)
    started = time.perf_counter()
    evaluate_sample(prepared.model, few, batch_size=prepared.config.batch_size, quiet=True)
    return few.tokens / (time.perf_counter() - started)


def continuations(model: Any, run: Run, step: int | None = None) -> pd.DataFrame:
    """Beginnings of evaluation texts of both tasks, continued before pruning and after a step.

    Args:
        model: what was pruned; it is given back as it came.
        run: of `sepcap.prune`.
        step: default is that of the maximum differential drop; the last one where the unpruned model has nothing to lose.

    Raises:
        ValueError: a model that predicts no next tokens, or a run that holds no prompts.
    """
    if (kind := kind_of(model)) != "causal":
        what = "masked tokens" if kind == "masked" else "labels of images"
        raise ValueError(f"{model.cfg.model_name} predicts {what}, so there is no text to go on with")
    step = _widest_step(run) if step is None else step
    prompts = run.config.get("prompts")
    if not prompts:
        raise ValueError(f"the run in {run.folder} was made by a version that kept no prompts of its tasks: prune again in another folder")
    before = {role: continuation(model, prompt) for role, prompt in prompts.items()}
    snapshot = WeightSnapshot(model, tuple(run.neurons(step).masks))
    try:
        run.apply(model, step)
        after = {role: continuation(model, prompt) for role, prompt in prompts.items()}
    finally:
        snapshot.restore()
    rows = [{"kind": run.config[r], "prompt": prompt, "before": before[r], "after": after[r]} for r, prompt in prompts.items()]
    return pd.DataFrame(rows)


def _widest_step(run: Run) -> int:
    try:
        return run.separability("top1").max_drop_step
    except ValueError:
        return run.steps_done
