"""Names of the importance functions, and the statistics that each requires; without torch, for configurations (METHODS 4, 18)."""

from typing import Literal, get_args

Divergence = Literal["kl", "js", "wasserstein"]
"""Importances that need histograms."""

OfOneTask = Literal[
    "abs", "sqrt", "rms", "std", "std_common", "freq", "mean_shift",
    "atp", "atp_abs", "taylor", "fisher", "ig", "ig_abs", "relp", "relp_abs", "wanda", "snip",
]  # fmt: skip
"""Importances that need no histograms."""

ImportanceName = Literal[OfOneTask, Divergence]
"""Every importance, by name."""

Contrast = Literal["ratio", "difference", "guarded"]
"""Ways to combine the importances on forget and on retain into a score."""

DIVERGENCES: tuple[str, ...] = get_args(Divergence)

OF_BOTH = ("mean_shift", *DIVERGENCES)
"""Importances that are scores of both tasks already."""

SIGNED = ("atp", "ig", "relp")
"""Importances that can be negative: changes of the loss in nats."""

GRADIENTS = {
    "atp": "atp", "atp_abs": "atp", "taylor": "taylor", "fisher": "fisher", "ig": "ig", "ig_abs": "ig",
    "relp": "relp", "relp_abs": "relp", "snip": "snip",
}  # fmt: skip
"""Importance -> value of `gradients` with which `collect` must have been called."""


def gradients_for(importance: str) -> tuple[str, ...]:
    """What `collect` takes as `gradients` for an importance; empty for one that needs no backward pass."""
    return (GRADIENTS[importance],) if importance in GRADIENTS else ()


def resolve_contrast(importance: str, contrast: Contrast | None = None) -> Contrast | None:
    """The contrast of an importance, or its default; None for one that is a score already.

    Raises:
        ValueError: a contrast that is not defined for the importance.
    """
    if importance in (*OF_BOTH, "learned"):
        if contrast is not None:
            raise ValueError(f"contrast={contrast!r} with importance={importance!r}, which is a score of both tasks already; leave it out")
        return None
    if importance in SIGNED and contrast in ("ratio", "guarded"):
        raise ValueError(
            f"contrast={contrast!r} with importance={importance!r}, which can be negative; use 'difference', or {importance + '_abs'!r}"
        )
    if importance == "wanda" and contrast == "ratio":
        raise ValueError(
            "contrast='ratio' with importance='wanda': its weights cancel, so that it is the score of 'rms'; use 'difference' or 'guarded'"
        )
    return contrast or ("difference" if importance in (*SIGNED, "wanda") else "ratio")
