"""The folder of a study: create it, write it piece by piece, finish it, read it back."""

import contextlib
import io
import json
import os
import reprlib
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from torch import Tensor

from sepcap.errors import CorruptFile
from sepcap.schemas import Finished, Folder, StudyConfig, validated
from sepcap.storage import (
    FORMAT,
    PART,
    damage,
    digest_of,
    load_tensors,
    make_folder,
    open_regular,
    read_json,
    remove_parts,
    save_tensors,
    seals_of,
    sole_writer,
    write_atomically,
    write_json,
)
from sepcap.tables import read_table

FINISHED = "result.json"
"""Written last: names of the tables and tensors. A folder without it contains an interrupted study."""

LISTED = 8
"""Maximum number of folders that an error names."""

PIECES = "pieces"
"""Folder of the finished pieces of a long study."""

PAGES = (".html", ".csv", ".svg", ".png", ".pdf")
"""Suffixes of pages, tables and pictures made from a result; no result is read from them."""

NOT_DECISIVE = ("versions", "created", "model", "task_fingerprints", "documents", "n_documents", "tokens_found", "prompts", "matched")
"""Fields that may differ when a run is resumed: `samples` identifies the tokens, wherever they were found,
`model_fingerprint` the weights, and `matched_neurons` the neurons that a baseline is matched with, wherever they were stored."""


def write_tables(folder: Path, tables: Mapping[str, pd.DataFrame]) -> None:
    """Write each table as `tables/name.parquet`."""
    for name, table in tables.items():
        buffer = io.BytesIO()
        table.to_parquet(buffer, index=False)
        write_atomically(folder / "tables" / f"{name}.parquet", buffer.getvalue())


@dataclass(frozen=True)
class Pieces:
    """Finished pieces of a long study; each is written completely before the next one begins.

    Attributes:
       folder: folder of the study.
        study: identity of its configuration; stored in every piece.
    """

    folder: Path
    study: str

    def has(self, name: str) -> bool:
        """Whether a piece is done."""
        return self._path(name).exists()

    def get(self, name: str) -> tuple[dict[str, Tensor], Any] | None:
        """Tensors of a piece and the note stored with them; None if the piece is not done."""
        if not self.has(name):
            return None
        path = self._path(name)
        tensors, meta = load_tensors(path, "piece")
        if (meta["name"], meta["study"]) != (name, self.study):
            of = "" if meta["study"] == self.study else " of another study"
            raise CorruptFile(f"{path} holds the piece {meta['name']!r}{of}; delete it, and the same call recreates it")
        return tensors, meta["note"]

    def put(self, name: str, tensors: Mapping[str, Tensor], note: Any = None) -> None:
        """Write a piece; `note` is any JSON value."""
        save_tensors(self._path(name), tensors, {"kind": "piece", "name": name, "study": self.study, "note": note})

    def once(self, name: str, make: Callable[[], tuple[Mapping[str, Tensor], Any]]) -> tuple[dict[str, Tensor], Any]:
        """Tensors and note of a piece as they are stored; what `make` returns is stored first, if the piece is not done."""
        done = self.get(name)
        if done is None:
            self.put(name, *make())
            done = self.get(name)
            assert done is not None
        return done

    def _path(self, name: str) -> Path:
        return self.folder / PIECES / f"{name}.safetensors"


def finish_study(pieces: Pieces, tables: Iterable[str], tensors: Iterable[str] = ()) -> None:
    """Mark the study as finished, with size and SHA-256 of every file; this is written last."""
    files = seals_of(pieces.folder, sorted(own_files(pieces.folder) - {"config.json", FINISHED}))
    held = {"study": pieces.study, "tables": list(tables), "tensors": list(tensors), "files": files}
    write_json(pieces.folder / FINISHED, held)


def own_files(folder: Path) -> set[str]:
    """Names of all files of a study, without pages, pictures, and files of runs or studies inside it."""
    found = set()
    for path in folder.rglob("*"):
        name = path.relative_to(folder)
        within = any((folder / above / "config.json").exists() for above in name.parents if above != Path())
        if not within and name.parts[0] != "figures" and path.suffix not in PAGES and (path.is_symlink() or not path.is_dir()):
            found.add(name.as_posix())
    return found


