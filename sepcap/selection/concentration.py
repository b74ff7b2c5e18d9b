"""Concentration of a neuron set in clusters, against random sets matched on layer, or on layer and activity (METHODS 12).

In one layer with k clusters let the set have n neurons, with shares s₁ ≥ s₂ ≥ … ≥ s_k of them in the clusters. The curve connects
(0, 0), the points (j/k, s₁ + … + s_j) and (1, 1) by straight lines, and the area under it is

    A = (1/k) Σ_j (s₁ + … + s_j) − 1/(2k)

A set spread evenly over all clusters has A = 1/2; a set in one cluster has A = 1 − 1/(2k). A small set cannot be spread evenly: n < k
neurons in n different clusters already have A = 1 − n/(2k). A is therefore compared with `chance`, the mean area of random sets of n
neurons in the same clusters (a multivariate hypergeometric draw, or the sum of one for every bin of activity), and with `most`, the area
if the n neurons fill as few clusters as possible:

    concentration = (A − chance) / (most − chance)

It is 0 for such a random set and 1 for the most concentrated set of this size. Over several layers or sets, A, chance
and most are means weighted by n, which is the area under the weighted mean of the curves; the number of neurons per layer is
fixed in the draws.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float, Int

from sepcap.checks import checked
from sepcap.selection.clusters import Clusters
from sepcap.selection.matching import activity_of, quantile_bins
from sepcap.selection.neurons import NeuronSet
from sepcap.statistics.moments import Statistics

DRAWS = 1000

Null = Literal["layer", "layer and activity"]
"""What the random sets are matched on: the number of neurons in every layer, or in every bin of activity of every layer."""

LAYER, ACTIVITY = get_args(Null)


@dataclass(frozen=True, eq=False)
class Concentration:
    """Concentration of a neuron set in clusters.

    Attributes:
        table: a pandas DataFrame, one row per layer and a total row, whose `layer` is NA. Columns: neurons (of the set,
            in clusters), area, chance, chance_low and chance_high (95% of random sets), most, concentration, and p, the share of random
            sets with at least the same area, counting the set itself as one of them. NaN if the set is empty.
        curve: cumulative share of the set over clusters, all layers together.
        chance: the same for random sets: mean and 95% limits at every point.
        null: what the random sets of `chance`, `concentration` and p are matched on: "layer" or "layer and activity".
    """

    table: Any
    curve: Float[np.ndarray, " point"]
    chance: Float[np.ndarray, "3 point"]
    null: Null

    @property
    def total(self) -> dict[str, float]:
        """The row of all layers together."""
        return self.table[self.table["layer"].isna()].drop(columns="layer").astype(float).iloc[0].to_dict()


@checked()
def measure_concentration(
    neurons: NeuronSet,
    clusters: Clusters,
    *,
    draws: int = DRAWS,
    seed: int = 0,
    matched: Statistics | Mapping[str, Any] | None = None,
) -> Concentration:
    """Concentration of a set's mlp neurons in clusters, per layer and in total, against random sets.

    Args:
        neurons: a set with a mask of the site "mlp"; neurons in no cluster are left out.
        clusters: what `cluster_neurons` or `index_clusters` returns, of the same model.
        draws: number of random sets.
        seed: seed of the random sets.
        matched: None for random sets with as many neurons in every layer as the set; or statistics of the retain task, or
            {"mlp": activity [layer, neuron]}, for random sets with as many in every tenth of a layer's neurons by mean absolute
            activation. Neurons with similar activity can be in the same clusters, so that a set chosen by activity alone is concentrated.

    Returns:
        Concentration with `.table`, `.curve`, `.chance` and `.null`.

    Raises:
        ValueError: sets or statistics of another model, fewer than one draw.

    Source: METHODS section 12; [MOD].

    Example:
        >>> clusters = sepcap.cluster_neurons(model)  # doctest: +SKIP
        >>> sepcap.measure_concentration(neurons, clusters).total["concentration"]  # doctest: +SKIP
        0.21
    """
    import pandas as pd

    counts, sizes = clusters.counts(neurons).numpy(), clusters.sizes().numpy()
    n = counts.sum(axis=1)
    bins = torch.zeros_like(clusters.labels)
    if matched is not None:
        activity = activity_of(matched, "mlp")
        if activity.shape != clusters.labels.shape:
            raise ValueError(f"matched: activity is {list(activity.shape)}, and the clusters are of {list(clusters.labels.shape)}")
        bins = quantile_bins(activity).cpu()
    mask = neurons.masks["mlp"].cpu()
    # neurons of the set per layer and bin, and all neurons per layer, bin and cluster
    within = [bins == number for number in range(int(bins.max()) + 1)]
    taken = np.stack([clusters.counts(NeuronSet({"mlp": mask & inside})).sum(1).numpy() for inside in within], axis=1)
    there = np.stack([clusters.counts(NeuronSet({"mlp": inside})).numpy() for inside in within], axis=1)
    random = [_random_curves(taken[layer], there[layer], draws, (seed, layer)) for layer in range(len(n))]
    curves = cumulative_share(counts)
    most = np.array([area(fullest(int(n[layer]), sizes[layer])) for layer in range(len(n))])
    areas, chances = area(curves), np.stack([area(found) for found in random])
    rows = [{"layer": layer} | _row(int(n[layer]), areas[layer], chances[layer], most[layer]) for layer in range(len(n))]
    held = n > 0
    weights = n[held] / max(1, n.sum())
    if held.any():
        total = _row(int(n.sum()), weights @ areas[held], weights @ chances[held], weights @ most[held])
        curve = weights @ curves[held]
        by_draw = np.tensordot(weights, np.stack([found for found, any_ in zip(random, held, strict=True) if any_]), axes=1)
    else:
        total = _row(0, np.nan, chances[0], np.nan)
        curve, by_draw = curves[0], random[0]
    table = pd.DataFrame([*rows, {"layer": pd.NA} | total]).astype({"layer": "Int64"})
    chance = np.stack([by_draw.mean(axis=0), *np.percentile(by_draw, (2.5, 97.5), axis=0)])
    return Concentration(table, curve, chance, "layer" if matched is None else "layer and activity")


def cumulative_share(counts: Int[np.ndarray, "*set k"]) -> Float[np.ndarray, "*set point"]:
    """Share of a set in the 0, 1, …, k clusters with the largest shares of it; NaN for an empty set.

    >>> cumulative_share(np.array([1, 0, 3])).tolist()
    [0.0, 0.75, 1.0, 1.0]
    """
    fullest_first = -np.sort(-counts, axis=-1)
    sums = np.concatenate([np.zeros((*counts.shape[:-1], 1)), fullest_first.cumsum(axis=-1)], axis=-1)
    whole = sums[..., -1:]
    return np.divide(sums, whole, out=np.full(sums.shape, np.nan), where=whole > 0)


def area(curve: Float[np.ndarray, "*set point"]) -> Any:
    """Area under curves over [0, 1] with equally spaced points.

    >>> float(area(cumulative_share(np.array([5, 0, 0, 0])))), float(area(cumulative_share(np.array([2, 2, 2, 2]))))
    (0.875, 0.5)
    """
    return np.trapezoid(curve, dx=1 / (curve.shape[-1] - 1), axis=-1)


def fullest(n: int, sizes: Int[np.ndarray, " k"]) -> Float[np.ndarray, " point"]:
    """The highest possible curve of n neurons, which fill the largest clusters one after the other."""
    before = np.concatenate([[0], -np.sort(-sizes)]).cumsum()
    return cumulative_share(np.diff(np.minimum(before, n)))


def _random_curves(
    n: Int[np.ndarray, " bin"], sizes: Int[np.ndarray, "bin k"], draws: int, seed: tuple[int, int]
) -> Float[np.ndarray, "draw point"]:
    """Curves of random sets with n neurons from every bin; `sizes` are the neurons of every bin in each cluster."""
    # in order of size, so that clusterings with the same cluster sizes get the same random sets
    order, rng = np.argsort(-sizes.sum(axis=0), kind="stable"), np.random.default_rng(seed)
    counts = [
        rng.multivariate_hypergeometric(of_bin[order], number, size=draws, method="marginals")
        for number, of_bin in zip(n, sizes, strict=True)
    ]
    return cumulative_share(np.sum(counts, axis=0))


def _row(n: int, found: float, by_draw: Float[np.ndarray, " draw"], most: float) -> dict[str, float]:
    low, high = np.percentile(by_draw, (2.5, 97.5))
    chance = by_draw.mean()
    # the same counts summed in another order differ in the last bit
    as_large = int((by_draw >= found - 1e-12).sum())
    return {
        "neurons": n,
        "area": float(found),
        "chance": float(chance),
        "chance_low": float(low),
        "chance_high": float(high),
        "most": float(most),
        "concentration": float((found - chance) / (most - chance)) if most - chance > 1e-12 else float("nan"),
        "p": (1 + as_large) / (1 + len(by_draw)) if n else float("nan"),
    }
