"""Galactica as it was released: a tokenizer that declares neither BOS nor end of text nor padding. All that takes a model works."""

import functools

import numpy as np
import pytest
import torch
from conftest import tiny_tokenizer, words
from family_rows import FAMILIES, save_family

import sepcap
from sepcap.evaluation.generation import continuation
from sepcap.studies.pruning.generations import continuations

LETTERS, DIGITS = words(0, n=24), words(0, n=24, alphabet="0123456789")
KINDS = ("zero", "mean", "median", "peak", "resample", "optimal")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    row = next(row for row in FAMILIES if row.name == "Galactica")
    folder = save_family(row, tmp_path_factory.mktemp("galactica"))
    for file in folder.glob("*token*"):
        file.unlink()
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = tokenizer.eos_token = tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def model(folder):
    return sepcap.load_model(folder, device="cpu")


collected = functools.partial(sepcap.collect, tokens=60)


def test_the_tokenizer_has_no_special_tokens(model):
    assert model.tokenizer.bos_token_id is model.tokenizer.eos_token_id is model.tokenizer.pad_token_id is None
    assert len(model.tokenizer) <= model.cfg.d_vocab


def test_evaluation_is_that_of_the_plain_model(model, folder):
    from transformers import AutoModelForCausalLM

    from sepcap.tasks.samples import sample_task

    plain = AutoModelForCausalLM.from_pretrained(folder).eval()
    sample, losses = sample_task(model, sepcap.load_task(LETTERS), "evaluate", 100), []
    with torch.no_grad():
        for row in sample.rows:  # of a row's first token nothing is known, so it is no target
            logprobs = plain(torch.tensor(row)[None]).logits[0, :-1].double().log_softmax(1)
            losses += (-logprobs.gather(1, torch.tensor(row[1:])[:, None])[:, 0]).tolist()
    found = sepcap.evaluate(model, LETTERS, tokens=100)
    assert found.n == len(losses) == 100
    assert found.loss == pytest.approx(np.mean(losses), rel=1e-5)
    assert len(found.skip50(model.tokenizer)) > 0


def test_scoring_ablating_deleting_rotating_and_saving(model, tmp_path):
    forget, retain = (collected(model, task, sites=("mlp", "attn_pre_out"), histogram=True) for task in (LETTERS, DIGITS))
    assert forget["mlp"].count == 60
    neurons = sepcap.score(forget, retain).top({"mlp": 0.3, "attn_pre_out": 0.3})
    before = sepcap.evaluate(model, LETTERS, tokens=60).loss
    for kind in ("zero", "mean", "median", "peak"):
        with sepcap.ablate(model, neurons, kind, reference=None if kind == "zero" else retain):
            assert sepcap.evaluate(model, LETTERS, tokens=60).loss != before
    with sepcap.ablate(model, neurons, "resample", source=DIGITS):
        assert sepcap.evaluate(model, LETTERS, tokens=60).loss != before
    compared = sepcap.compare_ablations(model, task=LETTERS, layer=1, head=2, kinds=KINDS, tokens=60, reference_tokens=60, fit_tokens=60)
    assert not compared.table["loss"].isna().to_numpy().any()
    sepcap.rotate_values(model, "fold")
    assert sepcap.evaluate(model, LETTERS, tokens=60).loss == pytest.approx(before, rel=1e-4)
    sepcap.delete(model, neurons)
    sepcap.save_pretrained(model, tmp_path / "saved")
    saved = sepcap.load_model(tmp_path / "saved", device="cpu")
    assert sepcap.evaluate(saved, LETTERS, tokens=60).loss == pytest.approx(sepcap.evaluate(model, LETTERS, tokens=60).loss, rel=1e-5)


@pytest.mark.thorough
def test_pruning_in_both_directions_with_continuations(model, tmp_path):
    small = {"fractions": {"mlp": 0.25}, "steps": 2, "tokens": 60, "eval_tokens": 60}
    compared = sepcap.compare_directions(model, forget=LETTERS, retain=DIGITS, **small, baseline_seeds=2, out=tmp_path / "compared")
    assert all(run.finished for run in compared.runs.values())
    texts = continuations(model, compared.forward, step=2)
    assert texts["before"].str.len().min() > 0
    assert texts["after"].str.len().min() > 0


def test_generation(model):
    assert continuation(model, "The", tokens=5)
    assert continuation(model, "The", tokens=5) == continuation(model, "The", tokens=5)
    for prompts in (["ab", "cde"], LETTERS[:4]):
        found = sepcap.evaluate_toxicity(model, [text[:20] for text in prompts], lambda texts: [0.9] * len(texts), 6, tokens=5, task=None)
        assert (found.n, found.fraction) == (6, 1.0)
