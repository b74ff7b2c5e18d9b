"""sepcap: which neurons of a language model hold a capability, and what is left without them.

The public names are imported when they are first used, so that `import sepcap` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sepcap.evaluation.frequent import skip50
    from sepcap.evaluation.harness import harness
    from sepcap.evaluation.next_token import Evaluation, evaluate
    from sepcap.evaluation.toxicity import Toxicity, toxicity
    from sepcap.experiments.ablation_config import AblationProtocol
    from sepcap.experiments.ablation_protocol import ProtocolResult, ablation_protocol
    from sepcap.experiments.ablations import AblationComparison, compare_ablations
    from sepcap.experiments.config import PruningConfig
    from sepcap.experiments.cross_checks import CrossChecks, cross_checks
    from sepcap.experiments.cross_task import CrossTask, cross_task
    from sepcap.experiments.methods import Methods, compare_methods
    from sepcap.experiments.methods_config import MethodsConfig
    from sepcap.experiments.modules import Modules, modules
    from sepcap.experiments.modules_config import ModulesConfig
    from sepcap.experiments.neuron_sets_config import CrossChecksConfig, CrossTaskConfig, OverlapConfig
    from sepcap.experiments.overlaps import Overlaps, overlaps
    from sepcap.experiments.paragraphs import Transfer, transfer
    from sepcap.experiments.paragraphs_config import TransferConfig
    from sepcap.experiments.pruning import prune
    from sepcap.experiments.reproduce import Reproduction, reproduce
    from sepcap.experiments.reproduce_config import ReproduceConfig
    from sepcap.experiments.result import StudyResult, load_result
    from sepcap.experiments.run import Run
    from sepcap.experiments.separability import Separability
    from sepcap.experiments.similarity import Similarity, similarity
    from sepcap.experiments.streams import Streams, find_dims, streams
    from sepcap.experiments.tight_pass import TightPass, tight_pass
    from sepcap.experiments.tight_pass_config import TightPassConfig
    from sepcap.experiments.tight_pass_plan import plan_tight_pass
    from sepcap.experiments.trackers import Tracker
    from sepcap.interventions.ablation import Ablation, ablate
    from sepcap.interventions.deletion import delete
    from sepcap.interventions.optimal import Optimal, optimal_constants
    from sepcap.interventions.rotation import Rotation, rotate_values, value_rotation
    from sepcap.models.load import load_model
    from sepcap.models.weights import save_pretrained
    from sepcap.selection.clusters import Clusters, moefy
    from sepcap.selection.concentration import Concentration, concentration
    from sepcap.selection.neurons import NeuronSet
    from sepcap.selection.score import Scores, score
    from sepcap.statistics.collect import collect
    from sepcap.statistics.histogram import Histogram
    from sepcap.statistics.moments import NeuronStatistics, Statistics
    from sepcap.tasks.labelled import LabelledTexts, labelled_texts
    from sepcap.tasks.overlap import TextOverlap, check_overlap
    from sepcap.tasks.passages import draw_passages
    from sepcap.tasks.registry import register_task
    from sepcap.tasks.task import Task, load_task

__version__ = "0.1.0"

_HOME = {
    "Ablation": "interventions.ablation",
    "AblationComparison": "experiments.ablations",
    "AblationProtocol": "experiments.ablation_config",
    "Clusters": "selection.clusters",
    "Concentration": "selection.concentration",
    "CrossChecks": "experiments.cross_checks",
    "CrossChecksConfig": "experiments.neuron_sets_config",
    "CrossTask": "experiments.cross_task",
    "CrossTaskConfig": "experiments.neuron_sets_config",
    "Evaluation": "evaluation.next_token",
    "Histogram": "statistics.histogram",
    "LabelledTexts": "tasks.labelled",
    "Methods": "experiments.methods",
    "MethodsConfig": "experiments.methods_config",
    "Modules": "experiments.modules",
    "ModulesConfig": "experiments.modules_config",
    "NeuronSet": "selection.neurons",
    "NeuronStatistics": "statistics.moments",
    "Optimal": "interventions.optimal",
    "OverlapConfig": "experiments.neuron_sets_config",
    "Overlaps": "experiments.overlaps",
    "ProtocolResult": "experiments.ablation_protocol",
    "PruningConfig": "experiments.config",
    "ReproduceConfig": "experiments.reproduce_config",
    "Reproduction": "experiments.reproduce",
    "Rotation": "interventions.rotation",
    "Run": "experiments.run",
    "Scores": "selection.score",
    "Separability": "experiments.separability",
    "Similarity": "experiments.similarity",
    "Statistics": "statistics.moments",
    "Streams": "experiments.streams",
    "StudyResult": "experiments.result",
    "Task": "tasks.task",
    "TextOverlap": "tasks.overlap",
    "TightPass": "experiments.tight_pass",
    "TightPassConfig": "experiments.tight_pass_config",
    "Toxicity": "evaluation.toxicity",
    "Tracker": "experiments.trackers",
    "Transfer": "experiments.paragraphs",
    "TransferConfig": "experiments.paragraphs_config",
    "ablate": "interventions.ablation",
    "ablation_protocol": "experiments.ablation_protocol",
    "check_overlap": "tasks.overlap",
    "collect": "statistics.collect",
    "compare_ablations": "experiments.ablations",
    "compare_methods": "experiments.methods",
    "concentration": "selection.concentration",
    "cross_checks": "experiments.cross_checks",
    "cross_task": "experiments.cross_task",
    "delete": "interventions.deletion",
    "draw_passages": "tasks.passages",
    "evaluate": "evaluation.next_token",
    "find_dims": "experiments.streams",
    "harness": "evaluation.harness",
    "labelled_texts": "tasks.labelled",
    "load_model": "models.load",
    "load_result": "experiments.result",
    "load_task": "tasks.task",
    "modules": "experiments.modules",
    "moefy": "selection.clusters",
    "optimal_constants": "interventions.optimal",
    "overlaps": "experiments.overlaps",
    "plan_tight_pass": "experiments.tight_pass_plan",
    "prune": "experiments.pruning",
    "register_task": "tasks.registry",
    "reproduce": "experiments.reproduce",
    "rotate_values": "interventions.rotation",
    "save_pretrained": "models.weights",
    "score": "selection.score",
    "similarity": "experiments.similarity",
    "skip50": "evaluation.frequent",
    "streams": "experiments.streams",
    "tight_pass": "experiments.tight_pass",
    "toxicity": "evaluation.toxicity",
    "transfer": "experiments.paragraphs",
    "value_rotation": "interventions.rotation",
}

__all__ = [
    "Ablation",
    "AblationComparison",
    "AblationProtocol",
    "Clusters",
    "Concentration",
    "CrossChecks",
    "CrossChecksConfig",
    "CrossTask",
    "CrossTaskConfig",
    "Evaluation",
    "Histogram",
    "LabelledTexts",
    "Methods",
    "MethodsConfig",
    "Modules",
    "ModulesConfig",
    "NeuronSet",
    "NeuronStatistics",
    "Optimal",
    "OverlapConfig",
    "Overlaps",
    "ProtocolResult",
    "PruningConfig",
    "ReproduceConfig",
    "Reproduction",
    "Rotation",
    "Run",
    "Scores",
    "Separability",
    "Similarity",
    "Statistics",
    "Streams",
    "StudyResult",
    "Task",
    "TextOverlap",
    "TightPass",
    "TightPassConfig",
    "Toxicity",
    "Tracker",
    "Transfer",
    "TransferConfig",
    "ablate",
    "ablation_protocol",
    "check_overlap",
    "collect",
    "compare_ablations",
    "compare_methods",
    "concentration",
    "cross_checks",
    "cross_task",
    "delete",
    "draw_passages",
    "evaluate",
    "find_dims",
    "harness",
    "labelled_texts",
    "load_model",
    "load_result",
    "load_task",
    "modules",
    "moefy",
    "optimal_constants",
    "overlaps",
    "plan_tight_pass",
    "prune",
    "register_task",
    "reproduce",
    "rotate_values",
    "save_pretrained",
    "score",
    "similarity",
    "skip50",
    "streams",
    "tight_pass",
    "toxicity",
    "transfer",
    "value_rotation",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        # before any library that imports tqdm.auto, which complains in notebooks without ipywidgets
        import_module("sepcap.progress")
        return getattr(import_module(f"sepcap.{_HOME[name]}"), name)
    if name in ("plots",):
        return import_module(f"sepcap.{name}")
    raise AttributeError(f"module 'sepcap' has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted([*__all__, "plots", "__version__"])
