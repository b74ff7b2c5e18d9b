"""Fields that several configurations have, and their checks: samples of texts, sites, shares, importance, layers (METHODS 5)."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import index
from typing import Any, Literal

from sepcap.errors import unknown

FRACTION_KEYS = ("mlp", "attn_pre_out", "attn_value", "heads")

OTHERS = "others"
"""In place of a retain task: every task is scored against all other tasks of the study together."""


@dataclass(frozen=True)
class Sampled:
    """How texts are cut into rows and passed through the model."""

    batch_size: int = 16
    """Rows per forward pass."""
    context: int | None = None
    """Tokens per row; default is the model's context, at most 512."""
    per_document: int | Literal["row"] | None = "row"
    """Maximum tokens per document: "row" for as many as fit one row, a number, or None for whole documents."""


def check_fractions(fractions: Mapping[str, float], steps: int, importance: str) -> None:
    """Check that shares or counts can be pruned in `steps` steps, and that the importance is defined for every site.

    Raises:
        ValueError: names the site and what is wrong with it.
    """
    if not fractions:
        raise ValueError(f"fractions={fractions!r}: give at least one site, {{'mlp': 0.02}}")
    for site, fraction in fractions.items():
        if site not in FRACTION_KEYS:
            raise unknown("site", site, FRACTION_KEYS)
        if isinstance(fraction, int):  # a count: its maximum depends on the model
            if fraction < 1:
                raise ValueError(f"fractions[{site!r}]={fraction}: a whole number is a count; give at least 1")
            continue
        if not 0 < fraction <= 1:
            raise ValueError(
                f"fractions[{site!r}]={fraction!r}: a fraction lies in (0, 1], 0.02 for two percent; a whole number is a count"
            )
        if steps * fraction > 1 + 1e-9:
            most = math.floor(1 / fraction + 1e-9)
            raise ValueError(
                f"fractions[{site!r}]={fraction} in {steps} steps prunes {steps * fraction:.0%} of the neurons, "
                f"more than there are. At most {most} step{'s' * (most != 1)} of {fraction}, "
                f"or a fraction of {math.floor(1e9 / steps) / 1e9:.9g}."
            )
    if "heads" in fractions and "attn_pre_out" in fractions:
        raise ValueError("fractions: 'heads' are made of 'attn_pre_out' neurons; prune one or the other")
    attention = [site for site in fractions if site != "mlp"]
    if importance == "freq" and attention:
        raise ValueError(
            f"importance='freq' is undefined for {attention[0]!r}: attention has no activation function, so a positive activation "
            "means nothing ([SP] appendix B). Use 'abs', 'sqrt', 'rms' or 'std'."
        )


def check_shares(config: Any, sites: Sequence[str], fractions: Sequence[float]) -> None:
    """Check shares that are each pruned in one step, at every site."""
    for site in sites:
        for fraction in fractions:
            check_fractions({site: fraction}, 1, config.importance)


def check_tasks(tasks: tuple[Any, ...], why: str) -> None:
    """Refuse fewer than two tasks."""
    if len(tasks) < 2:
        raise ValueError(f"tasks={tasks!r}: give at least two, in a tuple; {why}")


def layers_of(layers: Any) -> tuple[int, ...] | Literal["all"]:
    """Layers in the form of a configuration.

    Raises:
        ValueError: a word other than "all".
        TypeError: anything else that is not whole numbers.
    """
    if isinstance(layers, str):
        if layers != "all":
            raise ValueError(f"layers={layers!r}: give 'all' or numbers of layers")
        return "all"
    try:
        numbers = list(layers)
        if any(isinstance(number, bool) for number in numbers):
            raise TypeError
        return tuple(map(index, numbers))
    except TypeError:
        raise TypeError(f"layers={layers!r}: give 'all' or whole numbers of layers in a list, such as [2, 3]") from None
