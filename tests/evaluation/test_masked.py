"""Masked language models: every number against the plain RoBERTa and BERT, row by row without padding."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from encoders import (
    check_ablations,
    check_compared,
    check_pruning,
    check_statistics,
    counts,
    load,
    plain_activations,
    plain_counts,
    ragged,
    save_masked,
)

import sepcap
from sepcap.evaluation.next_token import evaluate_batch, evaluate_sample
from sepcap.models.kinds import kind_of
from sepcap.statistics.collect import collect_sample
from sepcap.tasks.samples import sample_task

FAMILIES = ("roberta", "bert")
SITES = ("mlp", "attn_pre_out", "attn_value")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {family: save_masked(family, tmp_path_factory.mktemp(family)) for family in FAMILIES}


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def folder(folders, family):
    return folders[family]


def test_score_is_the_plain_models(family, folder, letters):
    model = load(folder)
    assert kind_of(model) == "masked"
    sample = ragged(model, letters)
    expected = plain_counts(family, folder, sample)
    for size in (1, 5, 16):  # other batches, other padding
        np.testing.assert_allclose(counts(evaluate_sample(model, sample, batch_size=size)), expected, rtol=1e-4)
    n, top1, top10, _ = expected.sum(0)
    assert 0.05 < top1 / n < top10 / n < 0.95  # there are hits and misses


def test_score_of_a_task(family, folder, letters):
    model = load(folder)
    result = sepcap.evaluate(model, letters, tokens=400)
    sample = sample_task(model, sepcap.load_task(letters), "evaluate", 400)
    n, top1, top10, loss = plain_counts(family, folder, sample).sum(0)
    exact = [0.15 * int((~np.isin(row, sample.special)).sum()) for row in sample.rows]
    assert result.n == n
    assert abs(n - sum(exact)) < len(exact)
    assert all(abs(row_n - share) < 1 for row_n, share in zip(result.per_row[:, 0], exact, strict=True))
    assert (result.top1, result.top10) == (top1 / n, top10 / n)
    assert result.loss == pytest.approx(loss / n, rel=1e-5)
    assert result.info["tokens"] == 400
    asked = Counter(int(i) for batch in sample.batches(1) for i in batch.answers[batch.asked])
    assert list(result.skip_tokens) == sorted(asked, key=lambda i: (-asked[i], i))[:50]
    assert result.per_row[:, 3].sum() == sum(count for i, count in asked.items() if i not in result.skip_tokens)


def test_loss_is_that_of_hugging_face(folder, letters):
    """With its own labels, in one padded batch with its own attention mask."""
    model = load(folder)
    (batch,) = ragged(model, letters).batches(100)
    plain = transformers.AutoModelForMaskedLM.from_pretrained(folder).eval()
    assert not bool(batch.mask.all())
    labels = batch.answers.masked_fill(~batch.asked, -100)
    with torch.no_grad():
        loss = plain(input_ids=batch.inputs, attention_mask=batch.mask.long(), labels=labels).loss
    result = evaluate_batch(model, batch, torch.tensor([], dtype=torch.long)).sum(0)
    assert float(result[6] / result[0]) == pytest.approx(float(loss), rel=1e-5)


def test_only_the_chosen_positions_count(family, folder, letters):
    model = load(folder)
    (batch,) = ragged(model, letters).batches(100)
    nothing = torch.tensor([], dtype=torch.long)
    expected = evaluate_batch(model, batch, nothing)
    assert expected[:, 0].tolist() == batch.asked.sum(1).tolist()
    other = torch.where(batch.asked, batch.answers, 7)
    assert torch.equal(evaluate_batch(model, replace(batch, answers=other), nothing), expected)
    # without the mask the padding would be seen
    unmasked = evaluate_batch(model, replace(batch, mask=None), nothing)
    assert (unmasked - expected).abs().max() > 1e-3
    if family == "bert":  # what is masked can be anything; RoBERTa goes by the padding id for its positions too
        noise = torch.where(batch.real, batch.inputs, 9)
        torch.testing.assert_close(evaluate_batch(model, replace(batch, inputs=noise), nothing), expected)


def test_statistics_are_the_plain_models(family, folder, letters):
    model = load(folder)
    sample = ragged(model, letters, "collect")
    z = plain_activations(family, folder, sample)
    assert z["mlp"].shape[1] == sum(int((~np.isin(row, sample.special)).sum()) for row in sample.rows)
    for size in (1, 4, 16):
        check_statistics(collect_sample(model, sample, SITES, batch_size=size), z)


def test_special_tokens_count_if_asked_for_and_padding_never(folder, letters):
    model = load(folder)
    sample = ragged(model, letters, "collect")
    stats = collect_sample(model, sample, ("mlp",), batch_size=8, include_bos=True, histogram=True)
    assert stats["mlp"].count == sum(map(len, sample.rows))
    without = collect_sample(model, sample, ("mlp",), batch_size=8, histogram=True)
    assert without["mlp"].count == sample.tokens == without.info["tokens"]


def test_collect_and_evaluate_read_different_texts(folder, letters):
    model = load(folder)
    collected = sepcap.collect(model, letters, tokens=300).info["documents"][0]
    evaluated = sepcap.evaluate(model, letters, tokens=300).info["documents"][0]
    assert collected
    assert evaluated
    assert not set(collected) & set(evaluated)


def test_ablations(family, folder, letters):
    check_ablations(family, folder, letters, context=24)


@pytest.mark.thorough
def test_ablations_compared(family, folder, letters):
    check_compared(family, folder, letters)


@pytest.mark.thorough
def test_pruning_resumes_and_saves(family, folder, letters, digits, tmp_path):
    check_pruning(family, folder, letters, digits, tmp_path)
