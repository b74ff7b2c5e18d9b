"""How similar activations of different kinds of text are: cosine similarities, layer by layer (METHODS 13)."""

import itertools
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sepcap.checks import checked
from sepcap.models.blocks.places import PLACES, all_layers, head_hooks, norm_behind, place_hooks
from sepcap.statistics.vectors import vectors_at
from sepcap.studies.base.folder import Pieces
from sepcap.studies.base.permutations import corrected, jackknife, p_values, relabel
from sepcap.studies.base.provenance import made_with
from sepcap.studies.base.result import Figures, StudyResult
from sepcap.studies.base.runner import run_study, study
from sepcap.studies.similarity import figures
from sepcap.studies.similarity.config import ActivationSimilarityConfig
from sepcap.tasks.labelled import LabelledTexts, texts_of

Matrix = Float[np.ndarray, "layer text text"]


class ActivationSimilarity(StudyResult):
    """Similarities of all (text, position) pairs per layer, and how well they follow the categories.

    Attributes:
        config: what was compared, positions, the texts and the relabellings; with the model and versions.
        tables: `layers`, one row per layer: within, between and gap (within − between) with the ends of its 95% interval (`low`,
            `high`), `within_text`, the central 95% of the gap under relabelling (`null_low`, `null_high`), `critical` (the smallest
            gap at which p is at most 0.05), `p` corrected for the number of layers and `p_uncorrected`.
            `pairs`: the mean similarity of two categories (`first`, `second`) per layer.
            `texts`: number, category and name of every text.
        tensors: `similarity` [layer, text · position, text · position], all positions of the first text first; `text_similarity`
            [layer, text, text], means over positions, on the diagonal over different positions of one text.

    Two texts of one category count as "within", two of different categories as "between", whatever the positions. Two positions of
    one text count as neither: they share words, which is no evidence about the category. Their mean is `within_text`.
    """

    STUDY: ClassVar[str] = "activation-similarity"
    TITLE: ClassVar[str] = "How similar are activations of different kinds of text?"
    FIGURES: ClassVar[Figures] = {
        "profile": ("Within- minus between-category similarity over layers", figures.similarity_profile),
        "matrices": ("Similarity of every text and position to every other", figures.similarity),
    }

    @property
    def labels(self) -> Int[np.ndarray, " text"]:
        """Number of the category of every text."""
        return pd.factorize(self.tables["texts"]["category"])[0]

    @checked()
    def compared(self, other: "ActivationSimilarity") -> pd.DataFrame:
        """The gap of this result minus the gap of another on the same texts, for example of a model with random weights.

        Returns:
            One row per layer: layer, gap, other_gap, difference, and `low` and `high`, the ends of its 95% interval, paired
            over texts.

        Raises:
            ValueError: the other result has other texts, layers, positions, `what`, `head` or `scaled`.
        """
        for name in ("texts", "what", "head", "layer", "scaled", "positions"):
            if self.config[name] != other.config[name]:
                raise ValueError(f"other: {name} is {other.config[name]!r}, but here {self.config[name]!r}; only the model may differ")
        mine, its = (result.tables["layers"] for result in (self, other))
        if mine["layer"].tolist() != its["layer"].tolist():
            raise ValueError(f"other has {len(its)} layers, this result {len(mine)}: compare models of the same shape")
        sums = [result.tensors["text_similarity"].double().numpy() for result in (self, other)]
        difference = mine["gap"].to_numpy() - its["gap"].to_numpy()
        without = np.subtract(*(gaps_without(matrix, self.labels) for matrix in sums))
        low, high = jackknife(difference, without, self.labels)
        columns = {"gap": mine["gap"], "other_gap": its["gap"], "difference": difference, "low": low, "high": high}
        return pd.DataFrame({"layer": mine["layer"], **columns})

    def summary(self) -> list[str]:
        """What was found, in sentences."""
        config, layers = self.config, self.tables["layers"]
        widest = layers.loc[layers["gap"].idxmax()]
        sure = layers.loc[layers["p"] <= 0.05, "layer"].tolist()
        kind = "scaled cosine" if config["scaled"] else "cosine"
        at = f"position{'s' * (len(config['positions']) > 1)} {_listed(config['positions'])}"
        over = f"corrected for {len(layers)} layers" if len(layers) > 1 else "of this one layer"
        return [
            f"{_in_words(config)}: {kind} similarity at {at} of "
            f"{len(self.labels)} texts ({', '.join(f'{name} {n}' for name, n in config['categories'].items())}).",
            f"Within- minus between-category similarity is largest in layer {widest['layer']:.0f}: {widest['gap']:.3f} "
            f"(within {widest['within']:.3f}, between {widest['between']:.3f}); p = {widest['p']:.2g}, {over}"
            f"{'; no interval, because the layer was chosen by its value' * (len(layers) > 1)}.",
            f"Layers in which texts of a category are more similar than expected by chance (p ≤ 0.05{', corrected' * (len(layers) > 1)}): "
            f"{', '.join(map(str, sure)) or 'none'} of {len(layers)}. Control: {config['relabellings']}.",
        ]


