"""Jumps of accuracy: which targets they come from, and the bigram path (METHODS 11)."""

import numpy as np
import pytest
import torch
from run_folders import config_of, same_weights, weights
from tiny import fresh

import sepcap
from sepcap.cli.main import main
from sepcap.statistics.collect import correct_in
from sepcap.statistics.intervals import REPLICAS
from sepcap.studies.pruning.jumps.find import _Change, bigram_right
from sepcap.tasks.batches import TokenSample
from sepcap.tasks.samples import sample_task


@pytest.fixture
def run(trained, letters, digits, tmp_path):
    config = config_of(letters, digits, fractions={"mlp": 0.25, "attn_pre_out": 0.25}, steps=3, eval_tokens=600, tokens=300)
    return sepcap.prune(trained, config, out=tmp_path / "run")


@pytest.fixture
def tasks(letters, digits):
    return {"forget": letters, "retain": digits}


def made_of(rows, clusters):
    """A sample of rows written down, with BOS 0."""
    ids = tuple(np.array([0, *row]) for row in rows)
    return TokenSample("t", "evaluate", ids, 0, 9, 9, ([0],), "f", row_documents=tuple((c,) for c in clusters))


def test_changes_by_hand():
    # targets 5 6 5 | 7 5 | 6 of three documents; before, after and the bigram path right at:
    sample = made_of([[5, 6, 5], [7, 5], [6]], [0, 1, 2])
    asked = [[1, 1, 1, 0], [1, 1, 0, 0], [1, 0, 0, 0]]
    before, after, bigram = (
        torch.tensor(x, dtype=torch.bool)
        for x in (
            [[0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]],
            [[1, 0, 1, 0], [1, 1, 0, 0], [0, 0, 0, 0]],
            [[1, 1, 0, 1], [0, 1, 0, 0], [1, 0, 0, 0]],  # a place without a prediction does not count
        )
    )
    change = _Change(sample, before, after, bigram, seed=0)
    row = change.row()
    assert np.array_equal(change.asked, np.array(asked, dtype=bool))
    assert (row["n"], row["n_documents"], row["gained"], row["lost"]) == (6, 3, 3, 1)
    assert row["change"] == pytest.approx(2 / 6)
    assert row["bigram"] == pytest.approx((1 - 1 + 1) / 6)  # 5 gained, 6 lost, 5 gained; the other 5 is not right by the path
    assert row["share"] == pytest.approx(1 / 2)
    assert row["bigram_top1"] == pytest.approx(4 / 6)

    class Words:
        def decode(self, ids):
            return f"<{ids[0]}>"

    tokens = change.tokens(5, Words())
    told = [(t["direction"], t["text"], t["count"], t["right_before"], t["right_after"], round(6 * t["change"])) for t in tokens]
    assert told == [("gained", "<5>", 3, 0, 3, 3), ("lost", "<6>", 2, 1, 0, -1)]
    # intervals: of sums per document, over the same bootstrap samples, one at a time
    rng = np.random.default_rng(0)
    drawn = rng.integers(3, size=(REPLICAS, 3))
    n, changes, parts = np.array([3, 2, 1]), np.array([1, 1, 0]), np.array([0, 1, 0])
    plain = [changes[d].sum() / n[d].sum() for d in drawn]
    np.testing.assert_allclose(np.sort(change._replicas(change.change) / change._replicas(change.asked.astype(np.int64))), np.sort(plain))
    assert (row["change_low"], row["change_high"]) == (pytest.approx(min(plain)), pytest.approx(max(plain)))  # t with 2 df: the extremes
    assert row["bigram_high"] == pytest.approx(max(parts[d].sum() / n[d].sum() for d in drawn))


