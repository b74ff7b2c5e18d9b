"""What a sweep has found so far: one row per cell, means over seeds, the best setting, figures."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import pandas as pd

from sepcap.checks import checked
from sepcap.errors import CorruptFile, unknown
from sepcap.latex import latex_table
from sepcap.studies.base.folder import identity_of, read_config, study_config
from sepcap.studies.base.result import Figures, Shown
from sepcap.studies.base.text import counted, documents_in_words
from sepcap.studies.catalog import FUNCTIONS, load_result
from sepcap.studies.pruning.config import PruningConfig
from sepcap.studies.pruning.separability import check_accuracy
from sepcap.studies.sweep import figures
from sepcap.studies.sweep.folder import CELLS, STUDY, Ledger, axes_of, config_at, fingerprints_of, state_of
from sepcap.studies.sweep.grid import value_in_words
from sepcap.studies.sweep.means import best_of, mean_rows, over_documents
from sepcap.studies.sweep.measures import MEASURES

LISTED = 3
"""Most failed cells that a summary names."""


class Sweep(Shown):
    """A sweep in its folder, finished or not.

    Attributes:
        folder: folder of the sweep; its cells are in `cells/`.
        config: what all cells share: `kind` (class of the configuration), `base`, `load`, `threads`; and `grid`, field -> values.

    `table` has one row per cell: the fields of the grid; `state` ("finished", "failed", "begun", "planned"); of pruning runs, by top-1:
    `separability` (100·(A − 1), signed), `max_drop` (cross-fitted maximum differential drop, points), `retain_cost_50` and `_80` (percent
    that the retain task has lost where the forget task has first lost 50% or 80%; empty if it never has), each with its 95% bootstrap
    interval over documents in `_low` and `_high`; `max_drop_step`; `forget_left` and `retain_left` (share of accuracy after the last step);
    `n_documents` and `n_clusters` (of the task that has fewer); `model_tokens` (through the model);
    then `seconds`, `error` and `cell`, the name of its folder. Of other studies, the numbers of a main table of
    one row. The table is read from what was written when cells ended; the files of a cell are checked when it is loaded by `result`.

    Example:
        >>> found = sepcap.load_result("runs/sweep")  # doctest: +SKIP
        >>> found.best()  # doctest: +SKIP
    """

    STUDY = STUDY
    TITLE = "How do the results depend on what was varied?"
    FIGURES: ClassVar[Figures] = {
        "strip": ("Every cell, and means over seeds", figures.strip),
        "heat": ("Means over two fields", figures.heat),
        "trajectories": ("Trajectories of the settings with the highest separability", figures.trajectories),
    }

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._plan = study_config(self.folder, STUDY)
        self._ledger = Ledger(self.folder)
        self.axes: dict[str, list[Any]] = _axes(self._plan)
        own = {name: value for name, value in self._plan.items() if name not in ("cells", "runs", "axes")}
        grid = {name: [value_in_words(value) for value in values] for name, values in self.axes.items()}
        self.config: dict[str, Any] = {**own, "model": own["base"].get("model"), "grid": grid, "cells": len(self._plan["cells"])}
        self._table = self._rows()
        _, self._mixed = fingerprints_of(self.folder, self._ledger)

    @classmethod
    @checked()
    def load(cls, folder: str | Path) -> "Sweep":
        """Open the sweep in a folder, finished or not.

        Raises:
            FileNotFoundError: there is none.
            CorruptFile: its plan or its list of cells is damaged.
        """
        return cls(folder)

    def _rows(self) -> pd.DataFrame:
        rows = []
        for name in self._plan["cells"]:
            config = config_at(self._plan, name)
            row: dict[str, Any] = {axis: _shown(config[axis]) for axis in self.axes}
            row["state"] = state_of(self.folder, self._ledger, name)
            outcome = self._ledger.ended.get(name, {}) if row["state"] in ("finished", "failed") else {}
            values = {name: value for name, value in outcome.get("values", {}).items() if name not in row}
            seconds, note = values.pop("seconds", outcome.get("seconds")), values.pop("note", "")
            rows.append(row | values | {"seconds": seconds, "error": outcome.get("error", note), "cell": name})
        table: Any = pd.DataFrame(rows)
        last = ["seconds", "error", "cell"]
        return table[[name for name in table if name not in last] + last]

    @property
    def table(self) -> pd.DataFrame:
        """One row per cell, see the class."""
        return self._table.copy()

    @property
    def tables(self) -> dict[str, pd.DataFrame]:
        """`cells`, and `seeds` if the grid has seeds: `over_seeds()`."""
        means = self.is_pruning and "seed" in self.axes and len(self.finished) and not self._mixed
        seeds = {"seeds": self.over_seeds()} if means else {}
        return {"cells": self.table, **seeds}

    @property
    def n_documents(self) -> tuple[int, int] | None:
        """Smallest and largest number of documents of a cell; None if no finished cell has one."""
        counts: Any = self._table["n_documents"].dropna() if "n_documents" in self._table else ()
        return (int(min(counts)), int(max(counts))) if len(counts) else None

    def _said_mixed(self) -> str:
        return f"finished cells are of different versions of {' and '.join(self._mixed)}"

    def check_comparable(self) -> None:
        """Raise a ValueError if a model or task changed under its name between two finished cells."""
        if self._mixed:
            raise ValueError(f"{self.folder}: {self._said_mixed()}; .table and .result() have each cell, and means would mix them")

    @property
    def finished(self) -> pd.DataFrame:
        """The rows of finished cells."""
        table: Any = self._table
        return table[table["state"] == "finished"]

    @property
    def is_pruning(self) -> bool:
        """Whether the cells are pruning runs."""
        return self._plan["kind"] == PruningConfig.__name__

    @property
    def settings(self) -> list[str]:
        """Fields of the grid without the seed."""
        return [name for name in self.axes if name != "seed"]

    def where(self, **fields: Any) -> pd.DataFrame:
        """The rows of the cells with these values of these fields of the grid.

        Raises:
            ValueError: a field or a value that the grid does not have.

        Example:
            >>> found.where(importance="abs")  # doctest: +SKIP
        """
        rows: Any = self._table
        for name, value in fields.items():
            if name not in self.axes:
                raise unknown("field", name, self.axes)
            if not any(_shown(one) == _shown(value) for one in self.axes[name]):
                raise unknown(name, value, [value_in_words(one) for one in self.axes[name]])
            rows = rows[rows[name] == _shown(value)]
        return rows

    @checked()
    def result(self, **fields: Any) -> Any:
        """The result of one cell, as its study returns it: a `Run`, or what `load_result` reads.

        Args:
            fields: fields of the grid with their values, enough of them for one cell.

        Raises:
            ValueError: no cell has these values, or several do.
            FileNotFoundError: the cell has not begun.
            CorruptFile: a file of the cell differs from what was written.
        """
        rows = self.where(**fields)
        if len(rows) != 1:
            raise ValueError(f"{value_in_words(fields) or 'no fields'}: {counted(len(rows), 'cell')}; give fields that only one cell has")
        return self._result(rows["cell"].iloc[0])

    def _result(self, name: str) -> Any:
        folder = self.folder / CELLS / name
        result, ended = load_result(folder), self._ledger.ended.get(name, {})
        if "identity" in ended and identity_of(read_config(folder)) != ended["identity"]:
            raise CorruptFile(f"{folder / 'config.json'} is not that of the cell that finished there; restore it, or delete the folder")
        return result

    def runs(self, **fields: Any) -> dict[tuple[Any, ...], list[Any]]:
        """Finished pruning runs of each combination of `settings`, its seeds together; of the cells with these values.

        Raises:
            ValueError: the cells are no pruning runs, none is finished, or a model or task changed under its name between two cells.
        """
        self._needs_runs()
        return {key: list(self._results(rows)) for key, rows in self._groups(**fields)}

    def _groups(self, **fields: Any) -> Iterator[tuple[tuple[Any, ...], Any]]:
        self.check_comparable()
        rows: Any = self.where(**fields)
        rows = rows[rows["state"] == "finished"]
        if rows.empty:
            raise ValueError(f"{self.folder}: no cell is finished" + (f" with {value_in_words(fields)}" if fields else ""))
        if not self.settings:
            yield (), rows
            return
        for key, of_key in rows.groupby(self.settings, sort=False, dropna=False):
            yield tuple(key) if isinstance(key, tuple) else (key,), of_key

    def _results(self, rows: pd.DataFrame) -> Iterator[Any]:
        return (self._result(name) for name in rows["cell"])

    def _needs_runs(self) -> None:
        if not self.is_pruning:
            raise ValueError(f"the cells are of {FUNCTIONS[self._plan['kind']].rsplit('.', 1)[1]}, and this needs pruning runs")

    @checked()
    def over_seeds(self, covers: Literal["seeds", "documents"] = "seeds", *, metric: str = "top1") -> pd.DataFrame:
        """Means over seeds of every combination of the other fields, with 95% intervals (METHODS 24).

        Args:
            covers: which variation the intervals cover. "seeds": Student's t on the values of the seeds, for the documents that were
                evaluated, which all seeds share; NaN for one seed. "documents": bootstrap of these documents, the same ones for all seeds,
                for the seeds that were run; it reads the cells.
            metric: accuracy, for "documents"; the values of the table are of top-1.

        Returns:
            One row per combination: the fields, `seeds` (their number), means with `_low` and `_high`, and `covers`. Means leave out seeds
            without the value, such as a drop that was never reached: `retain_cost_50_seeds` says how many have it.

        Raises:
            ValueError: the cells are no pruning runs, or none is finished.
        """
        self._needs_runs()
        if covers == "seeds" and metric != "top1":
            raise ValueError(f"metric={metric!r} with covers='seeds': the table has top-1; give covers='documents'")
        check_accuracy(metric)
        rows = []
        for key, of_key in self._groups():
            values = mean_rows(of_key) if covers == "seeds" else over_documents(list(self._results(of_key)), metric)
            rows.append({**dict(zip(self.settings, key, strict=True)), "seeds": len(of_key), **values, "covers": covers})
        return pd.DataFrame(rows)

    @checked()
    def best(
        self, by: Literal["separability", "max_drop"] = "separability", *, n: int = 1, metric: str = "top1", **fields: Any
    ) -> pd.DataFrame:
        """The best combinations of fields, chosen on one half of the documents and measured on the other.

        The highest of many is too high on the documents it was chosen on. So combinations are ranked by their mean over seeds on one half
        of the documents of both tasks, and the columns are of the other half.

        Args:
            by: what is compared; the highest is best.
            n: number of combinations.
            metric: accuracy.
            fields: restrict the comparison to cells with these values.

        Returns:
            One row per combination, best first: the fields, `seeds`, the value on the other half with its 95% bootstrap interval over
            documents in `_low` and `_high`, `seeds_sd`, `compared` (number of combinations) and `on_first_half`, the value that it was
            chosen by.

        Raises:
            ValueError: the cells are no pruning runs, none is finished, or there are too few documents for halves.
        """
        check_accuracy(metric)
        return best_of(self.runs(**fields), self.settings, by, n, metric)

    def summary(self) -> list[str]:
        """How far the sweep is, which settings are highest and lowest, and what failed."""
        states = self._table["state"].value_counts()
        said = ", ".join(f"{states[state]:,} {state}" for state in ("finished", "failed", "begun", "planned") if state in states)
        axes = " × ".join(f"{name} ({len(values)})" for name, values in self.axes.items())
        sentences = [f"{counted(len(self._table), 'cell')} of {axes}: {said}."]
        if self._mixed:
            sentences.append(f"There are no means: {self._said_mixed()}.")
        elif self.is_pruning and len(self.finished) and "separability" in self._table:
            means: Any = self.over_seeds().dropna(subset="separability").sort_values("separability", ascending=False)
            for word, row in zip(("highest", "lowest"), (means.head(1), means.tail(1)), strict=True):
                for one in row.to_dict("records")[: len(means)]:
                    sentences.append(f"The {word} mean separability of top-1 is {self._said(one)}.")
            sentences.append(
                "The highest of many is too high by chance; .best() chooses on one half of the documents and measures on the other."
            )
        failed: Any = self._table[self._table["state"] == "failed"].head(LISTED)
        return sentences + [f"{row['cell']} failed: {row['error']}." for row in failed.to_dict("records")]

    def _said(self, row: Mapping[Any, Any]) -> str:
        ends = row["separability_low"], row["separability_high"]
        covers = f" (95% interval over {counted(row['seeds'], 'seed')} {ends[0]:.1f} to {ends[1]:.1f})" if row["seeds"] > 1 else ""
        fields = ", ".join(f"{name} {row[name]}" for name in self.settings)
        return f"{row['separability']:.1f}%{covers}{f', for {fields}' if fields else ''}"

    @checked()
    def to_latex(self, table: str | None = None, columns: Any = None, **options: Any) -> str:
        """A table for a paper: `seeds` if there are seeds, else `cells`; by default the fields and the measures, not files and times.

        Args:
            table: "cells" or "seeds".
            columns: columns to keep, without the ends of intervals.
            options: others of `sepcap.latex.latex_table`.
        """
        tables = self.tables
        name = table or list(tables)[-1]
        if name not in tables:
            raise unknown("table", name, tables)
        there = tables[name]
        wanted = [*self.settings, *(("seed",) if name == "cells" and "seed" in self.axes else ("seeds",) if name == "seeds" else ())]
        wanted += [one for one in MEASURES if one in there]
        return latex_table(there, wanted if columns is None else columns, **options)

    def __repr__(self) -> str:
        parts = (repr(str(self.folder)), documents_in_words(self.n_documents))
        return f"Sweep({', '.join(filter(None, parts))}: {self.summary()[0]})"


def _axes(plan: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Fields in which the cells differ -> their values, in the order in which they were added."""
    axes: dict[str, dict[str, Any]] = {}
    names = axes_of(plan)
    for fields in plan["cells"].values():
        for name in names:
            value = fields.get(name, plan["base"][name])
            axes.setdefault(name, {}).setdefault(repr(value), value)
    return {name: list(values.values()) for name, values in axes.items()}


def _shown(value: Any) -> Any:
    """A value of a field as it stands in a table: numbers, names and flags as they are, others in words."""
    return value if isinstance(value, str | int | float | bool) else value_in_words(value)
