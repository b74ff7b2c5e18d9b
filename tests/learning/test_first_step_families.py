"""The losses of the first step are those of an ablation, in every family: causal, masked, images."""

import numpy as np
import pytest
import torch
from encoders import CLASSES, images, load, save_masked, save_vit

import sepcap
from sepcap.evaluation.next_token import evaluate_sample
from sepcap.interventions.optimal import apart
from sepcap.learning import fit
from sepcap.learning.fit import HELD_OUT, learn_order
from sepcap.learning.fitting import Fitting
from sepcap.learning.order import ranked_of, scores_of, starting_theta
from sepcap.tasks.samples import sample_task

EVERY = 10**6
"""Tokens of a step: all rows."""


def check_first_step(monkeypatch, model, forget, retain, keys, tokens):
    monkeypatch.setattr(fit, "area_of", lambda rows: 0.0)  # these models have no accuracy to lose
    samples = {role: sample_task(model, sepcap.load_task(t), "collect", tokens) for role, t in (("forget", forget), ("retain", retain))}
    ranked = ranked_of(model, keys)
    draw = torch.Generator().manual_seed(0)
    theta = starting_theta(ranked, sepcap.Scores({one.site: torch.rand(one.population.shape, generator=draw) for one in ranked}))
    how = Fitting(steps=1, step_tokens=EVERY, batch_size=4)
    learned = learn_order(model, ranked, samples, theta, how=how, largest=dict.fromkeys(keys, 1.0))
    share = 0.8 * float(np.random.default_rng([0, 0]).random())
    amounts = {one.key: max(1, int(share * one.size)) for one in ranked}
    neurons = sepcap.Scores(scores_of(ranked, theta)).top(amounts)
    found = learned.history[0].tolist()
    assert found[0] == pytest.approx(sum(amounts.values()) / sum(one.size for one in ranked), rel=1e-12)
    for role, loss in (("retain", found[1]), ("forget", found[2])):
        with sepcap.ablate(model, neurons):
            expected = evaluate_sample(model, apart(samples[role], HELD_OUT)[0], batch_size=4, quiet=True).loss
        assert loss == pytest.approx(expected, rel=1e-5)
    # a step of Adam moves every θ that has a gradient by its step size; the start was no worse
    assert learned.step == 0


@pytest.mark.thorough
def test_causal(monkeypatch, tiny, letters, digits):
    check_first_step(monkeypatch, tiny, letters, digits, ("mlp", "attn_value"), 300)
    check_first_step(monkeypatch, tiny, letters, digits, ("heads",), 300)


@pytest.mark.thorough
@pytest.mark.parametrize("family", ["roberta", "bert"])
def test_masked(monkeypatch, tmp_path, family, letters, digits):
    model = load(save_masked(family, tmp_path))
    check_first_step(monkeypatch, model, letters, digits, ("mlp", "attn_pre_out"), 300)


@pytest.mark.thorough
def test_images(monkeypatch, tmp_path):
    model = load(save_vit(tmp_path))
    check_first_step(monkeypatch, model, images(range(6)), images(range(6, CLASSES), seed=1), ("mlp", "heads"), 40)
