"""Self-contained page about a run; it loads nothing from a network."""

import dataclasses
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from sepcap.drawing.page import Page, Section, Table, page_path, picture, write_page
from sepcap.drawing.style import METRIC_NAMES, SITE_NAMES, capital, with_error
from sepcap.progress import progress
from sepcap.selection.figures import score_histograms
from sepcap.selection.neurons import NeuronSet
from sepcap.statistics.intervals import in_percent
from sepcap.studies.base.fields import Schedule
from sepcap.studies.base.text import documents_in_words
from sepcap.studies.pruning.check_run import check_run
from sepcap.studies.pruning.config import PruningConfig
from sepcap.studies.pruning.figures.areas import areas
from sepcap.studies.pruning.figures.labels import is_random, pruned_total, series, sizes
from sepcap.studies.pruning.figures.pruned_neurons import pruned_neurons
from sepcap.studies.pruning.figures.steps import metric_over_steps, thresholds
from sepcap.studies.pruning.figures.trajectory import trajectory
from sepcap.studies.pruning.generations import generations
from sepcap.studies.pruning.on_disk.run_folder import RunFolder
from sepcap.studies.pruning.on_disk.step_files import ROLES
from sepcap.studies.pruning.random_neurons.above_random import baselines_of, check_baselines, no_baseline, separability_above
from sepcap.studies.pruning.separability import ACCURACIES, Separability
from sepcap.tasks.registry import TASKS

DROP = 80
"""Relative drop of the forget task in percent at which the cost is given, as in [SP]."""


def report(
    run: RunFolder,
    path: str | Path | None = None,
    *,
    model: Any = None,
    baseline: RunFolder | Sequence[RunFolder] | str | None = None,
    device: str | None = None,
) -> Path:
    """Write one self-contained HTML page about a run.

    It contains a summary, trajectory, areas with intervals, metrics over steps, histograms of scores, pruned neurons, thresholds,
    generations before and after, and the configuration. An unfinished run gets a page about the steps it has.

    Generations need the model, which a run folder does not contain. It is loaded by the name in the run's configuration, if it is
    available without a network and has the same weights; the texts are then stored in the folder
    (`generations.json`), so that later pages need no model. If there are none, the page gives the reason.

    Args:
        run: a run, finished or not.
        path: the file to write; default `report.html` in the folder of the run.
        model: the unpruned model of the run, as `load_model` takes or returns it; it is left unchanged.
        baseline: random neurons to compare with, as in `run.separability`: runs that differ in their seed, or the kind of those in the
            comparison that the run belongs to.
        device: where the model is loaded, if none is given; default is the GPU when there is one.

    Returns:
        The path.

    Raises:
        ValueError: `model` has other weights than the run began with, or `baseline` is not a baseline of this run.
        IsADirectoryError: `path` is a folder.
        CorruptFile: a file of a run differs from what was written; then no page is written.

    Example:
        >>> sepcap.Run.load("runs/opt").report()  # doctest: +SKIP
        PosixPath('runs/opt/report.html')

    Source: METHODS 10 and 11, which define the numbers.
    """
    path = page_path(run.folder / "report.html" if path is None else path)
    check_run(run)
    baselines = [] if baseline is None else baselines_of(run, baseline)
    for one in baselines:
        check_run(one)
    if baselines:
        check_baselines(run, baselines)
    texts = generations(run, model, device)
    makers = (_trajectory, _metrics, _neurons) if run.steps_done >= 0 else ()
    c = run.config
    aim = f"forget {c['forget']}, retain {c['retain']}"
    steps = f"{max(0, run.steps_done)} of {c['steps']} pruning steps"
    subject = (str(c.get("model")), steps, documents_in_words(run.n_documents), str(run.folder))
    page = Page(
        title=f"Random baseline: {aim}" if is_random(run) else capital(aim),
        subtitle=", ".join(filter(None, subject)),
        summary=summary_of(run, baselines),
        sections=[make(run, baselines) for make in progress(makers, desc="report", unit="section", leave=True)],
        generations=texts,
        configuration=c,
        again="How to reproduce this run",
        command=command(run),
        command_note=_command_note(c),
    )
    write_page(path, page)
    return path


