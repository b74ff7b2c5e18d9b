"""The main job: both directions and the random baseline, from one configuration."""

import torch

import sepcap
from sepcap.experiments.comparison import compare, continuations


def test_three_runs_from_one_configuration(trained, letters, digits, tmp_path):
    said = []
    before = trained.blocks[1].mlp.W_in.clone()
    config = sepcap.PruningConfig(forget=letters, retain=digits, fractions={"mlp": 0.5}, steps=2, tokens=300, eval_tokens=1500)
    comparison = compare(trained, config, tmp_path / "c", say=said.append)
    assert torch.equal(trained.blocks[1].mlp.W_in, before)
    forward, reverse, random = comparison.forward, comparison.reverse, comparison.random
    # the same tokens with the roles exchanged, so the unpruned model scores the same
    assert forward.config["samples"]["collect"]["forget"] == reverse.config["samples"]["collect"]["retain"]
    assert forward.record(0)["tasks"]["forget"]["metrics"] == reverse.record(0)["tasks"]["retain"]["metrics"]
    assert random.config["importance"] == "random"
    assert [len(run.neurons(1)) for run in comparison.runs.values()] == [72, 72, 72]
    # what was said beforehand is what went through the model
    total = sum(run.record(step)["tokens"] for run in comparison.runs.values() for step in range(3))
    assert total == 2 * (2 * 600 + 3 * 3000) + 600 + 3 * 3000
    assert any("minutes" in line for line in said)
    table = comparison.table()
    assert list(table["run"]) == list(comparison.runs)


def test_a_comparison_goes_on_where_it_was(trained, letters, digits, tmp_path, monkeypatch):
    config = sepcap.PruningConfig(forget=letters, retain=digits, fractions={"mlp": 0.5}, steps=2, tokens=300, eval_tokens=1500)
    first = compare(trained, config, tmp_path / "c")
    from sepcap.experiments import pruning

    monkeypatch.setattr(pruning, "_step", None)  # nothing is left to do
    again = compare(trained, config, tmp_path / "c")
    assert again.forward.trajectory.equals(first.forward.trajectory)


def test_continuations_before_and_after_give_the_model_back(trained, letters, digits, tmp_path):
    config = sepcap.PruningConfig(forget=letters, retain=digits, fractions={"mlp": 1.0}, steps=1, tokens=300, eval_tokens=300)
    run = sepcap.prune(trained, config, out=tmp_path / "run")
    before = trained.blocks[0].mlp.W_out.clone()
    texts = continuations(trained, run, step=1)
    assert list(texts["kind"]) == [run.config["forget"], run.config["retain"]]
    for prompt, task in zip(texts["prompt"], (letters, digits), strict=True):
        assert prompt
        assert any(text.startswith(prompt) for text in task)
    assert torch.equal(trained.blocks[0].mlp.W_out, before)
    sepcap.delete(trained, run.neurons(1))
    from sepcap.evaluation.generation import continuation

    assert list(texts["after"]) == [continuation(trained, p) for p in texts["prompt"]]
