"""Configuration of single ablations (METHODS 19). The API, the command line and the saved JSON use the same object."""

from dataclasses import dataclass
from typing import Any, Literal

from sepcap.checks import Bounds, check_fields
from sepcap.selection.names import OfOneTask
from sepcap.studies.base.fields import Sampled, check_fractions

PAIRS = Bounds(2, 1_000)


@dataclass(frozen=True)
class SingleAblationsConfig(Sampled):
    """The exact effect of every neuron, or head, ablated alone, on a task to forget and one to retain (METHODS 19)."""

    model: str = "default"
    """"default", a folder, or a hub name."""
    forget: Any = "local-code"
    """Task to forget: a name or a path (in Python also a Dataset or a list of strings)."""
    retain: Any = "local-prose"
    """Task to retain."""
    site: Literal["mlp", "attn_pre_out", "attn_value"] = "mlp"
    """Site whose neurons are ablated."""
    whole_heads: bool = False
    """Ablate whole heads, each with all its neurons, instead of neurons."""
    kind: Literal["zero", "mean", "peak"] = "zero"
    """What replaces the activations: 0, or the neuron's mean or most frequent value on the collection part of the retain task."""
    layers: int | tuple[int, ...] | None = None
    """Layer or layers; default all."""
    heads: int | tuple[int, ...] | None = None
    """Head or heads of each of these layers; default all."""
    sample: int | None = None
    """Number of neurons, or heads, drawn at random from the chosen ones; default all of them."""
    seed: int = 0
    """Seed of that draw."""
    pairs: Any = None
    """Also ablate pairs: a number k for all pairs of the k neurons with the largest increase of the loss on the forget task; in Python also
    a NeuronSet for all its pairs, or pairs of places, [((layer, neuron), (layer, neuron)), …]."""
    importance: OfOneTask = "abs"
    """The score that the effects are drawn against, from the collection parts of both tasks."""
    tokens: int = 4_096
    """Predictions per task on which every ablation is evaluated."""
    positions: Literal["all", "correct"] = "all"
    """"correct" averages effects only over the predictions of which the most likely token of the whole model is right."""
    reference_tokens: int = 20_000
    """Token positions per task from which the score and the constants are computed."""

    def __post_init__(self) -> None:
        check_fields(self, sample=Bounds(1), layers=Bounds(0))
        check_fractions({self.site: 1.0}, 1, self.importance)
        if self.site == "mlp" and (self.whole_heads or self.heads is not None):
            named = "whole_heads=True" if self.whole_heads else f"heads={self.heads!r}"
            raise ValueError(f"{named}: site='mlp' has no heads; use site='attn_pre_out' or 'attn_value'")
        if isinstance(self.pairs, bool | str | float) or (isinstance(self.pairs, int) and not PAIRS.hold(self.pairs)):
            raise ValueError(f"pairs={self.pairs!r}: give {PAIRS.words('a whole number')}, a NeuronSet, or pairs of places")
