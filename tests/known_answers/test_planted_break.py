"""Transfer on a model in which it is known what the break knows (tests/helpers/planted_break.py)."""

import math

import numpy as np
import pytest
from planted_break import CONTEXT, WORDS, build, text, word

from sepcap.studies.paragraphs.study import transfer_paragraphs
from sepcap.tasks.passages import passages

TEXTS = [("a", 6, 5, 0), ("b", 4, 5, 1), ("a", 7, 5, 2), ("b", 5, 5, 3)]
LIKELY = -math.log(WORDS)


@pytest.fixture(scope="module", params=["\n\n", "\n"], ids=["one token", "two tokens"])
def newline(request):
    return request.param


@pytest.fixture(scope="module")
def model(newline, tmp_path_factory):
    return build(tmp_path_factory.mktemp("break"), newline)


@pytest.fixture
def source(newline):
    return [text(*one, newline=newline) for one in TEXTS]


def run(model, source, **options):
    plain = {"tokens": 12, "given": (0, 2), "embedder": None, "seed": 1}
    return transfer_paragraphs(model, texts=source, **{**plain, **options})


def topics(result, condition, i):
    """Topics of the words written in a condition about text i, token by token."""
    table = result.tables["generations"]
    (row,) = table[(table["text"] == i) & (table["condition"] == condition)].to_dict("records")
    return [written[0] for written in row["written"].split()]


def nats(result, condition):
    """[text, pos]."""
    return result.tensors["log_likelihood"][result.config["conditions"].index(condition)].numpy()


def test_patched_the_break_writes_the_topic_and_alone_it_does_not(model, source, newline):
    result = run(model, source)
    assert result.config["breaks"] == [[["\n\n"], 4]] if newline == "\n\n" else [[["\n", "\n"], 4]]
    for i, (topic, *_) in enumerate(TEXTS):
        assert topics(result, "original", i) == [topic] * 12
        assert topics(result, "transferred", i) == [topic] * 12
        assert topics(result, "neutral", i) == ["c"] * 12
        assert topics(result, "given 2", i) == ["c"] * 12  # words given away do not become a memory in this model
    # the words themselves are drawn: not the same in every text
    assert len(set(result.tables["generations"].query("condition == 'transferred'")["written"])) == 4


def test_likelihoods_are_those_of_the_planted_topic(model, source):
    result = run(model, source, generate=False)
    np.testing.assert_allclose(nats(result, "original"), LIKELY, atol=1e-4)
    np.testing.assert_allclose(nats(result, "transferred"), LIKELY, atol=1e-4)
    assert (nats(result, "neutral") < LIKELY - 5).all()
    row = result.difference("nats", "transferred")
    assert row["share"] == pytest.approx(1, abs=1e-4)
    assert row["difference"] == pytest.approx(LIKELY - nats(result, "neutral").mean(), abs=1e-4)


def test_another_text_gives_its_own_topic(model, newline):
    a, b = (text(*one, newline=newline) for one in TEXTS[:2])
    result = run(model, [a, b])
    # of two texts each is patched from the other
    assert result.tables["texts"]["another"].tolist() == [1, 0]
    assert topics(result, "mismatched", 0) == ["b"] * 12
    assert topics(result, "mismatched", 1) == ["a"] * 12
    assert (nats(result, "mismatched") < LIKELY - 5).all()
    assert result.difference("nats", "transferred", "mismatched")["difference"] > 5


@pytest.mark.parametrize(
    "sites", [("attn_pre_out",), *(pytest.param(sites, marks=pytest.mark.slow) for sites in (("resid",), ("mlp", "attn_pre_out")))]
)
def test_the_memory_is_written_in_layer_0(model, source, sites):
    result = run(model, source, layers=(0,), sites=sites)
    for i, (topic, *_) in enumerate(TEXTS):
        assert topics(result, "transferred", i) == [topic] * 12


@pytest.mark.parametrize("sites", [("attn_pre_out",), ("resid",)])
def test_in_layer_1_only_the_next_token_is_decided(model, source, sites):
    result = run(model, source, layers=(1,), sites=sites)
    for i, (topic, *_) in enumerate(TEXTS):
        assert topics(result, "transferred", i) == [topic] + ["c"] * 11


@pytest.mark.thorough
def test_the_wrong_site_and_a_scale_of_zero_bring_nothing(model, source):
    neutral = nats(run(model, source, generate=False), "neutral")
    for options in ({"sites": ("mlp",)}, {"scale": 0.0, "sites": ("attn_pre_out",)}):
        result = run(model, source, **options)
        np.testing.assert_allclose(nats(result, "transferred"), neutral, atol=1e-5)
        for i in range(len(TEXTS)):
            assert topics(result, "transferred", i) == ["c"] * 12


