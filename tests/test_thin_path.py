"""The whole path once, on a tiny model: load, collect, score, prune, measure."""

import torch

import sepcap


def test_from_model_to_separability(tiny_opt, letters, digits, tmp_path):
    forget = sepcap.collect(tiny_opt, letters, tokens=500)
    retain = sepcap.collect(tiny_opt, digits, tokens=500)
    neurons = sepcap.score(forget, retain).top({"mlp": 0.25})
    assert len(neurons) == 36  # a quarter of 2 × 72
    config = sepcap.PruningConfig(forget=letters, retain=digits, fractions={"mlp": 0.25}, steps=2, tokens=500, eval_tokens=500)
    before = tiny_opt.blocks[0].mlp.W_out.clone()
    run = sepcap.prune(tiny_opt, config, out=tmp_path / "run")
    assert run.finished
    assert len(run.trajectory) == 2 * 3
    assert run.neurons(1) == neurons
    assert len(run.neurons(2)) == 72
    assert torch.equal(tiny_opt.blocks[0].mlp.W_out, before)  # the model comes back as it was
