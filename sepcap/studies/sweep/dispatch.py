"""Hand out cells to workers: next is one that shares measurements with the last cell of the worker, else one that nobody has begun."""

import queue
import threading
from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sepcap.studies.sweep.engines import Died, Worker

DEATHS = 3
"""Workers that a cell may take with it; then it has failed."""

Task = tuple[str, Mapping[str, Any], Path, str]
"""Name of a cell, its fields, its folder, and what it shares with others."""


Outcomes = Generator[tuple[str, dict[str, Any]], None, None]


class Pending:
    """Cells that are left, for several threads."""

    def __init__(self, tasks: Sequence[Task]) -> None:
        self._lock = threading.Lock()
        self._groups: dict[str, list[Task]] = {}
        for task in reversed(tasks):
            self._groups.setdefault(task[3], []).append(task)
        self._groups = dict(reversed(self._groups.items()))
        self._taken: Counter[str] = Counter()

    def take(self, last: str | None) -> Task | None:
        """The next cell for a worker whose last cell shared `last`; None if there is none left.

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
        """Hand out no more cells."""
        with self._lock:
            self._groups.clear()


def carried_out(tasks: Sequence[Task], start: Callable[[int], Worker], workers: int) -> Outcomes:
    """Name and outcome of every cell, as they end.

    Args:
        tasks: the cells.
        start: makes a worker from its number.
        workers: number of workers; 0 for one in this very thread.

    Raises:
        Exception: that of a worker that could not start.
    """
    pending = Pending(tasks)
    if not workers:
        yield from _alone(pending, start(0))
        return
    ended: queue.Queue[Any] = queue.Queue()
    running: dict[int, Worker] = {}
    stopped = threading.Event()
    threads = [threading.Thread(target=_serve, args=(i, pending, start, running, ended, stopped), daemon=True) for i in range(workers)]
    for thread in threads:
        thread.start()
    try:
        left = len(threads)
        while left:
            found = ended.get()
            if found is None:
                left -= 1
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


def _alone(pending: Pending, worker: Worker) -> Outcomes:
    last = None
    try:
        while (task := pending.take(last)) is not None:
            name, config, folder, last = task
            yield name, worker.run(config, folder)
    finally:
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
            name, config, folder, last = task
            outcome = _outlived(number, config, folder, start, running, stopped)
            if outcome is None:
                break
            ended.put((name, outcome))
    except BaseException as error:
        ended.put(error)
    finally:
        if (worker := running.pop(number, None)) is not None:
            worker.stop()
        ended.put(None)


def _outlived(
    number: int,
    config: Mapping[str, Any],
    folder: Path,
    start: Callable[[int], Worker],
    running: dict[int, Worker],
    stopped: threading.Event,
) -> dict[str, Any] | None:
    """Outcome of a cell; a worker that dies is replaced, and the next one resumes the cell. None if the sweep was stopped."""
    for death in range(1, DEATHS + 1):
        if number not in running:
            running[number] = start(number)
            if stopped.is_set():  # meanwhile, so that nobody else has stopped this worker
                return None
        try:
            return running[number].run(config, folder)
        except Died as error:
            if stopped.is_set():
                return None
            running.pop(number).stop()
            if death == DEATHS:
                said = f"{DEATHS} workers died while they carried it out, the last: {error}. Was there too little memory?"
                return {"state": "failed", "error": said, "seconds": 0.0, "worker": f"worker {number}"}
    raise AssertionError
