"""`learn_ranking` as a study: scores with a comparison on texts that it never saw, resumable, and honest about what it cannot do."""

import os
import signal
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from planted import in_mlp
from run_folders import bits
from tiny import write_jsonl

import sepcap
from sepcap.cli.main import main
from sepcap.studies.base.folder import Pieces
from sepcap.studies.pruning.separability import area

QUICK = {"steps": 24, "tokens": 1_000, "eval_tokens": 400, "step_tokens": 150, "lr": 0.15, "check_every": 12}


@pytest.fixture(scope="module")
def misled(tmp_path_factory):
    return in_mlp(tmp_path_factory.mktemp("misled"), words=8, misled=2.0)


@pytest.fixture(scope="module")
def learned(misled, tmp_path_factory):
    return learn(misled, out=tmp_path_factory.mktemp("learned") / "whole")


def learn(planted, **options):
    return sepcap.learn_ranking(planted.model, progress=False, **{"forget": planted.a, "retain": planted.b, **QUICK, **options})


def test_it_is_scores_whose_top_is_the_planted_set(learned, misled):
    assert isinstance(learned, sepcap.Scores)
    assert learned.top({"mlp": 8}) == misled.truth["a"]
    assert learned.info["importance"] == "learned"
    assert learned.info["learned_step"] == learned.step > 0


@pytest.mark.thorough
def test_areas_are_those_of_pruning_by_the_order(learned, misled):
    """A second computation: every share is deleted from the weights, and the model evaluated as any other."""
    found = {"forget": [], "retain": []}
    for step in range(11):
        model = sepcap.load_model(misled.model.cfg.model_name, device="cpu")
        if step:
            sepcap.delete(model, learned.top({"mlp": step / 10}))
        for role, task in (("forget", misled.a), ("retain", misled.b)):
            found[role].append(sepcap.evaluate(model, task, tokens=400).top1)
    rows = learned.tables["trajectory"].query("texts == 'evaluation' and order == 'learned'")
    for role, values in found.items():
        np.testing.assert_allclose(rows[role], values, atol=1e-12)
    assert learned.area()["area"] == pytest.approx(float(area(*map(np.array, found.values()))), abs=1e-12)
    assert learned.area()["gain"] == pytest.approx(learned.area()["area"] - learned.area(order="start")["area"], abs=1e-12)


def test_the_gap_is_a_difference_of_areas(learned):
    areas = learned.tables["areas"].set_index(["texts", "order"])["area"]
    for row in learned.tables["gaps"].itertuples():
        assert row.gap == pytest.approx(areas["fitted", row.order] - areas["evaluation", row.order], abs=1e-12)
        assert row.gap_low <= row.gap <= row.gap_high


def test_the_cost_counts_every_pass(learned):
    cost, fitted = learned.tables["cost"].iloc[0], learned.tables["history"]
    assert len(fitted) == QUICK["steps"]
    # one forward pass per task and step of about the tokens asked for, and at most as many backward
    assert cost["forward_tokens"] == pytest.approx(2 * QUICK["steps"] * QUICK["step_tokens"], rel=0.25)
    assert cost["backward_tokens"] <= cost["forward_tokens"]
    assert cost["passes"] == pytest.approx((cost["forward_tokens"] + cost["backward_tokens"] + cost["check_tokens"]) / cost["collected"])


def test_it_comes_back_from_its_folder(learned):
    again = sepcap.load_result(learned.folder)
    assert torch.equal(again["mlp"], learned["mlp"])
    pd.testing.assert_frame_equal(again.table, sepcap.Scores(dict(learned)).table)
    assert again.summary() == learned.summary()
    assert all(again.figure(kind).data for kind in again.FIGURES)


@pytest.mark.thorough
@pytest.mark.skipif(sys.platform != "linux", reason="kills a fork of this process, which only Linux does safely")
@pytest.mark.parametrize("writes", [3, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 5))])
def test_killed_it_resumes_with_equal_bits(misled, learned, tmp_path, monkeypatch, writes):
    child = os.fork()
    if child == 0:
        put, left = Pieces.put, iter(range(writes, -1, -1))

        def killed(*args, **kwargs):
            if next(left) == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            put(*args, **kwargs)

        monkeypatch.setattr(Pieces, "put", killed)
        learn(misled, out=tmp_path / "killed")
        os._exit(0)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
    learn(misled, out=tmp_path / "killed")
    assert bits(tmp_path / "killed") == bits(learned.folder)


