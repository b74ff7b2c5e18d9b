"""Where the dimensions of a search come from, in columns of its table, and what that makes of a p-value elsewhere.

They are words and never bare numbers, so that they are the same after a CSV was written and read.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from sepcap.tasks.labelled import LabelledTexts

COLUMNS = ("found_on", "found_in", "found_at", "found_among")
"""Texts, weights, positions, and what was searched through."""


@dataclass(frozen=True)
class Meaning:
    """What an origin makes of p.

    Attributes:
        told: after "Dimension 3" and "was" or "were".
        title: in the title of a panel, behind p.
    """

    told: str
    title: str


ORIGINS: dict[str, Meaning] = {
    "here": Meaning("found on these very texts: p is corrected for that search", "corrected for the search"),
    "other texts": Meaning("found on other texts, so that these are a test of {them}", "not the texts searched"),
    "other model": Meaning(
        "found in another model on these very texts: this is a test on another model, without a correction for that search; where the two "
        "share weights, p is too small",
        "found in another model",
    ),
    "other positions": Meaning(
        "found at other positions of these very texts: p is too small; search at the positions that are tested, or test on other texts",
        "other positions searched",
    ),
    "some texts": Meaning(
        "found on some of these very texts, or on the same under other categories: p is too small; test on texts that were not searched",
        "texts searched in part",
    ),
    "unknown": Meaning(
        "found in a place that is not known: if on these texts, p is too small; give find_dims' own table",
        "origin of search unknown",
    ),
}
"""How the texts, the model and the positions of a search relate to those of a test -> what it makes of p."""


def origin(texts: LabelledTexts, model_fingerprint: str, positions: Sequence[int], dims: int, stages: Sequence[int]) -> dict[str, str]:
    """The columns of a search."""
    return {
        "found_on": f"texts {texts.fingerprint}: {' '.join(_hashes(texts))}",
        "found_in": f"weights {model_fingerprint}",
        "found_at": f"positions {', '.join(map(str, positions))}",
        "found_among": f"{dims} dimensions at stages {', '.join(map(str, stages))}",
    }


def relation(row: Mapping[str, Any], here: Mapping[str, str], texts: LabelledTexts) -> str:
    """How a row of a search relates to where it is tested: a name in `ORIGINS`.

    Args:
        row: of the table of `find_dims`, or of something that was made of it.
        here: `origin` of the texts, model and positions of the test.
        texts: those of the test.
    """
    needed = ("dim", "stage", "p", *COLUMNS)
    if not all(name in row and pd.notna(row[name]) for name in needed) or not str(row["found_on"]).startswith("texts "):
        return "unknown"
    on, model, at = (row[name] == here[name] for name in COLUMNS[:3])
    if on:
        return "here" if model and at else "other positions" if model else "other model"
    searched = set(str(row["found_on"]).split(": ")[-1].split())
    return "some texts" if searched & set(_hashes(texts)) else "other texts"


def _hashes(texts: LabelledTexts) -> list[str]:
    return [hashlib.sha256(text.encode()).hexdigest()[:8] for held in texts.texts.values() for text in held]
