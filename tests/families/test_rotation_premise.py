"""Rotation tries out on the model itself whether it may be rotated."""

import pytest
import torch
import transformers
from conftest import tiny_tokenizer
from family_rows import FAMILIES, GROUPED, save_family

import sepcap

ROWS = {row.name: row for row in FAMILIES}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_rounding_is_no_norm(dtype, tmp_path):
    for name in ("GPT-2", "Mistral"):
        model = sepcap.load_model(save_family(ROWS[name], tmp_path / name), device="cpu", dtype=dtype)
        assert sepcap.compute_rotation(model, "fold").bias == "fold"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sinks_are_found_in_half_precision_too(dtype, tmp_path):
    model = sepcap.load_model(save_family(ROWS["GPT-OSS (attention sinks)"], tmp_path), device="cpu", dtype=dtype)
    with pytest.raises(NotImplementedError, match="do not sum to 1"):
        sepcap.compute_rotation(model, "fold")
    assert sepcap.compute_rotation(model, "rotate").bias == "rotate"


@pytest.mark.parametrize("bound", [None, 8.0])
def test_values_that_are_clipped(bound):
    """A bound that no activation of this model reaches is found nevertheless."""
    hf_model = transformers.AutoModelForCausalLM.from_config(transformers.OlmoConfig(**GROUPED, clip_qkv=bound))
    model = sepcap.load_model(hf_model, tokenizer=tiny_tokenizer(), device="cpu")
    if bound is None:
        sepcap.rotate_values(model)
        return
    before = model.blocks[0].attn.W_V.detach().clone()
    with pytest.raises(NotImplementedError, match="a gate, bound or norm is between the values and W_O in layer 0"):
        sepcap.rotate_values(model)
    assert torch.equal(model.blocks[0].attn.W_V, before)


def test_hooks_of_others_do_not_count(tmp_path):
    model = sepcap.load_model(save_family(ROWS["OPT"], tmp_path), device="cpu")
    expected = sepcap.compute_rotation(model).fingerprint
    with sepcap.ablate(model, layer=0, head=1):
        assert sepcap.compute_rotation(model).fingerprint == expected
        with model.hooks(fwd_hooks=[("blocks.1.attn.hook_v", lambda v, hook: v.square())]):
            assert sepcap.compute_rotation(model).fingerprint == expected
