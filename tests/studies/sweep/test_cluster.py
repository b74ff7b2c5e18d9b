"""A real Ray of two nodes on the loopback: an actor, a node and the driver are killed in the middle; the bits are those of one process."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from swept import LOAD, base_of, cell_bits
from two_nodes import actors, two_nodes

import sepcap
from sepcap.studies.sweep.grid import given
from sepcap.workers.engines import Actor, Target

GRID = {"importance": ["abs", "rms", "std"], "seed": [0, 1]}
STEPS = 8


@pytest.fixture(scope="module")
def base(trained_folder, tmp_path_factory, letters, digits):
    texts = tmp_path_factory.mktemp("texts")
    return base_of(trained_folder, texts, letters, digits, steps=STEPS, fractions={"mlp": 0.1}, tokens=600, eval_tokens=600)


@pytest.fixture(scope="module")
def expected(base, tmp_path_factory):
    out = tmp_path_factory.mktemp("here") / "s"
    sepcap.sweep(base, GRID, out=out, load=LOAD, progress=False)
    return cell_bits(out)


@pytest.fixture(scope="module")
def cluster():
    with two_nodes() as cluster:
        yield cluster


def ended(out: Path) -> int:
    lines = out / "cells.jsonl"
    return lines.read_bytes().count(b"\n") if lines.exists() else 0


@pytest.mark.cluster
@pytest.mark.skipif(sys.platform != "linux", reason="finds actors in /proc")
@pytest.mark.parametrize("victim", ["actor", "node"])
def test_killed_in_the_middle_it_goes_on_to_the_same_bits(base, expected, cluster, tmp_path, victim):
    cluster.complete()
    killed = []

    def kill():
        while ended(tmp_path / "s") < 2:
            time.sleep(0.01)
        if victim == "node":
            cluster.lose_second()
        else:
            os.kill(actors()[0], signal.SIGKILL)
        killed.append(ended(tmp_path / "s"))

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    heard = []
    found = sepcap.sweep(base, GRID, out=tmp_path / "s", load=LOAD, engine="ray", progress=heard.append)
    killer.join(60)
    assert "2 actors of Ray" in heard[0]
    assert killed
    assert killed[0] < 6  # in the middle
    assert list(found.table["state"]) == ["finished"] * 6
    assert cell_bits(tmp_path / "s") == expected


DRIVER = """
import sepcap
base = sepcap.PruningConfig(**{fields!r})
sepcap.sweep(base, {grid!r}, out={out!r}, load={load!r}, engine="ray", progress=False)
"""


@pytest.mark.cluster
@pytest.mark.skipif(sys.platform != "linux", reason="finds actors in /proc")
def test_a_killed_driver_leaves_a_sweep_that_goes_on(base, expected, cluster, tmp_path):
    """Its actors end with it, though not at once: the next call waits for the folder that one of them still writes to."""
    cluster.complete()
    code = DRIVER.format(fields=given(base), grid=GRID, out=str(tmp_path / "s"), load=LOAD)
    driver = subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"RAY_ADDRESS": cluster.address})
    while ended(tmp_path / "s") < 1:
        assert driver.poll() is None
        time.sleep(0.01)
    driver.kill()
    driver.wait()
    assert ended(tmp_path / "s") < 6
    found = sepcap.sweep(base, GRID, out=tmp_path / "s", load=LOAD, engine="ray", progress=False)
    assert list(found.table["state"]) == ["finished"] * 6
    assert cell_bits(tmp_path / "s") == expected


@pytest.mark.cluster
def test_a_worker_that_fits_on_no_machine_or_cannot_start_is_one_error(base, cluster, tmp_path):
    with pytest.raises(ValueError, match="no machine of the Ray cluster has room for a worker of 2 threads: give fewer"):
        sepcap.sweep(base, GRID, out=tmp_path / "s", load=LOAD, engine="ray", threads=2)
    with pytest.raises(ValueError, match="no machine of the Ray cluster has room for a worker of 1 thread and 1 GPU"):
        sepcap.sweep(base, GRID, out=tmp_path / "s", load=LOAD, engine="ray", gpus_per_run=1)
    assert not (tmp_path / "s").exists()
    with pytest.raises(RuntimeError, match=r"(?s)an actor could not start: .*NoSuchConfig"):
        Actor(Target("studies.sweep.cell.Cells", {"kind": "NoSuchConfig", "load": {}}, 1), 0).run({})


def test_without_ray_the_error_names_the_extra(base, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"engine='ray' needs the package 'ray'.*sepcap\[ray\]"):
        sepcap.sweep(base, GRID, out=tmp_path / "s", engine="ray")
    assert not (tmp_path / "s").exists()
