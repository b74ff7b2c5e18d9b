"""Scorers of texts: Detoxify, a folder with a Hugging Face classifier, or a function of the user."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sepcap.errors import CorruptFile, missing_extra, unknown
from sepcap.storage import digest_of, sha256_of

Scorer = Callable[[list[str]], Sequence[float]]
"""A number from 0 to 1 for each of a list of texts."""

BATCH = 64
TOXIC = ("toxic", "toxicity")
"""Names of the toxic label if none is given."""


def get_scorer(scorer: str | Path | Scorer, label: str | None, device: torch.device) -> tuple[Scorer, str]:
    """A function from texts to scores, and its name; see `sepcap.evaluate_toxicity` for the accepted kinds."""
    if callable(scorer):
        if label is not None:
            raise ValueError(f"label={label!r}: a function has no labels; leave it out")
        return scorer, getattr(scorer, "__name__", type(scorer).__name__)
    if scorer == "detoxify":
        return _detoxify(label, device), "detoxify"
    if Path(scorer).is_dir():
        return _classifier(Path(scorer), label, device), Path(scorer).name
    hint = "Or the folder of a Hugging Face text-classification model, which must exist, or a function from texts to numbers."
    raise unknown("scorer", str(scorer), ["detoxify"], hint)


def scorer_digest(scorer: str | Path | Scorer) -> str:
    """Digest that tells a scorer from others, for a study that is resumed: version of detoxify, files of a folder, or name of a function.

    Raises:
        ValueError: a function that its module and name do not identify: a lambda, a function inside another, an object.
    """
    if callable(scorer):
        name = f"{getattr(scorer, '__module__', '')}.{getattr(scorer, '__qualname__', '<no name>')}"
        if "<" in name:
            raise ValueError(
                f"scorer={scorer!r} has no name by which a stored study could tell it from others: give a function that is defined in a "
                "module, or leave out out="
            )
        return digest_of(name)
    if scorer == "detoxify":
        return digest_of(["detoxify", version("detoxify")])
    files = sorted(path for path in Path(scorer).iterdir() if path.is_file() and path.suffix != ".md" and not path.name.startswith("."))
    return digest_of({path.name: sha256_of(path) for path in files})


def _detoxify(label: str | None, device: torch.device) -> Scorer:
    try:
        from detoxify import Detoxify  # pyright: ignore[reportMissingImports] (an extra, which need not be installed)
    except ImportError as error:
        raise missing_extra("detoxify", "toxicity", "scorer='detoxify'") from error
    detector = Detoxify("original", device=device)
    chosen = toxic_label(detector.class_names, label)

    def score(texts: list[str]) -> list[float]:
        return [x for part in _batched(texts) for x in np.atleast_1d(detector.predict(part)[chosen]).tolist()]

    return score


def _classifier(folder: Path, label: str | None, device: torch.device) -> Scorer:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    try:
        # safetensors if there are any; older checkpoints are unpickled as tensors only, never as code
        loaded: Any = AutoModelForSequenceClassification.from_pretrained(
            folder, local_files_only=True, weights_only=True, output_loading_info=True
        )
    except UnpicklingError as error:
        raise CorruptFile(
            f"scorer={str(folder)!r}: the weights are pickled and hold more than tensors, or are corrupt; no code in them was run"
        ) from error
    classifier, loading = loaded
    if missing := sorted(loading["missing_keys"]):
        raise ValueError(f"scorer={str(folder)!r} lacks weights of a classifier, which would be random numbers: {', '.join(missing[:3])}")
    config = classifier.to(device).eval().config
    names = [config.id2label[i] for i in range(config.num_labels)]
    column = 0 if len(names) == 1 and label is None else names.index(toxic_label(names, label))
    scores_of = _function_of(config)
    # two fewer than there are positions: RoBERTa counts positions from the index of its padding token on
    longest = min(tokenizer.model_max_length, getattr(config, "max_position_embeddings", 514) - 2)

    @torch.inference_mode()
    def score(texts: list[str]) -> list[float]:
        found: list[float] = []
        for part in _batched([text or " " for text in texts]):  # some tokenizers return no token for an empty text
            rows = tokenizer(part, padding=True, truncation=True, max_length=longest, return_tensors="pt").to(device)
            logits = classifier(**rows).logits.float()
            found += scores_of(logits)[:, column].tolist()
        return found

    return score


def _function_of(config: Any) -> Callable[[Tensor], Tensor]:
    """Function from logits to scores, by the rules of transformers' text-classification pipeline."""
    if config.problem_type == "regression":
        return lambda logits: logits  # the outputs are the scores
    if config.problem_type == "multi_label_classification" or config.num_labels == 1:
        return torch.sigmoid
    return partial(torch.softmax, dim=1)


def _batched(texts: list[str]) -> Iterator[list[str]]:
    return (texts[first : first + BATCH] for first in range(0, len(texts), BATCH))


def toxic_label(names: Sequence[str], label: str | None) -> str:
    """The label given, or the one named "toxic" or "toxicity"."""
    if label is not None:
        if label not in names:
            raise unknown("label", label, names)
        return label
    toxic = [name for name in names if name.lower() in TOXIC]
    if len(toxic) != 1:
        raise ValueError(f"label is missing: give the toxic label of the classifier, label= one of {', '.join(names)}")
    return toxic[0]


def checked_scores(scores: Any, n: int) -> Float[np.ndarray, " n"]:
    """Scores as an array, one in [0, 1] per text."""
    try:
        values = np.asarray(scores, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise TypeError(f"scorer returned a {type(scores).__name__} that is not a list of numbers") from error
    if values.shape != (n,):
        raise ValueError(f"scorer returned an array of shape {values.shape} for {n} texts: it must return one number for each")
    outside = np.flatnonzero(~((values >= 0) & (values <= 1)))  # NaN is outside too
    if len(outside):
        raise ValueError(f"scorer returned {values[outside[0]]} for text {outside[0]}: scores must be between 0 and 1")
    return values
