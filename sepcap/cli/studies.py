"""Commands for stored studies, for report pages, and for the check of a folder."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from sepcap.cli.options import Command, Study, study_command
from sepcap.studies.reproduce.config import ReproductionConfig

STUDIES = Literal["sp-table2", "sp-figure1", "sep-areas", "peak-ablation", "modularity-overlap"]


@study_command(
    "reproduce",
    out="runs/reproduce",
    study=Annotated[STUDIES, tyro.conf.Positional],
    budget=Literal["paper", "minutes"] | None,
    tasks=tyro.conf.Suppress[Any],
)
class Reproduce(ReproductionConfig, Study):  # pyright: ignore[reportIncompatibleVariableOverride]  # the batch size can be the study's
    """Rerun a stored study of a paper, and compare the published values with the measured ones."""

    def load(self, **options: Any) -> Any:
        """Nothing: the study loads its models itself."""


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


@dataclass(frozen=True)
class Check(Command):
    """Check every file of a run, a study or a comparison; the exit status is 2 if a file is damaged, missing or unexpected."""

    folder: Annotated[Path, tyro.conf.Positional]
    """Folder of the run or the study."""

    def run(self) -> None:
        """Carry out the command."""
        from sepcap.studies.check import check_folder

        found = check_folder(self.folder)
        for note in found.notes:
            print(note)
        for problem in found.problems:
            print(f"sepcap: {problem}", file=sys.stderr)
        if found.problems:
            sys.exit(2)
        print("All files are as they were written.")
