"""What a study of the Jacobians of attention or mlp blocks measures."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sepcap.checks import BETWEEN_0_AND_1, check_fields

PartName = Literal["attn", "mlp"]
Method = Literal["auto", "exact", "randomized"]
Precision = Literal["float64", "float32"]

EPSILON = {"float64": 2.0**-52, "float32": 2.0**-23}
"""Distance from 1 to the next number."""

THRESHOLDS = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
"""Shares of the largest singular value at which ranks are reported beside the one asked for, those above rounding."""


def counted(n: int, name: str) -> str:
    """ "1 row", "2 rows"."""
    return f"{n:,} {name}{'' if n == 1 else 's'}"


@dataclass(frozen=True)
class TightPassConfig:
    """Which Jacobians are computed, how, and what counts as a direction that passes."""

    layer: Any = "all"
    """A layer, several, or "all"."""
    part: PartName = "attn"
    """"attn" or "mlp"."""
    tokens: int = 4
    """Tokens per Jacobian: it has tokens·d_model rows and columns. BOS stands before them and is held fixed."""
    task: Any = "local-prose"
    """Where the tokens come from: rows from the part of the task that is kept for evaluation."""
    rows: int = 6
    """Rows of tokens, and so Jacobians per layer; intervals are over rows."""
    method: Method = "auto"
    """"exact": the whole Jacobian and all its singular values. "randomized": the `k` leading ones, by products alone.
    "auto": exact where that needs at most 256 MiB. Randomised, the rank is often only a lower bound (`at_least`): to settle it takes as
    many products, and as much memory, as "exact"."""
    k: int = 64
    """Leading singular values where the method is randomised."""
    tolerance: float = 1e-3
    """Where the method is randomised, it ends when some singular value of the Jacobian is known to lie within this share of every one
    of the `k` that were found, or after 12 blocks of directions; the distances that are then known are the tensors `_errors`. This does
    not bound the error at a place: where many values lie close together, some may be passed over, and those after them count up too
    early. The true value at a place is at least the one found and, but for a probability of 10^-10, at most √(found² + remainder²)."""
    threshold: float = 1e-3
    """Singular values above this share of the largest count into the rank. One in a thousand is above what rounding leaves in
    float32, so that both precisions give the same rank."""
    norm: bool = True
    """The input is the residual stream, and the norm in front of the part is in the Jacobian; else the input is what the norm gives."""
    dtype: Precision = "float64"
    """Precision in which the block is computed: "float64" or "float32"."""
    control: bool = True
    """Also measure the model of the same configuration with random weights, on the same tokens."""
    seed: int = 0
    """Of the random weights and of random directions."""

    def __post_init__(self) -> None:
        check_fields(self, threshold=BETWEEN_0_AND_1, tolerance=BETWEEN_0_AND_1)

    def layers(self, n_layers: int) -> tuple[int, ...]:
        """The layers that are meant, of a model with so many.

        Raises:
            ValueError: neither "all" nor numbers, or none.
            IndexError: a layer that does not exist.
        """
        if self.layer == "all":
            return tuple(range(n_layers))
        chosen = self.layer if isinstance(self.layer, Sequence) else [self.layer]
        if isinstance(chosen, str) or not all(isinstance(layer, int) and not isinstance(layer, bool) for layer in chosen) or not chosen:
            raise ValueError(f"layer={self.layer!r}: give a number, several, or 'all'")
        for layer in chosen:
            if not 0 <= layer < n_layers:
                raise IndexError(f"layer={layer} does not exist: the model has layers 0 to {n_layers - 1}")
        return tuple(dict.fromkeys(chosen))

    def check_threshold(self, size: int) -> None:
        """Raise where a threshold is within rounding for a Jacobian of this size: eps·size of the largest, as in numpy's matrix_rank.

        Raises:
            ValueError: with the smallest threshold that would do.
        """
        noise = EPSILON[self.dtype] * size
        if self.threshold <= noise:
            raise ValueError(
                f"threshold={self.threshold:g} is within rounding: in {self.dtype} a Jacobian of {size:,} rows has singular values up to "
                f"{noise:.1g} of the largest that are 0 in truth; give more than that"
                + (", or dtype='float64'" if self.dtype == "float32" else "")
            )

    def thresholds(self, size: int) -> list[float]:
        """The thresholds that are reported: `THRESHOLDS` above rounding, and the one asked for."""
        noise = EPSILON[self.dtype] * size
        return sorted({self.threshold, *(threshold for threshold in THRESHOLDS if threshold > noise)}, reverse=True)
