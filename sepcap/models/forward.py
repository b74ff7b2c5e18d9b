"""Forward passes: full passes for logits, or passes that stop after the last hook."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from sepcap.models.attention import fast_attention, hooked
from sepcap.models.devices import device_of as device_of  # re-exported
from sepcap.models.kinds import architecture_of, inner, is_hooked_transformer, kind_of

Hook = tuple[str, Callable[..., Any]]


class Stop(Exception):
    """Raised by the last hook to be called: nothing after it is needed."""


@contextmanager
def measuring(model: Any) -> Iterator[None]:
    """Set up a measurement: evaluation mode (no dropout) and fast attention; both are restored afterwards."""
    with evaluating(model), fast_attention(model), _without_zero_bias(model), _plain_norms(model):
        yield


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Evaluation mode: no dropout."""
    training = [module for module in model.modules() if module.training]
    try:
        if training:  # walking through all modules takes as long as a small model's pass
            model.eval()
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _without_zero_bias(model: Any) -> Iterator[None]:
    """Skip the zero bias that a bridge gives an unembedding without one; adding it to all logits costs a tenth of a small model's pass."""
    buffers = getattr(getattr(model.unembed, "original_component", None), "_buffers", {})
    bias = buffers.get("bias")
    if bias is None or bool(bias.any()):
        yield
        return
    buffers["bias"] = None
    try:
        yield
    finally:
        buffers["bias"] = bias


@contextmanager
def _plain_norms(model: Any) -> Iterator[None]:
    """Skip what the bridge's norms compute only for `hook_scale` and `hook_normalized`, if neither is hooked.

    The result is that of the original norm in both cases; the values for the hooks cost a tenth of a small model's pass.
    """
    from transformer_lens.model_bridge.generalized_components import NormalizationBridge

    quiet = []
    for module in model.modules():
        if (
            isinstance(module, NormalizationBridge)
            and "_hf_autograd_forward_with_hooks" not in module.__dict__  # nested, as an evaluation within a run is
            and (module.use_native_layernorm_autograd or getattr(module.config, "layer_norm_folding", False))
            and not any(map(hooked, (module.hook_scale, module.hook_normalized)))
        ):
            quiet.append(module)
            module.__dict__["_hf_autograd_forward_with_hooks"] = partial(_norm_of, module)
    try:
        yield
    finally:
        for module in quiet:
            del module.__dict__["_hf_autograd_forward_with_hooks"]


def _norm_of(module: Any, x: Tensor) -> Tensor:
    return module.original_component(x).to(x.dtype)


@contextmanager
def output_in_place(model: Any) -> Iterator[None]:
    """Leave the output of a model that is spread over devices on its device, instead of moving all logits to that of the input."""
    hook: Any = getattr(inner(model), "_hf_hook", None)
    taking_back: list[Any] = [h for h in getattr(hook, "hooks", (hook,)) if getattr(h, "io_same_device", False)]
    try:
        for one in taking_back:
            one.io_same_device = False
        yield
    finally:
        for one in taking_back:
            one.io_same_device = True


def positions_of(model: Any) -> int:
    """Context length of the model, in tokens (or patches)."""
    for name, module in inner(model).named_modules():
        # RoBERTa numbers positions from the padding index on: fewer than its configuration states can be used
        padding = getattr(module, "padding_idx", None)
        if padding is not None and name.removesuffix("._original_component").endswith("position_embeddings"):
            return int(module.weight.shape[0]) - padding - 1
    return int(model.cfg.n_ctx)


def point_at(model: Any, name: str) -> str:
    """Name of a hook point; if SAELens has replaced it by an SAE, that of the SAE's output, which the later modules read."""
    after = f"{name}.hook_sae_output"
    return after if is_hooked_transformer(model) and after in model.hook_dict else name


def with_hooks(model: Any, hooks: Sequence[Hook]) -> AbstractContextManager[Any]:
    """The model with hooks at the hook points that they name."""
    return model.hooks(fwd_hooks=[(point_at(model, name), function) for name, function in hooks])


@torch.inference_mode()
def run_hooks(
    model: Any, inputs: Shaped[Tensor, "batch ..."], hooks: Sequence[Hook], mask: Bool[Tensor, "batch pos"] | None = None
) -> None:
    """Run the model with hooks, and stop as soon as every one of them has been called.

    The unembedding, and all layers after the last hook, are not computed.

    Raises:
        RuntimeError: a hook that is never called: this architecture computes nothing at that hook point.
    """
    waiting = {name for name, _ in hooks}

    def counted(name: str, function: Callable[..., Any]) -> Hook:
        def look(activation: Tensor, hook: Any) -> Any:
            result = function(activation, hook=hook)
            waiting.discard(name)
            if not waiting:
                raise Stop
            return result

        return name, look

    try:
        with with_hooks(model, [counted(*hook) for hook in hooks]):
            call(model, inputs, mask)
    except Stop:
        return
    raise RuntimeError(f"{min(waiting)} was never called: {architecture_of(model)} has no such activation")


def call(model: Any, inputs: Shaped[Tensor, "batch ..."], mask: Bool[Tensor, "batch pos"] | None = None) -> Float[Tensor, "batch ... out"]:
    """Logits of token ids or pixels, in the model's dtype: [batch, pos, vocab], or [batch, class]. Hooks apply, gradients flow."""
    if inputs.is_floating_point():
        return model(inputs.to(next(inner(model).parameters()).dtype), return_type="logits")
    options: dict[str, Any] = {} if mask is None else {"attention_mask": mask.long()}
    if kind_of(model) == "causal" and not is_hooked_transformer(model):  # a HookedTransformer keeps no cache unless it is given one
        options["use_cache"] = False
    return model(inputs, return_type="logits", **options)


@torch.inference_mode()
def logits_of(
    model: Any, inputs: Shaped[Tensor, "batch ..."], mask: Bool[Tensor, "batch pos"] | None = None
) -> Float[Tensor, "batch pos out"]:
    """Logits of a batch at every position; an image has one position."""
    logits = call(model, inputs, mask)
    return logits if logits.dim() == 3 else logits[:, None]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception is a failed allocation, on any device."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and ("out of memory" in str(error) or "can't allocate memory" in str(error))
    )
