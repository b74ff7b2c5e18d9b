"""Trackers: every step once and in order whatever happens, a run that does not depend on its trackers, a real offline run of wandb."""

import json
import os
import signal
import sys
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from run_folders import STEPS, bits, config_of
from wandb_files import logged

import sepcap
from sepcap.studies.pruning import plan as planning
from sepcap.studies.pruning import prune as pruning
from sepcap.studies.pruning import trackers
from sepcap.studies.pruning.run import Run
from sepcap.studies.pruning.trackers import LINES, values_of


@pytest.fixture
def prepared(tiny_opt, letters, digits):
    return planning.plan(tiny_opt, config_of(letters, digits))


class Listed:
    """Keeps the steps that it receives; fails at one of them."""

    def __init__(self, fails_at=None):
        self.steps, self.fails_at = [], fails_at

    def __call__(self, step, values):
        if step == self.fails_at:
            raise OSError("no disk today")
        assert values["seconds"] >= 0
        self.steps.append(step)


def lines_of(run):
    return [json.loads(line) for line in (run.folder / LINES).read_text().splitlines()]


def expected_lines(run):
    """From the table of the run, which is written by other code."""
    table, lines = run.trajectory, []
    for step in range(run.steps_done + 1):
        rows = table[table["step"] == step].set_index("role")
        line = {"step": step, "seconds": rows["seconds"].iloc[0], "tokens": rows["tokens"].iloc[0]}
        for site in ("mlp", "attn_pre_out"):
            line[f"pruned/{site}"] = rows[f"pruned_{site}"].iloc[0]
            if step:
                line[f"threshold/{site}"] = rows[f"threshold_{site}"].iloc[0]
        metrics = [name for name in rows.columns if name in run.record(0)["tasks"]["forget"]["metrics"]]
        line |= {f"{role}/{name}": rows.loc[role, name] for role in ("forget", "retain") for name in metrics}
        lines.append(line)
    return lines


def test_a_line_per_step_holds_what_the_table_of_the_run_holds(prepared, tmp_path):
    run = pruning.execute(prepared, tmp_path / "run")
    lines, expected = lines_of(run), expected_lines(run)
    assert len(lines) == STEPS + 1
    for line, wanted in zip(lines, expected, strict=True):
        assert line.keys() == wanted.keys()
        assert {"forget/top1", "retain/loss", "pruned/mlp", "seconds"} <= line.keys()
        for name, value in wanted.items():
            assert line[name] == pytest.approx(value) or (line[name] is None and not np.isfinite(value)), name
    assert list(pd.read_json(run.folder / LINES, lines=True)["step"]) == [0, 1, 2]


def test_a_step_is_in_the_file_before_the_next_one_begins(prepared, tmp_path, monkeypatch):
    seen, step = [], pruning._step

    def looking(prepared, run, number):
        seen.append(len(lines_of(run)))
        step(prepared, run, number)

    monkeypatch.setattr(pruning, "_step", looking)
    pruning.execute(prepared, tmp_path / "run")
    assert seen == [0, 1, 2]


@pytest.mark.parametrize("text", [b"", b'{"step": 0, "seco', b'{"step": 0}\n{"step": 0}\n', b"\xff\n", b'[0]\n{"step": 1}\n'])
def test_whatever_is_left_of_the_file_it_ends_with_every_step_once(prepared, tmp_path, text):
    whole = bits(pruning.execute(prepared, tmp_path / "run").folder)
    (tmp_path / "run" / LINES).write_bytes(text)
    pruning.execute(prepared, tmp_path / "run")
    assert bits(tmp_path / "run") == whole  # also a whole line is written again where it says something else than the step


def test_steps_that_are_made_again_are_taken_down_again(prepared, tmp_path):
    run = pruning.execute(prepared, tmp_path / "run")
    whole = bits(run.folder)
    (run.step_folder(STEPS) / "record.json").unlink()
    pruning.execute(prepared, run.folder)
    assert bits(run.folder) == whole


