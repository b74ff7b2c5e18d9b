"""Means over seeds with their intervals, and paired differences seed by seed."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from sepcap.statistics.intervals import ratio_se, t_interval


def seed_interval(name: str, values: Float[np.ndarray, " seed"], intervals: int = 1) -> dict[str, float]:
    """Mean of independent repetitions and the ends of its 95% interval (Student's t with one degree of freedom less than repetitions).

    Values that are no number are left out. The ends are missing where fewer than two are left.

    Args:
        name: of the columns: name, name_low and name_high.
        values: one of each repetition.
        intervals: how many intervals are to hold together (Bonferroni).

    >>> {key: round(value, 2) for key, value in seed_interval("x", np.array([1.0, 2.0, 3.0])).items()}
    {'x': 2.0, 'x_low': -0.48, 'x_high': 4.48}
    """
    values = values[np.isfinite(values)]
    mean = float(values.mean()) if len(values) else float("nan")
    low, high = t_interval(mean, ratio_se(values, np.ones(len(values))), len(values), intervals)
    return {name: mean, f"{name}_low": low, f"{name}_high": high}


def paired_differences(table: Any, control: Any, keys: Sequence[str], measures: Sequence[str], intervals: int = 1) -> pd.DataFrame:
    """A measure minus that of the control of the same seed: mean over seeds with its interval.

    Args:
        table, control: one row per seed and combination of keys, with columns seed, keys and measures.
        keys: what a row of the result is of.
        measures: columns that are subtracted.
        intervals: how many intervals are to hold together (Bonferroni).

    Returns:
        Per combination of keys, every measure with `_low` and `_high`, and `seeds`.
    """
    pairs = table.merge(control, on=[*keys, "seed"], suffixes=("", "_control"))
    rows = []
    for key, line in pairs.groupby(list(keys), sort=False):
        row: dict[str, Any] = dict(zip(keys, key, strict=True))
        for name in measures:
            row |= seed_interval(name, (line[name] - line[f"{name}_control"]).to_numpy(dtype=float), intervals)
        rows.append(row | {"seeds": len(line)})
    return pd.DataFrame(rows)


def with_ends(row: Any, name: str, digits: int = 2) -> str:
    """A value with its interval, for a sentence; the value alone where there is one seed.

    >>> with_ends({"x": -0.5, "x_low": -0.75, "x_high": -0.25}, "x")
    '−0.50 [−0.75, −0.25]'
    """
    value, low, high = (row[name + end] for end in ("", "_low", "_high"))
    if not np.isfinite(value):
        return "undefined"
    ends = f" [{low:.{digits}f}, {high:.{digits}f}]" if np.isfinite(low) else ""
    return f"{value:.{digits}f}{ends}".replace("-", "−")
