"""Configuration of a comparison of activations (METHODS 13); imports nothing heavy."""

from dataclasses import dataclass
from typing import Literal

from sepcap.tasks.labelled_config import LabelledTextsConfig


@dataclass(frozen=True)
class ActivationSimilarityConfig(LabelledTextsConfig):
    """Which activations of labelled texts are compared (METHODS 13)."""

    what: Literal["attn_out", "mlp_out", "resid_post"] = "attn_out"
    """The output that attention or the mlp adds to the residual stream, or the residual stream after the block. If a norm follows
    attention or the mlp (Gemma-2, OLMo-2: after the output; BERT: after the sum), outputs and heads are taken before it, and the summary
    states this: in Gemma-2 they are not yet what is added to the stream."""
    head: int | None = None
    """Only what this head of every layer adds to the stream (z_h W_O[h], no bias)."""
    layer: int | None = None
    """With a head: only this layer."""
    scaled: bool = False
    """Divide every vector by the largest norm among them instead of its own, so that lengths count."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layer is not None and self.head is None:
            raise ValueError(f"layer={self.layer} needs a head: give head too; without both, all layers are compared")
        if self.head is not None and self.what != "attn_out":
            raise ValueError(f"head={self.head} is a part of attention, and what={self.what!r} is not: leave one of them out")