@pytest.mark.skipif(sys.platform != "linux", reason="kills forks of this process, which only Linux does safely")
@pytest.mark.parametrize("where", ["before", "within", "after"])
@pytest.mark.parametrize("step", [pytest.param(step, marks=pytest.mark.slow if step != 1 else []) for step in range(STEPS + 1)])
def test_killed_around_a_line_it_goes_on_to_the_same_lines(prepared, tmp_path, step, where):
    whole = bits(pruning.execute(prepared, tmp_path / "whole").folder)
    child = os.fork()
    if child == 0:
        write = trackers.write_lines

        def dies(run):
            if run.steps_done == step and where == "within":
                with (run.folder / LINES).open("ab") as file:
                    file.write(b'{"step": 1, "forg')
            elif run.steps_done != step or where == "after":
                write(run)
            if run.steps_done == step:
                os.kill(os.getpid(), signal.SIGKILL)

        trackers.write_lines = dies
        try:
            pruning.execute(prepared, tmp_path / "run")
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)
    assert Run(tmp_path / "run").steps_done == step
    pruning.execute(prepared, tmp_path / "run")
    assert bits(tmp_path / "run") == whole


def test_trackers_do_not_make_another_run(tiny_opt, letters, digits, tmp_path, monkeypatch):
    config, step = config_of(letters, digits), pruning._step

    def stops(prepared, run, number):
        if number == 2:
            raise KeyboardInterrupt
        step(prepared, run, number)

    monkeypatch.setattr(pruning, "_step", stops)
    first, second = Listed(), Listed()
    with pytest.raises(KeyboardInterrupt):
        sepcap.prune(tiny_opt, config, out=tmp_path / "run", tracker=first)
    assert first.steps == [0, 1]
    assert not (tmp_path / "run" / LINES).exists()
    monkeypatch.setattr(pruning, "_step", step)
    run = sepcap.prune(tiny_opt, config, out=tmp_path / "run", tracker=["jsonl", second])
    assert second.steps == [2]  # a function receives the steps that its call makes
    assert [line["step"] for line in lines_of(run)] == [0, 1, 2]  # the file has all of them
    assert "tracker" not in run.config


def test_a_finished_run_is_not_touched_but_for_a_file_that_it_lacks(prepared, tmp_path, monkeypatch):
    run = pruning.execute(prepared, tmp_path / "run")
    whole, stamps = bits(run.folder), {path: path.stat().st_mtime_ns for path in run.folder.rglob("*")}
    monkeypatch.setattr(pruning, "_step", None)  # nothing is computed
    listed = Listed()
    pruning.execute(prepared, run.folder, ["jsonl", listed])
    assert {path: path.stat().st_mtime_ns for path in run.folder.rglob("*")} == stamps
    assert listed.steps == []
    (run.folder / LINES).unlink()
    pruning.execute(prepared, run.folder)
    assert bits(run.folder) == whole


@pytest.mark.parametrize("fails_at", range(STEPS + 1))
def test_a_tracker_that_fails_does_not_cost_the_run(prepared, tmp_path, fails_at):
    failing, listed = Listed(fails_at), Listed()
    with pytest.warns(UserWarning, match=r"the tracker Listed is dropped from the run in .* \(OSError: no disk today\); the run continues"):
        run = pruning.execute(prepared, tmp_path / "run", [failing, listed])
    assert run.finished
    assert listed.steps == [0, 1, 2]
    assert failing.steps == list(range(fails_at))  # not called again
    assert "no disk today" in (run.folder / "run.log").read_text()


def test_a_folder_in_place_of_the_file_does_not_cost_the_run(prepared, tmp_path):
    run = pruning.execute(prepared, tmp_path / "run", "none")
    (run.folder / LINES).mkdir()
    with pytest.warns(UserWarning, match="the tracker jsonl is dropped"):
        assert pruning.execute(prepared, run.folder).finished