@pytest.mark.thorough
def test_several_sites_and_heads_have_an_order_each(misled):
    found = learn(misled, site=("mlp", "heads", "attn_value"), constants="mean", steps=2)
    assert set(found) == {"mlp", "attn_pre_out", "attn_value"}
    for site, n in (("mlp", 16), ("attn_value", found["attn_value"].numel())):
        assert sorted(found[site].flatten().tolist()) == pytest.approx([(i + 1) / n for i in range(n)])
    assert len(found.heads().unique()) == found.heads().numel()
    with sepcap.ablate(misled.model, found.top({"mlp": 2}), {"mlp": found.constants["mlp"]}):
        assert sepcap.evaluate(misled.model, misled.a, tokens=100).n == 100


@pytest.mark.thorough
def test_scores_can_be_the_start(misled):
    right = sepcap.Scores({"mlp": misled.truth["a"].masks["mlp"].double()})
    found = learn(misled, init=right, steps=1)
    assert found.config["init"].startswith("scores ")
    assert found.area(order="start")["area"] == pytest.approx(2, abs=1e-9)
    assert found.step == 0
    assert found.top({"mlp": 8}) == misled.truth["a"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"steps": 0}, "steps=0: give at least 1"),
        ({"site": ()}, "site=.*give at least one"),
        ({"site": "mpl"}, "mlp"),
        ({"site": ("mlp", "mlp")}, "site"),
        ({"site": ("heads", "attn_pre_out")}, "one or the other"),
        ({"init": "ab"}, "abs"),
        ({"init": 3}, "init is a int; give the name of an importance, or Scores"),
        ({"init": "freq", "site": "heads"}, "freq"),
        ({"tau": 0.0}, "tau=0.0"),
        ({"deepest": 1.5}, "deepest=1.5"),
        ({"forget": []}, "forget|empty|no "),
        ({"tokens": 20}, "of one document"),
    ],
)
def test_bad_input_is_named_and_nothing_is_written(misled, tmp_path, given, said):
    with pytest.raises((ValueError, TypeError), match=said):
        learn(misled, out=tmp_path / "never", **given)
    assert not (tmp_path / "never").exists()


def test_the_same_texts_twice_are_refused(misled):
    with pytest.raises(ValueError, match="nothing to compare"):
        sepcap.learn_ranking(misled.model, forget=misled.a, retain=misled.a, progress=False)


@pytest.mark.thorough
def test_a_run_prunes_by_a_learned_order(misled, tmp_path):
    how = {"forget": misled.a, "retain": misled.b, "fractions": {"mlp": 0.125}, "steps": 8, "tokens": 1_000, "eval_tokens": 300}
    config = sepcap.PruningConfig(importance="learned", recollect=False, learning_steps=1, **how)
    run = sepcap.prune(misled.model, config, out=tmp_path / "run", progress=False)
    assert run.neurons(3) == run.scores().top({"mlp": 0.375})
    assert run.scores().info["importance"] == "learned"
    main(["check", str(tmp_path / "run")])
    (tmp_path / "run" / "statistics" / "learned.safetensors").unlink()
    with pytest.raises(SystemExit):
        main(["check", str(tmp_path / "run")])


@pytest.mark.thorough
def test_an_interrupted_run_learns_on(misled, tmp_path, monkeypatch):
    how = {"forget": misled.a, "retain": misled.b, "fractions": {"mlp": 0.25}, "steps": 2, "tokens": 1_000, "eval_tokens": 300}
    config = sepcap.PruningConfig(importance="learned", recollect=False, learning_steps=12, **how)
    whole = sepcap.prune(misled.model, config, out=tmp_path / "whole", progress=False)
    put = Pieces.put

    def stopped(*args, **kwargs):
        put(*args, **kwargs)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Pieces, "put", stopped)
        for _ in range(2):  # before the first step, and after the tenth
            with pytest.raises(KeyboardInterrupt):
                sepcap.prune(misled.model, config, out=tmp_path / "stopped", progress=False)
        assert not (tmp_path / "stopped" / "steps").exists()
    main(["check", str(tmp_path / "stopped")])
    again = sepcap.prune(misled.model, config, out=tmp_path / "stopped", progress=False)
    assert bits(again.folder) == bits(whole.folder)


def test_iterative_pruning_by_a_learned_order_is_refused():
    with pytest.raises(ValueError, match=r"recollect=True: one order of all neurons is learned on the unpruned model.*--no-recollect"):
        sepcap.PruningConfig(importance="learned")


@pytest.mark.thorough
def test_the_command_learns_an_order(misled, tmp_path, capsys):
    forget, retain = (write_jsonl(tmp_path / f"{name}.jsonl", texts) for name, texts in (("a", misled.a), ("b", misled.b)))
    options = [part for key, value in QUICK.items() for part in (f"--{key.replace('_', '-')}", str(value))]
    where = ["--forget", forget, "--retain", retain, "--out", str(tmp_path / "out")]
    main(["learn-ranking", "--model", str(misled.model.cfg.model_name), *where, *options, "--steps", "2", "--site", "mlp"])
    assert "area" in capsys.readouterr().out
    assert (tmp_path / "out" / "result.json").exists()
