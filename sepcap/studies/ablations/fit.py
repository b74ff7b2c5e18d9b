"""Constants of the kind "optimal" for many sets: each fit runs only the layers from the set's first layer on (METHODS 8)."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from jaxtyping import Float
from torch import Tensor

from sepcap.errors import warn
from sepcap.interventions.constants import Constants
from sepcap.interventions.optimal import apart, fit_constants
from sepcap.models.forward import Hook, device_of, measuring
from sepcap.models.partial import Residual, logits_from, residuals
from sepcap.progress import progress
from sepcap.selection.neurons import NeuronSet
from sepcap.statistics.collect import halving_batches
from sepcap.statistics.moments import Statistics
from sepcap.tasks.batches import Batch, TokenSample

FIT = {"steps": 12, "lr": 0.1}
"""Maximum number of steps and first step size of "optimal". Steps are short, because a fit to a few thousand tokens soon overfits."""


def first_layer(neurons: NeuronSet) -> int:
    """The first layer in which a set has neurons."""
    return min(layer for site in neurons.masks for layer, n in enumerate(neurons.per_layer(site)) if n)


def spread(sample: TokenSample, tokens: int) -> TokenSample:
    """Evenly spaced rows of a sample with about `tokens` tokens: its first rows alone may all be from one document."""
    n = min(len(sample.rows), max(1, round(len(sample.rows) * tokens / sample.tokens)))
    return sample.take([i * len(sample.rows) // n for i in range(n)])


def constants_of_targets(
    model: Any, sample: TokenSample, targets: Mapping[Any, NeuronSet], reference: Statistics, *, batch_size: int
) -> dict[Any, Constants]:
    """Optimal constants of each target separately; each fit runs only the layers from the target's first layer on.

    Args:
        model: a hooked model.
        sample: the fitting data, of which every third document is held out.
        targets: name -> neurons ablated together.
        reference: statistics with histograms, whose mean, median and peak a fit can start from.
        batch_size: rows per pass; halved, with a warning, when memory runs out.
    """

    def one_pass(size: int) -> dict[Any, Constants]:
        parts = [[batch.to(device_of(model)) for batch in part.batches(size)] for part in samples]
        fitted, unfinished = {}, 0
        with progress(total=len(targets), desc="fit optimal constants") as bar, measuring(model):
            # residual streams are kept for one layer at a time
            for layer in sorted(set(map(first_layer, targets.values()))):
                both = [*parts[0], *parts[1]]
                entering = {id(batch.inputs): residuals(model, batch.inputs, [layer], batch.mask)[layer] for batch in both}
                for name, neurons in targets.items():
                    if first_layer(neurons) == layer:
                        forward = partial(_from_known, model, entering)
                        how: dict[str, Any] = {"held_out": parts[1], "reference": reference, "forward": forward, "quiet": True, **FIT}
                        fit = fit_constants(model, neurons, parts[0], **how)
                        fitted[name] = fit.constants
                        unfinished += not fit.converged
                        bar.update()
        if unfinished:
            warn(f"{unfinished} of {len(targets)} fits of optimal constants have not converged in {FIT['steps']} steps")
        return fitted

    samples = apart(sample)
    return halving_batches(one_pass, batch_size)


def _from_known(model: Any, entering: Mapping[int, Residual], batch: Batch, hooks: list[Hook]) -> Float[Tensor, "batch ... out"]:
    return logits_from(model, entering[id(batch.inputs)], batch.inputs, hooks, batch.mask)
