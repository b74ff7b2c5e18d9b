"""The protocol of [PEAK]: more and more random neurons gone, every kind of ablation on the same ones (METHODS 8)."""

import dataclasses
import io
import math
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm

from sepcap.errors import CorruptFile
from sepcap.evaluation.next_token import Evaluation, evaluate_sample
from sepcap.experiments.ablation_config import AblationProtocol
from sepcap.experiments.ablations import balanced, fit_constants, spread
from sepcap.experiments.provenance import made_with
from sepcap.experiments.run import differing_fields
from sepcap.interventions.ablation import ablate
from sepcap.models.load import load_model
from sepcap.models.sites import site_shape
from sepcap.selection.neurons import NeuronSet, how_many
from sepcap.statistics.collect import collect_sample
from sepcap.statistics.moments import Statistics
from sepcap.storage import PART, load_tensors, read_json, remove_parts, save_tensors, sole_writer, write_atomically, write_json
from sepcap.tasks.batches import TokenSample
from sepcap.tasks.samples import check_context, sample_task
from sepcap.tasks.task import load_task

FORMAT = "ablation-protocol-1"

Cell = tuple[int, int]
"""Seed and step."""


@dataclass(frozen=True, eq=False)
class ProtocolResult:
    """What is left of a model while random neurons are ablated, per kind of ablation.

    Attributes:
        config: the resolved configuration, with versions and fingerprints.
        before: evaluation of the model as it is.
        per_row: (seed, step) -> sums per row [kind, row, count], in the order of the kinds and of `before.per_row`.

    Example:
        >>> result = ProtocolResult.load("runs/peak")  # doctest: +SKIP
        >>> result.summary  # doctest: +SKIP
    """

    config: Mapping[str, Any]
    before: Evaluation
    per_row: Mapping[Cell, np.ndarray]

    @cached_property
    def table(self) -> pd.DataFrame:
        """One row per seed, step and kind: fraction and number of neurons gone, top1, loss, n; fraction 0 is the model as it is."""
        rows = []
        for seed in self.config["seeds"]:
            for step in range(self.config["steps"] + 1):
                for j, kind in enumerate(self.config["kinds"]):
                    after = dataclasses.replace(self.before, per_row=self.per_row[seed, step][j]) if step else self.before
                    fraction = step / self.config["steps"]
                    row = {"fraction": fraction, "neurons": int(fraction * self.config["neurons"] + 1e-9), "seed": seed, "kind": kind}
                    rows.append(row | {"top1": after.top1, "loss": after.loss, "n": after.n})
        return pd.DataFrame(rows)

    @cached_property
    def summary(self) -> pd.DataFrame:
        """One row per kind: mean and standard deviation over the seeds (n − 1 in the denominator) of top-1 and loss with half of the
        neurons gone, and of the area under top-1 as a share of the unablated model's (1: nothing is lost, 0: all at once)."""
        rows = []
        for kind, of_kind in self.table.groupby("kind", sort=False):
            values: dict[str, list[float]] = {"top1_at_50": [], "loss_at_50": [], "area": []}
            for _, line in of_kind.groupby("seed", sort=False):
                gone, top1 = line["fraction"].to_numpy(), line["top1"].to_numpy()
                values["top1_at_50"].append(float(np.interp(0.5, gone, top1)))
                values["loss_at_50"].append(float(np.interp(0.5, gone, line["loss"].to_numpy())))
                with np.errstate(invalid="ignore", divide="ignore"):  # a model without any hit has nothing to lose
                    values["area"].append(float(np.trapezoid(top1, gone) / top1[0]))
            row: dict[str, Any] = {"kind": kind}
            for name, of_seeds in values.items():
                row |= {name: np.mean(of_seeds), f"{name}_sd": np.std(of_seeds, ddof=1) if len(of_seeds) > 1 else np.nan}
            rows.append(row)
        return pd.DataFrame(rows)

    def figure(self, **options: Any) -> Any:
        """Top-1 and loss against the share of neurons gone, a line per kind."""
        from sepcap import plots

        return plots.ablation_protocol(self, **options)

    @classmethod
    def load(cls, folder: str | Path) -> "ProtocolResult":
        """Read a finished folder.

        Raises:
            FileNotFoundError: there is no protocol, or some of its steps are missing (the same call goes on with it).
        """
        folder = Path(folder)
        if not (folder / "config.json").exists():
            raise FileNotFoundError(f"{folder} holds no ablation protocol: there is no config.json in it")
        config = _config_of(folder)
        cells = {cell: _cell_path(folder, cell) for cell in _cells(config)}
        missing = [cell for cell, path in cells.items() if not path.exists()]
        if missing:
            seed, step = missing[0]
            raise FileNotFoundError(f"{folder} is not finished: {len(missing)} sets are missing, the first is seed {seed}, step {step}")
        return cls(config, Evaluation.load(folder / "before.safetensors"), {cell: _read_cell(path) for cell, path in cells.items()})

    def __repr__(self) -> str:
        c = self.config
        return (
            f"ProtocolResult({c['task']!r}, {c['neurons']:,} {c['site']} neurons in {c['steps']} steps, {len(c['seeds'])} seeds, "
            f"{', '.join(c['kinds'])})"
        )

    def _repr_html_(self) -> str:
        from sepcap.storage import html_card

        how = {name: self.config[name] for name in ("model", "task", "site", "steps", "seeds")}
        return html_card("Ablation protocol", how, self.summary)