@study(ActivationSimilarityConfig)
@checked()
def compare_activations(
    model: Any, config: ActivationSimilarityConfig, *, out: str | Path | None = None, say: Callable[[str], Any]
) -> ActivationSimilarity:
    """Compare the activations of labelled texts in every layer, and test whether similarity follows the labels.

    Every text is run through the model once; only its vectors at the positions are kept.

    Args:
        model: what `load_model` returns; default is to load `config.model`.
        config: an `ActivationSimilarityConfig`; its fields can also be given as keywords.
        out: folder of the study; a finished one is read. Without one, nothing is saved.
        progress: True announces the work and shows bars, False shows nothing; a function receives the announcements.

    Returns:
        ActivationSimilarity with `.tables["layers"]`, `.tensors["similarity"]`, `.figure("profile")` and `.figure("matrices")`.

    Raises:
        ValueError: texts too short or too few, positions outside of the context, an unknown place, a layer without a head.
        IndexError: a head that does not exist.
        NotImplementedError: an image classifier; a place that the architecture does not have.
        FileExistsError: the folder contains another configuration (the error names the differing fields).

    Source: [OPT]; METHODS section 13.

    Example:
        >>> found = sepcap.compare_activations(model, what="resid_post")  # doctest: +SKIP
        >>> found.tables["layers"][["layer", "gap", "low", "high", "p"]]  # doctest: +SKIP
    """
    texts, positions, length = texts_of(model, config)
    hooks_for, layers = _hooks_for(model, config)
    relabellings = relabel(texts.labels, config.permutations, config.seed)
    rows = texts.rows(model, length)
    resolved = {
        **made_with(model),
        **{name: getattr(config, name) for name in ("what", "head", "layer")},
        "norm": norm_behind(model, config.what),
        "scaled": config.scaled,
        "positions": list(positions),
        "texts": texts.fingerprint,
        "categories": {category: len(held) for category, held in texts.texts.items()},
        "n_documents": len(texts.labels),
        "permutations": config.permutations,
        "relabellings": relabellings.said,
        "seed": config.seed,
    }

    def compute(_: Pieces) -> ActivationSimilarity:
        vectors = vectors_at(model, rows, hooks_for, positions, batch_size=config.batch_size)
        matrices = torch.stack([similarities(one.flatten(0, 1), config.scaled) for one in vectors])
        of_texts = text_similarities(matrices, len(texts.labels)).numpy()
        tables = {
            "layers": _layer_table(of_texts, relabellings.labels, layers),
            "pairs": _pair_table(of_texts, texts, layers),
            "texts": texts.table,
        }
        return ActivationSimilarity(resolved, tables, {"similarity": matrices.float(), "text_similarity": torch.from_numpy(of_texts)})

    return run_study(ActivationSimilarity, resolved, compute, out, lambda: f"{len(rows):,} texts of {length:,} tokens", say)


def _hooks_for(model: Any, config: ActivationSimilarityConfig) -> tuple[Any, list[int]]:
    """The function that makes the hooks, and the layers of the hooks."""
    layers = list(all_layers(model)) if config.layer is None else [config.layer]
    if config.head is None:
        hooks_for = partial(place_hooks, model, config.what, layers)
    else:
        hooks_for = partial(head_hooks, model, [(layer, config.head) for layer in layers])
    hooks_for(lambda layer, vectors: None)  # raises before a folder is made if there is no such head or place
    return hooks_for, layers


def similarities(vectors: Float[Tensor, "vector dim"], scaled: bool = False) -> Float[Tensor, "vector vector"]:
    """Cosine of every vector with every other, or the dot products after division by the largest norm, in float64.

    A zero vector has similarity 0 to every vector, itself included.
    """
    vectors = vectors.double()
    norms = vectors.norm(dim=1, keepdim=True)
    by = norms.max() if scaled else norms
    unit = vectors / torch.where(by > 0, by, torch.ones_like(by))
    return unit @ unit.T


def text_similarities(matrices: Float[Tensor, "layer vector vector"], texts: int) -> Float[Tensor, "layer text text"]:
    """Means over all pairs of positions; on the diagonal, over different positions of one text (NaN for a single position)."""
    blocks = matrices.unflatten(2, (texts, -1)).unflatten(1, (texts, -1))  # layer, text, position, text, position
    means = blocks.mean(dim=(2, 4))
    own = blocks.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)  # layer, text, position, position
    positions = own.shape[-1]
    apart = own.sum(dim=(2, 3)) - own.diagonal(dim1=2, dim2=3).sum(dim=2)
    means.diagonal(dim1=1, dim2=2).copy_(apart / (positions * (positions - 1)) if positions > 1 else torch.full_like(apart, torch.nan))
    return means


