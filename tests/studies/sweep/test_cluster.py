"""A real Ray of two nodes on the loopback: an actor and a node are killed in the middle, and the bits are those of one process."""

import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
from swept import LOAD, base_of, cell_bits
from two_nodes import actors, two_nodes

import sepcap

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


def test_without_ray_the_error_names_the_extra(base, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"engine='ray' needs the package 'ray'.*sepcap\[ray\]"):
        sepcap.sweep(base, GRID, out=tmp_path / "s", engine="ray")
    assert not (tmp_path / "s").exists()
