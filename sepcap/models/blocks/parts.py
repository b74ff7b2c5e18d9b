"""The attention or the mlp of one block as a function of the residual stream that it reads, on a given text (METHODS 13)."""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.overrides import TorchFunctionMode

from sepcap.errors import unknown
from sepcap.models.attention import FUSED, NATIVE, SEPARATE
from sepcap.models.forward import Stop, call, device_of, evaluating
from sepcap.models.kinds import architecture_of, inner, is_hooked_transformer, kind_of
from sepcap.models.sites import check_layer, site_shape

PARTS = {"attn": "ln1", "mlp": "ln2"}
"""Part of a block -> the norm through which it reads the residual stream, if it has one of its own."""

Function = Callable[[Float[Tensor, "pos d_model"]], Float[Tensor, "pos d_model"]]


@dataclass(frozen=True, eq=False)
class Part:
    """What attention or an mlp adds to the residual stream, as a function of the stream that enters it.

    The residual connection is outside: neither it nor any other part is in `function`.

    Attributes:
        layer, part: which one.
        function: residual stream at the kept positions -> what is added at them. The stream at the other positions (BOS) is fixed.
        at: the residual stream of the text at the kept positions, [pos, d_model].
        entry, exit: hook points at which the function begins and ends.
        reads: dimensions of the stream that the part can read at one position: d_model − 1 after a LayerNorm, which removes the mean.
        active: number of mlp neurons that are not 0, at every kept position; None for attention, and for a mixture of experts.
        context: number of positions that are held fixed.
        product_bytes: approximate memory of one product with the Jacobian, in bytes.
    """

    layer: int
    part: str
    function: Function
    at: Float[Tensor, "pos d_model"]
    entry: str
    exit: str
    reads: int
    active: tuple[int, ...] | None
    context: int
    product_bytes: int


class _FullPrecision(TorchFunctionMode):
    """Keep float64 in float64: norms and softmax of many architectures compute in float32 whatever the input's precision.

    Rounding in between is not a linear map: a Jacobian of known rank would have another rank.
    """

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if args and isinstance(args[0], Tensor) and args[0].dtype == torch.float64:
            if func is Tensor.float:
                return args[0]
            if func is Tensor.to:
                args = tuple(torch.float64 if a is torch.float32 else a for a in args)
            if kwargs.get("dtype") is torch.float32:
                kwargs = {**kwargs, "dtype": torch.float64}
        return func(*args, **kwargs)


def check_part(model: Any, part: str, dtype: torch.dtype, forward: bool = False) -> None:
    """Raise if a part of the blocks cannot be computed as a function of the residual stream at some tokens.

    Args:
        model: a hooked model.
        part: "attn" or "mlp".
        dtype: precision to compute in.
        forward: whether the forward derivative (JVP) is needed.

    Raises:
        ValueError: an unknown part, an image classifier, float64 on a device that does not support it.
        NotImplementedError: a HookedTransformer, a mixture of experts in float64 or if a JVP is needed.
    """
    if part not in PARTS:
        raise unknown("part", part, PARTS)
    if is_hooked_transformer(model):
        raise NotImplementedError(
            "model is a HookedTransformer; the Jacobian of a part of a block needs the hooks of a TransformerBridge: "
            "load the checkpoint through sepcap.load_model(folder or name)"
        )
    if kind_of(model) == "images":
        raise ValueError(f"model: {model.cfg.model_name} takes images, which have no rows of tokens to choose; give a language model")
    if dtype == torch.float64 and device_of(model).type == "mps":
        raise ValueError("dtype='float64': Apple's GPUs do not support it; give dtype='float32', or load the model with device='cpu'")
    if part == "mlp" and any(map(_has_experts, model.blocks)):
        what = f"part='mlp' of {architecture_of(model)}: the grouped products of a mixture of experts"
        if dtype == torch.float64:
            raise NotImplementedError(f"{what} exist in float32 and below only; give dtype='float32', or part='attn'")
        if forward:
            raise NotImplementedError(f"{what} have no forward derivative; give method='exact' with few tokens, or part='attn'")


