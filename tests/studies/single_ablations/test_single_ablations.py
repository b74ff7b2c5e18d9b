"""Every neuron alone: planted models in which each effect is known, intervals, samples, pairs, resumption, and what is refused."""

import dataclasses
import math

import numpy as np
import pandas as pd
import planted
import pytest
import torch
from transformers.cache_utils import DynamicCache

import sepcap
from sepcap.evaluation.next_token import evaluate_sample
from sepcap.evaluation.result import METRICS
from sepcap.models.weights import WeightSnapshot, fingerprint
from sepcap.selection.neurons import NeuronSet
from sepcap.statistics.intervals import bootstrap_interval, bootstrap_intervals
from sepcap.studies.single_ablations import measure
from sepcap.studies.single_ablations import plan as plan_of
from sepcap.studies.single_ablations.figures import SignedLog
from sepcap.studies.single_ablations.plan import Plan
from sepcap.studies.single_ablations.units import drawn
from sepcap.studies.sweep.measures import numbers_of
from sepcap.tasks.load import load_task
from sepcap.tasks.samples import sample_task

WORDS = 6
SIZE = {"tokens": 600, "reference_tokens": 200, "progress": False}


@torch.no_grad()
def without_ties(plant):
    """Every token a little more likely than the one before, <unk> most: a word whose neuron is gone is not tied with all others."""
    unembedding = plant.model.unembed.original_component.weight
    tokens, width = unembedding.shape
    seen = torch.zeros(width)
    seen[:tokens], seen[width // 2 : width // 2 + tokens] = 1, -1
    more = 0.05 * torch.arange(tokens) / tokens
    more[3] = 0.1
    unembedding += more[:, None] * seen
    return plant


@pytest.fixture(scope="module")
def halves(tmp_path_factory):
    return without_ties(planted.in_mlp(tmp_path_factory.mktemp("halves"), words=WORDS, busy=2))


@pytest.fixture(scope="module")
def tasks(halves):
    return {"forget": load_task(halves.a, name="a"), "retain": load_task(halves.b, name="b")}


@pytest.fixture(scope="module")
def found(halves, tasks):
    return sepcap.ablate_each(halves.model, **tasks, **SIZE)


def evaluated(plant, task, neurons=None):
    sample = sample_task(plant.model, task, "evaluate", SIZE["tokens"])
    if neurons is None:
        return evaluate_sample(plant.model, sample)
    snapshot = WeightSnapshot(plant.model, tuple(neurons.masks))
    sepcap.delete(plant.model, neurons)
    after = evaluate_sample(plant.model, sample)
    snapshot.restore()
    return after


def alone(plant, *places):
    neurons = NeuronSet.empty(plant.model, "mlp")
    for place in places:
        neurons.masks["mlp"][place] = True
    return neurons


def test_each_planted_neuron_loses_the_predictions_of_its_word_and_no_other(halves, tasks, found):
    for task, letter in zip(("forget", "retain"), "ab", strict=True):
        sample = sample_task(halves.model, tasks[task], "evaluate", SIZE["tokens"])
        ids = np.concatenate([row[:-1] for row in sample.rows])
        lost = torch.zeros(found.config["shape"], dtype=torch.float64)
        for token, place in halves.needs.items():
            lost[place] -= float((ids == token).sum()) / sample.tokens
        delta = found.delta(task, "top1")
        torch.testing.assert_close(delta.value, lost, atol=1e-12, rtol=0)
        others = ~halves.truth[letter].masks["mlp"]
        for end in (delta.value, delta.low, delta.high):
            assert bool((end[others] == 0).all())
        own = halves.truth[letter].masks["mlp"]
        assert bool((delta.high[own] < 0).all())
        harm = found.delta(task, "loss")
        assert bool((harm.low[own] > 0).all())
        assert float(harm.value[others].abs().max()) < 1e-6
        assert found.top(WORDS, task=task) == found.top(WORDS, task=task, metric="top1") == halves.truth[letter]
        assert not found.top(1, task=task, least=True) & halves.truth[letter]


@pytest.mark.parametrize("metric", METRICS)
def test_values_and_intervals_are_those_of_two_evaluations(halves, tasks, found, metric):
    place = next(iter(halves.needs.values()))
    value, ends = evaluated(halves, tasks["forget"], alone(halves, place)).difference(evaluated(halves, tasks["forget"]), metric)
    delta = found.delta("forget", metric)
    got = [float(end[place]) for end in (delta.value, delta.low, delta.high)]
    np.testing.assert_allclose(got, [value, *ends], atol=2e-6, rtol=0)
    if metric in ("loss", "top1"):
        row = found.table.query("layer == @place[0] and neuron == @place[1]").iloc[0]
        assert [row[f"delta_{metric}_forget{end}"] for end in ("", "_low", "_high")] == got


def test_intervals_of_many_values_are_those_of_each():
    replicas = np.random.default_rng(0).normal(size=(1000, 5))
    replicas[3, 2] = np.nan
    replicas[:, 4] = np.nan
    each = np.array([bootstrap_interval(column, 9) for column in replicas.T]).T
    np.testing.assert_array_equal(bootstrap_intervals(replicas, 9), each)
    assert np.isnan(bootstrap_intervals(replicas, 1)).all()


def per_position(model, sample):
    """Cross-entropy of every prediction of the rows, and whether the first choice is right."""
    losses, right = [], []
    for row in sample.rows:
        ids = torch.tensor(row)[None]
        logits = model(ids, return_type="logits")[0, :-1].double()
        losses.append(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none"))
        right.append(logits.argmax(-1) == ids[0, 1:])
    return losses, right


@torch.no_grad()
@pytest.mark.parametrize("kind", ["zero", "mean"])
def test_with_correct_positions_effects_are_means_over_the_right_predictions_of_the_whole_model(trained, letters, digits, kind):
    how = {"tokens": 400, "reference_tokens": 300, "progress": False}
    tasks = {"forget": load_task(letters, name="letters"), "retain": load_task(digits, name="digits")}
    neurons = sepcap.NeuronSet.random(trained, {"mlp": 6}, seed=0)
    found = sepcap.ablate_each(trained, **tasks, **how, kind=kind, neurons=neurons, positions="correct", pairs=2)
    reference = sepcap.collect(trained, digits, tokens=300)
    for task in tasks:
        sample = sample_task(trained, tasks[task], "evaluate", 400)
        before, right = per_position(trained, sample)
        n = int(sum(r.sum() for r in right))
        assert 20 < n < 350
        assert found.before[task].n == n
        assert found.before[task].top1 == 1
        for place in found.places.tolist():
            one = NeuronSet.empty(trained, "mlp")
            one.masks["mlp"][tuple(place)] = True
            with sepcap.ablate(trained, one, kind, reference=reference):
                after, left = per_position(trained, sample)
            change = sum(float((a - b)[r].sum()) for a, b, r in zip(after, before, right, strict=True)) / n
            assert float(found.delta(task, "loss").value[tuple(place)]) == pytest.approx(change, abs=2e-6)
            lost = sum(int((r & ~now).sum()) for r, now in zip(right, left, strict=True)) / n
            assert float(found.delta(task, "top1").value[tuple(place)]) == pytest.approx(-lost)
    assert "counted only where the whole model is right" in found.summary()[0]
    assert len(found.tables["pairs"]) == 1


def test_correct_positions_need_a_right_prediction_and_a_folder_of_their_own(halves, tasks, tmp_path, monkeypatch):
    how = {"layers": 1, "tokens": 60, "reference_tokens": 50, "progress": False}
    sepcap.ablate_each(halves.model, **tasks, **how, out=tmp_path / "each")
    with pytest.raises(FileExistsError, match="positions"):
        sepcap.ablate_each(halves.model, **tasks, **how, positions="correct", out=tmp_path / "each")
    weight = halves.model.unembed.original_component.weight
    with monkeypatch.context() as patch:
        patch.setattr(weight, "data", torch.zeros_like(weight))  # all tokens tied
        with pytest.raises(ValueError, match="the model predicts none of 60 tokens of 'a' right"):
            sepcap.ablate_each(halves.model, **tasks, **how, positions="correct")


def test_no_hook_and_no_weight_is_left_behind(halves, tasks):
    before = fingerprint(halves.model)
    sepcap.ablate_each(halves.model, **tasks, layers=1, tokens=100, reference_tokens=50, progress=False)
    assert fingerprint(halves.model) == before
    assert not any("forward" in block.__dict__ for block in halves.model.blocks)


@pytest.mark.thorough
@pytest.mark.parametrize("how", [{"batch_size": 1}, {"blocks": 40}, pytest.param({"batch_size": 64}, marks=pytest.mark.slow)])
def test_the_effects_do_not_depend_on_how_rows_are_batched(halves, tasks, found, how, monkeypatch):
    blocks = how.pop("blocks", None)
    if blocks:
        of = measure.Rows.of
        monkeypatch.setattr(measure.Rows, "of", classmethod(lambda cls, sample, _: of(sample, blocks)))
    other = sepcap.ablate_each(halves.model, **tasks, **SIZE, **how)
    for task in ("forget", "retain"):
        one, two = (each.tensors[f"{task}/alone"] for each in (found, other))
        torch.testing.assert_close(one, two, atol=2e-4, rtol=0)
        torch.testing.assert_close(found.tensors[f"{task}/before"], other.tensors[f"{task}/before"], atol=1e-4, rtol=0)


def test_out_of_memory_in_the_unablated_pass_names_the_batch_size_that_makes_smaller_blocks(halves, tasks, monkeypatch):
    """It is not taken for an architecture without a cache."""
    monkeypatch.setattr(plan_of, "PER_ROW", 40)
    config = sepcap.SingleAblationsConfig(**tasks, tokens=SIZE["tokens"], reference_tokens=200)
    one, other = (Plan.of(halves.model, dataclasses.replace(config, batch_size=n), None).measurements["forget"] for n in (2, 8))
    for of, most in ((one, 80), (other, 320)):
        assert max(sum(len(of.rows.sample.rows[i]) for i in block) for block in of.rows.order) <= most
    assert len(one.rows.order) > len(other.rows.order)

    def full(*args, **how):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(DynamicCache, "update", full)
    with pytest.raises(MemoryError, match="give batch_size=4"):
        other.expected([])
    with pytest.raises(torch.OutOfMemoryError):
        measure.shortcuts_of(halves.model, other.population, other.rows, torch.zeros(other.population.shape))


@pytest.mark.parametrize("kind", ["mean", "peak"])
def test_constants_are_those_of_the_retain_task(halves, tasks, kind):
    here = sepcap.ablate_each(halves.model, **tasks, **SIZE, kind=kind, layers=0)
    reference = sepcap.collect(halves.model, tasks["retain"], tokens=200, sites="mlp", histogram=True)
    sample = sample_task(halves.model, tasks["forget"], "evaluate", SIZE["tokens"])
    before = evaluate_sample(halves.model, sample)
    for place in here.places[:4].tolist():
        with sepcap.ablate(halves.model, alone(halves, tuple(place)), kind, reference=reference):
            value, _ = evaluate_sample(halves.model, sample).difference(before, "loss")
        assert float(here.delta().value[tuple(place)]) == pytest.approx(value, abs=2e-5)


@pytest.mark.thorough
def test_whole_heads_and_value_neurons(tmp_path_factory):
    plant = without_ties(planted.in_attention(tmp_path_factory.mktemp("heads"), words=4))
    tasks = {"forget": load_task(plant.a, name="a"), "retain": load_task(plant.b, name="b")}
    heads = sorted({(layer, head) for layer, head, _ in plant.needs.values()})
    chosen = NeuronSet.heads(plant.model, heads)
    whole = sepcap.ablate_each(plant.model, neurons=chosen, site="attn_pre_out", whole_heads=True, **tasks, **SIZE)
    assert whole.places.tolist() == [list(head) for head in heads]
    assert whole.delta().value.shape == tuple(whole.config["shape"][:2])
    before = evaluated(plant, tasks["forget"])
    for head in heads:
        value, ends = evaluated(plant, tasks["forget"], NeuronSet.heads(plant.model, [head])).difference(before, "loss")
        delta = whole.delta("forget")
        np.testing.assert_allclose([float(end[head]) for end in (delta.value, delta.low, delta.high)], [value, *ends], atol=2e-5)
    own = whole.delta("forget", "top1").value
    # all four words of a task are the neurons of one head
    assert sorted(own[tuple(zip(*heads, strict=True))].round(decimals=6).tolist()) == [round(-before.top1, 6), 0.0]
    same = NeuronSet({"attn_value": chosen.masks["attn_pre_out"]})
    values = sepcap.ablate_each(plant.model, neurons=same, site="attn_value", **tasks, **SIZE)
    pre_out = sepcap.ablate_each(plant.model, neurons=chosen, site="attn_pre_out", **tasks, **SIZE)
    # every head attends to its own position alone
    torch.testing.assert_close(values.tensors["forget/alone"], pre_out.tensors["forget/alone"], atol=2e-3, rtol=0)
    assert pre_out.top(4, metric="top1") == NeuronSet({"attn_pre_out": plant.truth["a"].masks["attn_pre_out"]})


def test_subsets_and_samples_give_the_effects_of_all(halves, tasks, found):
    part = sepcap.ablate_each(halves.model, **tasks, **SIZE, layers=(1,), sample=3, seed=5)
    assert len(part.places) == 3
    assert (part.places[:, 0] == 1).all()
    measured = ~part.delta().value.isnan()
    assert int(measured.sum()) == 3
    torch.testing.assert_close(part.delta().value[measured], found.delta().value[measured], atol=1e-6, rtol=0)
    again = sepcap.ablate_each(halves.model, **tasks, **SIZE, layers=(1,), sample=3, seed=5)
    np.testing.assert_array_equal(again.places, part.places)
    given = sepcap.ablate_each(halves.model, neurons=halves.truth["a"], **tasks, **SIZE)
    assert len(given.places) == len(halves.truth["a"])


def test_the_sampling_error_is_that_of_a_finite_population(halves, tasks, found):
    n, total = 5, len(found.places)
    part = sepcap.ablate_each(halves.model, **tasks, **SIZE, sample=n)
    row = part.tables["layers"].query("task == 'forget'").iloc[0]
    values = part.table["delta_loss_forget"].to_numpy()
    assert row["mean_delta_loss"] == pytest.approx(values.mean(), rel=1e-6)
    assert row["sampling_se"] == pytest.approx(values.std(ddof=1) / math.sqrt(n) * math.sqrt(1 - n / total), rel=1e-6)
    assert (row["of"], row["ablated"]) == (total, n)
    assert row["mean_delta_loss_low"] < row["mean_delta_loss"] < row["mean_delta_loss_high"]
    assert (found.tables["layers"]["sampling_se"] == 0).all()


def test_a_sample_is_drawn_uniformly():
    mask = torch.ones(2, 5, dtype=torch.bool)
    counts = np.zeros((2, 5))
    for seed in range(600):
        for place in drawn(mask, 3, seed).tolist():
            counts[tuple(place)] += 1
    assert np.abs(counts / 600 - 0.3).max() < 4 * math.sqrt(0.3 * 0.7 / 600)


@pytest.mark.thorough
def test_two_copies_of_a_neuron_back_each_other_up(tmp_path_factory):
    plant = without_ties(planted.in_mlp(tmp_path_factory.mktemp("copies"), words=WORDS, busy=2))
    mask, busy = plant.truth["a"].masks["mlp"], plant.truth["busy"].masks["mlp"]
    layer, copy = busy.nonzero()[0].tolist()
    first, other = mask[layer].nonzero()[:2, 0].tolist()
    mlp = plant.model.blocks[layer].mlp
    with torch.no_grad():
        mlp.W_in[:, copy], mlp.b_in[copy], mlp.W_out[copy] = mlp.W_in[:, first], mlp.b_in[first], mlp.W_out[first]
    tasks = {"forget": load_task(plant.a, name="a"), "retain": load_task(plant.b, name="b")}
    pairs = [((layer, first), (layer, copy)), ((layer, other), (layer, first)), ((layer, copy), (layer, other))]
    found = sepcap.ablate_each(plant.model, **tasks, **SIZE, pairs=pairs)
    table = found.tables["pairs"]
    assert len(table) == 3
    token = next(token for token, its in plant.needs.items() if its == (layer, first))
    ids = np.concatenate([row[:-1] for row in sample_task(plant.model, tasks["forget"], "evaluate", SIZE["tokens"]).rows])
    share = float((ids == token).sum()) / SIZE["tokens"]
    copies = table[[{a, b} == {first, copy} for a, b in zip(table["neuron_a"], table["neuron_b"], strict=True)]]
    row = copies.iloc[0]
    assert row["delta_top1_forget"] == pytest.approx(-share)
    assert row["synergy_top1_forget"] == pytest.approx(-share)  # neither alone costs a hit
    assert row["synergy_loss_forget_low"] > 0
    rest = table.drop(index=copies.index)
    assert rest["synergy_top1_forget"].abs().max() == 0
    # by evaluations of the model without one, the other, and both
    places = [(layer, first), (layer, copy)]
    before = evaluated(plant, tasks["forget"])
    sets = (places, places[:1], places[1:])
    both, one, two = (evaluated(plant, tasks["forget"], alone(plant, *these)).loss - before.loss for these in sets)
    assert row["synergy_loss_forget"] == pytest.approx(both - one - two, abs=5e-6)
    strongest = sepcap.ablate_each(plant.model, **tasks, **SIZE, pairs=4)
    assert len(strongest.tables["pairs"]) == 6
    assert found.figure("backups").data[0].z is not None
    assert any("backups" in sentence for sentence in strongest.summary())


# the folder


@pytest.mark.thorough
def test_an_interrupted_study_goes_on_and_gives_the_same_bits(halves, tasks, found, tmp_path, monkeypatch):
    straight = sepcap.ablate_each(halves.model, **tasks, **SIZE, pairs=3, out=tmp_path / "straight")
    real, calls = measure.effects, []

    def stopped(*args):
        calls.append(1)
        if len(calls) == 11:  # after those of the trial
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(measure, "effects", stopped)
    with pytest.raises(KeyboardInterrupt):
        sepcap.ablate_each(halves.model, **tasks, **SIZE, pairs=3, out=tmp_path / "study")
    done = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "study" / "pieces").rglob("*.safetensors")}
    assert done
    again = sepcap.ablate_each(halves.model, **tasks, **SIZE, pairs=3, out=tmp_path / "study")
    for name, tensor in straight.tensors.items():
        assert torch.equal(tensor, again.tensors[name]), name
    for name, table in straight.tables.items():
        pd.testing.assert_frame_equal(again.tables[name], table)
    kept = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "study" / "pieces").rglob("*.safetensors")}
    assert done.items() <= kept.items()
    calls.clear()
    back = sepcap.ablate_each(halves.model, **tasks, **SIZE, pairs=3, out=tmp_path / "study")
    assert not calls
    pd.testing.assert_frame_equal(back.table, straight.table)
    loaded = sepcap.load_result(tmp_path / "study")
    assert isinstance(loaded, sepcap.SingleAblations)
    assert loaded.summary() == straight.summary()
    with pytest.raises(FileExistsError, match="kind: 'zero' stored, 'mean' requested"):
        sepcap.ablate_each(halves.model, **tasks, **SIZE, pairs=3, kind="mean", out=tmp_path / "study")