def test_the_profile_finds_the_layer(model, source):
    result = run(model, source, generate=False)
    layers = result.tables["layers"]
    own = layers[layers["donor"] == "own"].set_index(["part", "layer"])["gain"]
    whole = own["last", 0]
    assert whole > 5
    assert own["alone", 0] == pytest.approx(whole, abs=1e-4)
    assert own["first", 0] == pytest.approx(whole, abs=1e-4)
    assert own["first", 1] == pytest.approx(whole, abs=1e-4)
    # the first token of five
    of_first = (LIKELY - nats(result, "neutral")[:, 0]).mean() / 5
    assert own["alone", 1] == pytest.approx(of_first, abs=1e-4)
    assert own["last", 1] == pytest.approx(of_first, abs=1e-4)


def test_positions_say_which_tokens_a_layer_decides(model, source):
    table = run(model, source, generate=False, layers=(1,)).tables["positions"]
    gains = table[table["condition"] == "transferred"].set_index("first")["gain"]
    assert gains[0] > 5
    np.testing.assert_allclose(gains.drop(0), 0, atol=1e-5)


def test_a_neutral_prompt_of_other_words_keeps_its_place_for_the_break(model, source, newline):
    gap = newline if newline == "\n\n" else newline * 2
    result = run(model, source, into=f"c1 c2{gap}")
    for i, (topic, *_) in enumerate(TEXTS):
        assert topics(result, "transferred", i) == [topic] * 12
        assert topics(result, "neutral", i) == ["c"] * 12


def test_a_neutral_prompt_with_fewer_tokens_is_aligned_at_the_end(model, source, newline):
    # where no break is seen, layer 1 looks at everything: it finds the memory that was put into the last word
    result = run(model, source, into="c1", generate=False)
    assert "as many as both have" in " ".join(result.summary())
    np.testing.assert_allclose(nats(result, "transferred"), LIKELY, atol=1e-3)
    assert (nats(result, "neutral") < LIKELY - 5).all()


@pytest.mark.thorough
def test_generated_profile(model, source):
    result = run(model, source, profile="generation")
    assert topics(result, "layer 0", 1) == ["b"] * 12
    assert topics(result, "layer 1", 1) == ["b"] + ["c"] * 11


def test_the_words_are_drawn_evenly(model, newline):
    many = run(model, [text(*TEXTS[0], newline=newline)], samples=40, tokens=20, temperature=1.0, given=())
    written = " ".join(many.tables["generations"].query("condition == 'transferred'")["written"]).split()
    counts = np.array([written.count(f"a{k}") for k in range(WORDS)])
    assert counts.sum() == 800
    # four standard deviations of a binomial with p = 1/4
    assert (abs(counts - 200) < 4 * math.sqrt(800 * 0.25 * 0.75)).all()


def test_overlap_leaves_out_what_was_given_away(model, newline):
    # temperature 0 and equal logits: always the first word of the topic
    source = [f"{text('a', newline=newline)}"]
    result = run(model, source, temperature=0.0, tokens=4, given=(0, 3))
    scores = result.tables["scores"].set_index(["condition", "reference"])
    following = passages(model.tokenizer, source)[0].following
    assert following == tuple(word("a", 2 * k) for k in range(5))  # a0 a2 a0 a2 a0
    # written: a0 a0 a0 a0; of the paragraph three tokens are a0, and 2 · 3 / (4 + 5)
    assert scores.loc[("transferred", 0), "overlap"] == pytest.approx(6 / 9)
    # without its first three: a2 a0
    assert scores.loc[("transferred", 3), "overlap"] == pytest.approx(2 / 6)
    assert scores.loc[("neutral", 3), "overlap"] == 0
    assert scores.loc[("given 3", 3), "overlap"] == 0
    assert ("given 3", 0) not in scores.index
    assert scores.loc[("transferred", 0), "bigrams"] == 0  # a0 a0 is no pair of the paragraph


def test_a_text_that_does_not_fit_is_refused(model, newline):
    long = text("a", before=CONTEXT, newline=newline)
    with pytest.raises(ValueError, match=r"texts\[1\] is too long: 6[67] tokens .* at most 64"):
        run(model, [text("a", newline=newline), long])
    with pytest.raises(ValueError, match="is too long"):
        run(model, [text("a", newline=newline)], tokens=60)
