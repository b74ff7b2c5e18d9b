"""The comparison of importances: against the studies it is made of, against labels, resumed, and with bad input (METHODS 19)."""

import dataclasses
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import spearmanr
from sklearn.metrics import average_precision_score, roc_auc_score
from tiny import fresh

import sepcap
from sepcap.studies.importances import study as league
from sepcap.studies.importances.config import FIXED, LEARNED, RANDOM, ImportanceComparisonConfig, collected_with, parsed
from sepcap.studies.importances.measures import agreement, random_scores
from sepcap.studies.importances.result import ImportanceComparison

pytestmark = pytest.mark.thorough

SCORES = ("abs", "taylor", "atp", "abs-guarded", "random", "learned")
SMALL = {"scores": SCORES, "sites": ("mlp",), "seeds": (0, 1), "tokens": 200, "effect_tokens": 150, "steps": 2}
SMALL |= {"eval_tokens": 300, "choice_tokens": 100, "batch_size": 64, "effect_context": 16, "best": 1, "learn_steps": 2, "context": 16}
WAYS = ("forward", "reverse")


@pytest.fixture(scope="module")
def compared(trained_folder, letters, digits, tmp_path_factory):
    model, said = fresh(trained_folder), []
    before = {name: value.clone() for name, value in model.original_model.named_parameters()}
    out = tmp_path_factory.mktemp("league") / "study"
    found = sepcap.compare_importances(model, forget=letters, retain=digits, **SMALL, out=out, progress=said.append)
    assert all(value.equal(before[name]) for name, value in model.original_model.named_parameters())
    assert "6 scores" in said[0]
    assert "144 mlp neurons; all ablated alone" in said[0]
    assert "tokens per second just measured" in said[0]
    return found


def test_every_score_has_a_row_in_both_directions(compared):
    assert len(compared.table) == 2 * (len(SCORES) + 1)
    by_direction = compared.table.groupby("direction")["score"].apply(list)
    assert by_direction["forward"] == by_direction["reverse"] == [*SCORES, "ceiling"]
    assert compared.table["passes"].tolist()[:5] == [1, 2, 2, 1, 0]
    assert compared.row("mlp", "forward", "ceiling")["passes"] == 144
    assert len(compared.tensors["mlp/places"]) == 144
    assert compared.config["neurons"] == {"mlp": 144}


def test_the_table_is_that_of_the_single_ablations_and_of_the_scores(compared):
    """Effects from the study in its folder, scores from its pieces; correlations by scipy."""
    each = sepcap.SingleAblations.load(compared.folder / "ablations" / "trained-mlp")
    delta = {role: each.delta(role).value[tuple(each.tensors["places"].T)].numpy() for role in ("forget", "retain")}
    for role, values in delta.items():
        np.testing.assert_allclose(compared.tensors[f"mlp/delta/{role}"].numpy(), values, rtol=1e-12)
    for way, sign in zip(WAYS, (1, -1), strict=True):
        change = sign * (delta["forget"] - delta["retain"])
        for name in ("abs", "taylor", "atp", "abs-guarded"):
            scores = [
                found[0][f"mlp/{way}/{name}"][tuple(each.tensors["places"].T)].numpy()
                for seed in (0, 1)
                for found in [_piece(compared, f"scores/trained-{seed}-{collected_with(name) or 'activations'}")]
            ]
            row = compared.row("mlp", way, name)
            assert row["spearman_difference"] == pytest.approx(np.mean([spearmanr(s, change)[0] for s in scores]), abs=1e-10)
            own = delta["forget" if way == "forward" else "retain"]
            assert row["spearman_forget"] == pytest.approx(np.mean([spearmanr(s, own)[0] for s in scores]), abs=1e-10)
            np.testing.assert_array_equal(compared.tensors[f"mlp/scores/{way}/{name}"], scores[0])
            assert row["spearman_difference_low"] < row["spearman_difference"] < row["spearman_difference_high"]
    random = compared.row("mlp", "forward", "random")
    draws = np.stack([random_scores((2, 72), draw, 0)[tuple(each.places.T)] for draw in range(20)])
    assert random["recall_5"] == pytest.approx(agreement(draws, delta["forget"][None], delta["retain"][None])["recall_5"].mean())
    assert random["spearman_difference_low"] < 0 < random["spearman_difference_high"]


def _piece(compared, name):
    from sepcap.studies.base.folder import Pieces, identity_of

    found = Pieces(compared.folder, identity_of(compared.config)).get(name)
    assert found is not None
    return found


