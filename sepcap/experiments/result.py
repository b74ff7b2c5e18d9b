"""What a study found: a configuration, tables and tensors; in memory, on disk, as figures and as a page."""

import contextlib
import io
import json
import os
import reprlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import pandas as pd
from torch import Tensor

from sepcap.checks import checked
from sepcap.errors import CorruptFile, unknown
from sepcap.experiments.run import Run, differing_fields
from sepcap.experiments.step_files import identity_of
from sepcap.experiments.tables import read_table
from sepcap.schemas import Finished, Folder, StudyConfig, validated
from sepcap.storage import (
    FORMAT,
    PART,
    damage,
    load_tensors,
    make_folder,
    open_regular,
    read_json,
    remove_parts,
    said_card,
    save_tensors,
    seals_of,
    sole_writer,
    write_atomically,
    write_json,
)

Result = TypeVar("Result", bound="StudyResult")

Figures = Mapping[str, tuple[str, str]]
"""Kind of figure -> its title and the function in `sepcap.plots` that makes it; the first one is the default."""

FINISHED = "result.json"
"""Written last: names of the tables and tensors. A folder without it holds a study that was interrupted."""

LISTED = 8
"""Most folders that an error names."""

PIECES = "pieces"
"""Folder of what a long study has done so far."""

PAGES = (".html", ".csv", ".svg", ".png", ".pdf")
"""Suffixes of what is made of a result for people to look at; no result is read from it."""

ROWS = 10_000_000
"""Most rows of a table that is read."""


class Shown:
    """What a result can be asked for once it has a configuration and tables: figures, a page, a card in Jupyter."""

    STUDY: ClassVar[str]
    """Name of the study, as in `STUDIES`."""
    TITLE: ClassVar[str]
    """The question it answers, as a heading."""
    FIGURES: ClassVar[Figures]
    """Kind of figure -> its title and the function in `sepcap.plots` that makes it; the first one is the default."""

    PAGE_TABLES: ClassVar[tuple[str, ...] | None] = None
    """The tables that a page shows, where it is not all of them."""

    config: Any
    tables: Any
    folder: Any
    """Where it was loaded from or saved to; None where it is in memory only."""

    def summary(self) -> list[str]:
        """What was found, in sentences."""
        raise NotImplementedError(f"{type(self).__name__} has no summary")

    def figure(self, kind: str | None = None, **options: Any) -> Any:
        """One of the figures of this study, by its name in `FIGURES`."""
        from sepcap import plots

        kind = next(iter(self.FIGURES)) if kind is None else kind
        if kind not in self.FIGURES:
            raise unknown("figure", kind, self.FIGURES)
        return getattr(plots, self.FIGURES[kind][1])(self, **options)

    def to_latex(self, table: str | None = None, **options: Any) -> str:
        """One of `.tables`, by its name, for a paper; default is the first. See `sepcap.latex.latex_table`."""
        from sepcap.latex import latex_table

        name = next(iter(self.tables)) if table is None else table
        if name not in self.tables:
            raise unknown("table", name, self.tables)
        return latex_table(self.tables[name], **options)

    @checked()
    def report(self, path: str | Path | None = None) -> Path:
        """One HTML page about the result that needs nothing else; see `sepcap.report_study.study_report`."""
        from sepcap.report_study import study_report

        return study_report(self, path)

    def __repr__(self) -> str:
        sizes = ", ".join(f"{name} {len(table):,} rows" for name, table in self.tables.items())
        return f"{type(self).__name__}({self.config.get('model')}; {sizes})"

    def _repr_html_(self) -> str:
        how = {"model": self.config.get("model"), "tables": ", ".join(self.tables), "figures": ", ".join(self.FIGURES)}
        try:
            said = self.summary()
        except ValueError as error:  # of a model that has nothing to lose
            said = [str(error)]
        return said_card(self.TITLE, how, said)


