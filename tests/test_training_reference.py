"""A pair of models with and without code: the same start, the same prose, equal budgets, and a reference that a certificate takes."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import words

import sepcap

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))

LETTERS, DIGITS = words(0, n=160, length=15), words(0, n=160, length=15, alphabet="0123456789")


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Configuration, tokenizer, rows and folders of a pair, of words of letters as prose and words of digits as code."""
    from neuron_dropout import NeuronDropout, prepare
    from reference import ReferencePair, train_pair

    config = ReferencePair(
        tmp_path_factory.mktemp("pair"), layers=1, d_model=16, heads=2, context=32, batch=8, steps=40, learning_rate=1e-2, warmup=4
    )
    read = {"prose": LETTERS, "python": DIGITS, "cpp": DIGITS}
    tokenizer, rows = prepare(read, NeuronDropout(vocabulary=300, context=32))
    again, same = prepare(read, NeuronDropout(context=32), tokenizer)
    assert again is tokenizer
    assert all(np.array_equal(rows[kind], same[kind]) for kind in rows)
    return config, tokenizer, rows, train_pair(config, tokenizer, rows)


def test_one_model_never_read_a_row_of_code_and_both_read_the_same_prose(pair):
    from reference import WITH, WITHOUT, rows_of
    from train import TrainConfig, batch_at

    _, _, rows, _ = pair
    read = {name: [batch_at(step, of_model, TrainConfig(batch=8)) for step in range(40)] for name, of_model in rows_of(rows).items()}
    prose = {tuple(row) for row in rows["prose"].tolist()}
    assert all(tuple(row) in prose for batch in read[WITHOUT] for row in batch.tolist())
    for one, other in zip(read[WITH], read[WITHOUT], strict=True):
        assert one.shape == other.shape
        assert torch.equal(one[:4], other[:4])
        assert not any(tuple(row) in prose for row in one[4:].tolist())


def test_the_pair_starts_with_the_same_weights(pair, tmp_path):
    from reference import train_pair
    from safetensors.torch import load_file

    config, tokenizer, rows, _ = pair
    folders = train_pair(replace(config, out=tmp_path, steps=0), tokenizer, rows)
    one, other = (load_file(folder / "model.safetensors") for folder in folders.values())
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_certificate_takes_the_model_without_code_as_reference(pair):
    from reference import WITH, WITHOUT

    _, _, _, folders = pair
    model, reference = (sepcap.load_model(folders[name], device="cpu") for name in (WITH, WITHOUT))
    assert sepcap.evaluate(model, DIGITS, tokens=300).loss < sepcap.evaluate(reference, DIGITS, tokens=300).loss
    how = {"parts": ("relearn",), "variants": ("all",), "seeds": (0,), "lrs": (1e-3,), "checkpoints": (100,), "tokens": 1_000}
    given = {"forget": DIGITS, "retain": LETTERS, "eval_tokens": 300, "progress": False}
    found = sepcap.certify(model, neurons=sepcap.NeuronSet.random(model, {"mlp": 0.8}, seed=0), reference=reference, **how, **given)
    assert "reference" in set(found.tables["models"]["kind"])


def test_a_finished_pair_is_not_trained_again(pair, monkeypatch):
    import neuron_dropout
    from reference import train_pair

    config, tokenizer, rows, folders = pair
    monkeypatch.setattr(neuron_dropout, "batch_at", None)
    assert train_pair(config, tokenizer, rows) == folders
