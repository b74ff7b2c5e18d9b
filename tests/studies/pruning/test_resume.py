"""Whatever interrupts a run, the same call goes on and ends with the same bits."""

import os
import random
import signal
import subprocess
import sys
import time
from functools import partial

import pandas as pd
import pytest
from run_folders import STEPS, Stop, bits, config_of, same_weights, stop_by, weights
from tiny import fresh

from sepcap.errors import CorruptFile
from sepcap.studies.pruning import prune as pruning
from sepcap.studies.pruning.run import Run

forking = pytest.mark.skipif(sys.platform != "linux", reason="kills forks of this process, which only Linux does safely")


class Points:
    """Counts the moments of a run at which something can end it, and ends it at one of them.

    Moments: before and after every rename (each file and each step is renamed into place), before and after every
    pass over a task, and inside a file that is half written.
    """

    def __init__(self, monkeypatch, at: int | None, stop) -> None:
        self.at, self.stop, self.count = at, stop, 0
        passes = ("evaluate_sample", "collect_sample", "delete")
        for module, name in ((os, "replace"), (os, "fsync"), *((pruning, name) for name in passes)):
            monkeypatch.setattr(module, name, self.wrap(getattr(module, name)))

    def wrap(self, function):
        def wrapped(*args, **kwargs):
            self.moment()
            result = function(*args, **kwargs)
            self.moment()
            return result

        return wrapped

    def moment(self) -> None:
        if self.count == self.at:
            self.stop()
        self.count += 1


@pytest.fixture
def prepared(tiny_opt, letters, digits):
    return pruning.plan(tiny_opt, config_of(letters, digits))


@pytest.fixture
def whole(prepared, tmp_path, monkeypatch):
    """Bits of a run that nothing interrupted, and the number of moments it has."""
    with monkeypatch.context() as patch:
        points = Points(patch, None, None)
        pruning.execute(prepared, tmp_path / "whole")
    return bits(tmp_path / "whole"), points.count


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("kind", "offset", "stride"),
    [
        (KeyboardInterrupt, 0, 18),
        (Stop, 8, 18),
        pytest.param(KeyboardInterrupt, 0, 1, marks=pytest.mark.slow),
        pytest.param(Stop, 0, 1, marks=pytest.mark.slow),
    ],
)
def test_interrupted_at_any_moment_it_goes_on_to_the_same_bits(prepared, whole, tmp_path, monkeypatch, kind, offset, stride):
    expected, moments = whole
    assert moments > 60
    before = weights(prepared.model)
    for at in range(offset, moments, stride):
        out = tmp_path / f"at{at}"
        with monkeypatch.context() as patch:
            Points(patch, at, stop_by(kind))
            with pytest.raises(kind):
                pruning.execute(prepared, out)
        assert same_weights(prepared.model, before), at
        run = pruning.execute(prepared, out)
        assert run.finished, at
        assert bits(out) == expected, at


def kill_child(body, limit_s: float = 60) -> bool:
    """Run `body` in a fork of this process; whether the fork died of SIGKILL before it came to the end."""
    child = os.fork()
    if child == 0:
        try:
            body()
        finally:
            os._exit(0)
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    raise AssertionError("the process neither died nor ended")


def kill_self() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.thorough
@forking
@pytest.mark.parametrize(("offset", "stride"), [(4, 18), pytest.param(0, 1, marks=pytest.mark.slow)])
def test_killed_at_any_moment_it_goes_on_to_the_same_bits(prepared, whole, tmp_path, offset, stride):
    expected, moments = whole
    for at in range(offset, moments, stride):
        out = tmp_path / f"at{at}"

        def body(out=out, at=at):
            with pytest.MonkeyPatch.context() as patch:
                Points(patch, at, kill_self)
                pruning.execute(prepared, out)

        assert kill_child(body), at
        if (out / "config.json").exists():
            # what a killed run left can be read at once, whatever state the table is in
            left = Run.load(out)
            assert len(left.trajectory) == 2 * (left.steps_done + 1)
        assert pruning.execute(prepared, out).finished
        assert bits(out) == expected, at


@forking
def test_killed_again_and_again(prepared, whole, tmp_path):
    expected, _ = whole
    out, rng, deaths = tmp_path / "run", random.Random(0), 0

    def body():
        with pytest.MonkeyPatch.context() as patch:
            Points(patch, rng.randrange(5, 40), kill_self)
            pruning.execute(prepared, out)

    while kill_child(body):
        deaths += 1
        rng.random()  # the child's draws are its own
        assert deaths < 40
    assert deaths >= 1
    assert bits(out) == expected


@pytest.mark.thorough
@pytest.mark.parametrize(
    "changes",
    [
        {"importance": "random", "seed": 3},
        {"recollect": False},
        {"per_layer": True},
        {"fractions": {"heads": 0.25}},
        {"fractions": {"attn_value": 0.25, "attn_pre_out": 0.25}, "importance": "rms"},
    ],
    ids=lambda c: next(iter(c)),
)
def test_every_kind_of_run_goes_on_with_the_deletions_it_had(tiny_folders, letters, digits, tmp_path, monkeypatch, changes):
    # mistral: a value column goes only when all query heads that share it have lost their row, at whichever step that is
    model = fresh(tiny_folders["mistral"])
    prepared = pruning.plan(model, config_of(letters, digits, **{"steps": 3, **changes}))
    pruning.execute(prepared, tmp_path / "whole")
    step = pruning._step

    def stop_after(prepared, run, number):
        step(prepared, run, number)
        raise Stop

    out = tmp_path / "run"
    for _ in range(4):
        with monkeypatch.context() as patch:
            patch.setattr(pruning, "_step", stop_after)
            with pytest.raises(Stop):
                pruning.execute(prepared, out)
    assert bits(out) == bits(tmp_path / "whole")
    assert Run.load(out).finished


