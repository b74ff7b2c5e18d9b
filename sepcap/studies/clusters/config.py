"""Configuration of the modularity study (METHODS 12). The API, the command line and the saved JSON use the same object."""

from dataclasses import dataclass
from typing import Any

from sepcap.checks import check_fields, distinct
from sepcap.selection.names import OfOneTask
from sepcap.studies.base.fields import Sampled, check_fractions

SCORE, LEAST, MOST = "score", "least active", "most active"
CHOSEN = (SCORE, LEAST, MOST)
"""How the neurons of a set are chosen: by their scores, or by activity on the retain task alone, as many per layer."""


@dataclass(frozen=True)
class ModularityConfig(Sampled):
    """Whether the neurons of tasks are concentrated in clusters of neurons with similar input weights ([MOE], [MOD]; METHODS 12)."""

    tasks: tuple[Any, ...] = ("local-python", "local-cpp")
    """Tasks whose neurons are selected: names or paths (in Python anything that `load_task` accepts; a Task has its own name)."""
    retain: Any = "local-prose"
    """The task that all tasks are scored against."""
    model: str = "default"
    """"default", a folder, or a hub name."""
    fractions: tuple[float, ...] = (0.01, 0.02, 0.05)
    """Shares of the mlp neurons that are selected, the highest scores over all layers; all shares use the same scores."""
    importance: OfOneTask = "abs"
    """Importance function."""
    k: int = 96
    """Clusters per layer."""
    n_init: int = 1
    """Number of k-means starts; the best one is kept."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Every seed is one repetition with other documents, another start of k-means and other random weights. Intervals are over seeds.
    No two seeds share a document if a task has enough for all seeds; otherwise a warning and the tables state the shared fraction."""
    control: bool = True
    """Whether to repeat everything in a randomly initialised model of the same configuration. Omitting it halves time and memory."""
    draws: int = 1000
    """Number of random neuron sets that estimate chance. The smallest p is 1/(draws + 1): showing that a set is more concentrated than
    99% of random sets takes 99 draws."""
    tokens: int = 8_000
    """Token positions per task and seed from which statistics are collected, to within a document. The default is about 32 documents,
    so that every local task has enough for five seeds."""

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.tasks:
            raise ValueError(f"tasks={self.tasks!r}: give a tuple of at least one")
        distinct("fractions", self.fractions)
        distinct("seeds", self.seeds)
        if self.k < 2:
            raise ValueError(f"k={self.k}: give at least 2 clusters; with one cluster, concentration is undefined")
        for fraction in self.fractions:
            # shares and importance follow the rules of a pruning run of one step
            check_fractions({"mlp": fraction}, 1, self.importance)
