"""The folder of a sweep: its plan in config.json, a line in cells.jsonl for every cell that ended, and the folders of the cells."""

import contextlib
import datetime
import importlib.metadata
import json
import os
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sepcap.errors import CorruptFile
from sepcap.storage import FORMAT, PART, digest_of, make_folder, open_regular, output_path, sole_writer, write_json
from sepcap.studies.base.folder import read_config
from sepcap.studies.base.provenance import PACKAGES
from sepcap.studies.sweep.grid import Cell

STUDY = "sweep"
CELLS = "cells"
"""Folder of the cells."""
LINES = "cells.jsonl"
"""One line per cell that ended, in the order in which they did; the last line of a cell counts."""
WORKERS = "workers"
"""Folder of what the worker processes print."""

FIXED = ("kind", "load", "threads")
"""What all cells of a sweep share beside the base."""


@contextlib.contextmanager
def open_sweep(folder: Path, plan: Mapping[str, Any], cells: Sequence[Cell]) -> Iterator[dict[str, Any]]:
    """Create or reopen the folder of a sweep and write its plan; cells that it did not have are added.

    Args:
        folder: folder of the sweep.
        plan: `kind`, `base`, `load` and `threads`, as JSON.
        cells: cells that are asked for. Ones that the folder has already, under whatever name, keep their names.

    Yields:
        The configuration of the folder. Its `cells` are name -> fields that the grid sets, and others in which the cell differs from
        `base` because they follow from these; its `axes` are the names of fields that grids have set.

    Raises:
        FileExistsError: the folder holds something else, or a sweep of another base (the differing fields are named).
    """
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file; a sweep is a folder. Use another name; nothing was changed.")
    _check_empty_or_sweep(folder)
    make_folder(folder)
    with sole_writer(folder):
        before = _check_empty_or_sweep(folder)
        axes = set.intersection(*({*cell.fields} for cell in cells))
        if before is not None and (different := _difference(before, plan, axes)):
            raise FileExistsError(f"{folder} holds a sweep of another base ({different}). Use another folder; nothing was changed.")
        for part in folder.glob(f".*{PART}"):  # of a killed process; those in the folders of cells are their own
            part.unlink()
        made = {name: importlib.metadata.version(name) for name in PACKAGES}
        created = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        config = {"study": STUDY, **plan, "versions": made, "created": created, "cells": {}} if before is None else before
        there = {_identity(config, fields) for fields in config["cells"].values()}
        new = [cell for cell in cells if digest_of(cell.config) not in there]
        if new or before is None:
            config["axes"] = list(dict.fromkeys([*axes_of(config), *(name for cell in new for name in cell.fields)]))
            config["cells"] = {**config["cells"], **{cell.name: _beside(config["base"], cell) for cell in new}}
            config["runs"] = {f"{CELLS}/{name}": None for name in config["cells"]}
            write_json(folder / "config.json", {"format": FORMAT, **config})
        yield config


