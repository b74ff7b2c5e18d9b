"""The folder of a run: every step is written atomically, and the folder is read back as one object."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from typing_extensions import TypeVar

from sepcap.checks import checked
from sepcap.errors import CorruptFile, unknown
from sepcap.evaluation.result import Evaluation, clusters_by
from sepcap.interventions.deletion import delete
from sepcap.interventions.rotation import Rotation
from sepcap.latex import latex_table
from sepcap.models.sites import write_weights
from sepcap.models.weights import check_fingerprint
from sepcap.selection.neurons import ROTATED, NeuronSet
from sepcap.selection.score import Scores, score
from sepcap.statistics.intervals import Cluster, cluster_sums, in_percent, t_factor
from sepcap.statistics.moments import Statistics
from sepcap.storage import FORMAT, PART, html_card, load_tensors, open_regular, write_atomically, write_json
from sepcap.studies.base.folder import differing_fields
from sepcap.studies.base.provenance import documents_behind
from sepcap.studies.base.text import documents_in_words
from sepcap.studies.pruning.on_disk.step_files import BIASES, LEARNED, ROLES, ROTATION, StepFiles, clusters_name, positions_name
from sepcap.studies.pruning.separability import Separability, separability
from sepcap.tables import read_table, same_table

Loaded = TypeVar("Loaded", bound="RunFolder")


class RunFolder(StepFiles):
    """What is in the folder of a pruning run, and what can be computed from it alone; `Run` adds baselines, figures and the page."""

    @classmethod
    @checked()
    def load(cls: type[Loaded], folder: str | Path) -> Loaded:
        """Open the run in a folder, finished or not.

        Raises:
            FileNotFoundError: there is none.
            CorruptFile: the configuration, or a step before the last one, is damaged or missing. Other files are compared with their
                SHA-256 when they are read; `sepcap check FOLDER` compares all.
        """
        if not os.path.lexists(Path(folder) / "config.json"):
            raise FileNotFoundError(f"{folder} holds no run: there is no config.json in it")
        run = cls(folder)
        if gap := run.gap():
            raise CorruptFile(gap)
        return run

    @checked()
    def write_step(
        self,
        step: int,
        record: Mapping[str, Any],
        evaluations: Mapping[str, Evaluation],
        pruned: NeuronSet,
        biases: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        """Write one step atomically, then the table of all steps."""
        super().write_step(step, record, evaluations, pruned, biases)
        self.write_trajectory()

    def write_trajectory(self) -> None:
        """Write trajectory.parquet from the steps on disk."""
        import io

        buffer = io.BytesIO()
        self.trajectory.to_parquet(buffer, index=False)
        write_atomically(self.folder / "trajectory.parquet", buffer.getvalue())

    @property
    def trajectory(self) -> pd.DataFrame:
        """One row per step and task, see the class."""
        rows = []
        records = [self._record(step) for step in range(self.steps_done + 1)]
        for step, record in enumerate(records):
            for role in ROLES:
                row = {"step": step, "task": record["tasks"][role]["task"], "role": role, **record["tasks"][role]["metrics"]}
                row |= {name: int(row[name]) for name in ("n", "n_documents")}
                with np.errstate(over="ignore", invalid="ignore"):  # a damaged model can have an infinite one
                    row["perplexity_ratio"] = float(np.exp(row["loss"] - np.float64(records[0]["tasks"][role]["metrics"]["loss"])))
                row |= {f"pruned_{site}": sum(layers) for site, layers in record["pruned_per_layer"].items()}
                # nothing is selected in step 0, but the columns are the same in all rows
                row |= {f"threshold_{key}": record["thresholds"].get(key, float("nan")) for key in self.config["fractions"]}
                rows.append(row | {"seconds": record["seconds"], "tokens": record["tokens"]})
        return pd.DataFrame(rows)

    @property
    def n_documents(self) -> tuple[int, int] | None:
        """Documents of the task that is evaluated on fewer of them, and of the other; None if the folder does not record them."""
        return documents_behind(self.config.get("n_documents"))

    @property
    def trajectory_is_behind(self) -> bool:
        """Whether trajectory.parquet does not match the steps: the process was killed between writing the two, or it is damaged."""
        return self.trajectory_damage() != ""

    def trajectory_damage(self) -> str:
        """What is wrong with trajectory.parquet, in words; it is derived from the steps, and no result is read from it."""
        path, right = self.folder / "trajectory.parquet", self.trajectory
        if not len(right):
            return ""
        try:
            with open_regular(path, "table") as file:
                stored = read_table(file, len(right))
        except (FileNotFoundError, IsADirectoryError, CorruptFile) as error:
            return str(error)
        return "" if same_table(stored, right) else f"{path} does not match the steps"

    @checked()
    def to_latex(self, metric: str = "top1", **options: Any) -> str:
        """A metric of both tasks at every step with its 95% interval (Student's t over documents), for a paper.

        Args:
            metric: a column of `.trajectory` that has a standard error.
            options: of `sepcap.latex.latex_table`.
        """
        long = self.trajectory
        if f"{metric}_se" not in long:
            raise unknown("metric", metric, [name.removesuffix("_se") for name in long if name.endswith("_se")])
        pruned = [name for name in long if name.startswith("pruned_")]
        table = long.loc[long["role"] == "forget", ["step", *pruned]].set_index("step")
        table = table.rename(columns=lambda name: name.replace("pruned_", "pruned "))
        for role, rows in long.groupby("role", sort=False):
            rows = rows.set_index("step")
            table[str(role)] = rows[metric]
            t = t_factor(len(np.unique(self.clusters(str(role)))))
            for end, sign in (("low", -1), ("high", 1)):
                table[f"{role}_{end}"] = rows[metric] + sign * t * rows[f"{metric}_se"]
        return latex_table(table.reset_index(), **options)

    @property
    def pruned_per_layer(self) -> pd.DataFrame:
        """Total number of pruned neurons per step, site and layer."""
        rows = [
            {"step": step, "site": site, "layer": layer, "pruned": pruned}
            for step, record in enumerate(map(self._record, range(self.steps_done + 1)))
            for site, layers in record["pruned_per_layer"].items()
            for layer, pruned in enumerate(layers)
        ]
        return pd.DataFrame(rows)

    @checked()
    def neurons(self, step: int | None = None) -> NeuronSet:
        """All neurons pruned up to a step; default the last one. Of a rotated run they are of the rotated model."""
        step = self.steps_done if step is None else step
        self._check_step(step)
        with self._way_out(step):
            found = NeuronSet.load(self._file(step, "neurons.safetensors"))
        if self.config.get("rotation", "none") != "none":
            found.info[ROTATED] = self.config["model_fingerprint"]
        return found

    @checked()
    def apply(self, model: Any, step: int | None = None) -> None:
        """Turn a model into the pruned model of a step: rotated, with its neurons deleted and its output biases offset, as in the run.

        Args:
            model: the unpruned model that the run was made with; it is changed.
            step: default the last one.

        Raises:
            ValueError: another model (nothing is changed then).
            IndexError: a step that the run does not have.
        """
        pruned = self.neurons(step)
        step = self.steps_done if step is None else step
        self.check_model(model)
        biases: dict[str, torch.Tensor] = {}
        with self._way_out(step):
            if self.config.get("offset", "none") != "none":
                biases, _ = load_tensors(self._file(step, BIASES), "biases")
        if self.config.get("rotation", "none") != "none":
            self.rotation().apply(model)
        delete(model, pruned)
        write_weights(model, biases)

    @checked()
    def check_model(self, model: Any) -> None:
        """Raise ValueError if a model is not the unpruned model of the run."""
        check_fingerprint(model, self.config["model_fingerprint"], f"this run was made with, {self.config['model']}")

    def rotation(self) -> Rotation:
        """The basis in which the run prunes attention."""
        if self.config.get("rotation", "none") == "none":
            raise ValueError("this run prunes in the model's own basis: rotation='none'")
        if self.steps_done < 0:
            return Rotation.load(self.folder / ROTATION)
        with self._way_out(0):
            return Rotation.load(self._checked(0, ROTATION))

    @checked()
    def statistics(self, role: Literal["forget", "retain"]) -> Statistics:
        """Statistics of the unpruned model on one of the two tasks, in the rotated basis if the run prunes in it."""
        if role not in ROLES:
            raise unknown("role", role, ROLES)
        if self.config["importance"] == "random" and role not in self.config["samples"].get("collect", {}):
            raise ValueError(
                f"role={role!r}: random neurons are drawn without statistics, and this run has none; take those of another run"
            )
        with self._way_out(0):
            return Statistics.load(self._checked(0, f"statistics/{role}.safetensors"))

    @checked()
    def right_positions(self, role: Literal["forget", "retain"]) -> Bool[torch.Tensor, "row pos"] | None:
        """The positions of the collection texts at which the unpruned model is right; None if statistics are of all positions."""
        if self.config.get("positions", "all") == "all":
            return None
        with self._way_out(0):
            return load_tensors(self._checked(0, positions_name(role)), "positions", ("positions",))[0]["positions"]

    def scores(self) -> Scores:
        """Scores of the unpruned model, from which the first step was selected."""
        importance = self.config["importance"]
        if importance == "random":
            raise ValueError("a random run has no scores")
        if importance == "learned":
            with self._way_out(0):
                return Scores.load(self._checked(0, LEARNED))
        how = {name: self.config[name] for name in ("eps", "contrast", "lam", "q") if name in self.config}
        return score(self.statistics("forget"), self.statistics("retain"), importance, **how)

    @checked()
    def rows(self, role: str) -> Float[np.ndarray, "step row count"]:
        """Evaluation sums per row, in the order of `sepcap.evaluation.next_token.COUNTS`."""
        if role not in ROLES:
            raise unknown("role", role, ROLES)
        return np.stack([self._rows(step, role)[0] for step in range(self.steps_done + 1)])

    @checked()
    def clusters(self, role: str, cluster: Cluster = "document") -> Int[np.ndarray, " row"]:
        """The document of every row of `rows`, or the cluster of rows that share a document or a package.

        Raises:
            ValueError: the packages are not known.
        """
        if role not in ROLES:
            raise unknown("role", role, ROLES)
        self._check_step(0)
        _, clusters, groups = self._rows(0, role)
        return clusters_by(cluster, clusters.copy(), groups, self.config[role])

    @checked()
    def per_cluster(self, role: str, cluster: Cluster = "document") -> Float[np.ndarray, "step cluster count"]:
        """Evaluation sums per document or per package, of every step."""
        return cluster_sums(self.rows(role), self.clusters(role, cluster))

    def _rows(self, step: int, role: str) -> tuple[np.ndarray, np.ndarray, list[str] | None]:
        """Sums per row of one step, the document of each, and the package of each if it is known."""
        path = self._file(step, "rows.safetensors")

        def look() -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
            with self._way_out(step):
                tensors, meta = load_tensors(path, "rows", (*ROLES, *map(clusters_name, ROLES)))
            return {name: tensor.clone() for name, tensor in tensors.items()}, meta  # not a map of the file, which may be deleted

        # kept: every figure, interval and comparison of a run asks for all of its steps
        tensors, meta = self._once(path, look, "rows of ")
        return tensors[role].numpy(), tensors[clusters_name(role)].numpy(), meta.get("groups", {}).get(role)

    @checked()
    def separability(
        self, metric: str = "top1", *, specific: Literal["forget", "retain"] = "forget", seed: int = 0, cluster: Cluster = "document"
    ) -> Separability:
        """How separable the two tasks are along this run (METHODS 11); see `Run.separability`."""
        if self.steps_done < 1:
            raise ValueError(f"the run in {self.folder} has no pruning step yet")
        forget, retain = (self.per_cluster(role, cluster) for role in ROLES)
        evaluated = self.config.get("samples", {}).get("evaluate")
        samples = None if evaluated is None else (evaluated["forget"], evaluated["retain"])
        return separability(forget, retain, metric, specific=specific, seed=seed, samples=samples, cluster=cluster)

    def __repr__(self) -> str:
        c = self.config
        state = "finished" if self.finished else f"{max(0, self.steps_done)} of {c['steps']} steps"
        if damaged := self.damage():
            state = f"damaged: {damaged[0]}"
        fractions = ", ".join(f"{k} {v}" for k, v in c["fractions"].items()) + " by a schedule" * bool(c.get("schedule"))
        parts = (repr(str(self.folder)), f"forget {c['forget']}", f"retain {c['retain']}", c["importance"], fractions)
        return f"Run({', '.join(filter(None, (*parts, documents_in_words(self.n_documents), state)))})"

    def _repr_html_(self) -> str:
        c = self.config
        how = {"folder": self.folder, **{name: c.get(name) for name in ("forget", "retain", "importance", "fractions", "model")}}
        how |= {"steps": f"{max(0, self.steps_done)} of {c['steps']}", "documents": documents_in_words(self.n_documents)}
        if self.steps_done < 0:
            return html_card("Run", how, pd.DataFrame())
        if self.steps_done >= 1:
            try:
                s = self.separability("top1")
                how["separability (top1)"] = in_percent(s.percent, s.percent_interval)
            except ValueError as error:  # an untrained model has no accuracy to lose, which the card states
                how["separability (top1)"] = str(error)
        table = self.trajectory.pivot(index="step", columns="role", values=["top1", "loss"])
        table.columns = [f"{role} {metric}" for metric, role in table.columns]
        shown = table.iloc[np.unique(np.linspace(0, len(table) - 1, 11).astype(int))]
        return html_card("Run", how, shown.reset_index())


Kind = TypeVar("Kind", bound=RunFolder, default=RunFolder)


def find_run(folder: Path, config: dict[str, Any], kind: type[Kind] = RunFolder) -> Kind | None:
    """The run of this configuration in a folder, or None if one can be started.

    Raises:
        FileExistsError: the folder holds another run (the differing fields are named) or something else.
    """
    if os.path.lexists(folder / "config.json"):
        run = kind(folder)
        if different := differing_fields(run.config, config):
            raise FileExistsError(f"{folder} holds a run of another configuration ({different}). Use another folder; nothing was changed.")
        return run
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file; a run is a folder. Use another name; nothing was changed.")
    # a process killed while writing config.json leaves a partial file
    if folder.exists() and any(not (p.name.startswith(".config.json.") and p.name.endswith(PART)) for p in folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty and holds no run (no config.json). Use another folder; nothing was changed.")
    return None


def begin_run(folder: Path, config: dict[str, Any], kind: type[Kind] = RunFolder) -> Kind:
    """Start a new run in an empty folder."""
    write_json(folder / "config.json", {"format": FORMAT, **config})
    return kind(folder)


def metrics_of(evaluation: Evaluation) -> dict[str, Any]:
    """The record of one evaluation."""
    sample = {name: evaluation.info[name] for name in ("sample", "tokens", "asked")}
    return {"task": evaluation.task, "metrics": evaluation.as_row(), "skip_tokens": list(evaluation.skip_tokens), **sample}
