"""Commands for stored studies and for report pages."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from sepcap.cli.options import Command, OnDevice, write_figure, write_table


@dataclass(frozen=True, kw_only=True)
class Reproduce(OnDevice):
    """Rerun a stored study of a paper, and compare the published values with the measured ones."""

    RESUMES = True

    study: Annotated[Literal["sp-table2", "sp-figure1", "sep-areas", "peak-ablation", "modularity-overlap"], tyro.conf.Positional]
    """Which study."""
    model: str = "default"
    """"default" (with the offline tasks), a folder, or a hub name (with the paper's tasks)."""
    budget: Literal["paper", "minutes"] | None = None
    """As published, or small enough for the embedded model on two cores; default is "minutes" for that model and "paper" for others."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the model."""
    batch_size: int | None = None
    """Rows per forward pass; default is that of the study."""
    out: Path = Path("runs/reproduce")
    """Folder of all studies; finished runs in it are not recomputed."""

    def run(self) -> None:
        """Carry out the command."""
        from sepcap.studies.reproduce.config import ReproductionConfig, studies
        from sepcap.studies.reproduce.study import reproduce

        budget: Any = self.budget
        if self.batch_size is not None:
            stored = ReproductionConfig(self.study, self.model, self.budget)
            budget = studies()[self.study].budgets[stored.budget] | {"batch_size": self.batch_size}
        where = {"dtype": self.dtype, "device": self.device, "out": self.out}
        result = reproduce(self.study, self.model, budget, **where, say=lambda text: print(text, flush=True))
        print(result.table.drop(columns=["study", "source"]).to_string(index=False, na_rep="", float_format=lambda x: f"{x:.1f}"))
        print()
        write_table(result.table, result.folder / "table.csv")
        write_figure(result.figure(), result.folder / result.study.name)


@dataclass(frozen=True)
class Report(Command):
    """Write one HTML page about a run or a study, which needs no network.

    It has a summary, figures, tables, the configuration, and for a run the texts that the model generates before and after it.
    """

    folder: Annotated[Path, tyro.conf.Positional]
    """Folder of the run or the study."""
    out: Path | None = None
    """The page; default is report.html in that folder."""
    baseline: Path | None = None
    """Folder of a random run to compare a run with, or uniform, per_layer or activity for the random runs of its comparison."""
    device: str | None = None
    """Device of the model that writes the texts, such as cpu or cuda:1; default is the GPU if there is one. Its precision is the run's."""

    def run(self) -> None:
        """Carry out the command."""
        from sepcap.studies.catalog import load_result
        from sepcap.studies.pruning.run import Run
        from sepcap.studies.pruning.separability import BASELINES

        result = load_result(self.folder)
        if isinstance(result, Run):
            beside = str(self.baseline) in BASELINES
            baseline = str(self.baseline) if beside else None if self.baseline is None else Run.load(self.baseline)
            print(result.report(self.out, baseline=baseline, device=self.device))
        elif self.baseline is None:
            print(result.report(self.out))
        else:
            raise ValueError(f"baseline={str(self.baseline)!r}: {self.folder} contains a study; only a run is compared with a random run")