def summary_of(run: RunFolder, baselines: Sequence[RunFolder]) -> list[str]:
    """Summary of the run, in sentences."""
    c = run.config
    forget, retain, done = c["forget"], c["retain"], run.steps_done
    model = "the embedded model" if c.get("model") == "default" else c.get("model")
    if is_random(run):
        said = [f"Neurons of {model} were removed at random, regardless of {forget} and {retain}: this run is a baseline."]
    else:
        said = [
            f"Neurons of {model} were removed step by step, to forget {forget} and retain {retain}: "
            f"at every step those with the highest score by the importance “{c['importance']}”."
        ]
    with_what = [f"{name} {c[name]}" for name in ("rotation", "offset", "contrast", "lam", "q") if c.get(name, "none") != "none"]
    if with_what:
        said[0] += f" With {' and '.join(with_what)}."
    if not run.finished:
        there = (
            f"{done} of {c['steps']} pruning steps are done" if done >= 0 else "no step is done, not even the unpruned model was measured"
        )
        said.append(f"The run is not finished: {there}.{' Everything below is about these steps only.' if done >= 0 else ''}")
    if done < 0:
        return said
    values = {role: series(run, role, "top1")[0] for role in ROLES}
    if done == 0:
        return [
            *said,
            f"The unpruned model has a top-1 accuracy of {values['forget'][0]:.3f} on {forget} and {values['retain'][0]:.3f} on {retain}.",
        ]
    pruned = run.record(done)["pruned_per_layer"]
    parts = []
    for site, (layers, each) in sizes(run).items():
        n, total = sum(pruned[site]), layers * each
        parts.append(f"{n:,} of {total:,} {SITE_NAMES[site]} ({n / total:.1%})")
    remained = " and ".join(
        f"on {c[role]} from {v[0]:.3f} to {v[-1]:.3f}" + (f" ({v[-1] / v[0]:.1%} of it remained)" if v[0] else "")
        for role, v in values.items()
    )
    said.append(f"After step {done}, {' and '.join(parts)} were pruned. Top-1 accuracy changed {remained}.")
    try:
        said += _separability_in_words(separability_above(run, baselines, "top1"), forget, retain)
    except ValueError as error:
        return [*said, f"Separability is undefined: {error}."]
    alone = "" if baselines else no_baseline(run)
    return [*said, alone] if alone else said


def _separability_in_words(s: Separability, forget: str, retain: str) -> list[str]:
    low, high = s.percent_interval
    known = np.isfinite(low)
    interval = (
        f"95% bootstrap interval {low:.1f}% to {high:.1f}%, over {s.n_clusters[0]:,} and {s.n_clusters[1]:,} clusters of documents"
        if known
        else "its interval is unknown, because there is only one evaluation document"
    )
    said = [
        f"Separability is {s.percent:.1f}% ({interval}), for top-1 accuracy over the whole run: 0% means that both tasks drop "
        "together, 100% that the retain task keeps all of its accuracy until the forget task has lost all."
    ]
    if known and low <= 0 <= high:
        said[0] += " The interval includes 0%: this run does not show that the tasks can be separated."
    if s.area < 1:
        said[0] += f" The direction is reversed: {retain}, which was to be retained, dropped faster than {forget}."
    if s.max_drop_step > 0:
        said.append(
            f"At the step where the tasks are furthest apart on one half of the documents (on all of them step {s.max_drop_step}), on the "
            f"other half {forget} has {_lost(s.max_drop_lost[0])} of its accuracy and {retain} {_lost(s.max_drop_lost[1])}: a differential "
            f"drop of {s.max_drop:.1f} percentage points {_brackets(s.max_drop_interval, 1)}."
        )
    else:
        said.append(f"At no step had {forget} lost a larger share of its accuracy than {retain}.")
    cost = _cost(s)
    if cost is None:
        most = 100 * (1 - s.forget.min() / s.forget[0])
        said.append(f"The loss of {retain} where {forget} has lost {DROP}% is unknown: the latter lost {most:.1f}% at most.")
    else:
        said.append(
            f"Where {forget} had lost {DROP}% of its accuracy, {retain} had {_lost(cost)} "
            f"{_brackets(s.retain_cost_interval(DROP), 1)} (linear interpolation between steps)."
        )
    if s.above_random is not None:
        said.append(f"The area under the trajectory is {s.area:.2f}: {s.above_random_in_words()}.")
    return said


def _lost(percent: float) -> str:
    return f"lost {percent:.1f}%" if percent >= 0 else f"gained {-percent:.1f}%"


def _cost(s: Separability) -> float | None:
    try:
        return s.retain_cost(DROP)
    except ValueError:
        return None


def _trajectory(run: RunFolder, baselines: Sequence[RunFolder]) -> Section:
    words = (
        "The trajectory shows top-1 accuracy on both tasks, relative to the unpruned model, from step to step. On the dotted diagonal both "
        "drop together; the higher above it, the more of the retain task is left as the forget task drops. The area under the trajectory "
        "is 1 if both drop together and 2 if the retain task keeps all of its accuracy until the forget task has lost all; separability "
        "is 100·(area − 1), negative if the retain task drops first. In brackets: 95% bootstrap intervals over documents."
    )
    title = f"Trajectory: accuracy on {run.config['forget']} and {run.config['retain']}"
    runs = [run, *baselines]
    pictures = (
        picture("trajectory", title, lambda: trajectory(runs)),
        picture("areas", "Area under the trajectory, with its interval", lambda: areas(runs)),
    )
    return Section("Trajectory and areas", words, pictures, _areas(run, baselines))


