"""How concentrated a neuron set is in clusters, against random sets matched on layer, or on layer and activity (METHODS 12).

In one layer with k clusters let the set have n neurons, of which a share s₁ ≥ s₂ ≥ … ≥ s_k lies in each cluster. The curve goes from
(0, 0) through (j/k, s₁ + … + s_j) to (1, 1), in straight lines, and the area A lies under it:

    A = (1/k) Σ_j (s₁ + … + s_j) − 1/(2k)

Spread evenly over all clusters, A = 1/2; all in one, A = 1 − 1/(2k). A set of few neurons is never spread evenly: n < k neurons, each
in a cluster of its own, already give A = 1 − n/(2k). Hence `chance`, the mean area of random sets of n neurons in the same clusters
(a multivariate hypergeometric draw, or the sum of one for every bin of activity), `most`, the area when n neurons fill as
few clusters as can hold them, and

    concentration = (A − chance) / (most − chance)

which is 0 for such a random set and 1 for one that is as concentrated as a set of its size can be. Over several layers or sets, A, chance
and most are means weighted by n, which is the area under the weighted mean of the curves; the number of neurons per layer is
held fixed in the draws.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

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
"""What the random sets have in common with the set: its number of neurons in every layer, or in every bin of activity of every layer."""


@dataclass(frozen=True, eq=False)
class Concentration:
    """How concentrated a neuron set is in clusters.

    Attributes:
        table: a pandas DataFrame, one row per layer and one whose `layer` is missing: the total. Columns: neurons (of the set,
            in clusters), area, chance, chance_low and chance_high (95% of random sets), most, concentration, and p, the share of random
            sets whose area is as large or larger, the set itself counted among them. Not a number where the set is empty.
        curve: cumulative share of the set over clusters, all layers together.
        chance: the same of random sets: mean, and the ends of 95% of them at every point.
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
def concentration(
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
        clusters: what `moefy` or `index_clusters` gives, of the same model.
        draws: random sets.
        seed: of the random sets.
        matched: None for random sets that have as many neurons in every layer as the set; or statistics of the retain task, or
            {"mlp": activity [layer, neuron]}, for random sets that have as many in every tenth of a layer's neurons by mean absolute
            activation. Neurons of like activity can lie in the same clusters, so that a set chosen by activity alone is concentrated.

    Returns:
        Concentration with `.table`, `.curve`, `.chance` and `.null`.

    Raises:
        ValueError: sets or statistics of another model, fewer than one draw.

    Source: METHODS section 12; [MOD].

    Example:
        >>> clusters = sepcap.moefy(model)  # doctest: +SKIP
        >>> concentration(neurons, clusters).total["concentration"]  # doctest: +SKIP
        0.21
    """
    import pandas as pd

    if draws < 1:
        raise ValueError(f"draws={draws}: give at least 1")
    counts, sizes = clusters.counts(neurons).numpy(), clusters.sizes().numpy()
    n = counts.sum(axis=1)
    bins = torch.zeros_like(clusters.labels)
    if matched is not None:
        activity = activity_of(matched, "mlp")
        if activity.shape != clusters.labels.shape:
            raise ValueError(f"matched: activity is {list(activity.shape)}, and the clusters are of {list(clusters.labels.shape)}")
        bins = quantile_bins(activity).cpu()
    mask = neurons.masks["mlp"].cpu()
    # neurons of the set per layer and bin, and neurons there are per layer, bin and cluster
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
    """Share of a set in the first 0, 1, …, k clusters, those with the most of it first; not a number for an empty set.

    >>> cumulative_share(np.array([1, 0, 3])).tolist()
    [0.0, 0.75, 1.0, 1.0]
    """
    fullest_first = -np.sort(-counts, axis=-1)
    sums = np.concatenate([np.zeros((*counts.shape[:-1], 1)), fullest_first.cumsum(axis=-1)], axis=-1)
    whole = sums[..., -1:]
    return np.divide(sums, whole, out=np.full(sums.shape, np.nan), where=whole > 0)


def area(curve: Float[np.ndarray, "*set point"]) -> Any:
    """Area under curves over [0, 1], their points equally far from each other.

    >>> float(area(cumulative_share(np.array([5, 0, 0, 0])))), float(area(cumulative_share(np.array([2, 2, 2, 2]))))
    (0.875, 0.5)
    """
    return np.trapezoid(curve, dx=1 / (curve.shape[-1] - 1), axis=-1)


def fullest(n: int, sizes: Int[np.ndarray, " k"]) -> Float[np.ndarray, " point"]:
    """The highest curve that n neurons can have: they fill the largest clusters, one after the other."""
    before = np.concatenate([[0], -np.sort(-sizes)]).cumsum()
    return cumulative_share(np.diff(np.minimum(before, n)))


def _random_curves(
    n: Int[np.ndarray, " bin"], sizes: Int[np.ndarray, "bin k"], draws: int, seed: tuple[int, int]
) -> Float[np.ndarray, "draw point"]:
    """Curves of random sets with n neurons of every bin, of which so many are in each cluster."""
    # in order of size, so that clusters of the same sizes meet the same random sets
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
