"""Measure the overlap of the evaluation documents of the local tasks with the collection and training texts.

    python training/overlap.py

Run it in the environment in which the embedded model is trained: there the train split is the training corpus. The result is written to
`sepcap/assets/overlap.json`, which `sepcap tasks NAME` reads. The exit status is 1 if a task shares too much or has too few documents.
"""

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import tyro
from train import EXTRA, SHARES

from sepcap.tasks.overlap import measured
from sepcap.tasks.sources.local import Kind, documents
from sepcap.tasks.sources.ngrams import runs

MOST_SHARED = 0.05
"""Maximum share of the words of evaluation documents in 13-grams of collection or training texts, without idiom."""

FEWEST = 100
"""Minimum number of evaluation documents of a task."""


@dataclass(frozen=True)
class OverlapConfig:
    """Output of the measurement."""

    out: Path = Path("sepcap/assets/overlap.json")


def main(config: OverlapConfig) -> None:
    """Measure every kind of text, print and write; exit with status 1 if a bound is violated."""
    found = {kind: measure(kind) for kind in SHARES}
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "transformer-lens"))
    config.out.write_text(json.dumps({"measured_with": packages, **found}, indent=2) + "\n")
    if broken := out_of_bounds(found):
        sys.exit("\n".join(broken))


def out_of_bounds(found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A sentence for every task that shares too much or has too few documents."""
    broken = []
    for of in found.values():
        if of["shared"] > MOST_SHARED:
            broken.append(f"{of['task']}: {of['shared']:.1%} of the words to evaluate on are in other parts, more than {MOST_SHARED:.0%}")
        if of["documents"]["evaluate"] < FEWEST:
            broken.append(f"{of['task']}: {of['documents']['evaluate']} evaluation documents, fewer than {FEWEST}")
    return broken


def measure(kind: Kind) -> dict[str, Any]:
    """The fields of `TextOverlap` for the documents of one kind of text."""
    texts: dict[str, list[str]] = {}
    for split in ("evaluate", "collect", "train"):
        earlier = [text for part in texts.values() for text in part]
        texts[split] = [row["text"] for row in documents(kind, split, more=EXTRA, earlier=earlier)]
    found = {split: [runs(text) for text in part] for split, part in texts.items()}
    overlap = measured(f"local-{kind}", found.pop("evaluate"), found)
    print(overlap, flush=True)
    return asdict(overlap)


if __name__ == "__main__":
    main(tyro.cli(OverlapConfig))
