"""Commands that prune, or test what was pruned: the demo, one run, a learned order, methods compared, a certificate, unlearning methods."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from sepcap.cli.options import Command, Study, show, study_command, write_figures, write_table
from sepcap.selection.names import ImportanceName
from sepcap.studies.certificate.config import CertificateConfig
from sepcap.studies.directions.config import DirectionComparisonConfig
from sepcap.studies.learned.config import LearnedRankingConfig, LearnedSite
from sepcap.studies.methods.config import MethodComparisonConfig
from sepcap.studies.pruning.config import PruningConfig
from sepcap.studies.unlearning.config import UnlearningComparisonConfig


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
            "\narea: 1 = both drop together, 2 = the retain task is kept to the end; separability = 100·(area − 1), negative if the retain "
            "task drops first; in brackets 95% bootstrap intervals over texts, ± one standard deviation over seeds."
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

    The defaults are those of [SP]: 50 steps of 2%, 100,000 tokens per task and step. At the end the command prints the options for a
    random baseline of the run. `sepcap demo` runs a small comparison of both directions with random baselines.
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
        except ValueError as error:  # the run is complete, but an untrained model has an accuracy of 0
            print(f"no separability: {error}")


@dataclass(frozen=True)
class Jumps(Command):
    """Attribute jumps of accuracy after pruning steps of a run to target tokens, and to predictions that the bigram path makes right."""

    run_folder: Path = Path("runs/prune")
    """Folder of the run."""
    steps: tuple[int, ...] = ()
    """Pruning steps to compare with the ones before them; default is the three after which the accuracy of a task changed most."""
    top: int = 10
    """Number of targets per step and task that gained most, and that lost most."""
    model: str | None = None
    """The unpruned model; default is the one that the run was made with."""
    forget: str | None = None
    """The task to forget, if it cannot be found by its name: a path."""
    retain: str | None = None
    """The task to retain, if it cannot be found by its name: a path."""
    device: str | None = None
    """Device of the model, such as cpu, cuda, cuda:1 or mps; default is the GPU if there is one."""
    batch_size: int | None = None
    """Rows per forward pass; default is that of the run."""
    out: Path = Path("runs/jumps")
    """Folder of the result."""

    def run(self) -> None:
        """Carry out the command."""
        import sepcap

        run = sepcap.Run.load(self.run_folder)
        tasks = {role: task for role, task in (("forget", self.forget), ("retain", self.retain)) if task is not None}
        jumps = run.jumps(self.model, steps=self.steps or None, top=self.top, tasks=tasks, device=self.device, batch_size=self.batch_size)
        jumps.save(self.out)
        show(jumps, self.out)
        write_table(jumps.tables["tokens"], self.out / "tokens.csv")


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
    """Prune by every method, in both directions and with several seeds, and compare: mlp, attention, heads, SVD and offsets, each
    with matched random neurons."""


@study_command("compare_unlearning", out="runs/unlearning")
class CompareUnlearning(UnlearningComparisonConfig, Study):
    """Compare unlearning methods: pruning, gradient ascent, negative preference optimisation, a negated task vector, random neurons.

    Each gives a trajectory at the same budget; what it removed is then tested by relearning or, with `--parts toxicity`, by continuations.
    """


@study_command("certify", out="runs/certificate", run_folder=Annotated[Path | None, tyro.conf.Positional])
class Certify(CertificateConfig, Study):
    """Test whether the capability that a pruning run removed is gone, compared with controls: relearning, rounding, examples, probes.

    `sepcap certify RUN --step 8` tests the pruned model of a step; tasks and model are those of the run.
    """

    def load(self, **options: Any) -> Any:
        """Load the model of the run, unless another one is named."""
        from sepcap.studies.certificate.plan import model_of

        return super(Certify, dataclasses.replace(self, model=model_of(self))).load(**options)


def _say_continuations(make: Callable[[], Any], forgotten: str) -> None:
    try:
        texts = make()
    except (ValueError, RuntimeError) as error:  # the runs are complete: the model predicts no next tokens, or its logits are NaN
        print(f"\nno continuations: {error}")
        return
    for row in texts.to_dict("records"):
        for when in ("before", "after"):
            print(f"\n--- {row['kind']} prompt, {when} forgetting {forgotten} ---\n{row['prompt']}⟶{row[when]}")
