"""The removal certificate: tokens to a target and quotients by hand, every part on a tiny model, interruption, wrong input."""

import dataclasses
import math
from itertools import pairwise

import numpy as np
import pandas as pd
import planted_relearning as planted
import pytest
import torch

import sepcap
from sepcap.cli.main import main
from sepcap.models.weights import EveryWeight, fingerprint
from sepcap.statistics.intervals import bootstrap_weights, simultaneous
from sepcap.studies.base.folder import as_json, differing_fields
from sepcap.studies.certificate import relearn
from sepcap.studies.certificate.arms import AMOUNTS, amounts
from sepcap.studies.certificate.elicit import FORMATS, conditions_of
from sepcap.studies.certificate.inside import _fitted
from sepcap.studies.certificate.plan import _of_heads, planned
from sepcap.studies.certificate.times import Tokens, quotient, tokens_to

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


def tokens(*each, budget=100.0, replicas=9):
    return Tokens(np.array(each, dtype=float), np.tile(np.array(each, dtype=float), (replicas, 1)), budget)


def test_a_quotient_with_a_censored_number_is_a_bound():
    inf = math.inf
    found = quotient("q", tokens(20.0), tokens(10.0), 9)
    assert [found[name] for name in ("q", "q_low", "q_high")] == pytest.approx([2, 2, 2])
    # half of the seeds do not reach it: per seed at least 10 and 1.25, whose geometric mean is a lower bound
    found = quotient("q", tokens(inf, 12.5), tokens(10.0, 10.0), 9)
    assert (found["q"], found["q_high"], found["q_bound"]) == (pytest.approx(12.5**0.5), inf, "at least")
    found = quotient("q", tokens(20.0), tokens(inf, budget=50.0), 9)
    assert (found["q"], found["q_low"], found["q_bound"]) == (pytest.approx(0.4), 0, "at most")
    nothing = [(tokens(inf), tokens(inf)), (tokens(1.0), tokens(0.0)), (tokens(1.0), tokens(math.nan))]
    assert [quotient("q", *pair, 9)["q_bound"] for pair in nothing] == ["both censored", "control not below", "diverged"]
    assert tokens(inf, 10.0).columns(9)["tokens"] == inf


def test_an_end_beyond_which_replicas_are_censored_is_open():
    replicas = np.full((100, 2), 10.0)
    replicas[:5, 0] = math.inf
    found = quotient("q", Tokens(np.full(2, 10.0), replicas, 100.0), tokens(5.0, 5.0, replicas=100), 9)
    assert (found["q_bound"], found["q_high"]) == ("", math.inf)
    assert found["q_low"] > 0


@pytest.mark.parametrize("seeds", [2, 3])
def test_intervals_of_a_quotient_cover_it_if_seeds_differ_more_than_texts(seeds):
    """Two models with the same law: per seed, the log of the number of tokens is normal, and each document adds a little."""
    rng, draws, documents, covered = np.random.default_rng(seeds), 200, 20, 0
    weights = bootstrap_weights(documents, np.random.default_rng(0)) / documents
    for _ in range(draws):
        pair = []
        for _ in range(2):
            logs = 7 + 0.3 * rng.standard_normal(seeds) + 0.2 * rng.standard_normal((documents, 1))
            pair.append(Tokens(np.exp(logs.mean(0)), np.exp(weights @ logs), 1e6))
        found = quotient("q", *pair, documents)
        covered += found["q_low"] <= 1 <= found["q_high"]
    # 3 standard errors of a share of so many draws
    assert covered / draws > 0.95 - 3 * math.sqrt(0.95 * 0.05 / draws)


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


def test_probes_of_random_labels_are_at_chance_on_the_streams_of_the_models(whole):
    """Labels of the task probe are drawn per document from two; the intervals hold for all layers and models at once."""
    rows = whole.tables["probes"].query("probe == 'task'")
    for row in rows.to_dict("records"):
        n = min(whole.config["n_documents"]["evaluate"].values())
        low, high = simultaneous(row["control"], (row["control_low"], row["control_high"]), n, len(rows))
        assert low <= 0.5 <= high, (row["kind"], row["layer"])


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


