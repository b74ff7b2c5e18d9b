"""Where cells are carried out: in this process, in processes of this machine, or in actors of a Ray cluster.

A worker has `run(config, folder)`, which returns what became of a cell (`Cells.run`) or raises `Died`, and `stop()`. The driver has one
thread per worker, and replaces a worker that has died.
"""

import contextlib
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import torch

import sepcap
from sepcap.errors import missing_extra
from sepcap.studies.sweep.cell import Cells

Engine = Literal["here", "processes", "ray"]

GRACE = 5
"""Seconds that a process has to end after its output has ended."""

TAIL = 2_000
"""Bytes of the output of a worker that an error shows."""


class Died(Exception):
    """A worker ended without an answer: it was killed, or its machine was lost."""


@runtime_checkable
class Worker(Protocol):
    """Carries out one cell at a time."""

    def run(self, config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
        """What became of a cell.

        Raises:
            Died: the worker ended.
        """
        ...

    def stop(self) -> None:
        """End the worker, whatever it is doing; every file of a cell is written atomically."""
        ...


class Here:
    """This process, with a fixed number of threads until `stop`."""

    def __init__(self, kind: str, load: Mapping[str, Any], threads: int) -> None:
        self._before = torch.get_num_threads()
        torch.set_num_threads(threads)
        self._cells = Cells(kind, load)

    def run(self, config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
        """What became of a cell."""
        return self._cells.run(config, folder)

    def stop(self) -> None:
        """Give the process its number of threads back."""
        torch.set_num_threads(self._before)


class Process:
    """A process of this machine: lines of JSON go to its standard input and come from its standard output.

    It is a fresh interpreter and no fork or spawn of this one, so that scripts need no `if __name__ == "__main__"`. It ends when its
    standard input is closed, so that it does not outlive a killed driver.
    """

    def __init__(self, kind: str, load: Mapping[str, Any], threads: int, log: Path, devices: str | None = None) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        self._log = log
        home = str(Path(sepcap.__file__).parents[1])
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([home, *filter(None, [os.environ.get("PYTHONPATH")])])}
        environment |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(threads))
        if devices is not None:
            environment["CUDA_VISIBLE_DEVICES"] = devices
        command = [sys.executable, "-m", "sepcap.studies.sweep.worker", json.dumps({"kind": kind, "load": dict(load), "threads": threads})]
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

    def run(self, config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
        """What became of a cell."""
        line = json.dumps({"config": dict(config), "folder": str(folder.absolute())}).encode() + b"\n"
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
    """An actor of a Ray cluster, on whichever machine has room; folder and model must have the same paths on all of them."""

    def __init__(self, kind: str, load: Mapping[str, Any], threads: int, gpus: float) -> None:
        self._ray = ray_package()
        how = {"num_cpus": threads, "num_gpus": gpus, "max_restarts": 0}
        self._actor = self._ray.remote(**how)(Here).remote(kind, dict(load), threads)

    def run(self, config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
        """What became of a cell."""
        errors = self._ray.exceptions
        try:
            return self._ray.get(self._actor.run.remote(dict(config), Path(folder).absolute()))
        except (errors.RayActorError, errors.NodeDiedError, errors.WorkerCrashedError, errors.OutOfMemoryError) as error:
            if getattr(error, "actor_init_failed", False):
                raise RuntimeError(f"an actor could not start: {error}") from error
            raise Died(" ".join(str(error).split())[:500]) from error

    def stop(self) -> None:
        """End the actor."""
        self._ray.kill(self._actor)
