"""Tables of a transfer: paired differences, intervals that hold with few texts, shares, distances."""

import math

import numpy as np
import pandas as pd
import pytest
import scipy.stats
from conftest import tiny_tokenizer

from sepcap.studies.paragraphs.conditions import NEUTRAL, Condition, profile
from sepcap.studies.paragraphs.config import ParagraphTransferConfig
from sepcap.studies.paragraphs.tables import _chosen_layers, _halves, _scores, differences, interval, share, values
from sepcap.tasks.passages import Passage


def test_differences_are_paired_on_the_same_rest_of_the_paragraph():
    rows = []
    for text in range(3):
        for name, given, reference, total in (
            ("transferred", 0, 0, 0.1),
            ("transferred", 0, 2, 0.2),
            ("neutral", 0, 0, 0.5),
            ("neutral", 0, 2, 0.9),
            ("given 2", 2, 2, 0.3),
        ):
            row = {"metric": "distance", "text": text, "kind": "k", "condition": name, "given": given, "reference": reference}
            rows.append(row | {"total": total + 0.01 * text, "weight": 1.0})
    measured = pd.DataFrame(rows)
    found = differences(measured).set_index(["condition", "against"])
    assert found.loc[("transferred", "neutral"), "difference"] == pytest.approx(0.1 - 0.5)
    assert found.loc[("given 2", "neutral"), "difference"] == pytest.approx(0.3 - 0.9)
    assert found.loc[("transferred", "given 2"), "difference"] == pytest.approx(0.2 - 0.3)
    assert found.loc[("transferred", "given 2"), "low"] == pytest.approx(-0.1)  # every text differs by as much
    own = values(measured).set_index("condition")
    assert own.loc["given 2", "median"] == pytest.approx(0.31)
    assert own.loc["transferred", "mean"] == pytest.approx(0.11)


def test_intervals_weigh_texts_by_their_tokens():
    values = np.random.default_rng(0).normal(0.3, 1, size=6)
    expected = scipy.stats.ttest_1samp(values, 0).confidence_interval()
    np.testing.assert_allclose(interval(7 * values, np.full(6, 7.0)), (values.mean(), *expected))
    mean, low, high = interval(np.array([2.0, 9.0]), np.array([1.0, 3.0]))
    assert mean == 11 / 4
    # residuals 2 − 11/4 and 9 − 33/4 are ∓3/4; t of one degree of freedom is tan(0.475 π); the mean weight is 2
    half = math.tan(0.475 * math.pi) * 0.75 * math.sqrt(2) / (math.sqrt(2) * 2)
    np.testing.assert_allclose((low, high), (mean - half, mean + half))
    for few in ([], [1.0]):
        assert all(map(np.isnan, interval(np.array(few), np.array(few))[1:]))


@pytest.mark.parametrize("n", [3, 8, 24])
def test_intervals_and_shares_hold_what_they_promise_with_few_texts(n):
    """Of intervals over texts drawn anew, 95% hold the true value: a bootstrap's hold it in 75% of draws of three texts."""
    rng, draws = np.random.default_rng(n), 3000
    held, shares = 0, []
    for _ in range(draws):
        weight = rng.integers(40, 49, size=n).astype(float)
        total = weight * rng.normal(0.1, 0.3, size=n)
        _, low, high = interval(total, weight)
        held += low <= 0.1 <= high
        whole = rng.normal(3, 1, size=n)
        _, low, high = share(0.4 * whole + rng.normal(0, 0.5, size=n), whole)
        if np.isfinite(low):
            shares.append(low <= 0.4 <= high)
    # four standard deviations of a binomial, and one in a hundred for the tokens' not being equally many
    allowed = 4 * math.sqrt(0.95 * 0.05 / draws) + 0.01
    assert abs(held / draws - 0.95) < allowed
    assert len(shares) > draws / 3
    assert abs(np.mean(shares) - 0.95) < allowed


def test_a_share_is_all_those_at_which_nothing_is_left():
    part, whole = np.array([1.0, 0.2, 0.9, 0.4]), np.array([2.0, 1.1, 1.4, 1.8])
    ratio, low, high = share(part, whole)
    assert ratio == pytest.approx(part.sum() / whole.sum())
    for end in (low, high):
        ends = scipy.stats.ttest_1samp(part - end * whole, 0).confidence_interval()
        assert min(abs(ends.low), abs(ends.high)) < 1e-9
    np.testing.assert_allclose(share(whole, whole), 1)
    # nothing to have a share of: an interval that touches 0, lies below it, or is not there
    for nothing in ([0.1, -0.1, 0.2, -0.2], [-1.0, -1.1, -1.2, -1.0], [0.0, 0.0, 0.0, 0.0]):
        assert np.isnan(share(part, np.array(nothing))).all()
    assert np.isnan(share(part[:1], whole[:1])).all()


