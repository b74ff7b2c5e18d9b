"""MoEfication: cluster the mlp neurons of every layer by their input weights, in clusters of equal size (METHODS 12)."""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

import sepcap
from sepcap.checks import checked
from sepcap.errors import CorruptFile, missing_extra
from sepcap.models.blocks.views import mlp_input_weights
from sepcap.models.sites import n_layers, site_shape
from sepcap.progress import progress as progress_bar
from sepcap.progress import reporting
from sepcap.selection.neurons import NeuronSet
from sepcap.storage import html_card, load_tensors, save_tensors

K = 96
"""Clusters per layer in [MOD]."""

MAX_ITER = 300


@dataclass(frozen=True, eq=False)
class Clusters:
    """The mlp neurons of every layer, each in one of k clusters.

    Attributes:
        labels: cluster of every neuron, from 0 to k − 1 within its layer; −1 for a neuron without input weights, which is in no cluster.
        k: clusters per layer.
        fingerprint: hash of the input weights that were clustered.
        info: how the clusters were made.

    Example:
        >>> clusters = sepcap.cluster_neurons(model)  # doctest: +SKIP
        >>> sepcap.delete(model, clusters.neurons(model, [(0, 17)]))  # doctest: +SKIP
    """

    labels: Int[Tensor, "layer neuron"]
    k: int
    fingerprint: str
    info: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"k={self.k}: give at least 1 cluster")
        low, high = (int(end) for end in self.labels.aminmax())
        if low < -1 or high >= self.k:
            raise ValueError(f"labels: they range from {low} to {high}; with k={self.k} give labels from −1 (no cluster) to {self.k - 1}")

    def sizes(self) -> Int[Tensor, "layer k"]:
        """Neurons per cluster."""
        return self._tally(self.labels >= 0)

    @checked()
    def counts(self, neurons: NeuronSet) -> Int[Tensor, "layer k"]:
        """Number of neurons of a set in every cluster; neurons in no cluster are left out.

        Raises:
            ValueError: the set has no mlp mask, or is of a model of another shape.
        """
        if "mlp" not in neurons.masks:
            raise ValueError(f"neurons has masks of {', '.join(neurons.masks) or 'no site'}; the clusters are of the site 'mlp'")
        mask = neurons.masks["mlp"].cpu()
        if mask.shape != self.labels.shape:
            raise ValueError(
                f"neurons: the mask of site 'mlp' is {list(mask.shape)} but the clusters are of {list(self.labels.shape)}: "
                "the set was made for another model"
            )
        return self._tally(mask & (self.labels >= 0))

    def _tally(self, mask: Tensor) -> Tensor:
        layers = torch.arange(len(self.labels))[:, None].expand_as(self.labels)
        flat = (layers * self.k + self.labels)[mask]
        return torch.bincount(flat, minlength=len(self.labels) * self.k).view(-1, self.k)

    @checked()
    def check(self, model: Any) -> None:
        """Raise if the input weights of a model are not those that were clustered.

        Raises:
            ValueError: another model, or the same model after neurons were deleted or weights trained.
        """
        shape = site_shape(model, "mlp")
        if tuple(self.labels.shape) != shape:
            raise ValueError(f"clusters are of {list(self.labels.shape)} mlp neurons but this model has {list(shape)}: recompute them")
        found = input_fingerprint(model)
        if found != self.fingerprint:
            raise ValueError(
                f"clusters were made from other input weights (fingerprint {self.fingerprint}) than those of {model.cfg.model_name} "
                f"({found}): it is another model, or it was edited since. Recompute them with sepcap.cluster_neurons(model)"
            )

    @checked()
    def neurons(self, model: Any, chosen: Iterable[tuple[int, int]]) -> NeuronSet:
        """Whole clusters as a neuron set, to ablate or delete.

        Args:
            model: the model whose neurons were clustered.
            chosen: (layer, cluster) pairs.

        Raises:
            ValueError: a model with other weights.
            IndexError: a cluster that does not exist.
        """
        self.check(model)
        mask = torch.zeros_like(self.labels, dtype=torch.bool)
        for layer, cluster in chosen:
            if not (0 <= layer < len(self.labels) and 0 <= cluster < self.k):
                raise IndexError(f"cluster {(layer, cluster)} does not exist: {len(self.labels)} layers of {self.k} clusters")
            mask[layer] |= self.labels[layer] == cluster
        return NeuronSet({"mlp": mask})

    def examine(self, model: Any, chosen: Iterable[tuple[int, int]], **how: Any) -> Any:
        """Profiles of the neurons of some clusters, given as (layer, cluster): texts, tokens, logits; see `sepcap.examine` (METHODS 23)."""
        return sepcap.examine(model, self.neurons(model, chosen), **how)

    @checked()
    def save(self, path: str | Path) -> None:
        """Write one safetensors file, atomically."""
        meta = {"kind": "clusters", "k": self.k, "fingerprint": self.fingerprint, "info": dict(self.info)}
        save_tensors(path, {"labels": self.labels}, meta)

    @classmethod
    @checked()
    def load(cls, path: str | Path) -> "Clusters":
        """Read what `save` wrote."""
        tensors, meta = load_tensors(path, "clusters", ("labels",))
        try:
            return cls(tensors["labels"], meta["k"], meta["fingerprint"], meta["info"])
        except ValueError as error:
            raise CorruptFile(f"{path} is corrupt ({error}); cluster the neurons again") from error

    def __repr__(self) -> str:
        layers, width = self.labels.shape
        sizes = self.sizes()
        none = int((self.labels < 0).sum())
        left_out = f", {none:,} without input weights in no cluster" if none else ""
        return f"Clusters({layers} layers × {width:,} neurons in {self.k} of {_range(sizes)} each, {self.info.get('method')}{left_out})"

    def _repr_html_(self) -> str:
        import pandas as pd

        sizes, none = self.sizes(), (self.labels < 0).sum(dim=1)
        rows = [
            {"layer": layer, "clusters": self.k, "neurons each": _range(sizes[layer]), "in none": int(none[layer])}
            for layer in range(len(sizes))
        ]
        facts = {name: self.info.get(name) for name in ("model", "method", "seed", "n_init")}
        return html_card("Clusters", facts | {"fingerprint": self.fingerprint}, pd.DataFrame(rows))


