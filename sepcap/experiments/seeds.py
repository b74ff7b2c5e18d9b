"""Means over seeds with their intervals, and paired differences seed by seed."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float


def seed_interval(name: str, values: Float[np.ndarray, " seed"]) -> dict[str, float]:
    """Mean of independent repetitions and the ends of its 95% interval (Student's t with one degree of freedom less than repetitions).

    Values that are no number are left out. The ends are missing where fewer than two are left.

    Args:
        name: of the columns: name, name_low and name_high.
        values: one of each repetition.

    >>> {key: round(value, 2) for key, value in seed_interval("x", np.array([1.0, 2.0, 3.0])).items()}
    {'x': 2.0, 'x_low': -0.48, 'x_high': 4.48}
    """
    from scipy import stats

    values = values[np.isfinite(values)]
    n = len(values)
    mean = float(values.mean()) if n else float("nan")
    half = float(stats.t.ppf(0.975, n - 1) * values.std(ddof=1) / np.sqrt(n)) if n > 1 else float("nan")
    return {name: mean, f"{name}_low": mean - half, f"{name}_high": mean + half}


def paired_differences(table: Any, control: Any, keys: Sequence[str], measures: Sequence[str]) -> pd.DataFrame:
    """A measure minus that of the control of the same seed: mean over seeds with its interval.

    Args:
        table, control: one row per seed and combination of keys, with columns seed, keys and measures.
        keys: what a row of the result is of.
        measures: columns that are subtracted.

    Returns:
        Per combination of keys, every measure with `_low` and `_high`, and `seeds`.
    """
    pairs = table.merge(control, on=[*keys, "seed"], suffixes=("", "_control"))
    rows = []
    for key, line in pairs.groupby(list(keys), sort=False):
        row: dict[str, Any] = dict(zip(keys, key, strict=True))
        for name in measures:
            row |= seed_interval(name, (line[name] - line[f"{name}_control"]).to_numpy(dtype=float))
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
