"""The main job: one pair of tasks pruned in both directions, against the random baseline."""

import dataclasses
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd

from sepcap.evaluation.generation import PROMPTS, continuation
from sepcap.evaluation.next_token import evaluate_sample
from sepcap.experiments.config import PruningConfig
from sepcap.experiments.pruning import Plan, execute, plan
from sepcap.experiments.run import Run
from sepcap.experiments.separability import Separability
from sepcap.experiments.trackers import Trackers, trackers_of
from sepcap.models.weights import WeightSnapshot

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, eq=False)
class Comparison:
    """Selective pruning of a pair of tasks in both directions, and the random baseline of both.

    Attributes:
        folder: holds the runs `forward`, `reverse` and `random`.
        forward: forgets the configuration's forget task.
        reverse: forgets its retain task.
        random: removes as many random neurons; the baseline of both directions.
    """

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

    def separabilities(self, metric: str = "top1") -> dict[str, Separability]:
        """Separability per run, the specific task being the one to forget; for random, `forward`'s."""
        return {name: run.separability(metric) for name, run in self.runs.items()}

    def table(self, metric: str = "top1") -> pd.DataFrame:
        """One row per run: the metric of both tasks unpruned and at the maximum differential drop, area, separability."""
        rows = []
        for name, run in self.runs.items():
            s = run.separability(metric)
            gone = int(run.record(s.max_drop_step)["step"])
            rows.append(
                {
                    "run": name,
                    f"forget {metric}": f"{s.forget[0]:.3f} → {s.forget[gone]:.3f}",
                    f"retain {metric}": f"{s.retain[0]:.3f} → {s.retain[gone]:.3f}",
                    "at step": gone,
                    "differential drop": f"{s.max_drop:.1f}",
                    "area": f"{s.area:.2f} [{s.interval[0]:.2f}, {s.interval[1]:.2f}]",
                    "separability": f"{s.percent:.0f}% [{s.percent_interval[0]:.0f}, {s.percent_interval[1]:.0f}]",
                }
            )
        return pd.DataFrame(rows)


def compare(
    model: Any, config: PruningConfig, folder: str | Path, *, tracker: Trackers = "jsonl", say: Callable[[str], None] = log.info
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
    configs = {
        "forward": config,
        "reverse": dataclasses.replace(config, forget=config.retain, retain=config.forget),
        "random": dataclasses.replace(config, importance="random"),
    }
    plans = {name: plan(model, c) for name, c in configs.items()}
    for name, prepared in plans.items():
        say(f"{name}: {prepared.cost()}")
    speed = tokens_per_second(plans["forward"])
    total = sum(p.tokens() for p in plans.values())
    say(
        f"About {total / speed / 60:.1f} minutes at the {speed:,.0f} tokens per second just measured here; "
        f"finished steps in {folder} are not computed again."
    )
    runs = {name: execute(prepared, folder / name, trackers) for name, prepared in plans.items()}
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
    """The same prompts continued before pruning and after a step (default: the maximum differential drop)."""
    step = run.separability("top1").max_drop_step if step is None else step
    before = {kind: continuation(model, prompt) for kind, prompt in PROMPTS.items()}
    snapshot = WeightSnapshot(model, tuple(run.neurons(step).masks))
    try:
        run.apply(model, step)
        after = {kind: continuation(model, prompt) for kind, prompt in PROMPTS.items()}
    finally:
        snapshot.restore()
    return pd.DataFrame([{"kind": kind, "prompt": PROMPTS[kind], "before": before[kind], "after": after[kind]} for kind in PROMPTS])
