"""A run is a folder: written step by step, each step whole or not at all, read back as one object."""

import contextlib
import copy
import json
import os
import reprlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import pandas as pd
import torch

from sepcap.checks import checked
from sepcap.errors import CorruptFile, unknown
from sepcap.evaluation.next_token import COUNTS, Evaluation
from sepcap.experiments.separability import Separability, separability
from sepcap.interventions.deletion import delete
from sepcap.interventions.rotation import Rotation
from sepcap.models.sites import write_output_biases
from sepcap.models.weights import fingerprint
from sepcap.schemas import Record, RunConfig
from sepcap.selection.neurons import NeuronSet
from sepcap.selection.score import Scores, score
from sepcap.statistics.moments import Statistics
from sepcap.storage import (
    FORMAT,
    PART,
    check_held,
    damage,
    digest_of,
    load_tensors,
    make_folder,
    open_regular,
    read_json,
    save_tensors,
    seals_of,
    write_atomically,
    write_json,
)

BIASES = "biases.safetensors"
ROTATION = "rotation.safetensors"
T = TypeVar("T")
ROLES: tuple[Literal["forget", "retain"], ...] = ("forget", "retain")
MOST_COLUMNS = 1_000
"""Of a table."""

NOT_DECISIVE = ("versions", "created", "model", "task_fingerprints", "documents", "tokens_found")
"""Fields that may differ when a run goes on: `samples` says which tokens are used, wherever they were found, and
`model_fingerprint` which weights, wherever they lay."""


