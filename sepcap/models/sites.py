"""Sites: populations of neurons, with the hooks that read their activations and the weights that define them.

The table `SITES` is METHODS section 2. A site has its hook, the shape of its population in one
layer, and a function that deletes neurons by editing the live weight views of a TransformerBridge.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sepcap.errors import unknown
from sepcap.models.kinds import architecture_of


@dataclass(frozen=True)
class Site:
    """One population of neurons, the same in every layer.

    Attributes:
        name: "mlp", "attn_pre_out" or "attn_value".
        hook: TransformerLens hook name with `{layer}` to be filled in.
        shape_in: function (model, layer) giving the shape of its neurons, `(d_mlp,)` or `(heads, d_head)`.
        delete: function (model, layer, mask) that zeroes the weights of the masked neurons.
        rows: function (model, layer) giving what one unit of each neuron adds to the residual stream, [*neuron, d_model].
        output_bias: (part of the block, weight) that receives what deleted neurons added.
        activation_function: whether "positive" means "active" here ([SP] appendix B).
        eps: default ε of the score, METHODS 5.
    """

    name: str
    hook: str
    shape_in: Callable[[Any, int], tuple[int, ...]]
    delete: Callable[[Any, int, Tensor], None]
    rows: Callable[[Any, int], Tensor]
    output_bias: tuple[str, str]
    activation_function: bool
    eps: float

    def hook_name(self, layer: int) -> str:
        """Hook name of one layer."""
        return self.hook.format(layer=layer)

    def shape(self, model: Any) -> tuple[int, ...]:
        """Shape of the neurons of one layer, the same in all layers.

        Raises:
            NotImplementedError: an architecture without such neurons in every layer, or with unequal numbers; the error lists its sites.
        """
        found = _look_at(self, model)
        if isinstance(found, tuple):
            return found
        others = [repr(site.name) for site in SITES.values() if isinstance(_look_at(site, model), tuple)]
        works = f"What works: {', '.join(others)}." if others else "No other site works here either."
        raise NotImplementedError(f"site {self.name!r} of {architecture_of(model)}: {found}. {works}")


def _look_at(site: Site, model: Any) -> tuple[int, ...] | str:
    """The shape of a site in one layer, or why the model has no such site."""
    first = ()
    for layer, block in enumerate(model.blocks):
        try:
            shape = site.shape_in(model, layer)
        except (AttributeError, NotImplementedError, ValueError) as error:
            return f"layer {layer} {_lacks(getattr(block, site.output_bias[0], None), error)}"
        first = first or shape
        if shape != first:
            return f"layer {layer} has neurons of shape {list(shape)}, but layer 0 {list(first)}"
    return first


def _lacks(part: Any, error: Exception) -> str:
    """Why the weights of a part of a block are not available, in words."""
    if part is None:
        return "has none (it is recurrent or convolutional)"
    if any("experts" in name for name, _ in part.named_modules()):
        return "is a mixture of experts, where different neurons act on each token"
    if any(parameter.is_meta for parameter in part.parameters()):
        return "is offloaded to CPU or disk by a device_map; weights must be in memory"
    if "MLA" in str(error):
        return "has latent attention, where values are computed from a compressed vector and not by a W_V"
    return f"exposes no weights of such neurons ({error})"


def n_layers(model: Any) -> int:
    """Number of blocks of a hooked model."""
    return len(model.blocks)


def live_weight(part: Any, name: str, *default: Any) -> Any:
    """A weight of an attention or mlp as the model computes with it, or the default if there is none.

    Under grouped-query attention a HookedTransformer exposes an expanded copy as W_V, but computes with _W_V.
    """
    own = f"_{name}"
    return getattr(part, own if hasattr(part, own) else name, *default)


def _mlp_shape(model: Any, layer: int) -> tuple[int, ...]:
    # not cfg.d_mlp: it is wrong for OPT models whose ffn_dim is not 4·d_model
    return (model.blocks[layer].mlp.W_out.shape[0],)


def _z_shape(model: Any, layer: int) -> tuple[int, ...]:
    d_head = _v_shape(model, layer)[1]
    return (model.blocks[layer].attn.W_O.shape[0], d_head)


def _v_shape(model: Any, layer: int) -> tuple[int, ...]:
    n_value_heads, _, d_head = live_weight(model.blocks[layer].attn, "W_V").shape
    return (n_value_heads, d_head)


def _delete_mlp(model: Any, layer: int, mask: Bool[Tensor, " neuron"]) -> None:
    mlp = model.blocks[layer].mlp
    mlp.W_in[:, mask] = 0
    mlp.W_out[mask, :] = 0
    for name in ("W_gate", "b_in", "b_gate"):
        weight = getattr(mlp, name, None)
        if weight is not None:
            weight[..., mask] = 0
    check_zero(mlp.W_out[mask, :], f"blocks.{layer}.mlp.W_out")


def _delete_pre_out(model: Any, layer: int, mask: Bool[Tensor, "head d_head"]) -> None:
    attn = model.blocks[layer].attn
    w_out = attn.W_O
    w_out[mask] = 0
    check_zero(attn.W_O[mask], f"blocks.{layer}.attn.W_O")
    # under grouped-query attention several query heads share a value column: it is zeroed
    # only if the row of W_O is zero for every one of them (METHODS 2)
    n_value_heads = live_weight(attn, "W_V").shape[0]
    grouped = (n_value_heads, -1, mask.shape[1])
    row_is_gone = (w_out == 0).all(dim=-1).view(grouped).all(dim=1)
    _zero_values(attn, row_is_gone & mask.view(grouped).any(dim=1))


def _delete_value(model: Any, layer: int, mask: Bool[Tensor, "value_head d_head"]) -> None:
    attn = model.blocks[layer].attn
    query_heads_per_value = attn.W_O.shape[0] // live_weight(attn, "W_V").shape[0]
    rows = mask.repeat_interleave(query_heads_per_value, dim=0)
    attn.W_O[rows] = 0
    check_zero(attn.W_O[rows], f"blocks.{layer}.attn.W_O")
    _zero_values(attn, mask)


def _zero_values(attn: Any, mask: Bool[Tensor, "value_head d_head"]) -> None:
    live_weight(attn, "W_V").transpose(1, 2)[mask] = 0
    bias = live_weight(attn, "b_V", None)
    if bias is not None:
        bias[mask] = 0


def check_zero(weight: Float[Tensor, "..."], name: str) -> None:
    """Raise if weights that were set to zero are not zero when read again: the model exposes copies."""
    _check_reached(not bool((weight != 0).any()), name)


def _check_reached(reached: bool, name: str) -> None:
    if not reached:
        raise RuntimeError(
            f"editing {name} did not reach the model: this architecture exposes a copy of the weight, not a live view. "
            "Please report the model class."
        )


@torch.no_grad()
def write_weight(part: Any, name: str, value: Float[Tensor, "..."], where: str) -> None:
    """Write a weight of a block through its live view, in the model's dtype, and check that the model has it."""
    weight = live_weight(part, name)
    weight.copy_(value)
    _check_reached(torch.equal(live_weight(part, name), value.to(weight)), f"{where}.{name}")


