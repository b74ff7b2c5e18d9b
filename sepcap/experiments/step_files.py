"""The files of a run on disk: its configuration, and step by step a record that lists the others with their SHA-256."""

import contextlib
import copy
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch

from sepcap.errors import CorruptFile
from sepcap.evaluation.next_token import COUNTS, Evaluation
from sepcap.schemas import Record, RunConfig
from sepcap.selection.neurons import NeuronSet
from sepcap.storage import PART, check_held, damage, digest_of, make_folder, read_json, save_tensors, seals_of, write_json

BIASES = "biases.safetensors"
ROTATION = "rotation.safetensors"
T = TypeVar("T")
ROLES: tuple[Literal["forget", "retain"], ...] = ("forget", "retain")
NOT_DECISIVE = ("versions", "created", "model", "task_fingerprints", "documents", "n_documents", "tokens_found", "prompts", "matched")
"""Fields that may differ when a run goes on: `samples` says which tokens are used, wherever they were found,
`model_fingerprint` which weights, and `matched_neurons` which neurons a baseline is matched with, wherever they lay."""


class StepFiles:
    """A folder of a run, its steps written and read; every file is compared with what was noted of it, once as long as it stays.

    Attributes:
        folder: where it lies.
        config: the resolved configuration.
        identity: what tells the configuration from others; every step has it.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.config: dict[str, Any] = read_json(self.folder / "config.json", RunConfig)
        del self.config["format"]
        self.identity = identity_of(self.config)
        self._seen: dict[str, tuple[tuple[int, ...], Any]] = {}  # a file, while size and time stay: checked, or read

    @property
    def steps_done(self) -> int:
        """Number of the last step on disk; −1 before step 0."""
        done = -1
        while done < self.config["steps"] and os.path.lexists(self.step_folder(done + 1) / "record.json"):
            done += 1
        return done

    @property
    def finished(self) -> bool:
        """Whether all steps asked for are there, and all of their files what was written."""
        return self.steps_done >= self.config["steps"] and not self.damage()

    def gap(self) -> str:
        """The first step that is not there while later ones are, in words; empty where there is none."""
        first = self.steps_done + 1
        numbers = (int(path.name) for path in (self.folder / "steps").glob("[0-9]*") if path.name.isdecimal())
        if any(first <= number <= self.config["steps"] for number in numbers):
            return f"{self.step_folder(first) / 'record.json'} is missing; the command that made the run makes that step again"
        return ""

    def damage(self) -> list[str]:
        """What is missing or damaged of the steps on disk, and what to do, one sentence for each file.

        Every file is compared with its SHA-256, once as long as its size and time stay.
        """
        found = []
        for step in range(self.steps_done + 1):
            try:
                names = list(self._record(step)["files"])
            except CorruptFile as error:
                found.append(str(error))
                continue
            for name in names:
                try:
                    self._checked(step, name)
                except CorruptFile as error:
                    found.append(str(error))
        return found

    def step_folder(self, step: int) -> Path:
        """Folder of one step."""
        return self.folder / "steps" / f"{step:04d}"

    def write_step(
        self,
        step: int,
        record: Mapping[str, Any],
        evaluations: Mapping[str, Evaluation],
        gone: NeuronSet,
        biases: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        """Write one step whole or not at all."""
        final = self.step_folder(step)
        temporary = final.with_name(f".{final.name}{PART}")
        for leftover in (temporary, final):
            # of an interrupted attempt, or a step that lost its record
            if leftover.exists():
                shutil.rmtree(leftover)
        try:
            self._write_files(step, temporary, record, evaluations, gone, biases)
            make_folder(final.parent)
            os.replace(temporary, final)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise

    def _write_files(
        self,
        step: int,
        temporary: Path,
        record: Mapping[str, Any],
        evaluations: Mapping[str, Evaluation],
        gone: NeuronSet,
        biases: Mapping[str, torch.Tensor] | None,
    ) -> None:
        make_folder(temporary)
        rows = {role: torch.from_numpy(e.per_row) for role, e in evaluations.items()}
        rows |= {clusters_name(role): torch.from_numpy(e.clusters) for role, e in evaluations.items()}
        groups = {role: e.groups for role, e in evaluations.items()}
        save_tensors(temporary / "rows.safetensors", rows, {"kind": "rows", "columns": list(COUNTS), "groups": groups})
        gone.save(temporary / "neurons.safetensors")
        if biases is not None:
            save_tensors(temporary / BIASES, biases, {"kind": "biases"})
        files = {f"steps/{step:04d}/{n}": seal for n, seal in seals_of(temporary, sorted(os.listdir(temporary))).items()}
        if step == 0:  # what was written before it
            before = (*(f"statistics/{role}.safetensors" for role in ROLES), ROTATION)
            files |= seals_of(self.folder, [name for name in before if (self.folder / name).exists()])
        write_json(temporary / "record.json", {"run": self.identity, **record, "files": files})

    def record(self, step: int) -> dict[str, Any]:
        """Everything recorded about one step but its neurons, with size and SHA-256 of its files."""
        self._check_step(step)
        return copy.deepcopy(self._record(step))

    def _record(self, step: int) -> dict[str, Any]:
        path = self.step_folder(step) / "record.json"
        return self._once(path, lambda: self._read_record(step, path))

    def _read_record(self, step: int, path: Path) -> dict[str, Any]:
        with self._way_out(step):
            record = read_json(path, Record)
            if record["step"] != step:
                raise CorruptFile(f"{path} is that of step {record['step']}")
            if record["run"] != self.identity:
                raise CorruptFile(f"{path} is of a run of another configuration than {self.folder / 'config.json'}")
        return record

    def _once(self, path: Path, look: Callable[[], T]) -> T:
        """What looking at a file gave, again only when its size or time has changed."""
        try:
            there = path.stat()
            now = (there.st_size, there.st_mtime_ns, there.st_ino)
        except OSError:
            return look()  # which says what is wrong
        before, held = self._seen.get(str(path), ((), None))
        if before != now:
            held = look()
            self._seen[str(path)] = now, held
        return held  # pyright: ignore[reportReturnType] (what `look` gave for this very path)

    def _checked(self, step: int, name: str) -> Path:
        """The path of a file of a step, after it was compared with what the record of the step says of it."""
        files = self._record(step)["files"]

        def look() -> None:
            with self._way_out(step):
                if name not in files:
                    raise CorruptFile(f"{self.step_folder(step) / 'record.json'} does not list {name}")
                if found := damage(self.folder, name, files[name]):
                    raise CorruptFile(found)

        self._once(self.folder / name, look)
        return self.folder / name

    def _file(self, step: int, name: str) -> Path:
        return self._checked(step, f"steps/{step:04d}/{name}")

    def _check_step(self, step: int) -> None:
        done = self.steps_done
        if not 0 <= step <= done:
            check_held(self.folder)
            raise IndexError(f"step={step}: this run has " + (f"steps 0 to {done}" if done >= 0 else "no step yet"))

    @contextlib.contextmanager
    def _way_out(self, step: int) -> Iterator[None]:
        """Say of a file that cannot be read which folder to delete, so that the run makes it again."""
        way = f"Delete {self.step_folder(step)} and the steps after it, and the command that made the run makes them again"
        try:
            yield
        except (CorruptFile, FileNotFoundError, IsADirectoryError) as error:
            raise CorruptFile(str(error) if way in str(error) else f"{error}. {way}") from error


def clusters_name(role: str) -> str:
    """Name of the tensor of documents beside that of the sums per row."""
    return f"{role}_clusters"


def identity_of(config: Mapping[str, Any]) -> str:
    """What tells a configuration from others, whatever versions and time it was made with."""
    plain = json.loads(json.dumps(config))
    return digest_of({name: value for name, value in plain.items() if name not in NOT_DECISIVE})
