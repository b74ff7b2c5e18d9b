"""Where work is carried out: in this process, in processes of this machine, or in actors of a Ray cluster.

A worker makes an object of the package, its target, and calls its method `run`; arguments and results are JSON. The driver has one thread
per worker, and replaces a worker that has died.
"""

import contextlib
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import torch

import sepcap
from sepcap.errors import missing_extra

Engine = Literal["here", "processes", "ray"]

GRACE = 5
"""Seconds that a process has to end after its output has ended."""

TAIL = 2_000
"""Bytes of the output of a worker that an error shows."""


@dataclass(frozen=True)
class Target:
    """What a worker carries out.

    Attributes:
        path: a class of the package, `studies.sweep.cell.Cells`.
        arguments: what it is made with, as JSON.
        threads: threads of torch.
    """

    path: str
    arguments: Mapping[str, Any]
    threads: int

    def made(self) -> Any:
        """The object; its `run` does the work."""
        return named(self.path)(**self.arguments)


def named(path: str) -> Any:
    """An object of the package, imported when it is asked for.

    >>> named("workers.engines.named").__name__
    'named'
    """
    module, name = path.rsplit(".", 1)
    return getattr(importlib.import_module(f"sepcap.{module}"), name)


class Died(Exception):
    """A worker ended without an answer: it was killed, or its machine was lost."""


@runtime_checkable
class Worker(Protocol):
    """Does one thing at a time."""

    def run(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """What `run` of the target returns.

        Raises:
            Died: the worker ended.
        """
        ...

    def stop(self) -> None:
        """End the worker, whatever it is doing; what it writes must be written atomically."""
        ...


class Here:
    """This process, with a fixed number of threads until `stop`."""

    def __init__(self, target: Target) -> None:
        self._before = torch.get_num_threads()
        torch.set_num_threads(target.threads)
        self._made = target.made()

    def run(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """What `run` of the target returns."""
        return self._made.run(**arguments)

    def stop(self) -> None:
        """Give the process its number of threads back."""
        torch.set_num_threads(self._before)


class Process:
    """A process of this machine: lines of JSON go to its standard input and come from its standard output.

    It is a fresh interpreter and no fork or spawn of this one, so that scripts need no `if __name__ == "__main__"`. It ends when its
    standard input is closed, so that it does not outlive a killed driver.
    """

    def __init__(self, target: Target, log: Path, devices: str | None = None) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        self._log = log
        home = str(Path(sepcap.__file__).parents[1])
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([home, *filter(None, [os.environ.get("PYTHONPATH")])])}
        environment |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(target.threads))
        if devices is not None:
            environment["CUDA_VISIBLE_DEVICES"] = devices
        command = [sys.executable, "-m", "sepcap.workers.process", json.dumps(asdict(target))]
        with open(log, "ab") as output:
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=output, env=environment)
        try:
            self._answer()  # that it is ready
        except Died as error:
            said = log.read_bytes()[-TAIL:].decode(errors="replace").strip().splitlines()
            raise RuntimeError(f"a worker process could not start: {said[-1] if said else error} (all of it is in {log})") from error

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def run(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """What `run` of the target returns."""
        line = json.dumps(dict(arguments)).encode() + b"\n"
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(line)
            self._process.stdin.flush()
        except OSError as error:
            raise self._died() from error
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line.endswith(b"\n"):
            raise self._died()
        return json.loads(line)

    def _died(self) -> Died:
        try:
            code = self._process.wait(GRACE)
        except subprocess.TimeoutExpired:  # its output is closed, and it lives
            self._process.kill()
            code = self._process.wait()
        how = f"killed by signal {-code}" if code < 0 else f"exit status {code}"
        return Died(f"{how}; its output is in {self._log}")

    def stop(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):  # what the process has not read cannot be flushed
                if pipe is not None:
                    pipe.close()


def ray_package() -> Any:
    """The package ray.

    Raises:
        ImportError: it is not installed; the error names the extra.
    """
    try:
        return importlib.import_module("ray")
    except ImportError as error:
        raise missing_extra("ray", "ray", "engine='ray'") from error


class Actor:
    """An actor of a Ray cluster, on whichever machine has room; files must have the same paths on all of them."""

    def __init__(self, target: Target, gpus: float) -> None:
        self._ray = ray_package()
        how = {"num_cpus": target.threads, "num_gpus": gpus, "max_restarts": 0}
        self._actor = self._ray.remote(**how)(Here).remote(target)

    def run(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """What `run` of the target returns."""
        try:
            return self._ray.get(self._actor.run.remote(dict(arguments)))
        except self._ray.exceptions.RayError as error:  # of the actor, its process, its machine, or an answer that was lost with them
            if getattr(error, "actor_init_failed", False):
                raise RuntimeError(f"an actor could not start: {error}") from error
            raise Died(" ".join(str(error).split())[:500]) from error

    def stop(self) -> None:
        """End the actor."""
        self._ray.kill(self._actor)
