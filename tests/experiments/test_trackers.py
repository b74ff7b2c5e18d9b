"""Who follows a run: every step once and in order whatever happens, a run that outlives its trackers, wandb offline for real."""

import json
import os
import signal
import subprocess
import sys
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from run_folders import STEPS, bits, config_of
from wandb_files import logged, records, values_in

import sepcap
from sepcap.experiments import pruning, trackers
from sepcap.experiments.run import Run
from sepcap.experiments.trackers import LINES, WANDB, JsonLines, Tracker, values_of


@pytest.fixture
def prepared(tiny_opt, letters, digits):
    return pruning.plan(tiny_opt, config_of(letters, digits))


class Listed(Tracker):
    """Keeps what it is told."""

    def __init__(self):
        self.told = []

    def start(self, run):
        self.told.append("start")

    def log(self, step, values):
        self.told.append(step)

    def finish(self):
        self.told.append("finish")


class Failing(Listed):
    """Raises in one of its methods."""

    def __init__(self, where):
        super().__init__()
        self.where = where

    def __getattribute__(self, name):
        if name == object.__getattribute__(self, "__dict__").get("where"):
            raise OSError(f"no {name} today")
        return object.__getattribute__(self, name)


class OnlyLog:
    def log(self, step, values):
        raise AssertionError("it is no tracker")


class Duck(OnlyLog):
    """No Tracker by descent, but by its methods."""

    def __init__(self):
        self.told = []

    def held(self, run):
        return 0

    def start(self, run):
        self.told.append("start")

    def log(self, step, values):
        self.told.append(step)

    def finish(self):
        self.told.append("finish")


def lines_of(run):
    return [json.loads(line) for line in (run.folder / LINES).read_text().splitlines()]


def expected_lines(run):
    """From the table of the run, which is written by other code."""
    table, lines = run.trajectory, []
    for step in range(run.steps_done + 1):
        rows = table[table["step"] == step].set_index("role")
        line = {"step": step, "seconds": rows["seconds"].iloc[0], "tokens": rows["tokens"].iloc[0]}
        for site in ("mlp", "attn_pre_out"):
            line[f"gone/{site}"] = rows[f"gone_{site}"].iloc[0]
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
        assert {"forget/top1", "retain/loss", "gone/mlp", "seconds"} <= line.keys()
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
        log = JsonLines.log

        def dies(self, number, values):
            if number == step and where == "within":
                self._file.write(b'{"step": 1, "forg')
                self._file.flush()
            elif number != step or where == "after":
                log(self, number, values)
            if number == step:
                os.kill(os.getpid(), signal.SIGKILL)

        JsonLines.log = dies
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
    with pytest.raises(KeyboardInterrupt):
        sepcap.prune(tiny_opt, config, out=tmp_path / "run", tracker="none")
    assert not (tmp_path / "run" / LINES).exists()
    listed = Listed()
    with pytest.raises(KeyboardInterrupt):
        sepcap.prune(tiny_opt, config, out=tmp_path / "run", tracker=listed)
    # what was there before it came, and let go of although it was interrupted
    assert listed.told == ["start", 0, 1, "finish"]
    monkeypatch.setattr(pruning, "_step", step)
    other = Listed()
    run = sepcap.prune(tiny_opt, config, out=tmp_path / "run", tracker=["jsonl", other])
    assert other.told == ["start", 0, 1, 2, "finish"]
    assert [line["step"] for line in lines_of(run)] == [0, 1, 2]
    assert "tracker" not in run.config


def test_a_finished_run_is_not_touched_and_a_new_tracker_is_given_all_of_it(prepared, tmp_path, monkeypatch):
    run = pruning.execute(prepared, tmp_path / "run")
    stamps = {path: path.stat().st_mtime_ns for path in run.folder.rglob("*")}
    monkeypatch.setattr(pruning, "_step", None)  # nothing is computed
    pruning.execute(prepared, run.folder)
    listed = Listed()
    pruning.execute(prepared, run.folder, listed)
    assert {path: path.stat().st_mtime_ns for path in run.folder.rglob("*")} == stamps
    assert listed.told == ["start", 0, 1, 2, "finish"]


