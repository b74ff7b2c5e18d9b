"""Means over the seeds of a sweep, and its best settings (METHODS 24)."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import pandas as pd

from sepcap.progress import progress
from sepcap.statistics.intervals import as_columns
from sepcap.studies.base.seeds import seed_interval
from sepcap.studies.methods.measured import Mean, cost_of, drop_of, over_seeds, percent_of, separabilities_of
from sepcap.studies.sweep.measures import DROPS, MEASURES

BY: dict[str, Callable[..., Any]] = {
    "separability": percent_of,
    "max_drop": drop_of,
    **{f"retain_cost_{drop}": partial(cost_of, forget_drop=drop) for drop in DROPS},
}
"""Measure -> its value of one run with its bootstrap replicas."""


def mean_rows(rows: pd.DataFrame) -> dict[str, Any]:
    """Means of the measures of several seeds, with 95% intervals of Student's t over seeds."""
    found: dict[str, Any] = {}
    for name in MEASURES:
        values = rows[name].to_numpy(dtype=float) if name in rows else np.full(len(rows), np.nan)
        found |= seed_interval(name, values)
        if (n := int(np.isfinite(values).sum())) < len(rows):
            found[f"{name}_seeds"] = n
    return found


def over_documents(runs: Sequence[Any], metric: str) -> dict[str, Any]:
    """Means of the measures of several seeds, with 95% bootstrap intervals over the documents that all of them were evaluated on."""
    try:
        found = separabilities_of(runs, metric)
    except ValueError:  # no accuracy to lose
        return {column: math.nan for name in BY for column in as_columns(name)}
    means = {name: over_seeds(found, measure) for name, measure in BY.items()}
    return {column: value for name, mean in means.items() for column, value in mean.columns(name).items()}


def best_of(groups: Mapping[tuple[Any, ...], Sequence[Any]], settings: Sequence[str], by: str, n: int, metric: str) -> pd.DataFrame:
    """See `Sweep.best`."""
    if by not in BY:
        raise AssertionError(by)
    halves: dict[tuple[Any, ...], tuple[Mean, Mean]] = {}
    for key, runs in progress(groups.items(), total=len(groups), desc="best", unit="setting"):
        try:
            first, second = (over_seeds(separabilities_of(runs, metric, half), BY[by]) for half in (0, 1))
        except ValueError:  # no hit of the unpruned model in a half
            continue
        if math.isfinite(first.value) and math.isfinite(second.value):
            halves[key] = first, second
    if not halves:
        raise ValueError("too few documents, or too few right predictions, to choose on one half of them and measure on the other")
    ranked = sorted(halves.items(), key=lambda item: -item[1][0].value)[:n]
    rows = []
    for key, (first, second) in ranked:
        row = {**dict(zip(settings, key, strict=True)), "seeds": len(groups[key]), **second.columns(by), "seeds_sd": second.seeds_sd}
        rows.append(row | {"compared": len(halves), "on_first_half": first.value})
    return pd.DataFrame(rows)