def read_finished(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """Read result.json of a study.

    Raises:
        FileNotFoundError: the study is not finished.
        CorruptFile: the file is damaged, or belongs to another study.
    """
    path = folder / FINISHED
    if not os.path.lexists(path):
        done = len(list((folder / PIECES).rglob("*.safetensors")))
        there = f" ({done} of its pieces exist)" if done else ""
        raise FileNotFoundError(f"{folder} is not finished{there}; the call that started it resumes it")
    try:
        held = read_json(path, Finished)
    except CorruptFile as error:
        raise CorruptFile(f"{error}. Delete it, and the same call recreates it") from error
    if held["study"] != identity_of(config):
        raise CorruptFile(f"{path} belongs to another configuration than {folder / 'config.json'}; delete it and recreate it")
    return held


def whole_study(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """Read result.json of a study and compare all files that it lists with their SHA-256.

    Raises:
        FileNotFoundError: the study is not finished.
        CorruptFile: a file differs from what was written, or result.json is damaged or belongs to another study.
    """
    held = read_finished(folder, config)
    for name, seal in held["files"].items():
        if found := damage(folder, name, seal):
            raise CorruptFile(f"{found}. Delete it and {folder / FINISHED}, and the same call recreates it")
    return held


def listed(folder: Path, held: Mapping[str, Any], name: str) -> Path:
    """Path of a file of a finished study; result.json must list it, so that `whole_study` has compared it."""
    if name not in held["files"]:
        raise CorruptFile(f"{folder / FINISHED} does not list {name}; delete it, and the same call recreates it")
    return folder / name


def study_damage(folder: Path) -> list[str]:
    """Missing, damaged and unexpected files in the folder of a finished study, one sentence each."""
    held = read_finished(folder, read_config(folder))
    found = [what for name, seal in held["files"].items() if (what := damage(folder, name, seal))]
    extra = sorted(own_files(folder) - {"config.json", FINISHED, *held["files"]})
    return found + [f"{folder / name} is unexpected: {FINISHED} does not list it" for name in extra]


def is_finished(pieces: Pieces) -> bool:
    """Whether the folder contains the result of the study.

    Raises:
        CorruptFile: it does, and one of its files differs from what was written.
    """
    if not os.path.lexists(pieces.folder / FINISHED):
        return False
    whole_study(pieces.folder, read_config(pieces.folder))
    return True


@contextlib.contextmanager
def open_study(folder: str | Path, study: str, config: Mapping[str, Any]) -> Iterator[Pieces]:
    """Create or reopen the folder of a study; no other process can write to it meanwhile.

    Raises:
        FileExistsError: the folder holds another configuration (the differing fields are named) or something else.
    """
    folder, resolved = Path(folder), {"study": study, **config}
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file; a study is a folder. Use another name; nothing was changed.")
    make_folder(folder)
    with sole_writer(folder):
        path = folder / "config.json"
        if os.path.lexists(path):
            if different := differing_fields(read_config(folder), resolved):
                raise FileExistsError(f"{folder} holds another configuration ({different}). Use another folder; nothing was changed.")
        elif any(not part.name.endswith(PART) for part in folder.iterdir()):
            raise FileExistsError(f"{folder} is not empty and holds no study (no config.json). Use another folder; nothing was changed.")
        remove_parts(folder)
        if not os.path.lexists(path):
            write_json(path, {"format": FORMAT, **resolved})
        yield Pieces(folder, identity_of(resolved))


def as_json(config: Any) -> Any:
    """A configuration after it was written as JSON and read back."""
    return json.loads(json.dumps(config))


def study_config(folder: Path, study: str) -> dict[str, Any]:
    """The configuration of a study in a folder.

    Raises:
        FileNotFoundError: there is none, or it belongs to another study.
    """
    config = read_config(folder)
    if config.get("study") != study:
        raise FileNotFoundError(f"{folder} holds {config.get('study') or 'something else'}, but a study {study!r} was requested")
    return config


def read_config(folder: Path) -> dict[str, Any]:
    """The configuration of the study or run in a folder.

    Raises:
        FileNotFoundError: there is none.
        CorruptFile: it is damaged.
    """
    path = folder / "config.json"
    if not os.path.lexists(path):
        raise FileNotFoundError(f"{folder} holds no study and no run: there is no config.json in it{_within(folder)}")
    config = read_json(path, Folder)
    if "study" in config:
        config = validated(StudyConfig, config, path)
    del config["format"]
    return config


def _within(folder: Path) -> str:
    """What to do about a folder that contains studies or runs but is none itself."""
    found: list[Path] = []
    for depth in range(1, 4):
        inner = sorted(path.parent for path in folder.glob("*/" * depth + "config.json"))
        found += [path for path in inner if not any(outer in path.parents for outer in found)]
    if not found:
        return ""
    listed = ", ".join(map(str, found[:LISTED])) + (f" and {len(found) - LISTED} more" if len(found) > LISTED else "")
    again = "if one call made them, repeat that call: it names the study there and recomputes nothing that is finished"
    return f"; it holds {listed}: give one of them, or, {again}"


def read_stored(path: Path) -> pd.DataFrame:
    """Read a table of a study."""
    with open_regular(path, "table") as file:
        return read_table(file)


def differing_fields(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """Differing fields that make two configurations different runs, in words; versions and the location of the texts do not."""
    plain = as_json(new)
    pairs = {name: (old.get(name), plain.get(name)) for name in dict.fromkeys([*old, *plain]) if name not in NOT_DECISIVE}
    different = {name: pair for name, pair in pairs.items() if not _same(*pair)}
    return "; ".join(f"{name}: {reprlib.repr(a)} stored, {reprlib.repr(b)} requested" for name, (a, b) in different.items())


def _same(old: Any, new: Any) -> bool:
    """Whether two values are equal; in a mapping of fractions, or several, 1 (one neuron) differs from 1.0 (all)."""
    fractions = isinstance(old, dict) or (isinstance(old, list) and any(isinstance(each, dict) for each in old))
    return json.dumps(old, sort_keys=True) == json.dumps(new, sort_keys=True) if fractions else old == new


def identity_of(config: Mapping[str, Any]) -> str:
    """Digest that identifies a configuration, independent of versions and time."""
    return digest_of({name: value for name, value in as_json(config).items() if name not in NOT_DECISIVE})


def copy_folder(source: Path, folder: str | Path) -> Path:
    """Copy a folder with everything in it; nothing is half-written, and a folder that is not empty is not touched.

    Raises:
        FileExistsError: `folder` is a file, or a folder that is not empty.
        ValueError: `folder` is inside the one that is copied.
    """
    to = Path(folder)
    if to.resolve() == source.resolve():
        return to
    if source.resolve() in to.resolve().parents:
        raise ValueError(f"folder={str(folder)!r} is inside {source}, which would be copied into itself; give another folder")
    if os.path.lexists(to) and (not to.is_dir() or any(to.iterdir())):
        raise FileExistsError(f"{to} exists and is not an empty folder. Use another name; nothing was changed.")
    make_folder(to.parent)
    part = to.parent / f".{to.name}.{os.getpid()}{PART}"
    try:
        shutil.copytree(source, part, ignore=shutil.ignore_patterns(f"*{PART}"))
        os.replace(part, to)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return to
