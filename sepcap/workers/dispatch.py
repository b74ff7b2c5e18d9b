"""Hand out tasks to workers: next is one that shares something with the last task of the worker, else one that nobody has begun."""

import queue
import threading
from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, NamedTuple

from sepcap.workers.engines import Died, Worker

DEATHS = 3
"""Workers that a task may take with it; then it has failed."""


class Task(NamedTuple):
    """One call of `run` of the target.

    Attributes:
        name: its name.
        arguments: as JSON.
        shares: tasks with the same text had better be carried out by the same worker.
    """

    name: str
    arguments: Mapping[str, Any]
    shares: str = ""



Outcomes = Generator[tuple[str, dict[str, Any]], None, None]


class Pending:
    """Tasks that are left, for several threads."""

    def __init__(self, tasks: Sequence[Task]) -> None:
        self._lock = threading.Lock()
        self._groups: dict[str, list[Task]] = {}
        for task in reversed(tasks):
            self._groups.setdefault(task.shares, []).append(task)
        self._groups = dict(reversed(self._groups.items()))
        self._taken: Counter[str] = Counter()

    def take(self, last: str | None) -> Task | None:
        """The next task for a worker whose last one shared `last`; None if there is none left.

        A worker stays with what it has measured; else it takes the group that the fewest workers are at.
        """
        with self._lock:
            if last is not None:
                self._taken[last] -= 1
            if not self._groups:
                return None
            share = last if last in self._groups else min(self._groups, key=lambda group: self._taken[group])
            task = self._groups[share].pop()
            if not self._groups[share]:
                del self._groups[share]
            self._taken[share] += 1
            return task

    def stop(self) -> None:
        """Hand out no more."""
        with self._lock:
            self._groups.clear()


def carried_out(tasks: Sequence[Task], start: Callable[[int], Worker], workers: int, kept: dict[int, Worker] | None = None) -> Outcomes:
    """Name and outcome of every task, as they end: what `run` of the target returns, or `state` "failed" and an `error`.

    A worker that finds no task left is stopped at once, because one that replaces a dead one can need its place.

    Args:
        tasks: what to do.
        start: makes a worker from its number.
        workers: number of workers; 0 for one in this very thread.
        kept: number -> worker, from a call before; the last worker that has something to do is put there instead of stopped. Whoever gives
            it stops what is left in it.

    Raises:
        Exception: that of a worker that could not start.
    """
    pending = Pending(tasks)
    if not workers:
        yield from _alone(pending, start, kept)
        return
    ended: queue.Queue[Any] = queue.Queue()
    running: dict[int, Worker] = {} if kept is None else dict(kept)
    numbers = sorted(range(workers), key=lambda number: number not in running)[: len(tasks)]
    stopped = threading.Event()
    shared = (pending, start, running, ended, stopped)
    threads = [threading.Thread(target=_serve, args=(number, *shared), daemon=True) for number in numbers]
    for thread in threads:
        thread.start()
    stays: dict[int, Worker] = {}
    try:
        left = len(threads)
        while left:
            found = ended.get()
            if isinstance(found, int):
                left -= 1
                if (worker := running.pop(found, None)) is None:
                    continue
                if left or kept is None:
                    worker.stop()
                else:
                    stays[found] = worker
            elif isinstance(found, BaseException):
                raise found
            else:
                yield found
    finally:  # also if the caller is interrupted, or closes the iterator
        stopped.set()
        pending.stop()
        for worker in list(running.values()):
            worker.stop()
        for thread in threads:
            thread.join()
        for worker in list(running.values()):  # begun while the others were stopped
            worker.stop()
        if kept is not None:
            kept.clear()
            kept.update(stays)


def _alone(pending: Pending, start: Callable[[int], Worker], kept: dict[int, Worker] | None) -> Outcomes:
    worker, last = (kept or {}).get(0) or start(0), None
    if kept is not None:
        kept[0] = worker
    try:
        while (task := pending.take(last)) is not None:
            last = task.shares
            yield task.name, worker.run(task.arguments)
    finally:
        if kept is None:
            worker.stop()


def _serve(
    number: int,
    pending: Pending,
    start: Callable[[int], Worker],
    running: dict[int, Worker],
    ended: "queue.Queue[Any]",
    stopped: threading.Event,
) -> None:
    """The thread of one worker."""
    last = None
    try:
        while (task := pending.take(last)) is not None and not stopped.is_set():
            last = task.shares
            outcome = _outlived(number, task, start, running, stopped)
            if outcome is None:
                break
            ended.put((task.name, outcome))
    except BaseException as error:
        ended.put(error)
    finally:
        ended.put(number)


def _outlived(
    number: int, task: Task, start: Callable[[int], Worker], running: dict[int, Worker], stopped: threading.Event
) -> dict[str, Any] | None:
    """Outcome of a task; a worker that dies is replaced, and the next one takes it up. None if all was stopped."""
    for death in range(1, DEATHS + 1):
        if number not in running:
            running[number] = start(number)
            if stopped.is_set():  # meanwhile, so that nobody else has stopped this worker
                return None
        try:
            return running[number].run(task.arguments)
        except Died as error:
            if stopped.is_set():
                return None
            running.pop(number).stop()
            if death == DEATHS:
                said = f"{DEATHS} workers died while they carried it out, the last: {error}. Was there too little memory?"
                return {"state": "failed", "error": said, "seconds": 0.0, "worker": f"worker {number}"}
    raise AssertionError
