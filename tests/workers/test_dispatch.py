"""Tasks are handed out to workers that die, fail to start or are stopped; the workers here compute nothing."""

import threading

import pytest

from sepcap.workers.dispatch import DEATHS, Pending, Task, carried_out
from sepcap.workers.engines import Died


def tasks(n: int, shares=lambda i: ""):
    return [Task(f"c{i}", {"i": i}, shares(i)) for i in range(n)]


class Fake:
    """A worker that does what it is told."""

    def __init__(self, number, act):
        self.number, self.act, self.stopped = number, act, threading.Event()

    def run(self, arguments):
        return self.act(self, arguments["i"])

    def stop(self):
        self.stopped.set()


def fakes(act):
    started = []

    def start(number):
        started.append(Fake(number, act))
        return started[-1]

    return started, start


def finish(worker, i):
    return {"state": "finished", "by": worker.number, "i": i}


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_every_cell_is_carried_out_once_and_workers_are_stopped(workers):
    started, start = fakes(finish)
    outcomes = list(carried_out(tasks(10), start, workers))
    assert sorted(name for name, _ in outcomes) == sorted(f"c{i}" for i in range(10))
    assert all(outcome["i"] == int(name[1:]) for name, outcome in outcomes)
    assert 1 <= len(started) <= max(1, workers)
    assert all(worker.stopped.is_set() for worker in started)


def test_a_worker_that_dies_is_replaced_and_its_cell_done():
    died = set()

    def dies_once(worker, i):
        if i % 2 and i not in died:
            died.add(i)
            raise Died("killed by signal 9")
        return finish(worker, i)

    started, start = fakes(dies_once)
    outcomes = dict(carried_out(tasks(6), start, 2))
    assert {outcome["state"] for outcome in outcomes.values()} == {"finished"}
    assert len(outcomes) == 6
    assert len(started) == 2 + 3 or len(started) == 1 + 3  # the other may have found nothing left
    assert all(worker.stopped.is_set() for worker in started)


def test_a_cell_that_kills_every_worker_has_failed_and_the_others_go_on():
    def deadly(worker, i):
        if i == 1:
            raise Died("killed by signal 9; its output is in 0.log")
        return finish(worker, i)

    outcomes = dict(carried_out(tasks(4), fakes(deadly)[1], 1))
    assert outcomes["c1"]["state"] == "failed"
    assert f"{DEATHS} workers died while they carried it out, the last: killed by signal 9" in outcomes["c1"]["error"]
    assert [outcomes[f"c{i}"]["state"] for i in (0, 2, 3)] == ["finished"] * 3


def test_an_error_of_a_worker_that_cannot_start_ends_the_sweep():
    def start(number):
        raise RuntimeError("no package torch")

    with pytest.raises(RuntimeError, match="no package torch"):
        list(carried_out(tasks(4), start, 2))


def test_who_stops_reading_stops_the_workers():
    """As after Ctrl-C: a worker in the middle of a cell is stopped, and its cell is not reported."""

    def waits(worker, i):
        if i:
            worker.stopped.wait(30)
            raise Died("stopped")
        return finish(worker, i)

    started, start = fakes(waits)
    outcomes = carried_out(tasks(9), start, 2)
    assert next(outcomes)[0] == "c0"
    outcomes.close()
    assert all(worker.stopped.is_set() for worker in started)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("Thread") and "_serve" in thread.name]


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_the_last_worker_stays_for_the_next_tasks(workers):
    """A model is loaded once for rounds of one task, and no worker is left at the end but the one that is kept."""
    started, start = fakes(finish)
    kept = {}
    for n in (1, 5, 1, 1):
        outcomes = dict(carried_out(tasks(n), start, workers, kept))
        assert sorted(outcomes) == [f"c{i}" for i in range(n)]
        assert len(kept) <= 1
        assert [worker for worker in started if not worker.stopped.is_set()] == list(kept.values())
    [(_, outcome)] = carried_out(tasks(1), start, workers, kept)
    assert outcome["by"] == next(iter(kept))
    assert len(started) <= 1 + workers


def test_who_stops_reading_stops_the_kept_worker_too():
    started, start = fakes(finish)
    kept = {}
    list(carried_out(tasks(1), start, 1, kept))
    outcomes = carried_out(tasks(3), start, 1, kept)
    next(outcomes)
    outcomes.close()
    assert not kept
    assert all(worker.stopped.is_set() for worker in started)


def test_a_worker_stays_with_what_it_has_measured():
    """Two groups, two workers: each takes one, and helps with the other when its own is done."""
    pending = Pending(tasks(6, shares=lambda i: "ab"[i % 2]))
    first, second = pending.take(None), pending.take(None)
    assert (first[0], second[0]) == ("c0", "c1")
    assert [pending.take("a")[0] for _ in range(2)] == ["c2", "c4"]
    assert pending.take("a")[0] == "c3"
    assert pending.take("b")[0] == "c5"
    assert pending.take("b") is None
