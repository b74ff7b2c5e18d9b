"""All studies by name, and the result in a folder."""

from importlib import import_module
from pathlib import Path
from typing import Any

from sepcap.checks import checked
from sepcap.errors import unknown
from sepcap.studies.base.folder import read_config
from sepcap.studies.pruning.run import whole_run

STUDIES: dict[str, str] = {
    "activation-similarity": "studies.similarity.study.ActivationSimilarity",
    "dimension-traces": "studies.dimensions.study.DimensionTraces",
    "jacobian-spectrum": "studies.jacobian.study.JacobianSpectrum",
    "paragraph-transfer": "studies.paragraphs.study.ParagraphTransfer",
    "modularity": "studies.clusters.study.Modularity",
    "overlap": "studies.overlaps.study.Overlap",
    "jumps": "studies.pruning.jumps.find.Jumps",
    "cross-task": "studies.cross_task.study.CrossTaskPruning",
    "selection-checks": "studies.selection_checks.study.SelectionChecks",
    "ablation-sweep": "studies.ablations.random_neurons.AblationSweep",
    "compare-ablations": "studies.ablations.heads.AblationComparison",
    "single-ablations": "studies.single_ablations.result.SingleAblations",
    "compare-methods": "studies.methods.study.MethodComparison",
    "compare-directions": "studies.directions.study.DirectionComparison",
    "learned-ranking": "studies.learned.study.LearnedRanking",
    "certificate": "studies.certificate.study.Certificate",
    "compare-importances": "studies.importances.result.ImportanceComparison",
    "reproduce": "studies.reproduce.study.Reproduction",
}
"""Name of a study, as in its config.json -> the class of its results."""


@checked()
def load_result(folder: str | Path) -> Any:
    """Load the result of a study, or a pruning run, from a folder.

    Every file is compared with its SHA-256, as `sepcap check` does, before anything is returned.

    Raises:
        FileNotFoundError: there is no result, or the study is not finished.
        CorruptFile: a file differs from what was written; it is named.

    Example:
        >>> sepcap.load_result("runs/geometry/similarity").figure()  # doctest: +SKIP
    """
    study = read_config(Path(folder)).get("study")
    if study is None:
        return whole_run(folder)
    if study not in STUDIES:
        raise unknown("study", study, STUDIES, f"{folder} was written by another version of sepcap.")
    module, name = STUDIES[study].rsplit(".", 1)
    return getattr(import_module(f"sepcap.{module}"), name).load(folder)
