"""A sweep of 10,000 planned cells, its driver's memory, and two workers against one.

    python benchmarks/sweep.py            (with nothing else running; a few minutes)

The first two carry out nothing: cells end at once with planted numbers, as a worker would report them. The third prunes the embedded model.
"""

import argparse
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

import sepcap
from sepcap.statistics.intervals import as_columns
from sepcap.studies.sweep import sweep as module
from sepcap.workers import pool

BASE = sepcap.PruningConfig(steps=5)
GRID = {"importance": ["abs", "rms", "std", "sqrt"], "eps": [1e-3 * n for n in range(1, 26)], "seed": list(range(100))}
SMALL = {"steps": 2, "fractions": {"mlp": 0.1}, "tokens": 4_000, "eval_tokens": 4_000}


class Planted:
    """A worker that reports numbers at once."""

    def __init__(self, *how: Any) -> None:
        self.draw = np.random.default_rng(0)

    def run(self, arguments: dict[str, Any]) -> dict[str, Any]:
        folder = Path(arguments["folder"])
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
        area, drop = self.draw.normal(50, 5), self.draw.normal(30, 5)
        values = {**as_columns("separability", area, (area - 3, area + 3)), **as_columns("max_drop", drop, (drop - 2, drop + 2))}
        return {"state": "finished", "values": values | {"forget_left": 0.2, "retain_left": 0.7}, "seconds": 1.0, "identity": "0" * 64}

    def stop(self) -> None:
        """Nothing to stop."""


def timed(what: str, make: Callable[[], Any]) -> Any:
    started, worked = time.perf_counter(), time.process_time()
    found = make()
    print(f"{what}: {time.perf_counter() - started:.1f} s, of which {time.process_time() - worked:.1f} s on a processor core", flush=True)
    return found


def planned(out: Path) -> None:
    """Times of a sweep of 10,000 cells."""
    half = GRID | {"seed": GRID["seed"][:50]}
    with mock.patch.object(pool, "Here", Planted):
        timed("5,000 cells: plan, and write the end of each", lambda: module.sweep(BASE, half, out=out, progress=False))
        timed("10,000 cells: plan, and write the end of 5,000", lambda: module.sweep(BASE, GRID, out=out, progress=False))
        timed("10,000 cells, finished: the same call again", lambda: module.sweep(BASE, GRID, out=out, progress=False))
    found = timed("10,000 cells: load", lambda: sepcap.load_result(out))
    timed("10,000 cells: table", lambda: found.table)
    timed("10,000 cells: means over seeds", found.over_seeds)
    timed("10,000 cells: strip and heat", lambda: (found.figure("strip"), found.figure("heat", rows="importance", columns="eps")))


def memory(folder: Path) -> None:
    """Most memory of the driver after 8 and after 200 cells."""
    peaks = []
    for n in (8, 200):
        with mock.patch.object(pool, "Here", Planted):
            module.sweep(BASE, {"seed": list(range(n))}, out=folder / f"m{n}", progress=False)
        peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    print(f"most memory of the driver: {peaks[0]:.0f} MB after 8 cells, {peaks[1]:.0f} MB after 200", flush=True)


def workers(folder: Path) -> None:
    """Eight cells of the embedded model on one and on two worker processes with one thread each."""
    seconds = {}
    for n in (1, 2):
        started = time.perf_counter()
        grid = {"importance": ["abs", "rms"], "seed": [0, 1, 2, 3]}
        config = sepcap.PruningConfig(**SMALL)
        sepcap.sweep(config, grid, out=folder / f"w{n}", engine="processes", workers=n, load={"device": "cpu"}, progress=False)
        seconds[n] = time.perf_counter() - started
    ratio = seconds[1] / seconds[2]
    print(f"8 cells: {seconds[1]:.0f} s with one worker, {seconds[2]:.0f} s with two: {ratio:.2f} times as fast", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", nargs="+", default=["memory", "planned", "workers"])
    asked = parser.parse_args().parts
    with tempfile.TemporaryDirectory() as place:
        for part in asked:
            {"memory": memory, "workers": workers, "planned": lambda folder: planned(folder / "s")}[part](Path(place))
