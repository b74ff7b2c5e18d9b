"""Time that a sweep still takes, from the seconds of the cells that are finished."""

from collections.abc import Mapping
from typing import Any

from sepcap.studies.base.text import counted, duration


class Estimate:
    """Seconds that are left, at the mean rate of the finished cells, by tokens through the model.

    Workers take one cell after another, so that the time is at least that of the largest cell that is left. The first cells of a worker
    are slower than the others, because it loads the model and measures what cells share; cells that are under way count whole.

    Args:
        work: work of every cell, by name: tokens through the model, or 1 if they are not known.
        ended: what became of the cells that ended, with their `state` and `seconds`.
        workers: number of workers.

    >>> estimate = Estimate({"a": 1, "b": 1, "c": 4, "d": 2}, {"a": {"state": "finished", "seconds": 30}}, workers=2)
    >>> estimate.seconds, estimate.in_words()
    (120.0, 'about 2 minutes left, at the rate of 1 finished cell')
    >>> estimate.add("c", {"state": "finished", "seconds": 20})
    >>> estimate.seconds
    20.0
    """

    def __init__(self, work: Mapping[str, float], ended: Mapping[str, Mapping[str, Any]], workers: int) -> None:
        self._left, self._workers = dict(work), max(1, workers)
        self._total, self._largest = sum(self._left.values()), max(self._left.values(), default=0)
        self._finished, self._work, self._seconds = 0, 0.0, 0.0
        for name, outcome in ended.items():
            self.add(name, outcome)

    def add(self, name: str, outcome: Mapping[str, Any]) -> None:
        """Count a cell that ended; one that failed says nothing about the rate."""
        work = self._left.pop(name, 0)
        self._total -= work
        if work and outcome["state"] == "finished":
            self._finished, self._work, self._seconds = self._finished + 1, self._work + work, self._seconds + outcome["seconds"]

    @property
    def seconds(self) -> float | None:
        """Seconds left; None if no cell is finished."""
        if not self._finished:
            return None
        shared = self._total / self._workers
        if shared < self._largest:
            shared = max(shared, self._largest_left())
        return self._seconds / self._work * shared

    def _largest_left(self) -> float:
        self._largest = max(self._left.values(), default=0)
        return self._largest

    def in_words(self) -> str:
        """The estimate and what it is based on."""
        if (seconds := self.seconds) is None:
            return "time unknown until a cell is finished"
        return f"about {duration(seconds)} left, at the rate of {counted(self._finished, 'finished cell')}"
