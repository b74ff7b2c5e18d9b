"""Saving: a plain Hugging Face checkpoint with the same logits. Fingerprints and snapshots."""

import json

import pytest
import torch
from conftest import VOCABULARY, tiny_config, tiny_tokenizer
from plain import token_ids
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import sepcap
from sepcap.models.weights import WeightSnapshot, fingerprint, plain_state_dict

FRACTIONS = {"mlp": 0.3, "attn_pre_out": 0.3, "attn_value": 0.2}
SPECIAL = {"vocab_size": VOCABULARY, "bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}


def prune(model, seed=0):
    sepcap.delete(model, sepcap.NeuronSet.random(model, FRACTIONS, seed=seed))
    return model


def logits(model):
    with torch.no_grad():
        out = model(token_ids())
    return out if isinstance(out, torch.Tensor) else out.logits


def plain(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def test_pruned_model_saved_and_loaded_plainly(tiny, family, tiny_folders, tmp_path):
    untouched = logits(tiny)
    pruned = logits(prune(tiny))
    assert (pruned - untouched).abs().max() > 0.05
    sepcap.save_pretrained(tiny, tmp_path / "out")
    torch.testing.assert_close(logits(plain(tmp_path / "out")), pruned, atol=1e-5, rtol=0)
    torch.testing.assert_close(logits(sepcap.load_model(tmp_path / "out", device="cpu")), pruned, atol=1e-5, rtol=0)
    assert torch.equal(logits(tiny), pruned)  # saving changes nothing


def test_files_are_the_original_ones_but_for_the_weights(tiny, family, tiny_folders, tmp_path):
    original = tiny_folders[family]
    sepcap.save_pretrained(prune(tiny), tmp_path)
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / name).read_text()) == json.loads((original / name).read_text())
    before, after = load_file(original / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert {k: (v.shape, v.dtype) for k, v in before.items()} == {k: (v.shape, v.dtype) for k, v in after.items()}  # tied tensors once
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(any(part in name for part in ("mlp", "attn", "attention", "fc1", "fc2")) for name in changed)
    assert not any("norm" in name for name in changed)
    old, new = AutoTokenizer.from_pretrained(original), AutoTokenizer.from_pretrained(tmp_path)
    assert new("the quick fox")["input_ids"] == old("the quick fox")["input_ids"]
    assert (new.bos_token_id, new.eos_token_id, new.pad_token_id, len(new)) == (0, 2, 1, len(old))


def test_unpruned_model_is_saved_bit_for_bit(tiny, family, tiny_folders, tmp_path):
    sepcap.save_pretrained(tiny, tmp_path)
    before, after = load_file(tiny_folders[family] / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("when", ["before deletion", "after deletion"])
def test_after_a_change_of_dtype(tiny, family, tmp_path, when):
    """`.to(dtype)` gives the parts of fused tensors a life of their own; what is saved must be the parts' values."""
    reference = plain_state_dict(prune(sepcap.load_model(_save(tiny, tmp_path / "original"), device="cpu")))
    if when == "before deletion":
        tiny.to(torch.bfloat16)
        prune(tiny)
    else:
        prune(tiny)
        tiny.to(torch.bfloat16)
    sepcap.save_pretrained(tiny, tmp_path / "out")
    saved = load_file(tmp_path / "out" / "model.safetensors")
    assert saved
    for name, value in saved.items():
        assert value.dtype == torch.bfloat16
        name = "lm_head.weight" if name == "embed_out.weight" else name  # transformers keeps GPT-NeoX's old name in files
        assert torch.equal(value, reference[name].to(torch.bfloat16)), name
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    again = plain(tmp_path / "out", attn_implementation="eager")
    assert again.dtype == torch.bfloat16
    torch.testing.assert_close(logits(again), logits(tiny), atol=0.05, rtol=0)


def _save(model, folder):
    sepcap.save_pretrained(model, folder)
    return folder


def test_loaded_in_bfloat16(family, tiny_folders, tmp_path):
    model = prune(sepcap.load_model(tiny_folders[family], device="cpu", dtype="bfloat16"))
    sepcap.save_pretrained(model, tmp_path)
    torch.testing.assert_close(logits(plain(tmp_path, attn_implementation="eager")), logits(model), atol=0.05, rtol=0)
    state = plain_state_dict(model)
    again = plain_state_dict(sepcap.load_model(tmp_path, device="cpu", dtype="bfloat16"))
    assert all(torch.equal(state[name], again[name]) for name in state)


def test_tied_embeddings_stay_tied_and_untied_ones_untied(tmp_path):
    import transformers as t

    sizes = {"hidden_size": 32, "intermediate_size": 72, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 32}
    for tied in (True, False):
        hf_model = AutoModelForCausalLM.from_config(t.LlamaConfig(**sizes, **SPECIAL, tie_word_embeddings=tied))
        model = prune(sepcap.load_model(hf_model, tokenizer=tiny_tokenizer(), device="cpu"))
        sepcap.save_pretrained(model, tmp_path / str(tied))
        assert ("lm_head.weight" in load_file(tmp_path / str(tied) / "model.safetensors")) == (not tied)
        again = plain(tmp_path / str(tied))
        assert (again.lm_head.weight.data_ptr() == again.model.embed_tokens.weight.data_ptr()) == tied
        torch.testing.assert_close(logits(again), logits(model), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["bigcode", "falcon", "bloom", "phi3", "qwen2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_other_ways_to_fuse(name, dtype, tmp_path):
    """Multi-query, per-head and gate|up layouts: the layout is asked of the bridge, not assumed."""
    import transformers as t

    common = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, **SPECIAL}
    config = {
        "bigcode": lambda: t.GPTBigCodeConfig(n_embd=32, n_layer=2, n_head=4, n_positions=32, **SPECIAL),
        "falcon": lambda: t.FalconConfig(**common, alibi=False, bias=True),
        "bloom": lambda: t.BloomConfig(hidden_size=32, n_layer=2, n_head=4, **SPECIAL),
        "phi3": lambda: t.Phi3Config(**common, intermediate_size=72, num_key_value_heads=2, max_position_embeddings=32),
        "qwen2": lambda: t.Qwen2Config(**common, intermediate_size=72, num_key_value_heads=2, max_position_embeddings=32),
    }[name]()
    model = sepcap.load_model(AutoModelForCausalLM.from_config(config), tokenizer=tiny_tokenizer(), device="cpu")
    before = logits(model)
    model.to(dtype)
    pruned = logits(prune(model))
    sepcap.save_pretrained(model, tmp_path)
    again = logits(plain(tmp_path))
    assert again.dtype == dtype
    assert (pruned - before).abs().max() > 1e-3
    torch.testing.assert_close(again, pruned, atol=1e-5, rtol=0)


def test_a_weight_without_a_place_in_the_checkpoint_is_refused(tiny_opt, tmp_path):
    tiny_opt.blocks[0].mlp.register_parameter("extra", torch.nn.Parameter(torch.ones(3)))
    with pytest.raises(NotImplementedError, match=r"computes with a copy of .*extra"):
        sepcap.save_pretrained(tiny_opt, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_file_is_no_folder(tiny_opt, tmp_path):
    (tmp_path / "x").write_text("mine")
    with pytest.raises(FileExistsError, match="is a file or a device, not a folder"):
        sepcap.save_pretrained(tiny_opt, tmp_path / "x")
    assert (tmp_path / "x").read_text() == "mine"


def test_snapshot_restores_bit_for_bit(tiny, family):
    before = {name: value.clone() for name, value in plain_state_dict(tiny).items()}
    free = logits(tiny)
    snapshot = WeightSnapshot(tiny, tuple(FRACTIONS))
    assert not torch.equal(logits(prune(tiny)), free)
    snapshot.restore()
    assert torch.equal(logits(tiny), free)
    after = plain_state_dict(tiny)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_fingerprint_tells_one_deleted_neuron(tiny, family, tiny_folders):
    seen = {fingerprint(tiny)}
    assert fingerprint(sepcap.load_model(tiny_folders[family], device="cpu")) in seen
    for site in FRACTIONS:
        for at in (1, 7) if site == "attn_value" else (0, 5, -1):  # the others are gone with their pre-out neurons
            one = sepcap.NeuronSet.empty(tiny, site)
            one.masks[site].view(-1)[at] = True
            sepcap.delete(tiny, one)
            assert fingerprint(tiny) not in seen
            seen.add(fingerprint(tiny))


def test_fingerprint_tells_any_single_weight(tiny_opt):
    weight = tiny_opt.original_model.get_output_embeddings().weight.view(-1)
    seen = {fingerprint(tiny_opt)}
    for i in range(1, 12):
        with torch.no_grad():
            weight[i] += 1e-3
        seen.add(fingerprint(tiny_opt))
    assert len(seen) == 12


def test_fingerprint_tells_the_place_of_a_weight(tiny_opt):
    before = fingerprint(tiny_opt)
    with torch.no_grad():
        weight = tiny_opt.original_model.get_output_embeddings().weight
        weight.copy_(weight.flip(0))
    assert fingerprint(tiny_opt) != before


def test_saved_configuration_is_the_tiny_ones(tiny_opt, tmp_path):
    """Booting asks for eager attention and attention maps; neither is a property of the model."""
    sepcap.save_pretrained(tiny_opt, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert "output_attentions" not in config
    assert not any("attn_implementation" in key for key in config)
    assert config["ffn_dim"] == tiny_config("opt").ffn_dim
