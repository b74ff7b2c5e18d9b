"""Trial edits: before an edit, a few tokens are run through the model to check that its weights act as their layout implies.

Every layer is tested separately: it receives the residual stream that entered it before the edit, and the output of its attention
or mlp is compared. The neurons of a trial are the strongest on these tokens.
"""

from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from sepcap.interventions.resample import undisturbed
from sepcap.models.blocks.places import hook_of
from sepcap.models.devices import check_at_hand
from sepcap.models.forward import Hook, device_of, logits_of, measuring, point_at, with_hooks
from sepcap.models.kinds import architecture_of, inner, kind_of
from sepcap.models.sites import Population, bind, live_weight, live_weights, norm_inside
from sepcap.models.wrappers import check_plain_weights

TOKENS = 8
"""Number of tokens in a trial."""
STRONGEST = 16
"""Number of neurons per layer that a trial deletes."""
SAME = 1e-4
"""Relative tolerance of an output in float32; in half precision it is four units of rounding."""

_PASSED: WeakKeyDictionary[Any, set[tuple[Any, ...]]] = WeakKeyDictionary()
"""Model -> trials that it has passed, each with the modules that the model then had."""


@dataclass
class Pass:
    """Activations recorded in one pass; every list has an entry for each layer.

    Attributes:
        entered: the residual stream that enters a layer.
        neurons: activations at the site's hook, before they are replaced.
        added: the output of the attention or mlp, which is added to the residual stream.
        left: the residual stream that leaves a layer.
        logits: of the whole model.
    """

    entered: list[Tensor] = field(default_factory=list)
    neurons: list[Tensor] = field(default_factory=list)
    added: list[Tensor] = field(default_factory=list)
    left: list[Tensor] = field(default_factory=list)
    logits: Tensor = field(default_factory=lambda: torch.empty(0))


def check_deletion(population: Population, offset: bool = False) -> None:
    """Raise if deleting neurons would change others, or if a trial deletion fails.

    The trial is run once per model: neurons are deleted by their weights, the effect is compared with setting their activations
    to zero (with an offset: to constants) by hooks, and every weight is restored bit for bit.

    Raises:
        NotImplementedError: an architecture with a norm, or an SAE, over the neurons before their output weights.
        ValueError: weights that do not act as their layout implies.
    """
    model, name, part = population.model, population.site.name, population.site.part
    what = f"deleting {name!r} neurons"
    check_at_hand(model, what)
    check_plain_weights(model, [part], what)
    norm = norm_inside(population.part(0))
    if norm and name != "attn_value":  # the hook and the weights both read a value before the norm
        raise NotImplementedError(
            f"{what} of {architecture_of(model)}: {norm} normalises over them before their output weights, so "
            "deleting one would change all others. Use sepcap.ablate instead, which works by hooks"
        )
    # of SAELens: hook -> SAE in its place
    for hook in getattr(model, "acts_to_saes", {}):
        if hook.split(".")[2] == part:
            raise NotImplementedError(
                f"{what}: an SAE at {hook} reads them before their output weights do, so deleting one would change all others. "
                "Remove it first: model.reset_saes(). To keep it, use sepcap.ablate, which works by hooks"
            )
    trial = (name, offset, *map(id, model.modules()))
    if trial not in _PASSED.get(model, ()):
        _try_deletion(population, offset, what)
        _PASSED.setdefault(model, set()).add(trial)


Edit = Callable[[Population, int, Tensor, Tensor], None]
"""Changes the weights of masked neurons of a layer: (population, layer, mask, constants that replace their activations)."""


def _delete(population: Population, layer: int, mask: Tensor, constants: Tensor) -> None:
    if bool(constants.any()):
        population.add_offset(layer, mask, constants)
    population.delete(layer, mask)


@torch.no_grad()
def _try_deletion(population: Population, offset: bool, what: str) -> None:
    what += " with an offset" if offset else ""
    # zeroed values would hide the effect of W_O, which has rows for query heads
    written = bind(population.model, "attn_pre_out") if population.site.name == "attn_value" else population
    trial = _Trial(written, 0.0)
    trial.of(lambda population, layer, mask, _: population.zero_outputs(layer, mask), what)
    (trial if written is population and not offset else _Trial(population, float(offset))).of(_delete, what)


