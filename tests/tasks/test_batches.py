"""Packing and sampling: a budget means the same tokens always, whatever the budget, batch size or cache."""

import random

import datasets
import numpy as np
import pytest
from conftest import tiny_tokenizer, words
from hypothesis import given, settings
from hypothesis import strategies as st

import sepcap
from sepcap.tasks.batches import make_batch, pack, sample_tokens, separator_of
from sepcap.tasks.sources.texts import DataSource
from sepcap.tasks.task import Task


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def flat(sample) -> list[int]:
    return [int(token) for row in sample.rows for token in row]


@settings(deadline=None, max_examples=60)
@given(
    documents=st.lists(st.lists(st.integers(1, 9), max_size=12), max_size=12),
    context=st.integers(2, 7),
    bos=st.sampled_from([0, None]),
)
def test_packing_keeps_every_token_in_order(documents, context, bos):
    rows = [row.tolist() for row in pack(documents, context, bos)]
    assert [t for row in rows for t in row if t != 0] == [t for ids in documents for t in ids]
    assert all(len(row) == context for row in rows[:-1])
    if bos is None:
        return
    assert all(row[0] == 0 for row in rows)
    # BOS stands before the first token of every document, and else only at the start of rows
    starts, marked = 0, []
    for ids in filter(None, documents):
        marked.append(starts)
        starts += len(ids)
    position, after_bos, inner = 0, set(), 0
    for row in rows:
        for i, token in enumerate(row):
            if token == 0:
                after_bos.add(position)
                inner += i > 0
            else:
                position += 1
    assert set(marked) <= after_bos
    assert inner < len(marked) or not marked  # never a BOS that no document asked for


@pytest.mark.parametrize(
    ("documents", "bos", "rows"),
    [
        ([[5, 6, 7], [8, 9]], 0, [[0, 5, 6, 7], [0, 8, 9]]),
        ([[5], [6, 7], [8]], 0, [[0, 5, 0, 6], [0, 7, 0, 8]]),
        ([[5, 6], [7, 8]], 0, [[0, 5, 6, 0], [0, 7, 8]]),
        ([[5, 6, 7, 8, 9], []], 0, [[0, 5, 6, 7], [0, 8, 9]]),
        ([[], [5], [], [6]], 0, [[0, 5, 0, 6]]),
        ([[5, 6, 7], [8, 9]], None, [[5, 6, 7, 8], [9]]),
        ([], 0, []),
        ([[]], 0, []),
    ],
)
def test_packing_by_hand(documents, bos, rows):
    assert [row.tolist() for row in pack(documents, 4, bos)] == rows


def test_budget_is_exact_and_the_same_every_time(tokenizer, letters):
    task = sepcap.load_task(letters)
    for tokens in (1, 30, 31, 32, 500, 1234):
        for split in ("collect", "evaluate"):
            sample = sample_tokens(task, split, tokenizer, tokens, 32)
            assert sum(t != 0 for t in flat(sample)) == sample.tokens == tokens
            assert sample.asked == tokens
            again = sample_tokens(sepcap.load_task(list(letters)), split, tokenizer, tokens, 32)
            assert flat(again) == flat(sample)
            assert again.fingerprint == sample.fingerprint
    other = sample_tokens(task, "evaluate", tokenizer, 1234, 31)
    assert other.fingerprint != sample.fingerprint
    assert sample.rows[0][0] == tokenizer.bos_token_id == 0


@pytest.mark.parametrize("mixed", [False, True])
def test_smaller_budget_is_a_prefix_of_a_larger_one(tokenizer, letters, digits, mixed):
    sources = tuple(sepcap.load_task(texts).sources[0] for texts in ([letters, digits] if mixed else [letters]))
    largest = flat(sample_tokens(Task("t", sources), "collect", tokenizer, 1000, 32))
    for tokens in (1, 17, 31, 62, 63, 500, 999):
        smaller = flat(sample_tokens(Task("t", sources), "collect", tokenizer, tokens, 32))
        assert largest[: len(smaller)] == smaller


