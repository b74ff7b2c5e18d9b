"""Two-task scores besides the ratio: differences, the guard, and what is refused (METHODS 5)."""

import pytest
import torch

import sepcap
from sepcap.selection.importance import IMPORTANCES
from sepcap.selection.names import GRADIENTS, OF_BOTH, SIGNED, gradients_for, resolve_contrast
from sepcap.statistics.gradients import GradientSums
from sepcap.statistics.moments import SUMS, NeuronStatistics, Statistics

N, ROWS = 10, 4


def stats(values, task="t"):
    """Statistics in which every importance from gradients is a multiple of `values`."""
    x = torch.tensor([values], dtype=torch.float64)
    names = ("g", "zg", "zg_abs", "row_squares", "relp_g", "relp_zg", "ig")
    sums = {name: x * (-N if name in ("zg", "relp_zg") else ROWS if name == "row_squares" else N) for name in names}
    gradients = GradientSums(N, ROWS, 1.0, sums | {"snip": x[..., None].abs()}, 4, 2.0)
    of_activations = dict.fromkeys(SUMS, N * x.abs())
    return Statistics({"mlp": NeuronStatistics("mlp", N, of_activations, -x, x, None, gradients, torch.ones_like(x))}, {"task": task})


F, R = [4.0, 1.0, 2.0, 0.0, 3.0], [1.0, 4.0, 0.0, 2.0, 3.0]


@pytest.mark.parametrize("name", ["taylor", "fisher", "snip", "atp_abs", "ig_abs", "relp_abs"])
def test_a_ratio_has_an_eps_relative_to_the_mean_on_retain(name):
    f, r = torch.tensor(F, dtype=torch.float64), torch.tensor(R, dtype=torch.float64)
    torch.testing.assert_close(sepcap.score(stats(F), stats(R), name)["mlp"][0], f / (r + 1e-4 * 2.0))
    torch.testing.assert_close(sepcap.score(stats(F), stats(R), name, eps=0.5)["mlp"][0], f / (r + 0.5))


@pytest.mark.parametrize("name", SIGNED)
def test_signed_ones_are_subtracted_in_nats(name):
    f, r = [4.0, -1.0], [1.0, -3.0]
    assert sepcap.score(stats(f), stats(r), name)["mlp"][0].tolist() == pytest.approx([3.0, 2.0])
    assert sepcap.score(stats(f), stats(r), name, lam=2)["mlp"][0].tolist() == pytest.approx([2.0, 5.0])


@pytest.mark.parametrize("name", ["abs", "taylor"])
def test_others_are_subtracted_as_shares_of_the_site(name):
    got = sepcap.score(stats(F), stats(R), name, contrast="difference", lam=0.5)["mlp"][0]
    assert got.tolist() == pytest.approx([f / 10 - 0.5 * r / 10 for f, r in zip(F, R, strict=True)])


def test_the_guard_puts_what_retain_does_not_need_first_and_the_rest_behind_by_ratio():
    got = sepcap.score(stats(F), stats(R), "taylor", contrast="guarded")["mlp"][0]
    # I_retain below the median 2: neurons 0 and 2, by I_forget; then 4 (3/3), 1 (1/4), 3 (0/2)
    assert got.argsort(descending=True).tolist() == [0, 2, 4, 1, 3]
    assert (got[[0, 2]] >= 1).all()
    assert (got[[4, 1, 3]] < 1).all()
    assert sepcap.score(stats(F), stats(R), "taylor", contrast="guarded", q=0)["mlp"][0].argmax() == 2  # nobody is below the minimum


def test_wanda_is_subtracted_and_refuses_a_ratio():
    assert sepcap.score(stats(F), stats(R), "wanda").info["contrast"] == "difference"
    with pytest.raises(ValueError, match="weights cancel"):
        sepcap.score(stats(F), stats(R), "wanda", contrast="ratio")


@pytest.mark.parametrize("contrast", ["ratio", "guarded"])
@pytest.mark.parametrize("name", SIGNED)
def test_signed_ones_refuse_ratio_and_guard(name, contrast):
    with pytest.raises(ValueError, match=f"{name}_abs"):
        sepcap.score(stats(F), stats(R), name, contrast=contrast)


def test_bad_contrasts_are_named():
    with pytest.raises(ValueError, match="difference"):
        sepcap.score(stats(F), stats(R), "abs", contrast="differences")
    with pytest.raises(ValueError, match="leave it out"):
        sepcap.score(stats(F), stats(R), "mean_shift", contrast="ratio")
    with pytest.raises(ValueError, match="q="):
        sepcap.score(stats(F), stats(R), "taylor", contrast="guarded", q=2.0)


def test_every_importance_says_what_it_needs():
    assert set(GRADIENTS) < set(IMPORTANCES)
    assert gradients_for("relp_abs") == ("relp",)
    assert gradients_for("wanda") == gradients_for("random") == ()
    assert {name for name, row in IMPORTANCES.items() if row.pair} == {*OF_BOTH}
    assert {name for name in IMPORTANCES if resolve_contrast(name) == "difference"} == {*SIGNED, "wanda"}