class _Trial:
    """The strongest neurons, and the effect of holding them at constants by hooks, with which an edit is compared."""

    def __init__(self, population: Population, offset: float) -> None:
        self.population = population
        self.before = one_pass(population)
        self.flat = [z.reshape(-1, *population.shape[1:]).float() for z in self.before.neurons]
        self.rows = [population.rows(layer).float().cpu() for layer in population.layers]
        strength = (z.abs().amax(0) * r.norm(dim=-1) for z, r in zip(self.flat, self.rows, strict=True))
        self.masks = torch.stack([_strongest(one) for one in strength])
        self.constants = torch.stack([z.mean(0) for z in self.flat]) * offset

        def put(layer: int, z: Tensor) -> Tensor:
            return torch.where(self.masks[layer].to(z.device), self.constants[layer].to(z), z)

        self.ablated = one_pass(population, self.before.entered, put)

    def of(self, edit: Edit, what: str) -> None:
        """Raise if an edit has another effect."""
        population, model = self.population, self.population.model
        with _edited(population, edit, self.masks, self.constants):
            deleted = one_pass(population, self.before.entered)
        check_same(model, deleted, self.ablated, what, "zeroing them has another effect than holding the neurons constant by hooks")
        for layer, mask in enumerate(self.masks):
            z = self.flat[layer]
            written = ((z - self.constants[layer])[:, mask] @ self.rows[layer][mask]).norm(dim=-1)
            left, without = (seen.left[layer].reshape(len(z), -1) for seen in (self.before, self.ablated))
            if bool((written > _same(model) * left.norm(dim=-1)).any()) and torch.equal(left, without):
                raise _refusal(model, layer, what, "the output of these neurons does not reach the residual stream through them")
            silent = deleted.neurons[layer].reshape(z.shape)[:, mask]
            differ = bool((silent - silent[:1]).abs().max() > _same(model) * z.abs().max())
            # a query head's mixture of values is kept as long as another head uses the values
            if differ and edit is _delete and population.site.name != "attn_pre_out":
                raise _refusal(model, layer, what, "with the input weights zeroed, neurons still depend on the input")


def one_pass(population: Population, entered: Sequence[Tensor] | None = None, put: Callable[[int, Tensor], Tensor] | None = None) -> Pass:
    """Run a few tokens through a model, without hooks of the user other than permanent ones.

    Args:
        population: the neurons whose activations are recorded.
        entered: replaces the residual stream that enters each layer.
        put: function (layer, activations at the site's hook) that returns their replacements.
    """
    seen, model, site, layers = Pass(), population.model, population.site, population.layers

    def enter(layer: int, x: Tensor, hook: Any) -> Tensor:
        seen.entered.append(x.clone())
        return x if entered is None else entered[layer].clone()

    def act(layer: int, z: Tensor, hook: Any) -> Tensor:
        seen.neurons.append(z.detach().cpu())
        return z if put is None else put(layer, z)

    def add(layer: int, y: Tensor, hook: Any) -> None:
        seen.added.append(y.detach().float().cpu())

    def leave(layer: int, x: Tensor, hook: Any) -> None:
        seen.left.append(x.detach().float().cpu())

    known = model.hook_dict  # made anew at every look
    points = (
        ([_point(model, known, "resid_pre", layer) for layer in layers], enter),
        ([site.hook_name(layer) for layer in layers], act),
        ([_point(model, known, f"{site.part}_out", layer) for layer in layers], add),
        ([_point(model, known, "resid_post", layer) for layer in layers], leave),
    )
    hooks: list[Hook] = [(hook, partial(function, layer)) for names, function in points for layer, hook in enumerate(names)]
    with measuring(model), undisturbed(model), with_hooks(model, hooks):
        seen.logits = logits_of(model, small_input(model)).detach().float().cpu()
    for (names, _), found in zip(points, (seen.entered, seen.neurons, seen.added, seen.left), strict=True):
        if len(found) != len(layers):
            raise ValueError(f"hooks like {names[0]} are called {len(found)} times in a pass over {len(layers)} layers, not once per layer")
    return seen


