"""Activation patching: activations at a few positions of one text replace those at the same positions of another (METHODS 14).

The patched activations are those of a site (`mlp`, `attn_pre_out`) or the residual stream after a block ("resid"), at the last tokens
of a source text and of a prompt. Positions are counted from the end: slot -1 is the last token. If the residual stream
is patched in a model with learned positions, the position of the source is patched with it.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sepcap.errors import unknown
from sepcap.models.blocks.places import hook_of
from sepcap.models.forward import Hook, device_of, run_hooks
from sepcap.models.sites import n_layers, populations
from sepcap.tasks.batches import pad

RESIDUAL = "resid"
PATCHABLE = ("mlp", "attn_pre_out", RESIDUAL)
"""What can be patched."""


@dataclass(frozen=True, eq=False)
class Taken:
    """Activations at the ends of several texts.

    Attributes:
        values: hook name -> [text, slot, ...]; the last slot is the last token of the text.
        slots: number of valid slots, from the end; earlier slots are not used.
    """

    values: Mapping[str, Float[Tensor, "text slot ..."]]
    slots: Int[np.ndarray, " text"]

    def of(self, texts: Sequence[int]) -> "Taken":
        """The activations of some of the texts, by number, in that order."""
        return Taken({name: value[list(texts)] for name, value in self.values.items()}, self.slots[list(texts)])


def patch_points(model: Any, sites: str | Iterable[str], layers: Iterable[int] | None = None) -> tuple[str, ...]:
    """Names of the hooks at which the sites are patched, in some layers or in all.

    Raises:
        ValueError: an unknown site, "resid" together with another, no site or no layer.
        IndexError: a layer that the model does not have.
        NotImplementedError: an architecture that has no such site.
    """
    names = check_sites(sites)
    if names == (RESIDUAL,):
        return tuple(hook_of(model, "resid_post", layer) for layer in check_layers(layers, n_layers(model)))
    bound = populations(model, names).values()
    return tuple(its.site.hook_name(layer) for layer in check_layers(layers, n_layers(model)) for its in bound)


def check_sites(sites: str | Iterable[str]) -> tuple[str, ...]:
    """Names of the sites, each once; raises if they cannot be patched together."""
    names = (sites,) if isinstance(sites, str) else tuple(dict.fromkeys(sites))
    if not names:
        raise ValueError(f"sites is empty; give one or more of {', '.join(map(repr, PATCHABLE))}")
    for name in names:
        if name not in PATCHABLE:
            raise unknown("sites", name, PATCHABLE)
    if RESIDUAL in names and len(names) > 1:
        raise ValueError(f"sites={names!r}: the residual stream after a block contains the output of the sites; patch {RESIDUAL!r} alone")
    return names


def check_layers(layers: Iterable[int] | None, n: int) -> tuple[int, ...]:
    """Numbers of layers in order, each once; all if `layers` is None."""
    numbers = tuple(range(n)) if layers is None else tuple(sorted(set(layers)))
    if not numbers:
        raise ValueError(f"layers is empty; give numbers from 0 to {n - 1}")
    if numbers[0] < 0 or numbers[-1] >= n:
        raise IndexError(f"layers={numbers}: this model has layers 0 to {n - 1}")
    return numbers


def take(model: Any, texts: Sequence[Sequence[int]], slots: Sequence[int], points: Sequence[str]) -> Taken:
    """Activations at the last tokens of texts, from one pass over all of them.

    Args:
        model: a hooked causal language model.
        texts: token ids, BOS included.
        slots: number of tokens per text, counted from its end.
        points: hook names, as `patch_points` returns them.

    Example:
        >>> taken = take(model, [[0, 5, 6, 7]], [1], patch_points(model, "mlp"))  # doctest: +SKIP
    """
    rows = [np.asarray(text, dtype=np.int64) for text in texts]
    for i, (row, n) in enumerate(zip(rows, slots, strict=True)):
        if not 1 <= n <= len(row):
            raise ValueError(f"slots[{i}]={n}: text {i} has {len(row)} tokens; give 1 to {len(row)}")
    # padded on the right: under causal attention no token attends to it
    ids, _ = pad(rows, 0)
    most = max(slots)
    ends = np.array([len(row) for row in rows])
    # if a text is shorter than the largest number of slots, its surplus slots are never used
    columns = torch.from_numpy(np.maximum(ends[:, None] - most + np.arange(most), 0))
    values: dict[str, Tensor] = {}

    def keep(name: str, z: Tensor, hook: Any) -> None:
        values[name] = z[torch.arange(len(z))[:, None], columns].clone()

    run_hooks(model, ids.to(device_of(model)), [(name, partial(keep, name)) for name in points])
    return Taken(values, np.asarray(slots))


def put(taken: Taken, points: Sequence[str], ends: Sequence[int], room: Sequence[int], scale: float = 1.0) -> list[Hook]:
    """Hooks that put the activations of text i into row i of a batch, at the positions before `ends[i]`.

    Args:
        taken: activations of as many texts as there are rows.
        points: names of the hooks to patch at; other hooks in `taken` are not patched.
        ends: for every row, the position after the last one that is patched.
        room: for every row, the number of positions that can be patched; the smaller of this and the source's slots is patched.
        scale: factor of the activations; 0 is zero ablation.
    """
    n = np.minimum(taken.slots, room)
    most = next(iter(taken.values.values())).shape[1]
    rows = np.repeat(np.arange(len(n)), n)
    back = np.concatenate([np.arange(k, 0, -1) for k in n])  # positions from the end
    at, slots = torch.from_numpy(np.repeat(np.asarray(ends), n) - back), torch.from_numpy(most - back)
    row = torch.from_numpy(rows)

    def write(name: str, z: Tensor, hook: Any) -> Tensor:
        z = z.clone()
        z[row, at] = scale * taken.values[name][row, slots].to(z)
        return z

    return [(name, partial(write, name)) for name in points]
