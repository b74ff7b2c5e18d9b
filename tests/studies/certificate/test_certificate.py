"""The removal certificate: tokens to a target and quotients by hand, every part on a tiny model, interruption, wrong input."""

import math
from itertools import pairwise

import numpy as np
import pandas as pd
import planted_relearning as planted
import pytest
import torch

import sepcap
from sepcap.models.weights import fingerprint
from sepcap.studies.certificate import relearn
from sepcap.studies.certificate.arms import AMOUNTS, amounts
from sepcap.studies.certificate.elicit import FORMATS
from sepcap.studies.certificate.inside import _fitted
from sepcap.studies.certificate.times import quotient, tokens_to

HOW = {
    "seeds": (0,),
    "lrs": (3e-3,),
    "variants": ("all", "held"),
    "checkpoints": (60, 120),
    "step_tokens": 60,
    "tokens": 1_000,
    "eval_tokens": 200,
    "batch_size": 64,
    "probe_tokens": 100,
    "probe_classes": 4,
    "shots": (1, 16),
    "example_tokens": 4,
    "progress": False,
}


@pytest.fixture(scope="module")
def cut(tmp_path_factory):
    return planted.cut(tmp_path_factory.mktemp("cut"))


@pytest.fixture(scope="module")
def whole(cut, tmp_path_factory):
    out = tmp_path_factory.mktemp("certificate") / "out"
    return sepcap.certify(cut.model, neurons=cut.a, forget=cut.texts_a, retain=cut.texts_b, out=out, **HOW)


def test_tokens_to_a_target_by_hand():
    seen = np.array([0, 10, 20, 40])
    curves = np.array([[0.2, 0.4, 0.8, 0.9], [0.6, 0.1, 0.1, 0.1], [0.1, 0.2, 0.3, 0.4], [0.0, 0.5, 0.2, 0.9]])
    assert tokens_to(curves, seen, 0.5).tolist() == [12.5, 0.0, math.inf, 10.0]


def test_a_quotient_with_a_censored_number_is_a_bound():
    inf, draws = math.inf, (np.full(5, 20.0), np.full(5, 10.0))
    assert quotient("q", (20.0, 10.0), draws, (100.0, 100.0), 9) == {"q": 2.0, "q_low": 2.0, "q_high": 2.0, "q_bound": ""}
    assert quotient("q", (inf, 10.0), (np.full(5, inf), draws[1]), (100.0, 50.0), 9)["q_low"] == 10.0
    assert quotient("q", (20.0, inf), draws, (100.0, 50.0), 9)["q"] == 0.4
    assert [quotient("q", pair, draws, (1.0, 1.0), 9)["q_bound"] for pair in ((inf, 1.0), (1.0, inf), (inf, inf), (1.0, 0.0))] == [
        "at least", "at most", "both censored", "control not below",
    ]  # fmt: skip