def check_same(model: Any, one: Pass, other: Pass, what: str, why: str) -> None:
    """Raise if two passes differ by more than rounding, in a layer or in the logits.

    Raises:
        ValueError: they differ.
    """
    for layer, of_layer in enumerate(zip(one.added, other.added, one.left, other.left, strict=True)):
        if any(_differ(model, *pair) for pair in (of_layer[:2], of_layer[2:])):
            raise _refusal(model, layer, what, why)
    if _differ(model, one.logits, other.logits):
        raise _refusal(model, None, what, why)


def _differ(model: Any, a: Tensor, b: Tensor) -> bool:
    a, b = (x.nan_to_num(0, 0, 0) for x in (a, b))
    return bool(((a - b).norm(dim=-1) > _same(model) * torch.maximum(a.norm(dim=-1), b.norm(dim=-1))).any())


def small_input(model: Any, rows: int = 1) -> Shaped[Tensor, "rows ..."]:
    """The same small input in every row of a batch: tokens from the middle of the vocabulary, or a grey image."""
    if kind_of(model) == "images":
        config = inner(model).config
        size = config.image_size
        height, width = (size, size) if isinstance(size, int) else size
        return torch.zeros(rows, config.num_channels, height, width, device=device_of(model), dtype=model.cfg.dtype)
    tokens = min(TOKENS, model.cfg.n_ctx)
    return ((model.cfg.d_vocab // 2 + torch.arange(tokens, device=device_of(model))) % model.cfg.d_vocab).expand(rows, -1)


def _strongest(size: Float[Tensor, "*neuron"]) -> Bool[Tensor, "*neuron"]:
    mask = torch.zeros(size.numel(), dtype=torch.bool)
    mask[size.flatten().topk(min(STRONGEST, size.numel())).indices] = True
    return mask.view(size.shape)


@contextmanager
def _edited(population: Population, edit: Edit, masks: Tensor, constants: Tensor) -> Iterator[None]:
    """The model with neurons deleted; afterwards every weight is restored bit for bit. Only changed entries are stored meanwhile."""
    changed: list[tuple[Any, str, tuple[Tensor, ...], Tensor]] = []
    try:
        for layer, block in enumerate(population.model.blocks):
            owner = population.part(layer)
            before = {name: live.detach().clone() for name, live in live_weights(block, population.site.part).items()}
            try:
                edit(population, layer, masks[layer], constants[layer])
            finally:
                for weight, old in before.items():
                    where = (_bits(live_weight(owner, weight)) != _bits(old)).nonzero(as_tuple=True)
                    changed.append((owner, weight, where, old[where]))
        yield
    finally:
        for owner, weight, where, old in reversed(changed):
            live_weight(owner, weight)[where] = old


def _bits(weight: Tensor) -> Tensor:
    return weight.detach().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[weight.dtype.itemsize])


def _point(model: Any, known: Container[str], place: str, layer: int) -> str:
    """Hook of a place in a layer; if a part has no output hook of its own, that of the block."""
    own = hook_of(model, place, layer)
    return own if point_at(model, own) in known else hook_of(model, "resid_post", layer)


def _same(model: Any) -> float:
    dtype = next(p.dtype for p in inner(model).parameters() if p.is_floating_point())
    return max(SAME, 4 * torch.finfo(dtype).eps)


def _refusal(model: Any, layer: int | None, what: str, why: str) -> ValueError:
    where = "its logits" if layer is None else f"layer {layer}"
    return ValueError(
        f"{what} of this {architecture_of(model)}: in {where} the weights do not act as their layout implies, tested with {TOKENS} tokens: "
        f"{why}. A module computes with more than its weight: with a copy of it, or with an addition that was not merged. Nothing was "
        "changed. Use sepcap.ablate instead, which works by hooks"
    )
