"""`sepcap ablate`, `sepcap ablate-each`, and parts of `sepcap compare`: kinds of ablation, and importances against single ablations."""

from typing import Any

from sepcap.cli.options import Study, study_command
from sepcap.studies.ablations.config import AblationComparisonConfig, AblationSweepConfig
from sepcap.studies.importances.config import ImportanceComparisonConfig
from sepcap.studies.single_ablations.config import SingleAblationsConfig


@study_command("ablate_each", out="runs/ablate-each", layers=tuple[int, ...] | None, heads=tuple[int, ...] | None, pairs=int | None)
class AblateEach(SingleAblationsConfig, Study):
    """Ablate every neuron, or head, alone: the exact change of loss and accuracy on two tasks, with paired intervals."""


@study_command("sweep_ablation", out="runs/ablate")
class Ablate(AblationSweepConfig, Study):
    """Ablate increasing numbers of random neurons, up to all, and compare several kinds of ablation on the same neurons ([PEAK])."""


@study_command("compare_ablations", out="runs/compare-ablations", layer=tuple[int, ...] | None, head=tuple[int, ...] | None)
class CompareAblations(AblationComparisonConfig, Study):
    """Ablate a head, or every head of the model, by every kind of ablation: change of loss and top-1 with paired intervals."""


@study_command("compare_importances", out="runs/compare-importances")
class CompareImportances(ImportanceComparisonConfig, Study):
    """Compare every importance with the exact effect of every neuron ablated alone, and by how well pruning by it separates two tasks."""

    def load(self, **options: Any) -> Any:
        """Load the model of the command; a compiled one is loaded with its tasks and labels by the study."""
        return None if self.compiled is not None else super().load(**options)