@dataclass(frozen=True, eq=False, repr=False)
class StudyResult(Shown):
    """Base of all results that are tables: what `save`, `load`, `figure` and `report` need to know of a study.

    Attributes:
        config: the resolved configuration, with what it was made with and the name of the study; made of what JSON can hold.
        tables: name -> DataFrame.
        tensors: name -> tensor.
    """

    folder = None
    config: Mapping[str, Any]
    tables: Mapping[str, pd.DataFrame]
    tensors: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "config", {"study": self.STUDY, **self.config})

    @checked()
    def save(self, folder: str | Path) -> Path:
        """Write a folder: config.json, tables/*.parquet, tensors.safetensors, and a list of them last.

        Raises:
            FileExistsError: the folder holds something else, or the same study with another configuration.
        """
        with open_study(folder, self.STUDY, self.config) as pieces:
            write_tables(pieces.folder, self.tables)
            if self.tensors:
                save_tensors(pieces.folder / "tensors.safetensors", self.tensors, {"kind": self.STUDY})
            finish_study(pieces, self.tables, self.tensors)
        object.__setattr__(self, "folder", Path(folder))
        return Path(folder)

    @classmethod
    @checked()
    def load(cls: type[Result], folder: str | Path) -> Result:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: there is no such study in the folder, or it is not finished.
            CorruptFile: a file that cannot be read.
        """
        folder = Path(folder)
        config = study_config(folder, cls.STUDY)
        held = whole_study(folder, config)
        tables = {name: _read_table(listed(folder, held, f"tables/{name}.parquet")) for name in held["tables"]}
        tensors = load_tensors(listed(folder, held, "tensors.safetensors"), cls.STUDY)[0] if held["tensors"] else {}
        result = cls(config, tables, tensors)
        object.__setattr__(result, "folder", folder)
        return result


def write_tables(folder: Path, tables: Mapping[str, pd.DataFrame]) -> None:
    """Each table as `tables/name.parquet`."""
    for name, table in tables.items():
        buffer = io.BytesIO()
        table.to_parquet(buffer, index=False)
        write_atomically(folder / "tables" / f"{name}.parquet", buffer.getvalue())


@dataclass(frozen=True)
class Pieces:
    """What a long study has done so far: each piece is written whole before the next one is begun.

    Attributes:
        folder: of the study.
        study: what tells its configuration from others; it is in every piece.
    """

    folder: Path
    study: str

    def get(self, name: str) -> tuple[dict[str, Tensor], Any] | None:
        """Tensors and what was noted with them; None where the piece is not done."""
        path = self._path(name)
        if not path.exists():
            return None
        tensors, meta = load_tensors(path, "piece")
        if (meta["name"], meta["study"]) != (name, self.study):
            of = "" if meta["study"] == self.study else " of another study"
            raise CorruptFile(f"{path} holds the piece {meta['name']!r}{of}; delete it, and the same call makes it again")
        return tensors, meta["note"]

    def put(self, name: str, tensors: Mapping[str, Tensor], note: Any = None) -> None:
        """Write a piece; `note` is anything that JSON can hold."""
        save_tensors(self._path(name), tensors, {"kind": "piece", "name": name, "study": self.study, "note": note})

    def _path(self, name: str) -> Path:
        return self.folder / PIECES / f"{name}.safetensors"


def finish_study(pieces: Pieces, tables: Iterable[str], tensors: Iterable[str] = ()) -> None:
    """Say that everything is there, with size and SHA-256 of every file; the last thing that is written."""
    files = seals_of(pieces.folder, sorted(own_files(pieces.folder) - {"config.json", FINISHED}))
    held = {"study": pieces.study, "tables": list(tables), "tensors": list(tensors), "files": files}
    write_json(pieces.folder / FINISHED, held)


def own_files(folder: Path) -> set[str]:
    """Names of all that a folder holds of its study: no pages and pictures, and nothing of a run or study within."""
    found = set()
    for path in folder.rglob("*"):
        name = path.relative_to(folder)
        within = any((folder / above / "config.json").exists() for above in name.parents if above != Path())
        if not within and name.parts[0] != "figures" and path.suffix not in PAGES and (path.is_symlink() or not path.is_dir()):
            found.add(name.as_posix())
    return found


def read_finished(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """What result.json says of a study.

    Raises:
        FileNotFoundError: the study is not finished.
        CorruptFile: the file is damaged, or that of another study.
    """
    path = folder / FINISHED
    if not os.path.lexists(path):
        done = len(list((folder / PIECES).rglob("*.safetensors")))
        there = f" ({done} pieces of it are there)" if done else ""
        raise FileNotFoundError(f"{folder} is not finished{there}; the same call that began it goes on there")
    try:
        held = read_json(path, Finished)
    except CorruptFile as error:
        raise CorruptFile(f"{error}. Delete it, and the same call makes it again") from error
    if held["study"] != identity_of(config):
        raise CorruptFile(f"{path} is that of another configuration than {folder / 'config.json'}; delete it and make it again")
    return held


def whole_study(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """What result.json says of a study, after all files that it lists were compared with their SHA-256.

    Raises:
        FileNotFoundError: the study is not finished.
        CorruptFile: a file is not what was written, or result.json is damaged or that of another study.
    """
    held = read_finished(folder, config)
    for name, seal in held["files"].items():
        if found := damage(folder, name, seal):
            raise CorruptFile(f"{found}. Delete it and {folder / FINISHED}, and the same call makes it again")
    return held


def listed(folder: Path, held: Mapping[str, Any], name: str) -> Path:
    """The path of a file of a finished study, which `whole_study` compared where result.json lists it."""
    if name not in held["files"]:
        raise CorruptFile(f"{folder / FINISHED} does not list {name}; delete it, and the same call makes it again")
    return folder / name


def study_damage(folder: Path) -> list[str]:
    """What is missing, damaged or unexpected in the folder of a finished study, in sentences."""
    held = read_finished(folder, read_config(folder))
    found = [what for name, seal in held["files"].items() if (what := damage(folder, name, seal))]
    extra = sorted(own_files(folder) - {"config.json", FINISHED, *held["files"]})
    return found + [f"{folder / name} is unexpected: {FINISHED} does not list it" for name in extra]


def is_finished(pieces: Pieces) -> bool:
    """Whether the result of the study lies in its folder.

    Raises:
        CorruptFile: it does, and some file of it is not what it was.
    """
    if not os.path.lexists(pieces.folder / FINISHED):
        return False
    whole_study(pieces.folder, read_config(pieces.folder))
    return True


@contextlib.contextmanager
def open_study(folder: str | Path, study: str, config: Mapping[str, Any]) -> Iterator[Pieces]:
    """The folder of a study, begun or taken up again; nobody else can write to it meanwhile.

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
                listed = "; ".join(f"{k}: {reprlib.repr(a)} there, {reprlib.repr(b)} asked for" for k, (a, b) in different.items())
                raise FileExistsError(f"{folder} holds another configuration ({listed}). Use another folder; nothing was changed.")
        elif any(not part.name.endswith(PART) for part in folder.iterdir()):
            raise FileExistsError(f"{folder} is not empty and holds no study (no config.json). Use another folder; nothing was changed.")
        remove_parts(folder)
        if not os.path.lexists(path):
            write_json(path, {"format": FORMAT, **resolved})
        yield Pieces(folder, identity_of(resolved))


