"""Forward passes that start at a later layer, from a recorded residual stream (METHODS 11).

An intervention in layer l does not change the residual stream that enters layer l. It is recorded once, and every further pass
over the same tokens starts from it. The library's own forward runs with the blocks before l passing it on, so that positions,
rotary embeddings and masks are computed as usual.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from sepcap.models.blocks.places import hook_of
from sepcap.models.forward import Hook, call, run_hooks, with_hooks
from sepcap.models.sites import check_layer


@dataclass(frozen=True, eq=False)
class Residual:
    """The residual stream of one batch where it enters a layer.

    Attributes:
        layer: the layer.
        value: [batch, pos, d_model].
        in_tuple: whether the blocks of this architecture return it inside a tuple.
    """

    layer: int
    value: Float[Tensor, "batch pos d_model"]
    in_tuple: bool


@contextmanager
def recording(model: Any, layers: Iterable[int]) -> Iterator[dict[int, Residual]]:
    """Record the residual stream entering some layers, in the last pass that is run inside.

    Args:
        model: a hooked model.
        layers: numbers of layers.

    Yields:
        A dictionary that each pass fills: layer -> Residual. Ablations around it count as part of the model.

    Raises:
        IndexError: a layer that the model does not have.
    """
    wanted = sorted(set(layers))
    for layer in wanted:
        check_layer(model, layer)
    kept: dict[int, Residual] = {}
    in_tuple = False

    def look_at_form(block: Any, inputs: Any, output: Any) -> None:
        nonlocal in_tuple
        in_tuple = isinstance(output, tuple)

    def keep(layer: int, residual: Tensor, hook: Any) -> None:
        # an inference tensor could not be used for fitting afterwards
        with torch.inference_mode(False):
            kept[layer] = Residual(layer, residual.detach().clone(), in_tuple)

    with ExitStack() as stack:
        stack.callback(model.blocks[0].register_forward_hook(look_at_form).remove)
        stack.enter_context(with_hooks(model, [(hook_of(model, "resid_pre", layer), partial(keep, layer)) for layer in wanted]))
        yield kept


def residuals(
    model: Any, inputs: Shaped[Tensor, "batch ..."], layers: Iterable[int], mask: Bool[Tensor, "batch pos"] | None = None
) -> dict[int, Residual]:
    """The residual stream entering some layers, in one pass that ends at the last of them.

    Example:
        >>> before = residuals(model, ids, [3])[3]  # doctest: +SKIP
        >>> logits_from(model, before, ids)  # doctest: +SKIP
    """
    wanted = sorted(set(layers))
    if not wanted:
        return {}
    with recording(model, wanted) as kept:
        run_hooks(model, inputs, [(hook_of(model, "resid_pre", wanted[-1]), lambda residual, hook: None)], mask)
    return kept


@contextmanager
def starting_from(model: Any, residual: Residual) -> Iterator[None]:
    """Inside, passes over the tokens that a residual stream was recorded on run only its layer and the later ones.

    Everything else in a pass is unchanged: hooks, gradients, attention kernels. Hooks in earlier layers are not called.

    Args:
        model: a hooked model; it is restored afterwards, also after an exception.
        residual: from `residuals` or `recording`; the batch that is run must be the recorded one.

    Raises:
        RuntimeError: inside another `starting_from`.
    """
    check_layer(model, residual.layer)
    passed_on = (residual.value,) if residual.in_tuple else residual.value
    if any("forward" in block.__dict__ for block in model.blocks):
        raise RuntimeError("starting_from: the model starts from another layer already; leave that context first")
    skipped = model.blocks[: residual.layer]
    try:
        for block in skipped:
            # bypasses the bridge's own setattr, which would set it on the wrapped block
            block.__dict__["forward"] = lambda *args, **kwargs: passed_on
        with with_hooks(model, [(hook_of(model, "resid_pre", residual.layer), lambda _, hook: residual.value)]):
            yield
    finally:
        for block in skipped:
            block.__dict__.pop("forward", None)


def logits_from(
    model: Any,
    residual: Residual,
    inputs: Shaped[Tensor, "batch ..."],
    fwd_hooks: Sequence[Hook] = (),
    mask: Bool[Tensor, "batch pos"] | None = None,
) -> Float[Tensor, "batch ... out"]:
    """Logits of a batch from the residual stream entering a layer; gradients flow to whatever the hooks insert.

    Args:
        model: a hooked model.
        residual: recorded on the same tokens.
        inputs: the tokens, or the images.
        fwd_hooks: hooks in the residual's layer or after it.

    Raises:
        ValueError: a hook in a layer that is not run, or inputs of another shape than the recorded ones.
    """
    recorded = residual.value.shape[: 1 if inputs.is_floating_point() else 2]
    if inputs.shape[: len(recorded)] != recorded:
        raise ValueError(f"inputs are {list(inputs.shape)}, but the residual stream was recorded on {list(residual.value.shape[:2])}")
    skipped = tuple(f"blocks.{layer}." for layer in range(residual.layer))
    for name, _ in fwd_hooks:
        if name.startswith(skipped):
            raise ValueError(f"fwd_hooks: {name} is never called in a pass that starts at layer {residual.layer}")
    with starting_from(model, residual), with_hooks(model, fwd_hooks):
        return call(model, inputs, mask)
