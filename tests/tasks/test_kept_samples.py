"""A sample that is asked for again is not drawn again, unless something that it depends on has changed."""

import dataclasses
import os
import warnings

import numpy as np
import pytest
from tiny import words

import sepcap
from sepcap.tasks import samples
from sepcap.tasks.samples import sample_task
from sepcap.tasks.sources import local

TEXTS = words(3)


@pytest.fixture(autouse=True)
def draws(monkeypatch):
    """Number of draws in a test, and none kept from before."""
    monkeypatch.setattr(samples, "_DRAWN", type(samples._DRAWN)())
    drawn, original = [], samples.sample_tokens

    def counted(*args, **kwargs):
        drawn.append(args)
        return original(*args, **kwargs)

    monkeypatch.setattr(samples, "sample_tokens", counted)
    return drawn


def equal(one, other) -> bool:
    fields = [field.name for field in dataclasses.fields(one) if field.name != "rows"]
    same = len(one.rows) == len(other.rows) and all(map(np.array_equal, one.rows, other.rows))
    return same and all(getattr(one, name) == getattr(other, name) for name in fields)


@pytest.mark.filterwarnings("ignore:task")
def test_the_second_is_the_first_and_is_the_callers_own(tiny_opt, draws):
    first, second = (sample_task(tiny_opt, sepcap.load_task(TEXTS), "evaluate", 300) for _ in range(2))
    assert len(draws) == 1
    assert equal(first, second)
    second.rows[0][:] = 7
    second.indices[0].clear()
    assert equal(first, sample_task(tiny_opt, sepcap.load_task(TEXTS), "evaluate", 300))
    samples._DRAWN.clear()
    assert equal(first, sample_task(tiny_opt, sepcap.load_task(TEXTS), "evaluate", 300))
    assert len(draws) == 2


@pytest.mark.filterwarnings("ignore:task")
def test_whatever_a_sample_depends_on_gives_another(tiny_opt, draws):
    def sample(texts=TEXTS, split="evaluate", tokens=300, more=(), **options):
        sample_task(tiny_opt, sepcap.load_task(texts, **options), split, tokens, *more)
        return len(draws)

    spaced = [text.replace(" ", "  ", 1) for text in TEXTS]
    assert sepcap.load_task(spaced, name="a").fingerprint == sepcap.load_task(TEXTS, name="a").fingerprint
    calls = [
        {}, {"split": "collect"}, {"tokens": 301}, {"more": (16,)}, {"more": (16, 1)}, {"more": (16, 1, 5)}, {"more": (16, 1, None)},
        {"name": "other"}, {"special_tokens": True}, {"answers_after": "e"},
        {"texts": spaced}, {"texts": TEXTS[::-1]}, {"texts": TEXTS[1:]},
    ]  # fmt: skip
    assert [sample(**call) for call in calls] == list(range(1, len(calls) + 1))
    assert [sample(**call) for call in calls] == [len(calls)] * len(calls)
    tiny_opt.tokenizer.add_tokens(["abc"])  # in place
    assert sample() == len(calls) + 1
    tiny_opt.tokenizer.bos_token = "</s>"
    assert sample() == len(calls) + 2


@pytest.mark.filterwarnings("ignore:task")
def test_a_file_that_changed_is_read_again(tiny_opt, draws, tmp_path):
    file = tmp_path / "texts.jsonl"
    for text in ("good", "evil"):  # of the same length
        file.write_text("".join(f'{{"text": "{text} {line}"}}\n' for line in TEXTS))
        for _ in range(2):
            sample = sample_task(tiny_opt, sepcap.load_task(file), "evaluate", 300, per_document=None)
            assert text in tiny_opt.tokenizer.decode(sample.rows[0])
    assert len(draws) == 2


def test_a_kept_sample_warns_as_it_did_when_it_was_drawn(tiny_opt, draws):
    said = []
    for _ in range(2):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            sample_task(tiny_opt, sepcap.load_task(TEXTS[:6]), "evaluate", 10_000)
        said.append([str(warning.message) for warning in caught])
    assert said[0] == said[1]
    assert "fewer tokens to evaluate than the 10,000" in said[0][0]
    assert len(draws) == 1


@pytest.mark.filterwarnings("ignore:task")
def test_memory_is_bounded_and_the_least_used_are_dropped(tiny_opt, draws, monkeypatch):
    size = samples._size(sample_task(tiny_opt, sepcap.load_task(TEXTS), "evaluate", 300))
    samples._DRAWN.clear()
    draws.clear()
    monkeypatch.setattr(samples, "KEPT", int(2.1 * size))
    for tokens in (300, 301, 300, 302, 300):
        sample_task(tiny_opt, sepcap.load_task(TEXTS), "evaluate", tokens)
    assert [each.tokens for each in samples._DRAWN.values()] == [302, 300]
    assert len(draws) == 3
    monkeypatch.setattr(samples, "KEPT", int(1.1 * size))
    sample_task(tiny_opt, sepcap.load_task(TEXTS), "evaluate", 400)
    assert [each.tokens for each in samples._DRAWN.values()] == [302, 300]


def test_files_of_the_installation_are_listed_again_only_if_a_folder_changed(tmp_path, monkeypatch):
    package = tmp_path / "numpy" / "inner"
    package.mkdir(parents=True)
    (package / "one.py").write_text("pass")
    monkeypatch.setattr(local, "_roots", lambda: [("", str(tmp_path))])
    monkeypatch.setattr(local, "_LISTED", {})
    walks, original = [], os.walk
    monkeypatch.setattr(local.os, "walk", lambda root: walks.append(root) or original(root))

    def found(expected, listed):
        walks.clear()
        assert [file.name for file in local.find_files("python")] == expected
        assert bool(walks) is listed
        return local.LocalSource("python").fingerprint

    found(["numpy/inner/one.py"], True)
    before = found(["numpy/inner/one.py"], True)  # made a moment ago: the time of the folder may not tell the next change
    for folder in (tmp_path, package.parent, package):
        os.utime(folder, ns=(0, 10**18))
    assert found(["numpy/inner/one.py"], True) == found(["numpy/inner/one.py"], False) == before
    (package / "one.py").write_text("changed in place")
    assert found(["numpy/inner/one.py"], False) != before
    (package / "one.py").rename(package / "two.py")
    found(["numpy/inner/two.py"], True)
