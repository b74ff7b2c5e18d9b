"""What is to be done in a transfer through the paragraph break; nothing heavy is imported here."""

from dataclasses import dataclass
from operator import index
from typing import Any, Literal

from sepcap.checks import ANY, FROM_0, check_fields, distinct

Sites = Literal["mlp", "attn_pre_out", "resid"]
SITES: tuple[Sites, ...] = ("mlp", "attn_pre_out", "resid")
TRANSFERRED = ("mlp", "attn_pre_out")
GIVEN = (0, 1, 2, 5, 10, 20)


def layers_of(layers: Any) -> tuple[int, ...] | Literal["all"]:
    """Numbers of layers as a configuration has them.

    Raises:
        ValueError: a word other than "all".
        TypeError: what is not whole numbers.
    """
    if isinstance(layers, str):
        if layers != "all":
            raise ValueError(f"layers={layers!r}: give 'all' or numbers of layers")
        return "all"
    try:
        return tuple(map(index, layers))
    except TypeError:
        raise TypeError(f"layers={layers!r}: give 'all' or whole numbers of layers in a list, such as [2, 3]") from None


@dataclass(frozen=True)
class TransferConfig:
    """How activations at a paragraph break are transferred, and what is measured ([PAR], METHODS 14)."""

    at: str = "\n\n"
    """The break in the source whose activations are taken; line ends directly after it belong to it."""
    into: str = "\n\n"
    """The neutral prompt. One that ends with `at` has the break spelled with the tokens of the source's own break, which can be
    two "\\n" or hold an indentation; of any other the last tokens are patched, as many as both have."""
    which: int = -1
    """Which of the breaks that a paragraph follows: 0 the first, -1 the last."""
    layers: tuple[int, ...] | Literal["all"] = "all"
    """Layers that are patched. Where positions are learned, the first ones carry the position of the break."""
    sites: tuple[Sites, ...] = TRANSFERRED
    """What is patched: mlp and attn_pre_out, one of them, or resid alone: the residual stream after each block."""
    scale: float = 1.0
    """What the activations are multiplied with."""
    paragraph_tokens: int = 100
    """Most tokens of the next paragraph that count."""
    generate: bool = True
    """Whether texts are generated; without them likelihoods alone are measured."""
    tokens: int = 100
    """Most tokens of a generated text."""
    temperature: float = 0.3
    """Of generation; 0 takes the most likely token every time."""
    samples: int = 1
    """Generated texts per source and condition."""
    given: tuple[int, ...] = GIVEN
    """Numbers of tokens of the next paragraph that baselines are given; 0 is the neutral prompt itself, which is always measured."""
    profile: Literal["likelihood", "generation", "none"] = "likelihood"
    """Each layer alone, the first ones and the last ones patched: by likelihood, by generated texts too, or not at all."""
    seed: int = 0
    """Of sampling and of which other text is the control."""
    batch_size: int = 32
    """Texts per forward pass, and per part of a run that can be resumed."""

    def __post_init__(self) -> None:
        check_fields(self, which=ANY, given=FROM_0, layers=FROM_0)
        for name in ("at", "into"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty: give a text, such as a paragraph break")
        if self.temperature == 0 and self.samples > 1:
            raise ValueError(f"samples={self.samples}: at temperature=0 there is but one text; give samples=1")
        distinct("given", self.given, fewest=0)
        if self.profile == "generation" and not self.generate:
            raise ValueError("profile='generation' needs generate=True")
