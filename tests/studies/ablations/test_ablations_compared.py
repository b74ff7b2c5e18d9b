"""Kinds of ablation compared: every number is what a whole evaluation under that ablation gives."""

import dataclasses

import numpy as np
import pytest
import torch
from planted_ablations import planted_config
from tiny import fresh

import sepcap
from sepcap.evaluation.next_token import evaluate_sample
from sepcap.evaluation.result import COUNTS
from sepcap.interventions.optimal import fit_constants
from sepcap.models.forward import logits_of
from sepcap.selection.neurons import NeuronSet
from sepcap.studies.ablations import heads as module
from sepcap.studies.ablations.config import COMPARED
from sepcap.studies.ablations.fit import FIT, constants_of_targets, spread
from sepcap.studies.ablations.heads import AblationComparison, balanced, compare_ablations
from sepcap.tasks.batches import sample_tokens
from sepcap.tasks.load import load_task

TOKENS = {"tokens": 400, "reference_tokens": 1000, "fit_tokens": 300}


@pytest.fixture(scope="module")
def shared(trained_folder, letters):
    """The trained model, a reference, and every head compared in every way; nobody changes them."""
    torch.set_num_threads(1)
    model = fresh(trained_folder)
    reference = sepcap.collect(model, letters, tokens=1000, sites="attn_pre_out", histogram=True)
    return model, reference, compare_ablations(model, task=letters, reference=reference, seed=3, **TOKENS)


def samples(model, texts):
    """What is evaluated on, and what "optimal" is fitted to: about 300 of the 1000 tokens that the reference is collected from."""
    task = load_task(texts)
    evaluate, collected = (sample_tokens(task, part, model.tokenizer, n, 32) for part, n in (("evaluate", 400), ("collect", 1000)))
    return evaluate, spread(collected, 300)


def test_the_table_has_every_head_and_kind_once(shared):
    table = shared[2].table
    assert len(table) == 2 * 4 * len(COMPARED)
    assert len(table.drop_duplicates(["layer", "head", "kind"])) == len(table)
    assert set(table["layer"]) == {0, 1}
    assert set(table["head"]) == {0, 1, 2, 3}
    assert (table["n"] == 400).all()


@pytest.mark.parametrize("kind", COMPARED)
@pytest.mark.parametrize("head", [(0, 2), (1, 1)])
def test_each_change_is_that_of_a_whole_evaluation_under_the_ablation(shared, letters, kind, head):
    model, reference, found = shared
    evaluate, fit = samples(model, letters)
    neurons, how = NeuronSet.heads(model, [head]), kind
    if kind == "optimal":
        how = fit_constants(model, neurons, fit, reference=reference, batch_size=16, quiet=True, **FIT).constants
    size = balanced(len(evaluate.rows), 16)
    before = evaluate_sample(model, evaluate, batch_size=size)
    with sepcap.ablate(model, neurons, how, reference=reference, seed=3):
        after = evaluate_sample(model, evaluate, batch_size=size)
    table = found.table
    row = table[(table["layer"] == head[0]) & (table["head"] == head[1]) & (table["kind"] == kind)].iloc[0]
    tolerance = 1e-4 if kind == "optimal" else 1e-9
    assert row["delta_loss"] == pytest.approx(after.loss - before.loss, abs=tolerance)
    assert row["delta_top1"] == pytest.approx(after.top1 - before.top1, abs=0.003 if kind == "optimal" else 1e-12)
    assert abs(row["delta_loss"]) > 1e-5
    if kind != "optimal":
        _, interval = after.difference(before, "loss")
        assert (row["delta_loss_low"], row["delta_loss_high"]) == pytest.approx(interval)
        np.testing.assert_allclose(found.evaluation(kind, *head).per_row, after.per_row, atol=1e-9)


def test_a_head_that_writes_nothing_makes_no_difference_however_it_is_ablated(trained, letters):
    with torch.no_grad():
        trained.blocks[1].attn.W_O[2] = 0
    table = compare_ablations(trained, task=letters, layer=1, head=(2, 3), **TOKENS).table
    silent, other = table[table["head"] == 2], table[table["head"] == 3]
    columns = [f"delta_{metric}{end}" for metric in ("loss", "top1") for end in ("", "_low", "_high")]
    assert (silent[columns] == 0).all(axis=None)
    assert (other["delta_loss"] != 0).all()


