"""A run is a folder: written step by step, each step whole or not at all, read back as one object."""

import functools
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch

from sepcap.errors import CorruptFile, unknown
from sepcap.evaluation.next_token import COUNTS, METRICS, Evaluation
from sepcap.experiments.separability import Separability, separability
from sepcap.selection.neurons import NeuronSet
from sepcap.selection.score import Scores, score
from sepcap.statistics.moments import Statistics
from sepcap.storage import load_tensors, read_json, save_tensors, write_atomically, write_json

ROLES = ("forget", "retain")
FORMAT = 1


class Run:
    """A pruning run on disk, finished or not.

    Attributes:
        folder: where it lies.
        config: the resolved configuration, with versions, seeds and fingerprints.
        trajectory: one row per step and task: step, task, role, n, every metric with its standard error, perplexity,
            neurons gone per site, threshold per site, seconds and tokens of the step.

    Example:
        >>> run = sepcap.Run.load("runs/opt")  # doctest: +SKIP
        >>> run.separability("top1").percent  # doctest: +SKIP
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.config: dict[str, Any] = read_json(self.folder / "config.json")
        if self.config.get("format") != FORMAT:
            raise CorruptFile(f"{self.folder / 'config.json'}: format {self.config.get('format')!r} is not {FORMAT}: the run was written by another version")

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

    def write_step(self, step: int, record: Mapping[str, Any], evaluations: Mapping[str, Evaluation], gone: NeuronSet) -> None:
        """Write one step whole or not at all, then the table of all steps."""
        final = self.step_folder(step)
        temporary = final.with_name(f".{final.name}.part")
        if temporary.exists():
            shutil.rmtree(temporary)  # what an interrupted run left
        temporary.mkdir(parents=True)
        save_tensors(
            temporary / "rows.safetensors",
            {role: torch.from_numpy(e.per_row) for role, e in evaluations.items()},
            {"kind": "rows", "columns": list(COUNTS)},
        )
        gone.save(temporary / "neurons.safetensors")
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
        return read_json(self.step_folder(step) / "record.json")

    def _check_step(self, step: int) -> None:
        if not 0 <= step <= self.steps_done:
            raise IndexError(f"step={step}: this run has steps 0 to {self.steps_done}")

    def _table(self) -> pd.DataFrame:
        rows = []
        for step in range(self.steps_done + 1):
            record = self.record(step)
            for role in ROLES:
                row = {"step": step, "task": record["tasks"][role]["task"], "role": role, **record["tasks"][role]["metrics"]}
                row["n"] = int(row["n"])
                row |= {f"gone_{site}": sum(layers) for site, layers in record["gone_per_layer"].items()}
                row |= {f"threshold_{site}": value for site, value in record["thresholds"].items()}
                rows.append(row | {"seconds": record["seconds"], "tokens": record["tokens"]})
        return pd.DataFrame(rows)

    @functools.cached_property
    def trajectory(self) -> pd.DataFrame:
        """One row per step and task, see the class."""
        path = self.folder / "trajectory.parquet"
        try:
            return pd.read_parquet(path)
        except FileNotFoundError:
            return self._table()
        except Exception as error:  # pyarrow has no common class for what a broken file can raise
            raise CorruptFile(f"{path} is corrupt ({error}); delete it, it is made again from the steps") from error

    @property
    def gone_per_layer(self) -> pd.DataFrame:
        """Neurons gone in total per step, site and layer."""
        rows = [
            {"step": step, "site": site, "layer": layer, "gone": gone}
            for step in range(self.steps_done + 1)
            for site, layers in self.record(step)["gone_per_layer"].items()
            for layer, gone in enumerate(layers)
        ]
        return pd.DataFrame(rows)

    def neurons(self, step: int | None = None) -> NeuronSet:
        """All neurons gone after a step; default the last one."""
        step = self.steps_done if step is None else step
        self._check_step(step)
        return NeuronSet.load(self.step_folder(step) / "neurons.safetensors")

    def statistics(self, role: Literal["forget", "retain"]) -> Statistics:
        """Statistics of the unpruned model on one of the two tasks."""
        if role not in ROLES:
            raise unknown("role", role, ROLES)
        return Statistics.load(self.folder / "statistics" / f"{role}.safetensors")

    def scores(self) -> Scores:
        """Scores of the unpruned model, those from which the first step was selected."""
        importance = self.config["importance"]
        if importance == "random":
            raise ValueError("a random run has no scores")
        return score(self.statistics("forget"), self.statistics("retain"), importance, eps=self.config["eps"])

    def rows(self, role: str) -> np.ndarray:
        """Evaluation sums per row, [step, row, count] in the order of `sepcap.evaluation.next_token.COUNTS`."""
        return np.stack([load_tensors(self.step_folder(s) / "rows.safetensors", "rows")[0][role].numpy() for s in range(self.steps_done + 1)])

    def separability(
        self, metric: str = "top1", *, specific: Literal["forget", "retain"] = "forget", baseline: "Run | None" = None, seed: int = 0
    ) -> Separability:
        """How separable the two tasks are along this run (METHODS 11).

        Args:
            metric: "top1", "top10", "skip50_top1" or "skip50_top10".
            specific: the role on the x axis; "forget" makes 2 the perfect area, "retain" makes it 0.
            baseline: a random run over the same tasks, to say how far above it the area is.
            seed: of the bootstrap.
        """
        import dataclasses

        if self.steps_done < 1:
            raise ValueError(f"the run in {self.folder} has no pruning step yet")
        result = separability(self.rows("forget"), self.rows("retain"), metric, specific=specific, seed=seed)
        if baseline is None:
            return result
        random = separability(baseline.rows("forget"), baseline.rows("retain"), metric, specific=specific, seed=seed)
        return dataclasses.replace(result, above_random=result.area - random.area)

    def figure(self, kind: str = "trajectory", **options: Any) -> Any:
        """A figure of the run: "trajectory", "metric", "gone", "threshold" or "scores"."""
        from sepcap import plots

        kinds = {
            "trajectory": lambda: plots.trajectory(self, **options),
            "metric": lambda: plots.metric_over_steps(self, **options),
            "gone": lambda: plots.neurons_gone(self, **options),
            "threshold": lambda: plots.thresholds(self, **options),
            "scores": lambda: plots.score_histograms(self.scores(), **options),
        }
        if kind not in kinds:
            raise unknown("figure", kind, kinds)
        return kinds[kind]()

    def __repr__(self) -> str:
        c = self.config
        state = "finished" if self.finished else f"{max(0, self.steps_done)} of {c['steps']} steps"
        fractions = ", ".join(f"{k} {v:g}" for k, v in c["fractions"].items())
        return f"Run({str(self.folder)!r}, forget {c['forget']}, retain {c['retain']}, {c['importance']}, {fractions}, {state})"

    def _repr_html_(self) -> str:
        from sepcap.storage import html_card

        c = self.config
        how = {"folder": self.folder, "forget": c["forget"], "retain": c["retain"], "importance": c["importance"], "steps": f"{max(0, self.steps_done)} of {c['steps']}"}
        if self.steps_done < 0:
            return html_card("Run", how, pd.DataFrame())
        if self.steps_done >= 1:
            s = self.separability("top1")
            how["separability (top1)"] = f"{s.percent:.0f}% [{s.percent_interval[0]:.0f}, {s.percent_interval[1]:.0f}]"
        table = self.trajectory.pivot(index="step", columns="role", values=["top1", "loss"])
        table.columns = [f"{role} {metric}" for metric, role in table.columns]
        shown = table.iloc[np.unique(np.linspace(0, len(table) - 1, 11).astype(int))]
        return html_card("Run", how, shown.reset_index())


def open_folder(folder: Path, config: dict[str, Any]) -> Run:
    """The run of this configuration in a folder: a new one, or the one that is there; another one is refused."""
    path = folder / "config.json"
    if path.exists():
        run = Run(folder)
        different = differing_fields(run.config, config)
        if different:
            listed = "; ".join(f"{k}: {a!r} there, {b!r} asked for" for k, (a, b) in different.items())
            raise FileExistsError(f"{folder} holds a run of another configuration ({listed}). Use another folder; nothing was changed.")
        return run
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty and holds no run. Use another folder; nothing was changed.")
    write_json(path, config)
    return Run(folder)


def differing_fields(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Fields that make two configurations different runs; versions and machine facts do not."""
    ignored = {"versions", "created"}
    plain = json.loads(json.dumps(new))
    return {k: (old.get(k), plain.get(k)) for k in [*old, *(k for k in plain if k not in old)] if k not in ignored and old.get(k) != plain.get(k)}


def metrics_of(evaluation: Evaluation) -> dict[str, Any]:
    """One evaluation as it is recorded."""
    return {"task": evaluation.task, "metrics": evaluation.as_row(), "skip_tokens": list(evaluation.skip_tokens), **{k: evaluation.info[k] for k in ("sample", "tokens", "asked")}}


__all__ = ["METRICS", "Run", "open_folder"]
