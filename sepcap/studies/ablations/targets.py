"""Targets of an ablation comparison: single heads, heads together, a neuron set, and random other heads as controls."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sepcap.models.sites import n_layers, site_shape
from sepcap.selection.neurons import NeuronSet

Head = tuple[int, int]
Target = Head | tuple[Head, ...] | None
"""What is ablated at once: a head, several heads together, or (None) a neuron set."""


def target_name(target: Target) -> str:
    """The target in words."""
    if target is None:
        return "neuron set"
    if isinstance(target[0], int):
        return f"layer {target[0]}, head {target[1]}"
    return f"{len(target)} heads together ({', '.join(f'{layer}.{head}' for layer, head in heads_of(target))})"


def heads_of(target: Target) -> tuple[Head, ...]:
    """The (layer, head) pairs of a target; none for a neuron set."""
    if target is None:
        return ()
    first = target[0]
    return ((first, int(str(target[1]))),) if isinstance(first, int) else tuple(pair for pair in target if isinstance(pair, tuple))


def target_in(stored: Any) -> Target:
    """A target from its JSON form."""
    return None if stored is None else (stored[0], stored[1]) if isinstance(stored[0], int) else tuple((a, b) for a, b in stored)


def targets_of(
    model: Any,
    layer: int | Sequence[int] | None,
    head: int | Sequence[int] | Sequence[Head] | None,
    neurons: NeuronSet | None,
    together: bool,
) -> dict[Target, NeuronSet]:
    """The targets specified by the arguments of `compare_ablations`, each with its neurons."""
    if neurons is not None:
        if layer is not None or head is not None:
            raise ValueError("neurons and layer= or head= are both given: ablate a neuron set or heads, not both")
        neurons.check(model)
        if not neurons:
            raise ValueError("neurons is empty: there is nothing to ablate")
        return {None: neurons}
    n_heads = site_shape(model, "attn_pre_out")[1]
    if layer is None and head is not None:
        pairs: list[Any] = [head] if isinstance(head, int) else list(head)
        if not all(isinstance(pair, Sequence) and len(pair) == 2 for pair in pairs):
            raise ValueError(f"head={head!r} without layer: give layer= too, or pairs, head=[(layer, head), …]")
    else:
        layers = range(n_layers(model)) if layer is None else [layer] if isinstance(layer, int) else layer
        heads = range(n_heads) if head is None else [head] if isinstance(head, int) else head
        pairs = [(at, h) for at in layers for h in heads]
    if not pairs:
        raise ValueError(f"layer={layer!r}, head={head!r}: there is no head to ablate")
    pairs = list(dict.fromkeys((at, h) for at, h in pairs))
    if together and len(pairs) > 1:
        return {tuple(pairs): NeuronSet.heads(model, pairs)}
    return {pair: NeuronSet.heads(model, [pair]) for pair in pairs}


def controls_of(model: Any, targets: Mapping[Target, NeuronSet], controls: int, seed: int) -> dict[Target, NeuronSet]:
    """Random other heads, single or in sets as large as the target."""
    if not controls:
        return {}
    asked = [pair for target in targets for pair in heads_of(target)]
    if not asked:
        raise ValueError(f"controls={controls}: controls are other heads, and neurons is a set; compare it with NeuronSet.random(...)")
    others = [(at, h) for at in range(n_layers(model)) for h in range(site_shape(model, "attn_pre_out")[1]) if (at, h) not in asked]
    size = len(asked) if len(targets) == 1 else 1
    possible = math.comb(len(others), size)
    if possible < controls:
        raise ValueError(f"controls={controls}: {len(others)} other heads make {possible} sets of {size}; give at most {possible}")
    rng, drawn = np.random.default_rng([seed, 8]), {}
    while len(drawn) < controls:
        chosen = tuple(others[i] for i in sorted(rng.choice(len(others), size, replace=False)))
        drawn.setdefault(chosen[0] if size == 1 else chosen, NeuronSet.heads(model, chosen))
    return drawn
