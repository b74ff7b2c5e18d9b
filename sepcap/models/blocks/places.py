"""Places in a block with vectors of d_model numbers: the outputs of its parts, and the residual stream (METHODS 13)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from jaxtyping import Float
from torch import Tensor

from sepcap.errors import unknown
from sepcap.models.forward import Hook, point_at
from sepcap.models.kinds import architecture_of, inner, is_hooked_transformer
from sepcap.models.sites import bind, check_head, n_layers

Look = Callable[[int, Float[Tensor, "batch pos d_model"]], None]
"""Function that receives the vectors of a layer: (layer, vectors)."""


@dataclass(frozen=True)
class Place:
    """A vector of d_model numbers in every layer.

    Attributes:
        bridge: hook of a TransformerBridge, within its block.
        hooked_transformer: hook of a HookedTransformer.
        means: its description.
    """

    bridge: str
    hooked_transformer: str
    means: str


PLACES: dict[str, Place] = {
    "attn_out": Place("attn.o.hook_out", "hook_attn_out", "what attention adds, without the residual stream"),
    "mlp_out": Place("mlp.out.hook_out", "hook_mlp_out", "what the mlp adds, without the residual stream"),
    "resid_post": Place("hook_out", "hook_resid_post", "the residual stream after the block"),
    "resid_pre": Place("hook_in", "hook_resid_pre", "the residual stream before the block"),
}
"""Places by name. If a norm follows attention or mlp (Gemma-2, BERT), the place of a bridge is before that norm; see `norm_behind`."""

NORMS_BEHIND = {"attn_out": "ln1_post", "mlp_out": "ln2_post"}
"""Place -> the norm of a bridge's block through which it enters the residual stream, if there is one (Gemma-2, OLMo-2)."""

NORMED_SUMS = ("bert", "roberta", "xlm-roberta", "camembert", "openai-gpt")
"""Model types of transformers that norm the sum of stream and output; OPT does too if so configured."""

Head = tuple[int, int]


def hook_of(model: Any, place: str, layer: int) -> str:
    """Name of the hook of a place in a layer."""
    row = PLACES[place]
    return f"blocks.{layer}.{row.hooked_transformer if is_hooked_transformer(model) else row.bridge}"


def place_hooks(model: Any, place: str, layers: Sequence[int], look: Look) -> list[Hook]:
    """Hooks that pass the vectors of a place in some layers to `look`.

    Raises:
        ValueError: an unknown place.
        NotImplementedError: a layer without such a place (a mixture of experts has no single output projection).
    """
    if place not in PLACES:
        raise unknown("place", place, PLACES)
    names = {layer: hook_of(model, place, layer) for layer in layers}
    for layer, name in names.items():
        if point_at(model, name) not in model.hook_dict:
            raise NotImplementedError(
                f"{place!r} ({PLACES[place].means}) of {architecture_of(model)}: layer {layer} has no {name.split('.', 2)[2]}. "
                "What works everywhere: 'resid_post'"
            )

    def hooked(layer: int, vectors: Tensor, hook: Any) -> None:
        look(layer, vectors)

    return [(name, partial(hooked, layer)) for layer, name in names.items()]


def head_hooks(model: Any, heads: Sequence[Head], look: Look) -> list[Hook]:
    """Hooks that pass to `look` what single heads add to the residual stream, z_h W_O[h], without the bias; at most one head per layer.

    Raises:
        IndexError: a head that does not exist.
        NotImplementedError: an architecture whose heads cannot be separated.
    """
    population = bind(model, "attn_pre_out")
    layers, n_heads, _ = population.shape
    for layer, head in heads:
        check_head(layer, head, layers, n_heads)

    def write(layer: int, head: int, z: Float[Tensor, "batch pos head d_head"], hook: Any) -> None:
        look(layer, z[:, :, head] @ population.rows(layer)[head].to(z))

    return [(population.site.hook_name(layer), partial(write, layer, head)) for layer, head in heads]


def norm_behind(model: Any, place: str) -> Literal["output", "sum"] | None:
    """Which norm follows a place: "output", one of the output alone before it is added; "sum", one of the sum; None, there is none.

    Heads are treated as "attn_out". A HookedTransformer gives outputs after their own norm, as they are added.
    """
    if place not in NORMS_BEHIND:
        return None
    config = getattr(inner(model), "config", model.cfg)
    if getattr(config, "model_type", None) in NORMED_SUMS or getattr(config, "do_layer_norm_before", True) is False:
        return "sum"
    return "output" if not is_hooked_transformer(model) and hasattr(model.blocks[0], NORMS_BEHIND[place]) else None


def all_layers(model: Any) -> range:
    """Numbers of the model's layers."""
    return range(n_layers(model))


def location_name(location: int) -> str:
    """Position of a location in the residual stream, worded for use in a sentence."""
    return "before the first block" if location == 0 else f"after layer {location - 1}"
