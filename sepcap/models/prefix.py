"""Forward passes over part of each row, with keys and values of the earlier positions from an unablated pass (METHODS 19).

In a causal model an intervention at position t changes nothing before t. One pass over all rows records the residual stream that enters
every layer, and the keys and values of every position. A further pass then runs only the layers from the changed one on, only the
positions from the first changed one on, for many interventions on many rows at once. The model's own blocks run, with its own
cache interface, so that rotary embeddings, masks and norms are those of the architecture.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from sepcap.models.blocks.places import hook_of
from sepcap.models.forward import Hook, Stop, call, is_out_of_memory, run_hooks, with_hooks
from sepcap.models.kinds import is_hooked_transformer, kind_of
from sepcap.models.sites import n_layers

KeysAndValues = tuple[Float[Tensor, "row head pos d_key"], Float[Tensor, "row head pos d_value"]]

NO_CACHE = (AttributeError, IndexError, NotImplementedError, RuntimeError, TypeError, ValueError)
"""Exceptions of architectures without a cache of keys and values, such as those with recurrent layers."""


@dataclass(frozen=True, eq=False)
class Recorded:
    """Record of one unablated pass over some rows.

    Attributes:
        inputs: token ids [row, pos], or pixels.
        mask: attention mask, if the model is given one.
        streams: the residual stream entering each layer, and last the one that leaves the last layer; each [row, pos, d_model].
        cache: keys and values of every layer; None if the model kept none.
        in_tuple: whether blocks of this architecture return the stream inside a tuple.
    """

    inputs: Shaped[Tensor, "row ..."]
    mask: Bool[Tensor, "row pos"] | None
    streams: tuple[Float[Tensor, "row pos d_model"], ...]
    cache: tuple[KeysAndValues, ...] | None
    in_tuple: bool


def keeps_cache(model: Any) -> bool:
    """Whether keys and values of earlier positions can be reused: a causal bridge."""
    return kind_of(model) == "causal" and not is_hooked_transformer(model)


@torch.inference_mode()
def record(
    model: Any, inputs: Shaped[Tensor, "row ..."], mask: Bool[Tensor, "row pos"] | None = None, hooks: Sequence[Hook] = ()
) -> Recorded:
    """Run rows once, and record the values from which later passes start.

    Args:
        model: a hooked model.
        inputs: token ids, or pixels.
        mask: attention mask.
        hooks: further hooks, which must not change activations.
    """
    layers, streams = range(n_layers(model)), {}
    in_tuple = False

    def look_at_form(block: Any, inputs: Any, output: Any) -> None:
        nonlocal in_tuple
        in_tuple = isinstance(output, tuple)

    def keep(layer: int) -> Any:
        return lambda stream, hook: streams.update({layer: stream.clone()})

    every: list[Hook] = [*hooks, *((hook_of(model, "resid_pre", layer), keep(layer)) for layer in layers)]
    every.append((hook_of(model, "resid_post", layers[-1]), keep(len(layers))))
    cache = None
    with ExitStack() as stack:
        stack.callback(model.blocks[0].register_forward_hook(look_at_form).remove)
        if keeps_cache(model) and mask is None:
            cache = _keys_and_values(model, inputs, every)
        if cache is None:
            run_hooks(model, inputs, every, mask)
    return Recorded(inputs, mask, tuple(streams[layer] for layer in range(len(layers) + 1)), cache, in_tuple)


def _keys_and_values(model: Any, inputs: Tensor, every: Sequence[Hook]) -> tuple[KeysAndValues, ...] | None:
    """Run a pass, and return the keys and values of every position of every layer, if the architecture keeps them."""
    kept: Any = DynamicCache()  # without the configuration: a sliding window would drop early positions
    last, look = every[-1]
    try:
        with suppress(Stop), with_hooks(model, [*every[:-1], (last, _stop_after(look))]):
            model(inputs, return_type="logits", past_key_values=kept)
    except NO_CACHE as error:
        if is_out_of_memory(error):
            raise
        return None
    found = [(getattr(layer, "keys", None), getattr(layer, "values", None)) for layer in kept.layers]
    whole = len(found) == n_layers(model) and all(
        isinstance(x, Tensor) and x.dim() == 4 and (x.shape[0], x.shape[2]) == tuple(inputs.shape) for pair in found for x in pair
    )
    return tuple((keys, values) for keys, values in found if keys is not None and values is not None) if whole else None


@contextmanager
def passing_on(model: Any, layer: int, stream: Float[Tensor, "batch pos d_model"], in_tuple: bool) -> Iterator[None]:
    """Inside, blocks before a layer are not run: the layer, or the final norm, receives the given residual stream."""
    given = (stream,) if in_tuple else stream
    if any("forward" in block.__dict__ for block in model.blocks):
        raise RuntimeError("passing_on: the model starts from another layer already; leave that context first")
    skipped = model.blocks[:layer]
    try:
        for block in skipped:
            # bypasses the bridge's own setattr, which would set it on the wrapped block
            block.__dict__["forward"] = lambda *args, **kwargs: given
        if layer == n_layers(model):
            yield
        else:
            with with_hooks(model, [(hook_of(model, "resid_pre", layer), lambda _, hook: stream)]):
                yield
    finally:
        for block in skipped:
            block.__dict__.pop("forward", None)


def _stop_after(look: Any) -> Any:
    def stop(stream: Tensor, hook: Any) -> None:
        look(stream, hook=hook)
        raise Stop

    return stop


@torch.inference_mode()
def run_part(
    model: Any,
    recorded: Recorded,
    layer: int,
    stream: Float[Tensor, "item pos d_model"],
    rows: Int[Tensor, " item"],
    first: int,
    hooks: Sequence[Hook] = (),
) -> Float[Tensor, "item pos d_model"]:
    """The residual stream that leaves the last layer, from the one that enters a layer.

    Args:
        model: a hooked model.
        recorded: the unablated pass.
        layer: the layer that `stream` enters.
        stream: at the positions from `first` on, for one item per row of the batch.
        rows: the row of `recorded` that each item belongs to.
        first: number of earlier positions, at which keys and values are those of the unablated pass; without a cache it must be 0.
        hooks: hooks in this layer and the later ones.
    """
    if layer == n_layers(model):
        return stream
    found: list[Tensor] = []
    last = first + stream.shape[1]
    name = hook_of(model, "resid_post", n_layers(model) - 1)
    every = [*hooks, (name, _stop_after(lambda left, hook: found.append(left)))]
    with suppress(Stop), passing_on(model, layer, stream, recorded.in_tuple), with_hooks(model, every):
        _call_part(model, recorded, rows, first, last)
    return found[0]


@torch.inference_mode()
def run_whole(
    model: Any, recorded: Recorded, layer: int, rows: Int[Tensor, " item"], hooks: Sequence[Hook] = ()
) -> Float[Tensor, "item pos out"]:
    """Logits at every position of whole rows, from the stream that enters a layer on; an image has one position."""
    with passing_on(model, layer, recorded.streams[layer][rows], recorded.in_tuple), with_hooks(model, hooks):
        logits = call(model, recorded.inputs[rows], None if recorded.mask is None else recorded.mask[rows])
    return logits if logits.dim() == 3 else logits[:, None]


@torch.inference_mode()
def unembed(model: Any, recorded: Recorded, stream: Float[Tensor, "place d_model"]) -> Float[Tensor, "place vocab"]:
    """Logits of single positions of any rows, from the residual stream that leaves the last layer, by the model's own norm and head."""
    places, width = stream.shape
    length = min(places, recorded.inputs.shape[1])
    rows = math.ceil(places / length)
    padded = torch.nn.functional.pad(stream, (0, 0, 0, rows * length - places)).view(rows, length, width)
    # the embeddings of these tokens are not used: any token except padding is valid
    ids = recorded.inputs[:1, :1].expand(rows, length)
    with passing_on(model, n_layers(model), padded, recorded.in_tuple):
        return call(model, ids).flatten(0, 1)[:places]


def _call_part(model: Any, recorded: Recorded, rows: Tensor, first: int, last: int) -> None:
    mask = None if recorded.mask is None else recorded.mask[rows, :last]
    ids = recorded.inputs[rows] if recorded.inputs.is_floating_point() else recorded.inputs[rows, first:last]
    if not first:
        call(model, ids, mask)
        return
    assert recorded.cache is not None
    model(ids, return_type="logits", past_key_values=Cache(layers=[_Prefix(whole, rows, first, last) for whole in recorded.cache]))


class _Prefix(DynamicLayer):
    """Keys and values of a layer: those of the unablated pass at the first positions, those of this pass at the later ones."""

    def __init__(self, whole: KeysAndValues, rows: Int[Tensor, " item"], first: int, last: int) -> None:
        super().__init__()
        self.whole, self.rows, self.first, self.last, self.is_initialized = whole, rows, first, last, True

    def get_seq_length(self) -> int:
        return self.first

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        joined = []
        for old, new in zip(self.whole, (key_states, value_states), strict=True):
            both = old[self.rows, :, : self.last]
            both[:, :, self.first :] = new
            joined.append(both)
        return joined[0], joined[1]