def test_a_rate_that_diverges_is_not_kept_and_if_all_do_the_certificate_says_so(cut):
    how = {**HOW, "parts": ("relearn",), "variants": ("all",), "neurons": cut.a, "forget": cut.texts_a, "retain": cut.texts_b}
    found = sepcap.certify(cut.model, **{**how, "lrs": (3e-3, 1e30)})
    runs = found.tables["runs"].query("kind == 'pruned'").set_index("lr")
    assert runs["diverged"].tolist() == [False, True]
    assert runs["kept"].tolist() == [True, False]
    broken = sepcap.certify(cut.model, **{**how, "lrs": (1e30,)})
    assert broken.tables["targets"]["diverged"].all()
    assert broken.tables["targets"]["tokens"].isna().all()
    assert "diverged at every learning rate: untouched model, pruned model" in " ".join(broken.summary())
    assert broken.figure("relearning").data


def test_dead_neurons_are_part_of_what_identifies_a_certificate(cut):
    """Both sets give the same weights, with as many neurons: they differ only in which dead neuron they contain."""
    dead = [(layer, n) for layer, block in enumerate(cut.model.blocks) for n in (block.mlp.W_out == 0).all(-1).nonzero().flatten().tolist()]
    config, found = sepcap.CertificateConfig(forget=cut.texts_a, retain=cut.texts_b, parts=("quantise",), tokens=1_000, eval_tokens=200), []
    for at in dead[:2]:
        one = torch.zeros_like(cut.a.masks["mlp"])
        one[at] = True
        found.append(planned(cut.model, config, cut.a | sepcap.NeuronSet({"mlp": one}), None, None).resolved)
    assert found[0]["pruned"] == found[1]["pruned"]
    assert differing_fields(as_json(found[0]), found[1]).startswith("neurons:")


def test_random_pruning_of_equal_effect_is_compared_with_the_pruned_model_on_evaluation_texts(whole):
    models = whole.tables["models"].set_index("kind")
    for kind in ("matched", "random", "untouched"):
        assert models.loc[kind, "minus_pruned"] == pytest.approx(models.loc[kind, "forget"] - models.loc["pruned", "forget"], abs=1e-9)
        assert models.loc[kind, "minus_pruned_low"] <= models.loc[kind, "minus_pruned"] <= models.loc[kind, "minus_pruned_high"]
    assert np.isnan(models.loc["pruned", "minus_pruned"])


def test_a_reference_of_another_size_is_refused(cut, tiny_opt):
    with pytest.raises(ValueError, match="reference has weights of other names or shapes"):
        sepcap.certify(cut.model, neurons=cut.a, forget=cut.texts_a, retain=cut.texts_b, reference=tiny_opt, **HOW)


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
        ({"neurons": cut.a, "shots": (1, 1), **texts}, "shots"),
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


ATTENTION = {"rotation": "fold", "offset": "mean"}


@pytest.mark.parametrize("how", [{"fractions": {"mlp": 0.3, "attn_pre_out": 0.3}, **ATTENTION}, {"fractions": {"mlp": 0.3, "heads": 1}}])
def test_controls_of_a_run_are_pruned_in_the_same_manner(how, tiny_opt, letters, digits, tmp_path):
    """In the rotated basis, with its constants, and whole heads where heads were pruned."""
    texts = {"forget": letters, "retain": digits}
    config = sepcap.PruningConfig(**texts, **how, steps=1, tokens=400, eval_tokens=200)
    run = sepcap.prune(tiny_opt, config, out=tmp_path / "run")
    assert {"heads", "attn_pre_out"} & set(how["fractions"])
    config = sepcap.CertificateConfig(**texts, run_folder=run, parts=("quantise",), tokens=1_000, eval_tokens=200)
    found = planned(tiny_opt, config, None, None, None)
    pruning, before = found.pruning, fingerprint(tiny_opt)
    counts = dict.fromkeys(run.neurons().masks, 4) | dict.fromkeys(pruning.heads, 1)
    few, many = (pruning.drawn(tiny_opt, {site: n * k for site, n in counts.items()}, 0) for k in (1, 2))
    assert len(few - many) == 0
    saved = EveryWeight(tiny_opt)
    # pruning the run's own neurons as the controls are pruned is what the run did
    pruning.remove(tiny_opt, run.neurons())
    mine = fingerprint(tiny_opt)
    saved.restore()
    assert mine == found.resolved["pruned"]
    assert fingerprint(tiny_opt) == before
    if pruning.heads:
        mask = few.masks["attn_pre_out"]
        assert mask.any(-1).sum() == mask.all(-1).sum() == 1
    else:
        assert found.resolved["basis"] != before