def test_words_that_only_generated_texts_have_count_in_tf_idf():
    """A word that no true text has makes what was written longer, and so less like the paragraph."""
    from sepcap.evaluation.texts import get_embedder

    tokenizer = tiny_tokenizer()

    def ids(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    source = [Passage((40,), (41,), tuple(ids("the quick fox"))), Passage((42,), (41,), tuple(ids("the lazy dog")))]
    fit = get_embedder("tf-idf")[0]
    found = {Condition("neutral"): {0: [ids("the quick self")], 1: [ids("the lazy dog")]}}
    distances = _scores(found, source, tokenizer, ParagraphTransferConfig(given=(0,)), fit)["distance"]
    # three texts, as one of the four is there twice: all have "the", two "quick", one each of the other words
    quick, alone = math.log(4 / 3) + 1, math.log(4 / 2) + 1
    assert distances[0] == pytest.approx(1 - (1 + quick**2) / (1 + quick**2 + alone**2))
    assert distances[1] == pytest.approx(0)


def gains_of(by_layer, lengths):
    """Likelihoods in which patching layer l alone from the own break gains by_layer[l][text] nats over another's; first and last ones 0."""
    parts = profile(tuple(range(len(by_layer))), ["own", "another"])
    found = {Condition(NEUTRAL): {i: np.full(n, -1.0) for i, n in enumerate(lengths)}}
    for (part, layer, donor), condition in parts.items():
        nats = by_layer[layer] if (part, donor) == ("alone", "own") else np.zeros(len(lengths))
        found[condition] = {i: np.full(n, -1.0) + nats[i] / n for i, n in enumerate(lengths)}
    return found, parts


def test_layers_are_chosen_on_one_half_and_measured_on_the_other():
    lengths, kinds = [4, 5, 4, 5, 4, 5, 4, 5], ["a"] * 4 + ["b"] * 4
    first, second = _halves(list(range(8)), kinds, 0)
    assert sorted(first + second) == list(range(8))
    assert sum(i < 4 for i in first) == sum(i < 4 for i in second) == 2
    assert _halves(list(range(8)), kinds, 0) == (first, second)
    assert any(_halves(list(range(8)), kinds, seed) != (first, second) for seed in range(1, 5))
    # layer 1 gains in the searched texts and loses in the others; layer 2 gains a little everywhere
    nats = [np.zeros(8), np.array([8.0 if i in first else -3.0 - i for i in range(8)]), np.full(8, 0.5)]
    row = _chosen_layers(*gains_of(nats, lengths), kinds, 0).set_index("part").loc["alone"]
    assert (row["layer"], row["among"], row["donor"], row["searched"], row["texts"]) == (1, 3, "difference", 4, 4)
    totals, weights = nats[1][second], np.array([float(lengths[i]) for i in second])
    np.testing.assert_allclose((row["gain"], row["low"], row["high"]), interval(totals, weights))
    assert row["gain_searched"] == pytest.approx(8 * 4 / sum(lengths[i] for i in first))
    assert not len(_chosen_layers(*gains_of([np.zeros(3)] * 2, [4, 4, 4]), ["a"] * 3, 0))  # no half of three texts has two


@pytest.mark.thorough
def test_a_layer_chosen_in_noise_has_an_interval_over_0_in_5_percent_of_draws():
    rng, above, naive = np.random.default_rng(0), [], []
    for _ in range(400):
        nats = list(rng.normal(size=(8, 24)))
        found, parts = gains_of(nats, [4] * 24)
        row = _chosen_layers(found, parts, ["a", "b"] * 12, 0).iloc[0]
        above.append(row["low"] > 0)
        naive.append(max(interval(values, np.full(24, 4.0))[1] for values in nats) > 0)
    assert np.mean(above) < 0.025 + 4 * math.sqrt(0.025 * 0.975 / 400)
    assert np.mean(naive) > 0.1  # the best of eight layers on the same texts
