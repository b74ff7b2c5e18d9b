"""Evaluation from parts of the vocabulary is that from whole logits in every family, also where one is not possible."""

import numpy as np
import pytest
from family_checks import load, tasks_of
from family_rows import BACKEND, FAMILIES, save_family

import sepcap
from sepcap.evaluation import unembedded
from sepcap.models.blocks import unembedding

EVERY_DAY = {"GPT-2", "Gemma-2", "BERT"}

WHOLE = {"Gemma-2", "ViT"}
"""Families whose logits are capped, and those that are evaluated without a vocabulary."""

ROWS = [
    pytest.param(row, id=row.name, marks=[] if row.name in EVERY_DAY else [pytest.mark.slow]) for row in FAMILIES if not row.missing()
]


@pytest.mark.parametrize("row", ROWS)
def test_parts_of_the_vocabulary_give_what_whole_logits_give(row, tmp_path, monkeypatch):
    if row.layout == "vit":
        pytest.importorskip("PIL")
    model, found = load(save_family(row, tmp_path)), []
    monkeypatch.setattr(unembedded, "PART", 100)
    task = tasks_of(model)[0]
    for forced in (False, True):
        if forced:
            monkeypatch.setattr(unembedding, "unembedding_of", lambda model: None)
        else:
            head = unembedding.unembedding_of(model)
            known = head is not None and head.seen
            assert known is (BACKEND != "hooked" and row.name not in WHOLE)
        found.append(sepcap.evaluate(model, task, tokens=300, batch_size=4).per_row)
    np.testing.assert_array_equal(found[0][:, :-1], found[1][:, :-1])
    np.testing.assert_allclose(found[0][:, -1], found[1][:, -1], rtol=1e-6)
