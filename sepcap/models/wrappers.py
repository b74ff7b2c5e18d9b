"""Model objects as users pass them: their wrappers, and additions that prevent their weights from being edited."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from sepcap.errors import warn
from sepcap.models.kinds import architecture_of, kind_of

WRAPPERS = {"OptimizedModule": "_orig_mod", "DataParallel": "module", "DistributedDataParallel": "module"}
"""Class that wraps a model without changing what it computes -> attribute that holds it."""

MERGE = "merge the adapters into the weights first, model = model.merge_and_unload()"


def unwrapped(model: Any) -> Any:
    """The Hugging Face model inside `torch.compile`, `DataParallel` and the like.

    Raises:
        ValueError: a PeftModel, or a model whose weights are packed by `quantize_dynamic`.
    """
    while isinstance(model, nn.Module) and type(model).__name__ in WRAPPERS:
        model = getattr(model, WRAPPERS[type(model).__name__])
    if any(base.__name__ == "PeftModel" for base in type(model).__mro__):
        raise ValueError(f"model is a {type(model).__name__}, which keeps its adapters apart from the weights; {MERGE}, and load that")
    if isinstance(model, nn.Module):
        for name, module in model.named_modules():
            if type(module).__module__.startswith("torch.ao.nn"):
                raise ValueError(
                    f"model: {name} is a quantised {type(module).__name__}, which has no readable weight; load the model before "
                    "quantisation, in half precision if memory is short: load_model(..., dtype='bfloat16')"
                )
    return model


def known_class(cls: type) -> type:
    """The class of transformers that a class is, or is derived from."""
    return next((base for base in cls.__mro__ if base.__module__.startswith("transformers.models.")), cls)


def check_tokens(tokenizer: Any, hf_model: Any, name: str) -> None:
    """Raise if a text, or the special tokens around it, can have tokens without a row in the embedding.

    Special tokens beyond the embedding that no text model uses (the image token of Gemma 3) are ignored.

    Raises:
        ValueError: such a token.
    """
    rows = hf_model.get_input_embeddings().weight.shape[0]
    # rows of a masked model are padded with its padding token, rows of others with any token
    kinds = ("bos", "eos", "mask", "cls", "sep", *(["pad"] if kind_of(hf_model) == "masked" else []))
    used = {i: f"{which}_token" for which in kinds if (i := getattr(tokenizer, f"{which}_token_id", None)) is not None}
    # by token id: a vocabulary can have gaps, and be smaller than its largest id
    beyond = {i: token for i, token in (used | {i: token for token, i in tokenizer.get_vocab().items()}).items() if i >= rows}
    special = set(tokenizer.all_special_ids)
    for i, token in sorted(beyond.items()):
        added = getattr(tokenizer, "added_tokens_decoder", {}).get(i)
        if i in used or not (i in special or getattr(added, "special", False)):
            raise ValueError(
                f"tokenizer: token {i}, {token!r}, but {name!r} has {rows} embeddings; call model.resize_token_embeddings(len(tokenizer)) "
                "on the Hugging Face model and train them, or give the tokenizer that the model was trained with"
            )


def hooked_modules(hf_model: Any) -> dict[str, Any]:
    """Modules with the user's plain forward hooks, by name; hooks of libraries are not counted."""
    return {
        name: module
        for name, module in hf_model.named_modules()
        if any(not _of_a_library(hook) for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()))
    }


def _of_a_library(hook: Any) -> bool:
    module = getattr(hook, "__module__", None) or getattr(getattr(hook, "func", None), "__module__", None) or type(hook).__module__
    return module.split(".")[0] in ("accelerate", "peft", "torch", "transformers", "transformer_lens")


def warn_of_lost_hooks(lost: Iterable[str], made: str) -> None:
    """Warn of modules whose torch hooks are not called in every pass of a hooked model."""
    names = sorted(lost)
    if names:
        warn(
            f"torch hooks on {', '.join(names)} are not called in every pass, because a {made} computes in place of these modules. Remove "
            f"them, and give the {made} hooks of its own: model.add_hook('blocks.0.hook_attn_out', function)"
        )


def check_plain_weights(model: Any, parts: Iterable[str], what: str) -> None:
    """Raise if a module of the blocks computes with more than its weight, so that an edit of the weight would have another effect.

    Args:
        model: a hooked model.
        parts: "attn", "mlp" or both: the parts of a block that are edited.
        what: the edit, for the message.

    Raises:
        ValueError: adapters (LoRA, DoRA, IA3), parametrizations, weight norm, or quantised weights.
    """
    for layer, block in enumerate(model.blocks):
        for part in parts:
            for name, module in getattr(block, part, nn.Module()).named_modules():
                for why in _added(module):
                    where = f"blocks.{layer}.{part}.{name}".replace("._original_component", "").replace(".original_component", "")
                    raise ValueError(f"{what} edits weights, but {where} of this {architecture_of(model)} {why}. What works: sepcap.ablate")


def _added(module: Any) -> Iterator[str]:
    if any(base.__name__ == "BaseTunerLayer" for base in type(module).__mro__):
        yield f"adds adapters to its weight ({type(module).__name__}); {MERGE} (or peft's merge), and load that"
    if nn.utils.parametrize.is_parametrized(module):
        yield "computes its weight by a parametrization; merge it first, torch.nn.utils.parametrize.remove_parametrizations"
    if "weight_g" in module._parameters:
        yield "computes its weight by weight_norm; merge it first, torch.nn.utils.remove_weight_norm"
    weight = module._parameters.get("weight")
    if weight is not None and not (
        weight.is_floating_point() and weight.dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    ):
        yield f"has quantised weights ({weight.dtype}); load the model without quantisation"
