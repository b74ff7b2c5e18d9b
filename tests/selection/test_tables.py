"""Scores and neuron sets as tables, and counts beside fractions."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import sepcap
from sepcap.selection.score import Scores

SCORES = torch.tensor([[3.0, 1.0, 2.0], [9.0, 0.5, 3.0]])


def test_the_table_of_scores_by_hand():
    forget, retain = SCORES * 2, torch.full((2, 3), 2.0)
    table = Scores({"mlp": SCORES}, importances={"mlp": (forget, retain)}).table
    expected = {
        "site": ["mlp"] * 6,
        "layer": [1, 0, 1, 0, 0, 1],
        "neuron": [0, 0, 2, 2, 1, 1],
        "score": [9.0, 3.0, 3.0, 2.0, 1.0, 0.5],
        "importance_forget": [18.0, 6.0, 6.0, 4.0, 2.0, 1.0],
        "importance_retain": [2.0] * 6,
        "rank": [1, 2, 3, 4, 5, 6],
    }
    assert table.to_dict("list") == expected


def test_rows_of_attention_have_their_head_and_those_of_the_mlp_none():
    table = Scores({"mlp": SCORES, "attn_pre_out": torch.arange(8.0).view(1, 2, 4)}).table
    assert list(table.columns) == ["site", "layer", "head", "neuron", "score", "rank"]
    assert table[table["site"] == "mlp"]["head"].isna().all()
    first = table[table["site"] == "attn_pre_out"].iloc[0]
    assert (first["layer"], first["head"], first["neuron"], first["rank"], first["score"]) == (0, 1, 3, 1, 7.0)


def test_the_first_rows_of_the_table_are_the_selection(tiny_opt, letters, digits):
    forget, retain = (sepcap.collect(tiny_opt, task, tokens=300) for task in (letters, digits))
    scores = sepcap.score(forget, retain)
    for site in scores:
        rows = scores.table[scores.table["site"] == site].head(7)
        chosen = scores.top({site: 7}).table
        keys = [name for name in ("layer", "head", "neuron") if name in chosen]
        assert set(rows[keys].itertuples(index=False, name=None)) == set(chosen[keys].itertuples(index=False, name=None))
        torch.testing.assert_close(torch.tensor(rows["importance_forget"].to_numpy()), forget[site].abs.flatten()[_at(rows, forget[site])])
        ratio = rows["importance_forget"] / (rows["importance_retain"] + (1e-3 if site == "mlp" else 1e-4))
        np.testing.assert_allclose(rows["score"], ratio)


def _at(rows, like):
    keys = [rows[name].to_numpy(dtype=int) for name in ("layer", "head", "neuron") if not rows.get(name, pd.Series([pd.NA])).isna().all()]
    return torch.from_numpy(np.ravel_multi_index(keys, tuple(like.shape)))


def test_importances_are_saved_with_the_scores(tmp_path, tiny_opt, letters, digits):
    scores = sepcap.score(*(sepcap.collect(tiny_opt, task, tokens=300) for task in (letters, digits)))
    scores.save(tmp_path / "scores.safetensors")
    pd.testing.assert_frame_equal(Scores.load(tmp_path / "scores.safetensors").table, scores.table)


def test_the_table_of_a_set_names_every_neuron_once():
    mask = torch.zeros(2, 2, 3, dtype=torch.bool)
    mask[1, 0, 2] = mask[0, 1, 1] = True
    table = sepcap.NeuronSet({"mlp": SCORES > 2.5, "attn_value": mask}).table
    assert table.fillna(-1).to_numpy().tolist() == [
        ["mlp", 0, -1, 0], ["mlp", 1, -1, 0], ["mlp", 1, -1, 2], ["attn_value", 0, 1, 1], ["attn_value", 1, 0, 2],
    ]  # fmt: skip
    assert "head" not in sepcap.NeuronSet({"mlp": SCORES > 2.5}).table


@given(st.integers(1, 6))
def test_a_whole_number_is_a_count(n):
    assert len(Scores({"mlp": SCORES}).top({"mlp": n})) == n
    assert len(Scores({"mlp": SCORES}).top({"mlp": np.int64(n)})) == n


def test_one_is_a_neuron_and_one_point_nought_is_all():
    scores = Scores({"mlp": SCORES, "attn_pre_out": torch.arange(8.0).view(1, 2, 4)})
    assert len(scores.top({"mlp": 1})) == 1
    assert len(scores.top({"mlp": 1.0})) == 6
    assert scores.top({"mlp": 2}, per_layer=True).per_layer("mlp") == [2, 2]
    assert len(scores.top({"heads": 1})) == 4


def test_random_sets_take_counts(tiny_opt):
    assert sepcap.NeuronSet.random(tiny_opt, {"mlp": 5, "heads": 2}).count("mlp") == 5
    assert sepcap.NeuronSet.random(tiny_opt, {"heads": 2}).table.groupby(["layer", "head"]).ngroups == 2


@pytest.mark.parametrize("amount", [0, -1, 7, True, float("nan"), 1.5, 0.01, "3"])
def test_amounts_that_select_nothing_or_too_much_are_refused(amount):
    with pytest.raises((ValueError, TypeError), match="fractions"):
        Scores({"mlp": SCORES}).top({"mlp": amount})


def test_a_configuration_keeps_counts_and_fractions_apart():
    count, share = (sepcap.PruningConfig(fractions={"mlp": amount}, steps=1) for amount in (1, 1.0))
    assert [json.dumps(config.fractions) for config in (count, share)] == ['{"mlp": 1}', '{"mlp": 1.0}']
    with pytest.raises(ValueError, match="whole number is a count; give at least 1"):
        sepcap.PruningConfig(fractions={"mlp": 0})


def test_a_run_prunes_the_count_at_every_step_and_is_no_run_of_the_fraction(tmp_path, trained, letters, digits):
    fields = {"forget": letters, "retain": digits, "tokens": 200, "eval_tokens": 200, "context": 16}
    for recollect in (True, False):
        config = sepcap.PruningConfig(fractions={"mlp": 5}, steps=3, recollect=recollect, **fields)
        run = sepcap.prune(trained, config, out=tmp_path / str(recollect))
        assert run.trajectory.query("role == 'forget'")["pruned_mlp"].tolist() == [0, 5, 10, 15]
        run = None
    with pytest.raises(ValueError, match="prunes more than there are: 144 mlp"):
        sepcap.prune(trained, sepcap.PruningConfig(fractions={"mlp": 50}, steps=3, **fields), out=tmp_path / "too-many")
    one = sepcap.PruningConfig(fractions={"mlp": 1}, steps=1, **fields)
    sepcap.prune(trained, one, out=tmp_path / "one")
    with pytest.raises(FileExistsError, match="fractions"):
        sepcap.prune(trained, sepcap.PruningConfig(fractions={"mlp": 1.0}, steps=1, **fields), out=tmp_path / "one")


def test_counts_on_the_command_line():
    from sepcap.cli.options import parse_fractions

    assert parse_fractions("mlp=20,attn_pre_out=0.05,heads=1.0") == {"mlp": 20, "attn_pre_out": 0.05, "heads": 1.0}
    assert [type(value) for value in parse_fractions("mlp=1,heads=1.0").values()] == [int, float]
