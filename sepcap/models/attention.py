"""Attention by the fused kernel, where it changes only the run time.

A bridge computes attention step by step, so that scores and patterns can be hooked: at 2,048 tokens this takes twice as long
as the whole forward pass of the bare model. As long as there is no hook between the values and the output projection,
scaled-dot-product attention gives the same result without storing a pattern.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sepcap.models.kinds import inner, is_hooked_transformer

NATIVE = frozenset({"opt", "bert", "roberta", "vit"})
"""Architectures whose attention the bridge leaves to Hugging Face: only the kernel has to be exchanged."""

SEPARATE = frozenset({"llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi"})
"""Architectures whose attention module computes with the bridge's own projections, so that its own forward can be restored."""

FUSED = frozenset({"gpt2", "gpt_neox"})
"""Architectures with one projection for queries, keys and values; the bridge computes with parts of it."""

PROJECTIONS = ("hook_in", "hook_out", *(f"{part}.{point}" for part in "qkvo" for point in ("hook_in", "hook_out")))
"""Hook points of attention that the fused kernel does not affect."""


@contextmanager
def fast_attention(model: Any) -> Iterator[None]:
    """Use the fused attention kernel inside; models of architectures not named above are unchanged."""
    if is_hooked_transformer(model) or not _possible(model):
        yield
        return
    config = inner(model).config
    wants_maps = config.output_attentions
    changed: list[tuple[Any, str]] = []
    try:
        config.output_attentions = False  # set if a bridge was booted by name; the fused kernel returns no attention maps
        inner(model).set_attn_implementation("sdpa")
        for block in model.blocks:
            for name, function in _replacements(config.model_type, block.attn):
                # bypasses the bridge's own setattr, which would set it on the wrapped module
                block.attn.__dict__[name] = function
                changed.append((block.attn, name))
        yield
    finally:
        for attn, name in changed:
            del attn.__dict__[name]
        inner(model).set_attn_implementation("eager")
        config.output_attentions = wants_maps


def rotate_in_own_precision(model: Any) -> None:
    """Cast rotated queries and keys back to the precision of the model.

    OLMo has the cosines of its rotation in float32 and casts the result, because its values are not in float32. The bridge rotates as
    for Llama, whose cosines are in the model's own precision, and would fail in half precision.
    """
    if is_hooked_transformer(model) or inner(model).config.model_type in NATIVE | SEPARATE | FUSED:
        return  # these do not need it, and a hook on rotated queries would rule out their fused kernel
    for block in model.blocks:
        attn = getattr(block, "attn", None)
        for name in ("hook_rot_q", "hook_rot_k"):
            if hasattr(attn, name):
                getattr(attn, name).add_perma_hook(partial(_in_precision_of, attn))


def _in_precision_of(attn: Any, rotated: Tensor, hook: Any) -> Tensor:
    return rotated.to(next(attn.parameters()).dtype)


def hooked(point: Any) -> bool:
    """Whether a hook point has any hook."""
    return bool(point.fwd_hooks or point.bwd_hooks or point._forward_hooks)


def _possible(model: Any) -> bool:
    config = inner(model).config
    if config._attn_implementation != "eager" or config.model_type not in NATIVE | SEPARATE | FUSED or not inner(model)._supports_sdpa:
        return False
    # not supported by the fused kernel: another order or precision of the arithmetic, or results per head
    flags = ("reorder_and_upcast_attn", "scale_attn_by_inverse_layer_idx", "attn_logit_softcapping")
    special = ("use_attn_result", "use_split_qkv_input", "use_attn_in")
    if any(getattr(config, flag, None) for flag in flags) or any(getattr(model.cfg, flag, False) for flag in special):
        return False
    return not any(_somebody_looks_inside(block.attn) for block in model.blocks)


def _somebody_looks_inside(attn: Any) -> bool:
    left_alone = {id(attn.get_submodule(name)) for name in PROJECTIONS}
    return any(hooked(m) for m in attn.modules() if hasattr(m, "fwd_hooks") and id(m) not in left_alone)


def _replacements(model_type: str, attn: Any) -> list[tuple[str, Callable[..., Any]]]:
    if model_type in SEPARATE:
        return [("forward", partial(_as_hugging_face_does, attn))]
    return [("_reconstruct_attention", partial(_fused, attn))] if model_type in FUSED else []


def _as_hugging_face_does(attn: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
    output, *rest = attn.original_component(attn.hook_in(hidden_states), *args, **kwargs)
    return attn.hook_out(output), *rest


def _fused(attn: Any, q: Tensor, k: Tensor, v: Tensor, **kwargs: Any) -> tuple[Tensor, None]:
    """The bridge's computation between the projections, with one kernel for scores, softmax and sum."""
    heads = attn.config.n_heads
    q, k, v, batch, positions, d_head = attn._reshape_qkv_to_heads(q, k, v, heads, heads)
    rotary = kwargs.get("position_embeddings")
    if rotary is not None:
        q, k = attn._apply_rotary_pos_emb(q, k, *attn._apply_position_embedding_hooks(rotary))
    k, v = attn._update_kv_cache(k, v, **kwargs)
    mask = kwargs.get("attention_mask")
    z = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None and positions > 1)
    return attn._apply_output_projection(attn._reshape_attn_output(z, batch, positions, heads, d_head)), None