def ablation_protocol(model: Any = None, config: AblationProtocol | None = None, *, out: str | Path | None = None) -> ProtocolResult:
    """Ablate random neurons in equal steps up to all of them, in several ways, and measure top-1 and loss.

    All kinds are measured on the same neurons; the neurons of a step are among those of the next. With `out`, every set is
    written before the next begins, the same call goes on where an interrupted one stopped, and a finished folder is read.

    Args:
        model: what `load_model` returns; default is to load `config.model`.
        config: what to do; default is [PEAK]'s protocol on the embedded model.
        out: folder for config.json, the sums per row of every set, the statistics and table.parquet.

    Returns:
        ProtocolResult with `.table`, `.summary` and `.figure()`.

    Raises:
        ValueError: steps so small that they hold no neuron, too little text.
        FileExistsError: the folder holds something else (the differing fields are named).

    Source: [PEAK] section 3; METHODS section 8.

    Example:
        >>> config = AblationProtocol(task="local-prose", steps=5)  # doctest: +SKIP
        >>> ablation_protocol(model, config, out="runs/peak").summary  # doctest: +SKIP
    """
    config = config or AblationProtocol()
    model = load_model(config.model if model is None else model)
    total = math.prod(site_shape(model, config.site))
    how_many(1 / config.steps, total, config.site)
    task = load_task(config.task)
    context = check_context(model, config.context)
    sample = sample_task(model, task, "evaluate", config.tokens, context)
    collected = sample_task(model, task, "collect", config.reference_tokens, context)
    resolved = dataclasses.asdict(dataclasses.replace(config, task=task.name)) | {
        "format": FORMAT,
        "context": context,
        **made_with(model),
        "neurons": total,
        "samples": {"collect": collected.fingerprint, "evaluate": sample.fingerprint},
        "documents": {"collect": list(collected.indices), "evaluate": list(sample.indices)},
    }
    folder = None if out is None else Path(out)
    if folder is not None:
        _check_folder(folder, resolved)
        folder.mkdir(parents=True, exist_ok=True)
    with sole_writer(folder) if folder is not None else nullcontext():
        return _Protocol(model, config, sample, collected, folder, resolved).run()


