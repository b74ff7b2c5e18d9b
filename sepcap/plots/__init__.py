"""Pictures: one function per figure, each takes a result and returns a `go.Figure`.

The figures are drawn at the size at which they are printed, one column (3.3 inches) or the page (6.9 inches) wide, and `save`
writes them at exactly that size. Nothing global is changed: every figure carries its own template.
"""

from sepcap.plots.ablations import ablation_protocol, ablations
from sepcap.plots.activations import activation_distributions
from sepcap.plots.areas import areas
from sepcap.plots.cross_checks import (
    cross_checks_curves,
    cross_checks_keep,
    cross_checks_layers,
    cross_checks_meeting,
    cross_checks_step_overlaps,
    cross_checks_steps,
)
from sepcap.plots.cross_task import cross_task, cross_task_bisection
from sepcap.plots.drops import drop_against_drop, perplexity_against_perplexity
from sepcap.plots.importance import importance_scatter
from sepcap.plots.methods import methods
from sepcap.plots.modules import concentration_curve, concentration_profile
from sepcap.plots.neurons import neurons_gone
from sepcap.plots.overlaps import overlap_layers, overlap_ratios, overlaps
from sepcap.plots.save import save
from sepcap.plots.scores import head_scores, importance_histograms, score_histograms
from sepcap.plots.similarity import similarity, similarity_profile
from sepcap.plots.steps import metric_over_steps, thresholds
from sepcap.plots.streams import streams
from sepcap.plots.tight_pass import tight_pass_ranks, tight_pass_spectra
from sepcap.plots.trajectory import trajectory
from sepcap.plots.transfer import transfer_distances, transfer_layers, transfer_positions
from sepcap.plots.weights import mlp_biases, value_norms

__all__ = [
    "ablation_protocol",
    "ablations",
    "activation_distributions",
    "areas",
    "concentration_curve",
    "concentration_profile",
    "cross_checks_curves",
    "cross_checks_keep",
    "cross_checks_layers",
    "cross_checks_meeting",
    "cross_checks_step_overlaps",
    "cross_checks_steps",
    "cross_task",
    "cross_task_bisection",
    "drop_against_drop",
    "head_scores",
    "importance_histograms",
    "importance_scatter",
    "methods",
    "metric_over_steps",
    "mlp_biases",
    "neurons_gone",
    "overlap_layers",
    "overlap_ratios",
    "overlaps",
    "perplexity_against_perplexity",
    "save",
    "score_histograms",
    "similarity",
    "similarity_profile",
    "streams",
    "thresholds",
    "tight_pass_ranks",
    "tight_pass_spectra",
    "trajectory",
    "transfer_distances",
    "transfer_layers",
    "transfer_positions",
    "value_norms",
]
