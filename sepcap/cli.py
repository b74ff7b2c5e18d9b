"""The command line: the same dataclasses as the Python interface, as commands.

Nothing heavy is imported before a command is known, so that --help answers at once.
"""

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tyro.constructors import PrimitiveConstructorSpec

from sepcap.experiments.config import PruningConfig


def parse_fractions(text: str) -> dict[str, float]:
    """`mlp=0.05,attn_pre_out=0.02` as a dictionary."""
    fractions = {}
    for part in text.split(","):
        site, equals, number = part.partition("=")
        try:
            fractions[site.strip()] = float(number)
        except ValueError:
            equals = ""
        if not equals:
            raise ValueError(f"fractions: {part!r} is not of the form site=fraction, as in mlp=0.05,attn_pre_out=0.02")
    return fractions


Fractions = Annotated[
    dict[str, float],
    PrimitiveConstructorSpec(
        nargs=1,
        metavar="SITE=FRACTION[,…]",
        instance_from_str=lambda args: parse_fractions(args[0]),
        is_instance=lambda value: isinstance(value, dict),
        str_from_instance=lambda value: [",".join(f"{k}={v:g}" for k, v in value.items())],
    ),
]


@dataclass(frozen=True)
class Prune(PruningConfig):
    """Prune one capability out of a model and keep the other.

    With --out, one run in that folder. Without it, the whole comparison: this run, the random baseline and the
    other direction, with table, pictures and continuations, in the folder --comparison.
    """

    forget: str = "local-code"
    """Task whose capability is to go: a name (see `sepcap tasks`) or the path of a .txt, .jsonl or .parquet file or folder."""
    retain: str = "local-prose"
    """Task whose capability is to stay."""
    fractions: Fractions = field(default_factory=lambda: {"mlp": 0.05})
    """Share of each site's original neurons that goes at every step; sites are mlp, attn_pre_out, attn_value, heads."""
    steps: int = 20
    """Number of pruning steps."""
    tokens: int = 10_000
    """Token positions per task and step from which statistics are collected."""
    eval_tokens: int = 15_000
    """Predictions per task and step on which the model is evaluated."""
    out: Path | None = None
    """Folder of one single run."""
    comparison: Path = Path("runs/demo")
    """Folder of the whole comparison."""

    def config(self) -> PruningConfig:
        """The configuration without what only the command line knows."""
        return PruningConfig(**{f.name: getattr(self, f.name) for f in dataclasses.fields(PruningConfig)})

    def run(self) -> None:
        """Carry out the command."""
        from sepcap.experiments.pruning import execute, plan
        from sepcap.models.load import load_model

        config = self.config()
        if self.out is None:
            _compare(config, self.comparison)
            return
        prepared = plan(load_model(config.model), config)
        print(prepared.cost())
        run = execute(prepared, self.out)
        print(run)
        print(run.trajectory.pivot(index="step", columns="role", values=["top1", "loss"]).to_string(float_format=lambda x: f"{x:.3f}"))
        try:
            print(run.separability("top1"))
        except ValueError as error:  # the run is whole all the same: an untrained model has no accuracy to lose
            print(f"no separability: {error}")


@dataclass(frozen=True)
class Score:
    """Score neurons: statistics on two tasks, histograms of the scores, and the highest as a neuron set."""

    model: str = "default"
    """"default", a folder, or a hub name."""
    forget: str = "local-code"
    """Task whose capability is to go."""
    retain: str = "local-prose"
    """Task whose capability is to stay."""
    importance: Literal["abs", "sqrt", "rms", "std", "freq", "mean_shift"] = "abs"
    """Importance function."""
    fractions: Fractions = field(default_factory=lambda: {"mlp": 0.02, "attn_pre_out": 0.02})
    """Share of each site that is selected."""
    tokens: int = 100_000
    """Token positions per task."""
    out: Path = Path("runs/scores")
    """Folder for neurons.safetensors, the statistics and the figure."""

    def run(self) -> None:
        """Carry out the command."""
        import sepcap

        model = sepcap.load_model(self.model)
        sites = PruningConfig(fractions=self.fractions, steps=1).sites
        forget = sepcap.collect(model, self.forget, tokens=self.tokens, sites=sites)
        retain = sepcap.collect(model, self.retain, tokens=self.tokens, sites=sites)
        scores = sepcap.score(forget, retain, self.importance)
        neurons = scores.top(self.fractions)
        forget.save(self.out / "forget.safetensors")
        retain.save(self.out / "retain.safetensors")
        neurons.save(self.out / "neurons.safetensors")
        print(scores)
        for site, threshold in neurons.info["threshold"].items():
            print(f"  {site}: score at least {threshold:.4g}")
        print(neurons)
        _write_figure(scores.figure(), self.out / "scores")
        print(f"written to {self.out}")


