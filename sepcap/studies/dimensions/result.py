"""Results of the two studies of residual dimensions (METHODS 13)."""

from typing import ClassVar

import numpy as np

from sepcap.models.blocks.places import location_name
from sepcap.studies.base.result import Figures, StudyResult
from sepcap.studies.dimensions import figures


class DimensionSearch(StudyResult):
    """Residual dimensions that separate categories of text: found on one half of the texts, tested on the other.

    Attributes:
        config: number of dimensions, locations, positions, the texts and the relabellings; with the model and versions.
        tables: `dimensions`, one row per dimension, the best on the searched half first: dim, location (with the highest η² there),
            `eta2_searched` (that η²), and on the other half `eta2`, `p` corrected for these dimensions, and `p_uncorrected`; `searched`
            names the searched half. `texts`: all texts, of both halves.
    """

    STUDY: ClassVar[str] = "dimension-search"
    TITLE: ClassVar[str] = "Which residual dimensions separate kinds of text?"
    FIGURES: ClassVar[Figures] = {"search": ("η² on the searched half and on the other half", figures.dimension_search)}

    @property
    def dims(self) -> list[int]:
        """The dimensions, the best on the searched half first."""
        return self.table["dim"].tolist()

    def summary(self) -> list[str]:
        """What was found, in sentences."""
        config, few = self.config, self.table.head(5)
        of_categories = ", ".join(f"{name} {n}" for name, n in config["categories"].items())
        said = [
            f"The {len(self.table)} residual dimensions that separate the categories best on one half of {len(self.tables['texts'])} texts "
            f"({of_categories}), at {len(config['positions'])} positions and {len(config['locations'])} locations. "
            "η² and p are of the other half."
        ]
        said += [
            f"Dimension {row['dim']}: {location_name(row['location'])} categories explain η² = {row['eta2']:.3f} of the variance between "
            f"texts ({row['eta2_searched']:.3f} on the searched half), p = {row['p']:.2g}."
            for row in few.to_dict("records")
        ]
        n = int(np.count_nonzero(self.table["p"] <= 0.05))
        return [*said, f"{n} of {len(self.table)} have p ≤ 0.05, corrected for these dimensions. Control: {config['relabellings']}."]


class DimensionTraces(StudyResult):
    """Values of residual dimensions across layers.

    A location is a point in the residual stream: 0 is the input of the first block (embedding and positions), l + 1 the output of block l.

    Attributes:
        config: the dimensions given (None if they were searched), positions, the texts and the relabellings; with the model and versions.
        tables: `values`, one row per dim, location, text and position, with category and value; `means`, per dim, location and category the
            mean over texts with the ends of its 95% interval (`low`, `high`; t over the texts, each the mean of its positions);
            `tests`, one row per dim: `eta2`, the share of the variance between texts that categories explain, and `p`, at one location.
            For a dimension that `find_dimensions` found on the other half of the texts it is the location found there, and p is corrected
            for the dims here; for any other dimension it is the location with the highest `eta2`, and p is corrected for all dims and
            locations here.
            `separation`, the same per dim and location, with `p` corrected for all of them, and `p_uncorrected`; and `texts`.
    """

    STUDY: ClassVar[str] = "dimension-traces"
    PAGE_TABLES = ("tests", "means", "separation", "texts")
    TITLE: ClassVar[str] = "How do residual dimensions that separate kinds of text change over the layers?"
    FIGURES: ClassVar[Figures] = {"traces": ("Value of residual dimensions across layers", figures.dimension_traces)}

    @property
    def dims(self) -> list[int]:
        """The traced dimensions, in the order of the panels."""
        return self.tables["tests"]["dim"].tolist()

    def summary(self) -> list[str]:
        """What was found, in sentences."""
        config = self.config
        several, places = len(self.dims) > 1, len(config["positions"])
        of_categories = ", ".join(f"{name} {n}" for name, n in config["categories"].items())
        lines = [
            f"Residual dimension{'s' * several} {', '.join(map(str, self.dims))} over {config['locations']} locations, at {places} "
            f"position{'s' * (places > 1)} of {len(self.tables['texts'])} texts ({of_categories})."
        ]
        for row in self.tables["tests"].to_dict("records"):
            at = self.tables["means"].query("dim == @row['dim'] and location == @row['location']").sort_values("mean").to_dict("records")
            ends = " to ".join(f"{m['mean']:.3g} [{m['low']:.3g}, {m['high']:.3g}] ({m['category']})" for m in (at[0], at[-1]))
            lines.append(
                f"Dimension {row['dim']}: {location_name(row['location'])} categories explain η² = {row['eta2']:.3f} "
                f"of the variance between texts, p = {row['p']:.2g}; means from {ends}."
            )
        return [*lines, self._what_p_means()]

    def _what_p_means(self) -> str:
        config = self.config
        text = f"Control: {config['relabellings']}."
        n = len(self.dims)
        if config["searched"]:
            several = f"the {n} dimensions" if n > 1 else "the dimension"
            return (
                f"{text} The search for {several} used {config['searched']} other texts of the same categories: each is tested here at "
                f"the location with the highest η² there, and p is corrected for {several}."
            )
        return f"{text} p is corrected for all dimensions and locations shown; it is valid only if they were not chosen on these texts."
