"""Conditions of a paragraph transfer: prompts, what is patched into them, and from which text (METHODS 14)."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sepcap.studies.paragraphs.config import ParagraphTransferConfig
from sepcap.tasks.batches import separator_of
from sepcap.tasks.passages import Passage

ORIGINAL, TRANSFERRED, MISMATCHED, OTHER_KIND, NEUTRAL = "original", "transferred", "mismatched", "other kind", "neutral"
"""Conditions in which likelihoods are measured and texts generated: the whole context before the break; the break alone, patched from the
text's own break, from the break of another text of the same kind, or of a text of another kind; and the break alone, unpatched."""

OWN, ANOTHER = "own", "another"
DONORS = {TRANSFERRED: OWN, MISMATCHED: ANOTHER, OTHER_KIND: OTHER_KIND}
"""Condition -> text from whose break activations are patched."""

ALONE, FIRST, LAST = "alone", "first", "last"
PARTS = {ALONE: "each layer alone", FIRST: "the first layers up to it", LAST: "the layers from it to the last"}
"""Parts of the profile over layers."""


@dataclass(frozen=True)
class Condition:
    """A prompt for the paragraph, and what is patched into it.

    Attributes:
        name: name in tables.
        donor: text from whose break activations are patched: "own", "another", "other kind"; None if nothing is patched.
        layers: patched layers.
        given: number of tokens of the paragraph in the prompt.
        context: whether the context precedes the break.
    """

    name: str
    donor: str | None = None
    layers: tuple[int, ...] = ()
    given: int = 0
    context: bool = False

    @property
    def slug(self) -> str:
        """A folder name that is short for any number of layers."""
        layers = self.layers
        parts = [f"{layers[0]}-to-{layers[-1]}"] if layers else []
        if layers != tuple(range(layers[0], layers[-1] + 1) if layers else ()):
            parts.append(hashlib.sha256(repr(layers).encode()).hexdigest()[:12])
        return "-".join([self.name, self.donor or "nobody", *parts]).replace(" ", "-")


def compared(layers: tuple[int, ...], donors: Sequence[str]) -> list[Condition]:
    """The conditions without given tokens, patched from the donors that exist."""
    patched = [Condition(name, donor, layers) for name, donor in DONORS.items() if donor in donors]
    return [Condition(ORIGINAL, context=True), *patched, Condition(NEUTRAL)]


def baselines(given: Sequence[int]) -> list[Condition]:
    """Neutral prompts that include the first tokens of the paragraph."""
    return [Condition(f"given {k}", given=k) for k in sorted(given) if k]


def profile(layers: tuple[int, ...], donors: Sequence[str]) -> dict[tuple[str, int, str], Condition]:
    """(part, layer, donor) -> condition; parts that patch the same layers share a condition."""
    parts: dict[tuple[str, int], tuple[int, ...]] = {}
    for i, layer in enumerate(layers):
        parts |= {(ALONE, layer): (layer,), (FIRST, layer): layers[: i + 1], (LAST, layer): layers[i:]}
    return {
        (part, layer, donor): Condition(patched_name(patched), donor, patched)
        for (part, layer), patched in parts.items()
        for donor in (OWN, ANOTHER)
        if donor in donors
    }


def patched_name(layers: tuple[int, ...]) -> str:
    """Name in tables of a transfer in some layers."""
    return f"layer {layers[0]}" if len(layers) == 1 else f"layers {layers[0]} to {layers[-1]}"


def donors_of(passages: Sequence[Passage], seed: int) -> dict[str, list[int | None]]:
    """Donor of the break of each text: the text itself, another of the same kind, one of another kind; None if there is none.

    Among texts of one kind with the same break tokens, each text is the donor of one other text. Only if no other text has these break
    tokens, the donor is one with other break tokens. A copy of a text is never its donor.
    """
    rng = np.random.default_rng(seed)
    another: list[int | None] = [None] * len(passages)
    alike: dict[tuple[Any, ...], list[int]] = {}
    for i, p in enumerate(passages):
        alike.setdefault((p.kind, p.gap), []).append(i)
    for group in alike.values():
        order = rng.permutation(group).tolist()
        times = Counter(passages[i].context for i in order)
        place = {context: k for k, context in enumerate(times)}
        # copies are adjacent; after a shift by the longest run of copies no text meets its own copy, unless that run is over half of all
        together = sorted(order, key=lambda i: place[passages[i].context])
        for i, j in zip(together, np.roll(together, max(times.values())).tolist(), strict=True):
            another[i] = j
            if _same(passages[i], passages[j]):
                another[i] = _any(rng, [k for k, p in enumerate(passages) if p.kind == passages[i].kind], passages, i)
    other: list[int | None] = [
        _any(rng, [k for k, q in enumerate(passages) if q.kind != p.kind], passages, i) for i, p in enumerate(passages)
    ]
    found: dict[str, list[int | None]] = {OWN: list(range(len(passages))), ANOTHER: another, OTHER_KIND: other}
    return {name: whose for name, whose in found.items() if any(j is not None for j in whose)}


def _same(a: Passage, b: Passage) -> bool:
    """Whether two sources have the same tokens up to the end of the break, and so the same activations."""
    return (a.context, a.gap) == (b.context, b.gap)


def _any(rng: np.random.Generator, among: list[int], passages: Sequence[Passage], i: int) -> int | None:
    """A random other text, with the same break tokens if any has them."""
    others = [j for j in among if not _same(passages[i], passages[j])]
    alike = [j for j in others if passages[j].gap == passages[i].gap] or others
    return int(rng.choice(alike)) if alike else None


def matched(passages: Sequence[Passage], donors: dict[str, list[int | None]]) -> dict[str, dict[str, int]]:
    """Donor -> number of texts with such a donor, and number of these whose donor has other break tokens."""
    pairs = {name: [(p, passages[j]) for p, j in zip(passages, whose, strict=True) if j is not None] for name, whose in donors.items()}
    return {name: {"texts": len(of), "spelled otherwise": sum(p.gap != q.gap for p, q in of)} for name, of in pairs.items() if name != OWN}


@dataclass(frozen=True)
class Prompts:
    """How prompts are made from passages.

    Attributes:
        begin: the token that starts a text, if there is one.
        before: tokens of the neutral prompt before the break; None if it does not end with the break.
        whole: tokens of a neutral prompt that does not end with the break.
    """

    begin: tuple[int, ...]
    before: tuple[int, ...] | None
    whole: tuple[int, ...]

    @classmethod
    def of(cls, tokenizer: Any, config: ParagraphTransferConfig) -> "Prompts":
        """The prompts for a tokenizer and a configuration."""
        start = separator_of(tokenizer)
        ends = config.into.endswith(config.at)
        text = config.into.removesuffix(config.at) if ends else config.into
        ids = tuple(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]) if text else ()
        return cls(() if start is None else (start,), ids if ends else None, () if ends else ids)

    def source(self, passage: Passage) -> list[int]:
        """The context and the break; activations are taken at its end."""
        return [*self.begin, *passage.context, *passage.gap]

    def prompt(self, passage: Passage, condition: Condition) -> list[int]:
        """The prompt that precedes the paragraph in a condition."""
        if condition.context:
            return [*self.source(passage), *passage.following[: condition.given]]
        neutral = self.whole if self.before is None else (*self.before, *passage.gap)
        return [*self.begin, *neutral, *passage.following[: condition.given]]

    def room(self, passage: Passage) -> int:
        """How many tokens at the end of the neutral prompt can be patched."""
        return len(passage.gap) if self.before is not None else len(self.whole)
