"""Sites: populations of neurons, with the hooks that read their activations and the weights that define them.

The table `SITES` is METHODS section 2. A `Population` is a site of one model: the shape of its neurons, and the live weights of a
TransformerBridge by which they are deleted.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sepcap.errors import unknown
from sepcap.models.kinds import architecture_of

WEIGHTS = {"mlp": ("W_in", "b_in", "W_gate", "b_gate", "W_out", "b_out"), "attn": ("W_V", "b_V", "W_O", "b_O")}
"""Part of a block -> its weights that deletion, offsets and rotation edit."""


@dataclass(frozen=True)
class Site:
    """One population of neurons, the same in every layer.

    Attributes:
        name: "mlp", "attn_pre_out" or "attn_value".
        hook: TransformerLens hook name with `{layer}` to be filled in.
        part: part of the block that holds the neurons, "mlp" or "attn".
        output: weight of that part with a row of d_model numbers for each neuron; value neurons have one for every query head.
        bias: bias of that part, which receives what deleted neurons added.
        shape_in: function (part) giving the shape of its neurons, `(d_mlp,)` or `(heads, d_head)`.
        zero_inputs: function (part, mask) that zeroes the input weights of masked neurons whose output weights are zero.
        activation_function: whether "positive" means "active" here ([SP] appendix B).
        eps: default ε of the score, METHODS 5.
    """

    name: str
    hook: str
    part: str
    output: str
    bias: str
    shape_in: Callable[[Any], tuple[int, ...]]
    zero_inputs: Callable[[Any, Tensor], None]
    activation_function: bool
    eps: float

    def hook_name(self, layer: int) -> str:
        """Hook name of one layer."""
        return self.hook.format(layer=layer)


def n_layers(model: Any) -> int:
    """Number of blocks of a hooked model."""
    return len(model.blocks)


def check_layer(model: Any, layer: int) -> None:
    """Raise if the model does not have that layer."""
    if not 0 <= layer < n_layers(model):
        raise IndexError(f"layer={layer} does not exist: the model has layers 0 to {n_layers(model) - 1}")


def check_head(layer: int, head: int, layers: int, heads: int) -> None:
    """Raise if there is no such head among so many layers of so many heads."""
    for name, value, count in (("layer", layer, layers), ("head", head, heads)):
        if not 0 <= value < count:
            raise IndexError(f"{name}={value}: head ({layer}, {head}) does not exist, {name}s are numbered 0 to {count - 1}")


def live_weight(part: Any, name: str, *default: Any) -> Any:
    """A weight of an attention or mlp as the model computes with it, or the default if there is none.

    Under grouped-query attention a HookedTransformer exposes an expanded copy as W_V, but computes with _W_V.
    """
    own = f"_{name}"
    return getattr(part, own if hasattr(part, own) else name, *default)


def live_weights(block: Any, part: str) -> dict[str, Tensor]:
    """Those of `WEIGHTS` that a part of a block has, as the model computes with them."""
    found = {name: live_weight(getattr(block, part), name, None) for name in WEIGHTS[part]}
    return {name: weight for name, weight in found.items() if weight is not None}


def _mlp_shape(mlp: Any) -> tuple[int, ...]:
    # not cfg.d_mlp: it is wrong for OPT models whose ffn_dim is not 4·d_model
    return (mlp.W_out.shape[0],)


def _z_shape(attn: Any) -> tuple[int, ...]:
    d_head = _v_shape(attn)[1]
    return (attn.W_O.shape[0], d_head)


def _v_shape(attn: Any) -> tuple[int, ...]:
    n_value_heads, _, d_head = live_weight(attn, "W_V").shape
    return (n_value_heads, d_head)


def _zero_mlp_inputs(mlp: Any, mask: Bool[Tensor, " neuron"]) -> None:
    mlp.W_in[:, mask] = 0
    for name in ("W_gate", "b_in", "b_gate"):
        weight = getattr(mlp, name, None)
        if weight is not None:
            weight[..., mask] = 0


def _zero_unused_values(attn: Any, mask: Bool[Tensor, "head d_head"]) -> None:
    # under grouped-query attention several query heads share a value column: it is zeroed
    # only if the row of W_O is zero for every one of them (METHODS 2)
    grouped = (live_weight(attn, "W_V").shape[0], -1, mask.shape[1])
    row_is_gone = (attn.W_O == 0).all(dim=-1).view(grouped).all(dim=1)
    _zero_values(attn, row_is_gone & mask.view(grouped).any(dim=1))


def _zero_values(attn: Any, mask: Bool[Tensor, "value_head d_head"]) -> None:
    live_weight(attn, "W_V").transpose(1, 2)[mask] = 0
    bias = live_weight(attn, "b_V", None)
    if bias is not None:
        bias[mask] = 0


SITES: dict[str, Site] = {
    site.name: site
    for site in (
        Site("mlp", "blocks.{layer}.mlp.hook_post", "mlp", "W_out", "b_out", _mlp_shape, _zero_mlp_inputs, True, 1e-3),
        Site("attn_pre_out", "blocks.{layer}.attn.hook_z", "attn", "W_O", "b_O", _z_shape, _zero_unused_values, False, 1e-4),
        Site("attn_value", "blocks.{layer}.attn.hook_v", "attn", "W_O", "b_O", _v_shape, _zero_values, False, 1e-4),
    )
}
"""All sites by name (METHODS section 2)."""


def get_site(name: str) -> Site:
    """The site of that name; an error names the nearest one."""
    if name not in SITES:
        raise unknown("site", name, SITES)
    return SITES[name]


@dataclass(frozen=True, eq=False)
class Population:
    """The neurons of one site of a model; `bind` makes it.

    Weights are read from the model at every call, so that they are always those that it computes with.

    Attributes:
        model: a hooked model.
        site: the site.
        shape: shape over the whole model: `(layers, *shape of one layer)`.
    """

    model: Any
    site: Site
    shape: tuple[int, ...]

    @property
    def layers(self) -> range:
        """Numbers of the layers."""
        return range(self.shape[0])

    @property
    def size(self) -> int:
        """Number of neurons."""
        return math.prod(self.shape)

    def part(self, layer: int) -> Any:
        """The attention or mlp that holds the neurons of a layer."""
        return getattr(self.model.blocks[layer], self.site.part)

    def output(self, layer: int) -> Float[Tensor, "*neuron d_model"]:
        """The output weight of the layer's part."""
        return getattr(self.part(layer), self.site.output)

    def rows(self, layer: int) -> Float[Tensor, "*neuron d_model"]:
        """What one unit of each neuron adds to the residual stream."""
        rows = self.output(layer)
        return rows.unflatten(0, (self.shape[1], -1)).sum(1) if self.site.name == "attn_value" else rows

    def norms(self) -> Float[Tensor, "layer *neuron"]:
        """‖W_write‖₂ of every neuron, over d_model, in float64."""
        rows = [self.rows(layer).detach() for layer in self.layers]
        return torch.stack([torch.linalg.vector_norm(row, dim=-1, dtype=torch.float64).cpu() for row in rows])

    def bias(self, layer: int) -> Any:
        """The bias that is added to what the neurons write, or None if the architecture has none."""
        return getattr(self.part(layer), self.site.bias, None)

    @torch.no_grad()
    def zero_outputs(self, layer: int, mask: Bool[Tensor, "*neuron"]) -> None:
        """Zero the output weights of the masked neurons of a layer."""
        weight = self.output(layer)
        rows = mask.to(weight.device).repeat_interleave(len(weight) // len(mask), dim=0)
        weight[rows] = 0
        _check_reached(not bool((self.output(layer)[rows] != 0).any()), f"blocks.{layer}.{self.site.part}.{self.site.output}")

    @torch.no_grad()
    def delete(self, layer: int, mask: Bool[Tensor, "*neuron"]) -> None:
        """Zero the output and input weights of the masked neurons of a layer (METHODS 6)."""
        self.zero_outputs(layer, mask)
        self.site.zero_inputs(self.part(layer), mask.to(self.output(layer).device))

    @torch.no_grad()
    def add_offset(self, layer: int, mask: Bool[Tensor, "*neuron"], constants: Float[Tensor, "*neuron"]) -> None:
        """Add what the masked neurons write at constant activations to the output bias of the layer (METHODS 6)."""
        rows = self.rows(layer).double()
        mask = mask.to(rows.device)
        written = constants.to(rows)[mask] @ rows[mask]
        write_weight(self.model, layer, f"{self.site.part}.{self.site.bias}", self.bias(layer).double() + written)


def bind(model: Any, name: str) -> Population:
    """The neurons of a site of a model, which are of the same number in all layers.

    Raises:
        ValueError: an unknown site.
        NotImplementedError: an architecture without such neurons in every layer, or with unequal numbers; the error lists its sites.
    """
    site = get_site(name)
    found = _look_at(site, model)
    if isinstance(found, tuple):
        return Population(model, site, (n_layers(model), *found))
    others = [repr(site.name) for site in SITES.values() if isinstance(_look_at(site, model), tuple)]
    works = f"What works: {', '.join(others)}." if others else "No other site works here either."
    raise NotImplementedError(f"site {name!r} of {architecture_of(model)}: {found}. {works}")


def _look_at(site: Site, model: Any) -> tuple[int, ...] | str:
    """The shape of a site in one layer, or why the model has no such site."""
    first = ()
    for layer, block in enumerate(model.blocks):
        try:
            shape = site.shape_in(getattr(block, site.part))
        except (AttributeError, NotImplementedError, ValueError) as error:
            return f"layer {layer} {_lacks(getattr(block, site.part, None), error)}"
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


def resolve_sites(sites: str | Iterable[str]) -> tuple[str, ...]:
    """Names of sites, checked, in the order given, each once."""
    names = (sites,) if isinstance(sites, str) else tuple(dict.fromkeys(sites))
    if not names:
        raise ValueError(f"sites is empty; give one or more of {', '.join(map(repr, SITES))}")
    for name in names:
        get_site(name)
    return names


def populations(model: Any, sites: str | Iterable[str]) -> dict[str, Population]:
    """The neurons of some sites of a model, by site, in the order given."""
    return {name: bind(model, name) for name in resolve_sites(sites)}


def site_shape(model: Any, name: str) -> tuple[int, ...]:
    """Shape of a site over the whole model: `(layers, *shape of one layer)`."""
    return bind(model, name).shape


def output_biases(populations: Iterable[Population]) -> dict[str, Float[Tensor, "layer d_model"]]:
    """Copies of the output biases of some populations, by the names that `write_weights` takes."""
    named = {f"{p.site.part}.{p.site.bias}": p for p in populations}
    return {name: torch.stack([p.bias(layer).detach().cpu() for layer in p.layers]) for name, p in sorted(named.items())}


def write_weights(model: Any, weights: Mapping[str, Float[Tensor, "layer ..."]]) -> None:
    """Write weights of all blocks, see `write_weight`."""
    for name, of_layers in weights.items():
        for layer, value in enumerate(of_layers):
            write_weight(model, layer, name, value)


@torch.no_grad()
def write_weight(model: Any, layer: int, name: str, value: Float[Tensor, "..."]) -> None:
    """Write a weight of a block, such as "attn.W_O", through its live view, in the model's dtype, and check that the model has it."""
    part, weight = name.split(".")
    owner = getattr(model.blocks[layer], part)
    live = live_weight(owner, weight)
    live.copy_(value)
    _check_reached(torch.equal(live_weight(owner, weight), value.to(live)), f"blocks.{layer}.{name}")


def _check_reached(reached: bool, name: str) -> None:
    if not reached:
        raise RuntimeError(
            f"editing {name} did not reach the model: this architecture exposes a copy of the weight, not a live view. "
            "Please report the model class."
        )


@torch.no_grad()
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
