"""Pictures: one function per figure, each takes a result and returns a `go.Figure`.

The figures are drawn at the size at which they are printed, one column (89 mm) or the page (183 mm) wide, and `save`
writes them at exactly that size. Nothing global is changed: every figure carries its own template.
"""

from sepcap.plots.areas import areas
from sepcap.plots.neurons import neurons_gone
from sepcap.plots.save import save
from sepcap.plots.scores import score_histograms
from sepcap.plots.steps import metric_over_steps, thresholds
from sepcap.plots.trajectory import trajectory

__all__ = ["areas", "metric_over_steps", "neurons_gone", "save", "score_histograms", "thresholds", "trajectory"]