@pytest.mark.parametrize("where", ["held", "start", "log", "finish"])
def test_a_tracker_that_fails_does_not_cost_the_run(prepared, tmp_path, where):
    failing, listed = Failing(where), Listed()
    with pytest.warns(UserWarning, match=rf"Failing stopped following the run in .* \(OSError: no {where} today\); the run goes on"):
        run = pruning.execute(prepared, tmp_path / "run", [failing, listed])
    assert run.finished
    assert listed.told == ["start", 0, 1, 2, "finish"]
    # asked no more after it failed
    assert failing.told == {"held": [], "start": [], "log": ["start"], "finish": ["start", 0, 1, 2]}[where]
    assert f"no {where} today" in (run.folder / "run.log").read_text()


def test_what_is_no_tracker_is_refused_before_anything_is_done(tiny_opt, letters, digits, tmp_path, monkeypatch):
    config = config_of(letters, digits)
    for wrong, error, said in (
        ("wnadb", ValueError, "tracker='wnadb' is not known. Did you mean 'wandb'"),
        (["jsonl", "none_"], ValueError, "Did you mean 'none'"),
        (Listed, TypeError, r"tracker=Listed is a class; give an object of it: tracker=Listed\(\)"),
        ([OnlyLog()], TypeError, "is a OnlyLog, which lacks held, start, finish; give .* inherits from sepcap.Tracker"),
    ):
        with pytest.raises(error, match=said):
            trackers.trackers_of(wrong)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match=r"pip install 'sepcap\[wandb\]'"):
        sepcap.prune(tiny_opt, config, out=tmp_path / "run", tracker="wandb")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("several", [False, True])
def test_an_object_with_the_methods_of_a_tracker_is_one(prepared, tmp_path, several):
    duck = Duck()
    pruning.execute(prepared, tmp_path / "run", ["jsonl", duck] if several else duck)
    assert duck.told == ["start", 1, 2, "finish"]
    assert sepcap.Tracker is Tracker


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


def test_wandb_gets_every_step_of_an_interrupted_run_under_one_id(offline, prepared, tmp_path, monkeypatch):
    step, before = pruning._step, random_state()

    def stops(prepared, run, number):
        if number == 2:
            raise KeyboardInterrupt
        step(prepared, run, number)

    monkeypatch.setattr(pruning, "_step", stops)
    with pytest.raises(KeyboardInterrupt):
        pruning.execute(prepared, tmp_path / "run", "wandb")
    kept = json.loads((tmp_path / "run" / WANDB).read_text())
    assert kept["held"] == 1
    first = logged(tmp_path / "run")
    assert list(first["steps"]) == [0, 1]
    monkeypatch.setattr(pruning, "_step", step)
    run = pruning.execute(prepared, tmp_path / "run", ("wandb", "jsonl"))
    found = logged(tmp_path / "run")
    assert found["ids"] == {kept["id"]}
    assert found["projects"] == {"sepcap"}
    assert found["exits"] == [1, 0]  # interrupted, then finished
    assert {number: len(told) for number, told in found["steps"].items()} == {0: 1, 1: 1, 2: 1}
    for number, (told,) in found["steps"].items():
        for name, value in values_of(run.record(number)).items():
            assert float(told[name]) == pytest.approx(value, nan_ok=True), name
    assert found["config"]["importance"] == "abs"
    assert found["config"]["model_fingerprint"] == run.config["model_fingerprint"]
    assert "documents" not in found["config"]
    # the file of lines came later and has them all the same
    assert [line["step"] for line in lines_of(run)] == [0, 1, 2]
    assert random_state() == before
    # a finished run sends nothing again
    files = sorted(run.folder.rglob("*.wandb"))
    pruning.execute(prepared, run.folder, "wandb")
    assert sorted(run.folder.rglob("*.wandb")) == files


