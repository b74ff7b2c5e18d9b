"""Overlap of two sets against random sets of the same layers, and of the same layers and activity: counted, enumerated, drawn."""

import itertools
import math

import numpy as np
import pytest
import torch

from sepcap.selection.neurons import NeuronSet
from sepcap.selection.overlap import log10_tail, overlap


def total(table):
    return table[table["layer"].isna()].iloc[0]


def ways(n, a, b, both):
    """Ways to draw b of n so that exactly `both` of the a marked ones are among them."""
    return math.comb(a, both) * math.comb(n - a, b - both) if both <= b else 0


def test_by_hand():
    first, second = torch.zeros(2, 5, dtype=torch.bool), torch.zeros(2, 5, dtype=torch.bool)
    first[0, :4] = first[1, :2] = True
    second[0, 2:5] = second[1, 0] = True
    table = overlap(NeuronSet({"mlp": first}), NeuronSet({"mlp": second}))
    assert list(table["layer"].fillna(-1)) == [-1, 0, 1]
    whole, top, bottom = table.to_dict("records")
    assert (whole["a"], whole["b"], whole["both"], whole["neurons"]) == (6, 4, 3, 10)
    # 4 · 3 / 5 in the first layer and 2 · 1 / 5 in the second
    assert (whole["share"], whole["iou"], whole["expected"]) == (0.5, pytest.approx(3 / 7), pytest.approx(2.8))
    assert whole["ratio"] == pytest.approx(3 / 2.8)
    # three of five always hold two of any four, and three with probability 2/5; one of five is one of two with 2/5: 1 − P(2 and 0)
    assert 10 ** whole["log10_p"] == pytest.approx(1 - 3 / 5 * 3 / 5)
    assert (top["share"], top["ratio"], top["log10_p"]) == (0.5, pytest.approx(2 / 2.4), pytest.approx(0, abs=1e-12))
    assert (bottom["ratio"], 10 ** bottom["log10_p"]) == (pytest.approx(2.5), pytest.approx(2 / 5))


def test_sets_in_different_layers_can_share_nothing():
    first, second = torch.zeros(2, 5, dtype=torch.bool), torch.zeros(2, 5, dtype=torch.bool)
    first[0, :2] = second[1, :3] = True
    whole, top, _ = overlap(NeuronSet({"mlp": first}), NeuronSet({"mlp": second})).to_dict("records")
    assert (whole["expected"], whole["both"], whole["log10_p"]) == (0, 0, 0)
    assert math.isnan(whole["ratio"])
    assert all(math.isnan(top[name]) for name in ("ratio", "log10_p"))
    with pytest.raises(ValueError, match="different sites: mlp and attn_value"):
        overlap(NeuronSet({"mlp": first}), NeuronSet({"attn_value": second[..., None]}))


def test_the_tail_of_one_layer_is_the_counted_one():
    for n, a, b in ((12, 5, 4), (30, 20, 15), (9, 9, 3)):
        for both in range(max(0, a + b - n), min(a, b) + 1):
            counted = sum(ways(n, a, b, k) for k in range(both, min(a, b) + 1)) / math.comb(n, b)
            assert 10 ** log10_tail([n], [a], [b], both) == pytest.approx(counted, rel=1e-9)
    # exact arithmetic where a float would be zero
    counted = sum(ways(450_000, 9000, 9000, k) for k in range(8990, 9001))
    exact = math.log10(counted) - math.log10(math.comb(450_000, 9000))
    assert log10_tail([450_000], [9000], [9000], 8990) == pytest.approx(exact, rel=1e-9)


