"""Unlearning methods compared on a planted model: known answers, budgets, choice of learning rates, interruption, wrong input."""

import numpy as np
import pandas as pd
import planted_relearning as planted
import pytest
import torch

import sepcap
from sepcap.evaluation.scorers import scorer_digest
from sepcap.evaluation.trajectory import area
from sepcap.models.weights import fingerprint
from sepcap.studies.base.folder import as_json, differing_fields
from sepcap.studies.base.runner import study_folder
from sepcap.studies.certificate.arms import Arm
from sepcap.studies.unlearning import study, walks
from sepcap.studies.unlearning.methods import Walk, tried
from sepcap.studies.unlearning.plan import planned
from sepcap.studies.unlearning.tables import _perplexity

HOW = {
    "seeds": (0,),
    "lrs": (1e-3, 1e-2),
    "betas": (0.05,),
    "steps": 3,
    "fractions": {"mlp": 4},
    "budget": 1_500,
    "step_tokens": 60,
    "tokens": 1_000,
    "eval_tokens": 200,
    "batch_size": 64,
    "checkpoints": (60, 120),
    "relearn_lrs": (3e-3,),
    "progress": False,
}

PLAIN = {name: value for name, value in HOW.items() if name != "progress"}


@pytest.fixture(scope="module")
def cut(tmp_path_factory):
    return planted.cut(tmp_path_factory.mktemp("cut"))


def tasks(cut):
    return {"forget": cut.texts_a, "retain": cut.texts_b}


@pytest.fixture(scope="module")
def whole(cut, tmp_path_factory):
    out = tmp_path_factory.mktemp("unlearning") / "out"
    return sepcap.compare_unlearning(cut.model, reference=cut.never, out=out, **tasks(cut), **HOW)


def test_every_method_has_its_rows_figures_and_sentences(whole):
    methods = list(whole.config["methods"])
    assert whole.table["method"].tolist() == methods
    assert whole.tables["points"]["method"].tolist() == methods
    assert len(whole.tables["trajectory"]) == len(methods) * (HOW["steps"] + 1)
    assert set(whole.tables["targets"]["kind"]) == {"untouched", "reference", *methods}
    said = " ".join(whole.summary())
    for words in (*methods, "tokens backward", "Tested where", "Tokens of fine-tuning", "one seed"):
        assert words.replace("tokens backward", "backward") in said
    for kind in whole.FIGURES:
        assert whole.figure(kind).data
    assert whole.report().exists()
    assert "prune" in whole.to_latex()
    assert sepcap.load_result(whole.folder).summary() == whole.summary()


def test_the_models_have_their_bits(cut, whole):
    again = planted.written(whole.folder.parent / "again", "ab", 0)[0]
    assert fingerprint(cut.model) == fingerprint(again)
    assert all(w.grad is None for w in cut.model.parameters())


def test_forget_accuracy_falls_by_every_method_but_random(whole):
    """The circuit of 8 neurons is what the score finds; the losses are of the same texts."""
    last = whole.tables["trajectory"].groupby("method").last()
    for method in ("prune", "prune+retain-finetune", "gradient-ascent", "npo", "task-arithmetic"):
        lowest = whole.tables["trajectory"].query("method == @method")["forget"].min()
        assert lowest < 0.7, method
    assert last.loc["prune", "forget"] < 0.05
    first = whole.tables["trajectory"].query("point == 0")
    assert (first[["forget", "retain"]] == 1).all().all()


def test_pruning_the_circuit_costs_the_retain_task_nothing(whole):
    row = whole.tables["methods"].set_index("method").loc["prune"]
    assert row["area"] > 1.9
    assert row["retain_cost_50"] == pytest.approx(0, abs=1)
    assert whole.tables["methods"].set_index("method").loc["random", "minus_prune"] < 0