def test_scores_are_those_of_collect_and_score(trained_folder, letters, digits):
    """With one seed the calibration texts are those that `collect` takes."""
    model, how = fresh(trained_folder), {"tokens": 200, "sites": "mlp", "context": 16}
    few = {"seeds": (0,), "scores": ("abs", "atp"), "best": 0, "control": False, "sample": 4}
    one = sepcap.compare_importances(model, forget=letters, retain=digits, **{**SMALL, **few})
    forget, retain = (sepcap.collect(model, task, gradients=("atp",), **how) for task in (letters, digits))
    places = tuple(one.tensors["mlp/places"].T)
    for name in ("abs", "atp"):
        expected = sepcap.score(forget, retain, name)["mlp"].double()[places]
        torch.testing.assert_close(one.tensors[f"mlp/scores/forward/{name}"], expected, rtol=1e-5, atol=1e-9)
        expected = sepcap.score(retain, forget, name)["mlp"].double()[places]
        torch.testing.assert_close(one.tensors[f"mlp/scores/reverse/{name}"], expected, rtol=1e-5, atol=1e-9)
    assert np.isnan(one.row("mlp", "forward", "abs")["iterative_area"])
    assert one.tables["control"].empty
    assert one.folder is None
    with pytest.raises(ValueError, match="no iterative_area"):
        one.figure("ranks", column="iterative_area")


def test_a_one_shot_trajectory_is_that_of_deleting_the_highest_scores(compared, trained_folder, letters, digits):
    stored = _piece(compared, "scores/trained-0-activations")[0]["mlp/forward/abs"]
    table = compared.tables["trajectory"].query("kind == 'one-shot' and score == 'abs' and direction == 'forward'").set_index("step")
    whole = fresh(trained_folder)
    pruned = fresh(trained_folder)
    sepcap.delete(pruned, sepcap.Scores({"mlp": stored}).top({"mlp": 72}))
    for step, model in ((0, whole), (1, pruned)):
        for role, task in (("forget", letters), ("retain", digits)):
            found = sepcap.evaluate(model, task, tokens=300, context=16)
            assert table.loc[step, role] == pytest.approx(found.top1, abs=2 / 300)  # a rival within rounding
    assert table.loc[2, "share"] == 1.0


def test_an_iterative_area_is_that_of_its_pruning_runs(compared):
    (chosen,) = compared.chosen("mlp")
    choice = compared.tables["choice"].query("site == 'mlp'")
    assert set(choice["score"]) == {"taylor", "atp", "abs-guarded"}  # not abs, random and learned, which are always there
    assert chosen == choice.groupby("score")["area"].mean().idxmax()
    assert compared.table.query("chosen")["score"].unique().tolist() == [chosen]
    for way in WAYS:
        areas = {}
        for name in ("abs", chosen):
            runs = [sepcap.Run(compared.folder / "iterative" / "mlp" / name / f"{way}-{seed}") for seed in (0, 1)]
            assert all(run.config["importance"] == parsed(name)[0] for run in runs)
            areas[name] = np.array([run.separability("top1").area for run in runs])
            row = compared.row("mlp", way, name)
            assert row["iterative_area"] == pytest.approx(areas[name].mean())
            assert row["iterative_seeds_sd"] == pytest.approx(areas[name].std(ddof=1))
        assert row["iterative_minus_abs"] == pytest.approx((areas[chosen] - areas["abs"]).mean())
        assert np.isnan(compared.row("mlp", way, "learned")["iterative_area"])
        assert np.isfinite(compared.row("mlp", way, "learned")["one_shot_area"])


def test_the_overlap_of_selections_from_two_samples_of_texts(compared):
    """Against `selection_stability` of the same two sets; an order that has no calibration texts has none."""
    for way in WAYS:
        pieces = [_piece(compared, f"scores/trained-{seed}-activations")[0] for seed in (0, 1)]
        scores = [sepcap.Scores({"mlp": values[f"mlp/{way}/abs"]}) for values in pieces]
        expected = sepcap.selection_stability(scores, {"mlp": 14}).jaccard("mlp")[0, 1]
        assert compared.row("mlp", way, "abs")["jaccard_10"] == pytest.approx(expected)
        assert np.isnan(compared.row("mlp", way, "learned")["jaccard_10"])


def test_the_control_is_measured_on_random_weights(compared):
    control = compared.tables["control"]
    assert control["score"].unique().tolist() == ["abs", "taylor", "atp", "abs-guarded", "random"]
    trained = compared.table.set_index(["direction", "score"])["spearman_difference"]
    assert (control.set_index(["direction", "score"])["spearman_difference"] - trained).abs().max() > 0.01
    made = sepcap.SingleAblations.load(compared.folder / "ablations" / "untrained-mlp").config["model"]
    assert "random weights (seed 0)" in made


