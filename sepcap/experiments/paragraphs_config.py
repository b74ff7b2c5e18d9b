"""What is to be done in a transfer through the paragraph break; nothing heavy is imported here."""

from dataclasses import dataclass
from numbers import Integral, Real
from operator import index
from typing import Any, Literal

Sites = Literal["mlp", "attn_pre_out", "resid"]
SITES: tuple[Sites, ...] = ("mlp", "attn_pre_out", "resid")
PROFILES = ("likelihood", "generation", "none")
TRANSFERRED = ("mlp", "attn_pre_out")
GIVEN = (0, 1, 2, 5, 10, 20)
COUNTS = ("which", "paragraph_tokens", "tokens", "samples", "seed", "batch_size")
REALS = ("scale", "temperature")


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
        layers_of(self.layers)
        for name, kind, right in (*((name, Integral, "a whole number") for name in COUNTS), *((name, Real, "a number") for name in REALS)):
            if not isinstance(getattr(self, name), kind):
                raise TypeError(f"{name}={getattr(self, name)!r}: give {right}")
        for name in ("paragraph_tokens", "tokens", "samples", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: give at least 1")
        for name in ("at", "into"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty: give a text, such as a paragraph break")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature={self.temperature}: give a finite number, 0 or more")
        if self.temperature == 0 and self.samples > 1:
            raise ValueError(f"samples={self.samples}: at temperature=0 there is but one text; give samples=1")
        if self.seed < 0:
            raise ValueError(f"seed={self.seed}: give a whole number, 0 or more")
        if any(k < 0 for k in self.given) or len(set(self.given)) < len(self.given):
            raise ValueError(f"given={self.given!r}: give numbers of tokens, 0 or more, each once")
        if not abs(self.scale) < float("inf"):
            raise ValueError(f"scale={self.scale}: give a finite number")
        if self.profile not in PROFILES:
            from sepcap.errors import unknown

            raise unknown("profile", self.profile, PROFILES)
        if self.profile == "generation" and not self.generate:
            raise ValueError("profile='generation' needs generate=True")