def test_a_set_of_whole_heads_has_random_heads_as_controls(tiny_opt):
    heads = sepcap.NeuronSet.heads(tiny_opt, [(0, 1)])
    scattered = sepcap.NeuronSet({"attn_pre_out": heads.masks["attn_pre_out"].clone()})
    scattered.masks["attn_pre_out"][1, 0, 0] = True
    every = ~sepcap.NeuronSet.empty(tiny_opt, "attn_pre_out")
    assert [_of_heads(one) for one in (heads, scattered, every)] == [("attn_pre_out",), (), ()]


@pytest.mark.slow
def test_variants_over_two_seeds(cut):
    how = {**HOW, "parts": ("relearn",), "variants": ("all", "lora", "retain"), "seeds": (0, 1), "checkpoints": (60,)}
    before = fingerprint(cut.model)
    found = sepcap.certify(cut.model, neurons=cut.a, forget=cut.texts_a, retain=cut.texts_b, **how)
    assert fingerprint(cut.model) == before
    rows = found.tables["relearning"].query("kind == 'pruned' and tokens > 0").set_index("variant")
    assert (rows["seeds"] == 2).all()
    assert rows.loc["retain", "forget"] < rows.loc["all", "forget"]
    of_others = found.tables["targets"].query("variant in ('lora', 'retain')")
    assert len(of_others) == 2 * len(found.config["targets"])
    # a control is fine-tuned with all weights on forget: nothing else is divided by it
    assert of_others[["ratio_matched", "ratio_random"]].isna().all(axis=None)
    said = " ".join(found.summary())
    assert "over 2 seeds" in said
    assert "by LoRA" in said


def test_a_run_brings_its_model(letters, digits, task_files, trained_folder, tmp_path, capsys):
    texts = dict(zip(("forget", "retain"), task_files.values(), strict=True))
    run = sepcap.prune(str(trained_folder), **texts, fractions={"mlp": 0.3}, steps=1, tokens=400, eval_tokens=200, out=tmp_path / "run")
    how = {"parts": ("quantise",), "seeds": (0,), "bits": (8,), "tokens": 600, "eval_tokens": 200}
    how |= texts  # a run knows only the names of tasks that are files
    found = sepcap.certify(run_folder=run.folder, **how, out=tmp_path / "out")
    assert found.config["model_fingerprint"] == run.config["model_fingerprint"]
    flags = ["--parts", "quantise", "--seeds", "0", "--bits", "8", "--tokens", "600", "--eval-tokens", "200"]
    flags += [word for role, path in texts.items() for word in (f"--{role}", str(path))]
    main(["certify", str(run.folder), *flags, "--out", str(tmp_path / "out")])
    assert "is finished; nothing is recomputed" in capsys.readouterr().out


def test_a_model_without_linear_layers_is_refused_before_anything_runs(cut, monkeypatch):
    monkeypatch.setattr("sepcap.models.kinds.is_hooked_transformer", lambda model: True)
    how = {**HOW, "forget": cut.texts_a, "retain": cut.texts_b, "neurons": cut.a}
    for parts, words in ((("quantise",), "rounding weights"), (("relearn",), "fine-tuning by LoRA")):
        with pytest.raises(NotImplementedError, match=words):
            sepcap.certify(cut.model, **{**how, "parts": parts, "variants": ("all", "lora")})


def test_more_examples_than_texts_are_left_out(cut):
    config = sepcap.CertificateConfig(forget=cut.texts_a, retain=cut.texts_b, tokens=1_000, eval_tokens=200, shots=(1, 2), example_tokens=1)
    plan = planned(cut.model, config, cut.a, None, None)
    few = {role: sample.take([0]) for role, sample in plan.fit.items()}
    assert {one.shots for one in conditions_of(plan)} == {0, 1, 2}
    assert {one.shots for one in conditions_of(dataclasses.replace(plan, fit=few))} == {0, 1}
