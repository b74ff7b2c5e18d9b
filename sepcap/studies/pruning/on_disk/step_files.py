"""The files of a run on disk: its configuration, and per step a record that lists the other files with their SHA-256."""

import contextlib
import copy
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch

from sepcap.checks import checked
from sepcap.errors import CorruptFile
from sepcap.evaluation.result import COUNTS, Evaluation
from sepcap.schemas import Record, RunConfig
from sepcap.selection.neurons import NeuronSet
from sepcap.storage import PART, check_held, damage, make_folder, read_json, save_tensors, seals_of, write_json
from sepcap.studies.base.folder import identity_of

BIASES = "biases.safetensors"
ROTATION = "rotation.safetensors"
LEARNED = "statistics/learned.safetensors"
LEARNING = "pieces/learning.safetensors"
"""The learned order of a run that prunes by one, and the last checkpoint of its learning."""
T = TypeVar("T")
ROLES: tuple[Literal["forget", "retain"], ...] = ("forget", "retain")


class StepFiles:
    """Write and read the steps in the folder of a run; every file is compared with its record, once until it changes.

    Attributes:
        folder: folder of the run.
        config: the resolved configuration.
        identity: identity of the configuration; stored in every step.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.config: dict[str, Any] = read_json(self.folder / "config.json", RunConfig)
        del self.config["format"]
        self.identity = identity_of(self.config)
        self._seen: dict[str, tuple[tuple[int, ...], Any]] = {}  # per file its size and time, and the result of checking or reading it

    @property
    def steps_done(self) -> int:
        """Number of the last step on disk; −1 before step 0."""
        done = -1
        while done < self.config["steps"] and os.path.lexists(self.step_folder(done + 1) / "record.json"):
            done += 1
        return done

    @property
    def finished(self) -> bool:
        """Whether all requested steps exist and all of their files are as written."""
        return self.steps_done >= self.config["steps"] and not self.damage()

    def gap(self) -> str:
        """The first missing step if later ones exist, in words; empty if there is none."""
        first = self.steps_done + 1
        numbers = (int(path.name) for path in (self.folder / "steps").glob("[0-9]*") if path.name.isdecimal())
        if any(first <= number <= self.config["steps"] for number in numbers):
            return f"{self.step_folder(first) / 'record.json'} is missing; the command that made the run recreates that step"
        return ""

    def damage(self) -> list[str]:
        """Missing or damaged files of the steps on disk, and what to do, one sentence for each file.

        Every file is compared with its SHA-256, once until its size or time changes.
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

    @checked()
    def step_folder(self, step: int) -> Path:
        """Folder of one step."""
        return self.folder / "steps" / f"{step:04d}"

    @checked()
    def write_step(
        self,
        step: int,
        record: Mapping[str, Any],
        evaluations: Mapping[str, Evaluation],
        pruned: NeuronSet,
        biases: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        """Write one step atomically."""
        final = self.step_folder(step)
        temporary = final.with_name(f".{final.name}{PART}")
        for leftover in (temporary, final):
            # of an interrupted attempt, or a step that lost its record
            if leftover.exists():
                shutil.rmtree(leftover)
        try:
            self._write_files(step, temporary, record, evaluations, pruned, biases)
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
        pruned: NeuronSet,
        biases: Mapping[str, torch.Tensor] | None,
    ) -> None:
        make_folder(temporary)
        rows = {role: torch.from_numpy(e.per_row) for role, e in evaluations.items()}
        rows |= {clusters_name(role): torch.from_numpy(e.clusters) for role, e in evaluations.items()}
        groups = {role: e.groups for role, e in evaluations.items()}
        save_tensors(temporary / "rows.safetensors", rows, {"kind": "rows", "columns": list(COUNTS), "groups": groups})
        pruned.save(temporary / "neurons.safetensors")
        if biases is not None:
            save_tensors(temporary / BIASES, biases, {"kind": "biases"})
        files = {f"steps/{step:04d}/{n}": seal for n, seal in seals_of(temporary, sorted(os.listdir(temporary))).items()}
        if step == 0:  # files written before the step
            before = (*(f"statistics/{role}.safetensors" for role in ROLES), *map(positions_name, ROLES), ROTATION, LEARNED, LEARNING)
            files |= seals_of(self.folder, [name for name in before if (self.folder / name).exists()])
        write_json(temporary / "record.json", {"run": self.identity, **record, "files": files})

    @checked()
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
                raise CorruptFile(f"{path} belongs to step {record['step']}")
            if record["run"] != self.identity:
                raise CorruptFile(f"{path} belongs to a run of another configuration than {self.folder / 'config.json'}")
        return record

    def _once(self, path: Path, look: Callable[[], T], what: str = "") -> T:
        """Result of `look` for a file; it is called again only if size or time have changed. `what` tells two kinds of `look` apart."""
        try:
            there = path.stat()
            now = (there.st_size, there.st_mtime_ns, there.st_ino)
        except OSError:
            return look()  # which raises the error
        seen = self._seen.get(key := what + str(path))
        if seen is None or seen[0] != now:
            seen = self._seen[key] = now, look()
        return seen[1]

    def _checked(self, step: int, name: str) -> Path:
        """The path of a file of a step, after comparing the file with the record of the step."""
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
        """Add to the error of an unreadable file which folder to delete, so that the run recreates it."""
        way = f"Delete {self.step_folder(step)} and the steps after it, and the command that made the run recreates them"
        try:
            yield
        except (CorruptFile, FileNotFoundError, IsADirectoryError) as error:
            raise CorruptFile(str(error) if way in str(error) else f"{error}. {way}") from error


def positions_name(role: str) -> str:
    """File with the positions of a task at which the unpruned model is right, if statistics are restricted to them."""
    return f"positions/{role}.safetensors"


def clusters_name(role: str) -> str:
    """Name of the tensor with the document of every row."""
    return f"{role}_clusters"
