"""Configuration of the protocol of [PEAK]: the same object is the API, the command line and the saved JSON."""

from dataclasses import dataclass
from typing import Any, Literal

from sepcap.checks import check_fields, distinct

COMPARED = ("zero", "mean", "median", "peak", "resample", "optimal")
"""Kinds of ablation that are compared with each other."""


@dataclass(frozen=True)
class AblationProtocol:
    """Random neurons ablated in equal steps up to all of them, every kind on the same ones ([PEAK]; METHODS 8)."""

    model: str = "default"
    """"default", a folder, or a hub name."""
    task: Any = "local-code"
    """The reference set: a name or a path (in Python also a Dataset or a list of strings). Constants come from its collection
    part, loss and top-1 from its evaluation part."""
    site: Literal["attn_pre_out", "attn_value", "mlp"] = "attn_pre_out"
    """Whose neurons."""
    steps: int = 10
    """Number of equal steps: 10 for 10%, 20%, … 100%."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Each seed is one random order of the neurons; a step holds those of the step before."""
    kinds: tuple[Literal["zero", "mean", "median", "peak", "resample", "optimal"], ...] = ("zero", "mean", "median", "peak", "resample")
    """Kinds of ablation. "optimal" is left out unless asked for: it is fitted anew for every set, with gradients through all
    layers, and takes many times as long as the others together."""
    tokens: int = 15_000
    """Predictions on which every set is evaluated."""
    reference_tokens: int = 50_000
    """Token positions from which constants are collected."""
    fit_tokens: int = 10_000
    """Tokens that "optimal" is fitted to; a third of their documents is held out and says when to stop."""
    batch_size: int = 16
    """Rows per forward pass, and the rows among which "resample" draws."""
    context: int | None = None
    """Tokens per row; default is the model's context, at most 512."""
    per_document: int | Literal["row"] | None = "row"
    """Most tokens of one document: "row" for what fits one row, a number, or None for whole documents as they come."""

    def __post_init__(self) -> None:
        check_fields(self)
        distinct("seeds", self.seeds)
        distinct("kinds", self.kinds)
