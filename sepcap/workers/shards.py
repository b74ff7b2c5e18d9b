"""A pass cut into shards: rows in a fixed order, each shard carried out by some worker, the parts put together in the order of shards."""

import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

from sepcap.checks import wrong
from sepcap.errors import warn
from sepcap.workers.dispatch import Task, carried_out
from sepcap.workers.engines import Engine, Target, Worker
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


@contextmanager
def heard() -> Iterator[list[str]]:
    """Inside, warnings are kept and not shown; afterwards the list has each of them once, for the driver to repeat."""
    said: list[str] = []
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always", UserWarning)
        yield said
    said += dict.fromkeys(str(one.message) for one in found if issubclass(one.category, UserWarning))


def repeat_once(outcome: dict[str, Any], repeated: set[str]) -> None:
    """Take the warnings out of what a worker returned, and repeat those that have not been repeated yet."""
    for message in outcome.pop("warnings", ()):
        if message not in repeated:
            repeated.add(message)
            warn(message)


Rounds = Callable[[Sequence[Task]], Iterator[tuple[str, dict[str, Any]]]]


@contextmanager
def crew(
    what: str, target: Target, engine: Engine, workers: int, *, gpus_per_run: float | None = None, on_cpu: bool = False
) -> Iterator[tuple[Path, Rounds, str]]:
    """Workers that carry out one list of tasks after another; at least one keeps its model from one list to the next.

    Args:
        what: name of the call, for errors.
        target: what the workers carry out.
        engine, workers, gpus_per_run: where, how many, and on which share of GPUs.
        on_cpu: whether the model is asked for on the CPU.

    Yields:
        A folder that all workers see (on Ray it is in the working folder); what carries out tasks and gives the outcome of each, as they
        end; and where the workers are, in words. The first task that fails is a RuntimeError. Warnings of workers are
        repeated, each once.
    """
    check_engine(engine, workers)
    with TemporaryDirectory(dir=Path.cwd() if engine == "ray" else None) as folder, ExitStack() as stack:
        place = Path(folder).absolute()
        start, n, where = workers_of(stack, target, place / "logs", engine, workers, gpus_per_run, workers, on_cpu)
        kept: dict[int, Worker] = {}
        repeated: set[str] = set()
        stack.callback(lambda: [worker.stop() for worker in kept.values()])

        def carry_out(tasks: Sequence[Task]) -> Iterator[tuple[str, dict[str, Any]]]:
            with closing(carried_out(tasks, start, n, kept)) as outcomes:
                for name, outcome in outcomes:
                    repeat_once(outcome, repeated)
                    if outcome.get("state") == "failed":
                        raise RuntimeError(f"{what}: {name} failed with {outcome['error']}")
                    yield name, outcome

        yield place, carry_out, where


def is_plain(what: str, options: Mapping[str, Any]) -> None:
    """Check that other processes can read all options.

    Raises:
        TypeError: one is an object of Python.
    """
    for name, value in options.items():
        try:
            json.dumps(value)
        except (TypeError, ValueError):
            raise wrong(name, value, f"names, paths and numbers: with workers=, other processes carry out {what}") from None


def target_of(path: str, model: Any, load: Mapping[str, Any] | None, threads: int) -> tuple[Target, bool]:
    """A class of the package that is made with `model` and `load`, and whether the model is asked for on the CPU.

    Raises:
        ValueError: a loaded model.
    """
    if not isinstance(model, str | Path):
        raise wrong("model", model, "a name or a folder with workers=: every worker loads the model itself")
    arguments = {"model": str(model), "load": dict(load or {})}
    return Target(path, arguments, threads), str(arguments["load"].get("device", "")).startswith("cpu")


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
    gpus_per_run: float | None = None,
    write: Mapping[str, Callable[[Path], Any]] | None = None,
) -> T:
    """Carry out a pass over a task in shards, each on a worker that loads the model itself.

    Args:
        what: name of the call, for errors.
        path: class of the package, made with `model` and `load`; its `run(options, shard, file)` writes the file of one shard.
        model: name or folder of the model.
        options: arguments of the pass, as JSON.
        put_together: makes the result of the files of all shards that have rows, and of what `run` returned for them, in their order.
        workers, engine, load, threads, gpus_per_run: where and how, as for `sepcap.sweep`.
        write: name of an option -> writes what is no JSON; workers receive the path of that file.

    Raises:
        ValueError: a loaded model.
        TypeError: options that are objects of Python.
        RuntimeError: a shard failed; the first error.
    """
    target, on_cpu = target_of(path, model, load, threads)
    is_plain(what, options)
    with crew(what, target, engine, min(workers, SHARDS), gpus_per_run=gpus_per_run, on_cpu=on_cpu) as (place, carry_out, _):
        asked = dict(options)
        for name, writer in (write or {}).items():
            writer(place / f"{name}.safetensors")
            asked[name] = str(place / f"{name}.safetensors")
        files = {f"shard {i + 1} of {SHARDS}": place / f"{i}.safetensors" for i in range(SHARDS)}
        tasks = [Task(name, {"options": asked, "shard": i, "file": str(file)}) for i, (name, file) in enumerate(files.items())]
        found = dict(carry_out(tasks))
        with_rows = [name for name in files if found[name]["rows"]]
        return put_together([files[name] for name in with_rows], [found[name] for name in with_rows])