def test_an_area_is_that_of_the_trajectory(whole):
    for method, rows in whole.tables["trajectory"].groupby("method"):
        found = whole.tables["methods"].set_index("method").loc[method, "area"]
        assert found == pytest.approx(float(area(rows["forget"].to_numpy(), rows["retain"].to_numpy())), rel=1e-9)


def test_the_kept_rate_has_the_largest_area_on_held_out_texts(whole):
    runs = whole.tables["runs"]
    for method, of_method in runs.groupby("method"):
        kept = of_method[of_method["kept"]]
        assert len(kept) == 1
        assert kept["held_out_area"].iloc[0] == of_method["held_out_area"].max()
        stored = whole.tables["methods"].set_index("method").loc[method]
        assert stored["lr"] == kept["lr"].iloc[0] or np.isnan(stored["lr"])
    assert len(runs) == 4 * 2 + 2


def test_methods_with_gradient_steps_have_the_budget(whole):
    methods = whole.tables["methods"].set_index("method")
    for method in ("prune+retain-finetune", "gradient-ascent", "npo", "task-arithmetic"):
        # padding and the last whole step come on top
        assert HOW["budget"] <= methods.loc[method, "backward_tokens"] < 1.4 * HOW["budget"], method
    assert methods.loc["prune", "backward_tokens"] == methods.loc["random", "forward_tokens"] == 0
    assert methods.loc["npo", "forward_tokens"] > methods.loc["npo", "backward_tokens"] == methods.loc["gradient-ascent", "forward_tokens"]


@pytest.mark.thorough
def test_a_budget_is_the_calls_of_the_model(cut, monkeypatch):
    plan = planned(cut.model, sepcap.UnlearningComparisonConfig(**tasks(cut), **PLAIN), None)
    calls, forward = [], type(cut.model).forward

    def watched(self, *args, **kwargs):
        calls.append(args[0].numel())
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(cut.model), "forward", watched)
    monkeypatch.setattr(walks, "measured", lambda plan, model: {})
    for method in plan.config.methods:
        calls.clear()
        _, note = walks._measure(plan, {}, tried(plan.config, method)[0])
        assert note["forward"][-1] == sum(calls), method
        assert note["forward"] == sorted(note["forward"])


def test_a_state_is_the_model_at_its_point(cut, whole):
    """A model made again at the point has the accuracy that the trajectory has there."""
    models = whole.tables["relearning"].query("tokens == 0").set_index("kind")
    points = whole.tables["points"].set_index("method")
    for method, row in points.iterrows():
        assert models.loc[method, "forget"] == pytest.approx(row["forget"], abs=1e-9)
        assert models.loc[method, "retain"] == pytest.approx(row["retain"], abs=1e-9)


def test_a_point_is_the_nearest_one(whole):
    trajectory, points = whole.tables["trajectory"], whole.tables["points"].set_index("method")
    for method, row in points.iterrows():
        there = trajectory[trajectory["method"] == method].set_index("point").loc[int(row["point"])]
        assert there["forget"] == pytest.approx(row["forget"])
        assert row["near"] == (abs(row["held_out"] - 0.5) <= 0.1)


def test_pruned_neurons_stay_deleted_during_repair(cut):
    """All are pruned in three steps; those of the retain task were trained before, so that the optimiser would still move them."""
    config = sepcap.UnlearningComparisonConfig(**tasks(cut), **{**PLAIN, "fractions": {"mlp": 8}})
    plan = planned(cut.model, config, None)
    with walks.restored(cut.model):
        for point in walks._walked(plan, Walk("prune+retain-finetune", 0, 1e-2), walks.Passes()):
            written = torch.stack([block.mlp.W_out.detach().abs().amax(-1) for block in cut.model.blocks])
            assert int((written == 0).sum()) >= 8 * point