def _check_empty_or_sweep(folder: Path) -> dict[str, Any] | None:
    """The configuration of the sweep in a folder; None if the folder is empty or missing."""
    if os.path.lexists(folder / "config.json"):
        config = read_config(folder)
        if config.get("study") != STUDY:
            what = f"a study {config['study']!r}" if "study" in config else "a run"
            raise FileExistsError(f"{folder} holds {what}, and a sweep was requested. Use another folder; nothing was changed.")
        return config
    if folder.is_dir() and any(not part.name.endswith(PART) for part in folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty and holds no sweep (no config.json). Use another folder; nothing was changed.")
    return None


def axes_of(config: Mapping[str, Any]) -> list[str]:
    """Names of the fields that the grids of a sweep have set, in the order in which they were added."""
    return config.get("axes") or list(dict.fromkeys(name for fields in config["cells"].values() for name in fields))


def _beside(base: Mapping[str, Any], cell: Cell) -> dict[str, Any]:
    """The fields that a cell sets, and those in which it differs from the base of a folder: `steps` follows from a schedule."""
    other = {name: value for name, value in cell.config.items() if name not in base or repr(base[name]) != repr(value)}
    return {**cell.fields, **other}


def _difference(before: Mapping[str, Any], plan: Mapping[str, Any], axes: set[str]) -> str:
    """How a plan differs from a stored one beyond the fields that all cells of the grid set, in words."""
    pairs = {name: (before.get(name), plan[name]) for name in FIXED}
    if before.get("kind") == plan["kind"]:
        stored, asked = before["base"], plan["base"]
        pairs |= {name: (stored.get(name), value) for name, value in asked.items() if name not in axes}
    differ = {name: pair for name, pair in pairs.items() if json.dumps(pair[0], sort_keys=True) != json.dumps(pair[1], sort_keys=True)}
    return "; ".join(f"{name}: {reprlib.repr(a)} stored, {reprlib.repr(b)} requested" for name, (a, b) in differ.items())


def config_at(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """All fields of a cell, from the configuration of its sweep."""
    return {**config["base"], **config["cells"][name]}


def _identity(config: Mapping[str, Any], fields: Mapping[str, Any]) -> str:
    return digest_of({**config["base"], **fields})


def names_of(config: Mapping[str, Any], cells: Sequence[Cell]) -> list[str]:
    """Names that cells have in a sweep."""
    there = {_identity(config, fields): name for name, fields in config["cells"].items()}
    return [there[digest_of(cell.config)] for cell in cells]


class Ledger:
    """What became of the cells of a sweep: read and added to line by line.

    Attributes:
        ended: name of a cell -> what became of it, see `sepcap.studies.sweep.cell.Cells.run`.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / LINES
        self.ended: dict[str, dict[str, Any]] = {}
        self._end = 0
        if not os.path.lexists(self.path):
            return
        with open_regular(self.path, "list of cells") as file:
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n"):
                    break  # a killed process left it unfinished; it is replaced
                outcome = self._read(line, number)
                self.ended[outcome.pop("cell")] = outcome
                self._end += len(line)

    def _read(self, line: bytes, number: int) -> dict[str, Any]:
        try:
            outcome = json.loads(line)
            seal = outcome.pop("sha256")
            if seal != digest_of(outcome):
                raise ValueError("it has changed since it was written")
            return outcome
        except (ValueError, KeyError, AttributeError, RecursionError) as error:
            raise CorruptFile(
                f"{self.path}, line {number}: {error or 'not a cell'}; delete that line, and the same call adds it again"
            ) from error

    def add(self, name: str, outcome: Mapping[str, Any]) -> None:
        """Write what became of a cell."""
        value = {"cell": name, **outcome}
        line = json.dumps(value | {"sha256": digest_of(value)}).encode() + b"\n"
        with output_path(self.path).open("ab") as file:
            if file.tell() > self._end:
                file.truncate(self._end)
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        self._end += len(line)
        self.ended[name] = dict(outcome)


def state_of(folder: Path, ledger: Ledger, name: str) -> str:
    """ "finished", "failed", "begun" or "planned"; a finished cell whose folder was deleted is planned again."""
    there = os.path.lexists(folder / CELLS / name / "config.json")
    outcome = ledger.ended.get(name)
    if outcome is not None and (there or outcome["state"] == "failed"):
        return outcome["state"]
    return "begun" if there else "planned"


def fingerprints_of(folder: Path, ledger: Ledger) -> tuple[dict[str, str], list[str]]:
    """Fingerprints of the models and tasks of the finished cells, by name; and the names for which cells have different ones."""
    found: dict[str, str] = {}
    mixed: dict[str, None] = {}
    for name, outcome in ledger.ended.items():
        if state_of(folder, ledger, name) == "finished":
            mixed |= {what: None for what, value in outcome.get("made_of", {}).items() if found.setdefault(what, value) != value}
    return found, list(mixed)
