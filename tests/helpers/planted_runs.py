"""Runs with planted accuracies, written through the very functions that a real run is written with."""

import numpy as np
import torch

from sepcap.evaluation.result import COUNTS, Evaluation
from sepcap.selection.neurons import NeuronSet
from sepcap.statistics.moments import SUMS, NeuronStatistics, Statistics
from sepcap.studies.pruning.on_disk.run_folder import begin_run, metrics_of
from sepcap.studies.pruning.run import Run

ROW = 200


def rows_of(accuracy: float, rows: int, spread: float) -> np.ndarray:
    """Sums per row whose top-1 accuracy is `accuracy` exactly; the rows lie alternately above and below it by `spread`."""
    values = np.zeros((rows, len(COUNTS)))
    shares = accuracy + min(spread, accuracy) * (-1.0) ** np.arange(rows)
    hits = {
        "n": 1.0,
        "top1": shares,
        "top10": shares,
        "skip50_n": 0.5,
        "skip50_top1": shares / 2,
        "skip50_top10": shares / 2,
        "loss": 8 - 6 * shares,
    }
    for name, value in hits.items():
        values[:, COUNTS.index(name)] = ROW * value
    return values


def statistics_of(sites, seed: int) -> Statistics:
    """Statistics with random sums, of the shapes that a run has."""
    draw = torch.Generator().manual_seed(seed)
    found = {}
    for site, shape in sites.items():
        sums = {name: torch.rand(*shape, generator=draw, dtype=torch.float64) for name in SUMS}
        found[site] = NeuronStatistics(site, 2, sums, torch.zeros(shape), torch.ones(shape))
    return Statistics(found)


def write_run(
    folder, forget, retain, *, tasks=("code", "prose"), importance="abs", sites=None, thresholds=None, rows=40, spread=0.02, **config
) -> Run:
    """A run with these accuracies per step; neurons go in equal shares, the first layers first, or evenly in a random run."""
    sites = sites or {"mlp": (3, 20)}
    steps = len(forget) - 1
    fields = {
        "model": "planted",
        "forget": tasks[0],
        "retain": tasks[1],
        "steps": steps,
        "importance": importance,
        "seed": 0,
        "samples": {},
    }
    run = begin_run(folder, fields | {"fractions": {site: 1 / max(1, steps) for site in sites}, "eps": None} | config)
    if importance != "random":
        for seed, role in enumerate(("forget", "retain")):
            statistics_of(sites, seed).save(run.folder / "statistics" / f"{role}.safetensors")
    for step in range(steps + 1):
        masks = {}
        for site, shape in sites.items():
            n = int(np.prod(shape))
            order = np.random.default_rng(0).permutation(n) if importance == "random" else np.arange(n)
            mask = np.zeros(n, dtype=bool)
            mask[order[: n * step // max(1, steps)]] = True
            masks[site] = torch.from_numpy(mask.reshape(shape))
        pruned = NeuronSet(masks)
        samples = {"forget": "s", "retain": "s"} | config.get("samples", {}).get("evaluate", {})
        evaluations = {
            role: Evaluation(
                tasks[i], rows_of(values[step], rows, spread), (), {"sample": samples[role], "tokens": rows * ROW, "asked": rows * ROW}
            )
            for i, (role, values) in enumerate({"forget": forget, "retain": retain}.items())
        }
        record = {
            "step": step,
            "tasks": {role: metrics_of(e) for role, e in evaluations.items()},
            "pruned_per_layer": {site: pruned.per_layer(site) for site in masks},
            "thresholds": {site: (thresholds or (lambda site, step: 10.0 / step))(site, step) for site in masks} if step else {},
            "seconds": 1.0,
            "tokens": 2 * rows * ROW,
        }
        run.write_step(step, record, evaluations, pruned)
    return Run(folder)


def maker(folder):
    """`write_run` into folders of their own."""
    made = []

    def make(*args, **options) -> Run:
        made.append(None)
        return write_run(folder / f"run{len(made)}", *args, **options)

    return make