class Run:
    """A pruning run on disk, finished or not.

    Attributes:
        folder: where it lies.
        config: the resolved configuration, with versions, seeds and fingerprints.
        trajectory: one row per step and task: step, task, role, n, every metric with its standard error, perplexity,
            perplexity_ratio (relative to the unpruned model's), neurons gone per site, threshold per site, seconds and tokens of the step.

    Example:
        >>> run = sepcap.Run.load("runs/opt")  # doctest: +SKIP
        >>> run.separability("top1").percent  # doctest: +SKIP
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.config: dict[str, Any] = read_json(self.folder / "config.json", RunConfig)
        del self.config["format"]
        self.identity = identity_of(self.config)
        self._seen: dict[str, tuple[tuple[int, ...], Any]] = {}  # a file, while size and time stay: checked, or read

    @classmethod
    @checked()
    def load(cls, folder: str | Path) -> "Run":
        """Open the run in a folder, finished or not.

        Raises:
            FileNotFoundError: there is none.
            CorruptFile: the configuration, or a step before the last one, is damaged or gone. Other files are compared with their
                SHA-256 when they are read; `sepcap check FOLDER` compares all.
        """
        if not os.path.lexists(Path(folder) / "config.json"):
            raise FileNotFoundError(f"{folder} holds no run: there is no config.json in it")
        run = cls(folder)
        if gap := run.gap():
            raise CorruptFile(gap)
        return run

    @property
    def steps_done(self) -> int:
        """Number of the last step on disk; −1 before step 0."""
        done = -1
        while done < self.config["steps"] and os.path.lexists(self.step_folder(done + 1) / "record.json"):
            done += 1
        return done

    @property
    def finished(self) -> bool:
        """Whether all steps asked for are there, none of their files missing or cut."""
        return self.steps_done >= self.config["steps"] and not self.damage(whole=False)

    def gap(self) -> str:
        """The first step that is not there while later ones are, in words; empty where there is none."""
        first = self.steps_done + 1
        if any((self.folder / "steps").glob("[0-9]*")) and any(
            int(p.name) >= first for p in (self.folder / "steps").iterdir() if p.name.isdecimal() and int(p.name) <= self.config["steps"]
        ):
            return f"{self.step_folder(first) / 'record.json'} is missing; the command that made the run makes that step again"
        return ""

    def damage(self, *, whole: bool = True) -> list[str]:
        """What is missing or damaged of the steps on disk, and what to do, one sentence for each file.

        Args:
            whole: compare every file with its SHA-256, once as long as its size and time stay; else sizes alone.
        """
        found = []
        for step in range(self.steps_done + 1):
            try:
                for name in self._record(step)["files"]:
                    self._checked(step, name, whole=whole)
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
        """Write one step whole or not at all, then the table of all steps."""
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
        self.write_trajectory()

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
        save_tensors(
            temporary / "rows.safetensors",
            {role: torch.from_numpy(e.per_row) for role, e in evaluations.items()},
            {"kind": "rows", "columns": list(COUNTS)},
        )
        gone.save(temporary / "neurons.safetensors")
        if biases is not None:
            save_tensors(temporary / BIASES, biases, {"kind": "biases"})
        files = {f"steps/{step:04d}/{n}": seal for n, seal in seals_of(temporary, sorted(os.listdir(temporary))).items()}
        if step == 0:  # what was written before it
            before = (*(f"statistics/{role}.safetensors" for role in ROLES), ROTATION)
            files |= seals_of(self.folder, [name for name in before if (self.folder / name).exists()])
        write_json(temporary / "record.json", {"run": self.identity, **record, "files": files})

    def write_trajectory(self) -> None:
        """Write trajectory.parquet from the steps on disk."""
        import io

        buffer = io.BytesIO()
        self._table().to_parquet(buffer, index=False)
        write_atomically(self.folder / "trajectory.parquet", buffer.getvalue())

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

    def _checked(self, step: int, name: str, *, whole: bool = True) -> Path:
        """The path of a file of a step, after it was compared with what the record of the step says of it."""
        files = self._record(step)["files"]

        def look() -> None:
            with self._way_out(step):
                if name not in files:
                    raise CorruptFile(f"{self.step_folder(step) / 'record.json'} does not list {name}")
                if found := damage(self.folder, name, files[name], whole=whole):
                    raise CorruptFile(found)

        if whole:
            self._once(self.folder / name, look)
        else:
            look()
        return self.folder / name

    def _file(self, step: int, name: str) -> Path:
        return self._checked(step, f"steps/{step:04d}/{name}")

    def _check_step(self, step: int) -> None:
        done = self.steps_done
        if not 0 <= step <= done:
            check_held(self.folder)
            raise IndexError(f"step={step}: this run has " + (f"steps 0 to {done}" if done >= 0 else "no step yet"))

    def _table(self) -> pd.DataFrame:
        rows = []
        records = [self._record(step) for step in range(self.steps_done + 1)]
        for step, record in enumerate(records):
            for role in ROLES:
                row = {"step": step, "task": record["tasks"][role]["task"], "role": role, **record["tasks"][role]["metrics"]}
                row["n"] = int(row["n"])
                with np.errstate(over="ignore", invalid="ignore"):  # a ruined model can have an infinite one
                    row["perplexity_ratio"] = float(np.exp(row["loss"] - np.float64(records[0]["tasks"][role]["metrics"]["loss"])))
                row |= {f"gone_{site}": sum(layers) for site, layers in record["gone_per_layer"].items()}
                # nothing is selected in step 0, but the columns are the same in all rows
                row |= {f"threshold_{key}": record["thresholds"].get(key, float("nan")) for key in self.config["fractions"]}
                rows.append(row | {"seconds": record["seconds"], "tokens": record["tokens"]})
        return pd.DataFrame(rows)

    @property
    def trajectory_is_behind(self) -> bool:
        """Whether trajectory.parquet is not the table of the steps: the process was killed between the two, or it is damaged."""
        return self.trajectory_damage() != ""

    def trajectory_damage(self) -> str:
        """What is wrong with trajectory.parquet, in words; it is made of the steps, and nothing is read from it."""
        path, right = self.folder / "trajectory.parquet", self._table()
        if not len(right):
            return ""
        try:
            with open_regular(path, "table") as file:
                stored = read_table(file, len(right))
        except (FileNotFoundError, IsADirectoryError, CorruptFile) as error:
            return str(error)
        return "" if same_table(stored, right) else f"{path} is not the table of the steps"

    @property
    def trajectory(self) -> pd.DataFrame:
        """One row per step and task, see the class."""
        return self._table()

    @property
    def gone_per_layer(self) -> pd.DataFrame:
        """Neurons gone in total per step, site and layer."""
        rows = [
            {"step": step, "site": site, "layer": layer, "gone": gone}
            for step, record in enumerate(map(self._record, range(self.steps_done + 1)))
            for site, layers in record["gone_per_layer"].items()
            for layer, gone in enumerate(layers)
        ]
        return pd.DataFrame(rows)

    def neurons(self, step: int | None = None) -> NeuronSet:
        """All neurons gone after a step; default the last one."""
        step = self.steps_done if step is None else step
        self._check_step(step)
        with self._way_out(step):
            return NeuronSet.load(self._file(step, "neurons.safetensors"))

    def apply(self, model: Any, step: int | None = None) -> None:
        """Edit a model into the pruned model of a step: rotated, its neurons gone, its output biases offset, as the run had it.

        Args:
            model: the unpruned model that the run was made with; it is changed.
            step: default the last one.

        Raises:
            ValueError: another model (nothing is changed then).
            IndexError: a step that the run does not have.
        """
        gone = self.neurons(step)
        step = self.steps_done if step is None else step
        if (came := fingerprint(model)) != self.config["model_fingerprint"]:
            raise ValueError(
                f"model has other weights (fingerprint {came}) than the one this run was made with "
                f"({self.config['model']}, {self.config['model_fingerprint']}): give that one, unpruned"
            )
        biases: dict[str, torch.Tensor] = {}
        with self._way_out(step):
            if self.config.get("offset", "none") != "none":
                biases, _ = load_tensors(self._file(step, BIASES), "biases")
        if self.config.get("rotation", "none") != "none":
            self.rotation().apply(model)
        delete(model, gone)
        write_output_biases(model, biases)

    def rotation(self) -> Rotation:
        """The basis in which the run prunes attention."""
        if self.config.get("rotation", "none") == "none":
            raise ValueError("this run prunes in the model's own basis: rotation='none'")
        if self.steps_done < 0:
            return Rotation.load(self.folder / ROTATION)
        with self._way_out(0):
            return Rotation.load(self._checked(0, ROTATION))

    def statistics(self, role: Literal["forget", "retain"]) -> Statistics:
        """Statistics of the unpruned model on one of the two tasks, in the rotated basis where the run prunes in it."""
        if role not in ROLES:
            raise unknown("role", role, ROLES)
        with self._way_out(0):
            return Statistics.load(self._checked(0, f"statistics/{role}.safetensors"))

    @contextlib.contextmanager
    def _way_out(self, step: int) -> Iterator[None]:
        """Say of a file that cannot be read which folder to delete, so that the run makes it again."""
        way = f"Delete {self.step_folder(step)} and the steps after it, and the command that made the run makes them again"
        try:
            yield
        except (CorruptFile, FileNotFoundError, IsADirectoryError) as error:
            raise CorruptFile(str(error) if way in str(error) else f"{error}. {way}") from error

    def scores(self) -> Scores:
        """Scores of the unpruned model, those from which the first step was selected."""
        importance = self.config["importance"]
        if importance == "random":
            raise ValueError("a random run has no scores")
        return score(self.statistics("forget"), self.statistics("retain"), importance, eps=self.config["eps"])

    def rows(self, role: str) -> np.ndarray:
        """Evaluation sums per row, [step, row, count] in the order of `sepcap.evaluation.next_token.COUNTS`."""
        if role not in ROLES:
            raise unknown("role", role, ROLES)
        by_step = []
        for step in range(self.steps_done + 1):
            with self._way_out(step):
                path = self._file(step, "rows.safetensors")
                tensors, _ = load_tensors(path, "rows")
                if role not in tensors:
                    raise CorruptFile(f"{path}: tensor {role!r} is missing")
            by_step.append(tensors[role].numpy())
        return np.stack(by_step)

    @checked()
    def separability(
        self, metric: str = "top1", *, specific: Literal["forget", "retain"] = "forget", baseline: "Run | None" = None, seed: int = 0
    ) -> Separability:
        """How separable the two tasks are along this run (METHODS 11).

        Args:
            metric: "top1", "top10", "skip50_top1" or "skip50_top10".
            specific: the role on the x axis; "forget" makes 2 the perfect area, "retain" makes it 0.
            baseline: a random run over the same tasks, either way round, to say how far above it the area is.
            seed: of the bootstrap.
        """
        import dataclasses

        if self.steps_done < 1:
            raise ValueError(f"the run in {self.folder} has no pruning step yet")
        result = separability(self.rows("forget"), self.rows("retain"), metric, specific=specific, seed=seed)
        if baseline is None:
            return result
        # random neurons have no direction: one baseline serves a pair of tasks both ways round
        mine, theirs = self.config["samples"]["evaluate"], baseline.config["samples"]["evaluate"]
        role_of = {sample: role for role, sample in theirs.items()}
        if set(role_of) != set(mine.values()):
            raise ValueError(f"baseline: {baseline.folder} was evaluated on other tokens than {self.folder}: areas cannot be compared")
        forget, retain = (baseline.rows(role_of[mine[role]]) for role in ROLES)
        random = separability(forget, retain, metric, specific=specific, seed=seed)
        return dataclasses.replace(result, above_random=result.area - random.area)

    def figure(self, kind: str = "trajectory", **options: Any) -> Any:
        """A figure of the run: "trajectory", "drops", "perplexity", "metric", "gone", "threshold" or "scores"."""
        from sepcap import plots

        kinds = {
            "trajectory": lambda: plots.trajectory(self, **options),
            "drops": lambda: plots.drop_against_drop(self, **options),
            "perplexity": lambda: plots.perplexity_against_perplexity(self, **options),
            "metric": lambda: plots.metric_over_steps(self, **options),
            "gone": lambda: plots.neurons_gone(self, **options),
            "threshold": lambda: plots.thresholds(self, **options),
            "scores": lambda: plots.score_histograms(self.scores(), **options),
        }
        if kind not in kinds:
            raise unknown("figure", kind, kinds)
        return kinds[kind]()

    @checked()
    def report(self, path: str | Path | None = None, *, model: Any = None, baseline: "Run | None" = None) -> Path:
        """One HTML page about the run that needs nothing else; see `sepcap.report.report`."""
        from sepcap.report import report

        return report(self, path, model=model, baseline=baseline)

    def __repr__(self) -> str:
        c = self.config
        state = "finished" if self.finished else f"{max(0, self.steps_done)} of {c['steps']} steps"
        if damaged := self.damage(whole=False):
            state = f"damaged: {damaged[0]}"
        fractions = ", ".join(f"{k} {v:g}" for k, v in c["fractions"].items())
        return f"Run({str(self.folder)!r}, forget {c['forget']}, retain {c['retain']}, {c['importance']}, {fractions}, {state})"

    def _repr_html_(self) -> str:
        from sepcap.storage import html_card

        c = self.config
        how = {"folder": self.folder, **{name: c.get(name) for name in ("forget", "retain", "importance", "fractions", "model")}}
        how["steps"] = f"{max(0, self.steps_done)} of {c['steps']}"
        if self.steps_done < 0:
            return html_card("Run", how, pd.DataFrame())
        if self.steps_done >= 1:
            try:
                s = self.separability("top1")
                how["separability (top1)"] = f"{s.percent:.0f}% [{s.percent_interval[0]:.0f}, {s.percent_interval[1]:.0f}]"
            except ValueError as error:  # an untrained model has no accuracy to lose: the card says so
                how["separability (top1)"] = str(error)
        table = self.trajectory.pivot(index="step", columns="role", values=["top1", "loss"])
        table.columns = [f"{role} {metric}" for metric, role in table.columns]
        shown = table.iloc[np.unique(np.linspace(0, len(table) - 1, 11).astype(int))]
        return html_card("Run", how, shown.reset_index())


def find_run(folder: Path, config: dict[str, Any]) -> Run | None:
    """The run of this configuration that lies in a folder, or None where one can be begun.

    Raises:
        FileExistsError: the folder holds another run (the differing fields are named) or something else.
    """
    if os.path.lexists(folder / "config.json"):
        run = Run(folder)
        different = differing_fields(run.config, config)
        if different:
            listed = "; ".join(f"{k}: {reprlib.repr(a)} there, {reprlib.repr(b)} asked for" for k, (a, b) in different.items())
            raise FileExistsError(f"{folder} holds a run of another configuration ({listed}). Use another folder; nothing was changed.")
        return run
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file; a run is a folder. Use another name; nothing was changed.")
    # a process killed before its config.json was whole leaves a part of it
    if folder.exists() and any(not (p.name.startswith(".config.json.") and p.name.endswith(PART)) for p in folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty and holds no run. Use another folder; nothing was changed.")
    return None


def begin_run(folder: Path, config: dict[str, Any]) -> Run:
    """A new run in an empty folder."""
    write_json(folder / "config.json", {"format": FORMAT, **config})
    return Run(folder)


def identity_of(config: Mapping[str, Any]) -> str:
    """What tells a configuration from others, whatever versions and time it was made with."""
    plain = json.loads(json.dumps(config))
    return digest_of({name: value for name, value in plain.items() if name not in NOT_DECISIVE})


def read_table(file: Any, most: int) -> pd.DataFrame:
    """A parquet file, which must not promise more rows than there can be: few bytes can stand for many.

    Raises:
        CorruptFile: it cannot be read; the file is named.
    """
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file) as parquet:
            if parquet.metadata.num_rows > most or parquet.metadata.num_columns > MOST_COLUMNS:
                raise ValueError(f"{parquet.metadata.num_rows:,} rows of {parquet.metadata.num_columns:,} columns")
            return parquet.read().to_pandas()
    except Exception as error:  # pyarrow has no common class for what a broken file can raise
        raise CorruptFile(f"{file.name} is corrupt ({error})") from error


def same_table(one: pd.DataFrame, other: pd.DataFrame) -> bool:
    """Whether two tables hold the same numbers and words, in whatever types."""
    if list(one.columns) != list(other.columns) or len(one) != len(other):
        return False
    pairs = ((one[name].astype(object).to_numpy(), other[name].astype(object).to_numpy()) for name in one.columns)
    return all(bool(((a == b) | (pd.isna(a) & pd.isna(b))).all()) for a, b in pairs)


def differing_fields(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Fields that make two configurations different runs; versions and where the texts were found do not."""
    plain = json.loads(json.dumps(new))
    names = [name for name in dict.fromkeys([*old, *plain]) if name not in NOT_DECISIVE]
    return {name: (old.get(name), plain.get(name)) for name in names if old.get(name) != plain.get(name)}


def metrics_of(evaluation: Evaluation) -> dict[str, Any]:
    """One evaluation as it is recorded."""
    sample = {name: evaluation.info[name] for name in ("sample", "tokens", "asked")}
    return {"task": evaluation.task, "metrics": evaluation.as_row(), "skip_tokens": list(evaluation.skip_tokens), **sample}
