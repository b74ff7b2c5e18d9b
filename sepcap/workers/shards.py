"""A pass cut into shards: rows in a fixed order, each shard carried out by some worker, the parts put together in the order of shards."""

import json
import warnings
from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

from sepcap.checks import wrong
from sepcap.workers.dispatch import Task, carried_out
from sepcap.workers.engines import Engine, Target
from sepcap.workers.pool import check_engine, workers_of

T = TypeVar("T")

SHARDS = 8
"""Number of shards of every pass, whatever the number of workers: the sums of other shards have other last bits."""


def shard_of(rows: int, batch_size: int, shard: int) -> range:
    """Rows of one shard: whole batches, in order, so that every batch is one of the pass that is not cut.

    >>> [list(shard_of(5, 2, shard)) for shard in (2, 5, 7)]
    [[0, 1], [2, 3], [4]]
    """
    batches = -(-rows // batch_size)
    first, last = (batch_size * (batches * i // SHARDS) for i in (shard, shard + 1))
    return range(first, min(rows, last))


def out_of_memory_is_an_error(make: Callable[[], T]) -> T:
    """Result of a pass; where it would continue with half of the batch size, which changes last bits, it ends.

    Raises:
        MemoryError: names the batch size to give.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="out of memory: continuing")
        try:
            return make()
        except UserWarning as warning:
            said = str(warning).rpartition("=")[2]
            raise MemoryError(f"a worker has too little memory for its batches: give batch_size={said}") from None


def in_shards(
    what: str,
    path: str,
    model: Any,
    options: Mapping[str, Any],
    put_together: Callable[[list[Path], list[dict[str, Any]]], T],
    *,
    workers: int,
    engine: Engine,
    load: Mapping[str, Any] | None,
    threads: int,
) -> T:
    """Carry out a pass over a task in shards, each on a worker that loads the model itself.

    Args:
        what: name of the call, for errors.
        path: class of the package, made with `model` and `load`; its `run(options, shard, file)` writes the file of one shard.
        model: name or folder of the model.
        options: arguments of the pass, as JSON.
        put_together: makes the result of the files of all shards that have rows, and of what `run` returned for them, in their order.
        workers, engine, load, threads: where and how, as for `sepcap.sweep`.

    Raises:
        TypeError: a loaded model, or options that are objects of Python.
        RuntimeError: a shard failed; the first error.
    """
    if not isinstance(model, str | Path):
        raise wrong("model", model, "a name or a folder with workers=: every worker loads the model itself")
    for name, value in options.items():
        try:
            json.dumps(value)
        except (TypeError, ValueError):
            raise wrong(name, value, f"names, paths and numbers: with workers=, other processes carry out {what}") from None
    check_engine(engine, workers)
    target = Target(path, {"model": str(model), "load": dict(load or {})}, threads)
    with TemporaryDirectory(dir=Path.cwd() if engine == "ray" else None) as place, ExitStack() as stack:
        files = [Path(place).absolute() / f"{shard}.safetensors" for shard in range(SHARDS)]
        tasks = [Task(str(i), {"options": dict(options), "shard": i, "file": str(file)}) for i, file in enumerate(files)]
        on_cpu = str(target.arguments["load"].get("device", "")).startswith("cpu")
        start, n, _ = workers_of(stack, target, Path(place) / "logs", engine, workers, None, SHARDS, on_cpu)
        found: dict[str, dict[str, Any]] = {}
        with closing(carried_out(tasks, start, n)) as outcomes:
            for name, outcome in outcomes:
                if outcome.get("state") == "failed":
                    raise RuntimeError(f"{what}: shard {int(name) + 1} of {SHARDS} failed with {outcome['error']}")
                found[name] = outcome
        with_rows = [i for i in range(SHARDS) if found[str(i)]["rows"]]
        return put_together([files[i] for i in with_rows], [found[str(i)] for i in with_rows])
