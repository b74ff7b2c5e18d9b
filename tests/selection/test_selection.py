"""Importances, scores and selections by hand (METHODS 4, 5)."""

import inspect
import math
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shapes import model

import sepcap
from sepcap.selection.importance import IMPORTANCES
from sepcap.selection.names import GRADIENTS, ImportanceName
from sepcap.selection.neurons import top_of
from sepcap.statistics.moments import NeuronStatistics, Statistics


def statistics(site: str, activations: list) -> Statistics:
    """Statistics of activations written down as [position][layer][neuron] (or [layer][head][d_head]), summed in plain Python order."""
    z = torch.tensor(activations, dtype=torch.float64)
    sums = {"positive": (z > 0).double(), "total": z, "absolute": z.abs(), "root": z.abs().sqrt(), "deviation": (z - z.mean(0)) ** 2}
    return Statistics({site: NeuronStatistics(site, len(z), {k: v.sum(0) for k, v in sums.items()}, z.amin(0), z.amax(0))})


def scores(site: str, values: list) -> sepcap.Scores:
    return sepcap.Scores({site: torch.tensor(values, dtype=torch.float64)})


def chosen(selection: sepcap.NeuronSet, site: str = "mlp") -> list[tuple[int, ...]]:
    return [tuple(int(i) for i in index) for index in selection.masks[site].nonzero()]


# Importances and scores