def _mlp_rows(model: Any, layer: int) -> Float[Tensor, "neuron d_model"]:
    return model.blocks[layer].mlp.W_out


def _z_rows(model: Any, layer: int) -> Float[Tensor, "head d_head d_model"]:
    return model.blocks[layer].attn.W_O


def _v_rows(model: Any, layer: int) -> Float[Tensor, "value_head d_head d_model"]:
    attn = model.blocks[layer].attn
    return attn.W_O.unflatten(0, (len(live_weight(attn, "W_V")), -1)).sum(1)


SITES: dict[str, Site] = {
    site.name: site
    for site in (
        Site("mlp", "blocks.{layer}.mlp.hook_post", _mlp_shape, _delete_mlp, _mlp_rows, ("mlp", "b_out"), True, 1e-3),
        Site("attn_pre_out", "blocks.{layer}.attn.hook_z", _z_shape, _delete_pre_out, _z_rows, ("attn", "b_O"), False, 1e-4),
        Site("attn_value", "blocks.{layer}.attn.hook_v", _v_shape, _delete_value, _v_rows, ("attn", "b_O"), False, 1e-4),
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
def write_norms(model: Any, name: str) -> Float[Tensor, "layer *neuron"]:
    """‖W_write‖₂ of every neuron of a site, over d_model, in float64."""
    rows = [get_site(name).rows(model, layer).detach() for layer in range(n_layers(model))]
    return torch.stack([torch.linalg.vector_norm(row, dim=-1, dtype=torch.float64).cpu() for row in rows])


def norm_inside(part: Any) -> str | None:
    """Name of a norm within an attention or mlp, other than of queries and keys; None without one."""
    if not hasattr(part, "original_component"):  # of a HookedTransformer
        return "ln" if hasattr(part, "ln") else None
    if getattr(part, "name", None) is None:  # no module of its own: what it wraps is the whole block, as in OPT
        return None
    for name, module in part.original_component.named_children():
        if ("norm" in name or "Norm" in type(module).__name__) and not name.startswith(("q", "k")):
            return name
    return None


@torch.no_grad()
def delete_weights(model: Any, name: str, masks: Bool[Tensor, "layer ..."]) -> None:
    """Zero the weights of the masked neurons of one site in every layer (METHODS 6)."""
    site = get_site(name)
    for layer, mask in enumerate(masks):
        if bool(mask.any()):
            site.delete(model, layer, mask.to(site.rows(model, layer).device))


def output_bias(model: Any, name: str, layer: int) -> Float[Tensor, " d_model"] | None:
    """The bias that is added to what a site's neurons write, or None if the architecture has none."""
    part, weight = get_site(name).output_bias
    return getattr(getattr(model.blocks[layer], part), weight, None)


@torch.no_grad()
def add_offset(model: Any, name: str, masks: Bool[Tensor, "layer ..."], constants: Float[Tensor, "layer ..."]) -> None:
    """Add what the masked neurons write at constant activations to the output bias of their layer (METHODS 6)."""
    site = get_site(name)
    part, weight = site.output_bias
    for layer, mask in enumerate(masks):
        if bool(mask.any()):
            rows = site.rows(model, layer).double()
            mask = mask.to(rows.device)
            written = constants[layer].to(rows)[mask] @ rows[mask]
            owner = getattr(model.blocks[layer], part)
            write_weight(owner, weight, getattr(owner, weight).double() + written, f"blocks.{layer}.{part}")


def output_biases(model: Any, sites: Iterable[str]) -> dict[str, Float[Tensor, "layer d_model"]]:
    """Copies of the output biases of the sites, by the names that `write_output_biases` takes."""
    named = sorted({get_site(name).output_bias for name in sites})
    return {f"{part}.{bias}": torch.stack([getattr(getattr(b, part), bias).detach().cpu() for b in model.blocks]) for part, bias in named}


def write_output_biases(model: Any, biases: Mapping[str, Float[Tensor, "layer d_model"]]) -> None:
    """Put back what `output_biases` copied."""
    for name, values in biases.items():
        part, bias = name.split(".")
        for layer, value in enumerate(values):
            write_weight(getattr(model.blocks[layer], part), bias, value, f"blocks.{layer}.{part}")
