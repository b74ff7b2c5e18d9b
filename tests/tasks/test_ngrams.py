"""13-grams: against a set of tuples of words, and what is left of a text without some of them."""

import itertools
import random
import re

import numpy as np
import pytest

from sepcap.tasks.sources.ngrams import (
    COMMON,
    LENGTH,
    among,
    common_runs,
    copies,
    copies_and_idiom,
    runs,
    sampled,
    united,
    without,
    words_in,
)


def tuples(text: str) -> list[tuple[str, ...]]:
    words = re.findall(r"\w+|[^\w\s]", text)
    return [tuple(words[i : i + LENGTH]) for i in range(len(words) - LENGTH + 1)]


def random_text(rng, words=60, vocabulary=4) -> str:
    return " ".join(rng.choices(["if", "x", "=", "(", ")", "ß", "_a1", "\n"][:vocabulary], k=words))


@pytest.mark.parametrize("vocabulary", [2, 4, 8])
def test_two_runs_have_one_hash_exactly_where_their_words_are_equal(vocabulary):
    rng = random.Random(vocabulary)
    words = [word for _ in range(50) for word in tuples(random_text(rng, 200, vocabulary))]
    rng.seed(vocabulary)
    hashes = [int(h) for _ in range(50) for h in runs(random_text(rng, 200, vocabulary))]
    assert len(words) == len(hashes) > 5000
    by_words, by_hash = {}, {}
    for word, number in zip(words, hashes, strict=True):
        assert by_words.setdefault(word, number) == number
        assert by_hash.setdefault(number, word) == word


def test_too_few_words_have_no_run_and_white_space_does_not_count():
    assert len(runs("")) == len(runs("one two three")) == 0
    assert len(runs("a b c d e f g h i j k l")) == 0
    np.testing.assert_array_equal(runs("a b c d e f g h i j k l m"), runs("a\tb c\n\nd e f g h i j k l m "))


def test_every_character_of_a_script_without_spaces_is_a_word():
    chinese = "语言模型把会写代码这件事放在"  # 14 characters
    assert len(runs(chinese)) == 2
    np.testing.assert_array_equal(runs(chinese[1:]), runs(chinese)[1:])
    assert len(runs("ภาษาไทยไม่มีช่องว่าง")) > 0
    assert len(runs("a b c d e f g h i j k l 模型")) == 2
    assert len(runs("한국어는 띄어쓰기가 있다")) == 0  # Korean has spaces


def test_the_words_of_overlapping_runs_by_hand():
    shared = np.zeros(30, dtype=bool)
    shared[[2, 4, 29]] = True
    assert np.flatnonzero(words_in(shared)).tolist() == [*range(2, 17), *range(29, 42)]
    assert len(words_in(np.zeros(0, dtype=bool))) == 0


def test_idiom_is_what_twenty_documents_have_and_not_nineteen():
    rng = random.Random(1)
    often, seldom = (" ".join(f"{name}{i}" for i in range(LENGTH)) for name in "os")
    documents = []
    for i in range(COMMON):
        own = " ".join(f"w{rng.randrange(10**9)}" for _ in range(20))
        documents.append(united([runs(f"{often} {own}" + (f" {seldom}" if i else ""))]))
    assert common_runs(documents).tolist() == runs(often).tolist()


def numbers(*runs) -> np.ndarray:
    return united([np.array(runs, dtype=np.uint64)])


def test_a_copy_has_more_than_half_of_its_runs_in_documents_before_it():
    documents = [numbers(1, 2, 3, 4), numbers(3, 4, 5, 6), numbers(4, 5, 6, 7), numbers(), numbers(8)]
    # the second shares two of four, the third three of four
    assert copies(documents).tolist() == [False, False, True, False, False]
    assert copies([documents[0], documents[0]]).tolist() == [False, True]
    assert copies([]).tolist() == []


@pytest.mark.parametrize("own", [1, 7, 8, 20])
def test_what_many_documents_have_is_idiom_up_to_half_of_each_and_a_copy_above(own):
    """Eight runs stand in all documents of two parts; one document of each part is no copy, and two are too few for idiom."""
    count = itertools.count(100)
    parts = [[numbers(*range(8), *itertools.islice(count, own)) for _ in range(COMMON)] for _ in range(2)]
    copied, idiom = copies_and_idiom(*parts)
    assert [part.tolist() for part in copied] == [[False] + [own < 8] * (COMMON - 1)] * 2
    assert idiom.tolist() == (list(range(8)) if own >= 8 else [])


def test_lines_with_a_word_of_a_shared_run_go_and_long_pieces_stay():
    quoted = " ".join(f"q{i}" for i in range(LENGTH))
    text = f"first line stays\nshort begin {quoted}\ntiny\nx {quoted[:-3]}\n\nlast line stays as well\n"
    shared = among(runs(text), np.sort(runs(quoted)))
    assert shared.sum() == 1
    assert without(text, shared, 1) == "first line stays\n\ntiny\nx " + quoted[:-3] + "\n\nlast line stays as well"
    assert without(text, shared, 10) == "first line stays\n\ntiny\nx " + quoted[:-3] + "\n\nlast line stays as well"
    assert without(text, shared, 20).startswith("tiny")
    assert without(text, np.zeros_like(shared), 1000) == text


@pytest.mark.parametrize("seed", range(20))
def test_nothing_of_another_text_is_left(seed):
    rng = random.Random(seed)
    one, other = random_text(rng, 400, 8), random_text(rng, 4000, 8)
    start = rng.randrange(200)
    text = one[:start] + other[100:400] + one[start:]
    held = set(tuples(other))
    left = without(text, among(runs(text), united([runs(other)])), 1)
    assert held & set(tuples(text))
    assert not {word for piece in left.split("\n\n") for word in tuples(piece)} & held


def test_a_sixteenth_is_sampled_the_same_ones_wherever_they_stand():
    rng = random.Random(4)
    texts = [" ".join(f"w{rng.randrange(10**9)}" for _ in range(4000)) for _ in range(8)]
    parts = [sampled(runs(text)) for text in texts]
    assert sum(map(len, parts)) / sum(len(runs(text)) for text in texts) == pytest.approx(1 / 16, rel=0.1)
    everything = sampled(united([runs(text) for text in texts]))
    assert all(among(part, everything).all() for part in parts)
    assert len(everything) == sum(map(len, parts))