# two positions, two neurons: forget (4, −1), (0, 1); retain (1, 2), (1, 0)
FORGET, RETAIN = [[[4.0, -1.0]], [[0.0, 1.0]]], [[[1.0, 2.0]], [[1.0, 0.0]]]
BY_HAND = {
    "abs": ([2, 1], [1, 1]),
    "sqrt": ([1, 1], [1, math.sqrt(2) / 2]),
    "rms": ([math.sqrt(8), 1], [1, math.sqrt(2)]),
    "std": ([2, 1], [0, 1]),
    "freq": ([1 / 2, 1 / 2], [1, 1 / 2]),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_every_importance_and_its_score_by_hand(name):
    f, r = (torch.tensor([values], dtype=torch.float64) for values in BY_HAND[name])
    forget, retain = statistics("mlp", FORGET), statistics("mlp", RETAIN)
    importance = IMPORTANCES[name].of
    assert importance is not None
    torch.testing.assert_close(importance(forget["mlp"]), f)
    torch.testing.assert_close(importance(retain["mlp"]), r)
    torch.testing.assert_close(sepcap.score(forget, retain, name)["mlp"], f / (r + 1e-3))
    # the other way round the score is not the reciprocal (ε) and not the same: the numerator is forget
    torch.testing.assert_close(sepcap.score(retain, forget, name)["mlp"], r / (f + 1e-3))


def test_mean_shift_is_a_difference_without_epsilon():
    # means: forget (2, 0), retain (1, 1)
    score = sepcap.score(statistics("mlp", FORGET), statistics("mlp", RETAIN), "mean_shift", eps=100.0)
    torch.testing.assert_close(score["mlp"], torch.tensor([[1.0, 1.0]], dtype=torch.float64))


# means: forget (2, 0), retain (1, 1), so the common ones are (1.5, 0.5); the deviations of forget are (2.5, −1.5) and (−1.5, 0.5)
ABOUT_COMMON = [math.sqrt(4.25), math.sqrt(1.25)], [0.5, math.sqrt(1.25)]


@pytest.mark.parametrize("repeated", [1, 3])
def test_std_common_is_about_the_mean_of_both_tasks_by_hand(repeated):
    f, r = (torch.tensor([values], dtype=torch.float64) for values in ABOUT_COMMON)
    forget, retain = statistics("mlp", FORGET * repeated), statistics("mlp", RETAIN)  # the number of positions has no influence
    scored = sepcap.score(forget, retain, "std_common")
    torch.testing.assert_close(scored["mlp"], f / (r + 1e-3))
    torch.testing.assert_close(torch.stack(scored.importances["mlp"]), torch.stack((f, r)))


def test_std_common_finds_constants_that_differ_and_keeps_digits_beside_a_large_mean():
    forget, retain = statistics("mlp", [[[1e8, 3.0]], [[1e8 + 2, 3.0]]]), statistics("mlp", [[[1e8, 1.0]], [[1e8 + 2, 1.0]]])
    assert sepcap.score(forget, retain, "std").importances["mlp"][0].tolist() == [[1, 0]]
    assert torch.stack(sepcap.score(forget, retain, "std_common").importances["mlp"]).tolist() == [[[1, 1]], [[1, 1]]]


def test_all_importances_are_covered_here():
    # divergences and gradients have files of their own
    known = {*BY_HAND, "std_common", "mean_shift", "kl", "js", "wasserstein", "wanda", *GRADIENTS}
    assert known == set(IMPORTANCES) == set(get_args(ImportanceName))


@pytest.mark.parametrize(("site", "eps"), [("mlp", 1e-3), ("attn_pre_out", 1e-4), ("attn_value", 1e-4)])
def test_default_epsilon_per_site(site, eps):
    shape = [[1.0]] if site == "mlp" else [[[1.0]]]
    silent = [[0.0]] if site == "mlp" else [[[0.0]]]
    assert float(sepcap.score(statistics(site, [shape]), statistics(site, [silent]))[site]) == pytest.approx(1 / eps)
    assert float(sepcap.score(statistics(site, [shape]), statistics(site, [silent]), eps=0.5)[site]) == pytest.approx(2)
    assert float(sepcap.score(statistics(site, [shape]), statistics(site, [silent]), eps={site: 0.25})[site]) == pytest.approx(4)


def test_the_highest_ratio_of_forget_to_retain_goes():
    scored = sepcap.score(statistics("mlp", [[[9.0, 1.0, 5.0]]]), statistics("mlp", [[[9.0, 0.1, 50.0]]]))
    assert chosen(scored.top({"mlp": 1 / 3})) == [(0, 1)]


def test_score_refuses_what_does_not_fit():
    one, other = statistics("mlp", [[[1.0, 2.0]]]), statistics("mlp", [[[1.0, 2.0, 3.0]]])
    with pytest.raises(ValueError, match=r"site 'mlp': forget has shape \[1, 2\] and retain \[1, 3\].*different models"):
        sepcap.score(one, other)
    with pytest.raises(ValueError, match=r"importance='abss' is not known. Did you mean 'abs'"):
        sepcap.score(one, one, "abss")
    with pytest.raises(ValueError, match="site='attn_pre_out' is not known"):
        sepcap.score(one, one, sites=["attn_pre_out"])
    for eps in (0.0, -1.0):  # 0/0 would rank first
        with pytest.raises(ValueError, match=r"eps=.*above 0"):
            sepcap.score(one, one, eps=eps)
    with pytest.raises(ValueError, match="site='attn_pre_out' is not known"):
        sepcap.score(one, statistics("attn_value", [[[[1.0]]]]), sites=["attn_pre_out"])


# top(fraction)


def test_top_takes_the_floor_of_the_fraction_over_all_layers_together():
    values = [[0.0, 9.0, 1.0, 2.0, 3.0], [8.0, 7.0, 6.0, 5.0, 4.0]]
    selection = scores("mlp", values).top({"mlp": 0.39})  # 3.9 of 10
    assert chosen(selection) == [(0, 1), (1, 0), (1, 1)]
    assert selection.info["threshold"] == {"mlp": 7.0}
    per_layer = scores("mlp", values).top({"mlp": 0.59}, per_layer=True)  # 2.95 of 5 in each
    assert chosen(per_layer) == [(0, 1), (0, 4), (1, 0), (1, 1)]
    assert per_layer.info["threshold"] == {"mlp": 3.0}


@pytest.mark.parametrize("total", [100, 250, 600])
def test_the_floor_is_that_of_exact_arithmetic(total):
    """0.29 · 100 is 28.999999999999996 in floating point, and 29 in fact."""
    values = scores("mlp", [list(map(float, range(total)))])
    for percent in range(1, 101):
        assert len(values.top({"mlp": percent / 100})) == percent * total // 100


def test_sizes_count_the_original_neurons():
    gone = sepcap.NeuronSet({"mlp": torch.tensor([[True] * 5 + [False] * 5])})
    selection = scores("mlp", [list(map(float, range(10)))]).top({"mlp": 0.3}, exclude=gone)
    assert chosen(selection) == [(0, 7), (0, 8), (0, 9)]  # 0.3 of 10, not of the five that are left


@pytest.mark.parametrize("per_layer", [True, False])
def test_excluded_neurons_are_not_picked_even_with_the_highest_scores(per_layer):
    values = [[100.0, 5.0, math.inf, 1.0], [4.0, 100.0, 2.0, 3.0]]
    gone = sepcap.NeuronSet({"mlp": torch.tensor([[True, False, True, False], [False, True, False, False]])})
    selection = scores("mlp", values).top({"mlp": 0.25}, exclude=gone, per_layer=per_layer)
    assert chosen(selection) == [(0, 1), (1, 0)]
    assert selection.info["threshold"] == {"mlp": 4.0}
    everything = scores("mlp", values).top({"mlp": 5 / 8}, exclude=gone)
    assert len(everything & gone) == 0
    assert everything | gone == ~sepcap.NeuronSet({"mlp": torch.zeros(2, 4, dtype=torch.bool)})


def test_of_equal_scores_the_first_goes_first():
    assert chosen(scores("mlp", [[1.0, 2.0, 2.0], [2.0, 2.0, 2.0]]).top({"mlp": 0.5})) == [(0, 1), (0, 2), (1, 0)]


@pytest.mark.parametrize("fractions", [{"mlp": 0.2}, {"mlp": 3}])
def test_scores_that_are_nan_are_refused_unless_they_are_excluded(fractions):
    values = torch.arange(20.0).view(2, 10)
    values[0, 3] = values[1, 9] = float("nan")
    with pytest.raises(ValueError, match=r"2 of 20 scores of site 'mlp' are NaN"):
        sepcap.Scores({"mlp": values}).top(fractions)
    without = sepcap.Scores({"mlp": values}).top(fractions, exclude=sepcap.NeuronSet({"mlp": values.isnan()}))
    assert (1, 8) in chosen(without)
    values[values.isnan()] = float("inf")  # 1/0 has a place in an order: the first
    assert {(0, 3), (1, 9)} <= set(chosen(sepcap.Scores({"mlp": values}).top(fractions)))


def test_heads_with_a_nan_score_are_refused():
    values = torch.ones(2, 2, 3)
    values[1, 0, 2] = float("nan")
    for aggregate in ("mean", "median"):
        with pytest.raises(ValueError, match="scores of site 'heads' are NaN"):
            sepcap.Scores({"attn_pre_out": values}).top({"heads": 1}, aggregate=aggregate)


def test_sites_are_selected_apart():
    both = sepcap.Scores({"mlp": torch.tensor([[1.0, 2.0]]), "attn_pre_out": torch.tensor([[[100.0, 300.0], [400.0, 200.0]]])})
    selection = both.top({"mlp": 0.5, "attn_pre_out": 0.25})
    assert chosen(selection) == [(0, 1)]
    assert chosen(selection, "attn_pre_out") == [(0, 1, 0)]
    assert selection.info["threshold"] == {"mlp": 2.0, "attn_pre_out": 400.0}


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 6), min_size=12, max_size=12), st.integers(1, 8), st.lists(st.booleans(), min_size=12, max_size=12))
def test_nothing_left_scores_higher_than_what_was_selected(values, n, gone):
    ranks, excluded = torch.tensor(values).view(3, 4).double(), torch.tensor(gone).view(3, 4)
    left = int((~excluded).sum())
    if n > left:
        with pytest.raises(ValueError, match=f"{n} neurons to select but only {left} of 12 are left"):
            top_of({"mlp": ranks}, {"mlp": n / 12}, exclude=sepcap.NeuronSet({"mlp": excluded}))
        return
    selection, threshold = top_of({"mlp": ranks}, {"mlp": n / 12}, exclude=sepcap.NeuronSet({"mlp": excluded}))
    mask = selection.masks["mlp"]
    assert int(mask.sum()) == n
    assert not bool((mask & excluded).any())
    assert threshold["mlp"] == float(ranks[mask].min())
    rest = ranks[~mask & ~excluded]
    assert rest.numel() == 0 or float(rest.max()) <= threshold["mlp"]


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.0001, 2.0, math.nan])
def test_a_fraction_lies_between_zero_and_one(fraction):
    with pytest.raises(ValueError, match=r"fractions\['mlp'\]=.*(lies in \(0, 1\]|finite number)"):
        scores("mlp", [[1.0, 2.0]]).top({"mlp": fraction})


