"""How many workers there are, and on which devices."""

import contextlib
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from sepcap.errors import warn
from sepcap.workers.engines import Actor, Engine, Here, Process, Target, Worker, ray_package


def check_engine(engine: Engine, workers: int | None) -> None:
    """Check what can be checked before anything is written.

    Raises:
        ValueError: several workers in this process.
        ImportError: no ray.
    """
    if engine == "here" and workers not in (None, 1):
        raise ValueError(f"workers={workers} with engine='here', which has one: give engine='processes' or 'ray'")
    if engine == "ray":
        ray_package()


def workers_of(
    stack: contextlib.ExitStack,
    target: Target,
    logs: Path,
    engine: Engine,
    workers: int | None,
    gpus: float | None,
    most_useful: int,
    on_cpu: bool,
    *,
    waits: bool = False,
) -> tuple[Callable[[int], Worker], int, str]:
    """What starts a worker, the number of workers (0 for this thread), and where they are, in words.

    Args:
        stack: ends what this starts.
        target: what the workers carry out.
        logs: folder of the output of worker processes.
        engine: where.
        workers: their number; default as many as GPUs or processor cores allow.
        gpus: GPUs per worker; default one if there are any and the model is not asked for on the CPU.
        most_useful: most workers that have anything to do.
        on_cpu: whether the model is asked for on the CPU.
        waits: whether `workers` may be more than a Ray cluster has room for, because machines may join it later.

    Raises:
        ValueError: more GPUs than there are, or no room for a worker on any machine of a Ray cluster.
    """
    threads = f"{target.threads} thread{'s' * (target.threads > 1)}"
    if engine == "here":
        return (lambda number: Here(target)), 0, f"in this process, {threads}"
    if gpus is not None and gpus > 1 and gpus % 1:
        raise ValueError(f"gpus_per_run={gpus}: give a whole number, or a share below 1")
    if engine == "ray":
        ray = ray_package()
        if not ray.is_initialized():
            ray.init(log_to_driver=False)
            stack.callback(ray.shutdown)
        machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        each = float(any(machine.get("GPU") for machine in machines) and not on_cpu) if gpus is None else gpus
        most = sum(room_on(machine, target.threads, each) for machine in machines)
        if not most:
            said = f"no machine of the Ray cluster has room for a worker of {threads}{_gpus_in_words(each)}"
            if not (waits and workers):
                raise ValueError(f"{said}: give fewer" + ", or workers= if such machines will join it" * waits)
            warn(f"{said}: nothing is done until one joins it")
        n = min(most_useful, (workers or most) if waits else min(workers or most, most))
        return (lambda number: Actor(target, each)), n, f"{n} actor{'s' * (n != 1)} of Ray, {threads} each{_gpus_in_words(each)}"
    visible = _visible_gpus()
    each = float(bool(visible) and not on_cpu) if gpus is None else gpus
    most = sharing(len(visible), each) if each else max(1, _cores() // target.threads)
    if each and (most < 1 or (workers or 1) > most):
        raise ValueError(
            f"workers={workers} with gpus_per_run={each:g}: there are {len(visible)} GPUs, enough for {most}; below 1, several share one"
        )
    n = min(most_useful, workers or most)

    def process(number: int) -> Worker:
        if not each:
            return Process(target, logs / f"{number}.log", "" if visible else None)
        first = int(number * each) if each >= 1 else number // sharing(1, each)
        devices = ",".join(visible[first : first + max(1, int(each))])
        return Process(target, logs / f"{number}.log", devices)

    return process, n, f"{n} worker process{'es' * (n != 1)}, {threads} each{_gpus_in_words(each)}"


def room_on(machine: Mapping[str, float], threads: int, gpus: float) -> int:
    """Actors for which one machine of a Ray cluster has room; an actor is on one, and waits for ever if none is large enough.

    >>> room_on({"CPU": 64, "GPU": 8}, 4, 0.5), room_on({"CPU": 6}, 4, 0), room_on({"CPU": 64, "GPU": 1}, 4, 2)
    (16, 1, 0)
    """
    return int(min(machine.get("CPU", 0) / threads, sharing(int(machine.get("GPU", 0)), gpus) if gpus else math.inf))


def sharing(gpus: int, each: float) -> int:
    """Workers for which there are GPUs, if a share of one is a share of the same one.

    >>> sharing(4, 0.3), sharing(8, 2), sharing(1, 2)
    (12, 4, 0)
    """
    return int(gpus // each) if each >= 1 else gpus * int(1 / each + 1e-9)


def _gpus_in_words(each: float) -> str:
    return f" and {each:g} GPU{'s' * (each != 1)}" if each else ""


def _cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _visible_gpus() -> list[str]:
    """Names of the GPUs of this machine that this process may use."""
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    n = torch.cuda.device_count()
    return listed.split(",")[:n] if listed else list(map(str, range(n)))
