"""Sites: populations of neurons, where to read their activations and which weights make them.

The table `SITES` is METHODS section 2. A site knows its hook, the shape of its population in one
layer, and how to delete neurons by editing the live weight views of a TransformerBridge.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sepcap.errors import unknown


@dataclass(frozen=True)
class Site:
    """One population of neurons, the same in every layer.

    Attributes:
        name: "mlp", "attn_pre_out" or "attn_value".
        hook: TransformerLens hook name with `{layer}` to be filled in.
        shape: function of the model giving the neurons of one layer, `(d_mlp,)` or `(heads, d_head)`.
        delete: function (model, layer, mask) that zeroes the weights of the masked neurons.
        activation_function: whether "positive" means "active" here ([SP] appendix B).
        eps: default ε of the score, METHODS 5.
    """

    name: str
    hook: str
    shape: Callable[[Any], tuple[int, ...]]
    delete: Callable[[Any, int, Tensor], None]
    activation_function: bool
    eps: float

    def hook_name(self, layer: int) -> str:
        """Hook name of one layer."""
        return self.hook.format(layer=layer)


def n_layers(model: Any) -> int:
    """Number of blocks of a hooked model."""
    return len(model.blocks)


def _mlp_shape(model: Any) -> tuple[int, ...]:
    # not cfg.d_mlp: it is wrong for OPT models whose ffn_dim is not 4·d_model
    return (model.blocks[0].mlp.W_out.shape[0],)


def _z_shape(model: Any) -> tuple[int, ...]:
    return tuple(model.blocks[0].attn.W_O.shape[:2])


def _v_shape(model: Any) -> tuple[int, ...]:
    n_value_heads, _, d_head = model.blocks[0].attn.W_V.shape
    return (n_value_heads, d_head)


def _delete_mlp(model: Any, layer: int, mask: Bool[Tensor, " neuron"]) -> None:
    mlp = model.blocks[layer].mlp
    mlp.W_in[:, mask] = 0
    mlp.W_out[mask, :] = 0
    for name in ("W_gate", "b_in", "b_gate"):
        weight = getattr(mlp, name, None)
        if weight is not None:
            weight[..., mask] = 0
    _check_zero(mlp.W_out[mask, :], f"blocks.{layer}.mlp.W_out")


def _delete_pre_out(model: Any, layer: int, mask: Bool[Tensor, "head d_head"]) -> None:
    attn = model.blocks[layer].attn
    w_out = attn.W_O
    w_out[mask] = 0
    _check_zero(attn.W_O[mask], f"blocks.{layer}.attn.W_O")
    # under grouped-query attention a value column serves several query heads: it may go
    # only when every one of them has lost its row of W_O (METHODS 2)
    n_value_heads = attn.W_V.shape[0]
    grouped = (n_value_heads, -1, mask.shape[1])
    row_is_gone = (w_out == 0).all(dim=-1).view(grouped).all(dim=1)
    _zero_values(attn, row_is_gone & mask.view(grouped).any(dim=1))


def _delete_value(model: Any, layer: int, mask: Bool[Tensor, "value_head d_head"]) -> None:
    attn = model.blocks[layer].attn
    query_heads_per_value = attn.W_O.shape[0] // attn.W_V.shape[0]
    rows = mask.repeat_interleave(query_heads_per_value, dim=0)
    attn.W_O[rows] = 0
    _check_zero(attn.W_O[rows], f"blocks.{layer}.attn.W_O")
    _zero_values(attn, mask)


def _zero_values(attn: Any, mask: Bool[Tensor, "value_head d_head"]) -> None:
    attn.W_V.transpose(1, 2)[mask] = 0
    if attn.b_V is not None:
        attn.b_V[mask] = 0


def _check_zero(weight: Float[Tensor, "..."], name: str) -> None:
    if weight.numel() and bool((weight != 0).any()):
        raise RuntimeError(
            f"editing {name} did not reach the model: this architecture shows a copy of the weight, not a live view. "
            "Please report the model class."
        )


SITES: dict[str, Site] = {
    site.name: site
    for site in (
        Site("mlp", "blocks.{layer}.mlp.hook_post", _mlp_shape, _delete_mlp, True, 1e-3),
        Site("attn_pre_out", "blocks.{layer}.attn.hook_z", _z_shape, _delete_pre_out, False, 1e-4),
        Site("attn_value", "blocks.{layer}.attn.hook_v", _v_shape, _delete_value, False, 1e-4),
    )
}
"""All sites by name (METHODS section 2)."""


def get_site(name: str) -> Site:
    """The site of that name; an error names the nearest one."""
    if name not in SITES:
        raise unknown("site", name, SITES)
    return SITES[name]


def resolve_sites(sites: str | Iterable[str]) -> tuple[str, ...]:
    """Names of sites, checked, in the order given, each once."""
    names = (sites,) if isinstance(sites, str) else tuple(dict.fromkeys(sites))
    if not names:
        raise ValueError(f"sites is empty; give one or more of {', '.join(map(repr, SITES))}")
    for name in names:
        get_site(name)
    return names


def site_shape(model: Any, name: str) -> tuple[int, ...]:
    """Shape of a site over the whole model: `(layers, *shape of one layer)`."""
    return (n_layers(model), *get_site(name).shape(model))


@torch.no_grad()
def delete_weights(model: Any, name: str, masks: Bool[Tensor, "layer ..."]) -> None:
    """Zero the weights of the masked neurons of one site in every layer (METHODS 6)."""
    site = get_site(name)
    for layer, mask in enumerate(masks):
        if bool(mask.any()):
            site.delete(model, layer, mask.to(model.blocks[layer].attn.W_O.device))