@pytest.mark.parametrize("total", [3, 6, 7, 1000, 6144])
def test_the_least_fraction_that_an_error_names_selects_one(total):
    values = scores("mlp", [list(map(float, range(total)))])
    with pytest.raises(ValueError, match="The least is") as error:
        values.top({"mlp": 0.9 / total})
    least = float(str(error.value).split("The least is ")[1])
    assert len(values.top({"mlp": least})) == 1


@pytest.mark.parametrize("steps", [3, 6, 7, 50])
def test_the_fraction_that_a_config_error_names_is_accepted(steps):
    with pytest.raises(ValueError, match="or a fraction of") as error:
        sepcap.PruningConfig(fractions={"mlp": 0.9}, steps=steps)
    advice = float(str(error.value).split("or a fraction of ")[1].rstrip("."))
    assert sepcap.PruningConfig(fractions={"mlp": advice}, steps=steps).steps * advice == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("eps", [0.0, -1e-3, math.nan])
def test_a_config_refuses_an_epsilon_that_is_not_positive(eps):
    with pytest.raises(ValueError, match=r"eps=.*above 0"):
        sepcap.PruningConfig(eps=eps)


def test_a_fraction_that_selects_nothing_names_the_least():
    with pytest.raises(ValueError, match=r"fractions\['mlp'\]=0.2 selects no neuron.*The least is 0.25"):
        scores("mlp", [[1.0, 2.0], [3.0, 4.0]]).top({"mlp": 0.2})
    with pytest.raises(ValueError, match=r"selects no neuron: 0.3 of 2 of a layer.*The least is 0.5"):
        scores("mlp", [[1.0, 2.0], [3.0, 4.0]]).top({"mlp": 0.3}, per_layer=True)


