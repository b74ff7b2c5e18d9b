"""Passes on a real Ray of two nodes: an actor is killed in the middle, and the bits are those of one process."""

import os
import signal
import sys
import threading
import time

import numpy as np
import pytest
import torch
from two_nodes import actors, two_nodes

import sepcap
from sepcap.workers import pool

pytestmark = [pytest.mark.cluster, pytest.mark.skipif(sys.platform != "linux", reason="finds actors in /proc")]

LOAD = {"device": "cpu"}
HERE = {"workers": 1, "engine": "here", "load": LOAD}
RAY = {"workers": 2, "engine": "ray", "load": LOAD}
SIZE = {"tokens": 2_000, "context": 24, "batch_size": 4}


@pytest.fixture(scope="module")
def cluster():
    with two_nodes() as cluster:
        yield cluster


@pytest.fixture
def killed(cluster, tmp_path, monkeypatch):
    """Actors that are started; one is killed as soon as the first part is written below the working folder."""
    monkeypatch.chdir(tmp_path)
    started, end = [], threading.Event()

    class Watched(pool.Actor):
        def __init__(self, *how):
            started.append(self)
            super().__init__(*how)

    monkeypatch.setattr(pool, "Actor", Watched)

    def kill():
        while not (end.is_set() or list(tmp_path.rglob("[0-9a-z]*.safetensors"))):
            time.sleep(0.002)
        if not end.is_set():
            os.kill(actors()[0], signal.SIGKILL)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    yield started
    end.set()
    killer.join(60)


def test_statistics_with_gradients_have_the_bits_of_one_process(killed, trained_folder, task_files):
    how = {**SIZE, "gradients": True, "replicates": 5}
    there = sepcap.collect(trained_folder, task_files["forget"], **how, **RAY)
    assert len(killed) == 3
    for site, one in sepcap.collect(trained_folder, task_files["forget"], **how, **HERE).items():
        other = there[site]
        pairs = ((one.sums, other.sums), (one.gradients.sums, other.gradients.sums), (one.replicates.sums, other.replicates.sums))
        assert all(torch.equal(ours[name], theirs[name]) for ours, theirs in pairs for name in ours)


def test_an_evaluation_has_the_bits_of_one_process(killed, trained, trained_folder, task_files):
    there = sepcap.evaluate(trained_folder, task_files["forget"], **SIZE, **RAY)
    assert len(killed) == 3
    np.testing.assert_array_equal(there.per_row, sepcap.evaluate(trained, task_files["forget"], **SIZE).per_row)


def test_single_ablations_have_the_bits_of_one_process(killed, trained_folder, task_files, tmp_path):
    how = {**task_files, **SIZE, "tokens": 300, "reference_tokens": 200, "pairs": 3, "progress": False}
    there = sepcap.ablate_each(trained_folder, **how, **RAY, out=tmp_path / "there")
    assert len(killed) >= 3
    here = sepcap.ablate_each(trained_folder, **how)
    for name, tensor in here.tensors.items():
        assert torch.equal(tensor, there.tensors[name]), name
    assert not list(tmp_path.rglob(".*"))  # no part that the killed actor left
