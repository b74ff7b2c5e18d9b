"""Configuration of pruning across tasks (METHODS 5, 12). The API, the command line and the saved JSON use the same object."""

from dataclasses import dataclass
from typing import Any, Literal

from sepcap.checks import BETWEEN_0_AND_1, check_fields, distinct
from sepcap.selection.names import OfOneTask
from sepcap.studies.base.fields import OTHERS, Sampled, check_shares, check_tasks


@dataclass(frozen=True)
class CrossTaskConfig(Sampled):
    """Accuracy on every task after pruning each one to a target accuracy (METHODS 5, 12)."""

    tasks: tuple[Any, ...] = ("local-prose", "local-python", "local-cpp")
    """Tasks that are pruned and evaluated: names or paths (in Python anything that `load_task` takes)."""
    retain: Any = OTHERS
    """The task that all tasks are scored against, or "others": each against the tokens of all other tasks together."""
    model: str = "default"
    """"default", a folder, or a hub name."""
    site: Literal["mlp", "attn_pre_out", "attn_value"] = "mlp"
    """Site whose neurons are pruned."""
    target: float = 0.5
    """Accuracy to prune a task to, relative to that of the unpruned model."""
    tolerance: int = 1
    """Largest number of neurons between the ends of the bisection when it stops."""
    metric: Literal["top1", "top10", "skip50_top1", "skip50_top10"] = "top1"
    """Accuracy used in the bisection and reported."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the control: as many random neurons as were pruned."""
    importance: OfOneTask = "abs"
    """Importance function."""
    tokens: int = 20_000
    """Token positions per task from which statistics are collected."""
    eval_tokens: int = 20_000
    """Predictions per task on which every pruned model is evaluated."""

    def __post_init__(self) -> None:
        check_fields(self, target=BETWEEN_0_AND_1)
        check_tasks(self.tasks, "one is pruned, the others are evaluated")
        distinct("seeds", self.seeds)
        check_shares(self, (self.site,), (1.0,))
