"""Many documents behind every number: parts of long documents, rows that mix none, clusters, packages in turn."""

import random
import warnings
from collections import Counter
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import pytest
from conftest import tiny_tokenizer, words
from hypothesis import given, settings
from hypothesis import strategies as st

import sepcap
from sepcap.studies.pruning.plan import plan
from sepcap.tasks import batches
from sepcap.tasks.batches import TokenSample, components, sample_tokens
from sepcap.tasks.documents import Spelling, in_rounds, package_of
from sepcap.tasks.task import Task


class Numbers:
    """A tokenizer of texts of numbers: a token is the number."""

    bos_token_id = eos_token_id = 0

    def __init__(self):
        self.characters = 0

    def get_vocab(self):
        return {}

    def __call__(self, texts, **options):
        self.characters += sum(map(len, texts))
        return {"input_ids": [[int(word) for word in text.split()] for text in texts]}


def numbers(start: int, n: int) -> str:
    """n numbers from start on, all of six digits, so that a cut between two words is seen in the numbers."""
    return " ".join(str(100_000 + start + i) for i in range(n))


@dataclass
class Named:
    """A source whose documents have names."""

    texts: list[str]
    names: list[str]
    fingerprint: str = "named"

    def documents(self, split: str) -> Any:
        return datasets.Dataset.from_dict({"text": self.texts, "name": self.names})

    def indices(self, split: str, n: int) -> str:
        return f"0:{n}"


def sample_of(texts, tokens, context=8, names=None, **options) -> TokenSample:
    source = Named(texts, names or [f"{i}.py" for i in range(len(texts))])
    return sample_tokens(Task("by hand", (source,)), "evaluate", Numbers(), tokens, context, **options)


def inside(row) -> list[list[int]]:
    """The stretches between BOS of a row."""
    found = [[]]
    for token in row[1:].tolist():
        found.append([]) if token == 0 else found[-1].append(token)
    return found


@settings(deadline=None, max_examples=60)
@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=12), context=st.integers(3, 12), seed=st.integers(0, 3))
def test_a_row_is_a_part_of_one_document_or_several_whole_ones(lengths, context, seed):
    texts = [numbers(1000 * i, n) for i, n in enumerate(lengths)]
    total = sum(min(n, context - 1) for n in lengths)
    sample = sample_of(texts, total, context, names=["a/x.py"] * len(texts), seed=seed)
    assert sample.tokens == total
    seen = []
    for row, documents in zip(sample.rows, sample.row_documents, strict=True):
        assert row[0] == 0
        assert len(row) <= context
        pieces = inside(row)
        assert len(pieces) == len(documents)
        for piece in pieces:
            document = (piece[0] - 100_000) // 1000
            assert piece == list(range(piece[0], piece[0] + len(piece)))
            whole = len(piece) == lengths[document]
            assert whole or (len(pieces) == 1 and len(piece) == context - 1)
            seen.append(document)
    assert sorted(seen) == list(range(len(lengths)))
    assert sample.n_documents == len(lengths)
    assert sample.clusters.tolist() == list(range(len(sample.rows)))


def test_by_hand_in_order():
    texts = ["1 2 3", numbers(0, 50), "4 5 6", "7 8", "9"]
    sample = sample_of(texts, 16, context=8, names=["a/b.py"] * 5)
    rows = [row.tolist() for row in sample.rows]
    # the long one gives a row of its own at once; the short ones wait for each other
    assert len(rows[0]) == 8
    assert rows[1:] == [[0, 1, 2, 3, 0, 4, 5, 6], [0, 7, 8, 0, 9]]
    assert sample.row_documents == ((0,), (1, 2), (3, 4))
    assert sample.indices == ([1, 0, 2, 3, 4],)
    less = sample_of(texts, 11, context=8, names=["a/b.py"] * 5)
    assert [row.tolist() for row in less.rows[1:]] == [[0, 1, 2, 3, 0, 4]]
    assert less.n_documents == 3
    assert sample.take([2, 0]).row_documents == ((3, 4), (0,))
    assert sample.take([2, 0]).n_documents == 3