@contextmanager
def block_part(
    model: Any,
    layer: int,
    part: str,
    ids: Int[Tensor, " row"],
    kept: Sequence[int],
    *,
    norm: bool = True,
    dtype: torch.dtype = torch.float64,
) -> Iterator[Part]:
    """The attention or the mlp of a layer as a function of its input, on one row of tokens.

    A copy of the block is made in the requested precision; the model itself is unchanged, and surrounding ablations count as part
    of it. Attention is computed step by step inside, because the fused kernels have no forward derivative.

    Args:
        model: a TransformerBridge.
        layer: number of the block.
        part: "attn" or "mlp".
        ids: tokens of the row.
        kept: positions whose residual stream is the variable.
        norm: whether the input is the residual stream, so that the norm before the part belongs to the function; else the input is
            the output of that norm. In architectures without a norm there (BERT, OPT-350m, OLMo-2) both are the same.
        dtype: precision in which everything inside is computed.
    """
    check_part(model, part, dtype)
    check_layer(model, layer)
    with _step_by_step(model), torch.no_grad():
        args, kwargs, seen = _look(model, layer, ids)
        if f"{part}.hook_in" not in seen or not any(name in seen for name in _ends(part)):
            raise NotImplementedError(
                f"part={part!r} of {architecture_of(model)}: layer {layer} does not compute it (it is recurrent or "
                f"convolutional); choose other layers, or part={next(other for other in PARTS if other != part)!r}"
            )
        entry, leave = _between(seen, part, norm)
        block = model.blocks[layer]
        own = copy.deepcopy(block).to(dtype).eval()
        args, kwargs = _cast(args, dtype), {name: _cast(value, dtype) for name, value in kwargs.items()}
        # the copy of OPT's or BERT's block still calls some hook points of the block that it was copied from
        at_entry, at_exit = ([b.get_submodule(name) for b in (own, block)] for name in (entry, leave))
        base = _cast(seen[entry], dtype)
        base = base.reshape(len(ids), base.shape[-1])
        where = torch.tensor(list(kept), device=base.device)

        def function(x: Float[Tensor, "pos d_model"]) -> Float[Tensor, "pos d_model"]:
            whole = base.index_copy(0, where, x)
            added: list[Tensor] = []

            def leave_here(_: Any, inputs: Any, output: Tensor) -> None:
                added.append(output)
                raise Stop

            with ExitStack() as stack:
                for point in at_entry:
                    put = point.register_forward_hook(lambda _, inputs, output: whole.reshape(output.shape))
                    stack.callback(put.remove)
                for point in at_exit:
                    stack.callback(point.register_forward_hook(leave_here).remove)
                if dtype == torch.float64:
                    stack.enter_context(_FullPrecision())
                try:
                    own(*args, **kwargs)
                except Stop:
                    return added[0].reshape(len(ids), added[0].shape[-1]).index_select(0, where)
            raise RuntimeError(f"blocks.{layer}.{leave} was never called: {architecture_of(model)} has no such activation")

        centred = norm and entry.startswith("ln") and str(model.cfg.normalization_type).startswith("LN")
        width = base.shape[1]
        yield Part(
            layer=layer,
            part=part,
            function=function,
            at=base.index_select(0, where),
            entry=f"blocks.{layer}.{entry}",
            exit=f"blocks.{layer}.{leave}",
            reads=width - centred,
            active=_active(seen, kept, len(ids)) if part == "mlp" and not _has_experts(block) else None,
            context=len(ids) - len(where),
            product_bytes=_bytes_of_product(model, part, len(ids), width, dtype.itemsize),
        )


LOOKED_AT = (
    *(f"{norm}.hook_in" for norm in ("ln1", "ln2")),
    *(f"{norm}_post.hook_out" for norm in ("ln1", "ln2")),
    *("attn.hook_in", "attn.o.hook_out", "attn.hook_out", "mlp.hook_in", "mlp.hook_post", "mlp.out.hook_out", "mlp.hook_out"),
)


def _look(model: Any, layer: int, ids: Int[Tensor, " row"]) -> tuple[tuple[Any, ...], dict[str, Any], dict[str, Tensor]]:
    """One pass up to the end of a block: the arguments of the block, and its activations in the order of computation."""
    block = model.blocks[layer]
    values: dict[str, Tensor] = {}
    called: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def keep(name: str, point: Any, inputs: Any, output: Any) -> None:
        values.setdefault(name, output.detach())

    def stop(*_: Any) -> None:
        raise Stop

    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        for name in LOOKED_AT:
            if (point := model.hook_dict.get(f"blocks.{layer}.{name}")) is not None:
                stack.callback(point.register_forward_hook(partial(keep, name)).remove)
        remember = block.register_forward_pre_hook(lambda _, args, kwargs: called.append((args, kwargs)), with_kwargs=True)
        stack.callback(remember.remove)
        stack.callback(block.register_forward_hook(stop).remove)
        try:
            call(model, ids[None].to(device_of(model)))
        except Stop:
            return *called[0], values
    raise RuntimeError(f"layer {layer} was never called")