def _areas(run: RunFolder, baselines: Sequence[RunFolder]) -> tuple[Table, ...]:
    """One row per accuracy, if something was pruned."""
    rows = []
    if run.steps_done < 1:
        return ()
    for metric in ACCURACIES:
        row = {"Metric": METRIC_NAMES[metric]}
        # 0, or undefined if no prediction counts
        if not all(series(run, role, metric)[0][0] > 0 for role in ROLES):
            rows.append(row | {"Area": "none: no unpruned accuracy"})
            continue
        s = separability_above(run, baselines, metric)
        cost = _cost(s)
        row |= {
            "Area": f"{s.area:.3f} {_brackets(s.interval, 3)}",
            "Separability": in_percent(s.percent, s.percent_interval),
            "Forget task, first → last step": f"{s.forget[0]:.3f} → {s.forget[-1]:.3f}",
            "Retain task, first → last step": f"{s.retain[0]:.3f} → {s.retain[-1]:.3f}",
            "Largest differential drop": f"{s.max_drop:.1f} {_brackets(s.max_drop_interval, 1)} points, step {s.max_drop_step}",
            f"Retain cost of {DROP}% forget drop": (
                "not reached" if cost is None else f"{cost:.1f}% {_brackets(s.retain_cost_interval(DROP), 1)}"
            ),
        }
        if s.above_random is not None:
            row["Area above random"] = f"{s.above_random:+.3f} {_brackets(s.above_random_interval, 3)}"
        rows.append(row)
    return (Table(pd.DataFrame(rows).fillna("–"), "Areas"),)


def _brackets(interval: tuple[float, float], digits: int) -> str:
    low, high = (round(end, digits) + 0.0 for end in interval)  # no sign on a rounded zero
    end = f"{high:.{digits}f}" if np.isfinite(high) else "not reached"
    return f"[{low:.{digits}f}, {end}]" if np.isfinite(low) else "[unknown]"


def _metrics(run: RunFolder, baselines: Sequence[RunFolder]) -> Section:
    pictures = [
        picture(metric, f"{METRIC_NAMES[metric]} on both tasks during pruning", lambda metric=metric: metric_over_steps(run, metric))
        for metric in ("top1", "loss")
    ]
    pruned, total = pruned_total(run)
    table = {"Step": range(len(pruned)), "Pruned neurons": [f"{n:,} ({n / total:.1%})" for n in pruned]}
    for metric in ("top1", "loss"):
        for role in ROLES:
            column = [with_error(value, error) for value, error in zip(*series(run, role, metric), strict=True)]
            table[f"{METRIC_NAMES[metric]}, {run.config[role]}"] = column
    words = "With one standard error over documents; cross-entropy is in nats per token."
    return Section("Metrics over steps", words, tuple(pictures), (Table(pd.DataFrame(table), "Steps"),))


def _neurons(run: RunFolder, baselines: Sequence[RunFolder]) -> Section:
    words = "Histograms: scores of all neurons of the unpruned model, layer by layer"
    words += "; those pruned by the first step are coloured." if run.steps_done >= 1 else "."

    def scores(site: str) -> Any:
        chosen = None
        if run.steps_done >= 1:
            info = {"threshold": run.record(1)["thresholds"], "per_layer": run.config.get("per_layer")}
            chosen = NeuronSet(run.neurons(1).masks, info)
        return score_histograms(run.scores(), site, neurons=chosen, width="column")

    histograms = (picture(f"scores-{site}", f"Scores of {SITE_NAMES[site]}", lambda site=site: scores(site)) for site in sizes(run))
    pictures = (
        *histograms,
        picture("thresholds", "Threshold: the lowest score that was selected", lambda: thresholds(run)),
        picture("pruned", "Pruned neurons: share of every layer after every step", lambda: pruned_neurons(run)),
    )
    return Section("Scores, thresholds and pruned neurons", words, pictures)


def command(run: RunFolder) -> str:
    """The command line of a run, every option on its own line."""
    lines = [["sepcap", "prune"]]
    for field in dataclasses.fields(PruningConfig):
        value, option = run.config.get(field.name), f"--{field.name.replace('_', '-')}"
        if field.name in ("fractions", "steps") and run.config.get("schedule"):
            continue  # they follow from it
        if field.name == "schedule":
            if value:
                lines.append([option, *(f"{n}:{_amounts(each)}" for n, each in Schedule.of(run.config).phases)])
        elif isinstance(value, bool):
            lines.append([option if value else option.replace("--", "--no-", 1)])
        elif isinstance(value, Mapping):
            lines.append([option, _amounts(value)])
        elif value is not None or (field.name in run.config and field.default is not None):
            lines.append([option, str(value)])
    lines += [[f"--{name}", str(run.config[name]).removeprefix("torch.")] for name in ("dtype", "device") if name in run.config]
    lines.append(["--out", str(run.folder)])
    return " \\\n  ".join(map(shlex.join, lines))


def _amounts(fractions: Mapping[str, float]) -> str:
    return ",".join(f"{site}={share!r}" for site, share in fractions.items())


def _command_note(config: Mapping[str, Any]) -> str:
    note = "In this folder the same command resumes the run, or opens it if it is finished; give another folder to recompute it."
    unnamed = [str(config[role]) for role in ROLES if config[role] not in TASKS]
    if unnamed:
        note += f" {' and '.join(unnamed)} came from a file or from texts in memory: put the path in its place."
    return note
