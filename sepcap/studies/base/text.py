"""Format numbers for sentences."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np


def counted(n: int, name: str) -> str:
    """ "1 row", "2 rows"."""
    return f"{n:,} {name}{'' if n == 1 else 's'}"


def documents_in_words(counts: tuple[int, int] | None) -> str:
    """A smallest and a largest number of documents; empty if there are none.

    >>> documents_in_words((60, 60)), documents_in_words((60, 75)), documents_in_words(None)
    ('60 documents', '60 to 75 documents', '')
    """
    if counts is None:
        return ""
    few, many = counts
    return counted(many, "document") if few == many else f"{few:,} to {counted(many, 'document')}"


def duration(seconds: float) -> str:
    """A length of time, in the unit that suits it.

    >>> duration(0.2), duration(89.6), duration(90), duration(3 * 3600)
    ('1 s', '90 s', '2 minutes', '3.0 hours')
    """
    if seconds < 90:
        return f"{max(1, seconds):.0f} s"
    return f"{seconds / 60:.0f} minutes" if seconds < 5_400 else f"{seconds / 3_600:,.1f} hours"


def p_in_words(log10_p: float) -> str:
    """A p-value for a sentence, from its log10.

    >>> p_in_words(0.0), p_in_words(-1.3), p_in_words(-412.25)
    ('= 1', '= 0.05', '= 10^−412.2')
    """
    if np.isnan(log10_p):
        return "undefined"
    return f"= {10**log10_p:.2g}" if log10_p > -3 else f"= 10^−{-log10_p:.1f}"


def with_ends(row: Any, name: str, digits: int = 2) -> str:
    """A value with its interval, for a sentence; the value alone if the interval is not finite, as for one seed.

    >>> with_ends({"x": -0.5, "x_low": -0.75, "x_high": -0.25}, "x")
    '−0.50 [−0.75, −0.25]'
    """
    value, low, high = (row[name + end] for end in ("", "_low", "_high"))
    if not np.isfinite(value):
        return "undefined"
    ends = f" [{low:.{digits}f}, {high:.{digits}f}]" if np.isfinite(low) else ""
    return f"{value:.{digits}f}{ends}".replace("-", "−").replace("inf", "∞")


def between(line: Mapping[Any, Any], name: str) -> str:
    """A mean with its interval, if there is one, for a sentence."""
    low, high = line[f"{name}_low"], line[f"{name}_high"]
    return f"{line[name]:,.4g}" + ("" if math.isnan(low) else f" [{low:,.4g}, {high:,.4g}]")
