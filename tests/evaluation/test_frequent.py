"""The targets that the skip-50 metrics leave out, counted by hand."""

from collections import Counter

import pytest
from encoders import save_masked
from transformers import AutoTokenizer

import sepcap
from sepcap.tasks.load import load_task

HOW = {"tokens": 300, "context": 16}


def test_the_list_is_that_of_a_count_by_hand(tiny_opt, tiny_folders, letters):
    tokenizer = AutoTokenizer.from_pretrained(tiny_folders["opt"])
    ids = [i for row in load_task(letters).sources[0].documents("evaluate") for i in tokenizer(row["text"])["input_ids"]]
    by_hand = sorted(Counter(ids[:300]).items(), key=lambda pair: (-pair[1], pair[0]))[:50]
    table = sepcap.evaluate(tiny_opt, letters, **HOW, per_document=None).skip50(tokenizer)
    assert list(zip(table["token"], table["count"], strict=True)) == by_hand
    assert table["text"].tolist() == [tokenizer.decode([token]) for token, _ in by_hand]


@pytest.mark.parametrize("tokens", [100, 300])
def test_of_a_masked_model_the_hidden_tokens_are_counted(letters, tmp_path, tokens):
    model = sepcap.load_model(save_masked("roberta", tmp_path / "roberta"), device="cpu")
    evaluated = sepcap.evaluate(model, letters, tokens=tokens, context=16)
    counts = evaluated.skip50(model.tokenizer)["count"]
    assert counts.is_monotonic_decreasing
    # as many targets as predictions, but for those of the tokens beyond the fifty
    assert evaluated.n - counts.sum() == evaluated.per_row[:, 3].sum()