def test_no_score_beats_abs_unless_both_intervals_lie_above_0(compared):
    table = compared.table.copy()
    lows = table["score"] == "taylor"
    for forward, reverse, expected in ((0.1, 0.1, True), (0.1, -0.1, False), (-0.1, 0.1, False), (0.1, np.nan, False)):
        table.loc[lows, "iterative_minus_abs_low"] = [forward, reverse]
        changed = dataclasses.replace(compared, tables={**compared.tables, "league": table})
        assert changed.beats_abs("mlp", "taylor") is expected
    said = " ".join(compared.summary())
    assert ("it is not shown" in said.lower()) or ("agrees better than abs" in said) or ("No other score agrees better" in said)


def test_the_best_is_chosen_on_one_half_of_the_documents_and_measured_on_the_other(compared):
    trust = compared.tables["trust"]
    (best,) = trust.query("best")["score"].unique()
    assert best in SCORES[:4]
    assert set(trust["score"]) == {best, "abs", "random", "learned"}
    whole = compared.table.set_index(["direction", "score"])["spearman_difference"]
    halves = trust.set_index(["direction", "score"])["spearman_difference"]
    assert not np.allclose(halves, whole[halves.index])  # not of all documents
    untrained = compared.tables["control"].set_index(["direction", "score"])["spearman_difference"]
    for way in WAYS:
        row = trust.query("direction == @way and score == @best").iloc[0]
        assert row["untrained"] == untrained[way, best]


def test_the_ceiling_beside_half_of_the_documents_is_that_of_half_of_the_documents(compared):
    """The correlation between halves is the reliability of one of them, and a score without error reaches its square root."""
    table = compared.tables["reliability"].copy()
    table["spearman_difference_half"] = [0.36, -0.01]  # of all documents: 2 · 0.36 / 1.36, root 0.73
    said = " ".join(dataclasses.replace(compared, tables={**compared.tables, "reliability": table}).summary())
    assert said.count("on so few documents a score without error would have 0.60") == 1
    assert said.count("a score without error would have") == 1


def test_it_comes_back_and_shows_itself(compared, tmp_path):
    back = sepcap.load_result(compared.folder)
    assert type(back) is ImportanceComparison
    for name, table in compared.tables.items():
        pd.testing.assert_frame_equal(back.tables[name], table)
    assert back.summary() == compared.summary()
    page = compared.report(tmp_path / "page.html").read_text()
    assert compared.TITLE in page
    names = {trace.name for trace in compared.figure("trajectories").data}
    assert any(str(name).startswith("learned, one-shot") for name in names)
    assert len(compared.figure("ranks", column="one_shot_area").data) == 2
    figure = compared.figure("effects", score="atp")
    assert len(figure.data[0].x) == 144
    for options in ({"site": "attn_value"}, {"score": "random"}):
        with pytest.raises(ValueError, match=r"attn_value|random"):
            compared.figure("effects", **options)


class Stopped(Exception):
    pass


def test_an_interrupted_study_is_resumed_with_the_same_bits(compared, trained_folder, letters, digits, tmp_path, monkeypatch):
    """Parts are taken away: scores of one seed, a trajectory, an iterative run; then it stops once more before the end."""
    folder = shutil.copytree(compared.folder, tmp_path / "study")
    (folder / "result.json").unlink()
    shutil.rmtree(folder / "tables")
    for name in ("scores/trained-1-atp", "one-shot/mlp-forward-taylor-0", "choice/mlp-reverse-atp"):
        (folder / "pieces" / f"{name}.safetensors").unlink()
    (chosen,) = compared.chosen("mlp")
    shutil.rmtree(folder / "iterative" / "mlp" / chosen / "reverse-1")
    how = {"forget": letters, "retain": digits, **SMALL, "out": folder, "progress": False}

    def stop(*args, **kwargs):
        raise Stopped

    with monkeypatch.context() as patched:
        patched.setattr(league, "execute", stop)
        with pytest.raises(Stopped):
            sepcap.compare_importances(fresh(trained_folder), **how)
    with pytest.raises(FileNotFoundError, match="is not finished"):
        sepcap.load_result(folder)
    with monkeypatch.context() as patched:
        patched.setattr(league, "ablate_each", stop)  # what is finished is not measured again
        again = sepcap.compare_importances(fresh(trained_folder), **how)
    for name, table in compared.tables.items():
        pd.testing.assert_frame_equal(again.tables[name], table, check_exact=True)
    for name, tensor in compared.tensors.items():
        assert again.tensors[name].equal(tensor)


