"""The command line: the same dataclasses as the Python interface, as commands.

Nothing heavy is imported before a command is known, so that --help answers at once.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from sepcap.checks import distinct
from sepcap.cli_ablations import Ablate, CompareAblations
from sepcap.cli_check import Check
from sepcap.cli_geometry import Geometry
from sepcap.cli_modules import Modules
from sepcap.cli_options import Command, Fractions, Loading, OnDevice, config_in, write_figure, write_figures, write_table
from sepcap.cli_paragraphs import Transfer
from sepcap.cli_run import ended, parsed, versions
from sepcap.experiments.config import DIVERGENCES, PruningConfig
from sepcap.experiments.methods_config import MethodsConfig


@dataclass(frozen=True)
class Prune(PruningConfig, Loading):
    """Prune one capability out of a model and keep the other.

    With --out, one run in that folder, and at its end the options that put random neurons beside it. Without it, the whole
    comparison: this run, the other direction, and random neurons drawn like those of each, with table, pictures and
    continuations, in the folder --comparison.
    """

    RESUMES = True

    forget: str = "local-code"
    """Task whose capability is to go: a name (see `sepcap tasks`) or the path of a .txt, .jsonl or .parquet file or folder."""
    retain: str = "local-prose"
    """Task whose capability is to stay."""
    fractions: Fractions = field(default_factory=lambda: {"mlp": 0.1})
    """Share of each site's original neurons that goes at every step; sites are mlp, attn_pre_out, attn_value, heads."""
    steps: int = 10
    """Number of pruning steps."""
    tokens: int = 13_000
    """Token positions per task and step from which statistics are collected."""
    eval_tokens: int = 15_000
    """Predictions per task and step on which the model is evaluated."""
    out: Path | None = None
    """Folder of one single run."""
    comparison: Path = Path("runs/demo")
    """Folder of the whole comparison."""
    baselines: tuple[Literal["uniform", "per_layer", "activity"], ...] = ("per_layer",)
    """Random neurons that stand beside a comparison: as many of every layer as each run took, as many of every layer and tenth of it by
    activity on the retain task, or uniform over the model."""
    baseline_seeds: int = 5
    """Draws of each baseline of a comparison."""
    baseline_steps: int | None = None
    """At how many steps baselines are evaluated, a divisor of --steps; default is from 3 to 5, or all steps where there is no such one."""
    tracker: tuple[Literal["jsonl", "wandb", "none"], ...] = ("jsonl",)
    """Who follows a run step by step: a file of JSON lines in its folder, Weights & Biases (WANDB_MODE=offline keeps it to this machine),
    both, or none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.out is not None:
            for name in ("baselines", "baseline_seeds", "baseline_steps"):
                if getattr(self, name) != getattr(Prune, name):
                    raise ValueError(f"{name} belongs to a comparison, and --out makes one single run: leave one of the two away")

    def config(self) -> PruningConfig:
        """The configuration without what only the command line knows."""
        return config_in(PruningConfig, self)

    def run(self) -> None:
        """Carry out the command."""
        from sepcap.experiments.above_random import no_baseline
        from sepcap.experiments.check_run import is_left
        from sepcap.experiments.pruning import execute, plan
        from sepcap.experiments.trackers import trackers_of

        config, trackers = self.config(), trackers_of(self.tracker)
        if self.out is None:
            how = {"baselines": self.baselines, "baseline_seeds": self.baseline_seeds, "baseline_steps": self.baseline_steps}
            _compare(self.load, config, self.comparison, tracker=trackers, **how)
            return
        prepared = plan(self.load(), config)
        print(prepared.cost() if is_left(self.out, prepared.resolved) else "This run is finished; nothing is computed again.")
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
class Score(Loading):
    """Score neurons: statistics on two tasks, histograms of the scores, and the highest as a neuron set."""

    forget: str = "local-code"
    """Task whose capability is to go."""
    retain: str = "local-prose"
    """Task whose capability is to stay."""
    importance: Literal["abs", "sqrt", "rms", "std", "freq", "mean_shift", "kl", "js", "wasserstein"] = "abs"
    """Importance function."""
    fractions: Fractions = field(default_factory=lambda: {"mlp": 0.02, "attn_pre_out": 0.02})
    """Share of each site that is selected."""
    tokens: int = 100_000
    """Token positions per task."""
    per_document: int | Literal["row"] | None = "row"
    """Most tokens of one document: "row" for what fits one row, a number, or None for whole documents as they come."""
    out: Path = Path("runs/scores")
    """Folder for neurons.safetensors, the statistics and the figure."""

    def run(self) -> None:
        """Carry out the command."""
        import sepcap

        model = self.load()
        sites = PruningConfig(fractions=self.fractions, steps=1).sites
        how = {"tokens": self.tokens, "per_document": self.per_document, "batch_size": self.batch_size}
        how |= {"sites": sites, "histogram": self.importance in DIVERGENCES}
        forget, retain = (sepcap.collect(model, task, **how) for task in (self.forget, self.retain))
        scores = sepcap.score(forget, retain, self.importance)
        neurons = scores.top(self.fractions)
        forget.save(self.out / "forget.safetensors")
        retain.save(self.out / "retain.safetensors")
        neurons.save(self.out / "neurons.safetensors")
        print(scores)
        for site, threshold in neurons.info["threshold"].items():
            print(f"  {site}: score at least {threshold:.4g}")
        print(neurons)
        write_figure(scores.figure(), self.out / "scores")
        print(f"written to {self.out}")


@dataclass(frozen=True)
class Evaluate(Loading):
    """Evaluate next-token prediction, of the whole model or without a neuron set."""

    tasks: tuple[str, ...] = ("local-code", "local-prose")
    """Tasks to evaluate on."""
    tokens: int = 100_000
    """Predictions per task."""
    per_document: int | Literal["row"] | None = "row"
    """Most tokens of one document: "row" for what fits one row, a number, or None for whole documents as they come."""
    cluster: Literal["document", "package"] = "document"
    """What standard errors take as independent: documents, or packages (local tasks) with all of their documents."""
    neurons: Path | None = None
    """A neuron set (.safetensors) to delete first."""

    def __post_init__(self) -> None:
        super().__post_init__()
        distinct("tasks", self.tasks)

    def run(self) -> None:
        """Carry out the command."""
        import pandas as pd

        import sepcap

        model = self.load()
        if self.neurons is not None:
            sepcap.delete(model, sepcap.NeuronSet.load(self.neurons))
        how = {"tokens": self.tokens, "per_document": self.per_document, "batch_size": self.batch_size}
        rows = {task: sepcap.evaluate(model, task, **how).as_row(self.cluster) for task in self.tasks}
        print(pd.DataFrame(rows).to_string(float_format=lambda x: f"{x:.4f}"))


@dataclass(frozen=True)
class CompareMethods(MethodsConfig, Loading):
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
    """Folder of the runs; finished ones in it are not computed again."""

    def run(self) -> None:
        """Carry out the command."""
        from sepcap.experiments.methods import compare_methods

        config = config_in(MethodsConfig, self)
        result = compare_methods(self.load(), config, self.out, say=lambda text: print(text, flush=True))
        table = result.table()
        print(table.to_string(index=False, float_format=lambda x: f"{x:.1f}") + "\n")
        write_table(table, self.out / "table.csv")
        write_figure(result.figure(), self.out / "methods")


@dataclass(frozen=True, kw_only=True)
class Reproduce(OnDevice):
    """Run a study of a paper again, as it is stored, and put the published values beside the measured ones."""

    RESUMES = True

    study: Annotated[Literal["sp-table2", "sp-figure1", "sep-areas", "peak-ablation", "modularity-overlap"], tyro.conf.Positional]
    """Which study."""
    model: str = "default"
    """"default" (with the offline tasks), a folder, or a hub name (with the paper's tasks)."""
    budget: Literal["paper", "minutes"] | None = None
    """As published, or small enough for the embedded model on two cores; default is "minutes" for that one and "paper" for others."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the model."""
    batch_size: int | None = None
    """Rows per forward pass, where it is not to be that of the study."""
    out: Path = Path("runs/reproduce")
    """Folder of all studies; finished runs in it are not computed again."""

    def run(self) -> None:
        """Carry out the command."""
        from sepcap.experiments.reproduce import reproduce
        from sepcap.experiments.reproduce_config import ReproduceConfig, studies

        budget: Any = self.budget
        if self.batch_size is not None:
            stored = ReproduceConfig(self.study, self.model, self.budget)
            budget = studies()[self.study].budgets[stored.budget] | {"batch_size": self.batch_size}
        where = {"dtype": self.dtype, "device": self.device, "out": self.out}
        result = reproduce(self.study, self.model, budget, **where, say=lambda text: print(text, flush=True))
        print(result.table.drop(columns=["study", "source"]).to_string(index=False, na_rep="", float_format=lambda x: f"{x:.1f}"))
        print()
        write_table(result.table, result.folder / "table.csv")
        write_figure(result.figure(), result.folder / result.study.name)


@dataclass(frozen=True)
class Report(Command):
    """Write one HTML page about a run or a study: summary, pictures, tables, configuration, and of a run the texts that the model
    writes before and after. It needs no network."""

    folder: Annotated[Path, tyro.conf.Positional]
    """Folder of the run or the study."""
    out: Path | None = None
    """The page; default is report.html in that folder."""
    baseline: Path | None = None
    """Folder of a random run to compare a run with, or uniform, per_layer or activity for those of its comparison."""
    device: str | None = None
    """Where the model is that writes the texts, such as cpu or cuda:1; default is the GPU when there is one. Its precision is the run's."""

    def run(self) -> None:
        """Carry out the command."""
        from sepcap.experiments.result import load_result
        from sepcap.experiments.run import Run
        from sepcap.experiments.separability import BASELINES

        result = load_result(self.folder)
        if isinstance(result, Run):
            beside = str(self.baseline) in BASELINES
            baseline = str(self.baseline) if beside else None if self.baseline is None else Run.load(self.baseline)
            print(result.report(self.out, baseline=baseline, device=self.device))
        elif self.baseline is None:
            print(result.report(self.out))
        else:
            raise ValueError(f"baseline={str(self.baseline)!r}: {self.folder} holds a study; only a run is compared with a random run")


@dataclass(frozen=True)
class Models(Command):
    """List what --model can be."""

    def run(self) -> None:
        """Carry out the command."""
        from sepcap.models.load import default_folder

        print(f"default      the embedded model, in {default_folder()}")
        print("FOLDER       a model in Hugging Face format, with its tokenizer or image processor")
        print("OWNER/NAME   a model of the Hugging Face hub, from the local cache or over the network")
        print("\nCausal and masked language models and image classifiers. What works for which family: docs/families.md.")


@dataclass(frozen=True)
class Tasks(Command):
    """List what --forget and --retain can be; with a name, all that is known of that task: where from, field, filter, licence, gate."""

    name: Annotated[str | None, tyro.conf.Positional] = None
    """One task, to be shown whole."""

    def run(self) -> None:
        """Carry out the command."""
        from sepcap.tasks.registry import described, listing

        if self.name is not None:
            print(described(self.name))
            return
        print(listing())
        print("\n`sepcap tasks NAME` says all of one: configuration, split, field, filter, licence, and what its page asks for.")
        print("Or a PATH: a .txt, .jsonl or .parquet file, or a folder of them, with a text column.")


def _compare(load: Callable[[], Any], config: PruningConfig, folder: Path, **how: Any) -> None:
    print("Loading the model and the tasks; the first time, the texts of this Python installation are read (about a minute).", flush=True)
    from sepcap import plots
    from sepcap.experiments.comparison import compare, continuations

    model = load()
    comparison = compare(model, config, folder, say=lambda text: print(text, flush=True), **how)
    print("\n" + comparison.table().to_string(index=False))
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


COMMANDS = {
    "prune": Prune,
    "score": Score,
    "evaluate": Evaluate,
    "ablate": Ablate,
    "compare-ablations": CompareAblations,
    "compare-methods": CompareMethods,
    "reproduce": Reproduce,
    "modules": Modules,
    "geometry": Geometry,
    "transfer": Transfer,
    "report": Report,
    "check": Check,
    "models": Models,
    "tasks": Tasks,
}


def main(args: Sequence[str] | None = None, *, stopped: Sequence[Any] = ()) -> None:
    """Run one command.

    Args:
        args: its words; default is those of the command line. A hidden --debug shows the traceback of what goes wrong.
        stopped: holds a signal as soon as one came, whatever a library made of it (`sepcap.__main__`).
    """
    words = list(sys.argv[1:] if args is None else args)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    if words == ["--version"]:
        print(versions())
        return
    command = None
    try:
        command = parsed(partial(_parse, words), " ".join(["sepcap", *(word for word in words[:1] if word in COMMANDS)]), words)
        command.run()
    except (KeyboardInterrupt, Exception) as error:
        ended(error, command, stopped, debug=debug)


def _parse(words: Sequence[str]) -> Any:
    return tyro.extras.subcommand_cli_from_dict(
        COMMANDS,
        args=words,
        prog="sepcap",
        # options keep the name of their field also where a study of a command is chosen
        config=(tyro.conf.OmitSubcommandPrefixes, tyro.conf.OmitArgPrefixes),
        description="Which neurons of a language model hold a capability, and what is left without them. "
        "`sepcap --version` says the versions.",
    )
