"""Labels and data of runs for figures: names, tasks, numbers per step."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from sepcap.drawing.parts import DOTTED
from sepcap.drawing.style import GREY, PALETTE, SYMBOLS, plain, power_of_ten, rounded, with_error
from sepcap.errors import unknown
from sepcap.models.sites import SITES
from sepcap.statistics.intervals import in_percent
from sepcap.studies.base.fields import Schedule
from sepcap.studies.pruning.on_disk.run_folder import RunFolder
from sepcap.studies.pruning.on_disk.step_files import ROLES

# fields of a configuration that may distinguish runs, in order of priority
TELLING = (
    "importance",
    "forget",
    "retain",
    "fractions",
    "model",
    "per_layer",
    "aggregate",
    "rotation",
    "offset",
    "positions",
    "recollect",
    "eps",
    "contrast",
    "lam",
    "q",
    "tokens",
    "seed",
)


def named(runs: Any) -> dict[str, RunFolder]:
    """Runs by escaped label, from one run, a sequence of runs or a mapping from label to run.

    Without labels, runs are named by the fields that differ.
    """
    if isinstance(runs, RunFolder):
        runs = [runs]
    if not isinstance(runs, Mapping | Sequence) or isinstance(runs, str) or not runs:
        raise TypeError(f"runs is {runs!r}; give a Run, a list of runs, or a mapping from label to run")
    listed = list(runs.values()) if isinstance(runs, Mapping) else list(runs)
    for run in listed:
        if not isinstance(run, RunFolder):
            raise TypeError(f"runs holds a {type(run).__name__}; every entry is a sepcap.Run")
        if run.steps_done < 0:
            raise ValueError(f"the run in {run.folder} has no step yet: there is nothing to draw")
    labels = [plain(label) for label in runs] if isinstance(runs, Mapping) else _labels(listed)
    # two names that differ only in their middle look the same when shortened
    labels = [label if labels.count(label) == 1 else f"{label} ({i + 1})" for i, label in enumerate(labels)]
    return dict(zip(labels, listed, strict=True))


def _labels(runs: list[RunFolder]) -> list[str]:
    vary = [f for f in TELLING if len({repr(_value(run, f)) for run in runs}) > 1]
    if {"forget", "retain"} <= set(vary):
        vary.remove("retain")  # for two opposite directions one name is enough
    return [plain(", ".join([run.config["importance"], *(_said(f, _value(run, f)) for f in vary if f != "importance")])) for run in runs]


def _value(run: RunFolder, field: str) -> Any:
    """The value of a field, and for the fractions what every step prunes."""
    return Schedule.of(run.config) if field == "fractions" else run.config.get(field)


def _said(field: str, value: Any) -> str:
    if isinstance(value, Schedule):
        if value.given:
            return value.words(_amount, " + ")
        return " + ".join(_amount(amount, site) for site, amount in value.fractions.items())
    return f"default {field}" if value is None else f"{field} {value}"


def _amount(amount: float, site: str) -> str:
    return f"{amount} {site}" if isinstance(amount, int) else f"{100 * amount:g}% {site}"


def is_random(run: RunFolder) -> bool:
    """Whether a run is a random baseline."""
    return run.config["importance"] == "random"


def colours(runs: Mapping[str, RunFolder]) -> list[str]:
    """Grey for baselines, the palette for the others."""
    selective = 0
    chosen = []
    for run in runs.values():
        chosen.append(GREY if is_random(run) else PALETTE[selective % len(PALETTE)])
        selective += not is_random(run)
    return chosen


def symbols(runs: Mapping[str, RunFolder]) -> list[str]:
    """A symbol per run: if colours repeat, each gets a different symbol."""
    return [SYMBOLS[(i + i // len(SYMBOLS)) % len(SYMBOLS)] for i in range(len(runs))]


def seeds_together(runs: Any) -> dict[str, list[RunFolder]]:
    """Groups of runs that differ only in their seed, by label.

    In a mapping, the runs of a list are grouped under its label; a run with its own label stays alone.
    """
    if isinstance(runs, Mapping):
        lists = {label: [value] if isinstance(value, RunFolder) else value for label, value in runs.items()}
        if any(not isinstance(members, Sequence) or isinstance(members, str) or not members for members in lists.values()):
            raise TypeError(
                f"runs holds {list(lists.values())!r}; every entry is a sepcap.Run, or a list of runs that differ in their seed"
            )
        firsts = named({label: members[0] for label, members in lists.items()})
        return {label: list(named(list(members)).values()) for label, members in zip(firsts, lists.values(), strict=True)}
    by_label = named(runs)
    groups: dict[str, list[RunFolder]] = {}
    for run in by_label.values():
        settings = {field: _value(run, field) for field in TELLING if field != "seed"}
        groups.setdefault(repr(settings), []).append(run)
    if any(len({run.config.get("seed") for run in members}) < len(members) for members in groups.values()):
        return {label: [run] for label, run in by_label.items()}
    firsts = named([members[0] for members in groups.values()])
    labels = [f"{label}, {len(g)} seeds" if len(g) > 1 else label for label, g in zip(firsts, groups.values(), strict=True)]
    return dict(zip(labels, groups.values(), strict=True)) if len(groups) < len(by_label) else {k: [v] for k, v in by_label.items()}


def tasks_of(run: RunFolder) -> dict[str, str]:
    """Role -> name of its task."""
    return {role: run.config[role] for role in ROLES}


def series(run: RunFolder, role: str, metric: str) -> tuple[np.ndarray, np.ndarray]:
    """A metric and its standard error per step, step 0 first."""
    table = run.trajectory
    if metric not in table or f"{metric}_se" not in table:
        raise unknown("metric", metric, [name for name in table if f"{name}_se" in table])
    here = np.flatnonzero(table["role"] == role)
    here = here[table["step"].to_numpy()[here].argsort()]
    return table[metric].to_numpy(np.float64)[here], table[f"{metric}_se"].to_numpy(np.float64)[here]


def sizes(run: RunFolder) -> dict[str, tuple[int, int]]:
    """Layers and neurons per layer of every pruned site."""
    masks = run.neurons(0).masks
    return {site: (masks[site].shape[0], masks[site][0].numel()) for site in SITES if site in masks}


def pruned_total(run: RunFolder) -> tuple[np.ndarray, int]:
    """Pruned neurons per step over all pruned sites, and their total number before pruning."""
    total = sum(layers * each for layers, each in sizes(run).values())
    per_step = [sum(map(sum, run.record(step)["pruned_per_layer"].values())) for step in range(run.steps_done + 1)]
    return np.array(per_step), total


def separability_said(run: RunFolder, metric: str) -> str:
    """Separability in percent with its interval; empty before the first step."""
    if run.steps_done < 1:
        return ""
    s = run.separability(metric)
    return in_percent(s.percent, s.percent_interval)


def step_hovers(label: str, run: RunFolder, metric: str) -> list[str]:
    """Per step: pruned neurons and the metric of both tasks with standard errors."""
    pruned, total = pruned_total(run)
    values = {role: series(run, role, metric) for role in ROLES}
    said = []
    for step, n in enumerate(pruned):
        lines = [f"<b>{label}</b>, step {step}", f"{n:,} of {total:,} neurons pruned ({n / total:.1%})"]
        lines += [f"{role} {plain(run.config[role])}: {with_error(values[role][0][step], values[role][1][step])}" for role in ROLES]
        said.append("<br>".join(lines))
    return said


def run_line(
    number: int, run: RunFolder, x: np.ndarray, y: np.ndarray, *, name: str, colour: str, symbol: str, hovers: list[str]
) -> go.Scatter:
    """The line of a run in the plane of its two tasks; `number` is its place in the legend."""
    marker = {"color": "white" if is_random(run) else colour, "symbol": symbol, "size": 6, "line": {"color": colour, "width": 1.2}}
    hover = {"name": name, "legendrank": 1000 + number, "hovertext": hovers, "hoverinfo": "text"}
    return go.Scatter(x=rounded(x), y=rounded(y), mode="lines+markers", line={"color": colour, "width": 1.5}, marker=marker, **hover)


def baselines_first(lines: Sequence[go.Scatter], runs: Mapping[str, RunFolder]) -> list[go.Scatter]:
    """The lines of the runs in the order in which they are drawn: baselines are below the other runs."""
    of_random = [is_random(run) for run in runs.values()]
    return [lines[i] for i in sorted(range(len(lines)), key=lambda i: not of_random[i])]


def guide(x: list[Any], y: list[Any], name: str) -> go.Scatter:
    """The dotted lines on which the tasks are not separable."""
    return go.Scatter(x=x, y=y, mode="lines", name=name, line=DOTTED, hoverinfo="skip", legendrank=2000)


def scientific(value: float) -> str:
    """A tick as a power of ten, with a factor if it is not 1."""
    power = math.floor(math.log10(value) + 1e-9)
    factor = round(value / 10.0**power)
    return ("" if factor == 1 else f"{factor}·") + power_of_ten(power)
