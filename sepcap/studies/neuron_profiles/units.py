"""Names of units and texts of tokens, as profiles show them."""

from collections.abc import Iterable
from typing import Any

import pandas as pd

ROLES = ("forget", "retain")

GROUPS = ("0–50%", "50–90%", "90–99%", "99–100%")
"""Groups of quantiles of the activation, by their ends in `reduced.QUANTILES`."""


def named_unit(unit: Any) -> str:
    """Name of a unit.

    >>> named_unit({"site": "mlp", "layer": 4, "head": pd.NA, "neuron": 812})
    'mlp 4.812'
    """
    site = "head" if pd.isna(unit["neuron"]) else unit["site"]
    return f"{site} " + ".".join(str(int(unit[name])) for name in ("layer", "head", "neuron") if not pd.isna(unit[name]))


def words_of(tokenizer: Any, ids: Iterable[int]) -> dict[int, str]:
    """Text of each token alone, with the space in front that belongs to it."""
    found = {}
    for i in ids:
        piece = tokenizer.convert_ids_to_tokens(i)
        # decoding a single token of SentencePiece drops the space
        spaced = isinstance(piece, str) and "\u2581" in piece
        found[i] = piece.replace("\u2581", " ") if spaced else tokenizer.decode([i], clean_up_tokenization_spaces=False)
    return found
