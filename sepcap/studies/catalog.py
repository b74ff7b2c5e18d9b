"""All studies by name, and the result in a folder."""

from pathlib import Path
from typing import Any

from sepcap.checks import checked
from sepcap.errors import unknown
from sepcap.studies.base.folder import read_config
from sepcap.studies.pruning.run import whole_run
from sepcap.workers.engines import named

STUDIES: dict[str, str] = {
    "activation-similarity": "studies.similarity.study.ActivationSimilarity",
    "dimension-search": "studies.dimensions.result.DimensionSearch",
    "dimension-traces": "studies.dimensions.result.DimensionTraces",
    "jacobian-spectrum": "studies.jacobian.study.JacobianSpectrum",
    "paragraph-transfer": "studies.paragraphs.study.ParagraphTransfer",
    "modularity": "studies.clusters.study.Modularity",
    "overlap": "studies.overlaps.study.Overlap",
    "jumps": "studies.pruning.jumps.find.Jumps",
    "neuron-profiles": "studies.neuron_profiles.result.NeuronProfiles",
    "cross-task": "studies.cross_task.study.CrossTaskPruning",
    "selection-checks": "studies.selection_checks.study.SelectionChecks",
    "ablation-sweep": "studies.ablations.random_neurons.AblationSweep",
    "compare-ablations": "studies.ablations.heads.AblationComparison",
    "single-ablations": "studies.single_ablations.result.SingleAblations",
    "compare-methods": "studies.methods.study.MethodComparison",
    "compare-directions": "studies.directions.study.DirectionComparison",
    "learned-ranking": "studies.learned.study.LearnedRanking",
    "certificate": "studies.certificate.study.Certificate",
    "compare-unlearning": "studies.unlearning.study.UnlearningComparison",
    "compare-importances": "studies.importances.result.ImportanceComparison",
    "reproduce": "studies.reproduce.study.Reproduction",
    "sweep": "studies.sweep.result.Sweep",
}
"""Name of a study, as in its config.json -> the class of its results."""

FUNCTIONS: dict[str, str] = {
    "PruningConfig": "studies.pruning.prune.prune",
    "DirectionComparisonConfig": "studies.directions.study.compare_directions",
    "MethodComparisonConfig": "studies.methods.study.compare_methods",
    "AblationComparisonConfig": "studies.ablations.heads.compare_ablations",
    "AblationSweepConfig": "studies.ablations.random_neurons.sweep_ablation",
    "SingleAblationsConfig": "studies.single_ablations.study.ablate_each",
    "ImportanceComparisonConfig": "studies.importances.study.compare_importances",
    "LearnedRankingConfig": "studies.learned.study.learn_ranking",
    "CertificateConfig": "studies.certificate.study.certify",
    "UnlearningComparisonConfig": "studies.unlearning.study.compare_unlearning",
    "NeuronProfilesConfig": "studies.neuron_profiles.study.examine",
    "ModularityConfig": "studies.clusters.study.measure_modularity",
    "OverlapConfig": "studies.overlaps.study.measure_overlap",
    "CrossTaskConfig": "studies.cross_task.study.prune_across_tasks",
    "SelectionChecksConfig": "studies.selection_checks.study.check_selection",
    "ActivationSimilarityConfig": "studies.similarity.study.compare_activations",
    "DimensionSearchConfig": "studies.dimensions.study.find_dimensions",
    "DimensionTracesConfig": "studies.dimensions.study.trace_dimensions",
    "JacobianSpectrumConfig": "studies.jacobian.study.jacobian_spectrum",
    "ParagraphTransferConfig": "studies.paragraphs.study.transfer_paragraphs",
    "ReproductionConfig": "studies.reproduce.study.reproduce",
}
"""Class of a configuration -> the function of its study; `.CONFIG` of the function is the class, see `sepcap.studies.base.runner.study`."""


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
    return named(STUDIES[study]).load(folder)
