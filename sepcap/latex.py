"""Tables for papers: LaTeX with booktabs rules, each interval next to its value."""

import math
import numbers
from collections.abc import Iterable
from typing import Any

import pandas as pd

SPECIAL = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "%": r"\%", "#": r"\#", "_": r"\_",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}", "−": "$-$", "–": "--",
}  # fmt: skip
"""Characters that LaTeX reads as commands, or that its older engines do not support."""


def latex_table(
    table: pd.DataFrame,
    columns: Iterable[str] | None = None,
    *,
    digits: int = 3,
    caption: str | None = None,
    label: str | None = None,
) -> str:
    r"""A table as LaTeX for the package `booktabs`; `x`, `x_low` and `x_high` become one column, such as 0.34 [0.27, 0.42].

    Args:
        table: any table of a result.
        columns: columns to keep, in this order, without the ends of intervals; default is all.
        digits: significant digits of the largest number of a column; all numbers of a column have the same decimals.
        caption: text of the caption, escaped; with a caption or a label the table is a float.
        label: for \ref.

    Returns:
        The source of a `tabular`, or of a `table` around it.

    Raises:
        ValueError: a column that does not exist, or a number of digits below 1.

    Example:
        >>> print(latex_table(pd.DataFrame({"drop": [0.34], "drop_low": [0.27], "drop_high": [0.42]}), digits=2))
        \begin{tabular}{r}
        \toprule
        drop \\
        \midrule
        0.34 [0.27, 0.42] \\
        \bottomrule
        \end{tabular}
        <BLANKLINE>
    """
    if digits < 1:
        raise ValueError(f"digits={digits}: give at least 1")
    names = list(map(str, table.columns))
    ends = {name: (f"{name}_low", f"{name}_high") for name in names if {f"{name}_low", f"{name}_high"} <= set(names)}
    kept = [name for name in names if name not in {end for pair in ends.values() for end in pair}] if columns is None else list(columns)
    if missing := [name for name in kept if name not in names]:
        raise ValueError(f"columns: {missing[0]!r} is not in the table, which has {', '.join(names)}")
    cells = {escaped(name.replace("_", " ")): _cells(table, [name, *ends.get(name, ())], digits) for name in kept}
    right = "".join("r" if pd.api.types.is_numeric_dtype(table[name]) else "l" for name in kept)
    styled = pd.DataFrame(cells, dtype=object).style.hide(axis="index")
    caption = None if caption is None else escaped(caption)
    return styled.to_latex(hrules=True, column_format=right, caption=caption, label=label, position_float="centering" if caption else None)


def escaped(text: str) -> str:
    """Text as LaTeX prints it."""
    return "".join(SPECIAL.get(character, character) for character in text).replace("\n", " ")


def _cells(table: pd.DataFrame, names: list[str], digits: int) -> list[str]:
    columns = [table[name].tolist() for name in names]
    decimal = [float(v) for column in columns for v in column if isinstance(v, numbers.Real) and not isinstance(v, numbers.Integral)]
    largest = max((abs(v) for v in decimal if math.isfinite(v)), default=0.0)
    decimals = min(6, max(0, digits - 1 - math.floor(math.log10(largest)))) if largest > 0 else digits - 1
    shown = [[_cell(value, decimals) for value in column] for column in columns]
    return [value if not ends else f"{value} [{', '.join(ends)}]" for value, *ends in zip(*shown, strict=True)]


def _cell(value: Any, decimals: int) -> str:
    if value is None or value is pd.NA or value is pd.NaT or value != value:
        return "--"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, numbers.Integral):
        return f"{value:,}".replace("-", "$-$")
    if isinstance(value, numbers.Real):
        text = f"{value:.{decimals}f}" if math.isfinite(value) else r"$\infty$" if float(value) > 0 else r"-$\infty$"
        return text.replace("-", "$-$")
    return escaped(str(value))
