"""Units to ablate alone: neurons or heads of a site, all of them, some, or a random sample; and pairs of them (METHODS 19)."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sepcap.models.sites import Population, check_layer
from sepcap.selection.neurons import NeuronSet
from sepcap.studies.single_ablations.passes import Units

CHUNK = 128
"""Largest number of units of a layer that are measured before the result is written."""

Chunk = tuple[Tensor, Units]
"""Numbers of the units of a chunk, and the units as the passes take them."""


def chosen(population: Population, config: Any, neurons: NeuronSet | None) -> Bool[Tensor, "layer *unit"]:
    """The units that can be drawn: those of the layers and heads of a configuration, or of a neuron set.

    Raises:
        ValueError: both are given, a set of another site, or whole heads of a set that holds parts of heads.
        IndexError: a layer or head that does not exist.
    """
    site, heads = population.site.name, config.whole_heads
    if neurons is None:
        mask = torch.zeros(population.shape, dtype=torch.bool)
        layers = population.layers if config.layers is None else _list(config.layers)
        for layer in layers:
            check_layer(population.model, layer)
            for head in [slice(None)] if config.heads is None else _list(config.heads):
                if isinstance(head, int) and head >= population.shape[1]:
                    raise IndexError(f"heads={config.heads!r}: site {site!r} has {population.shape[1]} heads a layer, numbered from 0")
                mask[layer, head] = True
        return mask.any(-1) if heads else mask
    if config.layers is not None or config.heads is not None:
        raise ValueError("neurons and layers= or heads= are both given: choose by a NeuronSet or by layers and heads, not both")
    neurons.check(population.model)
    if set(neurons.masks) != {site} or not neurons:
        raise ValueError(f"neurons={neurons!r}: give neurons of site={site!r}, the site that is ablated")
    mask = neurons.masks[site].cpu()
    if not heads:
        return mask
    if bool((mask.any(-1) != mask.all(-1)).any()):
        raise ValueError("neurons holds parts of heads, but whole_heads=True; give NeuronSet.heads(model, [(layer, head), …])")
    return mask.any(-1)


def drawn(mask: Bool[Tensor, "layer *unit"], sample: int | None, seed: int) -> Int[Tensor, "unit place"]:
    """Places of the units to ablate, in order: all that are chosen, or a uniform sample without replacement."""
    places = mask.nonzero()
    if sample is None or sample == len(places):
        return places
    if sample > len(places):
        raise ValueError(f"sample={sample}: there are {len(places)} to draw from; give at most that, or leave it out")
    return places[np.sort(np.random.default_rng([seed, 19]).choice(len(places), sample, replace=False))]


def flat(population: Population, places: Int[Tensor, "unit place"]) -> Int[Tensor, "unit width"]:
    """Numbers of the neurons of each unit within its flattened layer."""
    if len(population.shape) == 2:
        return places[:, 1:]
    d_head = population.shape[2]
    return places[:, 1:2] * d_head + (places[:, 2:] if places.shape[1] == 3 else torch.arange(d_head))


def chunks(
    population: Population, places: Int[Tensor, "unit place"], constants: Float[Tensor, "layer *neuron"]
) -> list[Chunk]:
    """The units layer by layer in chunks: their numbers, and the units as the passes take them."""
    index, found = flat(population, places), []
    for layer in torch.unique(places[:, 0]).tolist():
        for numbers in (places[:, 0] == layer).nonzero()[:, 0].split(CHUNK):
            found.append((numbers, Units(layer, index[numbers], constants[layer].flatten())))
    return found


def pair_chunks(
    population: Population, places: Int[Tensor, "unit place"], pairs: Int[Tensor, "pair 2"], constants: Float[Tensor, "layer *neuron"]
) -> list[Chunk]:
    """The same for pairs of units, of which the first is not in a later layer than the second."""
    index, found = flat(population, places), []
    of = places[:, 0][pairs]
    for first, second in torch.unique(of, dim=0).tolist():
        for numbers in ((of == torch.tensor([first, second])).all(1)).nonzero()[:, 0].split(CHUNK):
            a, b = (index[pairs[numbers, side]] for side in (0, 1))
            if first == second:
                units = Units(first, torch.cat([a, b], 1), constants[first].flatten())
            else:
                units = Units(first, a, constants[first].flatten(), Units(second, b, constants[second].flatten()))
            found.append((numbers, units))
    return found


def named_pairs(population: Population, pairs: Any, places: Int[Tensor, "unit place"]) -> list[list[int]]:
    """Pairs given as a NeuronSet or as places, as numbers of the measured units.

    Raises:
        ValueError: a neuron that is not measured, one paired with itself, or fewer than two.
    """
    number = {tuple(place): i for i, place in enumerate(places.tolist())}
    if isinstance(pairs, NeuronSet):
        pairs.check(population.model)
        mask = pairs.masks.get(population.site.name)
        if mask is None or set(pairs.masks) != {population.site.name}:
            raise ValueError(f"pairs={pairs!r}: give neurons of site={population.site.name!r}, the site that is ablated")
        mask = mask.any(-1) if places.shape[1] < mask.dim() else mask
        return all_pairs([_number(place, number) for place in mask.nonzero().tolist()])
    if not isinstance(pairs, Sequence) or not all(isinstance(pair, Sequence) and len(pair) == 2 for pair in pairs):
        raise ValueError(f"pairs={pairs!r}: give a whole number, a NeuronSet, or pairs of places [((layer, neuron), (layer, neuron)), …]")
    found = [sorted(_number(place, number) for place in pair) for pair in pairs]
    if not found or any(a == b for a, b in found):
        raise ValueError("pairs: give at least one pair, each of two different neurons")
    return [list(pair) for pair in dict.fromkeys(map(tuple, found))]


def all_pairs(numbers: Iterable[int]) -> list[list[int]]:
    """All pairs of some units; the first is the one with the lower number, and so not in a later layer."""
    each = sorted(numbers)
    if len(each) < 2:
        raise ValueError(f"pairs: {len(each)} neuron makes no pair; give at least two")
    return [[a, b] for i, a in enumerate(each) for b in each[i + 1 :]]


def _number(place: Any, numbers: Mapping[tuple[int, ...], int]) -> int:
    wanted = tuple(place) if isinstance(place, Sequence) else (place,)
    if wanted not in numbers:
        raise ValueError(f"pairs: {wanted} is not among the neurons that are ablated alone; give places like {next(iter(numbers))}")
    return numbers[wanted]


def _list(numbers: int | Sequence[int]) -> list[int]:
    return [numbers] if isinstance(numbers, int) else list(dict.fromkeys(numbers))
