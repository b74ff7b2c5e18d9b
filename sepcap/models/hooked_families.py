"""Conversion of Hugging Face configurations to those of a HookedTransformer, family by family (transformer-lens 3)."""

from collections.abc import Callable
from typing import Any

LONGEST = 2048
"""Most positions of a model with rotary embeddings: a HookedTransformer keeps a mask of positions × positions in every layer."""

ACTIVATIONS = ("gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "relu", "silu")
"""Activation functions that both libraries call by the same name."""

UNKNOWN = "which a HookedTransformer of this family does not support"


def _must(config: Any, **settings: Any) -> None:
    """Raise if a setting of a configuration differs from what a HookedTransformer of this family supports."""
    for name, value in settings.items():
        if getattr(config, name, value) not in (value if isinstance(value, tuple) else (value,)):
            raise NotImplementedError(f"{name}={getattr(config, name)!r}, {UNKNOWN}")


def _learned(config: Any, d_mlp: int, eps: float) -> dict[str, Any]:
    """Options that families with learned positions have in common; GPT-2's own names of the sizes have these names as well."""
    _must(config, activation_function=ACTIVATIONS)
    return {
        "d_model": config.hidden_size,
        "d_head": config.hidden_size // config.num_attention_heads,
        "n_heads": config.num_attention_heads,
        "d_mlp": d_mlp,
        "n_layers": config.num_hidden_layers,
        "n_ctx": config.max_position_embeddings,
        "eps": eps,
        "act_fn": config.activation_function,
        "normalization_type": "LN",
    }


def _gpt2(config: Any) -> dict[str, Any]:
    common = _learned(config, config.n_inner or 4 * config.n_embd, config.layer_norm_epsilon)
    return {**common, "scale_attn_by_inverse_layer_idx": config.scale_attn_by_inverse_layer_idx}


def _opt(config: Any) -> dict[str, Any]:
    _must(config, do_layer_norm_before=True, enable_bias=True, layer_norm_elementwise_affine=True, word_embed_proj_dim=config.hidden_size)
    return _learned(config, config.ffn_dim, 1e-5)


def _rotary(config: Any) -> dict[str, Any]:
    """Options that families with rotary embeddings have in common."""
    activation = getattr(config, "hidden_act", None) or config.hidden_activation
    if activation not in ACTIVATIONS:
        raise NotImplementedError(f"hidden_act={activation!r}, {UNKNOWN}")
    heads = config.num_attention_heads
    d_head = getattr(config, "head_dim", None) or config.hidden_size // heads
    rope = dict(getattr(config, "rope_parameters", None) or {})
    kind = rope.get("rope_type", "default")
    if kind not in ("default", "llama3"):
        raise NotImplementedError(f"rope_type={kind!r}, {UNKNOWN}")
    scaled = {
        "use_NTK_by_parts_rope": True,
        "NTK_original_ctx_len": rope.get("original_max_position_embeddings"),
        "NTK_by_parts_low_freq_factor": rope.get("low_freq_factor"),
        "NTK_by_parts_high_freq_factor": rope.get("high_freq_factor"),
        "NTK_by_parts_factor": rope.get("factor"),
    }
    return {
        "d_model": config.hidden_size,
        "d_head": d_head,
        "n_heads": heads,
        "d_mlp": config.intermediate_size,
        "n_layers": config.num_hidden_layers,
        "n_ctx": min(LONGEST, config.max_position_embeddings),
        "act_fn": activation,
        "positional_embedding_type": "rotary",
        "rotary_base": rope.get("rope_theta", 10000.0),
        "rotary_dim": int(d_head * rope.get("partial_rotary_factor", 1.0)),
        "rotary_adjacent_pairs": False,
        **(scaled if kind == "llama3" else {}),
    }


def _neox(config: Any) -> dict[str, Any]:
    _must(config, attention_bias=True)
    parallel = {"parallel_attn_mlp": config.use_parallel_residual, "default_prepend_bos": False}
    return {**_rotary(config), **parallel, "eps": config.layer_norm_eps, "normalization_type": "LN"}


def _llama(config: Any) -> dict[str, Any]:
    _must(config, attention_bias=False, mlp_bias=False)
    grouped = config.num_key_value_heads if config.num_key_value_heads != config.num_attention_heads else None
    return {**_gated(config), "n_key_value_heads": grouped}


def _gated(config: Any) -> dict[str, Any]:
    common = {"eps": config.rms_norm_eps, "normalization_type": "RMS", "gated_mlp": True, "final_rms": True}
    return {**_rotary(config), **common, "n_key_value_heads": config.num_key_value_heads}


def _mistral(config: Any) -> dict[str, Any]:
    windows = {} if config.sliding_window is None else _windows(config, ["local"] * config.num_hidden_layers)
    return {**_gated(config), **windows}


def _windows(config: Any, kinds: list[str]) -> dict[str, Any]:
    return {"use_local_attn": True, "window_size": config.sliding_window, "attn_types": kinds}


def _qwen2(config: Any) -> dict[str, Any]:
    _must(config, use_sliding_window=False)
    return {**_gated(config), "default_prepend_bos": False}


def _gemma2(config: Any) -> dict[str, Any]:
    _must(config, attention_bias=False)
    kinds = ["local" if kind == "sliding_attention" else "global" for kind in config.layer_types]
    return {
        **_gated(config),
        **_windows(config, kinds),
        "attn_scale": config.query_pre_attn_scalar**0.5,
        "attn_scores_soft_cap": config.attn_logit_softcapping or -1.0,
        "output_logits_soft_cap": config.final_logit_softcapping or -1.0,
        "use_normalization_before_and_after": True,
    }


HOOKED_FAMILIES: dict[str, tuple[Callable[[Any], dict[str, Any]], str]] = {
    "GPT2LMHeadModel": (_gpt2, "gpt2"),
    "OPTForCausalLM": (_opt, "opt"),
    "GPTNeoXForCausalLM": (_neox, "neox"),
    "LlamaForCausalLM": (_llama, "llama"),
    "MistralForCausalLM": (_mistral, "mistral"),
    "Qwen2ForCausalLM": (_qwen2, "qwen2"),
    "Gemma2ForCausalLM": (_gemma2, "gemma"),
}
"""Class of transformers -> function from its configuration to the options of a HookedTransformerConfig, and the module of
`transformer_lens.pretrained.weight_conversions` that converts its weights."""
