"""Distributions of the weights, layer by layer (METHODS 13, last line)."""

from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from sepcap.checks import checked
from sepcap.drawing.ridges import Panel, bin_layers, edges_of, ridges
from sepcap.drawing.style import GREY, Width, chosen_layers
from sepcap.drawing.themes import drawn
from sepcap.models.blocks.views import mlp_input_biases, value_row_norms


@drawn
@checked()
def value_norms(
    model: Any, bins: int = 60, *, layers: Sequence[int] | None = None, log_counts: bool = False, width: Width = "column"
) -> go.Figure:
    """Norms of the rows of W_V, one ridge per layer.

    The norm of a value neuron is that of W_V[h, :, d] over d_model. Deleted neurons have norm 0: their share of the
    layer is shown next to its ridge, and they are not binned.

    Args:
        model: what `load_model` returns.
        bins: number of bins over the range of all layers.
        layers: layers to draw; default all.
        log_counts: whether heights are logarithms of the number of neurons, so that tails are visible.
        width: inches, "column" or "page".

    Source: [OPT]; METHODS 13.

    Example:
        >>> sepcap.plots.value_norms(sepcap.load_model())  # doctest: +SKIP
    """
    norms = value_row_norms(model)
    shown = chosen_layers(layers, range(len(norms)))
    norms = norms[shown]
    flat = norms.flatten(1).numpy()
    zero = flat == 0
    flat[zero] = float("nan")
    binned = bin_layers(flat, edges_of(flat, bins), {"norm 0": zero})
    how = {"logarithmic": log_counts, "numbers": shown}
    panel = Panel("value neurons", "norm", "Norm of the row of W<sub>V</sub>", flat, tuple(norms.shape[1:]), binned, **how)
    return ridges([panel], width=width)


@drawn
@checked()
def mlp_biases(
    model: Any, bins: int = 60, *, layers: Sequence[int] | None = None, log_counts: bool = False, width: Width = "column"
) -> go.Figure:
    """Input biases of the mlp neurons, one ridge per layer, with the share of negative ones beside it.

    Args:
        model: what `load_model` returns.
        bins: number of bins over the range of all layers.
        layers: layers to draw; default all.
        log_counts: whether heights are logarithms of the number of neurons, so that tails are visible.
        width: inches, "column" or "page".

    Raises:
        ValueError: the model has no such biases.

    Source: [OPT]; METHODS 13.
    """
    biases = mlp_input_biases(model)
    shown = chosen_layers(layers, range(len(biases)))
    biases = biases[shown].numpy()
    binned = bin_layers(biases, edges_of(biases, bins), {"bias &lt; 0": biases < 0})
    how = {"line": (0.0, GREY), "logarithmic": log_counts, "numbers": shown}
    panel = Panel("MLP neurons", "bias", "Input bias of the MLP neuron", biases, biases.shape[1:], binned, **how)
    return ridges([panel], width=width)
