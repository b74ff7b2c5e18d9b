"""Deletion: editing weights so that neurons are gone from the model, saved copies included (METHODS 6)."""

from typing import Any

from sepcap.models.sites import delete_weights
from sepcap.selection.neurons import NeuronSet


def delete(model: Any, neurons: NeuronSet) -> None:
    """Remove neurons from a model by setting the weights that read and write them to zero, in place.

    mlp: W_in, b_in, W_gate and W_out of the neuron. Attention: W_O rows, and the W_V column and b_V entry once no query head
    uses them (under grouped-query attention several share one). The logits are those of zero-ablating the set.

    Args:
        model: a hooked model; it is changed.
        neurons: what to remove.

    Raises:
        ValueError: a set of another model's shape (nothing is changed then).

    Source: [SP] section 3.3.

    Example:
        >>> sepcap.delete(model, scores.top({"mlp": 0.02}))  # doctest: +SKIP
    """
    neurons.check(model)
    for site, mask in neurons.masks.items():
        delete_weights(model, site, mask)
