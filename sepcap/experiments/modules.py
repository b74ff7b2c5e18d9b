"""Do the neurons of a task form modules: their concentration in MoEfication clusters, with controls (METHODS 12)."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pandas as pd
import torch

from sepcap.checks import checked
from sepcap.errors import unknown
from sepcap.experiments.modules_config import ModulesConfig
from sepcap.experiments.provenance import made_with
from sepcap.experiments.result import Figures, Pieces, StudyResult, is_finished, study_config
from sepcap.experiments.several_tasks import NamedTasks, study_folder
from sepcap.models.load import load_model
from sepcap.models.sites import n_layers, site_shape
from sepcap.models.untrained import untrained
from sepcap.models.views import mlp_input_weights
from sepcap.progress import progress, tell
from sepcap.selection.clusters import (
    Clusters,
    check_clustering,
    cluster_layer,
    input_fingerprint,
    labels_by_index,
    seconds_per_start,
)
from sepcap.selection.concentration import concentration
from sepcap.selection.neurons import NeuronSet, how_many
from sepcap.selection.score import score
from sepcap.statistics.collect import collect_sample
from sepcap.tasks.batches import TokenSample
from sepcap.tasks.samples import check_context, sample_task
from sepcap.tasks.task import load_task

Weights = Literal["trained", "random"]
MEASURES = ("area", "chance", "most")
SURE = 0.01
"""p up to which `Modules.summary` counts a set as more concentrated than chance."""


@dataclass(frozen=True, eq=False, repr=False)
class Modules(StudyResult):
    """Concentration of task neurons in clusters: MoEfication and index mod k, trained and random weights.

    `tables["areas"]` has one row per weights ("trained", "random"), seed, clusters ("moefied", "index"), task, fraction and
    layer (missing: all layers), with the columns of `sepcap.selection.concentration.Concentration.table`. `tensors["curves"]`
    [row, point] and `tensors["chance"]` [row, 3, point] are the curves of its rows of all layers, in their order.
    `tables["estimates"]` and `tables["differences"]` hold what those two methods give task by task.
    `tensors["labels-{weights}-{seed}"]` are the MoEfication clusters, and `tables["clusters"]` has the sum of squared distances
    to their centres (`inertia`) per layer, and the fingerprint of the weights.

    Source: METHODS section 12; [MOE], [MOD].
    """

    STUDY: ClassVar[str] = "modules"
    TITLE: ClassVar[str] = "Do task neurons form modules?"
    FIGURES: ClassVar[Figures] = {
        "curve": ("Share of the task neurons over clusters", "concentration_curve"),
        "profile": ("Concentration by layer", "concentration_profile"),
    }

    def clusters(self, seed: int = 0, weights: Weights = "trained") -> Clusters:
        """The MoEfication clusters of one repetition."""
        name = f"labels-{weights}-{seed}"
        if name not in self.tensors:
            raise unknown("clusters", name, [n for n in self.tensors if n.startswith("labels")])
        table = self.tables["clusters"]
        row = table[(table["weights"] == weights) & (table["seed"] == seed)].iloc[0]
        how = {"method": "moefied", "model": self.config["model"], "seed": seed, "n_init": self.config["n_init"]}
        return Clusters(self.tensors[name].long(), self.config["k"], row["fingerprint"], how)

    def by_seed(self, by: Sequence[str] = ()) -> pd.DataFrame:
        """Area, chance, most and concentration per weights, clusters, fraction and seed, pooled over tasks (and layers).

        Args:
            by: "task" or "layer" or both: what is not pooled.
        """
        for name in by:
            if name not in ("task", "layer"):
                raise unknown("by", name, ("task", "layer"))
        table: Any = self.tables["areas"]
        table = table[(table["layer"].notna() if "layer" in by else table["layer"].isna()) & (table["neurons"] > 0)]
        keys = ["weights", "clusters", "fraction", *by, "seed"]
        # sums of n·x, and then over n: the mean weighted by the neurons of each set
        weighted = table[keys].assign(neurons=table["neurons"], **{name: table[name] * table["neurons"] for name in MEASURES})
        sums = weighted.groupby(keys, sort=False).sum().reset_index()
        for name in MEASURES:
            sums[name] /= sums["neurons"]
        room = sums["most"] - sums["chance"]
        sums["concentration"] = ((sums["area"] - sums["chance"]) / room).where(room > 1e-12)
        return sums

    def estimates(self, by: Sequence[str] = ()) -> pd.DataFrame:
        """Means over seeds with 95% intervals (Student's t over seeds).

        Args:
            by: "task" or "layer" or both: what is not pooled.

        Returns:
            One row per weights, clusters, fraction and what `by` names: area and concentration, each with `_low` and `_high`,
            chance, most, neurons (mean), and seeds. Intervals are missing where there is one seed.
        """
        keys = ["weights", "clusters", "fraction", *by]
        rows = []
        by_seed: Any = self.by_seed(by)
        for key, line in by_seed.groupby(keys, sort=False):
            row = dict(zip(keys, key, strict=True)) | {name: line[name].mean() for name in ("chance", "most", "neurons")}
            for name in ("area", "concentration"):
                row |= interval(name, line[name].to_numpy())
            rows.append(row | {"seeds": len(line)})
        return pd.DataFrame(rows)

    def differences(self, by: Sequence[str] = ()) -> pd.DataFrame:
        """Concentration in MoEfication clusters minus that of each control, seed by seed: mean and 95% interval as in `estimates`.

        Args:
            by: "task" or "layer" or both: what is not pooled.
        """
        keys = ["fraction", *by]
        found: dict[Any, Any] = dict(iter(self.by_seed(by).groupby(["weights", "clusters"], sort=False)))
        rows = []
        for weights, clusters in [key for key in (("trained", "index"), ("random", "moefied")) if key in found]:
            pairs = found["trained", "moefied"].merge(found[weights, clusters], on=[*keys, "seed"], suffixes=("", "_control"))
            pairs["difference"] = pairs["concentration"] - pairs["concentration_control"]
            for key, line in pairs.groupby(keys, sort=False):
                row = {"minus": f"{clusters}, {weights} weights", **dict(zip(keys, key, strict=True))}
                rows.append(row | interval("difference", line["difference"].to_numpy()) | {"seeds": len(line)})
        return pd.DataFrame(rows)

    def summary(self) -> list[str]:
        """What was found, in sentences."""
        c = self.config
        estimates = self.estimates().set_index(["weights", "clusters", "fraction"])
        differences = self.differences().set_index(["minus", "fraction"])
        totals: Any = self.tables["areas"][self.tables["areas"]["layer"].isna()]
        said = [
            f"{c['model']}: mlp neurons with the highest scores for {', '.join(c['tasks'])} against {c['retain']}, in {c['k']} clusters "
            "per layer. Area under the cumulative share of a set over clusters, and concentration: 0 as in a random set of that size, "
            f"1 as concentrated as possible. {_over_seeds(len(c['seeds']))}, pooled over tasks and layers."
        ]
        for fraction in c["fractions"]:
            main, index = (estimates.loc["trained", clusters, fraction] for clusters in ("moefied", "index"))
            text = (
                f"Top {fraction:.3g} of the mlp: area {_told(main, 'area')}, random sets {main['chance']:.3f}; "
                f"concentration {_told(main, 'concentration')}, in clusters by index mod k {_told(index, 'concentration')}"
            )
            gaps = [("index, trained weights", "index mod k")]
            if c["control"]:
                random = estimates.loc["random", "moefied", fraction]
                text += f", with random weights in clusters of their own {_told(random, 'concentration')}"
                gaps.append(("moefied, random weights", "random weights"))
            gap = " and ".join(f"{_told(differences.loc[key, fraction], 'difference')} to {name}" for key, name in gaps)
            sets = totals[(totals["weights"] == "trained") & (totals["fraction"] == fraction)]
            # with few draws no p is as small as that: it can only be said that none of them is as concentrated
            smallest = 1 / (c["draws"] + 1)
            than = f"{1 - SURE:.0%} of random sets" if smallest <= SURE else f"every one of {c['draws']} random sets"
            sure = {kind: int((line["p"] <= max(SURE, smallest)).sum()) for kind, line in sets.groupby("clusters")}
            n = len(sets) // 2
            said.append(
                f"{text}. Difference {gap}. More concentrated than {than}: {sure['moefied']} of {n} sets, by index {sure['index']} of {n}."
            )
        return said


def interval(name: str, values: np.ndarray) -> dict[str, float]:
    """Mean of independent repetitions and the ends of its 95% interval (Student's t), those missing where there is one."""
    from scipy import stats

    values = values[np.isfinite(values)]
    n = len(values)
    mean = float(values.mean()) if n else float("nan")
    half = float(stats.t.ppf(0.975, n - 1) * values.std(ddof=1) / np.sqrt(n)) if n > 1 else float("nan")
    return {name: mean, f"{name}_low": mean - half, f"{name}_high": mean + half}


def _over_seeds(seeds: int) -> str:
    what = "other documents, starts of k-means and random weights"
    if seeds > 1:
        return f"In brackets 95% intervals over {seeds} seeds ({what})"
    return f"No intervals: they are over seeds ({what}), of which there is one"


def _told(row: Any, name: str) -> str:
    if not np.isfinite(row[name]):
        return "undefined"  # sets so large or small that every set of their size is equally concentrated
    ends = f" [{row[f'{name}_low']:.3f}, {row[f'{name}_high']:.3f}]" if np.isfinite(row[f"{name}_low"]) else ""
    return f"{row[name]:.3f}{ends}".replace("-", "−")


@dataclass(frozen=True, eq=False)
class ModulesPlan:
    """Everything the study needs, sampled and checked; nothing is written yet."""

    config: ModulesConfig
    model: Any
    tasks: tuple[str, ...]
    samples: dict[tuple[str, int], TokenSample]
    resolved: dict[str, Any]

    @property
    def cells(self) -> list[tuple[Weights, int]]:
        """Weights and seed of every repetition."""
        kinds: tuple[Weights, ...] = ("trained", "random") if self.config.control else ("trained",)
        return [(weights, seed) for weights in kinds for seed in self.config.seeds]

    def tokens(self) -> int:
        """Tokens that go through the models, BOS and padding not counted."""
        return sum(sample.tokens for sample in self.samples.values()) * (1 + self.config.control)

    def cost(self) -> str:
        """What will be done and cost, in one sentence."""
        c, (layers, width) = self.config, site_shape(self.model, "mlp")
        d_model = mlp_input_weights(self.model, 0).shape[1]
        minutes = len(self.cells) * layers * c.n_init * seconds_per_start(width, d_model, c.k) / 60
        control = " and as many randomly initialised models" if c.control else ""
        seeds = f"{len(c.seeds)} seed{'s' * (len(c.seeds) > 1)}"
        return (
            f"{self.model.cfg.model_name}{control}, {seeds}: cluster {layers} layers of {width:,} neurons × {d_model:,} into "
            f"{c.k} each, about {minutes:.2g} min on one core; select neurons for {', '.join(self.tasks)} against "
            f"{self.resolved['retain']}, by {c.importance}: {self.tokens() / 1e6:.3g} M tokens through the models"
        )


def plan_modules(model: Any, config: ModulesConfig) -> ModulesPlan:
    """Load tasks and tokens, and check that every selection and clustering can be made."""
    for fraction in config.fractions:
        how_many(fraction, int(np.prod(site_shape(model, "mlp"))), "mlp")
    check_clustering(model, config.k, config.n_init)
    if config.control:
        untrained(model)  # whether it can be made is found out now, not after the trained model is done
    context = check_context(model, config.context)
    retain = load_task(config.retain)
    named = NamedTasks.of(config.tasks, retain)
    samples = {
        (name, seed): sample_task(model, task, "collect", config.tokens, context, seed)
        for seed in config.seeds
        for name, task in {retain.name: retain, **named.by_name}.items()
    }
    resolved = dataclasses.asdict(dataclasses.replace(config, tasks=named.names, retain=retain.name)) | {
        "context": context,
        **made_with(model),
        "samples": {f"{name}-{seed}": sample.fingerprint for (name, seed), sample in samples.items()},
        "documents": {f"{name}-{seed}": list(sample.indices) for (name, seed), sample in samples.items()},
    }
    return ModulesPlan(config, model, named.names, samples, resolved)


@checked()
def modules(
    model: Any = None, config: ModulesConfig | None = None, *, out: str | Path | None = None, say: Callable[[str], None] = tell
) -> Modules:
    """Select the neurons of every task, cluster the mlp neurons of every layer, and measure how concentrated the ones are in the others.

    Controls: clusters by index mod k, a randomly initialised model of the same configuration (with clusters and task neurons
    of its own), and random sets of the same size in the same clusters. With `out`, every layer's clusters and every task's
    neurons are written before the next are begun, the same call goes on where an interrupted one stopped, and a finished folder
    is read.

    Args:
        model: what `load_model` returns; default is to load `config.model`.
        config: what to do; default is the embedded model and the offline tasks.
        out: folder of the study.
        say: receives what is about to happen and cost, before it does.

    Returns:
        Modules with `.summary()`, `.estimates()`, `.differences()` and `.figure()`.

    Raises:
        ImportError: without the extra `clusters`.
        ValueError: a share that selects no neuron, more clusters than neurons, too little text.
        FileExistsError: the folder holds something else (the differing fields are named).

    Source: METHODS section 12; [MOE], [MOD].

    Example:
        >>> found = sepcap.modules(config=sepcap.ModulesConfig(seeds=(0, 1, 2)), out="runs/modules")  # doctest: +SKIP
        >>> print(*found.summary(), sep="\\n")  # doctest: +SKIP
    """
    config = config or ModulesConfig()
    prepared = plan_modules(load_model(config.model if model is None else model), config)
    with study_folder(out, Modules, prepared.resolved) as pieces:
        finished = is_finished(pieces)
        say(f"{out} is finished; nothing is computed again" if finished else prepared.cost())
        result = Modules.load(pieces.folder) if finished else _measure(prepared, pieces)
    if out is not None and not finished:
        result.save(out)
    return result


def _measure(prepared: ModulesPlan, pieces: Pieces) -> Modules:
    config = prepared.config
    tables, clustered, curves, chances, labels = [], [], [], [], {}
    work = len(prepared.cells) * (n_layers(prepared.model) + len(prepared.tasks))
    with progress(total=work, desc="modules", unit="piece", leave=True) as bar:
        for weights, seed in prepared.cells:
            cell = _Cell(prepared, pieces, weights, seed, bar)
            moefied, chosen = cell.clusters(), cell.neurons()
            index = Clusters(labels_by_index(moefied.labels >= 0, config.k), config.k, moefied.fingerprint, {"method": "index"})
            labels[f"labels-{weights}-{seed}"] = moefied.labels.int()
            rows = {"layer": range(len(moefied.labels)), "inertia": moefied.info["inertia"], "fingerprint": moefied.fingerprint}
            clustered.append(pd.DataFrame({"weights": weights, "seed": seed} | rows))
            for clusters in (moefied, index):
                for (task, fraction), neurons in chosen.items():
                    found = concentration(neurons, clusters, draws=config.draws, seed=seed)
                    keys = {"weights": weights, "seed": seed, "clusters": clusters.info["method"], "task": task, "fraction": fraction}
                    tables.append(found.table.assign(**keys)[[*keys, *found.table.columns]])
                    curves.append(found.curve)
                    chances.append(found.chance)
    tensors = {"curves": torch.from_numpy(np.stack(curves)), "chance": torch.from_numpy(np.stack(chances))}
    found = {name: pd.concat(parts, ignore_index=True) for name, parts in (("areas", tables), ("clusters", clustered))}
    result = Modules(study_config(pieces.folder, Modules.STUDY), found, tensors | labels)
    told = {"estimates": result.estimates(("task",)), "differences": result.differences(("task",))}
    return dataclasses.replace(result, tables=told | found)


@dataclass
class _Cell:
    """One repetition while it is carried out: a model, its clusters, and the neurons of every task."""

    prepared: ModulesPlan
    pieces: Pieces
    weights: Weights
    seed: int
    bar: Any

    @cached_property
    def model(self) -> Any:
        return self.prepared.model if self.weights == "trained" else untrained(self.prepared.model)(self.seed)

    @cached_property
    def fingerprint(self) -> str:
        return input_fingerprint(self.model)

    def clusters(self) -> Clusters:
        c = self.prepared.config
        labels, inertia, note = [], [], {}
        for layer in range(n_layers(self.prepared.model)):
            name = f"clusters-{self.weights}-{self.seed}-{layer:03d}"
            if (done := self.pieces.get(name)) is None:
                found, squares = cluster_layer(self.model, layer, c.k, seed=self.seed, n_init=c.n_init)
                done = {"labels": found}, {"inertia": squares, "fingerprint": self.fingerprint}
                self.pieces.put(name, *done)
            tensors, note = done
            labels.append(tensors["labels"])
            inertia.append(note["inertia"])
            self.bar.update()
        return Clusters(torch.stack(labels), c.k, note["fingerprint"], {"method": "moefied", "inertia": inertia})

    def neurons(self) -> dict[tuple[str, float], NeuronSet]:
        """(task, fraction) -> its neurons."""
        return {
            (task, fraction): NeuronSet({"mlp": masks[str(fraction)]})
            for task, masks in self._masks()
            for fraction in self.prepared.config.fractions
        }

    def _masks(self) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
        c, retain = self.prepared.config, None
        for i, task in enumerate(self.prepared.tasks):
            name = f"neurons-{self.weights}-{self.seed}-{i:03d}"
            if (done := self.pieces.get(name)) is None:
                retain = retain or self._collect(self.prepared.resolved["retain"])
                scores = score(self._collect(task), retain, c.importance)
                done = {str(fraction): scores.top({"mlp": fraction}).masks["mlp"] for fraction in c.fractions}, {"task": task}
                self.pieces.put(name, *done)
            self.bar.update()
            yield task, done[0]

    def _collect(self, task: str) -> Any:
        sample = self.prepared.samples[task, self.seed]
        return collect_sample(self.model, sample, ("mlp",), batch_size=self.prepared.config.batch_size, quiet=True)
