"""Configurations of the traces of residual dimensions and of the search for them (METHODS 13); imports nothing heavy."""

from dataclasses import dataclass
from typing import Any

from sepcap.checks import conform
from sepcap.tasks.labelled_config import PER_CATEGORY_HALVED, LabelledTextsConfig


@dataclass(frozen=True)
class DimensionTracesConfig(LabelledTextsConfig):
    """Which residual dimensions are traced through the layers (METHODS 13)."""

    dims: Any = None
    """Dimensions to trace: one, several, what `find_dimensions` returns, or rows of its table. Default is those that separate the
    categories best in one half of the texts, shown on the other half. If a table was found on one half of these texts, only the other
    half is shown and tested; it needs the seed of the search. Any other dimensions are shown on all texts, and their p-values are valid
    only if they were not chosen by looking at these; a table found on other texts gives a warning."""
    per_category: int = PER_CATEGORY_HALVED
    """Texts per category, if they are taken from tasks."""
    n: int = 4
    """Number of dimensions to search for, if none are given."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if hasattr(self.dims, "tables"):  # the result of a search
            object.__setattr__(self, "dims", self.dims.table)
        if not hasattr(self.dims, "columns"):  # no table
            object.__setattr__(self, "dims", conform("dims", self.dims, int | tuple[int, ...] | None))


@dataclass(frozen=True)
class DimensionSearchConfig(LabelledTextsConfig):
    """Where residual dimensions that separate categories of text are searched (METHODS 13)."""

    per_category: int = PER_CATEGORY_HALVED
    """Texts per category, if they are taken from tasks."""
    n: int = 10
    """Number of dimensions to return."""
    locations: tuple[int, ...] | None = None
    """Locations to search: 0 is the input of the first block, l + 1 the output of block l; default is all."""
