"""A run whose statistics are of the positions at which the unpruned model is right (METHODS 3, 10)."""

import json

import pytest
import torch
from run_folders import Stop, bits, config_of, stop_by

import sepcap
from sepcap.errors import CorruptFile
from sepcap.studies.pruning import prune as pruning

CORRECT = {"positions": "correct", "fractions": {"mlp": 0.25}, "steps": 3, "tokens": 300}


@pytest.fixture
def run(trained, letters, digits, tmp_path):
    return sepcap.prune(trained, config_of(letters, digits, **CORRECT), out=tmp_path / "run")


def test_every_step_is_measured_where_the_unpruned_model_is_right(run, trained, letters, digits):
    options = {"tokens": 300, "sites": ("mlp",), "batch_size": 4}
    right = [sepcap.correct_positions(trained, task, tokens=300, batch_size=4) for task in (letters, digits)]
    for role, expected in zip(("forget", "retain"), right, strict=True):
        assert torch.equal(run.right_positions(role), expected)
        assert run.statistics(role)["mlp"].count == int(expected[:, 1:].sum()) < 300
    gone = sepcap.NeuronSet.empty(trained, ("mlp",))
    for step in (1, 2, 3):
        found = [sepcap.collect(trained, task, positions=at, **options) for task, at in zip((letters, digits), right, strict=True)]
        chosen = sepcap.score(*found).top({"mlp": 0.25}, exclude=gone)
        gone = gone | chosen
        assert run.neurons(step) == gone
        sepcap.delete(trained, chosen)


@pytest.mark.parametrize("done", [-1, 1])
def test_a_resumed_run_reads_the_positions_and_has_the_same_bits(run, trained, letters, digits, tmp_path, monkeypatch, done):
    prepared, steps, step = pruning.plan(trained, config_of(letters, digits, **CORRECT)), [], pruning._step

    def stopping(*args):
        steps.append(1)
        return stop_by(Stop)() if len(steps) == done + 2 else step(*args)

    with monkeypatch.context() as patch:
        patch.setattr(pruning, "_step", stopping)
        with pytest.raises(Stop):
            pruning.execute(prepared, tmp_path / "again")
    if done >= 0:  # they are not found again, with a model that is pruned by now
        prepared = pruning.plan(trained, config_of(letters, digits, **CORRECT))
        monkeypatch.setattr(pruning, "correct_in", stop_by(AssertionError))
    again = pruning.execute(prepared, tmp_path / "again")
    assert bits(tmp_path / "again") == bits(run.folder)
    assert "positions/forget.safetensors" in again.record(0)["files"]


def test_it_is_another_run_than_one_of_all_positions(run, trained, letters, digits, tmp_path):
    every = {name: value for name, value in CORRECT.items() if name != "positions"}
    with pytest.raises(FileExistsError, match="positions"):
        sepcap.prune(trained, config_of(letters, digits, **every), out=run.folder)
    other = sepcap.prune(trained, config_of(letters, digits, **every), out=tmp_path / "all")
    assert other.right_positions("forget") is None
    # a run of all positions has the configuration that it had before there was this field
    assert "positions" not in json.loads((other.folder / "config.json").read_text())
    assert other.statistics("forget")["mlp"].count == 300 > run.statistics("forget")["mlp"].count
    (run.folder / "positions/retain.safetensors").write_bytes(b"")
    with pytest.raises(CorruptFile, match=r"positions/retain\.safetensors"):
        run.right_positions("retain")