@pytest.mark.thorough
def test_the_cost_is_measured_and_said_before_the_work(tiny_opt, letters, digits, monkeypatch):
    heard = []
    how = {"forget": letters, "retain": digits, "tokens": 200, "reference_tokens": 100}
    sepcap.ablate_each(tiny_opt, **how, progress=heard.append)
    assert "144 mlp neurons ablated alone (zero), each on 200 predictions" in heard[0]
    assert "at the rate measured just now" in heard[0]
    assert "of the work of whole passes is left to do" in heard[0]
    sepcap.ablate_each(tiny_opt, **how, sample=3, pairs=2, progress=heard.append)
    assert "3 mlp neurons" in heard[1]
    assert "and 1 pair of them" in heard[1]
    monkeypatch.setattr(measure.Measurement, "expected", lambda self, todo: (60.0 * sum(len(n) for n, _ in todo), 1.0))
    study = Plan.of(tiny_opt, sepcap.SingleAblationsConfig(**how, sample=20, pairs=11), None)
    assert "75 minutes and 75 minutes" in study.cost()  # 20 neurons and 55 pairs, a minute each


def test_saving_and_the_page(found, tmp_path):
    found.save(tmp_path / "saved")
    back = sepcap.load_result(tmp_path / "saved")
    for name, table in found.tables.items():
        pd.testing.assert_frame_equal(back.tables[name], table)
    assert "What is the effect of ablating each neuron alone?" in found.report(tmp_path / "page.html").read_text()


