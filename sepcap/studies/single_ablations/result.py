"""The effects of single ablations, with paired intervals over documents (METHODS 19)."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, ClassVar, Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

import sepcap
from sepcap.checks import checked
from sepcap.errors import unknown
from sepcap.evaluation.result import METRICS, Evaluation
from sepcap.selection.neurons import NeuronSet
from sepcap.statistics.intervals import as_columns, bootstrap_intervals, bootstrap_weights, cluster_sums, summed_interval, t_interval
from sepcap.studies.base.result import Figures, StudyResult
from sepcap.studies.base.text import counted
from sepcap.studies.single_ablations import figures

TASKS = ("forget", "retain")
TABLED = ("loss", "top1")
PART = 2_048
"""Units whose bootstrap replicas are in memory at once."""

Role = Literal["forget", "retain"]


@dataclass(frozen=True)
class Delta:
    """Changes of a metric in the shape of the site, [layer, neuron], [layer, head, d_head] or, for whole heads, [layer, head].

    Attributes:
        value: metric without the neuron minus metric with it; the loss in nats. NaN for neurons that were not ablated.
        low, high: ends of the 95% interval, paired, over documents.
    """

    value: Float[Tensor, "layer *unit"]
    low: Float[Tensor, "layer *unit"]
    high: Float[Tensor, "layer *unit"]


class SingleAblations(StudyResult):
    """Effects of every neuron, or head, ablated alone: changes of loss and accuracies on two tasks.

    Attributes:
        config: the resolved configuration.
        tables: "neurons", one row per ablated neuron or head: layer, head and neuron as far as there are any, score, and for both tasks
            delta_loss and delta_top1 with the ends `_low` and `_high` of their 95% intervals, as `delta_loss_forget_low`. "layers", per
            task and layer, and over all layers: of (neurons chosen), ablated, mean_delta_loss with its interval over documents and, for a
            sample, over neurons; sampling_se (the part of its standard error due to the sample of neurons), share_up (share of
            the neurons whose interval lies above 0). "pairs", if there are some: both places, and for both tasks the change of the loss
            and of top1 without both, and their synergy, with intervals.
        tensors: `places` [unit, place], `score` [layer, *neuron], and for each task `forget/before` [row, count], `forget/alone`
            [unit, row, metric] and, for pairs, `forget/together` [pair, row, metric]: changes of the sums of every row, in the order of
            `METRICS`; `forget/clusters` [row]; `pairs` [pair, 2], numbers of units.

    Example:
        >>> found = sepcap.ablate_each(model, layers=3)  # doctest: +SKIP
        >>> found.top(20, task="forget")  # doctest: +SKIP
    """

    STUDY = "single-ablations"
    TITLE = "What is the effect of ablating each neuron alone?"
    FIGURES: ClassVar[Figures] = {
        "score": ("Effect on the task to forget, against the score", figures.effect_and_score),
        "tasks": ("Effects on both tasks", figures.both_tasks),
        "layers": ("Effects over layers", figures.over_layers),
        "backups": ("Synergy of pairs on the task to forget", figures.backups),
        "backups-retain": ("Synergy of pairs on the task to retain", partial(figures.backups, task="retain")),
    }

    @classmethod
    def of(cls, config: dict[str, Any], arrays: Mapping[str, np.ndarray]) -> "SingleAblations":
        """The result with its tables."""
        bare = cls(config, {}, {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()})
        return replace(bare, tables=bare._tables())

    @property
    def unit(self) -> str:
        """ "neuron", or "head"."""
        return "head" if self.config["whole_heads"] else "neuron"

    @property
    def places(self) -> np.ndarray:
        """Places [unit, place]: (layer, neuron), (layer, head, neuron), or (layer, head) of whole heads."""
        return self.tensors["places"].numpy()

    @cached_property
    def before(self) -> dict[str, Evaluation]:
        """Evaluation of the whole model on both tasks."""
        return {task: self._evaluation(task, self.tensors[f"{task}/before"].numpy()) for task in TASKS}

    def _evaluation(self, task: str, per_row: np.ndarray) -> Evaluation:
        stored = self.config["evaluation"][task]
        info = {**stored["info"], "model": self.config["model"], "documents": self.config["documents"][f"{task} evaluate"]}
        groups = None if stored["groups"] is None else tuple(stored["groups"])
        return Evaluation(self.config[task], per_row, tuple(stored["skip_tokens"]), info, self.tensors[f"{task}/clusters"].numpy(), groups)

    @checked()
    def delta(self, task: Role = "forget", metric: str = "loss") -> Delta:
        """The change of a metric by every neuron, with its interval.

        Args:
            task: "forget" or "retain".
            metric: "loss", in nats, "top1", "top10", "skip50_top1" or "skip50_top10".

        Returns:
            Delta: `.value`, `.low` and `.high` in the shape of the site.

        Example:
            >>> harm = found.delta("forget", "loss").value  # doctest: +SKIP
        """
        values = self.paired(self._sums(task, "alone", metric), task, metric)
        shape = self.config["shape"][: self.places.shape[1]]
        whole = torch.full((3, *shape), torch.nan, dtype=torch.float64)
        whole[(slice(None), *self.tensors["places"].T)] = torch.from_numpy(values)
        return Delta(*whole)

    @checked()
    def top(self, n: int = 20, *, task: Role = "forget", metric: str = "loss", least: bool = False) -> NeuronSet:
        """The n neurons, or heads, whose ablation harms a task most: the highest rise of the loss, or the largest fall of an accuracy.

        Args:
            n: how many.
            task: "forget" or "retain".
            metric: as for `delta`.
            least: those whose ablation improves it most, instead.
        """
        if n > len(self.places):
            raise ValueError(f"n={n}: {counted(len(self.places), self.unit)} were ablated; give at most that")
        change = self._sums(task, "alone", metric).sum(1) * (1 if metric == "loss" else -1) * (-1 if least else 1)
        places = self.tensors["places"][np.argsort(-change, kind="stable")[:n].copy()]
        mask = torch.zeros(tuple(self.config["shape"]), dtype=torch.bool)
        mask[tuple(places.T)] = True
        return NeuronSet({self.config["site"]: mask}, {"importance": f"ablation alone, {metric} on {task}", "n": n})

    @checked()
    def examine(self, model: Any, n: int = 50, **how: Any) -> Any:
        """Profiles of the n neurons, or heads, whose ablation harms the task to forget most; see `sepcap.examine` (METHODS 23)."""
        return sepcap.examine(model, self, n=n, **how)

    @checked()
    def synergy(self, task: Role = "forget", metric: str = "loss") -> Float[np.ndarray, "end pair"]:
        """Change without both neurons of a pair minus the changes without each: value, low and high. Above 0: redundancy."""
        together, alone = self._sums(task, "together", metric), self._sums(task, "alone", metric)
        a, b = self.tensors["pairs"].numpy().T
        return self.paired(together - alone[a] - alone[b], task, metric)

    @checked()
    def paired(self, sums: Float[np.ndarray, "unit cluster"], task: str, metric: str) -> Float[np.ndarray, "end unit"]:
        """Changes of a mean, with the ends of their 95% bootstrap intervals: documents are drawn for both models alike."""
        of = self._predictions(task, metric)
        weights = bootstrap_weights(len(of), np.random.default_rng(0))
        ends = []
        # NaN where nothing is predicted, such as a skip50 metric of a task with fewer than 50 distinct targets
        with np.errstate(invalid="ignore", divide="ignore"):
            found = sums.sum(1) / of.sum()
            for begin in range(0, len(sums), PART):
                replicas = weights @ sums[begin : begin + PART].T / (weights @ of)[:, None]
                ends.append(bootstrap_intervals(replicas, len(of)))
        return np.stack([found, *np.concatenate(ends, axis=1)])

    def _sums(self, task: str, which: str, metric: str) -> Float[np.ndarray, "unit cluster"]:
        """Changes of the sums of every document."""
        if task not in TASKS:
            raise unknown("task", task, TASKS)
        if metric not in METRICS:
            raise unknown("metric", metric, METRICS)
        if f"{task}/{which}" not in self.tensors:
            raise ValueError("no pairs were ablated; repeat the call with pairs=, for example pairs=20")
        change = self.tensors[f"{task}/{which}"].numpy()[..., METRICS.index(metric), None].astype(np.float64)
        return cluster_sums(change, self.tensors[f"{task}/clusters"].numpy())[..., 0]

    def _predictions(self, task: str, metric: str) -> Float[np.ndarray, " cluster"]:
        """Predictions of every document."""
        return self.before[task].per_cluster[:, 3 if metric.startswith("skip50") else 0]

    def _tables(self) -> dict[str, pd.DataFrame]:
        names = ["layer", "neuron"] if len(self.config["shape"]) == 2 else ["layer", "head", "neuron"]
        columns: dict[str, Any] = dict(zip(names, self.places.T, strict=False))
        scores = self.tensors["score"].numpy()
        columns["score"] = scores[tuple(self.places.T)].reshape(len(self.places), -1).mean(1)
        for task in TASKS:
            for metric in TABLED:
                found = self.paired(self._sums(task, "alone", metric), task, metric)
                columns |= dict(zip(_ends(f"delta_{metric}_{task}"), found, strict=True))
            columns[f"n_documents_{task}"] = self.before[task].n_documents
        tables = {"neurons": pd.DataFrame(columns)}
        tables["layers"] = pd.DataFrame(list(self._layers(tables["neurons"])))
        if "pairs" in self.tensors:
            tables["pairs"] = self._pairs(names)
        return tables

    def _layers(self, table: pd.DataFrame) -> Iterator[dict[str, Any]]:
        of = self.config["chosen"]
        layers = self.places[:, 0]
        for task in TASKS:
            sums, predictions = self._sums(task, "alone", "loss"), self._predictions(task, "loss")
            for layer in [None, *np.unique(layers).tolist()]:
                here = np.ones(len(layers), dtype=bool) if layer is None else layers == layer
                n = int(here.sum())
                values = sums[here].sum(1) / predictions.sum()
                # the share of the sample in a layer estimates the share of the chosen neurons in it
                left = max(0.0, 1 - len(layers) / of)
                sampling = float(values.std(ddof=1) * np.sqrt(left / n)) if n > 1 else (0.0 if left == 0 else float("nan"))
                _, low, high = self.paired(sums[here].mean(0)[None], task, "loss")[:, 0]
                mean = float(values.mean())
                if left > 0:
                    texts = (high - low) / 2 / _half(len(predictions))
                    low, high = summed_interval(mean, (sampling, texts), (n, len(predictions)))
                up = float((table[f"delta_loss_{task}_low"].to_numpy()[here] > 0).mean())
                found = as_columns("mean_delta_loss", mean, (low, high)) | {"sampling_se": sampling}
                yield {"task": task, "layer": layer, "of": of if layer is None else pd.NA, "ablated": n, **found, "share_up": up}

    @property
    def numbers(self) -> dict[str, float]:
        """The row of a sweep: mean change of the loss and share of the units that raise it, on both tasks, over all layers."""
        whole = self.tables["layers"].query("layer.isna()", engine="python")
        columns = [*_ends("mean_delta_loss"), "share_up"]
        return {f"{name}_{row['task']}": float(row[name]) for row in whole.to_dict("records") for name in columns}

    def _pairs(self, names: list[str]) -> pd.DataFrame:
        columns: dict[str, Any] = {}
        for side, numbers in zip("ab", self.tensors["pairs"].numpy().T, strict=True):
            columns |= {f"{name}_{side}": column for name, column in zip(names, self.places[numbers].T, strict=False)}
        for task in TASKS:
            for metric in TABLED:
                both = self.paired(self._sums(task, "together", metric), task, metric)
                columns |= dict(zip(_ends(f"delta_{metric}_{task}"), both, strict=True))
                columns |= dict(zip(_ends(f"synergy_{metric}_{task}"), self.synergy(task, metric), strict=True))
        return pd.DataFrame(columns)

    def summary(self) -> list[str]:
        """Share of the neurons with an effect on each task, the largest effect, and the pairs with synergy."""
        c, table = self.config, self.tables["neurons"]
        n, what = len(table), f"{c['site']} {self.unit}"
        drawn = f", drawn at random from {c['chosen']:,}" if n < c["chosen"] else ""
        said = [f"{counted(n, what)}{drawn} of {c['model']}, each ablated alone ({c['kind']}), on the same tokens as the whole model."]
        for task in TASKS:
            values, low, high = (table[name].to_numpy() for name in _ends(f"delta_loss_{task}"))
            most = int(np.argmax(values))
            place = ", ".join(f"{name} {table[name].iloc[most]}" for name in ("layer", "head", "neuron") if name in table)
            row = self.tables["layers"].query("task == @task").iloc[0]
            said.append(
                f"{c[task]} ({self.before[task].n:,} predictions in {self.before[task].n_documents:,} documents, cross-entropy "
                f"{self.before[task].loss:.3f} nats): the loss rises for {np.mean(low > 0):.0%} and falls for {np.mean(high < 0):.0%} of "
                f"them with a 95% interval without 0; on average by {row['mean_delta_loss']:+.2g} "
                f"[{row['mean_delta_loss_low']:+.2g}, {row['mean_delta_loss_high']:+.2g}] nats; most by {values[most]:+.3g} "
                f"[{low[most]:+.3g}, {high[most]:+.3g}] ({place}), which is too high by chance if it is the largest of many."
            )
        if "pairs" in self.tables:
            for task in TASKS:
                low, high = (self.tables["pairs"][f"synergy_loss_{task}_{end}"].to_numpy() for end in ("low", "high"))
                said.append(
                    f"Of {counted(len(low), 'pair')}, {int((low > 0).sum()):,} harm {c[task]} by more together than the sum of both alone "
                    f"(backups), {int((high < 0).sum()):,} by less; the others' 95% intervals contain 0."
                )
            if isinstance(c["pairs"], int):
                said.append(
                    f"The {c['pairs']} {self.unit}s of these pairs were chosen by their effect alone on the same texts, which these "
                    "intervals do not take into account."
                )
        return said


def _ends(name: str) -> tuple[str, str, str]:
    return name, f"{name}_low", f"{name}_high"


def _half(clusters: int) -> float:
    """Half width of a 95% interval, in standard errors."""
    return t_interval(0.0, 1.0, clusters)[1]
