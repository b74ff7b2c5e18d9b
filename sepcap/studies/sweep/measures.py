"""The numbers of one cell: those of a pruning run, or the numbers of a study whose main table is one row (METHODS 24)."""

import math
import numbers
from typing import Any

import numpy as np

from sepcap.statistics.intervals import as_columns, bootstrap_interval
from sepcap.studies.pruning.run import Run
from sepcap.studies.pruning.separability import Separability, costs_at
from sepcap.studies.single_ablations.result import SingleAblations

DROPS = (50, 80)
"""Forget drops in percent at which the cost on the retain task is given."""

MEASURES = ("separability", "max_drop", *(f"retain_cost_{drop}" for drop in DROPS), "forget_left", "retain_left")
"""Columns of the table of a sweep of pruning runs that are means over tokens, of which means over seeds are taken."""


def numbers_of(result: Any, metric: str = "top1") -> dict[str, Any]:
    """The numbers of a result, as a row of the table of a sweep.

    Args:
        result: what the study of a cell returned.
        metric: accuracy of a pruning run.

    Returns:
        Of a pruning run the columns that `Sweep` lists, with `note` instead of them if the unpruned model has no accuracy to lose; of
        single ablations their means over all layers; of another study the numbers of its main table, if that has one row; else nothing.
    """
    if isinstance(result, Run):
        row: dict[str, Any] = {"seconds": sum(result.record(step)["seconds"] for step in range(result.steps_done + 1))}
        row["model_tokens"] = sum(result.record(step)["tokens"] for step in range(result.steps_done + 1))
        if result.n_documents is not None:
            row["n_documents"] = min(result.n_documents)
        try:
            return row | of_separability(result.separability(metric))
        except ValueError as error:
            return row | {"note": str(error)}
    if isinstance(result, SingleAblations):
        return result.numbers
    table = getattr(result, "table", None)
    if table is None or len(table) != 1:
        return {}
    return {str(name): _plain(value) for name, value in table.iloc[0].items() if isinstance(value, numbers.Real | np.number)}


def of_separability(found: Separability) -> dict[str, Any]:
    """Separability, drop, retain costs and what is left of one run, each with its 95% bootstrap interval over documents."""
    low, high = found.interval
    row: dict[str, Any] = as_columns("separability", 100 * (found.area - 1), (100 * (low - 1), 100 * (high - 1)))
    row |= as_columns("max_drop", found.max_drop, found.max_drop_interval) | {"max_drop_step": found.max_drop_step}
    for drop in DROPS:
        cost = float(costs_at(found.forget, found.retain, drop))
        if math.isfinite(cost):
            ends = bootstrap_interval(costs_at(found.replicas.forget, found.replicas.retain, drop), found.replicas.clusters)
            row |= as_columns(f"retain_cost_{drop}", cost, ends)
        else:  # the forget task never drops so far
            row |= as_columns(f"retain_cost_{drop}")
    row |= dict(zip(("forget_left", "retain_left"), found.remaining, strict=True))
    return {name: _plain(value) for name, value in row.items()} | {"n_clusters": min(found.n_clusters)}


def _plain(value: Any) -> Any:
    """A number as JSON has it."""
    return bool(value) if isinstance(value, bool | np.bool_) else int(value) if isinstance(value, numbers.Integral) else float(value)
