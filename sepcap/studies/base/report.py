"""One page about the result of a study: its question, findings, figures, tables, and provenance."""

import numbers
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from sepcap.drawing.page import Page, Picture, Section, Table, page_path, picture, write_page
from sepcap.progress import progress
from sepcap.studies.base.text import documents_in_words

ROWS = 60
"""Maximum number of rows of a table on a page; longer tables are cut to it."""

DIGITS = 4
"""Significant digits of numbers in tables."""


def study_report(result: Any, path: str | Path | None = None) -> Path:
    """Write one self-contained HTML page about the result of a study.

    It contains the question, the summary, every figure in `FIGURES`, every table or those in `PAGE_TABLES` (the first rows of long ones,
    and the file with all rows), the configuration, and how to read the result in Python. If a figure cannot be drawn, the reason is given.

    Args:
        result: what a study returns, or `sepcap.load_result` reads.
        path: the file to write; default `report.html` in the folder that the result was loaded from or saved to.

    Returns:
        The path.

    Raises:
        ValueError: no path, and the result has no folder.
        IsADirectoryError: `path` is a folder.

    Example:
        >>> sepcap.load_result("runs/overlap").report()  # doctest: +SKIP
        PosixPath('runs/overlap/report.html')

    Source: the METHODS section of the study, which defines its numbers.
    """
    if path is None:
        if result.folder is None:
            raise ValueError("path=None: this result has no folder; give the name of the file to write, or save it first")
        path = Path(result.folder) / "report.html"
    path = page_path(path)
    pictures = tuple(progress(_pictures(result), total=len(result.FIGURES), desc="report", unit="figure", leave=True))
    documents = documents_in_words(result.n_documents)
    sections = [Section("Figures", documents and f"Measured on {documents}.", pictures=pictures)] if pictures else []
    every = result.tables
    wanted = list(every if result.PAGE_TABLES is None else result.PAGE_TABLES)
    tables = [_table(name, frame) for name, frame in every.items() if name in wanted]
    if tables:
        left = [f"{name} ({len(frame):,} rows, tables/{name}.parquet)" for name, frame in every.items() if name not in wanted]
        words = f"Not shown, but in the folder of the saved result: {', '.join(left)}." if left else ""
        sections.append(Section("Tables" if len(tables) > 1 else f"Table: {tables[0].name}", words, tables=tuple(tables)))
    config = result.config
    where = "RESULT" if result.folder is None else str(result.folder)
    page = Page(
        title=result.TITLE,
        subtitle=", ".join(str(part) for part in (config.get("model"), f"study {result.STUDY}", documents, result.folder) if part),
        summary=result.summary(),
        sections=sections,
        generations=None,
        configuration=config,
        again="How it was made, and how to read it",
        command=f"import sepcap\nresult = sepcap.load_result({where!r})",
        command_note=_made(config),
    )
    write_page(path, page)
    return path


def _pictures(result: Any) -> Iterator[Picture]:
    for kind, (title, _) in result.FIGURES.items():
        yield picture(f"figure-{kind}", title, lambda kind=kind: result.figure(kind), lambda kind=kind: result.figure(kind, width="column"))


def _table(name: str, frame: pd.DataFrame) -> Table:
    note = ""
    if len(frame) > ROWS:
        note = f"The first {ROWS} of {len(frame):,} rows; all of them are in tables/{name}.parquet of the saved result."
    shown = frame.head(ROWS)
    columns: dict[str, list[str]] = {}
    for column in map(str, shown):
        start, end = column[: -len("low")], column[: -len("low")] + "high"
        if column.endswith("low") and start[-1:] in ("", "_") and end in shown:
            ends = zip(shown[column], shown[end], strict=True)
            columns[_heading(f"{start}[low, high]")] = [f"[{_cell(low)}, {_cell(high)}]" for low, high in ends]
        elif not (column.endswith("high") and f"{column[: -len('high')]}low" in shown):
            columns[_heading(column)] = [_cell(value) for value in shown[column]]
    return Table(pd.DataFrame(columns, dtype=object), name, note)


def _heading(column: str) -> str:
    return column.replace("_", " ")


def _cell(value: Any) -> str:
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    if isinstance(value, numbers.Integral):
        return f"{value:,}"
    if isinstance(value, numbers.Real):
        return "–" if value != value else f"{value:.{DIGITS}g}".replace("-", "−")
    return "–" if value is None or value is pd.NA or value is pd.NaT else str(value)


def _made(config: Any) -> str:
    """Provenance of a result, in a sentence or two."""
    versions = config.get("versions")
    with_what = ", ".join(f"{name} {version}" for name, version in versions.items()) if isinstance(versions, dict) else "an unknown version"
    how = [f"{name} {config[name]}" for name in ("device", "dtype", "seed") if name in config]
    made = f"Made with {', '.join([with_what, *how])}"
    if "created" in config:
        made += f", begun {config['created']}"
    return f"{made}. The same configuration on the same machine gives the same numbers."
