"""Commands that prune: the demo, one run, a learned order, methods compared."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from sepcap.cli.options import Study, study_command, write_figures
from sepcap.selection.names import ImportanceName
from sepcap.studies.directions.config import DirectionComparisonConfig
from sepcap.studies.learned.config import LearnedRankingConfig, LearnedSite
from sepcap.studies.methods.config import MethodComparisonConfig
from sepcap.studies.pruning.config import PruningConfig


@dataclass(frozen=True)
class Tracked(Study):
    """A command that prunes and sends the metrics of every step to trackers."""

    tracker: tuple[Literal["jsonl", "wandb", "none"], ...] = ("jsonl",)
    """Where the metrics of every step are sent: a file of JSON lines in the folder, Weights & Biases (WANDB_MODE=offline keeps them on this
    machine), both, or none."""


@study_command(
    "compare_directions",
    out="runs/demo",
    defaults={"fractions": {"mlp": 0.1}, "steps": 10, "tokens": 13_000, "eval_tokens": 15_000},
)
class Demo(DirectionComparisonConfig, Tracked):
    """Prune code from the embedded model and keep prose, then the reverse, and compare both with random neurons.

    The command writes a table, figures, continued texts and a page. All of it is resumable, and works for any pair of tasks and any model.
    """

    def run(self) -> None:
        """Carry out the command."""
        print("Loading model and tasks; the first time, the texts of this Python installation are read (about a minute).", flush=True)
        from sepcap.studies.pruning.generations import continuations

        model = self.load()
        comparison = self.compute(model, tracker=self.tracker)
        print("\n" + comparison.table.to_string(index=False))
        print(
            "\narea: 1 = both drop together, 2 = the retain task is kept to the end; separability = 100·|area − 1|; "
            "in brackets 95% bootstrap intervals over texts, ± one standard deviation over seeds."
        )
        for name, why in comparison.inseparable().items():
            print(f"no separability of {name}: {why}")
        forward = comparison.forward
        _say_continuations(lambda: continuations(model, forward), forward.config["forget"])
        print("\nFigures:")
        of_forward = [kind for kind in ("pruned", "threshold", "scores") if kind != "scores" or self.importance != "random"]
        figures = {kind: partial(comparison.figure, kind) for kind in comparison.FIGURES}
        write_figures(figures | {kind: partial(forward.figure, kind) for kind in of_forward}, self.out / "figures")
        print(f"\nAll of it on one page:\n  {comparison.report()}")


@study_command("prune", out="runs/prune")
class Prune(PruningConfig, Tracked):
    """Prune one capability from a model and keep the other: one run, in the folder --out.

    The defaults are those of [SP]: 50 steps of 2%, 100,000 tokens per task and step. At its end the command says which options make a
    random baseline for the run. `sepcap demo` runs a small comparison of both directions with random baselines.
    """

    def run(self) -> None:
        """Carry out the command."""
        from sepcap.studies.pruning.random_neurons.above_random import no_baseline

        run = self.compute(tracker=self.tracker)
        print(run)
        print(run.trajectory.pivot(index="step", columns="role", values=["top1", "loss"]).to_string(float_format=lambda x: f"{x:.3f}"))
        try:
            print(run.separability("top1"))
            if alone := no_baseline(run):
                print(alone)
        except ValueError as error:  # the run is whole all the same: an untrained model has no accuracy to lose
            print(f"no separability: {error}")


@study_command(
    "learn_ranking",
    out="runs/learned",
    defaults={"site": ("mlp",)},
    site=tuple[LearnedSite, ...],
    init=ImportanceName,
)
class LearnRanking(LearnedRankingConfig, Study):
    """Learn an order of all neurons that separates two tasks, and compare it with the fixed score it started from.

    The order is learned on collection texts by gradient descent, and is never worse than its start on those of them that are held out.
    `sepcap prune --importance learned --no-recollect` prunes by such an order.
    """


@study_command("compare_methods", out="runs/methods")
class CompareMethods(MethodComparisonConfig, Study):
    """Prune by every method, in both directions and with several seeds, and compare: mlp, attention, heads, SVD, offsets, and random
    neurons like those of each beside it."""


def _say_continuations(make: Callable[[], Any], forgotten: str) -> None:
    try:
        texts = make()
    except (ValueError, RuntimeError) as error:  # the runs are whole: a model without next tokens, or one that is ruined
        print(f"\nno continuations: {error}")
        return
    for row in texts.to_dict("records"):
        for when in ("before", "after"):
            print(f"\n--- {row['kind']} prompt, {when} forgetting {forgotten} ---\n{row['prompt']}⟶{row[when]}")