def _between(seen: dict[str, Tensor], part: str, norm: bool) -> tuple[str, str]:
    """Hook points at which the part begins and ends, by the order in which the hooks were called."""
    order = {name: i for i, name in enumerate(seen)}
    begins = f"{part}.hook_in"
    if norm:
        # Phi's mlp reads through the norm of its attention; a norm that comes later belongs to the stream itself (BERT, OPT-350m)
        own = f"{PARTS[part]}.hook_in"
        shared = "ln1.hook_in" if own not in order and order.get("ln1.hook_in", len(order)) < order["attn.hook_in"] else own
        if order.get(shared, len(order)) < order[begins]:
            begins = shared
    return begins, next(name for name in _ends(part) if name in order)


def _ends(part: str) -> tuple[str, str, str]:
    """Hook points at which a part may end; the first that exists counts, because Gemma and OLMo-2 normalise once more before adding."""
    return f"{PARTS[part]}_post.hook_out", "attn.o.hook_out" if part == "attn" else "mlp.out.hook_out", f"{part}.hook_out"


def _active(seen: dict[str, Tensor], kept: Sequence[int], row: int) -> tuple[int, ...] | None:
    post = seen.get("mlp.hook_post")
    if post is None:
        return None
    return tuple((post.reshape(row, -1)[list(kept)] != 0).sum(1).tolist())


def _has_experts(block: Any) -> bool:
    mlp = getattr(block, "mlp", None)
    return mlp is not None and any("experts" in name for name, _ in mlp.named_modules())


def _bytes_of_product(model: Any, part: str, row: int, width: int, itemsize: int) -> int:
    inside = 4 * row * int(model.cfg.n_heads) + 8 * width if part == "attn" else 6 * width + 3 * int(model.cfg.d_mlp or 4 * width)
    return itemsize * row * inside


@contextmanager
def _step_by_step(model: Any) -> Iterator[None]:
    """Attention without fused kernels, which have no forward derivative."""
    before = inner(model).config._attn_implementation
    if before in ("eager", None):
        yield
        return
    inner(model).set_attn_implementation("eager")
    try:
        yield
    finally:
        inner(model).set_attn_implementation(before)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor):
        return value.detach().to(dtype) if value.is_floating_point() else value
    return type(value)(_cast(part, dtype) for part in value) if type(value) in (tuple, list) else value


def widest(part: Part, model: Any) -> int:
    """Upper bound on the rank of the Jacobian of a part, from the sizes of everything between its input and its output.

    For an mlp, whose positions do not mix: at every position the dimensions that it reads, the neurons that are not 0, or d_model,
    whichever are fewest. For attention over n positions: the dimensions that it reads, or heads·d_head. If several query heads share a
    value head, its values and the attention weights of the group's further heads can bound it more tightly: the first t rows have
    t·d_head from the values, and min(s − 1, d_head) from the weights of each further head over s positions, which add up to 1.

    Example:
        >>> widest(part, model)  # doctest: +SKIP
        2040
    """
    n, width = part.at.shape
    if part.part == "mlp":
        return sum(min(part.reads, active, width) for active in part.active or [width] * n)
    try:
        heads, d_head = site_shape(model, "attn_pre_out")[1:]
        value_heads = site_shape(model, "attn_value")[1]
    except NotImplementedError:
        return n * part.reads
    out = min(width, heads * d_head)
    most = n * min(part.reads, out)
    if inner(model).config.model_type not in NATIVE | SEPARATE | FUSED:  # there may be a gate or a sink between values and W_O
        return most
    causal = kind_of(model) == "causal"
    for t in range(1, n + 1) if causal else [n]:
        attended = [(i if causal else n) + part.context for i in range(1, t + 1)]
        weights = (heads // value_heads - 1) * sum(min(s - 1, d_head) for s in attended)
        most = min(most, value_heads * (t * d_head + weights) + (n - t) * out)
    return most