@pytest.mark.thorough
def test_an_interrupted_comparison_resumes_and_the_model_has_its_bits(cut, whole, tmp_path, monkeypatch):
    given = {**tasks(cut), **HOW, "methods": ("prune", "npo"), "parts": (), "out": tmp_path / "out"}
    before, measure, calls = fingerprint(cut.model), walks.measured, []

    def stop(plan, model):
        calls.append(1)
        if len(calls) == 7:  # in the middle of the second trajectory
            raise KeyboardInterrupt
        return measure(plan, model)

    monkeypatch.setattr(walks, "measured", stop)
    with pytest.raises(KeyboardInterrupt):
        sepcap.compare_unlearning(cut.model, **given)
    assert fingerprint(cut.model) == before
    assert not any(len(m._forward_pre_hooks) for m in [cut.model])
    monkeypatch.setattr(walks, "measured", measure)
    found = sepcap.compare_unlearning(cut.model, **given)
    straight = whole.tables["trajectory"].query("method in ('prune', 'npo')").reset_index(drop=True)
    pd.testing.assert_frame_equal(found.tables["trajectory"], straight)


def test_a_rate_that_diverges_is_not_kept_and_all_that_diverge_are_an_error(cut):
    how = {**tasks(cut), **HOW, "methods": ("gradient-ascent",), "parts": (), "retain_weight": 0.0}
    found = sepcap.compare_unlearning(cut.model, **{**how, "lrs": (1e-3, 1e30)})
    assert found.tables["runs"].set_index("lr")["diverged"].tolist() == [False, True]
    assert found.table["lr"].item() == 1e-3
    before = fingerprint(cut.model)
    with pytest.raises(FloatingPointError, match="gradient-ascent: the loss of seed 0 is NaN"):
        sepcap.compare_unlearning(cut.model, **{**how, "lrs": (1e30,)})
    assert fingerprint(cut.model) == before


@pytest.mark.thorough
def test_seeds_differ_only_where_something_is_random(cut):
    how = {**tasks(cut), **HOW, "methods": ("prune", "gradient-ascent", "random"), "lrs": (1e-2,), "seeds": (0, 1)}
    found = sepcap.compare_unlearning(cut.model, **{**how, "checkpoints": (60,)})
    assert found.table["seeds"].tolist() == [1, 2, 2]
    assert found.tables["relearning"].query("kind == 'prune' and tokens == 0")["seeds"].item() == 2
    assert np.isfinite(found.table.set_index("method").loc["random", "area_seeds_sd"])


def scorer(texts):
    return [0.9 if "a" in text else 0.1 for text in texts]


@pytest.mark.thorough
def test_toxicity_of_three_models_is_one_call(cut, tmp_path):
    """A text counts as toxic if it contains a word of task a: the model without its circuit writes fewer."""
    how = {**tasks(cut), **HOW, "methods": ("prune", "task-arithmetic"), "parts": ("toxicity",), "continuations": 40}
    prompts = [" ".join(text.split()[:5]) for text in cut.texts_a[:2]]
    how |= {"toxicity_prompts": prompts, "scorer": scorer, "match": "retain", "level": 0.9}
    found = sepcap.compare_unlearning(cut.model, out=tmp_path / "out", **how)
    table = found.tables["toxicity"]
    assert table["kind"].tolist() == ["untouched", "prune", "task-arithmetic"]
    alone = sepcap.evaluate_toxicity(cut.model, prompts, scorer, n=40, task=None)
    base = table.iloc[0]
    assert (base["toxic_share"], base["mean_toxicity"]) == (alone.fraction, alone.mean)
    assert np.isnan(base["toxic_share_change"])
    perplexity = sepcap.evaluate(cut.model, cut.texts_b, tokens=HOW["eval_tokens"]).perplexity
    assert base["retain_perplexity"] == pytest.approx(perplexity, rel=1e-5)
    assert found.config["scorer"] == "scorer"
    assert "continuations score above 0.8" in " ".join(found.summary())
    with pytest.raises(ValueError, match="no table 'relearning'"):
        found.figure("relearning")