def test_labels_of_a_compiled_model_against_sklearn(tmp_path):
    """The texts of the model are its own; positives are the forget neurons, in the reverse direction those of retain."""
    small = {"scores": ("abs", "taylor", "random"), "sites": ("mlp",), "seeds": (0,), "tokens": 1_000}
    small |= {"effect_tokens": 60, "steps": 5, "eval_tokens": 200, "choice_tokens": 60, "best": 0, "control": False}
    found = sepcap.compare_importances(compiled="up-and-down", **small, out=tmp_path / "study", progress=False)
    compiled = sepcap.load_compiled("up-and-down")
    masks = {label: compiled.labels[label].masks["mlp"].flatten().numpy() for label in ("forget", "retain", "unused")}
    table = found.tables["labels"].set_index(["direction", "score", "among"])
    for way, positives in zip(WAYS, ("forget", "retain"), strict=True):
        for name in ("abs", "taylor"):
            values = _piece(found, f"scores/trained-0-{collected_with(name) or 'activations'}")[0][f"mlp/{way}/{name}"].flatten().numpy()
            for among, kept in (("used", ~masks["unused"]), ("all", masks["unused"] | True)):
                row = table.loc[way, name, among]
                assert row["auroc"] == pytest.approx(roc_auc_score(masks[positives][kept], values[kept]))
                assert row["auprc"] == pytest.approx(average_precision_score(masks[positives][kept], values[kept]))
                assert (row["neurons"], row["positives"]) == (kept.sum(), masks[positives].sum())
        assert table.loc[way, "random", "used"]["auroc"] == pytest.approx(0.5, abs=0.15)
        by_labels, areas = table.loc[way, "labels", "all"], table.loc[way].xs("all", level="among")["one_shot_area"]
        assert (by_labels["auroc"], by_labels["recall"]) == (1, 1)
        assert by_labels["one_shot_area"] == areas.max() > areas["random"] + 0.2
    assert found.config["model"] == "up-and-down"
    assert any("AUROC against the labels" in sentence for sentence in found.summary())


def test_bad_input_is_one_error_before_anything_is_written(trained_folder, letters, digits, tmp_path):
    model, out = fresh(trained_folder), tmp_path / "study"
    pair = {"forget": letters, "retain": digits, "out": out}
    for wrong, words in (
        ({"scores": ("abs", "tailor")}, "Did you mean 'taylor'"),
        ({"scores": ("atp-ratio",)}, "can be negative"),
        ({"scores": ("wanda-ratio",)}, "weights cancel"),
        ({"scores": ("freq",), "sites": ("attn_value",)}, "mlp only"),
        ({"sites": ()}, "at least one"),
        ({"seeds": (0, 0)}, "without repeats"),
        ({"sample": 1}, "at least 2"),
        ({"sample": 145}, "144 neurons"),
        ({"best": -1}, "best=-1"),
        ({"retain": letters}, "the same data"),
        ({"compiled": "up-and-down"}, "both given"),
    ):
        with pytest.raises(ValueError, match=words):
            sepcap.compare_importances(model, **{**SMALL, **pair, **wrong})
    with pytest.raises(ValueError, match="Did you mean 'up-and-down'"):
        sepcap.compare_importances(compiled="up-or-down", out=out)
    assert not out.exists()


def test_a_score_that_a_model_refuses_is_left_out_or_an_error(trained_folder, letters, digits, monkeypatch):
    """The model is asked with one row before anything begins."""
    from sepcap.studies.importances import plan

    def refusing(model, sample, sites, *, gradients=(), **how):
        if "relp" in gradients:
            raise NotImplementedError("relp is not defined here")

    monkeypatch.setattr(plan, "collect_sample", refusing)
    model, said = fresh(trained_folder), []
    config = ImportanceComparisonConfig(forget=letters, retain=digits, **{**SMALL, "scores": ()})
    prepared = plan.plan_comparison(model, config, said.append)
    left = {"relp", "relp_abs", "relp_abs-difference", "relp_abs-guarded"}
    assert set(prepared.scores) == set(FIXED) - left
    assert prepared.resolved["scores"][-2:] == [RANDOM, LEARNED]
    assert said == ["scores by relp are left out: relp is not defined here"]
    assert "ig" in prepared.scores
    assert "ig" not in prepared.candidates("mlp")  # 34 passes at every step
    with pytest.raises(NotImplementedError, match="relp is not defined here"):
        plan.plan_comparison(model, dataclasses.replace(config, scores=("relp",)), said.append)
