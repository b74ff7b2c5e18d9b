"""Public names and where they are defined; read by type checkers and, when a name is first used, by the package itself."""

from . import plots as plots
from .compiled.load import CompiledModel as CompiledModel
from .compiled.load import compiled_models as compiled_models
from .compiled.load import load_compiled as load_compiled
from .evaluation.harness import run_lm_eval as run_lm_eval
from .evaluation.next_token import evaluate as evaluate
from .evaluation.result import Evaluation as Evaluation
from .evaluation.toxicity import Toxicity as Toxicity
from .evaluation.toxicity import evaluate_toxicity as evaluate_toxicity
from .interventions.ablation import Ablation as Ablation
from .interventions.ablation import ablate as ablate
from .interventions.deletion import delete as delete
from .interventions.optimal import Optimal as Optimal
from .interventions.optimal import fit_constants as fit_constants
from .interventions.rotation import Rotation as Rotation
from .interventions.rotation import compute_rotation as compute_rotation
from .interventions.rotation import rotate_values as rotate_values
from .models.loading.load import load_model as load_model
from .models.weights import save_pretrained as save_pretrained
from .selection.clusters import Clusters as Clusters
from .selection.clusters import cluster_neurons as cluster_neurons
from .selection.concentration import Concentration as Concentration
from .selection.concentration import measure_concentration as measure_concentration
from .selection.neurons import NeuronSet as NeuronSet
from .selection.score import Scores as Scores
from .selection.score import score as score
from .selection.stability import SelectionStability as SelectionStability
from .selection.stability import selection_stability as selection_stability
from .statistics.collect import collect as collect
from .statistics.collect import correct_positions as correct_positions
from .statistics.histogram import Histogram as Histogram
from .statistics.moments import NeuronStatistics as NeuronStatistics
from .statistics.moments import Statistics as Statistics
from .studies.ablations.config import AblationComparisonConfig as AblationComparisonConfig
from .studies.ablations.config import AblationSweepConfig as AblationSweepConfig
from .studies.ablations.heads import AblationComparison as AblationComparison
from .studies.ablations.heads import compare_ablations as compare_ablations
from .studies.ablations.random_neurons import AblationSweep as AblationSweep
from .studies.ablations.random_neurons import sweep_ablation as sweep_ablation
from .studies.base.result import StudyResult as StudyResult
from .studies.catalog import load_result as load_result
from .studies.certificate.config import CertificateConfig as CertificateConfig
from .studies.certificate.study import Certificate as Certificate
from .studies.certificate.study import certify as certify
from .studies.clusters.config import ModularityConfig as ModularityConfig
from .studies.clusters.study import Modularity as Modularity
from .studies.clusters.study import measure_modularity as measure_modularity
from .studies.cross_task.config import CrossTaskConfig as CrossTaskConfig
from .studies.cross_task.study import CrossTaskPruning as CrossTaskPruning
from .studies.cross_task.study import prune_across_tasks as prune_across_tasks
from .studies.dimensions.config import DimensionSearchConfig as DimensionSearchConfig
from .studies.dimensions.config import DimensionTracesConfig as DimensionTracesConfig
from .studies.dimensions.study import (
    DimensionTraces as DimensionTraces,
)
from .studies.dimensions.study import (
    find_dimensions as find_dimensions,
)
from .studies.dimensions.study import (
    trace_dimensions as trace_dimensions,
)
from .studies.directions.config import DirectionComparisonConfig as DirectionComparisonConfig
from .studies.directions.study import DirectionComparison as DirectionComparison
from .studies.directions.study import compare_directions as compare_directions
from .studies.importances.config import ImportanceComparisonConfig as ImportanceComparisonConfig
from .studies.importances.result import ImportanceComparison as ImportanceComparison
from .studies.importances.study import compare_importances as compare_importances
from .studies.jacobian.config import JacobianSpectrumConfig as JacobianSpectrumConfig
from .studies.jacobian.study import JacobianSpectrum as JacobianSpectrum
from .studies.jacobian.study import jacobian_spectrum as jacobian_spectrum
from .studies.learned.config import LearnedRankingConfig as LearnedRankingConfig
from .studies.learned.study import LearnedRanking as LearnedRanking
from .studies.learned.study import learn_ranking as learn_ranking
from .studies.methods.config import MethodComparisonConfig as MethodComparisonConfig
from .studies.methods.study import MethodComparison as MethodComparison
from .studies.methods.study import compare_methods as compare_methods
from .studies.neuron_profiles.config import NeuronProfilesConfig as NeuronProfilesConfig
from .studies.neuron_profiles.result import NeuronProfiles as NeuronProfiles
from .studies.neuron_profiles.study import examine as examine
from .studies.overlaps.config import OverlapConfig as OverlapConfig
from .studies.overlaps.study import Overlap as Overlap
from .studies.overlaps.study import measure_overlap as measure_overlap
from .studies.paragraphs.config import ParagraphTransferConfig as ParagraphTransferConfig
from .studies.paragraphs.study import ParagraphTransfer as ParagraphTransfer
from .studies.paragraphs.study import transfer_paragraphs as transfer_paragraphs
from .studies.pruning.config import PruningConfig as PruningConfig
from .studies.pruning.jumps.find import Jumps as Jumps
from .studies.pruning.prune import prune as prune
from .studies.pruning.run import Run as Run
from .studies.pruning.separability import Separability as Separability
from .studies.reproduce.config import ReproductionConfig as ReproductionConfig
from .studies.reproduce.study import Reproduction as Reproduction
from .studies.reproduce.study import reproduce as reproduce
from .studies.selection_checks.config import SelectionChecksConfig as SelectionChecksConfig
from .studies.selection_checks.study import SelectionChecks as SelectionChecks
from .studies.selection_checks.study import check_selection as check_selection
from .studies.similarity.config import ActivationSimilarityConfig as ActivationSimilarityConfig
from .studies.similarity.study import ActivationSimilarity as ActivationSimilarity
from .studies.similarity.study import compare_activations as compare_activations
from .studies.single_ablations.config import SingleAblationsConfig as SingleAblationsConfig
from .studies.single_ablations.result import SingleAblations as SingleAblations
from .studies.single_ablations.study import ablate_each as ablate_each
from .studies.sweep.result import Sweep as Sweep
from .studies.sweep.sweep import sweep as sweep
from .studies.unlearning.config import UnlearningComparisonConfig as UnlearningComparisonConfig
from .studies.unlearning.study import UnlearningComparison as UnlearningComparison
from .studies.unlearning.study import compare_unlearning as compare_unlearning
from .tasks.labelled import LabelledTexts as LabelledTexts
from .tasks.labelled import load_labelled_texts as load_labelled_texts
from .tasks.load import load_task as load_task
from .tasks.overlap import TextOverlap as TextOverlap
from .tasks.overlap import check_overlap as check_overlap
from .tasks.passages import sample_passages as sample_passages
from .tasks.registry import register_task as register_task
from .tasks.task import Task as Task

__version__: str
