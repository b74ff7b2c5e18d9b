"""sepcap: which neurons of a language model hold a capability, and what is left without them.

The public names are imported when they are first used, so that `import sepcap` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sepcap.evaluation.next_token import Evaluation, evaluate
    from sepcap.experiments.config import PruningConfig
    from sepcap.experiments.pruning import prune
    from sepcap.experiments.run import Run
    from sepcap.experiments.separability import Separability
    from sepcap.interventions.ablation import ablate
    from sepcap.interventions.deletion import delete
    from sepcap.models.load import load_model
    from sepcap.models.weights import save_pretrained
    from sepcap.selection.neurons import NeuronSet
    from sepcap.selection.score import Scores, score
    from sepcap.statistics.collect import collect
    from sepcap.statistics.moments import NeuronStatistics, Statistics
    from sepcap.tasks.task import Task, load_task

__version__ = "0.1.0"

_HOME = {
    "Evaluation": "evaluation.next_token",
    "NeuronSet": "selection.neurons",
    "NeuronStatistics": "statistics.moments",
    "PruningConfig": "experiments.config",
    "Run": "experiments.run",
    "Scores": "selection.score",
    "Separability": "experiments.separability",
    "Statistics": "statistics.moments",
    "Task": "tasks.task",
    "ablate": "interventions.ablation",
    "collect": "statistics.collect",
    "delete": "interventions.deletion",
    "evaluate": "evaluation.next_token",
    "load_model": "models.load",
    "load_task": "tasks.task",
    "prune": "experiments.pruning",
    "save_pretrained": "models.weights",
    "score": "selection.score",
}

__all__ = [
    "Evaluation",
    "NeuronSet",
    "NeuronStatistics",
    "PruningConfig",
    "Run",
    "Scores",
    "Separability",
    "Statistics",
    "Task",
    "ablate",
    "collect",
    "delete",
    "evaluate",
    "load_model",
    "load_task",
    "prune",
    "save_pretrained",
    "score",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"sepcap.{_HOME[name]}"), name)
    if name in ("plots",):
        return import_module(f"sepcap.{name}")
    raise AttributeError(f"module 'sepcap' has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
