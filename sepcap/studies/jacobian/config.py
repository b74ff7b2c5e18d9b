"""Configuration of a study of the Jacobians of attention or mlp blocks."""

from dataclasses import dataclass
from typing import Any, Literal

from sepcap.checks import BETWEEN_0_AND_1, FROM_0, check_fields, checked
from sepcap.studies.base.fields import layers_of

PartName = Literal["attn", "mlp"]
Method = Literal["auto", "exact", "randomized"]
Precision = Literal["float64", "float32"]

EPSILON = {"float64": 2.0**-52, "float32": 2.0**-23}
"""Distance from 1 to the next number."""

THRESHOLDS = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
"""Shares of the largest singular value at which ranks are also reported, if above rounding."""


TRAINED, RANDOM = "trained", "random"
"""Weights of the study and of its control."""


@dataclass(frozen=True)
class JacobianSpectrumConfig:
    """Which Jacobians are computed, how, and which singular values count towards the rank."""

    model: str = "default"
    """"default", a folder, or a hub name."""
    layers: tuple[int, ...] | Literal["all"] = "all"
    """Layers whose Jacobians are computed."""
    part: PartName = "attn"
    """"attn" or "mlp"."""
    tokens: int = 4
    """Tokens per Jacobian: it has tokens·d_model rows and columns. BOS precedes them and is held fixed."""
    task: Any = "local-prose"
    """Source of the tokens: rows from the evaluation part of the task."""
    rows: int = 6
    """Rows of tokens, each giving one Jacobian per layer; intervals are over rows."""
    method: Method = "auto"
    """"exact": the full Jacobian and all its singular values. "randomized": the `k` leading ones, by matrix-vector products alone.
    "auto": exact if that needs at most 256 MiB. With "randomized" the rank is often only a lower bound (`at_least`): to settle it takes
    as many products, and as much memory, as "exact"."""
    k: int = 64
    """Number of leading singular values of the randomised method."""
    tolerance: float = 1e-3
    """The randomised method ends when each of the `k` values found is known to have a singular value of the Jacobian within this share
    of it, or after 12 blocks of directions; the distances known by then are the tensors `_errors`. This does not bound the error at an
    index: if many values are close together, some may be missed, and the values after them get too low an index. The true value at an
    index is at least the one found and, except with probability 10^-10, at most √(found² + remainder²)."""
    threshold: float = 1e-3
    """Singular values above this share of the largest count towards the rank. One in a thousand is above float32 rounding, so both
    precisions give the same rank."""
    norm: bool = True
    """The input is the residual stream, and the Jacobian includes the norm before the part; else the input is the norm's output."""
    precision: Precision = "float64"
    """Precision in which the block is computed: "float64" or "float32"."""
    control: bool = True
    """Also measure the model of the same configuration with random weights, on the same tokens."""
    seed: int = 0
    """Seed of the random weights and of the random directions."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", layers_of(self.layers))
        check_fields(self, layers=FROM_0, threshold=BETWEEN_0_AND_1, tolerance=BETWEEN_0_AND_1)

    @checked()
    def check_threshold(self, size: int) -> None:
        """Raise if the threshold is within rounding for a Jacobian of this size: eps·size of the largest, as in numpy's matrix_rank.

        Raises:
            ValueError: the threshold is too small; the message names the limit.
        """
        noise = EPSILON[self.precision] * size
        if self.threshold <= noise:
            raise ValueError(
                f"threshold={self.threshold:g} is within rounding: in {self.precision} a Jacobian of {size:,} rows can have singular "
                f"values up to {noise:.1g} of the largest that would be 0 without rounding; give more than that"
                + (", or precision='float64'" if self.precision == "float32" else "")
            )

    @checked()
    def thresholds(self, size: int) -> list[float]:
        """The reported thresholds: `THRESHOLDS` above rounding, and the configured one."""
        noise = EPSILON[self.precision] * size
        return sorted({self.threshold, *(threshold for threshold in THRESHOLDS if threshold > noise)}, reverse=True)
