"""Commands that prune: the demo, one run, methods compared."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from sepcap.cli.options import Fractions, Loading, config_in, write_figure, write_figures, write_table
from sepcap.selection.names import ImportanceName
from sepcap.studies.methods.config import MethodComparisonConfig
from sepcap.studies.pruning.config import PruningConfig


@dataclass(frozen=True)
class Demo(Loading):
    """Prune code out of the embedded model and keep prose, then the reverse, and random neurons beside each: table, pictures, texts, page.

    All of it is resumable, and of any pair of tasks and any model.
    """

    RESUMES = True

    forget: str = "local-code"
    """Task whose capability is to go first: a name (see `sepcap tasks`) or the path of a .txt, .jsonl or .parquet file or folder."""
    retain: str = "local-prose"
    """The other task, which is to go in the reverse direction."""
    fractions: Fractions = field(default_factory=lambda: {"mlp": 0.1})
    """Share of each site's original neurons that goes at every step; sites are mlp, attn_pre_out, attn_value, heads."""
    steps: int = 10
    """Number of pruning steps."""
    importance: ImportanceName = "abs"
    """Importance function."""
    tokens: int = 13_000
    """Token positions per task and step from which statistics are collected."""
    eval_tokens: int = 15_000
    """Predictions per task and step on which the model is evaluated."""
    context: int | None = None
    """Tokens per row; default is the model's context, at most 512."""
    seed: int = 0
    """Seed of the documents from which statistics are collected; 0 reads them as they come."""
    baselines: tuple[Literal["uniform", "per_layer", "activity"], ...] = ("per_layer",)
    """Random neurons that stand beside both directions: as many of every layer as each run took, as many of every layer and tenth of it by
    activity on the retain task, or uniform over the model."""
    baseline_seeds: int = 5
    """Draws of each baseline."""
    baseline_steps: int | None = None
    """At how many steps baselines are evaluated, a divisor of --steps; default is from 3 to 5, or all steps where there is no such one."""
    out: Path = Path("runs/demo")
    """Folder of the runs; finished steps in it are not recomputed."""
    tracker: tuple[Literal["jsonl", "wandb", "none"], ...] = ("jsonl",)
    """Where the metrics of every step are sent: a file of JSON lines in the folder, Weights & Biases (WANDB_MODE=offline keeps them on this
    machine), both, or none."""

    def config(self) -> PruningConfig:
        """The configuration of the first direction."""
        shared = {f.name for f in dataclasses.fields(self)} & {f.name for f in dataclasses.fields(PruningConfig)}
        return PruningConfig(**{name: getattr(self, name) for name in shared})

    def run(self) -> None:
        """Carry out the command."""
        from sepcap.studies.pruning.trackers import trackers_of

        how = {"baselines": self.baselines, "baseline_seeds": self.baseline_seeds, "baseline_steps": self.baseline_steps}
        _compare(self.load, self.config(), self.out, tracker=trackers_of(self.tracker), **how)


@dataclass(frozen=True)
class Prune(PruningConfig, Loading):
    """Prune one capability out of a model and keep the other: one run, in the folder --out.

    The defaults are those of [SP]: 50 steps of 2%, 100,000 tokens per task and step. At its end the command says which options put random
    neurons beside the run. `sepcap demo` runs a small comparison of both directions with random neurons beside each.
    """

    RESUMES = True

    forget: str = "local-code"
    """Task whose capability is to go: a name (see `sepcap tasks`) or the path of a .txt, .jsonl or .parquet file or folder."""
    retain: str = "local-prose"
    """Task whose capability is to stay."""
    fractions: Fractions = field(default_factory=lambda: {"mlp": 0.02})
    """Share of each site's original neurons that goes at every step; sites are mlp, attn_pre_out, attn_value, heads."""
    out: Path = Path("runs/prune")
    """Folder of the run; the same command goes on where an interrupted one stopped."""
    tracker: tuple[Literal["jsonl", "wandb", "none"], ...] = ("jsonl",)
    """Where the metrics of every step are sent: a file of JSON lines in the folder, Weights & Biases (WANDB_MODE=offline keeps them on this
    machine), both, or none."""

    def run(self) -> None:
        """Carry out the command."""
        from sepcap.studies.pruning.check_run import is_left
        from sepcap.studies.pruning.plan import plan
        from sepcap.studies.pruning.prune import execute
        from sepcap.studies.pruning.random_neurons.above_random import no_baseline
        from sepcap.studies.pruning.trackers import trackers_of

        config, trackers = config_in(PruningConfig, self), trackers_of(self.tracker)
        prepared = plan(self.load(), config)
        print(prepared.cost() if is_left(self.out, prepared.resolved) else "This run is finished; nothing is recomputed.")
        run = execute(prepared, self.out, trackers, partial(print, flush=True))
        print(run)
        print(run.trajectory.pivot(index="step", columns="role", values=["top1", "loss"]).to_string(float_format=lambda x: f"{x:.3f}"))
        try:
            print(run.separability("top1"))
            if alone := no_baseline(run):
                print(alone)
        except ValueError as error:  # the run is whole all the same: an untrained model has no accuracy to lose
            print(f"no separability: {error}")