def test_only_an_ended_session_is_marked_as_held(offline, prepared, tmp_path, monkeypatch):
    marks, log = [], trackers.WandB.log

    def looking(self, step, values):
        log(self, step, values)
        marks.append(json.loads((tmp_path / "run" / WANDB).read_text())["held"])

    monkeypatch.setattr(trackers.WandB, "log", looking)
    pruning.execute(prepared, tmp_path / "run", trackers.WandB(project="mine", tags=["tiny"]))
    assert marks == [-1, -1, -1]
    assert json.loads((tmp_path / "run" / WANDB).read_text())["held"] == 2
    assert logged(tmp_path / "run")["projects"] == {"mine"}


KILLED = """
import os, signal, sys
import sepcap
from sepcap.experiments import pruning

folder, out, how = sys.argv[1:]
step = pruning._step

def killed(prepared, run, number):
    if number == 2:
        os.kill(os.getpid(), getattr(signal, how))
    step(prepared, run, number)

if how != "none":
    pruning._step = killed
texts = [" ".join(a * 3 for a in alphabet * 9) for alphabet in ("abcdefgh", "01234567")]
config = sepcap.PruningConfig([texts[0]] * 8, [texts[1]] * 8, fractions={"mlp": 0.25}, steps=3, tokens=150, eval_tokens=150)
sepcap.prune(sepcap.load_model(folder), config, out=out, tracker="wandb")
"""


@pytest.mark.slow  # three processes that each import torch and wandb
@pytest.mark.skipif(sys.platform == "win32", reason="there are no signals to kill with")
@pytest.mark.parametrize("how", ["SIGKILL", "SIGTERM"])
def test_killed_for_good_every_step_is_in_some_file_of_wandb(offline, trained_folder, tmp_path, how):
    for this in (how, "none"):
        done = subprocess.run([sys.executable, "-c", KILLED, str(trained_folder), str(tmp_path / "run"), this], capture_output=True)
        assert done.returncode == (0 if this == "none" else -getattr(signal, this)), done.stderr.decode()
    run, told = Run(tmp_path / "run"), {}
    for path in run.folder.rglob("run-*.wandb"):
        for record in records(path):
            if record.WhichOneof("record_type") == "run":
                assert record.run.run_id == json.loads((run.folder / WANDB).read_text())["id"]
            elif record.WhichOneof("record_type") == "history":
                values = values_in(record)
                told.setdefault(values["_step"], []).append(values)
    assert sorted(told) == [0, 1, 2, 3]
    for step, times in told.items():
        for name, value in values_of(run.record(step)).items():
            assert [float(values[name]) for values in times] == pytest.approx([value] * len(times), nan_ok=True), name


def test_a_broken_note_of_wandb_is_named_and_the_run_is_whole(offline, prepared, tmp_path):
    run = pruning.execute(prepared, tmp_path / "run")
    (run.folder / WANDB).write_text("{}")
    with pytest.warns(UserWarning, match=r"wandb.json is damaged.*Delete it"):
        assert pruning.execute(prepared, run.folder, "wandb").finished


def test_wandb_without_a_login_does_not_cost_the_run(offline, prepared, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_API_KEY", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    with pytest.warns(UserWarning, match="WandB stopped following the run"):
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


@pytest.mark.parametrize(("chosen", "files"), [(["none"], []), (["jsonl", "wandb"], [LINES, WANDB])])
def test_the_command_line_chooses_trackers(offline, trained_folder, letters, digits, tmp_path, chosen, files, capsys):
    from sepcap.cli import main

    for name, texts in (("a", letters), ("b", digits)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    arguments = ["prune", "--model", str(trained_folder), "--forget", str(tmp_path / "a.jsonl"), "--retain", str(tmp_path / "b.jsonl")]
    arguments += ["--fractions", "mlp=0.5", "--steps", "1", "--tokens", "300", "--eval-tokens", "300"]
    main([*arguments, "--out", str(tmp_path / "run"), "--tracker", *chosen])
    assert [path.name for path in sorted((tmp_path / "run").iterdir()) if path.name in (LINES, WANDB)] == files
    with pytest.raises(SystemExit):
        main([*arguments, "--out", str(tmp_path / "other"), "--tracker", "wadnb"])
    assert not (tmp_path / "other").exists()
