"""Number of neurons that two sets share, and that random sets would share (METHODS 12)."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from sepcap.selection.matching import activity_of, quantile_bins
from sepcap.selection.neurons import NeuronSet
from sepcap.statistics.moments import Statistics


def overlap(a: NeuronSet, b: NeuronSet, *, matched: Statistics | Mapping[str, Any] | None = None) -> Any:
    """Overlap of two neuron sets of the same model, per site: in total and layer by layer, against random sets.

    The random sets have as many neurons in every layer as the two sets, drawn uniformly within the layer and independently of each
    other: sets that have only their layers in common share no more than these. The number of neurons that two such sets share is a sum
    of independent hypergeometric variables, one per layer, and its distribution is computed exactly.

    Args:
        a, b: sets over the same sites.
        matched: statistics of the retain task, or site -> activity [layer, neuron]: adds columns for random sets with as many neurons
            in every tenth of a layer's neurons by mean absolute activation. Two sets of neurons with low activity on retain share more
            than their layers explain, even if they have nothing else in common.

    Returns:
        A pandas DataFrame, one row per site and layer, and one total row per site, whose `layer` is NA. Columns: neurons (of
        the site or layer), a, b, both (numbers of neurons), share |A∩B|/|A|, iou |A∩B|/|A∪B|, expected (mean number that random sets
        share, Σ over layers of |A|·|B|/N), ratio both/expected, and log10_p, the logarithm of the probability that random sets share
        at least as many. With `matched` also expected_matched, ratio_matched and log10_p_matched. NaN if a set is empty;
        the ratio is also NaN if nothing can be shared.

    Raises:
        ValueError: sets over different sites or of different models; statistics without one of the sites.

    Source: METHODS section 12; [MOD].

    Example:
        >>> import torch
        >>> a, b = (NeuronSet({"mlp": torch.tensor([row])}) for row in ([True, True, False, False], [True, False, False, False]))
        >>> float(overlap(a, b)["share"].iloc[0]), float(overlap(a, b)["ratio"].iloc[0])
        (0.5, 2.0)
    """
    import pandas as pd

    if set(a.masks) != set(b.masks):
        raise ValueError(f"the sets are over different sites: {', '.join(a.masks)} and {', '.join(b.masks)}")
    both = a & b
    rows = []
    for site, mask in a.masks.items():
        sides = [side.masks[site].flatten(1).cpu().numpy() for side in (a, b, both)]
        layer = np.repeat(np.arange(len(mask))[:, None], sides[0].shape[1], axis=1)
        classes = {"": layer}
        if matched is not None:
            activity = activity_of(matched, site)
            if activity.shape != mask.shape:
                raise ValueError(f"matched: activity of site {site!r} is {list(activity.shape)}, and the sets' masks {list(mask.shape)}")
            bins = quantile_bins(activity.flatten(1)).cpu().numpy()
            classes["_matched"] = layer * (1 + bins.max()) + bins
        for at in (None, *range(len(mask))):
            of = slice(None) if at is None else slice(at, at + 1)
            where = {"site": site, "layer": pd.NA if at is None else at}
            rows.append(where | _compared([side[of] for side in sides], {name: found[of] for name, found in classes.items()}))
    return pd.DataFrame(rows).astype({"layer": "Int64"})


def _compared(sides: Sequence[np.ndarray], classes: Mapping[str, Int[np.ndarray, "layer unit"]]) -> dict[str, float]:
    empty = float("nan")
    a, b, _ = sides
    of_a, of_b, both = (int(side.sum()) for side in sides)
    row: dict[str, float] = {
        "neurons": a.size,
        "a": of_a,
        "b": of_b,
        "both": both,
        "share": both / of_a if of_a else empty,
        "iou": both / (of_a + of_b - both) if of_a + of_b else empty,
    }
    for name, found in classes.items():
        totals, in_a, in_b = (np.bincount(found.ravel(), weights=x.ravel()).astype(int) for x in (np.ones_like(a), a, b))
        expected = float((in_a * in_b / np.maximum(totals, 1)).sum())
        row[f"expected{name}"] = expected
        row[f"ratio{name}"] = both / expected if expected else empty
        row[f"log10_p{name}"] = log10_tail(totals, in_a, in_b, both) if of_a and of_b else empty
    return row


def log10_tail(totals: Sequence[int] | Any, a: Sequence[int] | Any, b: Sequence[int] | Any, both: int) -> float:
    """log10 of P(Σ X_l ≥ both) for independent X_l, the number of a_l marked neurons among b_l drawn without replacement from N_l.

    The distribution of a sum is the convolution of the distributions of its terms. Probabilities far below the smallest double are
    computed by weighting every distribution with e^(θk), with θ such that the mean of the sum is `both`: there the convolution loses
    no digits. The weights are divided out of the tail afterwards.

    Args:
        totals, a, b: N_l, a_l and b_l of every class of neurons.
        both: threshold of the sum.

    Source: Feller, An Introduction to Probability Theory and Its Applications, volume 2, section XVI.7 (associated distributions).

    >>> round(10 ** log10_tail([4], [2], [2], 2), 6)  # one of six pairs
    0.166667
    """
    from scipy.stats import hypergeom

    totals, a, b = (np.asarray(x, dtype=int) for x in (totals, a, b))
    least, most = np.maximum(0, a + b - totals), np.minimum(a, b)
    if both <= least.sum():
        return 0.0
    if both > most.sum():
        return -np.inf
    logs = [hypergeom.logpmf(np.arange(most[i] - least[i] + 1) + least[i], totals[i], a[i], b[i]) for i in np.flatnonzero(most > least)]
    # from here on every X_l is counted from its least value
    wanted = both - int(least.sum())
    theta = _tilt(logs, min(wanted, sum(len(log) - 1 for log in logs) - 0.5))
    whole, shift = np.ones(1), 0.0
    for log in logs:
        tilted, norm = _tilted(log, theta)
        whole, shift = np.convolve(whole, tilted), shift + norm
    k = np.arange(wanted, len(whole))
    tail = float((whole[wanted:] * np.exp(-theta * (k - wanted))).sum())
    return min(0.0, float((np.log(tail) + shift - theta * wanted) / np.log(10)))


def _tilted(log: Float[np.ndarray, " k"], theta: float) -> tuple[Float[np.ndarray, " k"], float]:
    """A distribution weighted by e^(θk), and the logarithm of the sum that it is divided by."""
    weighted = log + theta * np.arange(len(log))
    highest = weighted.max()
    values = np.exp(weighted - highest)
    return values / values.sum(), float(highest + np.log(values.sum()))


def _tilt(logs: Sequence[np.ndarray], mean: float) -> float:
    """θ ≥ 0 at which the sum has the given mean; 0 if its mean is already larger."""

    def reached(theta: float) -> bool:
        return sum(float(_tilted(log, theta)[0] @ np.arange(len(log))) for log in logs) >= mean

    low, high = 0.0, 1.0
    if reached(low):
        return low
    while not reached(high):
        low, high = high, 2 * high
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (low, middle) if reached(middle) else (middle, high)
    return high
