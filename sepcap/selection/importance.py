"""Importance functions: one number per neuron from activation statistics (METHODS 4)."""

from collections.abc import Callable
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from sepcap.errors import unknown
from sepcap.selection.divergences import js, kl, wasserstein
from sepcap.statistics.moments import NeuronStatistics


class Importance(NamedTuple):
    """One row of the table: either a non-negative number per neuron of one dataset, or a score of a pair of datasets."""

    of: Callable[[NeuronStatistics], Float[Tensor, "..."]] | None
    pair: Callable[[NeuronStatistics, NeuronStatistics], Float[Tensor, "..."]] | None
    meaning: str


IMPORTANCES: dict[str, Importance] = {
    "abs": Importance(lambda s: s.abs, None, "mean |z|"),
    "sqrt": Importance(lambda s: s.sqrt, None, "mean √|z|"),
    "rms": Importance(lambda s: s.rms, None, "√ mean z²"),
    "std": Importance(lambda s: s.std, None, "standard deviation about the dataset's own mean"),
    "freq": Importance(lambda s: s.freq, None, "share of positions with z > 0 (mlp only)"),
    "mean_shift": Importance(None, lambda f, r: (f.mean - r.mean).abs(), "|mean on forget − mean on retain|, not a ratio"),
    "kl": Importance(None, kl, "Kullback–Leibler divergence of forget from retain, nats, not a ratio; needs histograms"),
    "js": Importance(None, js, "Jensen–Shannon divergence, 0 to ln 2, not a ratio; needs histograms"),
    "wasserstein": Importance(None, wasserstein, "area between the cumulative distributions, not a ratio; needs histograms"),
}
"""All importance functions by name. `random` is not an importance but the baseline of a selection."""


def get_importance(name: str) -> Importance:
    """The importance of that name; an error names the nearest one."""
    if name not in IMPORTANCES:
        raise unknown("importance", name, IMPORTANCES)
    return IMPORTANCES[name]