def test_ctrl_c_keeps_the_steps_done_and_says_how_to_go_on(prepared, tmp_path, monkeypatch):
    out = tmp_path / "run"
    before = weights(prepared.model)
    calls = []

    def evaluate(*args, **kwargs):
        calls.append(1)
        if len(calls) == 4:  # two tasks per step: inside step 1
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    original = pruning.evaluate_sample
    monkeypatch.setattr(pruning, "evaluate_sample", evaluate)
    with pytest.raises(KeyboardInterrupt, match="stopped after step 0 of 2; the same command resumes") as stop:
        pruning.execute(prepared, out)
    assert str(out) in str(stop.value)
    assert "stopped after step 0" in (out / "run.log").read_text()
    run = Run.load(out)
    assert (run.steps_done, run.finished, len(run.trajectory)) == (0, False, 2)
    assert same_weights(prepared.model, before)
    assert not pruning.log.handlers
    assert pruning.execute(prepared, out).finished
    assert len(calls) == 4 + 4  # steps 1 and 2 only


def test_ctrl_c_before_anything_is_done(prepared, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(pruning, "evaluate_sample", lambda *a, **k: stop_by(KeyboardInterrupt)())
        with pytest.raises(KeyboardInterrupt, match="before step 0"):
            pruning.execute(prepared, tmp_path / "run")
    run = Run.load(tmp_path / "run")
    assert run.steps_done == -1
    with pytest.raises(IndexError, match="no step yet"):
        run.neurons(0)
    with pytest.raises(ValueError, match="no pruning step yet"):
        run.separability()
    assert "0 of 2" in run._repr_html_()


def test_leftovers_of_a_killed_process_are_cleared_away(prepared, whole, tmp_path):
    out = tmp_path / "run"
    pruning.execute(prepared, out)
    (out / "steps" / "0002" / "record.json").unlink()  # as if step 2 had never been
    (out / "steps" / ".0002.part").mkdir()
    (out / "steps" / ".0002.part" / "rows.safetensors").write_bytes(b"half")
    (out / ".trajectory.parquet.abcd.part").write_bytes(b"PAR1")
    (out / "statistics" / ".forget.safetensors.abcd.part").write_bytes(b"")
    assert pruning.execute(prepared, out).finished
    assert bits(out) == whole[0]


def test_hole_in_the_steps_is_filled(prepared, whole, tmp_path):
    out = tmp_path / "run"
    pruning.execute(prepared, out)
    (out / "steps" / "0001" / "record.json").unlink()
    with pytest.raises(CorruptFile, match=r"0001/record\.json is missing; the command that made the run recreates that step"):
        Run.load(out)
    pruning.execute(prepared, out)
    assert bits(out) == whole[0]


@pytest.mark.parametrize("lag", ["missing", "one step behind"])
def test_table_that_lags_behind_the_steps(prepared, whole, tmp_path, lag):
    run = pruning.execute(prepared, tmp_path / "run")
    table = run.folder / "trajectory.parquet"
    right = run.trajectory
    if lag == "missing":
        table.unlink()
    else:
        right[right["step"] < STEPS].to_parquet(table, index=False)
    pd.testing.assert_frame_equal(Run.load(run.folder).trajectory, right)
    pruning.execute(prepared, run.folder)
    assert bits(run.folder) == whole[0]


def test_second_process_in_the_same_folder_is_refused(prepared, whole, tmp_path, monkeypatch):
    out = tmp_path / "run"
    refused = []
    original = pruning.evaluate_sample

    def evaluate(*args, **kwargs):
        if not refused:
            # a lock belongs to an open file, so a second attempt in this process stands for one in another
            with pytest.raises(RuntimeError, match="another process is writing") as error:
                pruning.execute(prepared, out)
            refused.append(str(error.value))
        return original(*args, **kwargs)

    monkeypatch.setattr(pruning, "evaluate_sample", evaluate)
    pruning.execute(prepared, out)
    assert str(out) in refused[0]
    assert bits(out) == whole[0]


SCRIPT = """
import sys, torch, sepcap
from tests_texts import forget, retain
torch.set_num_threads(1)
model = sepcap.load_model(sys.argv[1], device="cpu")
config = sepcap.PruningConfig(forget=forget, retain=retain, fractions={"mlp": 0.05}, steps=20, tokens=1000, eval_tokens=1000)
print("ready", flush=True)
sepcap.prune(model, config, out=sys.argv[2])
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_processes_stopped_at_random_times(tiny_folders, letters, digits, tmp_path, number):
    (tmp_path / "tests_texts.py").write_text(f"forget = {letters!r}\nretain = {digits!r}\n")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}

    def start(out):
        command = [sys.executable, "-c", SCRIPT, str(tiny_folders["opt"]), str(tmp_path / out)]
        # a caller that ignores Ctrl-C hands that on
        heed = partial(signal.signal, signal.SIGINT, signal.default_int_handler)
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, preexec_fn=heed)
        assert process.stdout is not None
        assert "ready\n" in process.stdout  # read up to that line: the model says first where it is
        return process

    started = time.monotonic()
    assert start("whole").wait(timeout=300) == 0
    seconds = time.monotonic() - started
    rng, deaths = random.Random(0), 0
    for _ in range(8):
        process = start("run")
        try:
            process.wait(timeout=rng.uniform(0, seconds / 4))
        except subprocess.TimeoutExpired:
            process.send_signal(number)
            deaths += process.wait(timeout=60) != 0
            if number == signal.SIGINT:
                assert not list(tmp_path.rglob("*.part"))
    assert deaths >= 2
    assert start("run").wait(timeout=300) == 0
    assert bits(tmp_path / "run") == bits(tmp_path / "whole")
