"""Divergences with closed forms, planted in activations (METHODS 4)."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sepcap
from sepcap.selection.divergences import COMMON_BINS
from sepcap.selection.importance import IMPORTANCES
from sepcap.statistics.accumulate import Accumulator, gather
from sepcap.statistics.histogram import NARROWEST
from sepcap.statistics.moments import Statistics

NAMES = ("kl", "js", "wasserstein")


def statistics(z: torch.Tensor) -> Statistics:
    """Statistics with histograms of activations [position, neuron]."""
    accumulator = Accumulator((z.shape[1],), z.device, histogram=True)
    accumulator.update(z[None], torch.ones(1, len(z), dtype=torch.bool))
    return Statistics({"mlp": gather("mlp", [accumulator])})


def scores(forget: torch.Tensor, retain: torch.Tensor) -> dict[str, list[float]]:
    """All divergences of two sets of activations, one number per neuron."""
    if forget.dim() == 1:
        forget, retain = forget[:, None], retain[:, None]
    f, r = statistics(forget), statistics(retain)
    return {name: sepcap.score(f, r, name)["mlp"][0].tolist() for name in NAMES}


def normal(n: int, mean: float, std: float) -> torch.Tensor:
    """Quantiles of a normal distribution: a sample without chance, shuffled."""
    q = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    z = mean + std * math.sqrt(2) * torch.erfinv(2 * q - 1)
    return z[torch.randperm(n, generator=torch.Generator().manual_seed(0))].float()


def test_constants_apart():
    got = scores(torch.full((50,), 2.0), torch.full((50,), -1.25))
    assert got["wasserstein"] == [3.25]
    assert got["js"] == pytest.approx([math.log(2)])
    # half a position more in both bins: p = (50.5, 0.5)/51 and q the reverse
    assert got["kl"] == pytest.approx([50 / 51 * math.log(50.5 / 0.5)])


def test_shares_of_two_values():
    # forget is 1 at 3 of 4 positions, retain at 1 of 4; p = (¼, ¾), q = (¾, ¼), m = (½, ½)
    got = scores(torch.tensor([0.0, 1.0, 1.0, 1.0]), torch.tensor([0.0, 0.0, 0.0, 1.0]))
    assert got["wasserstein"] == pytest.approx([0.5])  # half of the mass moves by 1
    assert got["js"] == pytest.approx([math.log(2) + 0.25 * math.log(0.25) + 0.75 * math.log(0.75)])
    assert got["kl"] == pytest.approx([2 / 5 * math.log(3.5 / 1.5)])  # p = (1.5, 3.5)/5


def test_the_direction_of_kl():
    """Forget spread wide, retain narrow: positions where retain has nothing cost much; the other way round they cost little."""
    wide, narrow = normal(4000, 0.0, 1.0), normal(4000, 0.0, 0.25)
    assert scores(wide, narrow)["kl"][0] > 2 * scores(narrow, wide)["kl"][0]
    # KL(N(0, ¼²) ‖ N(0, 1)) = ln 4 + 1/32 − 1/2; bins can only lose of it
    exact = math.log(4) + 1 / 32 - 1 / 2
    assert 0.92 * exact < scores(narrow, wide)["kl"][0] < exact


@pytest.mark.parametrize("shift", [0.02, 0.5, 3.0])
def test_shifted_normals(shift):
    got = scores(normal(20_000, 1.0 + shift, 0.7), normal(20_000, 1.0, 0.7))
    assert got["wasserstein"] == pytest.approx([shift], rel=1e-3)
    if shift == 0.5:
        assert got["kl"] == pytest.approx([shift**2 / (2 * 0.7**2)], rel=0.05)


def test_normals_of_other_spread():
    # |F − G| of N(0, σ) and N(0, τ) integrates to |σ − τ|·√(2/π); their means are equal
    got = scores(normal(20_000, 0.0, 1.5), normal(20_000, 0.0, 1.0))
    assert got["wasserstein"] == pytest.approx([0.5 * math.sqrt(2 / math.pi)], rel=0.02)


def test_js_of_normals_by_quadrature():
    x = torch.linspace(-12, 12, 24_001, dtype=torch.float64)
    p, q = (torch.exp(-((x - mean) ** 2) / 2) / math.sqrt(2 * math.pi) for mean in (1.0, 0.0))
    integrand = (torch.xlogy(p, 2 * p / (p + q)) + torch.xlogy(q, 2 * q / (p + q))) / 2
    assert scores(normal(20_000, 1.0, 1.0), normal(20_000, 0.0, 1.0))["js"] == pytest.approx(
        [float(torch.trapezoid(integrand, x))], rel=0.02
    )


def test_a_neuron_that_speaks_on_one_task_only():
    """A ReLU neuron, silent on retain and at one position in four of forget."""
    speaks = torch.cat([torch.zeros(300), normal(100, 5.0, 0.1)])
    got = scores(speaks, torch.zeros(400))
    # p = (¾ at zero, ¼ elsewhere), q = (1, 0): js = ½[¾ ln(¾/⅞) + ¼ ln 2] + ½ ln(1/⅞)
    assert got["js"] == pytest.approx([(0.75 * math.log(6 / 7) + 0.25 * math.log(2) + math.log(8 / 7)) / 2])
    assert got["wasserstein"] == pytest.approx([5 / 4], rel=0.01)


@pytest.mark.thorough
@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.floats(-(2.0**40), 2.0**40, width=32), min_size=1, max_size=30),
    st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=30),
)
def test_laws(one, other):
    f, r = torch.tensor(one), torch.tensor(other)
    there, back, same = scores(f, r), scores(r, f), scores(f, f.flip(0))
    for name in NAMES:
        assert math.isfinite(there[name][0])
        assert there[name][0] >= 0
        assert same[name][0] <= 1e-6 * max(1.0, float(f.abs().max()))
    assert there["js"][0] <= math.log(2) + 1e-12
    assert there["js"] == pytest.approx(back["js"])
    assert there["wasserstein"] == pytest.approx(back["wasserstein"])
    assert scores(f, f) == {name: [0.0] for name in NAMES}
    # against the distance of the sorted activations, each repeated to a common number
    exact = (f.double().sort().values.repeat_interleave(len(r)) - r.double().sort().values.repeat_interleave(len(f))).abs().mean()
    reach = float(torch.cat([f, r]).max().double() - torch.cat([f, r]).min().double())
    bin_width = max(reach / 510, 2.0**NARROWEST)
    assert abs(there["wasserstein"][0] - float(exact)) <= bin_width + 1e-6 * float(torch.cat([f, r]).abs().max())


def test_units_wasserstein_scales_and_the_others_do_not():
    f, r = normal(3000, 0.5, 1.0), normal(3000, 0.0, 1.3)
    small, large = scores(f, r), scores(f * 8, r * 8)
    assert large["wasserstein"] == pytest.approx([8 * small["wasserstein"][0]])
    assert large["js"] == pytest.approx(small["js"])
    assert large["kl"] == pytest.approx(small["kl"])


def test_a_planted_neuron_has_the_highest_score():
    f, r = (torch.randn(2000, 60, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    f[:, 23] = f[:, 23].sign() * 2  # mean 0 as before: two modes instead of one
    got = scores(f, r)
    for name in NAMES:
        assert int(torch.tensor(got[name]).argmax()) == 23
    # what chance makes of the others: (bins in use)/4N and (bins in use)/N, at most
    assert max(x for i, x in enumerate(got["js"]) if i != 23) < COMMON_BINS / (4 * 2000) * 1.5
    assert max(x for i, x in enumerate(got["kl"]) if i != 23) < COMMON_BINS / 2000 * 1.5


@pytest.mark.parametrize("name", NAMES)
def test_divergences_are_scores_by_themselves_of_every_site(tiny_opt, letters, digits, name):
    sites = ("mlp", "attn_pre_out", "attn_value")
    f, r = (sepcap.collect(tiny_opt, task, tokens=300, sites=sites, histogram=True) for task in (letters, digits))
    pair = IMPORTANCES[name].pair
    assert pair is not None
    scored = sepcap.score(f, r, name, eps=100.0)
    for site in sites:
        assert scored[site].shape == f[site].shape
        assert bool(scored[site].isfinite().all())
        assert bool((scored[site] > 0).any())
        assert torch.equal(scored[site], pair(f[site], r[site]))
    with pytest.raises(ValueError, match=r"'mlp' hold no histograms; collect them with collect\(\.\.\., histogram=True\)"):
        sepcap.score(f, sepcap.collect(tiny_opt, digits, tokens=300, sites=sites), name)
