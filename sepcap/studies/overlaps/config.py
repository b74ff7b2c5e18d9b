"""Configuration of the overlap study (METHODS 12). The API, the command line and the saved JSON use the same object."""

from dataclasses import dataclass
from typing import Any, Literal

from sepcap.checks import check_fields, distinct
from sepcap.selection.names import OfOneTask
from sepcap.studies.base.fields import Sampled, check_shares, check_tasks


@dataclass(frozen=True)
class OverlapConfig(Sampled):
    """Overlap of the neuron sets selected for several tasks ([MOD]; METHODS 12)."""

    tasks: tuple[Any, ...] = ("local-python", "local-cpp")
    """Tasks whose neurons are selected: names or paths (in Python anything that `load_task` accepts; a Task has its own name). If one
    task contains another, as local-code contains local-python, their sets overlap by construction, and a warning is issued."""
    retain: Any = "local-prose"
    """The task that all tasks are scored against, each on its own retain documents, so that no two scores share the noise of the same
    documents; or "others": each against the tokens of all other tasks together, which makes the sets of two tasks differ by
    construction."""
    model: str = "default"
    """"default", a folder, or a hub name."""
    sites: tuple[Literal["mlp", "attn_pre_out", "attn_value", "heads"], ...] = ("mlp", "attn_pre_out")
    """Sites, with a separate selection in each; for "heads", whole heads are selected and counted."""
    fractions: tuple[float, ...] = (0.01, 0.02, 0.05, 0.1)
    """Shares of each site that are selected, the highest scores over all layers; all shares use the same scores."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Every seed is one repetition with other documents and other random weights. Intervals are over seeds. No two seeds share a
    document if a task has enough for all seeds; otherwise a warning and the tables state the shared fraction."""
    control: bool = True
    """Whether to repeat everything in a randomly initialised model of the same configuration. Omitting it halves the time."""
    importance: OfOneTask = "abs"
    """Importance function."""
    tokens: int = 10_000
    """Token positions per task and seed from which statistics are collected, to within a document, and as many of the retain task for
    every task. The default is about 40 documents, so that every local task has enough for three seeds."""

    def __post_init__(self) -> None:
        check_fields(self)
        check_tasks(self.tasks, "an overlap needs a pair")
        distinct("sites", self.sites)
        distinct("fractions", self.fractions)
        distinct("seeds", self.seeds)
        check_shares(self, self.sites, self.fractions)
