"""Numbers of workers and their devices, on pretended machines; nothing is started."""

import contextlib
from pathlib import Path
from types import SimpleNamespace

import pytest

import sepcap
from sepcap.workers import pool, shards
from sepcap.workers.engines import Target

TARGET = Target("studies.sweep.cell.Cells", {}, 4)


def workers_of(engine, workers, gpus, **more):
    with contextlib.ExitStack() as stack:
        return pool.workers_of(stack, TARGET, Path("logs"), engine, workers, gpus, 100, False, **more)


@pytest.fixture
def devices(monkeypatch):
    """The devices that each worker process is given, of two GPUs."""
    monkeypatch.setattr(pool, "_visible_gpus", lambda: ["0", "1"])
    monkeypatch.setattr(pool, "Process", lambda target, log, devices: devices)


@pytest.mark.parametrize(
    ("gpus", "expected"),
    [(None, ["0", "1"]), (0.5, ["0", "0", "1", "1"]), (0.3, ["0"] * 3 + ["1"] * 3), (0.4, ["0", "0", "1", "1"]), (2, ["0,1"])],
)
def test_shares_of_a_gpu_add_up_to_at_most_one(devices, gpus, expected):
    start, n, _ = workers_of("processes", None, gpus)
    assert [start(number) for number in range(n)] == expected


@pytest.mark.parametrize(("visible", "gpus", "given"), [([], None, None), ([], 0, None), (["0", "1"], 0, "")])
def test_workers_without_a_gpu_see_none(devices, monkeypatch, visible, gpus, given):
    monkeypatch.setattr(pool, "_visible_gpus", lambda: visible)
    start, _, _ = workers_of("processes", 2, gpus)
    assert [start(number) for number in range(2)] == [given, given]


def test_more_workers_than_gpus_are_refused_and_the_error_says_what_to_give(devices):
    with pytest.raises(ValueError, match=r"workers=4 with gpus_per_run=1: there are 2 GPUs, enough for 2; below 1, several share one"):
        workers_of("processes", 4, None)
    with pytest.raises(ValueError, match=r"gpus_per_run=1.5: give a whole number, or a share below 1"):
        workers_of("processes", None, 1.5)


@pytest.mark.parametrize("call", ["collect", "evaluate", "ablate_each"])
def test_passes_take_gpus_per_run(call, monkeypatch):
    """It reaches the pool as it was given."""

    class Reached(Exception):
        pass

    def given(stack, target, logs, engine, workers, gpus, *rest):
        raise Reached(gpus)

    monkeypatch.setattr(shards, "workers_of", given)
    task = {"forget": "local-code", "retain": "local-prose"} if call == "ablate_each" else {"task": "local-code"}
    with pytest.raises(Reached, match=r"0\.25"):
        getattr(sepcap, call)("some-model", **task, workers=4, gpus_per_run=0.25)


@pytest.fixture
def cluster(monkeypatch):
    """A Ray cluster of two machines of eight cores."""
    nodes = [{"Alive": True, "Resources": {"CPU": 8.0}}] * 2
    monkeypatch.setattr(pool, "ray_package", lambda: SimpleNamespace(is_initialized=lambda: True, nodes=lambda: nodes))


def test_a_pass_without_room_is_an_error_and_a_sweep_waits_for_machines(cluster):
    assert workers_of("ray", 9, None)[1] == 4  # of four threads each
    assert workers_of("ray", 9, None, waits=True)[1] == 9
    for workers, gpus, says in ((1, 1, "a worker of 4 threads and 1 GPU: give fewer$"), (9, 0.5, "and 0.5 GPUs: give fewer$")):
        with pytest.raises(ValueError, match=f"no machine of the Ray cluster has room for {'' if gpus == 1 else '.*'}{says}"):
            workers_of("ray", workers, gpus)
        with pytest.warns(UserWarning, match="nothing is done until one joins it"):
            assert workers_of("ray", workers, gpus, waits=True)[1] == workers
    with pytest.raises(ValueError, match="or workers= if such machines will join it"):
        workers_of("ray", None, 1, waits=True)
