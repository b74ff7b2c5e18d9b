"""Commands for models, tasks and scores: score, evaluate, models, tasks."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from sepcap.checks import distinct
from sepcap.cli.options import Command, Fractions, Loading, write_figure, write_table
from sepcap.selection.names import DIVERGENCES, Contrast, ImportanceName, gradients_for
from sepcap.studies.pruning.config import PruningConfig


@dataclass(frozen=True)
class Score(Loading):
    """Score neurons: statistics on two tasks, histograms of the scores, and the highest-scoring neurons as a neuron set."""

    forget: str = "local-code"
    """Task to be forgotten."""
    retain: str = "local-prose"
    """Task to be retained."""
    importance: ImportanceName = "abs"
    """Importance function."""
    contrast: Contrast | None = None
    """How the importances on both tasks are combined into a score; default ratio, but difference for signed importances and wanda."""
    lam: float = 1.0
    """Weight of the retain task in the difference."""
    q: float = 0.5
    """Share of a site's neurons, those with the lowest importance on retain, that a guarded score ranks first."""
    fractions: Fractions = field(default_factory=lambda: {"mlp": 0.02, "attn_pre_out": 0.02})
    """Share of each site's neurons that is selected."""
    tokens: int = 100_000
    """Token positions per task."""
    per_document: int | Literal["row"] | None = "row"
    """Maximum tokens per document: "row" for as many as fit one row, a number, or None for whole documents in their order."""
    positions: Literal["all", "correct"] = "all"
    """Positions that statistics are collected from: all, or only those at which the model's first choice is the right prediction."""
    bimodality: bool = False
    """Also write bimodality-forget.csv and bimodality-retain.csv: how bimodal the activations of every neuron are."""
    replicates: int = 0
    """Bootstrap replicates over documents, 100 for intervals of the scores and the stability of the selection."""
    out: Path = Path("runs/scores")
    """Folder for neurons.safetensors, the statistics and the figure."""

    def run(self) -> None:
        """Carry out the command."""
        import sepcap

        model = self.load()
        sites = PruningConfig(fractions=self.fractions, steps=1).sites
        how = {"tokens": self.tokens, "per_document": self.per_document, "batch_size": self.batch_size}
        how |= {"sites": sites, "replicates": self.replicates, "positions": self.positions}
        how |= {"histogram": self.importance in DIVERGENCES or self.bimodality, "gradients": gradients_for(self.importance)}
        forget, retain = (sepcap.collect(model, task, **how) for task in (self.forget, self.retain))
        scores = sepcap.score(forget, retain, self.importance, contrast=self.contrast, lam=self.lam, q=self.q)
        neurons = scores.top(self.fractions)
        forget.save(self.out / "forget.safetensors")
        retain.save(self.out / "retain.safetensors")
        neurons.save(self.out / "neurons.safetensors")
        print(scores)
        for site, threshold in neurons.info["threshold"].items():
            print(f"  {site}: score at least {threshold:.4g}")
        print(neurons)
        for role, statistics in {"forget": forget, "retain": retain}.items() if self.bimodality else ():
            write_table(statistics.bimodality(), self.out / f"bimodality-{role}.csv")
        write_figure(scores.figure(), self.out / "scores")
        if scores.replicates:
            stability = scores.stability(self.fractions)
            print(f"the selection in {self.replicates} bootstrap replicates of the documents:\n{stability.table.to_string(index=False)}")
            write_figure(stability.figure(), self.out / "stability")
        print(f"written to {self.out}")


@dataclass(frozen=True)
class Evaluate(Loading):
    """Evaluate the predictions of a model, as it is or after deleting a neuron set."""

    tasks: tuple[str, ...] = ("local-code", "local-prose")
    """Tasks to evaluate on."""
    tokens: int = 100_000
    """Predictions per task."""
    per_document: int | Literal["row"] | None = "row"
    """Maximum tokens per document: "row" for as many as fit one row, a number, or None for whole documents in their order."""
    cluster: Literal["document", "package"] = "document"
    """Units that standard errors treat as independent: documents, or packages (local tasks) with all of their documents."""
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
class Models(Command):
    """List the possible values of --model."""

    def run(self) -> None:
        """Carry out the command."""
        from sepcap.compiled.programs import PAIRS
        from sepcap.models.loading.load import default_folder

        print(f"default      the embedded model, in {default_folder()}")
        print("FOLDER       a model in Hugging Face format, with its tokenizer or image processor")
        print("OWNER/NAME   a model of the Hugging Face hub, from the local cache or over the network")
        print(f"In Python, load_compiled(NAME) gives models of which every neuron is labelled: {', '.join(PAIRS)}")
        print("\nCausal and masked language models and image classifiers. What works for which family: docs/families.md.")


@dataclass(frozen=True)
class Tasks(Command):
    """List the possible values of --forget and --retain; with a name, all details of that task: source, field, filter, licence, gate."""

    name: Annotated[str | None, tyro.conf.Positional] = None
    """One task, to be shown in full."""

    def run(self) -> None:
        """Carry out the command."""
        from sepcap.tasks.registry import described, listing

        if self.name is not None:
            print(described(self.name))
            return
        print(listing())
        print("\n`sepcap tasks NAME` shows all details of one: configuration, split, field, filter, licence, and what its page requires.")
        print("Or a PATH: a .txt, .jsonl or .parquet file, or a folder of them, with a text column.")