def test_more_than_is_left_is_refused():
    gone = sepcap.NeuronSet({"mlp": torch.tensor([[True, True, True, False], [False, False, False, False]])})
    with pytest.raises(ValueError, match="6 neurons to select but only 5 of 8 are left"):
        scores("mlp", [[1.0] * 4, [2.0] * 4]).top({"mlp": 0.75}, exclude=gone)
    with pytest.raises(ValueError, match="2 neurons to select but only 1 of 4 are left in a layer"):
        scores("mlp", [[1.0] * 4, [2.0] * 4]).top({"mlp": 0.5}, exclude=gone, per_layer=True)


def test_sites_without_scores_are_refused():
    with pytest.raises(ValueError, match=r"site='mpl' is not known. Did you mean 'mlp'"):
        scores("mlp", [[1.0, 2.0]]).top({"mpl": 0.5})
    with pytest.raises(ValueError, match=r"fractions=\{\}: give at least one site"):
        scores("mlp", [[1.0, 2.0]]).top({})


def test_an_exclusion_of_another_models_shape_is_refused():
    other = sepcap.NeuronSet({"mlp": torch.zeros(2, 3, dtype=torch.bool)})
    with pytest.raises(ValueError, match=r"site 'mlp'.*\[2, 3\].*\[2, 2\]"):
        scores("mlp", [[1.0, 2.0], [3.0, 4.0]]).top({"mlp": 0.5}, exclude=other)
    with pytest.raises(ValueError, match=r"'attn_pre_out'.*\[2, 2, 3\].*\[2, 2, 4\]"):
        scores("attn_pre_out", HEADS).top({"heads": 0.25}, exclude=sepcap.NeuronSet.empty(model(2, 1, 2, 3), "attn_pre_out"))
    with pytest.raises(ValueError, match=r"'mlp' is \[4, 24\] but this model has \[4, 25\]"):
        sepcap.NeuronSet.random(model(), {"mlp": 0.1}, exclude=sepcap.NeuronSet.empty(model(mlp=24), "mlp"))


def test_scores_and_statistics_are_mappings():
    for mapping in (scores("mlp", [[1.0]]), statistics("mlp", [[[1.0]]])):
        assert "mlp" in mapping
        assert "attn_value" not in mapping
        assert mapping.get("attn_value") is None
        assert list(mapping) == ["mlp"]