def test_the_tail_of_several_layers_is_that_of_all_pairs_of_sets_there_are():
    """Every pair of sets with these numbers per layer, one by one."""
    layers = [(4, 2, 3), (5, 2, 1), (3, 0, 2)]
    counts = []
    every = [[set(c) for c in itertools.combinations(range(n), b)] for n, _, b in layers]
    for drawn in itertools.product(*every):
        counts.append(sum(len(set(range(a)) & mine) for (_, a, _), mine in zip(layers, drawn, strict=True)))
    for both in range(max(counts) + 2):
        expected = np.mean(np.array(counts) >= both)
        found = log10_tail(*zip(*layers, strict=True), both)
        assert 10**found == pytest.approx(expected, rel=1e-12)
    # far out, in whole numbers: 40 layers in which all of 20 marked ones of 400 are drawn, and one in which all but one are
    n = [400] * 41
    exact = math.log10(41 * 20 * 380 + 1) - 41 * math.log10(math.comb(400, 20))
    assert log10_tail(n, [20] * 41, [20] * 41, 20 * 41 - 1) == pytest.approx(exact, rel=1e-12)


PROFILE = (2, 20, 60, 80, 80, 65)
"""Neurons per layer of two sets: few in the first layer, many in the later ones, as selections have them."""


def rejections(draws, width, draw, **options):
    """Share of pairs of random sets with p ≤ 0.05; p depends on the number that they share alone, so each number is tested once."""
    rng, of_number, p = np.random.default_rng(0), {}, []
    for _ in range(draws):
        a, b = draw(rng, width), draw(rng, width)
        if (both := len(a & b)) not in of_number:
            of_number[both] = total(overlap(a, b, **options))["log10_p_matched" if options else "log10_p"]
        p.append(of_number[both])
    return np.mean(10 ** np.array(p) <= 0.05)


def of_profile(rng, width):
    mask = torch.zeros(len(PROFILE), width, dtype=torch.bool)
    for layer, n in enumerate(PROFILE):
        mask[layer, torch.as_tensor(rng.choice(width, n, replace=False))] = True
    return NeuronSet({"mlp": mask})


@pytest.mark.thorough
def test_random_sets_of_one_layer_profile_are_significant_in_5_percent_of_draws():
    found = rejections(2000, 1024, of_profile)
    # of whole numbers the test is a little conservative; four standard errors of 2000 draws on either side
    assert 0.025 < found <= 0.05 + 4 * math.sqrt(0.05 * 0.95 / 2000)


def of_the_idle(rng, width):
    """Random neurons of the tenth of every layer that is least active, whose numbers are 0 to width − 1."""
    mask = torch.zeros(3, width, dtype=torch.bool)
    for layer in range(3):
        mask[layer, torch.as_tensor(rng.choice(width // 10, 25, replace=False))] = True
    return NeuronSet({"mlp": mask})


def test_sets_that_share_their_inactivity_alone_are_significant_by_layers_and_not_when_matched_on_activity():
    activity = torch.arange(1000.0).expand(3, 1000)
    assert rejections(20, 1000, of_the_idle) == 1
    found = rejections(2000, 1000, of_the_idle, matched={"mlp": activity})
    assert 0.02 < found <= 0.05 + 4 * math.sqrt(0.05 * 0.95 / 2000)
    one, other = (of_the_idle(np.random.default_rng(seed), 1000) for seed in (1, 2))
    row = total(overlap(one, other, matched={"mlp": activity}))
    # 25 of 100 in each of three layers, against 25 of 1000
    assert (row["expected_matched"], row["expected"]) == (pytest.approx(3 * 625 / 100), pytest.approx(3 * 625 / 1000))
    assert row["ratio_matched"] == pytest.approx(row["both"] / 18.75)


def test_activity_of_another_site_or_shape_is_refused():
    one = NeuronSet({"mlp": torch.ones(2, 5, dtype=torch.bool)})
    with pytest.raises(ValueError, match="matched has no site 'mlp'; it has attn_value"):
        overlap(one, one, matched={"attn_value": torch.zeros(2, 5)})
    with pytest.raises(ValueError, match=r"activity of site 'mlp' is \[2, 4\], and the sets' masks \[2, 5\]"):
        overlap(one, one, matched={"mlp": torch.zeros(2, 4)})
