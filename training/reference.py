"""A pair of small models, one trained with code and one without: what never having learned code is like (METHODS 22).

    python training/reference.py --out runs/reference

Both have the tokenizer of the embedded default model, the same seed, sizes and number of tokens: the same initial weights and the same rows
of prose at the same places. Where one reads rows of Python and C++, the other reads further rows of prose. Both are folders in Hugging Face
format. The certificate of the model with code then has a reference:

    sepcap.certify(sepcap.load_model("runs/reference/with-code"), neurons=…, reference=sepcap.load_model("runs/reference/without-code"))

A finished model is not trained again.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from jaxtyping import Int
from neuron_dropout import NeuronDropout, prepare, train_one
from train import SHARES, train_texts
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

import sepcap
from sepcap.models.loading.reading import default_folder

WITH, WITHOUT = "with-code", "without-code"
"""Names of the folders of the pair."""


@dataclass(frozen=True)
class ReferencePair:
    """Sizes and training of both models; by default smaller than the embedded model."""

    out: Path = Path("runs/reference")
    """Folder that receives both models."""
    layers: int = 4
    d_model: int = 192
    heads: int = 4
    context: int = 256
    batch: int = 32
    """Rows per training step."""
    steps: int = 3_000
    learning_rate: float = 2e-3
    warmup: int = 200
    weight_decay: float = 0.1
    max_train_chars: int = 20_000_000
    """Characters of prose; half as many of Python and of C++ each."""
    seed: int = 0
    """Seed of the initial weights and of the order of the rows."""


def rows_of(rows: dict[str, Int[np.ndarray, "row pos"]]) -> dict[str, dict[str, Int[np.ndarray, "row pos"]]]:
    """Name of a model -> rows per kind of text; without code, prose stands in its place, each kind in an order of its own."""
    return {WITH: rows, WITHOUT: dict.fromkeys(map(str, SHARES), rows["prose"])}


def train_pair(config: ReferencePair, tokenizer: PreTrainedTokenizerBase, rows: dict[str, Int[np.ndarray, "row pos"]]) -> dict[str, Path]:
    """Train both models, or find them trained.

    Args:
        config: sizes and training.
        tokenizer: of both models.
        rows: kind of text -> full rows of token ids.

    Returns:
        Name of a model -> its folder.
    """
    config.out.mkdir(parents=True, exist_ok=True)
    shared = ("layers", "d_model", "heads", "context", "batch", "steps", "learning_rate", "warmup", "weight_decay")
    sizes = NeuronDropout(**{name: getattr(config, name) for name in shared})
    return {name: train_one(sizes, tokenizer, of_model, 0.0, config.seed, config.out / name) for name, of_model in rows_of(rows).items()}


def main(config: ReferencePair) -> None:
    """Read the texts, train both models, and show their accuracy on code and on prose."""
    sizes = NeuronDropout(context=config.context)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(default_folder())
    read: dict[str, list[str]] = {kind: list(train_texts(kind, config.max_train_chars)) for kind in SHARES}
    _, rows = prepare(read, sizes, tokenizer)
    for name, folder in train_pair(config, tokenizer, rows).items():
        model = sepcap.load_model(folder)
        found = {task: sepcap.evaluate(model, task, tokens=15_000).top1 for task in ("local-code", "local-prose")}
        print(f"{name}: " + ", ".join(f"top-1 {value:.3f} on {task}" for task, value in found.items()), flush=True)


if __name__ == "__main__":
    main(tyro.cli(ReferencePair))