def gaps(matrix: Matrix, labels: Int[np.ndarray, "relabelling text"]) -> Float[np.ndarray, "relabelling layer"]:
    """Mean similarity of texts of one category minus that of texts of different categories, for every relabelling."""
    first, second = np.triu_indices(matrix.shape[1], 1)
    values = matrix[:, first, second]
    found = np.empty((len(labels), len(matrix)))
    step = max(1, 4_000_000 // len(first))
    for start in range(0, len(labels), step):
        part = labels[start : start + step]
        same = (part[:, first] == part[:, second]).astype(np.float64)
        pairs = same.sum(axis=1, keepdims=True)
        inside = same @ values.T
        found[start : start + step] = inside / pairs - (values.sum(axis=1) - inside) / (len(first) - pairs)
    return found


def gaps_without(matrix: Matrix, labels: Int[np.ndarray, " text"]) -> Float[np.ndarray, "text layer"]:
    """The gap with each text left out in turn.

    Every pair of categories keeps its weight among all texts. Otherwise a category that loses a text would also lose weight, which
    is no sampling uncertainty, and the intervals would be too narrow.
    """
    counts = np.bincount(labels)
    pairs = np.outer(counts, counts) - np.diag(counts)
    same = np.eye(len(counts), dtype=bool)
    weights = np.where(same, pairs / pairs[same].sum(), -pairs / pairs[~same].sum())
    kept = [np.delete(np.arange(len(labels)), text) for text in range(len(labels))]
    return np.array([(weights * category_means(matrix[:, keep][:, :, keep], labels[keep])).sum(axis=(1, 2)) for keep in kept])


def category_means(matrix: Matrix, labels: Int[np.ndarray, " text"]) -> Float[np.ndarray, "layer category category"]:
    """Mean similarity of two different texts, one from each category."""
    member = np.eye(labels.max() + 1)[labels]
    apart = np.where(np.eye(len(labels), dtype=bool), 0.0, matrix)
    counts = member.sum(axis=0)
    return member.T @ apart @ member / (np.outer(counts, counts) - np.diag(counts))


def _layer_table(matrix: Matrix, relabelled: Int[np.ndarray, "relabelling text"], layers: list[int]) -> pd.DataFrame:
    null, labels = gaps(matrix, relabelled), relabelled[0]
    first, second = np.triu_indices(len(labels), 1)
    same = labels[first] == labels[second]
    values = matrix[:, first, second]
    low, high = jackknife(null[0], gaps_without(matrix, labels), labels)
    p, reached = corrected(null)
    return pd.DataFrame(
        {
            "layer": layers,
            "within": values[:, same].mean(axis=1),
            "between": values[:, ~same].mean(axis=1),
            "within_text": np.diagonal(matrix, axis1=1, axis2=2).mean(axis=1),
            "gap": null[0],
            "low": low,
            "high": high,
            "null_low": np.quantile(null, 0.025, axis=0),
            "null_high": np.quantile(null, 0.975, axis=0),
            "critical": reached,
            "p": p,
            "p_uncorrected": p_values(null),
            "n_documents": len(labels),
        }
    )


def _pair_table(matrix: Matrix, texts: LabelledTexts, layers: list[int]) -> pd.DataFrame:
    means = category_means(matrix, texts.labels)
    pairs = list(itertools.combinations_with_replacement(range(len(texts.categories)), 2))
    rows = [(layer, texts.categories[i], texts.categories[j], means[at, i, j]) for at, layer in enumerate(layers) for i, j in pairs]
    return pd.DataFrame(rows, columns=["layer", "first", "second", "similarity"])


BEHIND = {
    None: "{0} adds",
    "sum": "{0} adds, before the norm of the sum",
    "output": "{0} outputs, before the norm that follows it",
}
"""Value of `norm_behind` -> phrase for the summary."""


def _in_words(config: Mapping[str, Any]) -> str:
    norm, head, layer = config["norm"], config["head"], config["layer"]
    if head is None:
        means = PLACES[config["what"]].means
        means = means if norm is None else means.replace(" adds", BEHIND[norm].format(""))
        return means[0].upper() + means[1:]
    where = "every layer" if layer is None else f"layer {layer}"
    return f"What {BEHIND[norm].format(f'head {head} of {where}')}"


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers)) if len(numbers) <= 3 else f"{numbers[0]}, {numbers[1]}, … {numbers[-1]}"
