"""Configurations of both studies of ablation. The API, the command line and the saved JSON use the same objects."""

from dataclasses import dataclass
from typing import Any, Literal, get_args

from sepcap.checks import check_fields, distinct
from sepcap.studies.base.fields import Sampled

Kind = Literal["zero", "mean", "median", "peak", "resample", "optimal"]

COMPARED: tuple[Kind, ...] = get_args(Kind)
"""Kinds of ablation that are compared."""


@dataclass(frozen=True)
class _Evaluated(Sampled):
    """What is ablated and on which text; shared by both studies."""

    model: str = "default"
    """"default", a folder, or a hub name."""
    task: Any = "local-code"
    """The reference set: a name or a path (in Python also a Dataset or a list of strings). Constants are computed on its collection
    part, loss and top-1 on its evaluation part."""
    kinds: tuple[Kind, ...] = COMPARED
    """Kinds of ablation."""
    tokens: int = 15_000
    """Number of predictions on which every ablation is evaluated."""
    reference_tokens: int = 20_000
    """Token positions from which constants are computed."""
    fit_tokens: int = 10_000
    """Tokens that "optimal" is fitted to, spread over those positions; a third of their documents is held out for early stopping."""
    batch_size: int = 16
    """Rows per forward pass; "resample" draws from the rows of one batch."""

    def __post_init__(self) -> None:
        check_fields(self)
        distinct("kinds", self.kinds)


@dataclass(frozen=True)
class AblationComparisonConfig(_Evaluated):
    """Ablation of heads, one at a time or together, by several kinds on the same tokens (METHODS 8, 9)."""

    layer: int | tuple[int, ...] | None = None
    """Layer or layers of the heads; without `head`, all their heads."""
    head: int | tuple[int, ...] | tuple[tuple[int, int], ...] | None = None
    """Head or heads of each of these layers; in Python, without `layer`, also (layer, head) pairs. Without both, every head."""
    together: bool = False
    """Ablate all these heads at once, as one set, instead of one at a time."""
    controls: int = 0
    """Number of random other heads, drawn from the whole model with `seed`, that are ablated as controls; with `together`, number of
    random sets of as many other heads."""
    seed: int = 0
    """Seed of resampling and of the controls."""


@dataclass(frozen=True)
class AblationSweepConfig(_Evaluated):
    """Ablation of random neurons in equal steps up to all of them, the same neurons for every kind ([PEAK]; METHODS 8)."""

    site: Literal["attn_pre_out", "attn_value", "mlp"] = "attn_pre_out"
    """Site whose neurons are ablated."""
    steps: int = 10
    """Number of equal steps: 10 for 10%, 20%, … 100%."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Each seed gives one random order of the neurons; each step includes the neurons of the previous step."""
    kinds: tuple[Kind, ...] = ("zero", "mean", "median", "peak", "resample")
    """Kinds of ablation. "optimal" is excluded by default: it is refitted for every set, with gradients through all layers, and
    takes many times as long as all other kinds together."""
    reference_tokens: int = 50_000
    """Token positions from which constants are computed."""

    def __post_init__(self) -> None:
        super().__post_init__()
        distinct("seeds", self.seeds)