@dataclass(frozen=True)
class CompareMethods(MethodComparisonConfig, Loading):
    """Prune by every method, in both directions and with several seeds, and compare: mlp, attention, heads, SVD, offsets, and random
    neurons like those of each beside it."""

    RESUMES = True

    forget: str = "local-code"
    """One task of the pair; both directions are pruned."""
    retain: str = "local-prose"
    """The other one."""
    mlp: Fractions = field(default_factory=lambda: {"mlp": 0.05})
    """Shares that go at every step of the methods that prune the mlp."""
    attention: Fractions = field(default_factory=lambda: {"attn_pre_out": 0.1})
    """The same for attention neurons."""
    heads: Fractions = field(default_factory=lambda: {"heads": 0.1})
    """The same for whole heads."""
    both: Fractions = field(default_factory=lambda: {"mlp": 0.05, "attn_pre_out": 0.02})
    """The same for mlp and attention at once."""
    out: Path = Path("runs/methods")
    """Folder of the runs; finished ones in it are not recomputed."""

    def run(self) -> None:
        """Carry out the command."""
        from sepcap.studies.methods.study import compare_methods

        config = config_in(MethodComparisonConfig, self)
        result = compare_methods(self.load(), config, self.out, say=lambda text: print(text, flush=True))
        table = result.table
        print(table.to_string(index=False, float_format=lambda x: f"{x:.1f}") + "\n")
        write_table(table, self.out / "table.csv")
        write_figure(result.figure(), self.out / "methods")


def _compare(load: Callable[[], Any], config: PruningConfig, folder: Path, **how: Any) -> None:
    print("Loading the model and the tasks; the first time, the texts of this Python installation are read (about a minute).", flush=True)
    from sepcap import plots
    from sepcap.studies.directions.study import compare
    from sepcap.studies.pruning.generations import continuations

    model = load()
    comparison = compare(model, config, folder, say=lambda text: print(text, flush=True), **how)
    print("\n" + comparison.table.to_string(index=False))
    print(
        "\narea: 1 = the two go together, 2 = the retain task is kept to the end; separability = 100·|area − 1|; "
        "in brackets 95% bootstrap intervals over texts, ± one standard deviation over seeds."
    )
    for name, why in comparison.inseparable().items():
        print(f"no separability of {name}: {why}")
    _say_continuations(lambda: continuations(model, comparison.forward), comparison.forward.config["forget"])
    pictures = {
        **{kind: partial(comparison.figure, kind) for kind in comparison.FIGURES},
        "gone": lambda: plots.neurons_gone(comparison.forward),
        "threshold": lambda: plots.thresholds(comparison.forward),
    }
    if config.importance != "random":
        pictures["scores"] = lambda: plots.score_histograms(comparison.forward.scores())
    print("\nFigures:")
    write_figures(pictures, folder / "figures")
    print(f"\nAll of it on one page:\n  {comparison.report()}")


def _say_continuations(make: Callable[[], Any], forgotten: str) -> None:
    try:
        texts = make()
    except (ValueError, RuntimeError) as error:  # the runs are whole: a model without next tokens, or one that is ruined
        print(f"\nno continuations: {error}")
        return
    for row in texts.to_dict("records"):
        for when in ("before", "after"):
            print(f"\n--- {row['kind']} prompt, {when} forgetting {forgotten} ---\n{row['prompt']}⟶{row[when]}")