def test_on_the_fitting_data_optimal_is_at_most_the_other_constants(shared, letters):
    model, reference, _ = shared
    fit = samples(model, letters)[1]
    targets = {head: NeuronSet.heads(model, [head]) for head in [(0, 0), (1, 3)]}
    fitted = constants_of_targets(model, fit, targets, reference, batch_size=16)
    for head, neurons in targets.items():

        def loss(kind, neurons=neurons):
            with sepcap.ablate(model, neurons, kind, reference=reference):
                return evaluate_sample(model, fit).loss

        assert loss(fitted[head]) < min(map(loss, ("zero", "mean", "median", "peak"))) + 1e-6


def test_only_the_layers_from_the_ablated_one_on_run_again(trained, letters):
    sepcap.load_model(trained)  # a model object is probed by one pass, once
    runs = [0, 0]
    for layer in (0, 1):
        trained.blocks[layer].attn.register_forward_hook(lambda *_, layer=layer: runs.__setitem__(layer, runs[layer] + 1))
    found = compare_ablations(trained, task=letters, layer=1, kinds=("zero",), tokens=400)
    batches = -(-len(found.before.per_row) // 16)
    assert runs == [batches, batches * 5]


def test_heads_can_be_asked_for_in_several_ways(shared, letters):
    model, reference, found = shared
    options = {"kinds": ("zero", "mean"), "reference": reference, "tokens": 400}

    def targets(**which):
        return compare_ablations(model, task=letters, **which, **options).targets

    assert targets(layer=1) == ((1, 0), (1, 1), (1, 2), (1, 3))
    assert targets(layer=0, head=2) == ((0, 2),)
    assert targets(head=((0, 3), (1, 0))) == ((0, 3), (1, 0))
    as_set = compare_ablations(model, task=letters, neurons=NeuronSet.heads(model, [(1, 2)]), **options)
    np.testing.assert_allclose(as_set.tensors["per_row"][0, 1], found.evaluation("mean", 1, 2).per_row, atol=1e-9)
    assert as_set.table["layer"].isna().all()


def test_a_set_over_several_layers_and_sites_is_ablated_as_a_whole(shared, letters):
    model = shared[0]
    neurons = NeuronSet.random(model, {"mlp": 0.2, "attn_pre_out": 0.3}, seed=1)
    found = compare_ablations(model, task=letters, neurons=neurons, kinds=("zero", "resample"), tokens=400, seed=5)
    sample = samples(model, letters)[0]
    for kind in ("zero", "resample"):
        with sepcap.ablate(model, neurons, kind, seed=5):
            after = evaluate_sample(model, sample, batch_size=balanced(len(sample.rows), 16))
        np.testing.assert_allclose(found.evaluation(kind).per_row, after.per_row, atol=1e-9)


@pytest.mark.thorough
def test_the_same_seed_gives_the_same_bits_and_another_changes_resampling_alone(shared, letters):
    model, reference, found = shared
    again, other = (compare_ablations(model, task=letters, layer=0, reference=reference, seed=s, **TOKENS) for s in (3, 4))
    again, other, found = (result.tensors["per_row"] for result in (again, other, found))
    assert (again == found[:4]).all()
    for j, kind in enumerate(COMPARED):
        assert (other[:, j] == again[:, j]).all() == (kind != "resample")


@pytest.mark.thorough
def test_the_batch_size_changes_nothing_but_resampling(shared, letters):
    model, reference, found = shared
    kinds = ("zero", "mean", "median", "peak")
    small = compare_ablations(model, task=letters, kinds=kinds, reference=reference, batch_size=3, tokens=400)
    np.testing.assert_allclose(small.tensors["per_row"], found.tensors["per_row"][:, : len(kinds)], atol=1e-3)


def test_an_ablation_around_the_call_is_part_of_the_model(shared, letters):
    model, options = shared[0], {"kinds": ("zero",), "tokens": 400}
    gone = NeuronSet.heads(model, [(0, 0), (1, 1)])
    with sepcap.ablate(model, NeuronSet.heads(model, [(0, 0)])):
        inside = compare_ablations(model, task=letters, layer=1, head=1, **options)
    outside = compare_ablations(model, task=letters, neurons=gone, **options)
    np.testing.assert_allclose(inside.tensors["per_row"], outside.tensors["per_row"], atol=1e-5)
    assert inside.before.loss != outside.before.loss


def test_the_model_is_left_as_it_was(trained, letters):
    ids = torch.arange(3, 20)[None]
    before = logits_of(trained, ids)
    hooks = sum(len(point.fwd_hooks) for point in trained.hook_dict.values())
    compare_ablations(trained, task=letters, layer=1, head=0, **TOKENS)
    assert sum(len(point.fwd_hooks) for point in trained.hook_dict.values()) == hooks
    assert all(weight.requires_grad for weight in trained.original_model.parameters())
    assert torch.equal(logits_of(trained, ids), before)


def planted(changes, rows=30, noise=0.0):
    """One head per change: its loss per prediction differs from the unablated 2.0 by that, and by noise in the mean."""
    n = 50.0
    per_row = np.zeros((rows, len(COUNTS)))
    per_row[:, COUNTS.index("n")] = n
    per_row[:, COUNTS.index("top1")] = n / 2
    # the level differs far more between rows than any change: only a paired interval can see one
    per_row[:, COUNTS.index("loss")] = n * (2 + np.resize([-1, 1], rows))
    after = np.repeat(per_row[None, None], len(changes), axis=0)
    draw = np.random.default_rng(0).normal(0, noise, (len(changes), rows))
    for i, change in enumerate(changes):
        after[i, 0, :, COUNTS.index("loss")] += n * (change + draw[i] - draw[i].mean())
    config = planted_config(task="planted", targets=[(0, h) for h in range(len(changes))], controls=0, kinds=("zero",))
    return AblationComparison.of(config, per_row, after, np.arange(rows))


def test_the_interval_is_paired_and_holds_zero_only_where_nothing_changed():
    table = planted([0.1, 0.0, -0.05], noise=0.1).table
    np.testing.assert_allclose(table["delta_loss"], [0.1, 0.0, -0.05], atol=1e-12)
    assert table["delta_loss_low"][0] > 0.04
    assert table["delta_loss_high"][0] < 0.16
    assert table["delta_loss_low"][1] < 0 < table["delta_loss_high"][1]
    assert table["delta_loss_high"][2] < 0
    assert (table[["delta_top1", "delta_top1_low", "delta_top1_high"]] == 0).all(axis=None)


def test_a_comparison_comes_back_from_its_folder(shared, tmp_path):
    found = shared[2]
    found.save(tmp_path / "c")
    back = AblationComparison.load(tmp_path / "c")
    assert (back.targets, back.kinds, back.config) == (found.targets, found.kinds, found.config)
    assert all(torch.equal(tensor, back.tensors[name]) for name, tensor in found.tensors.items())
    assert back.table.equals(found.table)
    assert back.evaluation("zero", 0, 1).difference(back.before) == found.evaluation("zero", 0, 1).difference(found.before)
    assert (back.before.info, back.before.skip_tokens) == (found.before.info, found.before.skip_tokens)
    assert "zero" in back._repr_html_()


def test_rows_without_the_document_of_each_are_no_evaluation():
    found = planted([0.1], noise=0.1)
    without = {name: tensor for name, tensor in found.tensors.items() if name != "clusters"}
    with pytest.raises(KeyError, match="clusters"):
        dataclasses.replace(found, tensors=without).evaluation("zero")


def test_a_folder_is_written_when_all_is_there_and_read_by_the_same_call(shared, letters, tmp_path, monkeypatch):
    model, reference, _ = shared
    options = {"layer": 1, "head": 1, "kinds": ("zero", "peak"), "reference": reference, "tokens": 400}

    def fails(*args):
        raise RuntimeError("computed")

    with monkeypatch.context() as broken:
        broken.setattr(module, "_measure", fails)
        with pytest.raises(RuntimeError, match="computed"):
            compare_ablations(model, task=letters, **options, out=tmp_path / "c")
    with pytest.raises(FileNotFoundError, match="is not finished"):
        AblationComparison.load(tmp_path / "c")
    found = compare_ablations(model, task=letters, **options, out=tmp_path / "c")
    assert found.table.equals(compare_ablations(model, task=letters, **options).table)
    monkeypatch.setattr(module, "_measure", fails)
    for back in (compare_ablations(model, task=letters, **options, out=tmp_path / "c"), sepcap.load_result(tmp_path / "c")):
        assert back.folder == found.folder == tmp_path / "c"
        assert back.table.equals(found.table)
    one, other = (NeuronSet({"mlp": torch.arange(144).view(2, 72) % 7 == rest}) for rest in (0, 1))
    for change in ({"seed": 1}, {"head": 2}, {"kinds": ("zero",)}, {"tokens": 300}, {"reference": None}, {"batch_size": 3}):
        field = "targets" if "head" in change else next(iter(change))
        with pytest.raises(FileExistsError, match=f"another configuration.*{field}"):
            compare_ablations(model, task=letters, **{**options, **change}, out=tmp_path / "c")
    with pytest.raises(RuntimeError, match="computed"):
        compare_ablations(model, task=letters, neurons=one, kinds=("zero",), tokens=400, out=tmp_path / "set")
    with pytest.raises(FileExistsError, match=r"another configuration \(neurons"):
        compare_ablations(model, task=letters, neurons=other, kinds=("zero",), tokens=400, out=tmp_path / "set")


def test_the_rows_to_fit_to_come_from_all_over_the_sample(shared, letters):
    collected = sample_tokens(load_task(letters), "collect", shared[0].tokenizer, 1000, 32)
    place = {row.tobytes(): i for i, row in enumerate(collected.rows)}
    places = [place[row.tobytes()] for row in spread(collected, 300).rows]
    assert 290 <= sum(len(collected.rows[i]) - 1 for i in places) <= 340
    assert set(np.diff(places)) <= {3, 4}
    assert places[0] == 0
    assert [len(spread(collected, n).rows) for n in (1, 10_000)] == [1, len(collected.rows)]


def test_batches_are_even():
    assert [balanced(rows, 16) for rows in (1, 16, 17, 24, 33)] == [1, 16, 9, 12, 11]


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"head": 1}, ValueError, "give layer= too"),
        ({"head": (1, 2)}, ValueError, "give layer= too"),
        ({"layer": 2}, IndexError, r"layer=2: head \(2, 0\) does not exist, layers are numbered 0 to 1"),
        ({"layer": 0, "head": 4}, IndexError, r"head \(0, 4\)"),
        ({"layer": 0, "head": ()}, ValueError, "no head to ablate"),
        ({"kinds": ()}, ValueError, r"kinds=\(\): give a tuple of at least one"),
        ({"layer": 0, "neurons": NeuronSet({"mlp": torch.ones(2, 72, dtype=torch.bool)})}, ValueError, "not both"),
        ({"neurons": NeuronSet({"mlp": torch.zeros(2, 72, dtype=torch.bool)})}, ValueError, "neurons is empty"),
    ],
)
def test_bad_input_is_named(shared, letters, options, error, says):
    with pytest.raises(error, match=says):
        compare_ablations(shared[0], task=letters, **options)


def test_kinds_and_lists_are_checked_by_the_configuration():
    config = sepcap.AblationComparisonConfig()
    for name, value in {"kinds": ["zero"], "layer": [0, 1], "head": range(2)}.items():  # past the type checks of the tests
        object.__setattr__(config, name, value)
    config.__post_init__()
    assert (config.kinds, config.layer, config.head) == (("zero",), (0, 1), (0, 1))
    object.__setattr__(config, "kinds", ("zreo",))
    with pytest.raises(ValueError, match="Did you mean 'zero'"):
        config.__post_init__()


def test_a_reference_without_histograms_is_refused_before_anything_is_run(shared, letters, tmp_path):
    model, reference, _ = shared
    bare = sepcap.Statistics({site: dataclasses.replace(stats, histogram=None) for site, stats in reference.items()})
    with pytest.raises(ValueError, match="histogram=True"):
        compare_ablations(model, task=letters, layer=0, kinds=("peak",), reference=bare, tokens=400, out=tmp_path / "c")
    assert not (tmp_path / "c").exists()
