"""The models that the tests are given: what a test does to its own reaches no other."""

import pytest
import torch
from plain import token_ids
from shared_models import Snapshot, Watched
from tiny import copied, fresh, save_tiny

import sepcap


def spoil(model):
    """All that a careless test might do."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
            parameter.data.add_(1)
    model.train()
    model.requires_grad_(False)
    model.blocks[0].mlp.hook_out.add_hook(lambda z, hook: z * 0)
    model.blocks[0].register_forward_hook(lambda module, args, output: None)
    model.tokenizer.add_special_tokens({"additional_special_tokens": ["<new>"]})


def test_a_copy_is_the_loaded_model_and_shares_nothing_with_another(tiny_folders, family):
    loaded, one, other = sepcap.load_model(tiny_folders[family], device="cpu"), fresh(tiny_folders[family]), fresh(tiny_folders[family])
    expected = loaded(token_ids())
    assert torch.equal(one(token_ids()), expected)
    untouched = Snapshot(other)
    spoil(one)
    assert not torch.equal(one(token_ids()), expected)
    assert not untouched.changes()
    assert len(other.tokenizer) == len(loaded.tokenizer) < len(one.tokenizer)
    assert torch.equal(other(token_ids()), expected)
    assert torch.equal(fresh(tiny_folders[family])(token_ids()), expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_copy_works_by_its_own_parts_alone(tmp_path, family, dtype):
    """No closure of it leads back: whatever is done to the first, the copy is as it was."""
    first = sepcap.load_model(save_tiny(family, tmp_path), device="cpu", dtype=dtype)
    second, expected = copied(first), first(token_ids())
    spoil(first)
    assert torch.equal(second(token_ids()), expected)
    with sepcap.ablate(second, second_half(second)):
        assert not torch.equal(second(token_ids()), expected)
    assert torch.equal(second(token_ids()), expected)


def second_half(model):
    mask = torch.zeros(2, 72, dtype=torch.bool)
    mask[:, 36:] = True
    return sepcap.NeuronSet({"mlp": mask})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda model: model.blocks[1].mlp.W_out.data.mul_(2), "W_out|fc2"),
        (lambda model: model.blocks[0].mlp.hook_out.add_hook(lambda z, hook: z), "_forward_hooks 0 -> 1"),
        (lambda model: model.train(), "training False -> True"),
        (lambda model: model.requires_grad_(False), "requires_grad True -> False"),
    ],
)
def test_a_test_that_changes_a_shared_model_is_named_once(tiny_opt, change, said):
    watched = Watched()
    watched.add("shared", {"model": tiny_opt})
    watched.check(["shared", "of others"])
    change(tiny_opt)
    with pytest.raises(AssertionError, match=f"model of 'shared'.*({said})"):
        watched.check(["shared"])
    watched.check(["shared"])
