"""Neuron sets of several tasks against a common one, and what they have in common (METHODS 12)."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from sepcap.errors import CorruptFile
from sepcap.experiments.provenance import made_with
from sepcap.experiments.reproduce_config import OverlapConfig
from sepcap.experiments.run import differing_fields
from sepcap.models.sites import site_shape
from sepcap.selection.neurons import NeuronSet, how_many
from sepcap.selection.overlap import overlap
from sepcap.selection.score import score
from sepcap.statistics.collect import collect_sample
from sepcap.storage import PART, read_json, remove_parts, sole_writer, write_json
from sepcap.tasks.batches import TokenSample
from sepcap.tasks.samples import check_context, sample_task
from sepcap.tasks.task import load_task

FORMAT = "overlaps-1"
RETAIN = "retain"


@dataclass(frozen=True, eq=False)
class Overlaps:
    """Neurons selected for each of several tasks.

    Attributes:
        config: the resolved configuration, with versions and fingerprints.
        neurons: name of the task -> the set selected for it.
    """

    config: Mapping[str, Any]
    neurons: Mapping[str, NeuronSet]

    @cached_property
    def table(self) -> pd.DataFrame:
        """The columns of `sepcap.selection.overlap.overlap` for every pair of tasks, named in `first` and `second`."""
        tables = [overlap(self.neurons[a], self.neurons[b]).assign(first=a, second=b) for a, b in combinations(self.neurons, 2)]
        return pd.concat(tables, ignore_index=True)

    def totals(self) -> list[dict[str, Any]]:
        """The rows of the table that are of all layers together, one per pair and site."""
        return [row for row in self.table.to_dict("records") if pd.isna(row["layer"])]

    def __repr__(self) -> str:
        return f"Overlaps({', '.join(self.neurons)}; {self.config['model']}{', random weights' * self.config['random_weights']})"


@dataclass(frozen=True, eq=False)
class OverlapPlan:
    """Everything the selection needs, sampled and checked; nothing is written yet."""

    config: OverlapConfig
    model: Any
    samples: dict[str, TokenSample]
    resolved: dict[str, Any]

    def tokens(self) -> int:
        """Tokens that go through the model, BOS and padding not counted."""
        return sum(sample.tokens for sample in self.samples.values())

    def cost(self) -> str:
        """What will be done and cost, in one sentence."""
        c = self.config
        neurons = {site: int(np.prod(site_shape(self.model, site))) for site in c.fractions}
        each = ", ".join(f"{fraction:.3g} of {neurons[site]:,} {site} neurons" for site, fraction in c.fractions.items())
        weights = f" with random weights (seed {c.seed})" if c.random_weights else ""
        return (
            f"{self.model.cfg.model_name}{weights}: select {each} for {', '.join(c.tasks)} against {self.samples[RETAIN].task}, by "
            f"{c.importance}; {self.tokens() / 1e6:.3g} M tokens through the model, "
            f"about {len(c.tasks) * sum(neurons.values()) / 1e6:.2g} MB on disk"
        )


def plan_overlaps(model: Any, config: OverlapConfig) -> OverlapPlan:
    """Load tasks and tokens, and check that every selection can be made."""
    for site, fraction in config.fractions.items():
        how_many(fraction, int(np.prod(site_shape(model, site))), site)
    context = check_context(model, config.context)
    tasks = {RETAIN: load_task(config.retain)} | {name: load_task(task) for name, task in config.tasks.items()}
    samples = {name: sample_task(model, task, "collect", config.tokens, context) for name, task in tasks.items()}
    named = {name: task.name for name, task in tasks.items() if name != RETAIN}
    resolved = dataclasses.asdict(dataclasses.replace(config, tasks=named, retain=tasks[RETAIN].name)) | {
        "format": FORMAT,
        "context": context,
        **made_with(model),
        "samples": {name: sample.fingerprint for name, sample in samples.items()},
        "documents": {name: list(sample.indices) for name, sample in samples.items()},
    }
    return OverlapPlan(config, model, samples, resolved)


def select_for_tasks(prepared: OverlapPlan, out: Path) -> Overlaps:
    """Select the neurons of every task; each set is written before the next is collected, and those in `out` are read.

    Raises:
        FileExistsError: the folder holds another configuration (the differing fields are named).
    """
    config, model = prepared.config, prepared.model
    paths = {name: out / f"{name}.safetensors" for name in config.tasks}
    out.mkdir(parents=True, exist_ok=True)
    with sole_writer(out):
        _check_folder(out, prepared.resolved)
        remove_parts(out)
        if not (out / "config.json").exists():
            write_json(out / "config.json", prepared.resolved)
        left = [name for name, path in paths.items() if not path.exists()]
        sites = tuple(config.fractions)
        retain = collect_sample(model, prepared.samples[RETAIN], sites, batch_size=config.batch_size) if left else None
        for name in left:
            assert retain is not None
            forget = collect_sample(model, prepared.samples[name], sites, batch_size=config.batch_size)
            score(forget, retain, config.importance).top(config.fractions).save(paths[name])
    return Overlaps(read_json(out / "config.json"), {name: NeuronSet.load(path) for name, path in paths.items()})


def _check_folder(folder: Path, resolved: Mapping[str, Any]) -> None:
    path = folder / "config.json"
    if path.exists():
        config = read_json(path)
        if not isinstance(config, dict) or config.get("format") != FORMAT:
            raise CorruptFile(f"{path} is not the configuration of a selection for several tasks")
        if different := differing_fields(config, resolved):
            listed = "; ".join(f"{name}: {there!r} there, {asked!r} asked for" for name, (there, asked) in different.items())
            raise FileExistsError(f"{folder} holds another configuration ({listed}). Use another folder; nothing was changed.")
    elif any(not part.name.endswith(PART) for part in folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty and holds no selection for several tasks. Use another folder; nothing was changed.")
