"""`sepcap compare`: several ways to do one thing, measured on the same tokens."""

from dataclasses import dataclass
from typing import Annotated

import tyro

from sepcap.cli.ablations import CompareAblations, CompareImportances
from sepcap.cli.options import Group
from sepcap.cli.pruning import CompareMethods, CompareUnlearning


@dataclass(frozen=True)
class Compare(Group):
    """Compare kinds of ablation of the same heads, ways of pruning, importances, or unlearning methods, on the same pair of tasks."""

    study: (
        Annotated[CompareAblations, tyro.conf.subcommand("ablations")]
        | Annotated[CompareMethods, tyro.conf.subcommand("methods")]
        | Annotated[CompareImportances, tyro.conf.subcommand("importances")]
        | Annotated[CompareUnlearning, tyro.conf.subcommand("unlearning")]
    )
    """Which study."""
