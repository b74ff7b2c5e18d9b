"""Every neuron alone in every family: what a whole evaluation of the model without it gives, by deletion and by hooks."""

import numpy as np
import pytest
import torch
from family_checks import load, tasks_of
from family_rows import BACKEND, FAMILIES, SITES, save_family

import sepcap
from sepcap.evaluation.next_token import evaluate_sample
from sepcap.evaluation.result import COUNTS, METRICS
from sepcap.models.kinds import kind_of
from sepcap.models.sites import bind
from sepcap.models.weights import WeightSnapshot
from sepcap.selection.neurons import NeuronSet
from sepcap.studies.single_ablations.measure import Rows, shortcuts_of
from sepcap.tasks.samples import sample_task

EVERY_DAY = {"OPT", "OPT-350m (post-norm)", "GPT-2", "GPT-NeoX (Pythia)", "Mistral", "Gemma-2", "BERT", "ViT"}

BEHIND_A_NORM = {"OPT-350m (post-norm)", "Gemma-2", "Gemma-3 (text)", "Gemma-4 (text)", "OLMo-2 (post-norm)", "BERT", "RoBERTa", "ViT"}
"""What the mlp writes does not reach the residual stream unchanged; in an image classifier, the head needs whole rows."""

WITHOUT_PREFIX = {"BERT", "RoBERTa", "ViT"}
"""Attention in both directions. Recurrent layers keep no keys and values: there the shortcut is allowed and never used."""

ROWS = [
    pytest.param(row, sites, id=row.name, marks=[] if row.name in EVERY_DAY else [pytest.mark.slow])
    for row in FAMILIES
    if not row.missing() and (sites := tuple(s for s in SITES if not row.refusal("sites", s)))
]


@pytest.mark.thorough
@pytest.mark.parametrize(("row", "sites"), ROWS)
def test_each_effect_is_that_of_a_whole_evaluation_without_the_neuron(row, sites, tmp_path):
    if row.layout == "vit":
        pytest.importorskip("PIL")
    model = load(save_family(row, tmp_path))
    forget, retain = tasks_of(model)
    images = kind_of(model) == "images"
    sample = sample_task(model, sepcap.load_task(forget), "evaluate", 20 if images else 150)
    before = evaluate_sample(model, sample).per_row
    for site in sites:
        how = {"tokens": 20 if images else 150, "reference_tokens": 30, "progress": False}
        found = sepcap.ablate_each(model, forget=forget, retain=retain, site=site, sample=4, **how)
        alone = found.tensors["forget/alone"].numpy()
        deletable = not row.refusal("deletion", site)
        snapshot = WeightSnapshot(model, (site,))
        for change, place in zip(alone, found.places, strict=True):
            neuron = NeuronSet.empty(model, site)
            neuron.masks[site][tuple(place)] = True
            ways = {}
            with sepcap.ablate(model, neuron):
                ways["hooks"] = evaluate_sample(model, sample).per_row
            if deletable:
                sepcap.delete(model, neuron)
                ways["deletion"] = evaluate_sample(model, sample).per_row
                snapshot.restore()
            for way, after in ways.items():
                want = (after - before)[:, [COUNTS.index(metric) for metric in METRICS]]
                same = {"atol": 1e-5 * before[:, -1].mean(), "rtol": 0, "err_msg": f"{site} {place} {way}"}
                np.testing.assert_allclose(change[:, -1], want[:, -1], **same)
                np.testing.assert_array_equal(change[:, :-1], want[:, :-1])


@pytest.mark.skipif(BACKEND != "bridge", reason="a HookedTransformer keeps no cache that could be reused")
@pytest.mark.parametrize(("row", "sites"), ROWS)
def test_the_trial_allows_the_shortcuts_that_hold(row, sites, tmp_path):
    if row.layout == "vit":
        pytest.importorskip("PIL")
    model = load(save_family(row, tmp_path))
    rows = Rows.of(sample_task(model, sepcap.load_task(tasks_of(model)[0]), "evaluate", 60))
    for site in sites:
        population = bind(model, site)
        allowed = shortcuts_of(model, population, rows, torch.zeros(population.shape))
        assert allowed.written == (site == "mlp" and row.name not in BEHIND_A_NORM)
        assert allowed.prefix == (row.name not in WITHOUT_PREFIX)