@dataclass
class _Protocol:
    """One protocol while it is carried out."""

    model: Any
    config: AblationProtocol
    sample: TokenSample
    collected: TokenSample
    folder: Path | None
    resolved: dict[str, Any]

    def run(self) -> ProtocolResult:
        cells = _cells(self.resolved)
        if self.folder is not None:
            # looked at again: another process may have written between the look and the lock
            _check_folder(self.folder, self.resolved)
            remove_parts(self.folder)
            if not (self.folder / "config.json").exists():
                write_json(self.folder / "config.json", self.resolved)
        paths = {} if self.folder is None else {cell: _cell_path(self.folder, cell) for cell in cells}
        per_row = {cell: _read_cell(path) for cell, path in paths.items() if path.exists()}
        before = self._before()
        reference = self._reference() if len(per_row) < len(cells) else None
        passes = len(self.config.kinds)
        bar = tqdm(total=len(cells) * passes, initial=len(per_row) * passes, desc=f"ablate {self.sample.task}", unit="pass", disable=None)
        with bar:
            for cell in cells:
                if cell in per_row:
                    continue
                per_row[cell] = self._ablated(cell, reference, bar)
                if paths:
                    save_tensors(paths[cell], {"per_row": torch.from_numpy(per_row[cell])}, {"kind": "protocol"})
        result = ProtocolResult(_config_of(self.folder) if self.folder else self.resolved, before, per_row)
        if self.folder is not None:
            table = io.BytesIO()
            result.table.to_parquet(table, index=False)
            write_atomically(self.folder / "table.parquet", table.getvalue())
        return result

    @property
    def _batch_size(self) -> int:
        return balanced(len(self.sample.rows), self.config.batch_size)

    def _before(self) -> Evaluation:
        path = None if self.folder is None else self.folder / "before.safetensors"
        if path is not None and path.exists():
            return Evaluation.load(path)
        before = evaluate_sample(self.model, self.sample, batch_size=self._batch_size)
        if path is not None:
            before.save(path)
        return before

    def _reference(self) -> Statistics | None:
        if not set(self.config.kinds) - {"zero", "resample"}:
            return None
        path = None if self.folder is None else self.folder / "reference.safetensors"
        if path is not None and path.exists():
            return Statistics.load(path)
        reference = collect_sample(self.model, self.collected, (self.config.site,), batch_size=self.config.batch_size, histogram=True)
        if path is not None:
            reference.save(path)
        return reference

    def _ablated(self, cell: Cell, reference: Statistics | None, bar: Any) -> np.ndarray:
        seed, step = cell
        # of the same random ranks a larger share holds the smaller one
        neurons = NeuronSet.random(self.model, {self.config.site: step / self.config.steps}, seed=seed)
        rows = []
        for kind in self.config.kinds:
            how: Any = kind
            if kind == "optimal":
                assert reference is not None
                fit = spread(self.collected, self.config.fit_tokens)
                how = fit_constants(self.model, fit, {None: neurons}, reference, batch_size=self.config.batch_size)[None]
            with ablate(self.model, neurons, how, reference=reference, seed=seed):
                rows.append(evaluate_sample(self.model, self.sample, batch_size=self._batch_size, quiet=True).per_row)
            bar.update()
        return np.stack(rows)


def _cells(config: Mapping[str, Any]) -> list[Cell]:
    return [(seed, step) for seed in config["seeds"] for step in range(1, config["steps"] + 1)]


def _cell_path(folder: Path, cell: Cell) -> Path:
    return folder / "rows" / f"seed-{cell[0]}-step-{cell[1]:03d}.safetensors"


def _read_cell(path: Path) -> np.ndarray:
    return load_tensors(path, "protocol")[0]["per_row"].numpy()


def _config_of(folder: Path) -> dict[str, Any]:
    config = read_json(folder / "config.json")
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise CorruptFile(f"{folder / 'config.json'} is not the configuration of an ablation protocol")
    return config


def _check_folder(folder: Path, resolved: Mapping[str, Any]) -> None:
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file; a protocol is a folder. Use another name; nothing was changed.")
    if (folder / "config.json").exists():
        different = differing_fields(_config_of(folder), resolved)
        if different:
            listed = "; ".join(f"{name}: {there!r} there, {asked!r} asked for" for name, (there, asked) in different.items())
            raise FileExistsError(f"{folder} holds another configuration ({listed}). Use another folder; nothing was changed.")
    elif folder.exists() and any(not path.name.endswith(PART) for path in folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty and holds no ablation protocol. Use another folder; nothing was changed.")