def test_prompts_of_a_file_are_part_of_what_is_compared(cut, tmp_path):
    """A folder that was made with other prompts is not resumed."""
    path, found = tmp_path / "prompts.txt", []
    config = sepcap.UnlearningComparisonConfig(**tasks(cut), **PLAIN, parts=("toxicity",), scorer=len, toxicity_prompts=path)
    for texts in (cut.texts_a, cut.texts_b):
        path.write_text(" ".join(texts[0].split()[:5]))
        found.append(planned(cut.model, config, None).resolved)
    assert differing_fields(as_json(found[0]), found[1]).startswith("prompts_digest:")


def test_a_scorer_is_part_of_what_is_compared_by_its_content(cut, tmp_path):
    (tmp_path / "classifier").mkdir()
    weights, found = tmp_path / "classifier" / "model.safetensors", []
    for content in (b"one", b"other"):
        weights.write_bytes(content)
        found.append(scorer_digest(tmp_path / "classifier"))
    assert len({*found, scorer_digest(len), scorer_digest(scorer)}) == 4
    how = {**tasks(cut), **HOW, "parts": ("toxicity",), "scorer": lambda texts: [0.0 for _ in texts]}
    with pytest.raises(ValueError, match="no name by which a stored study"):
        sepcap.compare_unlearning(cut.model, out=tmp_path / "out", **how)
    assert not (tmp_path / "out").exists()


def test_a_perplexity_by_hand():
    sums = np.zeros((3, 7))
    sums[:, 0], sums[:, 6] = [1, 2, 1], [0.5, 1.0, 0.5]
    found = _perplexity("p", sums)
    assert found["p"] == found["p_low"] == found["p_high"] == pytest.approx(np.exp(0.5))


def test_wrong_input_is_one_error_before_anything_is_written(cut, tmp_path):
    out, before = tmp_path / "out", fingerprint(cut.model)
    wrong = [
        ({"retain": cut.texts_a}, "same data"),
        ({"methods": ("prune", "prune")}, "methods"),
        ({"checkpoints": (20, 10)}, "increasing"),
        ({"level": 1.5}, "level"),
        ({"fractions": {"mlp": 0.5}}, "more than there are"),
        ({"fractions": {"mlp": 9}}, "in 3 steps prunes more than there are: 24"),
        ({"retain_weight": -1.0}, "retain_weight"),
        ({"forget": ["a1 a2"]}, "too little text"),
        ({"parts": ("toxicity",), "scorer": "no-such-folder"}, "scorer"),
        ({"parts": ("toxicity",), "scorer": len, "toxicity_prompts": []}, "prompts is empty"),
        ({"parts": ("toxicity",), "scorer": len, "toxicity_prompts": cut.texts_a[:1]}, "context"),
    ]
    for given, words in wrong:
        with pytest.raises(ValueError, match=words):
            sepcap.compare_unlearning(cut.model, out=out, **{**tasks(cut), **HOW, **given})
    assert not out.exists()
    assert fingerprint(cut.model) == before


def test_a_model_without_hits_is_an_error(cut):
    texts = [" ".join(reversed(text.split())) for text in cut.texts_b]
    with pytest.raises(ValueError, match=r"top1 of the untouched model is 0 on the .* texts of retain"):
        sepcap.compare_unlearning(cut.model, forget=cut.texts_a, retain=texts, **{**HOW, "methods": ("prune",)})


@pytest.mark.thorough
def test_states_are_stored_once(cut):
    config = sepcap.UnlearningComparisonConfig(**tasks(cut), **{**PLAIN, "methods": ("npo",)})
    plan = planned(cut.model, config, None)
    with study_folder(None, study.UnlearningComparison, plan.resolved) as pieces:
        found, _ = walks.trajectories(plan, pieces)
        states = walks.States(plan, pieces, found)
        prints = []
        for _ in range(2):
            with states.made(Arm("npo", 0)) as model:
                prints.append(fingerprint(model))
        assert prints[0] == prints[1] != fingerprint(cut.model)
