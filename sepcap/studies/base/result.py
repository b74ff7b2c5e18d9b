"""Result of a study: a configuration, tables and tensors; in memory, on disk, as figures and as a page."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import pandas as pd
from torch import Tensor

from sepcap.checks import checked
from sepcap.errors import unknown
from sepcap.latex import latex_table
from sepcap.storage import load_tensors, said_card, save_tensors
from sepcap.studies.base.folder import copy_folder, finish_study, listed, open_study, read_stored, study_config, whole_study, write_tables
from sepcap.studies.base.provenance import documents_behind
from sepcap.studies.base.report import study_report
from sepcap.studies.base.text import documents_in_words

Result = TypeVar("Result", bound="StudyResult")

Figures = Mapping[str, tuple[str, Callable[..., Any]]]
"""Kind of figure -> its title and the function that makes it; the first one is the default."""


class Shown:
    """Output of a result that has a configuration and tables: figures, a page, a card in Jupyter."""

    STUDY: ClassVar[str]
    """Name of the study, as in `STUDIES`."""
    TITLE: ClassVar[str]
    """The question it answers, as a heading."""
    FIGURES: ClassVar[Figures]
    """Kind of figure -> its title and the function that makes it; the first one is the default."""

    PAGE_TABLES: ClassVar[tuple[str, ...] | None] = None
    """The tables shown on a page; None for all."""

    config: Any
    tables: Any
    folder: Any
    """Where it was loaded from or saved to; None if it is in memory only."""

    @property
    def table(self) -> pd.DataFrame:
        """The main table; by default the first of `.tables`."""
        return next(iter(self.tables.values()))

    @property
    def n_documents(self) -> tuple[int, int] | None:
        """Smallest and largest number of documents of a task that the numbers rest on; None if none are recorded."""
        return documents_behind(self.config.get("n_documents"))

    def summary(self) -> list[str]:
        """Findings, in sentences."""
        raise NotImplementedError(f"{type(self).__name__} has no summary")

    @checked()
    def figure(self, kind: str | None = None, **options: Any) -> Any:
        """One of the figures of this study, by its name in `FIGURES`."""
        kind = next(iter(self.FIGURES)) if kind is None else kind
        if kind not in self.FIGURES:
            raise unknown("figure", kind, self.FIGURES)
        return self.FIGURES[kind][1](self, **options)

    @checked()
    def to_latex(self, table: str | None = None, **options: Any) -> str:
        """One of `.tables`, by its name, for a paper; default is the first. See `sepcap.latex.latex_table`."""
        name = next(iter(self.tables)) if table is None else table
        if name not in self.tables:
            raise unknown("table", name, self.tables)
        return latex_table(self.tables[name], **options)

    @checked()
    def save(self, folder: str | Path) -> Path:
        """Copy the folder of the result, with all of its runs; `sepcap.load_result` opens the copy.

        Raises:
            FileExistsError: the folder exists and is not empty.
        """
        return copy_folder(Path(self.folder), folder)

    @checked()
    def report(self, path: str | Path | None = None) -> Path:
        """Write one self-contained HTML page about the result; see `sepcap.studies.base.report.study_report`."""
        return study_report(self, path)

    def __repr__(self) -> str:
        sizes = ", ".join(f"{name} {len(table):,} rows" for name, table in self.tables.items())
        parts = (str(self.config.get("model")), documents_in_words(self.n_documents), sizes)
        return f"{type(self).__name__}({'; '.join(filter(None, parts))})"

    def _repr_html_(self) -> str:
        how = {"model": self.config.get("model"), "documents": documents_in_words(self.n_documents), "tables": ", ".join(self.tables)}
        how["figures"] = ", ".join(self.FIGURES)
        try:
            said = self.summary()
        except ValueError as error:  # the unpruned model has an accuracy of 0
            said = [str(error)]
        return said_card(self.TITLE, how, said)


@dataclass(frozen=True, eq=False, repr=False)
class StudyResult(Shown):
    """Base of all results made of tables, with `save`, `load`, `figure` and `report`.

    Attributes:
        config: the resolved configuration, with provenance and the name of the study; JSON values only.
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
        """Write a folder: config.json, tables/*.parquet, tensors.safetensors, and last a list of them.

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
            CorruptFile: a file cannot be read.
        """
        folder = Path(folder)
        config = study_config(folder, cls.STUDY)
        held = whole_study(folder, config)
        tables = {name: read_stored(listed(folder, held, f"tables/{name}.parquet")) for name in held["tables"]}
        tensors = load_tensors(listed(folder, held, "tensors.safetensors"), cls.STUDY)[0] if held["tensors"] else {}
        result = cls(config, tables, tensors)
        object.__setattr__(result, "folder", folder)
        return result