def test_amounts_grow_from_nothing_through_the_counts_to_everything():
    counts, sizes = {"mlp": 7, "attn_pre_out": 1}, {"mlp": 20, "attn_pre_out": 9}
    steps = [amounts(counts, sizes, step) for step in range(AMOUNTS + 1)]
    assert (steps[0], steps[AMOUNTS // 2], steps[-1]) == ({"mlp": 0, "attn_pre_out": 0}, counts, sizes)
    assert all(a[site] <= b[site] for a, b in pairwise(steps) for site in sizes)


def test_formats_by_hand():
    text = "def f():\n    if x:\n        return A\n"
    assert FORMATS["reindented"](text) == "def f():\n\tif x:\n\t\treturn A\n"
    assert FORMATS["lower-case"](text) == text.lower()
    assert FORMATS["one line"](text) == "def f(): if x: return A "


def test_a_probe_of_random_labels_is_at_chance_and_one_of_a_linear_label_is_right():
    rng = np.random.default_rng(0)
    fit, test = rng.standard_normal((2, 2_000, 10))
    random = {"fit": rng.integers(2, size=2_000), "test": rng.integers(2, size=2_000)}
    linear = {"fit": (fit[:, 3] > 0).astype(int), "test": (test[:, 3] > 0).astype(int)}
    # 4 standard errors of a share of 2,000 independent guesses
    assert abs(_fitted(fit, test, random).mean() - 0.5) < 4 * 0.5 / math.sqrt(2_000)
    assert _fitted(fit, test, linear).mean() > 0.95


def test_every_part_has_its_tables_figures_and_verdicts(whole):
    assert set(whole.tables) == {"models", "relearning", "targets", "runs", "layers", "quantised", "elicited", "lens", "probes"}
    said = " ".join(whole.summary())
    for words in ("fine-tuning", "Weights rounded", "examples", "Logit lens", "linear probe", "one seed"):
        assert words in said
    for kind in whole.FIGURES:
        assert whole.figure(kind).data
    assert whole.report().exists()
    again = sepcap.load_result(whole.folder)
    assert again.summary() == whole.summary()


def test_the_pruned_circuit_is_what_the_tables_show(whole):
    models = whole.tables["models"].set_index("kind")
    assert models.loc["untouched", "forget"] == 1
    assert models.loc["pruned", "forget"] < 0.05
    assert models.loc["pruned", "retain"] == pytest.approx(1, abs=0.01)
    assert models.loc["random", "neurons"] == models.loc["pruned", "neurons"] == planted.WORDS


def test_pruned_weights_stay_zero_when_rounded(whole):
    kept = whole.tables["quantised"]["zeros_kept"].dropna()
    assert len(kept) == 2
    assert bool(kept.all())


def test_holding_deleted_neurons_at_zero_changes_nothing(whole):
    rows = whole.tables["relearning"].query("kind == 'pruned'")
    one, other = (rows[rows["variant"] == variant]["forget"].to_numpy() for variant in ("all", "held"))
    np.testing.assert_allclose(one, other, atol=1e-9)


def test_the_last_layer_of_the_lens_is_the_model(whole):
    lens = whole.tables["lens"]
    last = lens[lens["layer"] == lens["layer"].max()].set_index("kind")["forget"]
    models = whole.tables["models"].set_index("kind")["forget"]
    for kind in models.index:
        assert last[kind] == pytest.approx(models[kind], abs=1e-6)


def test_16_examples_do_not_fit_and_are_left_out(whole):
    assert set(whole.tables["elicited"]["shots"]) == {0, 1}


@pytest.mark.thorough
def test_an_interrupted_certificate_resumes_and_the_model_has_its_bits(cut, whole, tmp_path, monkeypatch):
    how = {**HOW, "parts": ("relearn",), "variants": ("all",)}
    given = {"neurons": cut.a, "forget": cut.texts_a, "retain": cut.texts_b, "out": tmp_path / "out"}
    before, measure, calls = fingerprint(cut.model), relearn.measured, []

    def stop(plan, model):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return measure(plan, model)

    monkeypatch.setattr(relearn, "measured", stop)
    with pytest.raises(KeyboardInterrupt):
        sepcap.certify(cut.model, **given, **how)
    assert fingerprint(cut.model) == before
    monkeypatch.setattr(relearn, "measured", measure)
    found = sepcap.certify(cut.model, **given, **how).tables["relearning"]
    straight = whole.tables["relearning"].query("variant == 'all'").reset_index(drop=True)
    pd.testing.assert_frame_equal(found, straight)


def test_wrong_input_is_one_error_before_anything_is_written(cut, tmp_path):
    texts, out = {"forget": cut.texts_a, "retain": cut.texts_b}, tmp_path / "out"
    empty = sepcap.NeuronSet({"mlp": torch.zeros_like(cut.a.masks["mlp"])})
    wrong = [
        ({"neurons": empty, **texts}, "neurons has no neurons"),
        (texts, "none of them given: give one of neurons"),
        ({"neurons": cut.a, "pruned": cut.never, **texts}, "neurons and pruned given"),
        ({"neurons": cut.a, "forget": cut.texts_a, "retain": cut.texts_a}, "same data"),
        ({"pruned": cut.model, **texts}, "weights of the untouched model"),
        ({"neurons": cut.a, "step": 3, **texts}, "a step is one of a run"),
        ({"neurons": cut.a, "checkpoints": (20, 10), **texts}, "increasing"),
        ({"neurons": cut.a, "variants": ("lora",), **texts}, "'all' must be among them"),
        ({"neurons": cut.a, "forget": ["a1 a2"], "retain": cut.texts_b}, "too little text"),
    ]
    before = fingerprint(cut.model)
    for given, words in wrong:
        with pytest.raises(ValueError, match=words):
            sepcap.certify(cut.model, out=out, **{**HOW, **given})
    assert not out.exists()
    assert fingerprint(cut.model) == before


def test_a_missing_library_is_named_with_its_extra(cut, monkeypatch):
    monkeypatch.setattr("sepcap.studies.certificate.plan.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"scikit-learn.*sepcap\[certificate\]"):
        sepcap.certify(cut.model, neurons=cut.a, forget=cut.texts_a, retain=cut.texts_b, **HOW)
