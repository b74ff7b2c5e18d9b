"""Results made of runs: the planned runs are written before the first one begins, and all must exist when the result is read."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from sepcap.checks import checked
from sepcap.errors import CorruptFile
from sepcap.storage import FORMAT, write_json
from sepcap.studies.base.folder import LISTED, identity_of, read_config, study_config
from sepcap.studies.base.result import Shown
from sepcap.studies.pruning.on_disk.run_folder import RunFolder
from sepcap.studies.pruning.run import whole_run

OfRuns = TypeVar("OfRuns", bound="RunsResult")


def name_study(
    folder: Path, study: str, runs: Mapping[str, str | None], config: Mapping[str, Any] | None = None, *, whole: bool = True
) -> None:
    """Record the study that the runs in a folder belong to, and the planned runs, before the first one begins.

    Args:
        folder: folder of the study.
        study: its name.
        runs: name of the folder of each run -> `identity_of` its configuration, or None if it is not known yet.
        config: configuration of the study.
        whole: whether these are all runs of the call. Those that an earlier call planned and never began are then planned no longer.

    Raises:
        FileExistsError: the folder holds something else.
    """
    path = folder / "config.json"
    before: dict[str, Any] = {}
    if os.path.lexists(path):
        before = read_config(folder)
        if (there := before.get("study")) != study:
            which = f"{there!r} stored, {study!r} requested"
            raise FileExistsError(f"{folder} holds another study ({which}). Use another folder; nothing was changed.")
    # a call may add runs to those of another, and identities later
    planned = before.get("runs", {})
    if whole:
        planned = {name: identity for name, identity in planned.items() if name in runs or os.path.lexists(folder / name / "config.json")}
    planned = {**planned, **{name: identity for name, identity in runs.items() if identity is not None or name not in planned}}
    now = {"format": FORMAT, **before, "study": study, **(config or {}), "runs": planned}
    if now != {"format": FORMAT, **before}:
        write_json(path, now)


class RunsResult(Shown):
    """Result made of runs, each in a folder of its own."""

    @classmethod
    @checked()
    def load(cls: type[OfRuns], folder: str | Path) -> OfRuns:
        """Read all planned runs of a study: all must exist, be finished and match the plan.

        Raises:
            FileNotFoundError: there is no such study, or some runs are missing or not finished.
            CorruptFile: some are damaged, or differ from the plan.
        """
        folder = Path(folder)
        plan = study_config(folder, cls.STUDY).get("runs")
        if not plan:
            raise CorruptFile(f"{folder / 'config.json'} names no runs; restore it or start again in another folder")
        found, unfinished = {}, []
        for name, identity in plan.items():
            try:
                run = cls._load_run(folder / name)
            except FileNotFoundError:
                unfinished.append(name)
                continue
            if isinstance(run, RunFolder) and not run.finished:
                unfinished.append(name)
            elif identity is not None and identity_of(run.config) != identity:
                raise CorruptFile(f"{folder / name / 'config.json'} does not match the run {name!r} planned in {folder / 'config.json'}")
            found[name] = run
        if unfinished:
            listed = ", ".join(unfinished[:LISTED]) + (f" and {len(unfinished) - LISTED} more" if len(unfinished) > LISTED else "")
            of = f"{len(unfinished)} of {len(plan)} runs missing or not finished: {listed}"
            raise FileNotFoundError(f"{folder} is not finished ({of}); the call that started it resumes it")
        return cls._from_runs(folder, found)

    @classmethod
    def _load_run(cls, folder: Path) -> Any:
        """Read the folder of one run."""
        return whole_run(folder)

    @classmethod
    def _from_runs(cls: type[OfRuns], folder: Path, runs: Mapping[str, Any]) -> OfRuns:
        """The result of the runs, given by the names of their folders."""
        raise NotImplementedError
