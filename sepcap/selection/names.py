"""Names of the importance functions, and what each needs to have been collected; without torch, for configurations (METHODS 4, 18)."""

from typing import Literal

ImportanceName = Literal[
    "abs", "sqrt", "rms", "std", "std_common", "freq", "mean_shift", "kl", "js", "wasserstein",
    "atp", "atp_abs", "taylor", "fisher", "ig", "ig_abs", "relp", "relp_abs", "wanda", "snip",
]  # fmt: skip
"""Every importance, by name."""

OfOneTask = Literal[
    "abs", "sqrt", "rms", "std", "std_common", "freq", "mean_shift",
    "atp", "atp_abs", "taylor", "fisher", "ig", "ig_abs", "relp", "relp_abs", "wanda", "snip",
]  # fmt: skip
"""Those that need no histograms."""

Contrast = Literal["ratio", "difference", "guarded"]
"""Ways in which the importances on forget and on retain are made into a score."""

DIVERGENCES = ("kl", "js", "wasserstein")
"""Importances that need histograms."""

OF_BOTH = ("mean_shift", *DIVERGENCES)
"""Importances that are scores of both tasks already."""

SIGNED = ("atp", "ig", "relp")
"""Importances that can be negative: changes of the loss in nats."""

GRADIENTS = {
    "atp": "atp", "atp_abs": "atp", "taylor": "taylor", "fisher": "fisher", "ig": "ig", "ig_abs": "ig",
    "relp": "relp", "relp_abs": "relp", "snip": "snip",
}  # fmt: skip
"""Importance -> what `collect(..., gradients=...)` must have been given."""


def gradients_for(importance: str) -> tuple[str, ...]:
    """What `collect` takes as `gradients` for an importance; empty for one that needs no backward pass."""
    return (GRADIENTS[importance],) if importance in GRADIENTS else ()


def resolve_contrast(importance: str, contrast: Contrast | None = None) -> Contrast | None:
    """The contrast of an importance, or its default; None for one that is a score already.

    Raises:
        ValueError: a contrast that the importance refuses.
    """
    if importance in OF_BOTH:
        if contrast is not None:
            raise ValueError(f"contrast={contrast!r} with importance={importance!r}, which is a score of both tasks already; leave it out")
        return None
    if importance in SIGNED and contrast in ("ratio", "guarded"):
        raise ValueError(
            f"contrast={contrast!r} with importance={importance!r}, which can be negative; use 'difference', or {importance + '_abs'!r}"
        )
    if importance == "wanda" and contrast == "ratio":
        raise ValueError("contrast='ratio' with importance='wanda': its weights cancel, and 'rms' is left; use 'difference' or 'guarded'")
    return contrast or ("difference" if importance in (*SIGNED, "wanda") else "ratio")
