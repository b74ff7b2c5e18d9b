"""Deletion: edit weights so that neurons are removed from the model and its saved copies (METHODS 6)."""

from collections.abc import Iterable, Mapping
from typing import Any

from jaxtyping import Float
from torch import Tensor

from sepcap.checks import checked
from sepcap.interventions.constants import check_constants
from sepcap.interventions.trial import check_deletion
from sepcap.models.kinds import architecture_of
from sepcap.models.sites import Population
from sepcap.selection.neurons import NeuronSet


@checked(stopped="the model may be changed in part: load it again")
def delete(model: Any, neurons: NeuronSet, offset: Mapping[str, Float[Tensor, "layer *neuron"]] | None = None) -> None:
    """Remove neurons from a model, in place, by setting their input and output weights to zero.

    mlp: W_in, b_in, W_gate and W_out of the neuron. Attention: W_O rows, and the W_V column and b_V entry once no query head
    uses them (under grouped-query attention several share one). Without offset the logits are those of zero-ablating the set.

    With constants μ as offset, the output of the neurons at those activations is kept: b_O ← b_O + Σ μ_n W_O[n, :], and b_out
    with W_out for mlp, before weights are zeroed. A value neuron contributes through every query head that shares it. For mlp
    and attn_pre_out, the mean as offset preserves the mean output of the block on the data of that mean. Neurons that are already
    deleted contribute nothing, so a neuron is compensated once: give only neurons that are deleted now.

    Before the first deletion at a site, a few tokens are run through the model to check that its weights act as their layout implies.

    Args:
        model: a hooked model; it is changed.
        neurons: the neurons to remove.
        offset: site -> constants [layer, neuron] or [layer, head, d_head], for example `{"mlp": retain["mlp"].mean}`.

    Raises:
        ValueError: a set or constants of another model's shape, constants that are not finite, or an offset for an
            architecture without output biases; or a model that computes with more than these weights (it is not changed then).

    Source: [SP] section 3.3; the offset: [SEP] section 2.4.2, METHODS section 6.

    Example:
        >>> sepcap.delete(model, scores.top({"mlp": 0.02}))  # doctest: +SKIP
    """
    populations = neurons.check(model)
    if offset is not None:
        check_output_biases(populations.values())
        check_constants(neurons, offset, "offset")
    for population in populations.values():
        check_deletion(population, offset is not None)
    for site, layer, mask in neurons.by_layer():
        if offset is not None:
            populations[site].add_offset(layer, mask, offset[site][layer])
        populations[site].delete(layer, mask)


def check_output_biases(populations: Iterable[Population]) -> None:
    """Raise if an architecture lacks the bias to which an offset would be added."""
    for population in populations:
        if population.bias(0) is None:
            raise ValueError(
                f"offset: {architecture_of(population.model)} has no {population.site.bias}, the bias that would take the offset of "
                f"{population.site.name!r} neurons; delete without offset"
            )
