"""Configuration of the study of modules: the same object is the API, the command line and the saved JSON (METHODS 12)."""

from dataclasses import dataclass
from typing import Any, Literal

from sepcap.checks import check_fields, distinct
from sepcap.experiments.config import PruningConfig


@dataclass(frozen=True)
class ModulesConfig:
    """Whether the neurons selected for tasks lie together in clusters of neurons that read alike ([MOE], [MOD]; METHODS 12)."""

    tasks: tuple[Any, ...] = ("local-python", "local-cpp")
    """Whose neurons are selected: names or paths (in Python anything that `load_task` takes; a Task has a name of its own)."""
    retain: Any = "local-prose"
    """The task that all of them are scored against."""
    model: str = "default"
    """"default", a folder, or a hub name."""
    fractions: tuple[float, ...] = (0.01, 0.02, 0.05)
    """Shares of the mlp that are selected, the highest scores over all layers; all are cut from the same scores."""
    importance: Literal["abs", "sqrt", "rms", "std", "freq", "mean_shift"] = "abs"
    """Importance function."""
    k: int = 96
    """Clusters per layer."""
    n_init: int = 1
    """Starts of k-means, of which the best one is kept."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Every seed is one repetition: other documents, another start of k-means, other random weights. Intervals are over seeds. No two
    seeds have a document in common where a task has enough for all of them; else a warning and the tables say what they share."""
    control: bool = True
    """The same in a randomly initialised model of the same configuration. Without it half of the time and memory is saved."""
    draws: int = 1000
    """Random sets of neurons that give what chance gives. The smallest p is 1/(draws + 1): that a set is more concentrated than 99%
    of random ones takes 99."""
    tokens: int = 8_000
    """Token positions per task and seed from which statistics are collected, to within a document. By default about 32 documents: five
    seeds leave room in every local task."""
    batch_size: int = 16
    """Rows per forward pass."""
    context: int | None = None
    """Tokens per row; default is the model's context, at most 512."""
    per_document: int | Literal["row"] | None = "row"
    """Most tokens of one document: "row" for what fits one row, a number, or None for whole documents as they come."""

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.tasks:
            raise ValueError(f"tasks={self.tasks!r}: give a tuple of at least one")
        distinct("fractions", self.fractions)
        distinct("seeds", self.seeds)
        if self.k < 2:
            raise ValueError(f"k={self.k}: give at least 2 clusters; in one alone nothing is more or less concentrated")
        for fraction in self.fractions:
            # shares and importance follow the rules of a pruning run of one step
            PruningConfig(fractions={"mlp": fraction}, steps=1, importance=self.importance)