def _range(sizes: Tensor) -> str:
    low, high = (int(end) for end in sizes.aminmax())
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def input_fingerprint(model: Any) -> str:
    """Hash of the mlp input weights of all layers, independent of the precision in which the same values are stored."""
    digest = hashlib.sha256()
    for layer in range(n_layers(model)):
        weights = mlp_input_weights(model, layer)
        digest.update(str(tuple(weights.shape)).encode() + weights.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


@checked()
def cluster_neurons(
    model: Any,
    k: int = K,
    *,
    seed: int = 0,
    n_init: int = 1,
    max_iter: int = MAX_ITER,
    progress: bool | Callable[[str], Any] = True,
) -> Clusters:
    """Cluster the mlp neurons of every layer by the direction of their input weights, in clusters of equal size.

    Balanced k-means on the L2-normalised columns of W_in, the up-projection of a gated mlp. If the width is not divisible
    by k, sizes differ by at most one. Neurons without input weights (deleted ones) have no direction and are in no cluster.

    Every k-means step assigns the neurons by a minimum-cost flow that minimises the sum of distances, to 0.001 (the library's
    choice; the start with the least sum of squares is kept). Seconds per layer and start, three steps, k = 96, on one core:

        =========  =======  =======  =======
        d_model    512      2,048    4,096
        =========  =======  =======  =======
        1,024      0.4
        4,096      2.5      6.8
        8,192      6.2      17.6
        16,384                       87
        =========  =======  =======  =======

    (rows: neurons), which is 7 minutes for a model of the size of OPT-1.3B and 45 minutes for OPT-6.7B. Memory: about
    four times the layer's W_in in float64, and 140 bytes per neuron and cluster.

    Args:
        model: what `load_model` returns.
        k: clusters per layer.
        seed: seed of the initial centres.
        n_init: number of starts; the one with the least sum of squares is kept. The library's own default is 10; on the embedded
            model single starts are within 1% of each other.
        max_iter: maximum number of k-means steps; it stops earlier if the centres no longer move (after 2 to 4 on the embedded model).
        progress: whether to print the estimated time and show a bar, or a function that receives the estimate.

    Returns:
        Clusters.

    Raises:
        ImportError: without the extra `clusters`.
        ValueError: more clusters than neurons.

    Source: [MOE] section 3.2, [MOD]; METHODS section 12.

    Example:
        >>> sepcap.cluster_neurons(sepcap.load_model(), k=96)  # doctest: +SKIP
        Clusters(6 layers × 1,024 neurons in 96 of 10 to 11 each, moefied)
    """
    check_clustering(model, k)
    layers = range(n_layers(model))
    labels, inertias = [], []
    with reporting(progress) as say:
        say(moefy_cost(model, k, n_init))
        with progress_bar(total=len(layers) * n_init, desc="cluster neurons", unit="start", leave=True) as bar:
            for layer in layers:
                found, inertia = cluster_layer(model, layer, k, seed=seed, n_init=n_init, max_iter=max_iter, done=bar.update)
                labels.append(found)
                inertias.append(inertia)
    how = {"method": "moefied", "model": str(model.cfg.model_name), "seed": seed, "n_init": n_init, "max_iter": max_iter}
    return Clusters(torch.stack(labels), k, input_fingerprint(model), how | {"inertia": inertias})


@checked()
def index_clusters(model: Any, k: int = K) -> Clusters:
    """The control clustering: neuron n is in cluster n mod k, not counting neurons without input weights.

    Cluster sizes are those of `cluster_neurons`. A random clustering would be the same control as a random neuron set, which
    `sepcap.selection.concentration` draws.

    Args:
        model: what `load_model` returns.
        k: clusters per layer.

    Source: [MOD]; METHODS section 12.
    """
    check_clustering(model, k)
    live = torch.stack([mlp_input_weights(model, layer).norm(dim=1) > 0 for layer in range(n_layers(model))])
    return Clusters(labels_by_index(live, k), k, input_fingerprint(model), {"method": "index", "model": str(model.cfg.model_name)})


def labels_by_index(live: Bool[Tensor, "layer neuron"], k: int) -> Int[Tensor, "layer neuron"]:
    """Index mod k among the live neurons of every layer, −1 for the others."""
    return torch.where(live, (live.cumsum(dim=1) - 1) % k, -1)


def check_clustering(model: Any, k: int) -> None:
    """Raise if the neurons of a model cannot be put into this many clusters.

    Raises:
        ValueError: more clusters than a layer has neurons with input weights.
        FloatingPointError: NaN or infinite weights.
    """
    layers, width = site_shape(model, "mlp")
    for layer in range(layers):
        norms = mlp_input_weights(model, layer).norm(dim=1)
        if not bool(norms.isfinite().all()):
            raise FloatingPointError(f"model: mlp input weights of layer {layer} are NaN or infinite and cannot be clustered")
        live = int((norms > 0).sum())
        if k > live:
            raise ValueError(f"k={k}: layer {layer} has {live:,} of {width:,} mlp neurons with input weights; give at most {live:,}")


def moefy_cost(model: Any, k: int, n_init: int = 1) -> str:
    """One sentence that describes the clustering of a model and its approximate time."""
    layers, width = site_shape(model, "mlp")
    d_model = mlp_input_weights(model, 0).shape[1]
    seconds = layers * n_init * seconds_per_start(width, d_model, k)
    long = f"{seconds / 60:,.0f} min" if seconds > 90 else f"{max(1, seconds):.0f} s"
    starts = f"{n_init} start{'s' * (n_init != 1)}"
    return f"cluster {layers} layers of {width:,} neurons × {d_model:,} into {k} each, {starts}: about {long} on one core"


def seconds_per_start(neurons: int, d_model: int, k: int) -> float:
    """Seconds of one start in one layer, fitted to the times in `cluster_neurons` (three steps); within a third of each of them."""
    return 17.6 * (neurons / 8192) ** 1.35 * (d_model / 2048) ** 0.76 * k / 96


def cluster_layer(
    model: Any,
    layer: int,
    k: int,
    *,
    seed: int = 0,
    n_init: int = 1,
    max_iter: int = MAX_ITER,
    done: Callable[[], Any] = lambda: None,
) -> tuple[Int[Tensor, " neuron"], float]:
    """Labels of one layer and their sum of squared distances to the centres; see `cluster_neurons`.

    `done` is called after every start.
    """
    weights = mlp_input_weights(model, layer)
    norms = weights.norm(dim=1)
    live = norms > 0
    labels = torch.full(norms.shape, -1)
    directions = (weights[live] / norms[live, None]).numpy()
    starts = []
    for start in range(n_init):
        starts.append(_balanced_kmeans(directions, k, max_iter, np.random.SeedSequence([seed, layer, start])))
        done()
    inertia, best = min(starts, key=lambda found: found[0])
    labels[live] = torch.from_numpy(best)
    return labels, inertia


def _balanced_kmeans(
    directions: Float[np.ndarray, "neuron d_model"], k: int, max_iter: int, seed: np.random.SeedSequence
) -> tuple[float, Int[np.ndarray, " neuron"]]:
    """Sum of squares and labels of one start."""
    try:
        from k_means_constrained import KMeansConstrained
    except ImportError as error:
        raise missing_extra("k-means-constrained", "clusters", "clustering neurons") from error

    n = len(directions)
    found: Any = KMeansConstrained(
        n_clusters=k, size_min=n // k, size_max=-(-n // k), n_init=1, max_iter=max_iter, random_state=int(seed.generate_state(1)[0])
    ).fit(directions)
    return float(found.inertia_), found.labels_.astype(np.int64)
