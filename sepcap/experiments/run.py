"""A run is a folder: written step by step, each step whole or not at all, read back as one object."""

import contextlib
import json
import os
import reprlib
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch

from sepcap.errors import CorruptFile, unknown
from sepcap.evaluation.next_token import COUNTS, Evaluation
from sepcap.experiments.separability import Separability, separability
from sepcap.interventions.deletion import delete
from sepcap.interventions.rotation import Rotation
from sepcap.models.sites import write_output_biases
from sepcap.models.weights import fingerprint
from sepcap.selection.neurons import NeuronSet
from sepcap.selection.score import Scores, score
from sepcap.statistics.moments import Statistics
from sepcap.storage import PART, load_tensors, read_json, save_tensors, write_atomically, write_json

BIASES = "biases.safetensors"
ROTATION = "rotation.safetensors"
ROLES: tuple[Literal["forget", "retain"], ...] = ("forget", "retain")
FORMAT = 1

NEEDED = ("steps", "forget", "retain", "importance", "fractions", "eps", "samples")
"""Fields of config.json without which a run cannot be read."""

RECORDED = ("tasks", "gone_per_layer", "thresholds", "seconds", "tokens")
"""Fields of the record.json of a step."""

LATER = {"rotation": "none", "offset": "none"}
"""Fields that came after the first runs were written, with what those did."""

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
        path = self.folder / "config.json"
        self.config: dict[str, Any] = read_json(path)
        if not isinstance(self.config, dict):
            raise CorruptFile(f"{path} is corrupt: it holds a {type(self.config).__name__}, not a configuration")
        if self.config.get("format") != FORMAT:
            raise CorruptFile(f"{path}: format {self.config.get('format')!r} is not {FORMAT}: the run was written by another version")
        if missing := [name for name in NEEDED if name not in self.config]:
            raise CorruptFile(f"{path} is corrupt: {', '.join(missing)} missing")
        self.config = LATER | self.config

    @classmethod
    def load(cls, folder: str | Path) -> "Run":
        """Open the run in a folder."""
        if not (Path(folder) / "config.json").exists():
            raise FileNotFoundError(f"{folder} holds no run: there is no config.json in it")
        return cls(folder)

    @property
    def steps_done(self) -> int:
        """Number of the last step on disk; −1 before step 0."""
        done = -1
        while (self.step_folder(done + 1) / "record.json").exists():
            done += 1
        return done

    @property
    def finished(self) -> bool:
        """Whether all steps asked for are there."""
        return self.steps_done >= self.config["steps"]

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
        temporary.mkdir(parents=True)
        save_tensors(
            temporary / "rows.safetensors",
            {role: torch.from_numpy(e.per_row) for role, e in evaluations.items()},
            {"kind": "rows", "columns": list(COUNTS)},
        )
        gone.save(temporary / "neurons.safetensors")
        if biases is not None:
            save_tensors(temporary / BIASES, biases, {"kind": "biases"})
        write_json(temporary / "record.json", record)
        os.replace(temporary, final)
        self.write_trajectory()

    def write_trajectory(self) -> None:
        """Write trajectory.parquet from the steps on disk."""
        import io

        buffer = io.BytesIO()
        self._table().to_parquet(buffer, index=False)
        write_atomically(self.folder / "trajectory.parquet", buffer.getvalue())

    def record(self, step: int) -> dict[str, Any]:
        """Everything recorded about one step but its neurons."""
        self._check_step(step)
        return self._records([step])[0]

    def _records(self, steps: Iterable[int]) -> list[dict[str, Any]]:
        records = []
        for step in steps:
            path = self.step_folder(step) / "record.json"
            record = read_json(path)
            if not isinstance(record, dict) or any(name not in record for name in RECORDED):
                raise CorruptFile(f"{path} is corrupt: it lacks one of {', '.join(RECORDED)}; delete it and the run goes on there")
            records.append(record)
        return records

    def _check_step(self, step: int) -> None:
        done = self.steps_done
        if not 0 <= step <= done:
            raise IndexError(f"step={step}: this run has " + (f"steps 0 to {done}" if done >= 0 else "no step yet"))

    def _table(self) -> pd.DataFrame:
        rows = []
        records = self._records(range(self.steps_done + 1))
        for step, record in enumerate(records):
            for role in ROLES:
                row = {"step": step, "task": record["tasks"][role]["task"], "role": role, **record["tasks"][role]["metrics"]}
                row["n"] = int(row["n"])
                row.setdefault("perplexity_se", row["perplexity"] * row["loss_se"])  # steps recorded before it was
                with np.errstate(over="ignore", invalid="ignore"):  # a ruined model can have an infinite one
                    row["perplexity_ratio"] = float(np.exp(row["loss"] - np.float64(records[0]["tasks"][role]["metrics"]["loss"])))
                row |= {f"gone_{site}": sum(layers) for site, layers in record["gone_per_layer"].items()}
                # nothing is selected in step 0, but the columns are the same in all rows
                row |= {f"threshold_{key}": record["thresholds"].get(key, float("nan")) for key in self.config["fractions"]}
                rows.append(row | {"seconds": record["seconds"], "tokens": record["tokens"]})
        return pd.DataFrame(rows)

    @property
    def trajectory_is_behind(self) -> bool:
        """Whether trajectory.parquet is missing or lacks steps: the process was killed between a step and the table."""
        return len(self._stored_table()) != len(ROLES) * (self.steps_done + 1)

    def _stored_table(self) -> pd.DataFrame:
        path = self.folder / "trajectory.parquet"
        if not path.exists():
            return pd.DataFrame()
        try:
            return pd.read_parquet(path)
        except Exception as error:  # pyarrow has no common class for what a broken file can raise
            raise CorruptFile(f"{path} is corrupt ({error}); delete it, it is made again from the steps") from error

    @property
    def trajectory(self) -> pd.DataFrame:
        """One row per step and task, see the class."""
        stored = self._stored_table()
        # tables that were written before there were ratios and errors of perplexities lack them
        whole = len(stored) == len(ROLES) * (self.steps_done + 1) and {"perplexity_ratio", "perplexity_se"} <= {*stored.columns}
        return stored if whole else self._table()

    @property
    def gone_per_layer(self) -> pd.DataFrame:
        """Neurons gone in total per step, site and layer."""
        rows = [
            {"step": step, "site": site, "layer": layer, "gone": gone}
            for step, record in enumerate(self._records(range(self.steps_done + 1)))
            for site, layers in record["gone_per_layer"].items()
            for layer, gone in enumerate(layers)
        ]
        return pd.DataFrame(rows)

    def neurons(self, step: int | None = None) -> NeuronSet:
        """All neurons gone after a step; default the last one."""
        step = self.steps_done if step is None else step
        self._check_step(step)
        with self._way_out(step):
            return NeuronSet.load(self.step_folder(step) / "neurons.safetensors")

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
            if self.config["offset"] != "none":
                biases, _ = load_tensors(self.step_folder(step) / BIASES, "biases")
        if self.config["rotation"] != "none":
            self.rotation().apply(model)
        delete(model, gone)
        write_output_biases(model, biases)

    def rotation(self) -> Rotation:
        """The basis in which the run prunes attention."""
        if self.config["rotation"] == "none":
            raise ValueError("this run prunes in the model's own basis: rotation='none'")
        return Rotation.load(self.folder / ROTATION)

    def statistics(self, role: Literal["forget", "retain"]) -> Statistics:
        """Statistics of the unpruned model on one of the two tasks, in the rotated basis where the run prunes in it."""
        if role not in ROLES:
            raise unknown("role", role, ROLES)
        with self._way_out(0):
            return Statistics.load(self.folder / "statistics" / f"{role}.safetensors")

    @contextlib.contextmanager
    def _way_out(self, step: int) -> Iterator[None]:
        """Say of a file that cannot be read which folder to delete, so that the run makes it again."""
        try:
            yield
        except (CorruptFile, FileNotFoundError) as error:
            raise CorruptFile(f"{error}. In a run: delete {self.step_folder(step)}, and the same command goes on from there") from error

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
            path = self.step_folder(step) / "rows.safetensors"
            with self._way_out(step):
                tensors, _ = load_tensors(path, "rows")
                if role not in tensors:
                    raise CorruptFile(f"{path}: tensor {role!r} is missing")
            by_step.append(tensors[role].numpy())
        return np.stack(by_step)

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

    def report(self, path: str | Path | None = None, *, model: Any = None, baseline: "Run | None" = None) -> Path:
        """One HTML page about the run that needs nothing else; see `sepcap.report.report`."""
        from sepcap.report import report

        return report(self, path, model=model, baseline=baseline)

    def __repr__(self) -> str:
        c = self.config
        state = "finished" if self.finished else f"{max(0, self.steps_done)} of {c['steps']} steps"
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
    if (folder / "config.json").exists():
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
    write_json(folder / "config.json", config)
    return Run(folder)


def differing_fields(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Fields that make two configurations different runs; versions and where the texts were found do not."""
    plain = json.loads(json.dumps(new))
    names = [name for name in dict.fromkeys([*old, *plain]) if name not in NOT_DECISIVE]
    return {name: (old.get(name), plain.get(name)) for name in names if old.get(name) != plain.get(name)}


def metrics_of(evaluation: Evaluation) -> dict[str, Any]:
    """One evaluation as it is recorded."""
    sample = {name: evaluation.info[name] for name in ("sample", "tokens", "asked")}
    return {"task": evaluation.task, "metrics": evaluation.as_row(), "skip_tokens": list(evaluation.skip_tokens), **sample}
