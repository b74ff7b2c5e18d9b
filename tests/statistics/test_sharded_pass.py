"""Passes in shards: the rows of an evaluation have the bits of one pass, statistics its values, whoever carries out the shards."""


import numpy as np
import pytest
import torch

import sepcap
from sepcap.errors import warn
from sepcap.workers.shards import SHARDS, in_shards, out_of_memory_is_an_error, shard_of

HOW = {"tokens": 1_000, "context": 24, "batch_size": 4}
HERE = {"workers": 1, "engine": "here", "load": {"device": "cpu"}}


@pytest.fixture
def task(task_files):
    return task_files["forget"]


@pytest.mark.parametrize(("rows", "batch_size"), [(1, 16), (5, 2), (64, 4), (65, 4), (1000, 7)])
def test_shards_are_all_rows_in_order_and_whole_batches(rows, batch_size):
    shards = [shard_of(rows, batch_size, i) for i in range(SHARDS)]
    assert [row for shard in shards for row in shard] == list(range(rows))
    assert all(shard.start % batch_size == 0 for shard in shards if shard)


def test_an_evaluation_has_the_bits_of_one_pass(trained, trained_folder, task):
    whole = sepcap.evaluate(trained, task, **HOW)
    cut = sepcap.evaluate(trained_folder, task, **HOW, **HERE)
    np.testing.assert_array_equal(cut.per_row, whole.per_row)
    np.testing.assert_array_equal(cut.clusters, whole.clusters)
    assert (cut.skip_tokens, cut.groups, cut.task) == (whole.skip_tokens, whole.groups, whole.task)
    assert {**cut.info, "model": ""} == {**whole.info, "model": ""}


@pytest.mark.thorough
def test_statistics_are_those_of_one_pass(trained, trained_folder, task):
    """Sums are added in another order, so that values agree to rounding; counts and extremes exactly."""
    how = {**HOW, "histogram": True, "gradients": True}
    whole, cut = sepcap.collect(trained, task, **how), sepcap.collect(trained_folder, task, **how, **HERE)
    for site, one in whole.items():
        other = cut[site]
        assert other.count == one.count
        torch.testing.assert_close(other.low, one.low, rtol=0, atol=1e-6)
        for name in ("mean", "abs", "rms", "std", "taylor"):
            torch.testing.assert_close(getattr(other, name), getattr(one, name), rtol=1e-6, atol=1e-9)
    assert {**cut.info, "model": ""} == {**whole.info, "model": "", "shards": SHARDS}


@pytest.mark.parametrize("what", ["gradients", "replicates", "correct", "given", "rotation"])
def test_what_is_of_all_rows_is_that_of_one_pass(trained, trained_folder, task, what):
    """Draws depend on the document alone, right predictions on the row alone, and a rotation is sent to the workers."""
    how = {**HOW, "sites": ("attn_pre_out",), "tokens": 600}
    how |= {
        "gradients": lambda: {"gradients": ("fisher", "relp", "ig", "snip"), "k": 2},
        "replicates": lambda: {"replicates": 6, "gradients": True, "seed": 3},
        "correct": lambda: {"positions": "correct", "gradients": True, "histogram": True},
        "given": lambda: {"positions": sepcap.correct_positions(trained, task, tokens=600, context=24)},
        "rotation": lambda: {"rotation": sepcap.compute_rotation(trained)},
    }[what]()
    whole, cut = (sepcap.collect(model, task, **how, **where)["attn_pre_out"] for model, where in ((trained, {}), (trained_folder, HERE)))
    assert cut.count == whole.count
    pairs = [(cut.sums, whole.sums)]
    if whole.gradients is not None:
        assert (cut.gradients.predictions, cut.gradients.rows) == (whole.gradients.predictions, whole.gradients.rows)
        pairs.append((cut.gradients.sums, whole.gradients.sums))
    if whole.replicates is not None:
        assert cut.replicates.documents == whole.replicates.documents
        torch.testing.assert_close(cut.replicates.counts, whole.replicates.counts)
        pairs.append((cut.replicates.sums, whole.replicates.sums))
    for ours, theirs in pairs:
        assert ours.keys() == theirs.keys()
        for name in ours:
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-6 * float(theirs[name].abs().max()))


