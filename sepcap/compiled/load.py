"""Models compiled from programs, with a label for every neuron: the programs that use it (METHODS 20)."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from sepcap.checks import checked
from sepcap.compiled.programs import GIVEN, PAIRS, Pair
from sepcap.errors import unknown
from sepcap.models.loading.load import load_model
from sepcap.selection.neurons import NeuronSet
from sepcap.storage import load_tensors
from sepcap.tasks.load import load_task
from sepcap.tasks.task import Task

FOLDER = Path(str(files("sepcap"))) / "assets" / "compiled"
"""Folder of the shipped models, each in Hugging Face format."""

LABELS = "labels.safetensors"


@dataclass(frozen=True, repr=False)
class CompiledModel:
    """A model that computes two programs exactly, and the programs that use each of its neurons.

    Attributes:
        name: name in `compiled_models()`.
        model: what `load_model` returns.
        tasks: "forget" and "retain": texts of the programs. Only the words after = are prediction targets.
        labels: "forget", "retain", "shared" and "unused": the neurons that only one program uses, that both use, and that none uses, at
            the sites mlp, attn_pre_out and attn_value. Every neuron has one label.
        pair: the programs, with `.forget.answer(words)` and `.forget.inputs(n)`.
        folder: the folder, in Hugging Face format; its `program.json` names the step of every neuron.
    """

    name: str
    model: Any
    tasks: Mapping[str, Task]
    labels: Mapping[str, NeuronSet]
    pair: Pair
    folder: Path

    def __repr__(self) -> str:
        counts = ", ".join(f"{neurons.count('mlp')} {label}" for label, neurons in self.labels.items())
        return f"CompiledModel({self.name}: {self.pair.forget.name} / {self.pair.retain.name}; mlp neurons: {counts})"

    @cached_property
    def steps(self) -> dict[str, Any]:
        """Program step of every neuron: for "mlp" by layer, for "attention" by layer, head and dimension; "" if there is none."""
        return json.loads((self.folder / "program.json").read_text(encoding="utf-8"))["steps"]

    @checked()
    def metrics(self, scores: Mapping[str, Any], *, among: Literal["used", "all"] = "used") -> pd.DataFrame:
        """Measure, per site, how well scores identify the neurons that only the forget program uses.

        Args:
            scores: site -> score of every neuron, such as `Scores`; the highest-scoring neurons are predicted to be forget neurons.
            among: "used" excludes the unused neurons; "all" counts them as negatives.

        Returns:
            DataFrame with site, among, neurons (ranked), forget (of them), auroc (the probability that a random forget neuron scores
            higher than a random other one, ties 1/2), auprc (average precision: the mean over forget neurons of the share of forget
            neurons among those with at least its score), and recall: the share of the forget neurons among as many highest-scoring
            ones, which is the precision too. Ties across the cut count with their probability.

        Raises:
            ValueError: scores of another model, or a NaN.

        Example:
            >>> compiled.metrics(sepcap.score(forget, retain))  # doctest: +SKIP
        """
        rows = []
        for site, values in scores.items():
            wanted, unused = (self.labels[label].masks[site] for label in ("forget", "unused"))
            if tuple(values.shape) != tuple(wanted.shape):
                raise ValueError(f"scores of site {site!r} are {list(values.shape)}, but {self.name} has {list(wanted.shape)}")
            ranked = ~unused if among == "used" else unused | True
            score = values.detach().double().cpu()[ranked].numpy()
            if np.isnan(score).any():
                raise ValueError(f"{int(np.isnan(score).sum())} scores of site {site!r} are NaN")
            rows.append({"site": site, "among": among, **ranking_metrics(score, wanted[ranked].numpy())})
        return pd.DataFrame(rows)


def ranking_metrics(score: np.ndarray, wanted: np.ndarray) -> dict[str, float]:
    """AUROC, average precision, and recall at the number of positives, of a ranking by score; NaN if all or none are positive.

    >>> ranking_metrics(np.array([3.0, 2.0, 2.0, 1.0]), np.array([True, True, False, False]))
    {'neurons': 4, 'forget': 2, 'auroc': 0.875, 'auprc': 0.8333333333333333, 'recall': 0.75}
    """
    levels, inverse = np.unique(-score, return_inverse=True)
    found, size = (np.bincount(inverse, weights=kind, minlength=len(levels)) for kind in (wanted, np.ones(len(wanted))))
    hits, taken, n, other = found.cumsum(), size.cumsum(), wanted.sum(), (~wanted).sum()
    if not n or not other:
        return {"neurons": len(wanted), "forget": int(n), **dict.fromkeys(("auroc", "auprc", "recall"), float("nan"))}
    beaten = other - (taken - hits)  # number of negatives that score below each level
    cut = np.searchsorted(taken, n)
    sure = hits[cut] - found[cut], n - (taken[cut] - size[cut])
    return {
        "neurons": len(wanted),
        "forget": int(n),
        "auroc": float((found * (beaten + (size - found) / 2)).sum() / (n * other)),
        "auprc": float((found * hits / taken).sum() / n),
        "recall": float((sure[0] + sure[1] * found[cut] / size[cut]) / n),
    }


def compiled_models() -> pd.DataFrame:
    """The models that are shipped with labels: one row each, indexed by name.

    Returns:
        DataFrame with forget and retain (the programs), variant, layers, d_model, the number of labelled neurons that each program uses
        alone (`forget_neurons`, `retain_neurons`), that both use (`shared_neurons`) and none (`unused_neurons`), mlp and attention
        values together, and joined: what the programs share.

    Example:
        >>> sepcap.compiled_models().index[0]  # doctest: +SKIP
        'frequent-and-balanced'
    """
    rows = {}
    for name, pair in PAIRS.items():
        stored, config = (json.loads((FOLDER / name / file).read_text(encoding="utf-8")) for file in ("program.json", "config.json"))
        counts = {f"{label}_neurons": n["mlp"] + n["attn_value"] for label, n in stored["neurons"].items()}
        sizes = {"layers": config["num_hidden_layers"], "d_model": config["hidden_size"]}
        programs = {"forget": pair.forget.name, "retain": pair.retain.name, "variant": pair.variant}
        rows[name] = {**programs, **sizes, **counts, "joined": pair.joined}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("model")


@checked()
def load_compiled(name: str, *, texts: int = 4_000, seed: int = 0, **options: Any) -> CompiledModel:
    """Load a model that computes two programs exactly, with its tasks and with the programs that use each of its neurons.

    Args:
        name: one of `compiled_models()`.
        texts: random texts per task, of which the distinct ones are used. Their hashes split them into a part for collecting
            statistics and one for evaluation.
        seed: of the texts.
        options: of `load_model`, such as device.

    Raises:
        ValueError: an unknown name; the nearest is suggested.

    Example:
        >>> compiled = sepcap.load_compiled("sort-and-reverse")  # doctest: +SKIP
        >>> forget, retain = (sepcap.collect(compiled.model, task, tokens=5_000) for task in compiled.tasks.values())  # doctest: +SKIP
        >>> compiled.metrics(sepcap.score(forget, retain))  # doctest: +SKIP
    """
    if name not in PAIRS:
        raise unknown("name", name, PAIRS, "`sepcap.compiled_models()` describes them.")
    pair, folder = PAIRS[name], FOLDER / name
    masks, _ = load_tensors(folder / LABELS, "labels")
    labels: dict[str, dict[str, Any]] = {}
    for key, mask in masks.items():
        label, site = key.split("/")
        labels.setdefault(label, {})[site] = mask
    tasks = {
        role: load_task(program.texts(texts, seed), name=f"{name}/{program.name}", answers_after=GIVEN)
        for role, program in (("forget", pair.forget), ("retain", pair.retain))
    }
    sets = {label: NeuronSet(sites, {"label": label, "model": name}) for label, sites in labels.items()}
    return CompiledModel(name, load_model(folder, **options), tasks, sets, pair, folder)
