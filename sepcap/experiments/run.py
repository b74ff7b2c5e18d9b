"""A run is a folder: written step by step, each step whole or not at all, read back as one object."""

import json
import os
import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int

from sepcap.checks import checked
from sepcap.errors import CorruptFile, unknown
from sepcap.evaluation.next_token import Evaluation, clusters_by
from sepcap.experiments.separability import Separability, separability
from sepcap.experiments.step_files import BIASES, NOT_DECISIVE, ROLES, ROTATION, StepFiles, clusters_name
from sepcap.experiments.tables import read_table, same_table
from sepcap.interventions.deletion import delete
from sepcap.interventions.rotation import Rotation
from sepcap.models.sites import write_output_biases
from sepcap.models.weights import fingerprint
from sepcap.selection.neurons import NeuronSet
from sepcap.selection.score import Scores, score
from sepcap.statistics.intervals import Cluster, cluster_sums, in_percent, t_factor
from sepcap.statistics.moments import Statistics
from sepcap.storage import (
    FORMAT,
    PART,
    load_tensors,
    open_regular,
    write_atomically,
    write_json,
)


class Run(StepFiles):
    """A pruning run on disk, finished or not.

    Attributes:
        folder: where it lies.
        config: the resolved configuration, with versions, seeds and fingerprints.
        trajectory: one row per step and task: step, task, role, n, n_documents, every metric with its standard error, perplexity,
            perplexity_ratio (relative to the unpruned model's), neurons gone per site, threshold per site, seconds and tokens of the step.

    Example:
        >>> run = sepcap.Run.load("runs/opt")  # doctest: +SKIP
        >>> run.separability("top1").percent  # doctest: +SKIP
    """

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

    def write_step(
        self,
        step: int,
        record: Mapping[str, Any],
        evaluations: Mapping[str, Evaluation],
        gone: NeuronSet,
        biases: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        """Write one step whole or not at all, then the table of all steps."""
        super().write_step(step, record, evaluations, gone, biases)
        self.write_trajectory()

    def write_trajectory(self) -> None:
        """Write trajectory.parquet from the steps on disk."""
        import io

        buffer = io.BytesIO()
        self._table().to_parquet(buffer, index=False)
        write_atomically(self.folder / "trajectory.parquet", buffer.getvalue())

    def _table(self) -> pd.DataFrame:
        rows = []
        records = [self._record(step) for step in range(self.steps_done + 1)]
        for step, record in enumerate(records):
            for role in ROLES:
                row = {"step": step, "task": record["tasks"][role]["task"], "role": role, **record["tasks"][role]["metrics"]}
                row |= {name: int(row[name]) for name in ("n", "n_documents")}
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

    def to_latex(self, metric: str = "top1", **options: Any) -> str:
        """A metric of both tasks at every step with its 95% interval (Student's t over documents), for a paper.

        Args:
            metric: a column of `.trajectory` that has a standard error beside it.
            options: of `sepcap.latex.latex_table`.
        """
        from sepcap.latex import latex_table

        long = self.trajectory
        if f"{metric}_se" not in long:
            raise unknown("metric", metric, [name.removesuffix("_se") for name in long if name.endswith("_se")])
        gone = [name for name in long if name.startswith("gone_")]
        table = long.loc[long["role"] == "forget", ["step", *gone]].set_index("step")
        table = table.rename(columns=lambda name: name.replace("gone_", "pruned "))
        for role, rows in long.groupby("role", sort=False):
            rows = rows.set_index("step")
            table[str(role)] = rows[metric]
            t = t_factor(len(np.unique(self.clusters(str(role)))))
            for end, sign in (("low", -1), ("high", 1)):
                table[f"{role}_{end}"] = rows[metric] + sign * t * rows[f"{metric}_se"]
        return latex_table(table.reset_index(), **options)

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
        if self.config["importance"] == "random" and role not in self.config["samples"].get("collect", {}):
            raise ValueError(
                f"role={role!r}: random neurons are drawn without statistics, and this run has none; take those of another run"
            )
        with self._way_out(0):
            return Statistics.load(self._checked(0, f"statistics/{role}.safetensors"))

    def scores(self) -> Scores:
        """Scores of the unpruned model, those from which the first step was selected."""
        importance = self.config["importance"]
        if importance == "random":
            raise ValueError("a random run has no scores")
        return score(self.statistics("forget"), self.statistics("retain"), importance, eps=self.config["eps"])

    def rows(self, role: str) -> Float[np.ndarray, "step row count"]:
        """Evaluation sums per row, in the order of `sepcap.evaluation.next_token.COUNTS`."""
        if role not in ROLES:
            raise unknown("role", role, ROLES)
        return np.stack([self._rows(step, role)[0] for step in range(self.steps_done + 1)])

    def clusters(self, role: str, cluster: Cluster = "document") -> Int[np.ndarray, " row"]:
        """The document of every row of `rows`, or the cluster of rows that share a document or a package.

        Raises:
            ValueError: the packages are not known.
        """
        if role not in ROLES:
            raise unknown("role", role, ROLES)
        self._check_step(0)
        _, clusters, groups = self._rows(0, role)
        return clusters_by(cluster, clusters, groups, self.config[role])

    def per_cluster(self, role: str, cluster: Cluster = "document") -> Float[np.ndarray, "step cluster count"]:
        """Evaluation sums per document or per package, of every step."""
        return cluster_sums(self.rows(role), self.clusters(role, cluster))

    def _rows(self, step: int, role: str) -> tuple[np.ndarray, np.ndarray, list[str] | None]:
        """Sums per row of one step, the document of each, and the package of each where it is known."""
        with self._way_out(step):
            tensors, meta = load_tensors(self._file(step, "rows.safetensors"), "rows", (role, clusters_name(role)))
        return tensors[role].numpy(), tensors[clusters_name(role)].numpy(), meta.get("groups", {}).get(role)

    @checked()
    def separability(
        self,
        metric: str = "top1",
        *,
        specific: Literal["forget", "retain"] = "forget",
        baseline: "Run | Sequence[Run] | str | None" = None,
        seed: int = 0,
        cluster: Cluster = "document",
    ) -> Separability:
        """How separable the two tasks are along this run (METHODS 11).

        Args:
            metric: "top1", "top10", "skip50_top1" or "skip50_top10".
            specific: the role on the x axis; "forget" makes 2 the perfect area, "retain" makes it 0.
            baseline: what random neurons to say how far above them the area is: random runs that differ in their seed, or "uniform",
                "per_layer" or "activity" for those of the comparison that this run belongs to.
            seed: of the bootstrap.
            cluster: what is drawn for intervals, "document" or "package" with all documents of it.

        Raises:
            ValueError: no step yet, an unpruned accuracy of 0, random runs that are no baselines of this run, or packages that are not
                known.

        Example:
            >>> run.separability("top1", baseline="per_layer").above_random  # doctest: +SKIP
        """
        from sepcap.experiments.above_random import baselines_of, with_above_random

        if self.steps_done < 1:
            raise ValueError(f"the run in {self.folder} has no pruning step yet")
        forget, retain = (self.per_cluster(role, cluster) for role in ROLES)
        evaluated = self.config.get("samples", {}).get("evaluate")
        samples = None if evaluated is None else (evaluated["forget"], evaluated["retain"])
        result = separability(forget, retain, metric, specific=specific, seed=seed, samples=samples, cluster=cluster)
        if baseline is None:
            return result
        return with_above_random(result, self, baselines_of(self, baseline), seed=seed, cluster=cluster)

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
    def report(
        self,
        path: str | Path | None = None,
        *,
        model: Any = None,
        baseline: "Run | Sequence[Run] | str | None" = None,
        device: str | None = None,
    ) -> Path:
        """One HTML page about the run that needs nothing else; see `sepcap.report.report`."""
        from sepcap.report import report

        return report(self, path, model=model, baseline=baseline, device=device)

    def __repr__(self) -> str:
        c = self.config
        state = "finished" if self.finished else f"{max(0, self.steps_done)} of {c['steps']} steps"
        if damaged := self.damage():
            state = f"damaged: {damaged[0]}"
        fractions = ", ".join(f"{k} {v}" for k, v in c["fractions"].items())
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
                how["separability (top1)"] = in_percent(s.percent, s.percent_interval)
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
        raise FileExistsError(f"{folder} is not empty and holds no run (no config.json). Use another folder; nothing was changed.")
    return None


def begin_run(folder: Path, config: dict[str, Any]) -> Run:
    """A new run in an empty folder."""
    write_json(folder / "config.json", {"format": FORMAT, **config})
    return Run(folder)


def differing_fields(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Fields that make two configurations different runs; versions and where the texts were found do not."""
    plain = json.loads(json.dumps(new))
    names = [name for name in dict.fromkeys([*old, *plain]) if name not in NOT_DECISIVE]
    return {name: (old.get(name), plain.get(name)) for name in names if not _same(old.get(name), plain.get(name))}


def _same(old: Any, new: Any) -> bool:
    """Equal, where in a mapping of fractions 1 (one neuron) is not 1.0 (all)."""
    return json.dumps(old, sort_keys=True) == json.dumps(new, sort_keys=True) if isinstance(old, dict) else old == new


def metrics_of(evaluation: Evaluation) -> dict[str, Any]:
    """One evaluation as it is recorded."""
    sample = {name: evaluation.info[name] for name in ("sample", "tokens", "asked")}
    return {"task": evaluation.task, "metrics": evaluation.as_row(), "skip_tokens": list(evaluation.skip_tokens), **sample}