@pytest.mark.parametrize("per_document", ["row", 3, 20, None])
@pytest.mark.parametrize("mixed", [False, True])
def test_budgets_are_exact_and_prefixes_of_each_other(per_document, mixed):
    rng = random.Random(0)
    texts = [numbers(1000 * i, rng.choice([1, 3, 5, 40])) for i in range(60)]
    sources = (Named(texts, ["a"] * 60), Named([text.replace("10", "20") for text in texts], [f"{i % 7}/x" for i in range(60)]))
    task = Task("t", sources if mixed else sources[:1])
    largest = sample_tokens(task, "collect", Numbers(), 120, 8, per_document=per_document)
    flat = [token for row in largest.rows for token in row.tolist()]
    for tokens in (1, 5, 7, 8, 64, 119, 120):
        sample = sample_tokens(task, "collect", Numbers(), tokens, 8, per_document=per_document)
        own = [token for row in sample.rows for token in row.tolist()]
        assert sum(token != 0 for token in own) == sample.tokens == tokens
        assert flat[: len(own)] == own
        whole, parts = largest.row_documents[: len(sample.rows)], sample.row_documents
        assert parts[:-1] == whole[:-1]
        assert parts[-1] == whole[-1][: len(parts[-1])]


def test_a_limit_beyond_a_row_fills_rows_of_one_document():
    sample = sample_of([numbers(0, 50), numbers(1000, 50), "7 8"], 42, context=8, names=["a"] * 3, per_document=20)
    assert [len(row) - 1 for row in sample.rows] == [7, 7, 6, 7, 7, 6, 2]
    assert sample.clusters.tolist() == [0, 0, 0, 1, 1, 1, 2]
    assert sample.n_documents == 3
    joined = [token for row in sample.rows[:3] for token in row[1:].tolist()]
    assert joined == list(range(joined[0], joined[0] + 20))


def test_whole_documents_are_packed_and_their_rows_linked():
    # rows of 7: 10 tokens | 3 of the second, its end with the third | the fourth begins a row by itself
    texts = [numbers(0, 10), numbers(1000, 8), numbers(2000, 4), numbers(3000, 7)]
    sample = sample_of(texts, 29, context=8, per_document=None)
    assert sample.row_documents == ((0,), (0, 1), (1, 2), (2, 3), (3,))
    assert sample.clusters.tolist() == [0] * 5
    assert sample.n_documents == 4
    assert sample.groups is None
    assert sample.take([0, 1, 3, 4]).clusters.tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("rows", "clusters"),
    [
        ([], []),
        ([(0,), (1,), (2,)], [0, 1, 2]),
        ([(5,), (0, 1), (5,)], [0, 1, 0]),
        ([(0, 1), (2,), (3, 4), (1, 3)], [0, 1, 0, 0]),
        ([(9,), (8,), (9, 8), (1,)], [0, 0, 0, 1]),
    ],
)
def test_components_by_hand(rows, clusters):
    assert components(rows).tolist() == clusters


def test_a_row_without_documents_of_its_own_is_one_by_itself():
    sample = TokenSample("t", "evaluate", (np.array([0, 1]), np.array([0, 2])), 0, 2, 2, ([0],), "f")
    assert sample.clusters.tolist() == [0, 1]
    assert sample.n_documents == 2


# Places in long documents


def place(text, limit=5, seed=0):
    ids, cut = Spelling(Numbers()).part(text, limit, seed)
    assert cut
    assert len(ids) == limit
    assert ids == list(range(ids[0], ids[0] + limit))
    return ids[0] - 100_000


def test_the_place_depends_on_the_seed_and_the_text_alone():
    texts = [numbers(1000 * i, 200) for i in range(30)]
    alone = {i: place(text) for i, text in enumerate(texts)}
    for order, tokens in ((range(30), 150), (range(29, -1, -1), 40)):
        sample = sample_of([texts[i] for i in order], tokens, context=6)
        for row in sample.rows:
            i = (row[1] - 100_000) // 1000
            assert row[1] - 100_000 == alone[i]
    assert [place(text, seed=1) for text in texts] != list(alone.values())
    assert place(texts[0] + " 5") != alone[0]


