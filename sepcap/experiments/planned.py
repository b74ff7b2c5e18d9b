"""Studies that are made of runs: which runs are to come is written before the first one begins, and all are there when it is read."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sepcap.errors import CorruptFile
from sepcap.experiments.result import LISTED, load_result, read_config, study_config
from sepcap.experiments.run import Run
from sepcap.experiments.step_files import identity_of
from sepcap.storage import FORMAT, write_json


def name_study(folder: Path, study: str, runs: Mapping[str, str | None], config: Mapping[str, Any] | None = None) -> None:
    """Write down which study the runs in a folder belong to, and which runs are to come, before the first one begins.

    Args:
        folder: of the study.
        study: its name.
        runs: name of the folder of each run -> `identity_of` its configuration, where that is known by now.
        config: of the study.

    Raises:
        FileExistsError: the folder holds something else.
    """
    path = folder / "config.json"
    before: dict[str, Any] = {}
    if os.path.lexists(path):
        before = read_config(folder)
        if (there := before.get("study")) != study:
            which = f"{there!r} there, {study!r} asked for"
            raise FileExistsError(f"{folder} holds another study ({which}). Use another folder; nothing was changed.")
    # one call may add runs to those of another, and say later what tells a run from others
    planned = before.get("runs", {})
    planned = {**planned, **{name: identity for name, identity in runs.items() if identity is not None or name not in planned}}
    now = {"format": FORMAT, **before, "study": study, **(config or {}), "runs": planned}
    if now != {"format": FORMAT, **before}:
        write_json(path, now)


def planned_runs(folder: Path, study: str) -> dict[str, Any]:
    """Every run of a study that is made of runs, as it was planned: all are there, finished and not exchanged.

    Raises:
        FileNotFoundError: some are missing or not finished.
        CorruptFile: some are damaged, or not those that were planned.
    """
    plan = study_config(folder, study).get("runs")
    if not plan:
        raise CorruptFile(f"{folder / 'config.json'} names no runs; restore it or start again in another folder")
    found, unfinished = {}, []
    for name, identity in plan.items():
        try:
            found[name] = load_result(folder / name)
        except FileNotFoundError:
            unfinished.append(name)
            continue
        result = found[name]
        if isinstance(result, Run) and not result.finished:
            unfinished.append(name)
        elif identity is not None and identity_of(result.config) != identity:
            raise CorruptFile(f"{folder / name / 'config.json'} is not that of the run {name!r} which {folder / 'config.json'} plans")
    if unfinished:
        listed = ", ".join(unfinished[:LISTED]) + (f" and {len(unfinished) - LISTED} more" if len(unfinished) > LISTED else "")
        of = f"{len(unfinished)} of {len(plan)} runs missing or not finished: {listed}"
        raise FileNotFoundError(f"{folder} is not finished ({of}); the same call that began it goes on there")
    return found
