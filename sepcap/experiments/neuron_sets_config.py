"""Configurations of the studies of neuron sets: the same objects are the API, the command line and the saved JSON (METHODS 12)."""

from dataclasses import dataclass
from typing import Any, Literal

from sepcap.checks import BETWEEN_0_AND_1, check_fields, distinct
from sepcap.experiments.config import PruningConfig

OTHERS = "others"
"""In place of a retain task: every task is scored against all other tasks of the study together."""


@dataclass(frozen=True)
class OverlapConfig:
    """Neurons selected for several tasks, and what those sets have in common ([MOD]; METHODS 12)."""

    tasks: tuple[Any, ...] = ("local-python", "local-cpp")
    """Whose neurons are selected: names or paths (in Python anything that `load_task` takes; a Task has a name of its own). Of two tasks
    of which one holds the other, as local-code does local-python, the sets overlap by construction: a warning says so."""
    retain: Any = "local-prose"
    """The task that all of them are scored against, each against documents of its own, so that no two share the noise of the same
    documents; or "others": each against the tokens of all other tasks together, which makes the sets of two tasks differ by
    construction."""
    model: str = "default"
    """"default", a folder, or a hub name."""
    sites: tuple[Literal["mlp", "attn_pre_out", "attn_value", "heads"], ...] = ("mlp", "attn_pre_out")
    """Populations, each selected by itself; of "heads" whole heads are selected and counted."""
    fractions: tuple[float, ...] = (0.01, 0.02, 0.05, 0.1)
    """Shares of each site that are selected, the highest scores over all layers; all are cut from the same scores."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Every seed is one repetition: other documents, other random weights. Intervals are over seeds. No two seeds have a document in
    common where a task has enough for all of them; else a warning and the tables say what they share."""
    control: bool = True
    """The same in a randomly initialised model of the same configuration. Without it half of the time is saved."""
    importance: Literal["abs", "sqrt", "rms", "std", "freq", "mean_shift"] = "abs"
    """Importance function."""
    tokens: int = 10_000
    """Token positions per task and seed from which statistics are collected, to within a document, and as many of the retain task for
    every task. By default about 40 documents: three seeds leave room in every local task."""
    batch_size: int = 16
    """Rows per forward pass."""
    context: int | None = None
    """Tokens per row; default is the model's context, at most 512."""
    per_document: int | Literal["row"] | None = "row"
    """Most tokens of one document: "row" for what fits one row, a number, or None for whole documents as they come."""

    def __post_init__(self) -> None:
        check_fields(self)
        _check_tasks(self.tasks, "an overlap is of a pair")
        distinct("sites", self.sites)
        distinct("fractions", self.fractions)
        distinct("seeds", self.seeds)
        _check_shares(self, self.sites, self.fractions)


@dataclass(frozen=True)
class CrossTaskConfig:
    """Accuracy on every task after pruning each one to a target accuracy (METHODS 5, 12)."""

    tasks: tuple[Any, ...] = ("local-prose", "local-python", "local-cpp")
    """Tasks that are pruned and evaluated: names or paths (in Python anything that `load_task` takes)."""
    retain: Any = OTHERS
    """The task that all of them are scored against, or "others": each against the tokens of all other tasks together."""
    model: str = "default"
    """"default", a folder, or a hub name."""
    site: Literal["mlp", "attn_pre_out", "attn_value"] = "mlp"
    """Whose neurons are pruned."""
    target: float = 0.5
    """Accuracy to prune a task to, relative to the unpruned model's."""
    tolerance: int = 1
    """Neurons by which the ends of the bisection may differ when it stops."""
    metric: Literal["top1", "top10", "skip50_top1", "skip50_top10"] = "top1"
    """Accuracy that is bisected and reported."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the random neurons, as many as were pruned: the control."""
    importance: Literal["abs", "sqrt", "rms", "std", "freq", "mean_shift"] = "abs"
    """Importance function."""
    tokens: int = 20_000
    """Token positions per task from which statistics are collected."""
    eval_tokens: int = 20_000
    """Predictions per task on which every pruned model is evaluated."""
    batch_size: int = 16
    """Rows per forward pass."""
    context: int | None = None
    """Tokens per row; default is the model's context, at most 512."""
    per_document: int | Literal["row"] | None = "row"
    """Most tokens of one document: "row" for what fits one row, a number, or None for whole documents as they come."""

    def __post_init__(self) -> None:
        check_fields(self, target=BETWEEN_0_AND_1)
        _check_tasks(self.tasks, "one is pruned and another one watched")
        distinct("seeds", self.seeds)
        _check_shares(self, (self.site,), (1.0,))


@dataclass(frozen=True)
class CrossChecksConfig:
    """Checks of a selection from its other side, for a pair of tasks ([SP], [SEP]; METHODS 5, 11)."""

    forget: Any = "local-code"
    """One task of the pair: a name or a path (in Python anything that `load_task` takes)."""
    retain: Any = "local-prose"
    """The other one; every check is made from both sides."""
    checks: tuple[Literal["keep-only", "step-size", "layers", "meeting"], ...] = (
        "keep-only", "step-size", "layers", "meeting",
    )  # fmt: skip
    """Which checks are made."""
    model: str = "default"
    """"default", a folder, or a hub name."""
    site: Literal["mlp", "attn_pre_out", "attn_value"] = "mlp"
    """Whose neurons are selected."""
    fractions: tuple[float, ...] = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
    """Shares of the site: kept in "keep-only", deleted in "meeting"."""
    gone: float = 0.2
    """Share of the site that is gone at the end of every run of "step-size"."""
    steps: tuple[int, ...] = (1, 2, 5, 10)
    """Numbers of equal steps in which that share goes, in increasing order."""
    layer_fraction: float = 0.2
    """Share of every layer that goes in "layers"."""
    metric: Literal["top1", "top10", "skip50_top1", "skip50_top10"] = "top1"
    """Accuracy that is reported."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the random neurons, the control of every check."""
    importance: Literal["abs", "sqrt", "rms", "std", "freq", "mean_shift"] = "abs"
    """Importance function."""
    tokens: int = 20_000
    """Token positions per task from which statistics are collected."""
    eval_tokens: int = 15_000
    """Predictions per task on which every edited model is evaluated."""
    batch_size: int = 16
    """Rows per forward pass."""
    context: int | None = None
    """Tokens per row; default is the model's context, at most 512."""
    per_document: int | Literal["row"] | None = "row"
    """Most tokens of one document: "row" for what fits one row, a number, or None for whole documents as they come."""

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("checks", "fractions", "steps", "seeds"):
            distinct(name, getattr(self, name))
        if list(self.fractions) != sorted(self.fractions):
            raise ValueError(f"fractions={self.fractions}: give them in increasing order")
        if list(self.steps) != sorted(self.steps):
            raise ValueError(f"steps={self.steps}: give them in increasing order")
        _check_shares(self, (self.site,), (*self.fractions, self.gone, self.layer_fraction))


def _check_tasks(tasks: tuple[Any, ...], why: str) -> None:
    if len(tasks) < 2:
        raise ValueError(f"tasks={tasks!r}: give at least two, in a tuple; {why}")


def _check_shares(config: Any, sites: tuple[str, ...], fractions: tuple[float, ...]) -> None:
    """Shares and importance follow the rules of a pruning run of one step."""
    for site in sites:
        for fraction in fractions:
            PruningConfig(fractions={site: fraction}, steps=1, importance=config.importance)