def test_places_are_spread_over_the_whole_document():
    n, limit = 300, 30
    starts = [place(numbers(1000 * i, n), limit) - 1000 * i for i in range(400)]
    assert min(starts) == 0
    assert max(starts) == n - limit
    # uniform on 0 … 270: mean 135 and standard deviation 78, so the mean of 400 is known to 4
    assert abs(np.mean(starts) - 135) < 16
    assert np.histogram(starts, 3, (0, 270))[0].min() > 400 / 3 - 4 * 9.5


def test_a_part_begins_at_a_line_where_one_is_near():
    lines = "\n".join(numbers(10 * i, 10) for i in range(100))
    for seed in range(20):
        assert place(lines, 60, seed) % 10 == 0


def test_a_long_document_costs_no_more_than_a_short_one():
    spent = []
    for text in (numbers(0, 2_000), numbers(0, 150_000)):
        tokenizer = Numbers()
        ids, cut = Spelling(tokenizer).part(text, 100)
        assert cut
        assert len(ids) == 100
        spent.append(tokenizer.characters)
    assert len(text) > 1e6
    assert spent[1] <= spent[0] <= 4000
    # of few characters to a token and of many
    for text in ("1 " * 500_000, " " * 300_000 + numbers(0, 50_000) + " " * 300_000):
        ids, cut = Spelling(Numbers()).part(text, 100)
        assert cut
        assert len(ids) == 100


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(1, 999), max_size=60), st.integers(1, 40), st.integers(0, 5), st.sampled_from([" ", "\n", "    "]))
def test_a_document_within_the_limit_is_used_whole(ids, limit, seed, between):
    found, cut = Spelling(Numbers()).part(between.join(map(str, ids)), limit, seed)
    assert cut == (len(ids) > limit)
    assert found == ids if not cut else len(found) == limit


def test_tokens_of_a_part_are_those_of_its_text():
    tokenizer, text = tiny_tokenizer(), " ".join(words(3, n=50))
    ids, cut = Spelling(tokenizer).part(text, 40)
    assert cut
    assert (part := tokenizer.decode(ids)) in text
    assert tokenizer(part, add_special_tokens=False)["input_ids"] == ids


# Packages


def test_packages_by_name():
    names = {
        "numpy/METADATA": "numpy",
        "transformers/models/llama4/configuration_llama4.py": "transformers",
        "stdlib:json/decoder.py": "stdlib:json",
        "stdlib:heapq.py": "stdlib:heapq",
        "stdlib:pydoc_data/topics.py#for": "stdlib:pydoc_data",
        "six.py": "six",
        "torch/include/ATen/ops/add.h": "ATen",
        "torch/include/torch/csrc/jit/passes/peephole.h": "torch",
    }
    assert {name: package_of(name) for name in names} == names


def test_in_rounds():
    assert list(in_rounds(map(iter, ([1, 4, 6], [2], [], [3, 5])))) == [1, 2, 3, 4, 5, 6]


def test_documents_come_from_all_packages_in_turn():
    counts = {"big": 40, "middle": 5, "small": 1}
    names = [f"{package}/{i}.py" for package, n in counts.items() for i in range(n)]
    texts = [numbers(1000 * i, 50) for i in range(len(names))]
    sample = sample_of(texts, 7 * 9, names=names)
    assert sample.groups == ("big", "middle", "small", "big", "middle", "big", "middle", "big", "middle")
    assert sample.indices == ([0, 40, 45, 1, 41, 2, 42, 3, 43],)
    other = sample_of(texts, 7 * 9, names=names, seed=1)
    assert Counter(other.groups) == Counter(sample.groups)
    assert other.indices != sample.indices
    # short ones of a package share rows, those of two packages do not
    short = sample_of(["1 2", "3 4", "5 6", "7 8"], 8, names=["a/1", "b/1", "a/2", "b/2"])
    assert [row.tolist() for row in short.rows] == [[0, 1, 2, 0, 5, 6], [0, 3, 4, 0, 7, 8]]
    assert short.groups == ("a", "b")
    assert short.take([1]).groups == ("b",)


def test_texts_without_names_have_no_packages(letters):
    assert sample_tokens(sepcap.load_task(letters), "collect", tiny_tokenizer(), 100, 32).groups is None