def test_what_is_no_tracker_is_refused_before_anything_is_done(tiny_opt, letters, digits, tmp_path, monkeypatch):
    for wrong, error, said in (
        ("wnadb", ValueError, "tracker='wnadb' is not known. Did you mean 'wandb'"),
        (["jsonl", "none_"], ValueError, "Did you mean 'none'"),
        ([3], TypeError, r"tracker=3 is a int; give 'jsonl', 'wandb', 'none', or a function \(step, values\)"),
    ):
        with pytest.raises(error, match=said):
            trackers.trackers_of(wrong)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match=r"pip install 'sepcap\[wandb\]'"):
        sepcap.prune(tiny_opt, config_of(letters, digits), out=tmp_path / "run", tracker="wandb")
    assert not (tmp_path / "run").exists()


# Weights & Biases, offline


@pytest.fixture
def offline(monkeypatch, tmp_path):
    wandb = pytest.importorskip("wandb", reason="wandb is not installed: pip install 'sepcap[wandb]'")
    wandb.teardown()  # it reads its environment once
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "settings"))
    yield
    wandb.teardown()


def random_state():
    # not Python's own: the type checks of the tests draw from it
    return np.random.get_state()[1].tobytes(), torch.random.get_rng_state().numpy().tobytes()


@pytest.mark.thorough
def test_wandb_gets_every_step_of_an_interrupted_run_under_one_id(offline, prepared, tmp_path, monkeypatch):
    step, before = pruning._step, random_state()

    def stops(prepared, run, number):
        if number == 2:
            raise KeyboardInterrupt
        step(prepared, run, number)

    monkeypatch.setattr(pruning, "_step", stops)
    with pytest.raises(KeyboardInterrupt):
        pruning.execute(prepared, tmp_path / "run", "wandb")
    assert list(logged(tmp_path / "run")["steps"]) == [0, 1]
    monkeypatch.setattr(pruning, "_step", step)
    run = pruning.execute(prepared, tmp_path / "run", ("wandb", "jsonl"))
    found = logged(tmp_path / "run")
    assert len(found["ids"]) == 1
    assert found["projects"] == {"sepcap"}
    assert found["exits"] == [1, 0]  # interrupted, then finished
    assert {number: len(told) for number, told in found["steps"].items()} == {0: 1, 1: 1, 2: 1}
    for number, (told,) in found["steps"].items():
        for name, value in values_of(run.record(number)).items():
            assert float(told[name]) == pytest.approx(value, nan_ok=True), name
    assert found["config"]["importance"] == "abs"
    assert found["config"]["model_fingerprint"] == run.config["model_fingerprint"]
    assert "documents" not in found["config"]
    assert random_state() == before
    # a finished run sends nothing again
    files = sorted(run.folder.rglob("*.wandb"))
    pruning.execute(prepared, run.folder, "wandb")
    assert sorted(run.folder.rglob("*.wandb")) == files


def test_wandb_without_a_login_does_not_cost_the_run(offline, prepared, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_API_KEY", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    with pytest.warns(UserWarning, match="the tracker wandb is dropped from the run"):
        assert pruning.execute(prepared, tmp_path / "run", "wandb").finished


def test_the_default_uses_no_network_and_no_wandb(prepared, tmp_path, monkeypatch):
    import socket

    def refused(*args, **kwargs):
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refused)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert pruning.execute(prepared, tmp_path / "run").finished


@pytest.mark.parametrize(("chosen", "files"), [(["none"], []), (["jsonl", "wandb"], [LINES, "wandb"])])
def test_the_command_line_chooses_trackers(offline, trained_folder, task_files, tmp_path, chosen, files, capsys):
    from sepcap.cli.main import main

    arguments = ["prune", "--model", str(trained_folder), "--forget", task_files["forget"], "--retain", task_files["retain"]]
    arguments += ["--fractions", "mlp=0.5", "--steps", "1", "--tokens", "300", "--eval-tokens", "300"]
    main([*arguments, "--out", str(tmp_path / "run"), "--tracker", *chosen])
    assert [path.name for path in sorted((tmp_path / "run").iterdir()) if path.name in (LINES, "wandb")] == files
    with pytest.raises(SystemExit):
        main([*arguments, "--out", str(tmp_path / "other"), "--tracker", "wadnb"])
    assert not (tmp_path / "other").exists()
