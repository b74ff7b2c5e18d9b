"""Carry out one cell after another with one loaded model: what every worker does, in whichever process it is."""

import os
import socket
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sepcap.models.loading.load import load_model
from sepcap.models.weights import fingerprint
from sepcap.progress import silent
from sepcap.storage import Locked
from sepcap.studies.base.fields import OTHERS
from sepcap.studies.base.folder import identity_of, read_config
from sepcap.studies.catalog import FUNCTIONS
from sepcap.studies.pruning.config import PruningConfig
from sepcap.studies.pruning.plan import plan
from sepcap.studies.pruning.prune import execute
from sepcap.studies.sweep.grid import config_of, given, measured_apart
from sepcap.studies.sweep.measures import numbers_of
from sepcap.tasks.load import load_task
from sepcap.torch_defaults import torch_defaults
from sepcap.workers.engines import named
from sepcap.workers.shards import heard

KEPT = 16
"""Most samples and measurements of the unpruned model in memory; one run has at most ten."""

PATIENCE = 60
"""Seconds to wait for a process that still writes to the folder of a cell: the worker of a call that was just killed."""


TASKS = ("forget", "retain", "task", "tasks")
"""Fields of configurations that name tasks."""


def made_of(config: Mapping[str, Any], stored: Mapping[str, Any]) -> dict[str, str]:
    """Fingerprints of the model and, of a pruning run, the tasks of a cell, by the names that its configuration has for them."""
    tasks = {f"task {config[role]}": value for role, value in stored.get("task_fingerprints", {}).items()}
    return tasks | ({f"model {config['model']}": stored["model_fingerprint"]} if "model_fingerprint" in stored else {})


def tasks_of(config: Mapping[str, Any]) -> dict[str, str]:
    """Fingerprints of the tasks that a configuration names, as they are now."""
    values = [config.get(name) for name in TASKS]
    names = {name for value in values for name in (value if isinstance(value, list | tuple) else [value]) if isinstance(name, str)}
    return {f"task {name}": load_task(name).fingerprint for name in sorted(names - {OTHERS})}


def check_same(known: Mapping[str, str], these: Mapping[str, str]) -> None:
    """Check that models and tasks are those of the finished cells.

    Raises:
        ValueError: one has changed under its name; a table of both would compare two models.
    """
    for name, value in these.items():
        if known.get(name, value) != value:
            raise ValueError(
                f"{name} has changed since other cells of this sweep finished with it (fingerprint {known[name]} then, {value} now). "
                "Restore it, use another folder for the sweep, or delete the folders of those cells"
            )


class Recent(dict[Any, Any]):
    """A dictionary that forgets its oldest entries beyond `KEPT`."""

    def __setitem__(self, key: Any, value: Any) -> None:
        super().__setitem__(key, value)
        while len(self) > KEPT:
            del self[next(iter(self))]


class Cells:
    """Carries out cells; keeps the model and what the next cell can share.

    Args:
        kind: class of the configurations, by name.
        load: arguments of `sepcap.load_model`.
    """

    def __init__(self, kind: str, load: Mapping[str, Any]) -> None:
        self.kind, self.load = kind, dict(load)
        self.function = named(FUNCTIONS[kind])
        self._model: Any = None
        self._name, self._weights = "", ""
        self._shared: tuple[Any, Recent] = (None, Recent())
        self._tasks: dict[str, str] = {}

    def run(self, config: Mapping[str, Any], folder: str | Path, known: Mapping[str, str] | None = None) -> dict[str, Any]:
        """Carry out one cell, or resume it, or read it if it is finished.

        Args:
            config: all fields of its configuration.
            folder: its folder.
            known: fingerprints of the models and tasks of the finished cells, see `made_of`; a cell of others under the same names fails.

        Returns:
            What became of it, as JSON: `state` "finished" with the numbers in `values`, the `identity` of the configuration that its
            study has stored and `made_of`, or "failed" with the error; and `warnings` and `seconds`.
        """
        started = time.perf_counter()
        outcome: dict[str, Any] = {"worker": f"{socket.gethostname()}:{os.getpid()}"}
        with heard() as warned:
            try:
                values = numbers_of(self._patiently(config_of(self.kind, config), Path(folder), known or {}))
                stored = read_config(Path(folder))
                made = self._tasks | made_of(config, stored)
                outcome |= {"state": "finished", "values": values, "identity": identity_of(stored), "made_of": made}
            except Exception as error:  # of whatever kind: the other cells are carried out all the same
                said = " ".join(str(error).split())
                outcome |= {"state": "failed", "error": f"{type(error).__name__}: {said}", "traceback": traceback.format_exc()}
            self._check_model()
        return {**outcome, "warnings": warned, "seconds": time.perf_counter() - started}

    def _patiently(self, config: Any, folder: Path, known: Mapping[str, str]) -> Any:
        until = time.monotonic() + PATIENCE
        while True:
            try:
                with silent(), torch_defaults():
                    return self._study(config, folder, known)
            except Locked:
                if time.monotonic() > until:
                    raise
                time.sleep(0.5)

    def _study(self, config: Any, folder: Path, known: Mapping[str, str]) -> Any:
        model = self._loaded(config.model) if self.function.LOADS or self.load else None
        if model is not None:
            check_same(known, {f"model {config.model}": self._weights})
        if type(config) is not PruningConfig:
            self._tasks = tasks_of(given(config))  # before the study reads them: a file can change meanwhile
            check_same(known, self._tasks)
            return self.function(model, config, out=folder, progress=False)
        if self._shared[0] != (of := measured_apart(config)):
            self._shared = of, Recent()
        prepared = plan(model, config, self._shared[1])
        check_same(known, made_of(given(config), prepared.resolved))
        return execute(prepared, folder)

    def _loaded(self, name: str) -> Any:
        if self._model is None or name != self._name:
            self._model, self._shared = None, (None, Recent())  # the memory of the one before is free before the next is loaded
            self._model, self._name = load_model(name, **self.load), name
            self._weights = fingerprint(self._model)
        return self._model

    def _check_model(self) -> None:
        """Forget a model that a cell has not given back whole; the next cell loads it again."""
        if self._model is not None and fingerprint(self._model) != self._weights:
            self._model = None