# figures


def test_figures_hold_every_neuron_once(found):
    for kind in ("score", "tasks"):
        figure = found.figure(kind)
        assert sum(len(trace.x) for trace in figure.data) == len(found.places)
    scale = SignedLog(found.table["delta_loss_forget"].to_numpy())
    drawn_at = np.concatenate([np.array(trace.y, dtype=float) for trace in found.figure("score").data])
    np.testing.assert_allclose(np.sort(drawn_at), np.sort(scale.of(found.table["delta_loss_forget"])), atol=1e-4)
    assert len(found.figure("layers").data) == 4
    with pytest.raises(ValueError, match="repeat the call with pairs="):
        found.figure("backups")


def test_the_row_of_a_sweep_is_that_of_all_layers(found):
    for task in ("forget", "retain"):
        assert found.numbers[f"mean_delta_loss_{task}"] == pytest.approx(found.delta(task).value.nanmean().item())
    assert set(numbers_of(found)) == set(found.numbers)


def test_the_axis_is_odd_and_linear_near_zero():
    scale = SignedLog(np.array([1e-4, -2e-4, 0.5, 0.0]))
    values = np.array([-0.5, -1e-6, 0.0, 1e-6, 0.5])
    np.testing.assert_allclose(scale.of(values), -scale.of(-values))
    assert scale.of(1e-6) == pytest.approx(1e-6 / scale.unit / math.log(10), rel=0.01)