def test_tokens_do_not_depend_on_the_batch_size(tokenizer, letters):
    sample = sample_tokens(sepcap.load_task(letters), "collect", tokenizer, 700, 32)
    seen = {size: [b.inputs[i][b.real[i]].tolist() for b in sample.batches(size) for i in range(len(b.inputs))] for size in (1, 3, 16, 100)}
    assert all(rows == [row.tolist() for row in sample.rows] for rows in seen.values())
    for size in seen:
        parts = list(sample.batches(size))
        assert all(len(b.inputs) == size for b in parts[:-1])
        assert sum(int(b.keep.sum()) for b in parts) == 700


def test_batch_marks_what_is_padding_and_what_is_bos():
    batch = make_batch([np.array([0, 5, 0, 6]), np.array([0, 7])], bos=0)
    assert batch.inputs.tolist() == [[0, 5, 0, 6], [0, 7, 0, 0]]
    assert batch.real.tolist() == [[True] * 4, [True, True, False, False]]
    assert batch.keep.tolist() == [[False, True, False, True], [False, True, False, False]]
    without = make_batch([np.array([5, 0, 6]), np.array([7])], bos=None)
    assert without.keep.tolist() == [[True] * 3, [True, False, False]]
    assert batch.to("cpu").inputs.tolist() == batch.inputs.tolist()


def test_tokenizer_without_bos(tokenizer, letters, monkeypatch):
    class Without:
        bos_token_id, eos_token_id, backend_tokenizer = None, None, tokenizer.backend_tokenizer

        def __call__(self, *args, **kwargs):
            return tokenizer(*args, **kwargs)

    class EndOnly(Without):
        eos_token_id = 2

    assert [separator_of(t) for t in (tokenizer, EndOnly(), Without())] == [0, 2, None]
    task = sepcap.load_task(letters)
    collected = sample_tokens(task, "collect", Without(), 100, 16)
    assert sum(map(len, collected.rows)) == collected.tokens == 100
    evaluated = sample_tokens(task, "evaluate", Without(), 100, 16)
    # nothing comes before the first token of a row that could predict it
    assert sum(len(row) - 1 for row in evaluated.rows) == evaluated.tokens == 100
    ended = sample_tokens(task, "collect", EndOnly(), 100, 16)
    assert all(row[0] == 2 for row in ended.rows)
    assert ended.tokens == 100


def test_mixture_is_balanced_in_tokens(tokenizer):
    # very short documents spend many positions on BOS, long ones hardly any
    short, long = words(1, n=900, length=1, alphabet="abcdefghijklm"), words(2, n=90, length=200, alphabet="0123456789")
    sources = tuple(sepcap.load_task(texts).sources[0] for texts in (short, long))
    sample = sample_tokens(Task("mixed", sources), "collect", tokenizer, 1200, 32)
    digits = sum(tokenizer.decode([t]).strip().isdigit() for t in flat(sample) if t != 0)
    letters = sum(tokenizer.decode([t]).strip().isalpha() for t in flat(sample) if t != 0)
    spaces = sum(not tokenizer.decode([t]).strip() for t in flat(sample) if t != 0)
    assert digits + letters + spaces == 1200
    assert abs(letters - (digits + spaces)) <= 31  # one row
    assert len(sample.indices) == 2


