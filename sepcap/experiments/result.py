"""What a study found: a configuration, tables and tensors; in memory, on disk, as figures and as a page."""

import contextlib
import io
import json
import reprlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import pandas as pd
from torch import Tensor

from sepcap.errors import CorruptFile, unknown
from sepcap.experiments.run import Run, differing_fields
from sepcap.storage import PART, load_tensors, read_json, remove_parts, said_card, save_tensors, sole_writer, write_atomically, write_json

Result = TypeVar("Result", bound="StudyResult")

Figures = Mapping[str, tuple[str, str]]
"""Kind of figure -> its title and the function in `sepcap.plots` that makes it; the first one is the default."""

FINISHED = "result.json"
"""Written last: names of the tables and tensors. A folder without it holds a study that was interrupted."""

UNNAMED = {"ablation-protocol-1": "ablation-protocol"}
"""Format in the configuration of a study that was written before studies had their name there -> the name."""

LISTED = 8
"""Most folders that an error names."""

PIECES = "pieces"
"""Folder of what a long study has done so far."""


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

    def save(self, folder: str | Path) -> Path:
        """Write a folder: config.json, tables/*.parquet, tensors.safetensors, and a list of them last.

        Raises:
            FileExistsError: the folder holds something else, or the same study with another configuration.
        """
        with open_study(folder, self.STUDY, self.config) as pieces:
            write_tables(pieces.folder, self.tables)
            if self.tensors:
                save_tensors(pieces.folder / "tensors.safetensors", self.tensors, {"kind": self.STUDY})
            finish_study(pieces.folder, self.tables, self.tensors)
        object.__setattr__(self, "folder", Path(folder))
        return Path(folder)

    @classmethod
    def load(cls: type[Result], folder: str | Path) -> Result:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: there is no such study in the folder, or it is not finished.
            CorruptFile: a file that cannot be read.
        """
        folder = Path(folder)
        config = study_config(folder, cls.STUDY)
        if not (folder / FINISHED).exists():
            raise FileNotFoundError(f"{folder} is not finished; the same call that began it goes on there")
        held = read_json(folder / FINISHED)
        if not isinstance(held, dict) or not {"tables", "tensors"} <= set(held):
            raise CorruptFile(f"{folder / FINISHED} is corrupt; delete it and make it again")
        tables = {name: _read_table(folder / "tables" / f"{name}.parquet") for name in held["tables"]}
        tensors = load_tensors(folder / "tensors.safetensors", cls.STUDY)[0] if held["tensors"] else {}
        result = cls(config, tables, tensors)
        object.__setattr__(result, "folder", folder)
        return result


def write_tables(folder: Path, tables: Mapping[str, pd.DataFrame]) -> None:
    """Each table as `tables/name.parquet`."""
    for name, table in tables.items():
        buffer = io.BytesIO()
        table.to_parquet(buffer, index=False)
        write_atomically(folder / "tables" / f"{name}.parquet", buffer.getvalue())


def finish_study(folder: Path, tables: Iterable[str], tensors: Iterable[str] = ()) -> None:
    """Say that everything is there; the last thing that is written."""
    write_json(folder / FINISHED, {"tables": list(tables), "tensors": list(tensors)})


@dataclass(frozen=True)
class Pieces:
    """What a long study has done so far: each piece is written whole before the next one is begun."""

    folder: Path

    def get(self, name: str) -> tuple[dict[str, Tensor], Any] | None:
        """Tensors and what was noted with them; None where the piece is not done."""
        path = self._path(name)
        if not path.exists():
            return None
        tensors, meta = load_tensors(path, "piece")
        return tensors, meta["note"]

    def put(self, name: str, tensors: Mapping[str, Tensor], note: Any = None) -> None:
        """Write a piece; `note` is anything that JSON can hold."""
        save_tensors(self._path(name), tensors, {"kind": "piece", "note": note})

    def _path(self, name: str) -> Path:
        return self.folder / PIECES / f"{name}.safetensors"


@contextlib.contextmanager
def open_study(folder: str | Path, study: str, config: Mapping[str, Any]) -> Iterator[Pieces]:
    """The folder of a study, begun or taken up again; nobody else can write to it meanwhile.

    Raises:
        FileExistsError: the folder holds another configuration (the differing fields are named) or something else.
    """
    folder, resolved = Path(folder), {"study": study, **config}
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file; a study is a folder. Use another name; nothing was changed.")
    folder.mkdir(parents=True, exist_ok=True)
    with sole_writer(folder):
        path = folder / "config.json"
        if path.exists():
            if different := differing_fields(_config_of(folder), resolved):
                listed = "; ".join(f"{k}: {reprlib.repr(a)} there, {reprlib.repr(b)} asked for" for k, (a, b) in different.items())
                raise FileExistsError(f"{folder} holds another configuration ({listed}). Use another folder; nothing was changed.")
        elif any(not part.name.endswith(PART) for part in folder.iterdir()):
            raise FileExistsError(f"{folder} is not empty and holds no study. Use another folder; nothing was changed.")
        remove_parts(folder)
        if not path.exists():
            write_json(path, resolved)
        yield Pieces(folder)


def name_study(folder: Path, study: str, config: Mapping[str, Any] | None = None) -> None:
    """Write down which study the runs in a folder belong to; they check their own configurations.

    Raises:
        FileExistsError: the folder holds something else.
    """
    if not (folder / "config.json").exists():
        write_json(folder / "config.json", {"study": study, **(config or {})})
    elif (there := _config_of(folder).get("study")) != study:
        which = f"{there!r} there, {study!r} asked for"
        raise FileExistsError(f"{folder} holds another study ({which}). Use another folder; nothing was changed.")


def as_json(config: Any) -> Any:
    """A configuration as it is after it was written and read."""
    return json.loads(json.dumps(config))


def study_config(folder: Path, study: str) -> dict[str, Any]:
    """The configuration of a study in a folder.

    Raises:
        FileNotFoundError: there is none, or it is of another study.
    """
    config = _config_of(folder)
    if config.get("study") != study:
        raise FileNotFoundError(f"{folder} holds {config.get('study') or 'something else'}, and a study {study!r} was asked for")
    return config


def _config_of(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.exists():
        raise FileNotFoundError(f"{folder} holds no study and no run: there is no config.json in it{_within(folder)}")
    config = read_json(path)
    if not isinstance(config, dict):
        raise CorruptFile(f"{path} is no configuration; restore it or start again in another folder")
    if "study" not in config and config.get("format") in UNNAMED:
        config["study"] = UNNAMED[config["format"]]
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
    try:
        return pd.read_parquet(path)
    except Exception as error:  # pyarrow has no common class for what a broken file can raise
        raise CorruptFile(f"{path} is missing or corrupt ({error}); delete {path.parent.parent / FINISHED} and make it again") from error


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


def load_result(folder: str | Path) -> Any:
    """Whatever lies in a folder: the result of a study, or a pruning run.

    Raises:
        FileNotFoundError: there is nothing, or it is not finished.

    Example:
        >>> sepcap.load_result("runs/similarity").figure()  # doctest: +SKIP
    """
    study = _config_of(Path(folder)).get("study")
    if study is None:
        return Run.load(folder)
    if study not in STUDIES:
        raise unknown("study", study, STUDIES, f"{folder} was written by another version of sepcap.")
    module, name = STUDIES[study].rsplit(".", 1)
    return getattr(import_module(f"sepcap.{module}"), name).load(folder)