@dataclass(frozen=True)
class Evaluate:
    """Evaluate next-token prediction, of the whole model or without a neuron set."""

    model: str = "default"
    """"default", a folder, or a hub name."""
    tasks: tuple[str, ...] = ("local-code", "local-prose")
    """Tasks to evaluate on."""
    tokens: int = 100_000
    """Predictions per task."""
    neurons: Path | None = None
    """A neuron set (.safetensors) to delete first."""

    def run(self) -> None:
        """Carry out the command."""
        import pandas as pd

        import sepcap

        model = sepcap.load_model(self.model)
        if self.neurons is not None:
            sepcap.delete(model, sepcap.NeuronSet.load(self.neurons))
        rows = {task: sepcap.evaluate(model, task, tokens=self.tokens).as_row() for task in self.tasks}
        print(pd.DataFrame(rows).to_string(float_format=lambda x: f"{x:.4f}"))


@dataclass(frozen=True)
class Models:
    """List what --model can be."""

    def run(self) -> None:
        """Carry out the command."""
        from sepcap.models.load import default_folder

        print(f"default      the embedded model, in {default_folder()}")
        print("FOLDER       a causal language model in Hugging Face format, with its tokenizer")
        print("OWNER/NAME   a model of the Hugging Face hub, from the local cache or over the network")
        print("\nTested families: OPT, GPT-2, GPT-NeoX (Pythia), Llama, Mistral. Any decoder that TransformerBridge opens may work.")


@dataclass(frozen=True)
class Tasks:
    """List what --forget and --retain can be."""

    def run(self) -> None:
        """Carry out the command."""
        from sepcap.tasks.registry import TASKS

        for name, row in TASKS.items():
            print(f"{name:<14} {row.description}")
        print(f"{'PATH':<14} a .txt, .jsonl or .parquet file, or a folder of them, with a text column")


def _compare(config: PruningConfig, folder: Path) -> None:
    print("Loading the model and the tasks; the first time, the texts of this Python installation are read (about a minute).", flush=True)
    from sepcap import plots
    from sepcap.experiments.comparison import compare, continuations
    from sepcap.models.load import load_model

    model = load_model(config.model)
    comparison = compare(model, config, folder, say=lambda text: print(text, flush=True))
    print("\n" + comparison.table().to_string(index=False))
    print(
        "\narea: 1 = the two go together, 2 = the retain task is kept to the end; separability = 100·|area − 1|; "
        "in brackets 95% bootstrap intervals."
    )
    texts = continuations(model, comparison.forward)
    for row in texts.to_dict("records"):
        for when in ("before", "after"):
            print(f"\n--- {row['kind']} prompt, {when} forgetting {comparison.forward.config['forget']} ---\n{row['prompt']}⟶{row[when]}")
    pictures = {
        "trajectory": plots.trajectory(comparison.runs),
        "metric": plots.metric_over_steps(comparison.runs),
        "areas": plots.areas(comparison.runs),
        "gone": plots.neurons_gone(comparison.forward),
        "threshold": plots.thresholds(comparison.forward),
    }
    if config.importance != "random":
        pictures["scores"] = plots.score_histograms(comparison.forward.scores())
    print("\nPictures:")
    for name, figure in pictures.items():
        _write_figure(figure, folder / "figures" / name)


def _write_figure(figure: Any, stem: Path) -> None:
    """Write a page that opens anywhere and, where a browser for the export is found, SVG and PNG."""
    from sepcap import plots

    stem.parent.mkdir(parents=True, exist_ok=True)
    for suffix in (".html", ".svg", ".png"):
        path = stem.with_suffix(suffix)
        try:
            plots.save(figure, path)
        except (ImportError, RuntimeError) as error:
            print(f"  (no {suffix[1:]}: {str(error).splitlines()[0]})")
            return
        print(f"  {path}")


COMMANDS = {"prune": Prune, "score": Score, "evaluate": Evaluate, "models": Models, "tasks": Tasks}


def main(args: Sequence[str] | None = None) -> None:
    """Entry point of the `sepcap` command."""
    try:
        command = tyro.extras.subcommand_cli_from_dict(
            COMMANDS,
            args=args,
            prog="sepcap",
            description="Which neurons of a language model hold a capability, and what is left without them.",
        )
        command.run()
    except KeyboardInterrupt as stop:
        print(f"\n{stop or 'stopped'}", file=sys.stderr)
        sys.exit(130)
    except (ValueError, TypeError, OSError, ImportError, RuntimeError, FloatingPointError) as error:
        print(f"sepcap: {error}", file=sys.stderr)
        sys.exit(2)