# Few documents


def test_a_sample_of_few_documents_says_how_many_there_are(monkeypatch):
    monkeypatch.setattr(batches, "FEW", 50)
    texts = [numbers(1000 * i, 7) for i in range(60)]
    with pytest.warns(UserWarning, match=r"task 'by hand': 343 tokens to evaluate come from 49 documents") as caught:
        assert sample_of(texts, 7 * 49).n_documents == 49
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert sample_of(texts, 7 * 50).n_documents == 50
    with pytest.warns(UserWarning, match=r"fewer tokens .* 60 documents with 420 tokens, at most 7 of each \(per_document=None") as caught:
        sample_of(texts, 1000)
    assert len(caught) == 1


def test_what_is_warned_of_is_the_number_of_clusters_that_are_drawn(monkeypatch):
    monkeypatch.setattr(batches, "FEW", 50)
    # every document but the last ends within a row, two tokens before its end
    long = [numbers(1000 * i, 13 if i else 12) for i in range(60)]
    said = r"60 documents in 1 cluster \(documents that share rows\)"
    with pytest.warns(UserWarning, match=rf"779 tokens to evaluate come from {said}; a single one has no standard error") as caught:
        assert set(sample_of(long, 12 + 59 * 13, per_document=None).clusters.tolist()) == {0}
    assert len(caught) == 1
    with pytest.warns(UserWarning, match=rf"fewer tokens .* {said} with 779 tokens.*; a single one has no standard error"):
        sample_of(long, 800, per_document=None)
    short, names = [numbers(1000 * i, 2) for i in range(100)], [f"one/{i}.py" for i in range(100)]  # two fit one row
    with pytest.warns(UserWarning, match=r"come from 98 documents in 49 clusters \(.*\); intervals over fewer than 50 are wide"):
        sample_of(short, 2 * 98, names=names)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(sample_of(short, 2 * 100, names=names).rows) == 50


# The tasks of the package


@pytest.mark.slow
def test_fifteen_thousand_tokens_of_code_are_of_59_documents_or_more():
    tokenizer = sepcap.load_model("default").tokenizer
    for split in ("collect", "evaluate"):
        sample = sample_tokens(sepcap.load_task("local-code"), split, tokenizer, 15_000, 256)
        assert sample.tokens == 15_000
        assert sample.n_documents >= 59
        assert len(set(sample.clusters.tolist())) == len(sample.rows)
        python, cpp = (len(indices) for indices in sample.indices)
        assert min(python, cpp) >= 29
        assert len(set(sample.groups)) > 10


# What is measured on them


def test_statistics_evaluations_and_runs_know_their_documents(tiny_opt, letters, digits):
    statistics = sepcap.collect(tiny_opt, letters, tokens=200, context=32)
    assert statistics.n_documents == 7  # 31 of each, the last one 14
    assert "200 positions of 7 documents" in repr(statistics)
    assert statistics.merge(statistics.merge(statistics)).n_documents == 21
    of_unknown = {name: statistics.info[name] for name in ("model", "rotation") if name in statistics.info}
    assert statistics.merge(sepcap.Statistics(statistics, of_unknown)).n_documents is None
    result = sepcap.evaluate(tiny_opt, letters, tokens=200, context=32, per_document=40)
    assert result.clusters.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert result.n_documents == 5
    assert result.per_cluster[:, 0].tolist() == [40] * 5
    budgets = {"tokens": 60, "eval_tokens": 80, "per_document": 10, "steps": 1}
    resolved = plan(tiny_opt, sepcap.PruningConfig(forget=letters, retain=digits, **budgets)).resolved
    assert resolved["n_documents"] == {split: dict.fromkeys(("forget", "retain"), n) for split, n in (("collect", 6), ("evaluate", 8))}


@pytest.mark.parametrize("wrong", ["rows", 0, -1, 2.5])
def test_a_limit_that_is_none(tiny_opt, letters, wrong):
    with pytest.raises(ValueError, match="per_document="):
        sepcap.evaluate(tiny_opt, letters, tokens=20, per_document=wrong)
