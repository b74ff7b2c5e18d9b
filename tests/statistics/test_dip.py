"""The dip against known answers, and against the definition solved as a linear program (METHODS 3)."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.optimize import linprog

import sepcap
from sepcap.statistics.accumulate import Accumulator, gather
from sepcap.statistics.dip import dip_of

N = 100_000


def of_values(x):
    """Statistics with histograms of one neuron or several, from activations [position, neuron]."""
    z = torch.as_tensor(np.asarray(x, dtype=np.float64))
    z = z[:, None] if z.dim() == 1 else z
    into = Accumulator(tuple(z.shape[1:]), torch.device("cpu"), histogram=True)
    into.update(z[None], torch.ones(1, len(z), dtype=torch.bool))
    return gather("mlp", [into])


@pytest.mark.parametrize("gap", [0.25, 0.5, 1.0, 3.0, 8.0])
def test_two_equal_blocks_with_a_gap(gap):
    """Closed form: the concave part has slope 2d/gap in the gap, which must be at least 1/2 − 2d, so d = gap / (4·(1 + gap))."""
    edges = np.array([0, 1, 1 + gap, 2 + gap])
    assert dip_of(edges, np.array([5, 0, 5])) == pytest.approx(gap / (4 * (1 + gap)), abs=1e-12)


@pytest.mark.parametrize("share", [0.5, 0.3, 0.1])
def test_two_values_give_half_of_the_rarer_one(share):
    n = round(share * 1000)
    x = np.repeat([-1.0, 2.0], [n, 1000 - n])
    assert float(of_values(x).bimodality) == pytest.approx(share / 2, rel=0.02)  # each value is a bin, 1/512 of the range wide


@pytest.mark.parametrize("counts", [[3, 3, 3, 3], [1, 2, 3, 9, 4, 4, 1], [9, 5, 2, 1, 0, 0], [1, 5], [7], [0, 0, 6, 0], [0, 0]])
def test_one_mode_has_no_dip_however_skewed(counts):
    assert dip_of(np.arange(len(counts) + 1.0), np.array(counts)) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("value", [0.0, 2.0, 3.7])
def test_a_constant_neuron_has_no_dip(value):
    assert float(of_values(np.full(100, value)).bimodality) == 0


DRAWS = {
    "normal": lambda rng: rng.normal(size=N),
    "uniform": lambda rng: rng.uniform(size=N),
    "exponential": lambda rng: rng.exponential(size=N),
    "relu of a normal": lambda rng: np.maximum(rng.normal(size=N), 0),
    "log-normal": lambda rng: np.exp(rng.normal(size=N)),
    "two normals that overlap": lambda rng: rng.normal(size=N) + rng.choice([-0.9, 0.9], N),
}


@pytest.mark.parametrize("name", DRAWS)
def test_draws_of_one_mode_have_the_dip_of_noise(name):
    # √N·dip of a uniform distribution is 0.37 on average, and above 0.63 in one of a hundred samples; of others it is less. A mixture of
    # two normals of standard deviation 1 has one mode up to a distance of 2
    assert float(of_values(DRAWS[name](np.random.default_rng(0))).bimodality) < 0.8 / np.sqrt(N)


def test_a_mixture_of_normals_has_the_dip_of_its_distribution():
    from scipy.stats import norm

    found = []
    for distance in (2.5, 4.0, 6.0):
        edges = np.linspace(-5 - distance, 5 + distance, 2001)
        cdf = (norm.cdf(edges - distance / 2) + norm.cdf(edges + distance / 2)) / 2
        exact = dip_of(edges, np.round(np.diff(cdf) * 1e12).astype(np.int64))
        rng = np.random.default_rng(1)
        x = rng.normal(size=N) + rng.choice([-distance / 2, distance / 2], N)
        assert float(of_values(x).bimodality) == pytest.approx(exact, abs=1.5 / np.sqrt(N))
        found.append(exact)
    assert 0.004 < found[0] < found[1] < found[2] < 0.25


def test_it_is_the_definition_as_a_linear_program():
    rng = np.random.default_rng(0)
    for n in range(16):
        counts = rng.integers(0, 8, rng.integers(3, 8))
        counts[[0, -1]] += 1
        edges = np.concatenate([[0], np.cumsum(np.ones(len(counts)) if n % 2 else rng.uniform(0.2, 2, len(counts)))])
        assert dip_of(edges, counts) == pytest.approx(nearest(edges, np.append(0, np.cumsum(counts)) / counts.sum()), abs=1e-8)
    ties = np.array([1, 2, 7, 2, 4, 7])  # both hulls are parallel over several bins
    assert dip_of(np.arange(7.0), ties) == pytest.approx(4 / 3 / 23)


def nearest(x, f):
    """The least d such that some G with |G − f| ≤ d at all edges has rising slopes up to some edge, may jump there, and falling ones."""
    return min(_at(x, f, mode) for mode in range(len(x)))


def _at(x, f, mode):
    # values of G before and after the mode, and d
    at = [*range(mode + 1), *range(mode, len(x))]
    m = len(at)
    rows, bounds = [], []

    def add(parts, bound):
        row = np.zeros(m + 1)
        for i, value in parts:
            row[i] += value
        rows.append(row)
        bounds.append(bound)

    for i, p in enumerate(at):
        add([(i, 1), (m, -1)], f[p])
        add([(i, -1), (m, -1)], -f[p])
    add([(mode, 1), (mode + 1, -1)], 0)
    for start, stop, sign in ((0, mode, 1), (mode + 1, m - 1, -1)):
        slopes = [[(i + 1, 1 / (x[at[i + 1]] - x[at[i]])), (i, -1 / (x[at[i + 1]] - x[at[i]]))] for i in range(start, stop)]
        for slope in slopes:
            add([(i, -value) for i, value in slope], 0)
        for one, next_one in pairwise(slopes):
            add([(i, sign * value) for i, value in one] + [(i, -sign * value) for i, value in next_one], 0)
    found = linprog(np.eye(m + 1)[m], A_ub=np.array(rows), b_ub=bounds, bounds=[(0, 1)] * m + [(0, None)])
    return found.fun if found.status == 0 else np.inf


def test_shift_scale_order_and_merging_have_no_effect():
    rng = np.random.default_rng(3)
    x = rng.normal(size=4000) + rng.choice([-2.0, 2.0], 4000)
    whole = float(of_values(x).bimodality)
    # powers of two keep the bins
    assert float(of_values(-4 * x).bimodality) == pytest.approx(whole, abs=1e-3)
    assert float(of_values(4 * x).bimodality) == pytest.approx(whole, abs=1e-12)
    assert float(of_values(x[:1500]).merge(of_values(x[1500:])).bimodality) == pytest.approx(whole, abs=1e-12)


def test_neurons_and_heads_of_a_model(tiny_opt, letters, tmp_path):
    stats = sepcap.collect(tiny_opt, letters, tokens=300, sites=("mlp", "attn_pre_out"), histogram=True)
    table = stats.bimodality()
    assert len(table) == 2 * 72 + 2 * 4 * 8
    assert table.groupby("site", sort=False)["bimodality"].apply(lambda b: b.is_monotonic_decreasing).all()
    row = table[table["site"] == "attn_pre_out"].iloc[0]
    dips = stats["attn_pre_out"].bimodality
    assert dips.shape == (2, 4, 8)
    assert row["bimodality"] == dips.max() == dips[row["layer"], row["head"], row["neuron"]]
    heads = stats.bimodality(heads=True)
    assert list(heads.columns) == ["site", "layer", "head", "bimodality"]
    best = heads.iloc[0]
    assert best["bimodality"] == pytest.approx(float(dips.mean(-1).max())) == pytest.approx(float(dips[best["layer"], best["head"]].mean()))
    stats.save(tmp_path / "stats.safetensors")
    assert sepcap.Statistics.load(tmp_path / "stats.safetensors").bimodality().equals(table)


def test_what_is_missing_is_said(tiny_opt, letters):
    stats = sepcap.collect(tiny_opt, letters, tokens=100, sites="mlp")
    with pytest.raises(ValueError, match=r"hold no histograms; collect them with collect\(..., histogram=True\)"):
        stats.bimodality()
    with pytest.raises(ValueError, match=r"have no heads.*attn_pre_out"):
        stats.bimodality(heads=True)
