"""Skip-50 lists: counted by hand, kept in a file, and made anew where the file is of no use."""

import json
import os
from collections import Counter

import pytest
from huggingface_hub import constants
from transformers import AutoTokenizer

import sepcap
from sepcap.evaluation import frequent
from sepcap.tasks.task import load_task

HOW = {"tokens": 300, "context": 16}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache folder of the test's own."""
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "sepcap" / "skip50"


@pytest.fixture
def tokenizer(tiny_folders):
    return AutoTokenizer.from_pretrained(tiny_folders["opt"])


@pytest.fixture
def nothing_is_tokenised(monkeypatch):
    """From when it is called on, samples cannot be made."""

    def begin():
        def refuse(*args, **kwargs):
            raise AssertionError("a sample was made")

        monkeypatch.setattr(frequent, "sample_task", refuse)
        monkeypatch.setattr(frequent, "sample_tokens", refuse)

    return begin


def test_the_list_is_that_of_a_count_by_hand(tokenizer, letters):
    ids = [i for row in load_task(letters).sources[0].documents("evaluate") for i in tokenizer(row["text"])["input_ids"]]
    by_hand = sorted(Counter(ids[:300]).items(), key=lambda pair: (-pair[1], pair[0]))[:50]
    table = sepcap.skip50(tokenizer, letters, **HOW, per_document=None)
    assert list(zip(table["token"], table["count"], strict=True)) == by_hand
    assert table["text"].tolist() == [tokenizer.decode([token]) for token, _ in by_hand]


def test_it_is_what_an_evaluation_leaves_out(tiny_opt, letters):
    evaluated = sepcap.evaluate(tiny_opt, letters, **HOW).skip50(tiny_opt.tokenizer)
    assert sepcap.skip50(tiny_opt, letters, **HOW).equals(evaluated)


def test_of_a_masked_model_the_hidden_tokens_are_counted(letters, tmp_path):
    from encoders import save_masked

    save_masked("roberta", tmp_path / "roberta")
    model = sepcap.load_model(tmp_path / "roberta", device="cpu")
    evaluated = sepcap.evaluate(model, letters, **HOW).skip50(model.tokenizer)
    assert sepcap.skip50(model, letters, **HOW).equals(evaluated)
    assert not sepcap.skip50(model.tokenizer, letters, **HOW).equals(evaluated)


def test_the_second_time_no_text_is_tokenised(tiny_opt, tokenizer, letters, cache, nothing_is_tokenised):
    first = sepcap.skip50(tiny_opt, letters, **HOW)
    assert len(list(cache.iterdir())) == 1
    nothing_is_tokenised()
    assert sepcap.skip50(tiny_opt, letters, **HOW).equals(first)
    assert sepcap.skip50(tokenizer, letters, **HOW).equals(first)  # the model's own tokenizer


def test_what_decides_about_a_list_makes_another_file(tokenizer, letters, digits, cache):
    sepcap.skip50(tokenizer, letters, **HOW)
    sepcap.skip50(tokenizer, digits, **HOW)
    sepcap.skip50(tokenizer, letters, tokens=301, context=16)
    sepcap.skip50(tokenizer, letters, tokens=300, context=17)
    sepcap.skip50(tokenizer, letters, **HOW, per_document=9)
    tokenizer.add_tokens(["abcd"])
    sepcap.skip50(tokenizer, letters, **HOW)
    assert len(list(cache.iterdir())) == 6


@pytest.mark.parametrize("damage", [b"", b"[[1, 2]", b"{}", b"[]", b'["abc"]', b"[[5, 1], [6, 2]]", b"[[5, 0]]", b"\xff\xfe"])
def test_a_damaged_file_is_made_anew(tokenizer, letters, cache, damage):
    first = sepcap.skip50(tokenizer, letters, **HOW)
    [file] = cache.iterdir()
    whole = file.read_bytes()
    file.write_bytes(damage)
    assert sepcap.skip50(tokenizer, letters, **HOW).equals(first)
    assert file.read_bytes() == whole
    assert json.loads(whole)[0][1] == first["count"][0]


def test_where_nothing_can_be_written_the_list_is_still_made(tokenizer, letters, tmp_path, monkeypatch):
    first = sepcap.skip50(tokenizer, letters, **HOW)
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "file"))
    assert sepcap.skip50(tokenizer, letters, **HOW).equals(first)
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "closed"))
    (tmp_path / "closed").mkdir(mode=0o500)
    assert sepcap.skip50(tokenizer, letters, **HOW).equals(first)
    if os.geteuid():  # the superuser writes everywhere
        assert not list((tmp_path / "closed").iterdir())


def test_data_of_an_unknown_state_are_not_kept(tokenizer, letters, cache):
    task = load_task(letters)

    class Unknown(type(task.sources[0])):
        commit = None

        def __init__(self, source):
            self.__dict__ = source.__dict__

    sepcap.skip50(tokenizer, sepcap.Task("unknown", (Unknown(task.sources[0]),)), **HOW)
    assert not cache.exists()


def test_bad_input(letters):
    with pytest.raises(TypeError, match=r"give what sepcap\.load_model returns"):
        sepcap.skip50("gpt2", letters)