def test_a_run_is_compared_with_the_plain_model_of_every_step(run, trained, tasks, letters):
    before = weights(trained)
    jumps = run.jumps(trained, steps="all", top=400, tasks=tasks)
    assert same_weights(trained, before)
    assert jumps.table["step"].tolist() == [1, 1, 2, 2, 3, 3]
    # the change is that of the trajectory (float32: no prediction counts in part), and the parts of all targets add up to it
    for role in ("forget", "retain"):
        of_role = jumps.table[jumps.table["role"] == role]
        top1 = run.trajectory[run.trajectory["role"] == role]["top1"].to_numpy()
        np.testing.assert_allclose(of_role["change"], np.diff(top1), atol=1e-12)
        tokens = jumps.tables["tokens"][jumps.tables["tokens"]["role"] == role]
        np.testing.assert_allclose(tokens.groupby("step")["change"].sum().reindex([1, 2, 3], fill_value=0), np.diff(top1), atol=1e-12)
        assert (of_role["change_low"] <= of_role["change_high"]).all()
    # one step in plain Python
    sample = sample_task(trained, sepcap.load_task(letters), "evaluate", 600, None)
    right = []
    for step in (1, 2):
        run.apply(trained, step)
        with torch.no_grad():
            best = [trained(torch.from_numpy(row)[None], return_type="logits")[0].argmax(-1).numpy() for row in sample.rows]
        right.append([(b[:-1] == row[1:]) & (row[1:] != 0) for b, row in zip(best, sample.rows, strict=True)])
        for name, value in trained.original_model.named_parameters():
            value.data.copy_(before[name])
    pairs = [(a, b) for x, y in zip(*right, strict=True) for a, b in zip(x, y, strict=True)]
    row = jumps.table[(jumps.table["step"] == 2) & (jumps.table["role"] == "forget")].iloc[0]
    assert (row["gained"], row["lost"]) == (sum(b and not a for a, b in pairs), sum(a and not b for a, b in pairs))


@pytest.mark.parametrize(("family", "layers"), [("opt", "model.decoder.layers"), ("mistral", "model.layers"), ("gpt2", "transformer.h")])
def test_the_bigram_path_is_the_model_without_its_blocks(tiny_folders, letters, family, layers):
    from transformers import AutoModelForCausalLM

    model = fresh(tiny_folders[family])
    sample = sample_task(model, sepcap.load_task(letters), "evaluate", 300, None)
    plain = AutoModelForCausalLM.from_pretrained(tiny_folders[family])
    parent, _, name = layers.rpartition(".")
    setattr(plain.get_submodule(parent), name, torch.nn.ModuleList())
    plain.eval()
    found = bigram_right(model, sample, 4)
    for row, right in zip(sample.rows, found, strict=True):
        with torch.no_grad():
            best = plain(torch.from_numpy(row)[None], use_cache=False).logits[0].argmax(-1).numpy()
        np.testing.assert_array_equal(right[: len(row) - 1].numpy(), (best[:-1] == row[1:]) & (row[1:] != 0))
    assert not torch.equal(found, correct_in(model, sample, 4)) or family != "opt"


def test_default_steps_saved_results_figures_and_the_command(run, trained, trained_folder, tasks, tmp_path, capsys):
    jumps = run.jumps(trained, tasks=tasks, top=3)
    assert sorted(jumps.config["steps"]) == [1, 2, 3]
    loaded = sepcap.load_result(jumps.save(tmp_path / "saved"))
    assert loaded.table.equals(jumps.table)
    assert len(loaded.summary()) == 6
    assert "bigram path" in loaded.summary()[0]
    assert len(loaded.figure("jumps").data) == 2 * (6 + 1)
    step = int(jumps.tables["tokens"]["step"].iloc[0])
    role = jumps.tables["tokens"]["role"].iloc[0]
    rows = jumps.tables["tokens"].query(f"step == {step} and role == '{role}'")
    assert len(loaded.figure("tokens", step=step, role=role).data) == len(rows) + 1
    for kind in tasks:
        (tmp_path / kind).write_text("")  # a path that holds no texts of the run
    with pytest.raises(SystemExit):
        main(["jumps", "--run-folder", str(run.folder), "--model", str(trained_folder), "--out", str(tmp_path / "out")])
    assert "give tasks={'forget': …}" in capsys.readouterr().err


def test_bad_input(run, trained, tiny_opt, tasks, letters):
    with pytest.raises(ValueError, match=r"steps=\[4\]: this run has the pruning steps 1 to 3; give some of them, or 'all'"):
        run.jumps(trained, steps=[4], tasks=tasks)
    with pytest.raises(ValueError, match=r"model has other weights .* than the one this run was made with"):
        run.jumps(tiny_opt, tasks=tasks)
    with pytest.raises(ValueError, match="other evaluation tokens than the run"):
        run.jumps(trained, tasks={"forget": letters, "retain": letters})
    with pytest.raises(ValueError, match=r"tasks: the texts of 'forget' are not found by their name"):
        run.jumps(trained)