def test_mixture_ends_with_its_shortest_source(tokenizer, letters):
    few = words(3, n=4, length=20, alphabet="0123456789")
    sources = tuple(sepcap.load_task(texts).sources[0] for texts in (few, letters))
    with pytest.warns(UserWarning, match="fewer tokens to collect than the 5,000 asked for"):
        sample = sample_tokens(Task("mixed", sources), "collect", tokenizer, 5000, 32)
    alone = sample_tokens(Task("few", sources[:1]), "collect", tokenizer, 50, 32)
    assert 100 < sample.tokens < 1000
    of_few = sum(set(tokenizer.decode(row[row != 0]).strip()) <= set("0123456789 ") for row in sample.rows)
    assert abs(len(sample.rows) - 2 * of_few) <= 1
    assert flat(alone)[:32] == sample.rows[0].tolist()
    tiny = (sepcap.load_task(["0 1", "2 3"]).sources[0], sources[1])
    nothing = DataSource(datasets.Dataset.from_dict({"text": ["", "  ", "0"]}))  # one character: its first half is empty
    with pytest.raises(ValueError, match="too little text"):
        sample_tokens(Task("mixed", (sources[1], nothing)), "collect", tokenizer, 500, 32)
    assert sample_tokens(Task("mixed", tiny), "collect", tokenizer, 2, 32).tokens == 2


def test_fewer_tokens_than_asked_for(tokenizer, letters):
    task = sepcap.load_task(letters[:4], name="few")
    message = r"task 'few' has fewer tokens to evaluate than the 100,000 asked for: 2 documents with ([\d,]+) tokens"
    with pytest.warns(UserWarning, match=message) as caught:
        sample = sample_tokens(task, "evaluate", tokenizer, 100_000, 32)
    assert len(caught) == 1
    assert sample.asked == 100_000
    assert sample.tokens == sum(t != 0 for t in flat(sample))
    assert f"{sample.tokens:,} tokens" in str(caught[0].message)


def test_less_than_one_context(tokenizer):
    task = sepcap.load_task(["one two", "three four"], name="tiny")
    with pytest.raises(ValueError, match=r"task 'tiny' has too little text to collect: 1 documents .* less than one context of 32 tokens"):
        sample_tokens(task, "collect", tokenizer, 1000, 32)
    assert sample_tokens(task, "collect", tokenizer, 3, 32).tokens == 3  # three were asked for and are there
    for tokens, context, message in ((0, 32, "tokens=0"), (10, 1, "context=1")):
        with pytest.raises(ValueError, match=message):
            sample_tokens(task, "collect", tokenizer, tokens, context)


def test_order_of_the_texts_does_not_matter(tokenizer, letters):
    shuffled = random.Random(1).sample(letters, len(letters))
    one, other = (sample_tokens(sepcap.load_task(texts), "evaluate", tokenizer, 800, 32) for texts in (letters, shuffled))
    assert flat(one) == flat(other)
    # and the recorded indices lead to the same documents
    assert [letters[i] for i in one.indices[0]] == [shuffled[i] for i in other.indices[0]]


def test_only_tokens_after_the_word_are_targets_and_every_document_has_rows_of_its_own(tokenizer):
    texts = [f"{i} {'ab' * (i % 5)}={i * i}=" for i in range(90)]
    task = sepcap.load_task(texts, answers_after="=")
    (mark,) = tokenizer("=")["input_ids"]
    assert task.fingerprint != sepcap.load_task(texts).fingerprint
    for split in ("collect", "evaluate"):
        for per_document in ("row", None):
            sample = sample_tokens(task, split, tokenizer, 10_000, 32, per_document=per_document)
            assert all(list(row).count(0) == 1 for row in sample.rows)
            expected = [token for row in sample.rows for token in row[list(row).index(mark) + 1 :]]
            assert sample.targets().tolist() == expected
            (batch,) = sample.batches(1000)
            assert batch.answers[batch.asked].tolist() == expected
            size = len(sample.targets()) if split == "evaluate" else int(batch.keep.sum())
            assert sample.tokens == size == sample.take(range(len(sample.rows))).tokens
    assert sample_tokens(task, "evaluate", tokenizer, 7, 32).tokens == 7
    assert sample.fingerprint != sample_tokens(sepcap.load_task(texts), "evaluate", tokenizer, 10_000, 32).fingerprint
    with pytest.raises(ValueError, match="answers_after='==' is 2 tokens"):
        sample_tokens(sepcap.load_task(texts, answers_after="=="), "collect", tokenizer, 10, 32)