# Heads

# layer 0: means 2.5 and 1, medians 0 and 1; layer 1: means 0.75 and 0.9, medians 0.5 and 0.9
HEADS = [[[10.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]], [[0.0, 2.0, 1.0, 0.0], [0.9, 0.9, 0.9, 0.9]]]


def test_heads_are_scored_by_the_mean_or_by_the_median():
    values = scores("attn_pre_out", HEADS)
    assert values.heads("mean").tolist() == [[2.5, 1.0], [0.75, pytest.approx(0.9)]]
    assert values.heads("median").tolist() == [[0.0, 1.0], [0.5, pytest.approx(0.9)]]
    by_mean, by_median = values.top({"heads": 0.25}), values.top({"heads": 0.25}, aggregate="median")
    assert chosen(by_mean, "attn_pre_out") == [(0, 0, d) for d in range(4)]
    assert chosen(by_median, "attn_pre_out") == [(0, 1, d) for d in range(4)]
    assert (by_mean.info["threshold"], by_median.info["threshold"]) == ({"heads": 2.5}, {"heads": 1.0})


def test_heads_per_layer_and_beside_mlp():
    values = sepcap.Scores({"attn_pre_out": torch.tensor(HEADS), "mlp": torch.tensor([[1.0, 4.0], [3.0, 2.0]])})
    selection = values.top({"heads": 0.5, "mlp": 0.5}, per_layer=True)
    mlp = sepcap.NeuronSet({"mlp": torch.tensor([[False, True], [True, False]])})
    assert selection == mlp | sepcap.NeuronSet.heads(model(2, 2, 2, 4), [(0, 0), (1, 1)])
    assert len(values.top({"heads": 0.5})) == 2 * 4


def test_a_head_is_gone_only_when_all_its_neurons_are():
    values, shape = scores("attn_pre_out", HEADS), model(2, 2, 2, 4)
    whole = sepcap.NeuronSet.heads(shape, [(0, 0)])
    assert values.top({"heads": 0.25}, exclude=whole) == sepcap.NeuronSet.heads(shape, [(0, 1)])
    part = sepcap.NeuronSet({"attn_pre_out": whole.masks["attn_pre_out"].clone()})
    part.masks["attn_pre_out"][0, 0, 3] = False
    assert values.top({"heads": 0.25}, exclude=part) == whole


def test_values_have_heads_too():
    values = scores("attn_value", HEADS)
    assert chosen(values.top({"heads": 0.25}, head_site="attn_value"), "attn_value") == [(0, 0, d) for d in range(4)]


def test_heads_refuse_what_is_none():
    with pytest.raises(ValueError, match="'mlp' has no heads"):
        scores("mlp", [[1.0]]).heads(site="mlp")
    with pytest.raises(ValueError, match=r"aggregate='medain' is not known. Did you mean 'median'"):
        # types are checked while testing, and would refuse this first
        inspect.unwrap(sepcap.Scores.heads)(scores("attn_pre_out", HEADS), "medain")
    with pytest.raises(ValueError, match=r"fractions\['heads'\]=0.2 selects no neuron"):
        scores("attn_pre_out", HEADS).top({"heads": 0.2})
    with pytest.raises(IndexError, match=r"head=3: head \(0, 3\) does not exist, heads are numbered 0 to 2"):
        sepcap.NeuronSet.heads(model(), [(0, 3)])


def test_random_heads_are_whole_and_scores_survive_a_file(tiny_opt, tmp_path):
    drawn = sepcap.NeuronSet.random(tiny_opt, {"heads": 0.5}, seed=3)
    per_head = drawn.masks["attn_pre_out"].sum(dim=-1)
    assert sorted(per_head.flatten().tolist()) == [0] * 4 + [8] * 4
    with pytest.raises(ValueError, match="has no heads"):
        sepcap.NeuronSet.heads(tiny_opt, [(0, 0)], site="mlp")
    scores = sepcap.Scores({"mlp": torch.rand(2, 3)}, {"importance": "abs"})
    scores.save(tmp_path / "s.safetensors")
    assert torch.equal(sepcap.Scores.load(tmp_path / "s.safetensors")["mlp"], scores["mlp"])
