"""The families: a small random model of the real configuration class of each, saved as a folder."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from conftest import CONTEXT, VOCABULARY, tiny_tokenizer
from plain import LAYOUTS

from sepcap.models.hooked_transformers import line

BACKEND = os.environ.get("SEPCAP_TEST_BACKEND", "bridge")
"""What the models are loaded as: "hooked" in the environment of transformer-lens 3.9 (tests/hooked_transformer, docs/families.py)."""
CLASSES = 5
TEXT = {"vocab_size": VOCABULARY, "bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
SIZES = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 72, "num_attention_heads": 4}
DECODER = {**TEXT, **SIZES, "max_position_embeddings": CONTEXT}
GROUPED = {**DECODER, "num_key_value_heads": 2}
WIDE_HEADS = {**GROUPED, "head_dim": 12}
GPT2 = {**TEXT, "n_layer": 2, "n_embd": 32, "n_inner": 72, "n_head": 4, "n_positions": CONTEXT}
OPT = {**TEXT, "num_hidden_layers": 2, "hidden_size": 32, "ffn_dim": 72, "num_attention_heads": 4, "max_position_embeddings": CONTEXT}
GALACTICA = {"activation_function": "gelu", "enable_bias": False, "layer_norm_elementwise_affine": False}
GEMMA = {**WIDE_HEADS, "query_pre_attn_scalar": 12, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
MASKED = {**DECODER, "type_vocab_size": 1}
PIXELS = {**SIZES, "image_size": 8, "patch_size": 4, "num_channels": 1, "num_labels": CLASSES}
SINKS = {**WIDE_HEADS, "num_local_experts": 4, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
LATENT = {
    **DECODER,
    **EXPERTS,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}

LATENT_V3 = {**LATENT, "first_k_dense_replace": 2}
EXPERTS_QWEN = {**WIDE_HEADS, **EXPERTS, "num_experts": 4}
LINEAR = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
HYBRID = {**WIDE_HEADS, **LINEAR, "layer_types": ["linear_attention", "full_attention"]}
GATED = {**EXPERTS_QWEN, **LINEAR, "shared_expert_intermediate_size": 24, "layer_types": ["full_attention", "full_attention"]}
GEMMA4 = {**GEMMA, "global_head_dim": 12, "num_global_key_value_heads": 2, "num_kv_shared_layers": 0, "hidden_size_per_layer_input": 0}

SITES = ("mlp", "attn_pre_out", "attn_value")
EDITING = ("deletion", "saving", "pruning")
MIXTURE = {"mlp": "is a mixture of experts"}
LATENT_VALUES = dict.fromkeys(("attn_pre_out", "attn_value", "rotation, fold", "rotation, rotate"), "has latent attention")
NO_ATTENTION = dict.fromkeys(LATENT_VALUES, "layer 0 has none")


def behind(norm: str, *sites: str) -> dict[Any, str]:
    """No deletion of the neurons that a norm takes in."""
    return dict.fromkeys(((check, site) for check in EDITING for site in sites), f"{norm} normalises over them")


def no_rotation(why: str) -> dict[Any, str]:
    """Neither choice of the bias."""
    return {"rotation, fold": why, "rotation, rotate": why}


BITNET = {**no_rotation("attn_sub_norm is between"), **behind("ffn_sub_norm", "mlp"), **behind("attn_sub_norm", "attn_pre_out")}
V_NORM = {**no_rotation("v_norm is between"), **behind("v_norm", "attn_pre_out")}

OTHERWISE = "differently from transformers"


@dataclass(frozen=True)
class Family:
    """One row of the table.

    Attributes:
        name: as a reader knows it.
        layout: where the plain model keeps its projections, a key of `plain.LAYOUTS`.
        config: the configuration class in transformers.
        options: its options.
        refused: what cannot work on a bridge, and a part of the error that says why: a site, a check, or (check, site).
        hooked: whether a HookedTransformer can be made of it.
        not_in_3: a part of the error that says why transformer-lens 3.9 has no bridge for it.
    """

    name: str
    layout: str
    config: str
    options: Mapping[str, Any] = field(repr=False)
    refused: Mapping[Any, str] = field(default_factory=dict, repr=False)
    hooked: bool = False
    not_in_3: str | None = None

    def missing(self) -> str | None:
        """A part of the error at loading, where the transformer-lens that is installed has no such model."""
        if BACKEND == "hooked":
            return None if self.hooked else "HookedTransformer|does not support it|differently from transformers"
        return self.not_in_3 if line() < 4 else None

    def refusal(self, check: str, site: str) -> str | None:
        """What the error of a check on a site says, where it cannot work."""
        if self.missing() or BACKEND == "hooked":  # what is made into a HookedTransformer has every site and every bias
            return self.missing()
        if check.startswith("rotation"):
            return self.refused.get(check)
        return self.refused.get(site) or self.refused.get((check, site))


FAMILIES = (
    Family("OPT", "opt", "OPTConfig", {**OPT, "word_embed_proj_dim": 32}, hooked=True),
    Family("OPT-350m (post-norm)", "opt", "OPTConfig", {**OPT, "word_embed_proj_dim": 24, "do_layer_norm_before": False}),
    Family("Galactica", "opt", "OPTConfig", {**OPT, "word_embed_proj_dim": 32, **GALACTICA}),
    Family("GPT-2", "gpt2", "GPT2Config", GPT2, hooked=True),
    Family("GPT-NeoX (Pythia)", "neox", "GPTNeoXConfig", DECODER, hooked=True),
    Family("Llama", "llama", "LlamaConfig", DECODER, hooked=True),
    Family("Mistral", "llama", "MistralConfig", WIDE_HEADS, hooked=True),
    Family("Gemma-2", "llama", "Gemma2Config", GEMMA, hooked=True),
    Family("Gemma-3 (text)", "llama", "Gemma3TextConfig", GEMMA),
    Family("Gemma-4 (text)", "llama", "Gemma4TextConfig", GEMMA4, V_NORM),
    Family("Qwen-2", "llama", "Qwen2Config", GROUPED, {"rotation, fold": "no output bias b_O"}, hooked=True),
    Family("Qwen-3", "llama", "Qwen3Config", WIDE_HEADS),
    Family("Phi", "phi", "PhiConfig", DECODER),
    Family("Phi-3", "phi3", "Phi3Config", GROUPED),
    Family("OLMo-2 (post-norm)", "llama", "Olmo2Config", GROUPED),
    Family("BERT", "bert", "BertConfig", MASKED),
    Family("RoBERTa", "roberta", "RobertaConfig", {**MASKED, "max_position_embeddings": CONTEXT + 2}, not_in_3="does not support it"),
    Family("ViT", "vit", "ViTConfig", PIXELS, {("profiles", site): "takes images, and profiles are of tokens" for site in SITES}),
    Family("Mixtral (mixture of experts)", "llama", "MixtralConfig", {**GROUPED, "num_local_experts": 4}, MIXTURE),
    Family("Qwen-3-MoE (mixture of experts)", "llama", "Qwen3MoeConfig", EXPERTS_QWEN, MIXTURE),
    Family("GPT-OSS (attention sinks)", "llama", "GptOssConfig", SINKS, {**MIXTURE, "rotation, fold": "do not sum to 1"}),
    Family("Qwen-3-Next (gated attention)", "llama", "Qwen3NextConfig", GATED, {**MIXTURE, **no_rotation("a gate, bound or norm")}),
    Family("Qwen-3.5 (linear attention)", "llama", "Qwen3_5TextConfig", HYBRID, NO_ATTENTION, not_in_3=OTHERWISE),
    Family(
        "DeepSeek-V2 (latent attention)", "llama", "DeepseekV2Config", LATENT, {**MIXTURE, **LATENT_VALUES}, not_in_3="logits that differ"
    ),
    Family("DeepSeek-V3 (latent attention, dense)", "llama", "DeepseekV3Config", LATENT_V3, LATENT_VALUES, not_in_3=OTHERWISE),
    Family("BitNet (norm before W_O)", "llama", "BitNetConfig", GROUPED, BITNET),
)


def save_family(row: Family, folder: Any, seed: int = 0) -> Any:
    """The family's tiny model with its tokenizer or image processor, as a Hugging Face folder."""
    torch.manual_seed(seed)
    config = getattr(transformers, row.config)(**row.options)
    hf_model = getattr(transformers, LAYOUTS[row.layout].auto).from_config(config)
    with torch.no_grad():
        for name, parameter in hf_model.named_parameters():
            # initial biases are zero and initial weights tiny: nothing would show whether they matter
            if parameter.dim() == 1 and "bias" in name:
                parameter.normal_(0, 0.1)
            elif parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
            else:
                parameter.mul_(4)
    hf_model.save_pretrained(folder)
    if row.layout == "vit":
        processor = transformers.ViTImageProcessorPil(size={"height": 8, "width": 8}, image_mean=[0.5], image_std=[0.5])
        processor.save_pretrained(folder)
        return folder
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"mask_token": "<mask>"})
    tokenizer.save_pretrained(folder)
    return folder