def test_no_right_prediction_in_a_shard_is_no_error_and_none_in_any_is_one(trained, trained_folder, task):
    """Only the first row counts, so that seven of eight shards are empty, of losses too; then none does."""
    how = {**HOW, "tokens": 600, "sites": "mlp", "gradients": ("taylor", "relp", "ig"), "k": 2}
    right = sepcap.correct_positions(trained, task, tokens=600, context=24)
    right[1:] = False
    right[0, 3] = True
    whole, cut = (sepcap.collect(one, task, **how, positions=right, **at)["mlp"] for one, at in ((trained, {}), (trained_folder, HERE)))
    assert cut.count == whole.count > 0
    assert cut.gradients.predictions == whole.gradients.predictions > 0
    for name in ("std", "taylor", "relp", "ig"):
        torch.testing.assert_close(getattr(cut, name), getattr(whole, name), rtol=1e-5, atol=1e-8)
    right[:] = False
    with pytest.raises(RuntimeError, match="predicts none of"):
        sepcap.collect(trained_folder, task, **how, positions=right, **HERE)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2, 8])
def test_every_number_of_workers_has_the_same_bits(trained_folder, task, workers):
    how = {**HOW, "gradients": ("taylor", "relp"), "replicates": 3}
    here = sepcap.collect(trained_folder, task, **how, **HERE)
    there = sepcap.collect(trained_folder, task, **how, **{**HERE, "workers": workers, "engine": "processes"})
    for site, one in here.items():
        other = there[site]
        pairs = ((one.sums, other.sums), (one.gradients.sums, other.gradients.sums), (one.replicates.sums, other.replicates.sums))
        assert all(torch.equal(ours[name], theirs[name]) for ours, theirs in pairs for name in ours)
    assert here.info == there.info
    size = {"tokens": 150, "batch_size": 2}
    evaluated = sepcap.evaluate(trained_folder, task, **size, **{**HERE, "workers": workers, "engine": "processes"})
    assert (evaluated.per_row == sepcap.evaluate(trained_folder, task, **size, **HERE).per_row).all()


def test_what_cannot_be_cut_or_sent_is_one_error(trained, trained_folder, task):
    for call, says in (
        (lambda: sepcap.collect(trained, task, workers=2), "model is a .*; give a name or a folder with workers="),
        (lambda: sepcap.evaluate(trained_folder, task, workers=2, engine="here"), "workers=2 with engine='here'"),
        (lambda: sepcap.collect(trained_folder, task, **HERE | {"engine": "threads"}), "engine='threads' is not known"),
    ):
        with pytest.raises(ValueError, match=says):
            call()
    with pytest.raises(RuntimeError, match=r"evaluate: shard 1 of 8 failed with FileNotFoundError: .*nowhere"):
        sepcap.evaluate(trained_folder, f"{task}.nowhere.jsonl", **HERE)


def test_out_of_memory_names_the_batch_size_to_give():
    with pytest.raises(MemoryError, match="give batch_size=4"):
        out_of_memory_is_an_error(lambda: warn("out of memory: continuing with batch_size=4"))
    assert out_of_memory_is_an_error(lambda: 3) == 3


def test_options_must_be_json():
    with pytest.raises(TypeError, match=r"task is a object; give names, paths and numbers: with workers=, other processes carry out x"):
        in_shards("x", "none", "model", {"task": object()}, lambda files, outcomes: None, workers=1, engine="here", load=None, threads=1)


def test_warnings_of_workers_are_repeated_once(trained_folder, task, monkeypatch):
    from sepcap.statistics.sharded_pass import worker

    original = worker.collect_sample
    monkeypatch.setattr(worker, "collect_sample", lambda *how, **more: warn("few documents") or original(*how, **more))
    with pytest.warns(UserWarning, match="few documents") as found:
        sepcap.collect(trained_folder, task, **HOW, **HERE)
    assert [str(one.message) for one in found] == ["few documents"]
    assert found[0].filename == __file__


def test_warnings_of_loading_are_repeated_once(trained_folder, task, monkeypatch):
    from sepcap.tasks import shards

    original = shards.load_model
    monkeypatch.setattr(shards, "load_model", lambda *how, **more: warn("old weights") or original(*how, **more))
    with pytest.warns(UserWarning, match="old weights") as found:
        sepcap.evaluate(trained_folder, task, tokens=150, batch_size=2, **HERE)
    assert [str(one.message) for one in found].count("old weights") == 1
