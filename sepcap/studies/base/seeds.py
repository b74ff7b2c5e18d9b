"""Means over seeds with their intervals, and paired differences seed by seed."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from sepcap.statistics.intervals import as_columns, ratio_se, t_interval


def seed_interval(name: str, values: Float[np.ndarray, " seed"], intervals: int = 1) -> dict[str, float]:
    """Mean of n independent repetitions and the ends of its 95% interval (Student's t with n − 1 degrees of freedom).

    Values that are not finite are left out. The ends are NaN if fewer than two values remain.

    Args:
        name: name of the columns: name, name_low and name_high.
        values: one per repetition.
        intervals: number of simultaneous intervals (Bonferroni correction).

    >>> {key: round(value, 2) for key, value in seed_interval("x", np.array([1.0, 2.0, 3.0])).items()}
    {'x': 2.0, 'x_low': -0.48, 'x_high': 4.48}
    """
    values = values[np.isfinite(values)]
    mean = float(values.mean()) if len(values) else float("nan")
    return as_columns(name, mean, t_interval(mean, ratio_se(values, np.ones(len(values))), len(values), intervals))


def paired_differences(table: Any, control: Any, keys: Sequence[str], measures: Sequence[str], intervals: int = 1) -> pd.DataFrame:
    """Measures minus those of the control with the same seed: mean over seeds with its interval.

    Args:
        table, control: one row per seed and combination of keys, with columns seed, keys and measures.
        keys: columns that identify a row of the result.
        measures: columns to subtract.
        intervals: number of simultaneous intervals (Bonferroni correction).

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


def bonferroni(log10_p: Any) -> Any:
    """Bonferroni correction of log10 p-values; the number of tests is the number of finite values.

    Logarithms are used because the smallest p-values underflow a double. The correction holds under any dependence, such as that of
    sets that share layers, tasks and neurons.

    >>> bonferroni(pd.Series([-3.0, -0.5] + [float("nan")])).round(3).tolist()
    [-2.699, -0.199, nan]
    """
    return (log10_p + np.log10(max(1, int(np.isfinite(log10_p).sum())))).clip(upper=0.0)
