"""The command that checks a folder."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from sepcap.cli.options import Command


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