# what is refused


@pytest.mark.parametrize(
    ("given", "error", "said"),
    [
        ({"site": "mlp", "whole_heads": True}, ValueError, "site='mlp' has no heads"),
        ({"heads": 1}, ValueError, "site='mlp' has no heads"),
        ({"site": "attn_pre_out", "heads": 99}, IndexError, "heads=99"),
        ({"layers": 9}, IndexError, "layer=9 does not exist"),
        ({"sample": 0}, ValueError, "sample=0"),
        ({"sample": 99_999}, ValueError, "sample=99999: there are .* to draw from"),
        ({"pairs": 1}, ValueError, "pairs=1"),
        ({"pairs": "all"}, ValueError, "pairs='all'"),
        ({"pairs": 999}, ValueError, "pairs=999: .* are ablated alone"),
        ({"pairs": [((0, 0), (0, 0))]}, ValueError, "two different neurons"),
        ({"pairs": [((0, 0), (7, 0))]}, ValueError, r"\(7, 0\) is not among the neurons"),
        ({"pairs": [((0, 0), (0, 1), (0, 2))]}, ValueError, "pairs of places"),
        ({"site": "attn_value", "importance": "freq"}, ValueError, "freq"),
        ({"tokens": 0}, ValueError, "tokens=0"),
    ],
)
def test_wrong_input_is_one_error_and_nothing_is_written(halves, tasks, tmp_path, given, error, said):
    with pytest.raises(error, match=said):
        sepcap.ablate_each(halves.model, **tasks, **SIZE | given, out=tmp_path / "study")
    assert not (tmp_path / "study").exists()


def test_neurons_of_another_site_or_parts_of_heads_are_refused(halves, tasks):
    with pytest.raises(ValueError, match="give neurons of site='mlp'"):
        sepcap.ablate_each(halves.model, neurons=NeuronSet.random(halves.model, {"attn_pre_out": 0.1}), **tasks, **SIZE)
    with pytest.raises(ValueError, match="choose by a NeuronSet or by layers"):
        sepcap.ablate_each(halves.model, neurons=halves.truth["a"], layers=0, **tasks, **SIZE)
    part = NeuronSet.empty(halves.model, "attn_pre_out")
    part.masks["attn_pre_out"][0, 0, 0] = True
    with pytest.raises(ValueError, match="parts of heads"):
        sepcap.ablate_each(halves.model, neurons=part, site="attn_pre_out", whole_heads=True, **tasks, **SIZE)


def test_wrong_names_are_named(found):
    for call in (lambda: found.delta("both"), lambda: found.top(task="code"), lambda: found.delta("forget", "accuracy")):
        with pytest.raises(ValueError, match=r"task|metric"):
            call()
    with pytest.raises(ValueError, match="n=99999"):
        found.top(99_999)
