"""Configuration of reproductions: the stored studies, and the options of a reproduction."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from typing import Any, Literal

from sepcap.checks import check_fields
from sepcap.errors import unknown
from sepcap.studies.ablations.config import AblationSweepConfig
from sepcap.studies.overlaps.config import OverlapConfig
from sepcap.studies.pruning.config import PruningConfig

KINDS: dict[str, type] = {"prune": PruningConfig, "ablate": AblationSweepConfig, "overlap": OverlapConfig}
"""Kind of a study -> configuration of its runs."""

TASK_FIELDS = ("forget", "retain", "task")
"""Fields of a run that name a role, which the set of tasks of the model maps to a task."""


@dataclass(frozen=True)
class Study:
    """One stored study of a paper: data, in assets/studies.json.

    Attributes:
        name, title, source, note: the study, its publication, and caveats for the comparison.
        kind: "prune", "ablate" or "overlap".
        config: fields that all runs share; runs: name -> fields of its own; budgets: name -> fields that set the amount of work.
        tasks: set of tasks -> role in the runs -> name of a task.
        models: the paper's models and "default" -> name of their set of tasks.
        quantities: rows of the table: the quantity, its run, its measure, and model -> published value.
    """

    name: str
    title: str
    source: str
    note: str
    kind: Literal["prune", "ablate", "overlap"]
    config: dict[str, Any]
    runs: dict[str, dict[str, Any]]
    budgets: dict[str, dict[str, Any]]
    tasks: dict[str, dict[str, str]]
    models: dict[str, str]
    quantities: list[dict[str, Any]]

    def tasks_of(self, model: str) -> dict[str, str]:
        """Role -> task for a model; a model that is not in the paper gets the paper's tasks."""
        return self.tasks[self.models.get(model, "paper")]

    def configs(self, model: str, budget: str | Mapping[str, Any], tasks: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Name -> configuration of every run.

        Args:
            model: "default", a folder, or a hub name.
            budget: name of a stored budget, or fields that replace those of the paper's budget in every run.
            tasks: role -> task to use in place of the stored one.
        """
        fields = self.budgets[budget] if isinstance(budget, str) else self.budgets["paper"] | dict(budget)
        roles = self.tasks_of(model)
        for role in tasks or {}:
            if role not in roles:
                raise unknown("task", role, roles, f"These are the names of the tasks in {self.name}.")
        roles = roles | dict(tasks or {})
        made = {}
        for name, own in self.runs.items():
            options: dict[str, Any] = self.config | fields | own
            options = {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}
            if self.kind == "overlap":
                options |= {"retain": roles["retain"], "tasks": tuple(task for role, task in roles.items() if role != "retain")}
            else:
                options |= {key: roles[str(options[key])] for key in TASK_FIELDS if key in options}
            made[name] = KINDS[self.kind](model=model, **options)
        return made


@cache
def studies() -> dict[str, Study]:
    """All stored studies by name."""
    stored = json.loads((files("sepcap") / "assets" / "studies.json").read_text(encoding="utf-8"))
    return {name: Study(name, **fields) for name, fields in stored.items()}


@dataclass(frozen=True)
class ReproductionConfig:
    """Which study is reproduced, on which model, and with which budget."""

    study: str
    """"sp-table2", "sp-figure1", "sep-areas", "peak-ablation" or "modularity-overlap"."""
    model: str = "default"
    """"default" (with the offline tasks), a folder, or a hub name (with the paper's tasks)."""
    budget: Any = None
    """"paper": as published; "minutes": small enough for the embedded model on two cores. The default is "minutes" for the embedded
    model and "paper" for any other. In Python also a mapping of fields that replace the paper's in every run."""
    tasks: Mapping[str, Any] = field(default_factory=dict)
    """Other tasks in place of the stored ones, by their names in the study: {"code": "local-code", "pile": "my-texts.jsonl"}."""
    dtype: Literal["float32", "bfloat16", "float16", "float64"] = "float32"
    """Precision of the model."""
    device: str | None = None
    """Device of the model, such as cpu, cuda, cuda:1 or mps; default is the GPU if there is one."""
    batch_size: int | None = None
    """Rows per forward pass; default is that of the study."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.study not in studies():
            raise unknown("study", self.study, studies())
        budgets = studies()[self.study].budgets
        if isinstance(self.budget, Mapping):
            fields = {field.name for field in dataclasses.fields(KINDS[studies()[self.study].kind])}
            allowed = fields - {"model", "tasks", *TASK_FIELDS}
            for name in self.budget:
                if name not in allowed:
                    raise unknown("field of the budget", name, allowed)
        elif self.budget is not None and self.budget not in budgets:
            raise unknown("budget", self.budget, budgets, "In Python it can also be a mapping, {'tokens': 10_000}.")
        self.runs()

    @property
    def chosen_budget(self) -> Any:
        """The budget, or the default of the model if none is given."""
        return self.budget if self.budget is not None else "minutes" if self.model == "default" else "paper"

    def runs(self) -> dict[str, Any]:
        """Name -> configuration of every run of the study."""
        runs = studies()[self.study].configs(self.model, self.chosen_budget, self.tasks)
        changes = {} if self.batch_size is None else {"batch_size": self.batch_size}
        return {name: dataclasses.replace(config, **changes) for name, config in runs.items()}

    def protocol(self) -> str:
        """The protocol of the runs in words, and every field that differs from the stored protocol of the paper."""
        runs = self.runs()
        by_words: dict[str, list[str]] = {}
        for name, config in runs.items():
            by_words.setdefault(PROTOCOLS[studies()[self.study].kind](config), []).append(name)
        parts = [words if len(by_words) == 1 else f"{words} ({', '.join(names)})" for words, names in by_words.items()]
        said = f"Protocol: {'; '.join(parts)}."
        published = studies()[self.study].configs(self.model, "paper")
        other = {
            field.name: (getattr(published[name], field.name), value)
            for name, config in runs.items()
            for field in dataclasses.fields(config)
            if field.name not in ("tasks", *TASK_FIELDS) and (value := getattr(config, field.name)) != getattr(published[name], field.name)
        }
        if other:
            listed = ", ".join(f"{name} {_plain(here)} in place of {_plain(there)}" for name, (there, here) in other.items())
            said += f" This differs from the stored protocol of the paper: {listed}."
        return said


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_plain(inner)}" for name, inner in value.items())
    return ", ".join(map(_plain, value)) if isinstance(value, tuple) else f"{value:,}" if isinstance(value, int) else str(value)


def _pruned(c: PruningConfig) -> str:
    each = " and ".join(f"{100 * share:.3g}% of the {site} neurons" for site, share in c.fractions.items())
    how = "at random" if c.importance == "random" else f"by importance {c.importance}"
    return f"{c.steps} step{'s' * (c.steps != 1)} of {each}, {how}"


def _ablated(c: AblationSweepConfig) -> str:
    orders = f"{len(c.seeds)} random order{'s' * (len(c.seeds) > 1)}"
    return f"{c.site} neurons in {c.steps} equal steps and {orders}, with the kinds {', '.join(c.kinds)} on the same neurons"


def _overlapped(c: OverlapConfig) -> str:
    shares = ", ".join(f"{100 * share:.3g}%" for share in c.fractions)
    of = f"{shares} of the neurons of {', '.join(c.sites)}"
    return f"{of} with the highest score against the common retain task, by importance {c.importance}"


PROTOCOLS: dict[str, Callable[[Any], str]] = {"prune": _pruned, "ablate": _ablated, "overlap": _overlapped}
"""Kind of a study -> description of one of its runs."""
