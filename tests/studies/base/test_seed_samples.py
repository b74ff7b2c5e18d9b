"""Samples for several seeds: no common document where there are enough, and the share in common where there are not."""

import itertools
import re
from types import SimpleNamespace

import pytest

import sepcap
from sepcap.studies.base.seed_samples import disjoint_parts, sample_seeds, shared_documents, what_seeds_share
from sepcap.studies.base.task_sets import NamedTasks
from sepcap.tasks.load import load_task
from sepcap.tasks.samples import sample_task


def asked(tokens, seeds, context=16):
    return SimpleNamespace(tokens=tokens, seeds=seeds, context=context, per_document="row")


def rows_of(sample):
    return {row.tobytes() for row in sample.rows}


def test_seeds_have_no_document_in_common_where_there_are_enough(trained, letters):
    with pytest.warns(UserWarning, match="smallest of 3") as said:
        found = sample_seeds(trained, load_task(letters, name="letters"), asked(150, (3, 0, 9)))
    fewest = min(sample.n_documents for (sample,) in found.by_seed.values())
    assert len(said) == 1
    assert re.search(rf"smallest of 3 samples to collect has \d+ tokens of {fewest} documents", str(said[0].message))
    whole = sample_task(trained, load_task(letters, name="letters"), "collect", 450, 16, 3)
    assert found.shared == 0
    samples = [sample for (sample,) in found.by_seed.values()]
    assert list(found.by_seed) == [3, 0, 9]
    # dealt out: every row once, each about a third, and each knows its own documents
    assert sum(len(sample.rows) for sample in samples) == len(whole.rows)
    assert set.union(*map(rows_of, samples)) == rows_of(whole)
    assert all(abs(sample.tokens - 150) <= 15 for sample in samples)
    documents = [set(sample.indices[0]) for sample in samples]
    assert all(not one & other for one, other in itertools.combinations(documents, 2))
    assert set.union(*documents) == set(whole.indices[0])
    assert [len(each) for each in documents] == [sample.n_documents for sample in samples]
    assert shared_documents(samples) == 0
    assert len({sample.fingerprint for sample in samples}) == 3
    # not the first third of the order in which packages give them
    assert rows_of(samples[0]) != rows_of(disjoint_parts(whole, 3)[0])
    again = sample_seeds(trained, load_task(letters, name="letters"), asked(150, (3, 0, 9)))
    assert [rows_of(sample) for (sample,) in again.by_seed.values()] == list(map(rows_of, samples))


def test_what_seeds_share_is_measured_and_said_where_documents_are_few(trained, letters):
    task = load_task(letters[:40], name="few")
    there = sample_task(trained, task, "collect", 150, 16)
    with pytest.warns(UserWarning, match=r"task 'few' has too few documents for 3 seeds of 150 tokens.*any two seeds share \d+% of their"):
        found = sample_seeds(trained, task, asked(150, (0, 1, 2)))
    documents = [set(sample.indices[0]) for (sample,) in found.by_seed.values()]
    by_hand = [len(one & other) / min(len(one), len(other)) for one, other in itertools.combinations(documents, 2)]
    assert found.shared == pytest.approx(sum(by_hand) / 3)
    assert found.shared > 0.3
    assert all(sample.tokens == there.tokens for (sample,) in found.by_seed.values())
    assert what_seeds_share({"one": 0.0, "few": 0.5}) == (
        "Seeds share 50% of their documents of few, so that intervals over seeds are too narrow."
    )
    alone = sample_seeds(trained, task, asked(150, (1,)))
    assert (alone.shared, rows_of(alone.by_seed[1][0])) == (0, rows_of(sample_task(trained, task, "collect", 150, 16, 1)))


def test_retain_documents_are_apart_over_tasks_and_seeds(trained, letters, digits):
    tasks = NamedTasks.of((load_task(letters[:80], name="one"), load_task(letters[80:], name="two")), load_task(digits, name="base"))
    samples, shared = tasks.seed_samples(trained, asked(60, (0, 1)), each_its_own=True)
    assert shared == {"one": 0, "two": 0, "base": 0}
    against = [samples[seed][f"base for {name}"] for seed in (0, 1) for name in ("one", "two")]
    assert all(not rows_of(one) & rows_of(other) for one, other in itertools.combinations(against, 2))
    together, _ = tasks.seed_samples(trained, asked(60, (0, 1)), each_its_own=False)
    assert [list(of_seed) for of_seed in together.values()] == [["one", "two", "base"]] * 2


def test_defaults_leave_room_for_seeds_without_common_documents():
    """A local task has 180 documents or more to collect from, of each at most 255 tokens with the embedded model."""
    for config in (sepcap.OverlapConfig(), sepcap.ModularityConfig()):
        assert config.tokens * len(config.seeds) <= 0.95 * 180 * 255
