"""Figures: one function per figure, which takes a result and returns a `go.Figure`.

The figures are drawn at their printed size, one column (3.3 inches) or one page (6.9 inches) wide, and `save` writes them at exactly
that size. No global setting is changed: every figure has its own template.
"""

from sepcap.drawing.save import save
from sepcap.plots.activations import activation_distributions
from sepcap.plots.importance import importance_scatter
from sepcap.plots.weights import mlp_biases, value_norms
from sepcap.selection.figures import head_scores, importance_histograms, score_histograms
from sepcap.selection.stability import selection_frequency
from sepcap.studies.ablations.figures import ablation_sweep, ablations
from sepcap.studies.clusters.figures import concentration_curve, concentration_profile
from sepcap.studies.cross_task.figures import cross_task, cross_task_bisection
from sepcap.studies.dimensions.figures import dimension_search, dimension_traces
from sepcap.studies.jacobian.figures import jacobian_ranks, jacobian_spectra
from sepcap.studies.methods.figures import methods
from sepcap.studies.overlaps.figures import overlap, overlap_layers, overlap_ratios
from sepcap.studies.paragraphs.figures import paragraph_distances, paragraph_layers, paragraph_positions
from sepcap.studies.pruning.figures.areas import areas
from sepcap.studies.pruning.figures.drops import drop_against_drop, perplexity_against_perplexity
from sepcap.studies.pruning.figures.pruned_neurons import pruned_neurons
from sepcap.studies.pruning.figures.steps import metric_over_steps, thresholds
from sepcap.studies.pruning.figures.trajectory import trajectory
from sepcap.studies.selection_checks.figures import (
    selection_checks_curves,
    selection_checks_keep,
    selection_checks_layers,
    selection_checks_meeting,
    selection_checks_step_overlaps,
    selection_checks_steps,
)
from sepcap.studies.similarity.figures import similarity, similarity_profile

__all__ = [
    "ablation_sweep",
    "ablations",
    "activation_distributions",
    "areas",
    "concentration_curve",
    "concentration_profile",
    "cross_task",
    "cross_task_bisection",
    "dimension_search",
    "dimension_traces",
    "drop_against_drop",
    "head_scores",
    "importance_histograms",
    "importance_scatter",
    "jacobian_ranks",
    "jacobian_spectra",
    "methods",
    "metric_over_steps",
    "mlp_biases",
    "overlap",
    "overlap_layers",
    "overlap_ratios",
    "paragraph_distances",
    "paragraph_layers",
    "paragraph_positions",
    "perplexity_against_perplexity",
    "pruned_neurons",
    "save",
    "score_histograms",
    "selection_checks_curves",
    "selection_checks_keep",
    "selection_checks_layers",
    "selection_checks_meeting",
    "selection_checks_step_overlaps",
    "selection_checks_steps",
    "selection_frequency",
    "similarity",
    "similarity_profile",
    "thresholds",
    "trajectory",
    "value_norms",
]
