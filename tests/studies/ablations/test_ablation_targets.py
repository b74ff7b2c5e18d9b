"""Several heads and layers, together or one at a time, and random other heads beside them."""

import pytest
import torch

import sepcap

FAST = {"kinds": ("zero", "resample"), "tokens": 150, "context": 16}


def test_several_layers_and_heads_give_the_rows_of_each_alone(trained, letters):
    found = sepcap.compare_ablations(trained, task=letters, layer=(0, 1), head=(1, 3), **FAST)
    assert found.targets == ((0, 1), (0, 3), (1, 1), (1, 3))
    alone = sepcap.compare_ablations(trained, task=letters, layer=1, head=3, **FAST)
    both = found.table.merge(alone.table, on=["layer", "head", "kind"], suffixes=("", "_alone"))
    assert len(both) == 2
    torch.testing.assert_close(torch.tensor(both["loss"]), torch.tensor(both["loss_alone"]), atol=1e-6, rtol=0)


def test_together_is_the_ablation_of_the_set(trained, letters):
    together = sepcap.compare_ablations(trained, task=letters, layer=(0, 1), head=1, together=True, **FAST)
    assert together.targets == (((0, 1), (1, 1)),)
    as_a_set = sepcap.compare_ablations(trained, task=letters, neurons=sepcap.NeuronSet.heads(trained, [(0, 1), (1, 1)]), **FAST)
    torch.testing.assert_close(together.tensors["per_row"], as_a_set.tensors["per_row"], atol=1e-5, rtol=0)
    assert together.table["target"].unique().tolist() == ["2 heads together (0.1, 1.1)"]


@pytest.mark.parametrize("together", [False, True])
def test_controls_are_other_heads_of_the_same_number(trained, letters, together):
    asked = {(0, 1), (1, 1)}
    found = sepcap.compare_ablations(trained, task=letters, layer=(0, 1), head=1, together=together, controls=3, **FAST)
    drawn = found.targets[-3:]
    pairs = [set(target) if together else {target} for target in drawn]
    assert len(set(drawn)) == 3
    assert all(len(one) == (2 if together else 1) and not one & asked for one in pairs)
    assert found.table["control"].sum() == 3 * 2
    assert "Random controls" in " ".join(found.summary())
    again = sepcap.compare_ablations(trained, task=letters, layer=(0, 1), head=1, together=together, controls=3, **FAST)
    assert again.targets == found.targets
    other = sepcap.compare_ablations(trained, task=letters, layer=(0, 1), head=1, together=together, controls=3, seed=5, **FAST)
    assert other.targets != found.targets
    assert any("random control" in str(note["text"]).lower() for note in found.figure().to_plotly_json()["layout"]["annotations"])


def test_a_comparison_with_controls_is_saved_and_resumed(tmp_path, trained, letters):
    options = {"layer": (0, 1), "head": 1, "together": True, "controls": 2, **FAST}
    found = sepcap.compare_ablations(trained, task=letters, out=tmp_path / "found", **options)
    loaded = sepcap.load_result(tmp_path / "found")
    assert (loaded.targets, loaded.config["controls"]) == (found.targets, 2)
    assert sepcap.compare_ablations(trained, task=letters, out=tmp_path / "found", **options).targets == found.targets
    with pytest.raises(FileExistsError, match="controls"):
        sepcap.compare_ablations(trained, task=letters, out=tmp_path / "found", **options | {"controls": 1})


def test_controls_that_cannot_be_drawn_are_refused(trained, letters):
    with pytest.raises(ValueError, match="controls=9: 7 other heads make 7 sets of 1; give at most 7"):
        sepcap.compare_ablations(trained, task=letters, layer=0, head=1, controls=9, **FAST)
    with pytest.raises(ValueError, match=r"controls=1: controls are other heads, and neurons is a set"):
        sepcap.compare_ablations(trained, task=letters, neurons=sepcap.NeuronSet.heads(trained, [(0, 1)]), controls=1, **FAST)
    with pytest.raises(ValueError, match="controls=1: 0 other heads"):
        sepcap.compare_ablations(trained, task=letters, controls=1, **FAST)
