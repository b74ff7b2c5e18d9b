"""Check that a run is unchanged: every file by its SHA-256, and redundant data by comparison (METHODS 10)."""

from pathlib import Path
from typing import Any

import numpy as np

from sepcap.errors import CorruptFile
from sepcap.evaluation.result import COUNTS, Evaluation
from sepcap.storage import load_tensors
from sepcap.studies.pruning.on_disk.run_folder import RunFolder, find_run
from sepcap.studies.pruning.on_disk.step_files import ROLES, ROTATION, clusters_name
from sepcap.studies.pruning.random_neurons.baselines import counts_differ, found_again

LISTED = 5
"""Maximum number of sentences in an error."""


def check_run(run: RunFolder) -> None:
    """Raise an error if a step of a run is damaged, finished or not: the run is not what was written and cannot be resumed.

    Raises:
        CorruptFile: names the files and what to do about them.
    """
    if found := problems(run):
        more = f" ({len(found) - LISTED} more; sepcap check {run.folder} lists all)" if len(found) > LISTED else ""
        raise CorruptFile("\n".join(found[:LISTED]) + more)


def is_left(folder: Path, config: dict[str, Any]) -> bool:
    """Whether the run of a configuration is missing or unfinished in a folder.

    Raises:
        FileExistsError: the folder holds another run, see `find_run`.
        CorruptFile: the run is damaged, see `check_run`.
    """
    run = find_run(folder, config)
    if run is None:
        return True
    check_run(run)
    return not run.finished


def problems(run: RunFolder) -> list[str]:
    """What is wrong with the steps of a run, in sentences; being unfinished is not a problem."""
    found = run.damage()
    if found:
        return found  # files that have changed cannot be checked further
    before: Any = None
    matched = found_again(run) if "matched" in run.config else None
    for step in range(run.steps_done + 1):
        wrong: list[str] = []
        try:
            wrong += _against_rows(run, step)
            now = run.neurons(step)
            record = run.record(step)
            if record["pruned_per_layer"] != {site: now.per_layer(site) for site in now.masks}:
                wrong.append("neurons.safetensors has other numbers of neurons per layer than record.json")
            if before is not None and len(before - now):
                wrong.append(f"neurons.safetensors lacks neurons that were pruned by step {step - 1}")
            before = now
            if matched is not None:
                wrong += counts_differ(run, step, matched)
            if step == 0:
                wrong += _statistics(run)
        except (CorruptFile, ValueError, KeyError, IndexError) as error:
            wrong.append(str(error))
        way = f"delete {run.step_folder(step)} and the steps after it, and the command that made the run recreates them"
        found += [f"{run.step_folder(step)}: {what}; {way}" for what in wrong]
    return found


def _against_rows(run: RunFolder, step: int) -> list[str]:
    """Compare the metrics of a step with its sums per row, and its evaluation tokens with the configuration."""
    tensors, meta = load_tensors(run.step_folder(step) / "rows.safetensors", "rows")
    if list(meta.get("columns", [])) != list(COUNTS) or set(tensors) != {*ROLES, *map(clusters_name, ROLES)}:
        return ["rows.safetensors does not have the columns and roles of a run"]
    wrong = []
    for role, task in run.record(step)["tasks"].items():
        rows, clusters = (tensors[name].numpy() for name in (role, clusters_name(role)))
        # the number of documents is not in the rows but in the configuration
        counted = {"n_documents": run.config.get("n_documents", {}).get("evaluate", {}).get(role)}
        again = Evaluation(task["task"], rows, tuple(task["skip_tokens"]), counted, clusters)
        values = again.as_row()
        same = {"rtol": 1e-9, "atol": 1e-12, "equal_nan": True}  # another order of summation
        differ = [name for name, value in task["metrics"].items() if not np.isclose(value, values.get(name, 0.0), **same)]
        if differ:
            wrong.append(f"record.json has other values of {role} than rows.safetensors and config.json give: {', '.join(differ)}")
        if again.n_clusters > again.n_documents:
            of = f"{again.n_clusters} clusters of {role}, and config.json names {again.n_documents} documents"
            wrong.append(f"rows.safetensors has {of}, each of which is in one cluster")
        asked = run.config["samples"].get("evaluate", {}).get(role, task["sample"])
        if task["sample"] != asked:
            wrong.append(f"record.json: {role} was evaluated on other tokens than config.json names")
    return wrong


def _statistics(run: RunFolder) -> list[str]:
    """Compare sites, shapes and tokens of the statistics with neurons and configuration."""
    wrong, neurons = [], run.neurons(0)
    files = run.record(0)["files"]
    if run.config.get("rotation", "none") != "none" and ROTATION not in files:
        wrong.append(f"record.json does not list {ROTATION}")
    samples = run.config["samples"].get("collect", {})
    for role in ROLES:
        if role not in samples:
            continue
        name, statistics = f"statistics/{role}.safetensors", run.statistics(role)
        if (sample := statistics.info.get("sample")) != samples[role]:
            other = next((r for r in ROLES if samples[r] == sample), None)
            wrong.append(f"{name} holds " + (f"those of {other}" if other else "statistics of other tokens than config.json names"))
        shapes = {site: tuple(mask.shape) for site, mask in neurons.masks.items()}
        if {site: s.shape for site, s in statistics.items()} != shapes:
            wrong.append(f"{name} has other sites or shapes than neurons.safetensors")
    return wrong
