"""Studies made of runs: the planned runs are written before the first one begins, and all must exist when the study is read."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sepcap.errors import CorruptFile
from sepcap.storage import FORMAT, write_json
from sepcap.studies.base.folder import LISTED, identity_of, read_config, study_config
from sepcap.studies.pruning.on_disk.run_folder import RunFolder


def name_study(folder: Path, study: str, runs: Mapping[str, str | None], config: Mapping[str, Any] | None = None) -> None:
    """Record the study that the runs in a folder belong to, and the planned runs, before the first one begins.

    Args:
        folder: folder of the study.
        study: its name.
        runs: name of the folder of each run -> `identity_of` its configuration, or None if it is not known yet.
        config: configuration of the study.

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
    planned = {**planned, **{name: identity for name, identity in runs.items() if identity is not None or name not in planned}}
    now = {"format": FORMAT, **before, "study": study, **(config or {}), "runs": planned}
    if now != {"format": FORMAT, **before}:
        write_json(path, now)


def planned_runs(folder: Path, study: str, load: Callable[[Path], Any]) -> dict[str, Any]:
    """Load every planned run of a study made of runs: all must exist, be finished and match the plan.

    Args:
        folder: folder of the study.
        study: its name.
        load: reads the folder of a run, such as `whole_run`.

    Raises:
        FileNotFoundError: some are missing or not finished.
        CorruptFile: some are damaged, or differ from the plan.
    """
    plan = study_config(folder, study).get("runs")
    if not plan:
        raise CorruptFile(f"{folder / 'config.json'} names no runs; restore it or start again in another folder")
    found, unfinished = {}, []
    for name, identity in plan.items():
        try:
            found[name] = load(folder / name)
        except FileNotFoundError:
            unfinished.append(name)
            continue
        result = found[name]
        if isinstance(result, RunFolder) and not result.finished:
            unfinished.append(name)
        elif identity is not None and identity_of(result.config) != identity:
            raise CorruptFile(f"{folder / name / 'config.json'} does not match the run {name!r} planned in {folder / 'config.json'}")
    if unfinished:
        listed = ", ".join(unfinished[:LISTED]) + (f" and {len(unfinished) - LISTED} more" if len(unfinished) > LISTED else "")
        of = f"{len(unfinished)} of {len(plan)} runs missing or not finished: {listed}"
        raise FileNotFoundError(f"{folder} is not finished ({of}); the call that started it resumes it")
    return found
