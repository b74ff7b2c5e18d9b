"""Tiny models: made once, loaded once a session, given out as copies.

Loading a folder takes 0.1 s, a deep copy of the loaded bridge a tenth of that; and what a test does to a copy is gone with it.
"""

import copy
import copyreg
import json
import random
import types
from collections import OrderedDict
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

CONTEXT = 32
VOCABULARY = 320
SPECIAL = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2, "vocab_size": VOCABULARY}
FAMILIES = ("opt", "gpt2", "neox", "llama", "mistral")


def words(seed: int, n: int = 40, length: int = 60, alphabet: str = "abcdefgh") -> list[str]:
    """n distinct texts of random words."""
    rng = random.Random(f"{alphabet}{seed}")
    return [" ".join("".join(rng.choices(alphabet, k=rng.randint(2, 7))) for _ in range(length)) for _ in range(n)]


@cache
def _trained_bytes() -> str:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "<pad>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the quick brown fox jumps over the lazy dog " * 20, "def return import self None " * 20], trainer)
    return tokenizer.to_str()


def tiny_tokenizer():
    """Byte-level BPE without merges to speak of: any text can be tokenised."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    own = Tokenizer.from_str(_trained_bytes())
    return PreTrainedTokenizerFast(tokenizer_object=own, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def tiny_config(family: str):
    """A real configuration class with few and uneven sizes (ffn is not 4·d_model, GQA where there is one)."""
    import transformers as t

    heads = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": CONTEXT, **SPECIAL}
    if family == "opt":
        return t.OPTConfig(word_embed_proj_dim=32, ffn_dim=72, **heads)
    if family == "gpt2":
        return t.GPT2Config(n_embd=32, n_inner=72, n_layer=2, n_head=4, n_positions=CONTEXT, **SPECIAL)
    if family == "neox":
        return t.GPTNeoXConfig(intermediate_size=72, **heads)
    if family == "llama":
        return t.LlamaConfig(intermediate_size=72, num_key_value_heads=4, **heads)
    if family == "mistral":
        return t.MistralConfig(intermediate_size=72, num_key_value_heads=2, head_dim=8, **heads)
    raise KeyError(family)


def shaken(hf_model: Any) -> Any:
    """The model with weights of which every one matters: initial biases are zero and initial matrices tiny."""
    for name, parameter in hf_model.named_parameters():
        if parameter.dim() == 1 and "bias" in name:
            parameter.data.normal_(0, 0.1)
        elif parameter.dim() > 1:
            parameter.data.mul_(4)
    return hf_model


def write_jsonl(path: Path, texts: list[str]) -> str:
    """A task as a file, a text per line; its path as commands and workers take it."""
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def save_parts(folder: Path, *parts: Any) -> Path:
    """A Hugging Face folder of a model and of what stands beside it: its tokenizer or image processor."""
    for part in parts:
        part.save_pretrained(folder)
    return folder


def save_tiny(family: str, folder: Path, seed: int = 0) -> Path:
    """A randomly initialised model of the family with its tokenizer, saved as a Hugging Face folder."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    return save_parts(folder, shaken(AutoModelForCausalLM.from_config(tiny_config(family))), tiny_tokenizer())


def copied(model: Any) -> Any:
    """A deep copy of a bridge that shares nothing with it."""
    with mock.patch.dict(copy._deepcopy_dispatch, _COPIERS):
        return _copied(model, {})


def _copied(value: Any, memo: dict[int, Any]) -> Any:
    """`copy.deepcopy` of what stands in a model: the general way, through `__reduce_ex__`, takes most of the time of a copy."""
    kind = type(value)
    if kind in _ATOMS:
        return value
    if (own := memo.get(id(value))) is not None:
        return own
    if (copier := _COPIERS.get(kind)) is not None:
        return copier(value, memo)
    if _has_attributes_alone(kind):
        memo[id(value)] = own = kind.__new__(kind)
        for name, part in vars(value).items():
            vars(own)[name] = part if type(part) in _ATOMS else _copied(part, memo)
        return own
    return copy.deepcopy(value, memo)


@cache
def _has_attributes_alone(kind: Any) -> bool:
    """Whether an object of a class is no more than its `__dict__`, and the class has no copy of its own; modules are, with all defaults."""
    from torch.nn import Module

    own = {name for base in kind.__mro__ if base not in (object, Module) for name in vars(base)}
    special = {"__new__", "__reduce__", "__reduce_ex__", "__getstate__", "__setstate__", "__deepcopy__"}
    return bool(kind.__dictoffset__) and not own & special and not copyreg._slotnames(kind)


def _copied_dict(items: dict[Any, Any], memo: dict[int, Any]) -> dict[Any, Any]:
    """A model has 2,000 of these, nearly all without hooks."""
    memo[id(items)] = own = type(items)()
    for key, value in items.items():
        own[key if type(key) in _ATOMS else _copied(key, memo)] = value if type(value) in _ATOMS else _copied(value, memo)
    return own


def _copied_list(items: list[Any], memo: dict[int, Any]) -> list[Any]:
    memo[id(items)] = own = []
    own += [_copied(value, memo) for value in items]
    return own


def _copied_set(items: set[Any], memo: dict[int, Any]) -> set[Any]:
    memo[id(items)] = own = {_copied(value, memo) for value in items}
    return own


def _copied_function(function: types.FunctionType, memo: dict[int, Any]) -> types.FunctionType:
    """A closure over copies. `copy.deepcopy` takes a function as it is: a bridge's hooks on itself would lead back to the first bridge."""
    if function.__closure__ is None:
        return function
    cells = tuple(types.CellType() for _ in function.__closure__)
    own = types.FunctionType(function.__code__, function.__globals__, function.__name__, function.__defaults__, cells)
    own.__kwdefaults__ = function.__kwdefaults__
    memo[id(function)] = own
    for cell, other in zip(cells, function.__closure__, strict=True):
        cell.cell_contents = _copied(other.cell_contents, memo)
    return own


_ATOMS = {type(None), bool, int, float, str, type, types.BuiltinFunctionType}
_COPIERS = {types.FunctionType: _copied_function, OrderedDict: _copied_dict, dict: _copied_dict, list: _copied_list, set: _copied_set}

_LOADED: dict[tuple[str, str], Any] = {}


def fresh(folder: Path | str, dtype: str = "float32") -> Any:
    """A model of a folder that no test changes, on the CPU: a copy of the one that the session has loaded. A test may edit it."""
    import sepcap
    from sepcap.models.loading.probe import PASSED

    key = (str(folder), dtype)
    if key not in _LOADED:
        _LOADED[key] = sepcap.load_model(folder, device="cpu", dtype=dtype)
    model = copied(_LOADED[key])
    PASSED.add(model)  # as is the one that was loaded
    return model
