"""Forward passes: logits, or hooks only up to the last one that is wanted."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

Hook = tuple[str, Callable[..., Any]]

SDPA_SAFE = frozenset({"opt"})
"""Architectures whose attention the bridge leaves to Hugging Face, so that the fused kernel can be given back.
GPT-2, GPT-NeoX, Llama and Mistral always run the bridge's own attention."""


class _Stop(Exception):
    """Raised by the last hook: nothing after it is wanted."""


def device_of(model: Any) -> torch.device:
    """Where the model's embedding, and so its input, lives."""
    return next(model.original_model.parameters()).device


@contextmanager
def fast_attention(model: Any) -> Iterator[None]:
    """Use the fused attention kernel inside, where that changes nothing but the time.

    Booting a bridge forces eager attention for the sake of `hook_pattern`. As long as nobody hooks the
    pattern or the scores, scaled-dot-product attention gives the same result without storing them.
    """
    config = model.original_model.config
    before = config._attn_implementation
    watched = any(
        point.fwd_hooks for name, point in model.hook_dict.items() if name.endswith(("hook_pattern", "hook_attn_scores"))
    )
    if config.model_type not in SDPA_SAFE or before != "eager" or watched:
        yield
        return
    wants_maps = config.output_attentions
    config.output_attentions = False  # set at boot; the fused kernel has no maps to give
    model.original_model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        model.original_model.set_attn_implementation(before)
        config.output_attentions = wants_maps


@torch.inference_mode()
def run_hooks(model: Any, ids: Int[Tensor, "batch pos"], hooks: Sequence[Hook], last: str) -> None:
    """Run the model with hooks and stop as soon as the hook named `last` has been called.

    The unembedding, and all layers after the last hook, are not computed.
    """

    def stop(activation: Tensor, hook: Any) -> None:
        raise _Stop

    try:
        with model.hooks(fwd_hooks=[*hooks, (last, stop)]):
            model(ids, return_type=None, use_cache=False)
    except _Stop:
        pass


@torch.inference_mode()
def logits_of(model: Any, ids: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos vocab"]:
    """Logits of a batch, in the model's dtype."""
    return model(ids, return_type="logits", use_cache=False)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception is an allocation that failed, on whatever device."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and ("out of memory" in str(error) or "can't allocate memory" in str(error))
    )