def as_json(config: Any) -> Any:
    """A configuration as it is after it was written and read."""
    return json.loads(json.dumps(config))


def study_config(folder: Path, study: str) -> dict[str, Any]:
    """The configuration of a study in a folder.

    Raises:
        FileNotFoundError: there is none, or it is of another study.
    """
    config = read_config(folder)
    if config.get("study") != study:
        raise FileNotFoundError(f"{folder} holds {config.get('study') or 'something else'}, and a study {study!r} was asked for")
    return config


def read_config(folder: Path) -> dict[str, Any]:
    """The configuration of whatever lies in a folder.

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
    """What to do about a folder of studies or runs that is none itself."""
    found: list[Path] = []
    for depth in range(1, 4):
        inner = sorted(path.parent for path in folder.glob("*/" * depth + "config.json"))
        found += [path for path in inner if not any(outer in path.parents for outer in found)]
    if not found:
        return ""
    listed = ", ".join(map(str, found[:LISTED])) + (f" and {len(found) - LISTED} more" if len(found) > LISTED else "")
    again = "where they were made by one call, that call names the study there, and computes nothing that is finished again"
    return f"; it holds {listed}: give one of them, or, {again}"


def _read_table(path: Path) -> pd.DataFrame:
    with open_regular(path, "table") as file:
        return read_table(file, ROWS)


STUDIES: dict[str, str] = {
    "similarity": "experiments.similarity.Similarity",
    "streams": "experiments.streams.Streams",
    "tight-pass": "experiments.tight_pass.TightPass",
    "transfer": "experiments.paragraphs.Transfer",
    "modules": "experiments.modules.Modules",
    "overlaps": "experiments.overlaps.Overlaps",
    "cross-task": "experiments.cross_task.CrossTask",
    "cross-checks": "experiments.cross_checks.CrossChecks",
    "ablation-protocol": "experiments.ablation_protocol.ProtocolResult",
    "compare-ablations": "experiments.ablations.AblationComparison",
    "compare-methods": "experiments.methods.Methods",
    "compare-directions": "experiments.comparison.Comparison",
    "reproduce": "experiments.reproduce.Reproduction",
}
"""Name of a study, as its config.json has it -> the class of its results."""


@checked()
def load_result(folder: str | Path) -> Any:
    """Whatever lies in a folder: the result of a study, or a pruning run.

    Every file is compared with its SHA-256, as `sepcap check` does, before anything is returned.

    Raises:
        FileNotFoundError: there is nothing, or a study that is not finished.
        CorruptFile: a file is not what was written; it is named.

    Example:
        >>> sepcap.load_result("runs/similarity").figure()  # doctest: +SKIP
    """
    from sepcap.experiments.check_run import check_run

    study = read_config(Path(folder)).get("study")
    if study is None:
        run = Run.load(folder)
        check_run(run)
        return run
    if study not in STUDIES:
        raise unknown("study", study, STUDIES, f"{folder} was written by another version of sepcap.")
    module, name = STUDIES[study].rsplit(".", 1)
    return getattr(import_module(f"sepcap.{module}"), name).load(folder)
