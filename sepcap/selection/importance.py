"""Importance functions: one number per neuron from statistics of activations, gradients or weights (METHODS 4, 18)."""

from collections.abc import Callable
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from sepcap.errors import unknown
from sepcap.selection.divergences import js, kl, wasserstein
from sepcap.statistics.moments import NeuronStatistics


class Importance(NamedTuple):
    """One row of the table: a number per neuron of one dataset, a score of a pair of datasets, or a number for each dataset of a pair."""

    of: Callable[[NeuronStatistics], Float[Tensor, "..."]] | None
    pair: Callable[[NeuronStatistics, NeuronStatistics], Float[Tensor, "..."]] | None
    meaning: str
    relative_eps: bool = False
    """Whether the default ε of the ratio is relative to the mean importance on retain."""
    both: Callable[[NeuronStatistics, NeuronStatistics], tuple[Float[Tensor, "..."], Float[Tensor, "..."]]] | None = None
    """The importances on both datasets, if each depends on the other dataset too."""

    def values(self, forget: NeuronStatistics, retain: NeuronStatistics) -> tuple[Float[Tensor, "..."], Float[Tensor, "..."]]:
        """The importances on forget and on retain, unless the row is a score of the pair."""
        if self.both is not None:
            return self.both(forget, retain)
        assert self.of is not None, "a score of the pair has no importances"
        return self.of(forget), self.of(retain)


def about_common_mean(
    forget: NeuronStatistics, retain: NeuronStatistics
) -> tuple[Float[Tensor, "layer *neuron"], Float[Tensor, "layer *neuron"]]:
    """√ mean (z − c)² on each task, with c the mean of the two tasks' means, whatever their numbers of positions.

    For a neuron with one constant value on one task and another on the other it is above 0 on both, while `std` is 0.

    Source: [SEP] appendix A.
    """
    # (z̄ − c) is half of the difference of the means on both tasks; squares of large equal means would cancel
    shift = ((forget.mean - retain.mean.to(forget.low.device)) / 2).square()
    return (forget.std.square() + shift).sqrt(), (retain.std.square().to(shift.device) + shift).sqrt()


IMPORTANCES: dict[str, Importance] = {
    "abs": Importance(lambda s: s.abs, None, "mean |z|"),
    "sqrt": Importance(lambda s: s.sqrt, None, "mean √|z|"),
    "rms": Importance(lambda s: s.rms, None, "√ mean z²"),
    "std": Importance(lambda s: s.std, None, "standard deviation about the dataset's own mean"),
    "std_common": Importance(None, None, "root mean square about the common mean of both tasks", both=about_common_mean),
    "freq": Importance(lambda s: s.freq, None, "share of positions with z > 0 (mlp only)"),
    "mean_shift": Importance(None, lambda f, r: (f.mean - r.mean).abs(), "|mean on forget − mean on retain|, not a ratio"),
    "kl": Importance(None, kl, "Kullback–Leibler divergence of forget from retain, nats, not a ratio; needs histograms"),
    "js": Importance(None, js, "Jensen–Shannon divergence, 0 to ln 2, not a ratio; needs histograms"),
    "wasserstein": Importance(None, wasserstein, "area between the cumulative distributions, not a ratio; needs histograms"),
    "atp": Importance(lambda s: s.atp, None, "first-order change of the loss without the neuron, signed; needs gradients"),
    "atp_abs": Importance(lambda s: s.atp.abs(), None, "absolute value of atp; needs gradients", relative_eps=True),
    "taylor": Importance(lambda s: s.taylor, None, "mean |z·∂ℓ/∂z|; needs gradients", relative_eps=True),
    "fisher": Importance(lambda s: s.fisher, None, "mean over rows of (Σ z·∂ℓ/∂z)²; needs gradients", relative_eps=True),
    "ig": Importance(lambda s: s.ig, None, "change of the loss by integrated gradients, signed; needs gradients"),
    "ig_abs": Importance(lambda s: s.ig.abs(), None, "absolute value of ig; needs gradients", relative_eps=True),
    "relp": Importance(lambda s: s.relp, None, "atp with a linearised backward pass, signed; needs gradients"),
    "relp_abs": Importance(lambda s: s.relp.abs(), None, "absolute value of relp; needs gradients", relative_eps=True),
    "wanda": Importance(lambda s: s.wanda, None, "rms(z)·‖W_write‖", relative_eps=True),
    "snip": Importance(lambda s: s.snip, None, "Σ |w·∂ℓ/∂w| over the neuron's weights; needs gradients", relative_eps=True),
}
"""All importance functions by name. `random` is not an importance but the baseline of a selection."""


def get_importance(name: str) -> Importance:
    """The importance of that name; an error names the nearest one."""
    if name not in IMPORTANCES:
        raise unknown("importance", name, IMPORTANCES)
    return IMPORTANCES[name]
