"""The sweep of [PEAK]: the same neurons for every kind, nested steps, resumable, the same bits."""

import dataclasses
import itertools
import json

import numpy as np
import pandas as pd
import pytest
import torch
from planted_ablations import planted_config
from tiny import fresh

import sepcap
from sepcap.evaluation.next_token import evaluate_sample
from sepcap.evaluation.result import COUNTS
from sepcap.selection.neurons import NeuronSet
from sepcap.storage import FORMAT, write_json
from sepcap.studies.ablations import random_neurons as module
from sepcap.studies.ablations.config import AblationSweepConfig
from sepcap.studies.ablations.heads import balanced
from sepcap.studies.ablations.random_neurons import AblationSweep, sweep_ablation
from sepcap.tasks.batches import sample_tokens
from sepcap.tasks.load import load_task

KINDS = ("zero", "mean", "peak", "resample")


def config_of(texts, **changes):
    small = {"steps": 4, "seeds": (0, 5), "kinds": KINDS, "tokens": 300, "reference_tokens": 500}
    return AblationSweepConfig(task=texts, **small | changes)


@pytest.fixture(scope="module")
def shared(trained_folder, letters):
    """A trained model and its sweep, in memory; nobody changes them."""
    model = fresh(trained_folder)
    return model, sweep_ablation(model, config_of(letters))


def same_rows(a, b):
    return a.tensors.keys() == b.tensors.keys() and all(torch.equal(tensor, b.tensors[name]) for name, tensor in a.tensors.items())


def test_every_kind_is_used_on_the_same_neurons_and_a_step_holds_the_one_before(trained, letters, monkeypatch):
    used = []

    def spy(model, neurons, kind, **options):
        used.append((kind, options["seed"], neurons.masks["attn_pre_out"].clone()))
        return sepcap.ablate(model, neurons, kind, **options)

    monkeypatch.setattr(module, "ablate", spy)
    sweep_ablation(trained, config_of(letters))
    assert [kind for kind, _, _ in used] == list(KINDS) * 8
    cells = [used[start : start + 4] for start in range(0, 32, 4)]
    for cell in cells:
        assert all((mask == cell[0][2]).all() for _, _, mask in cell)
    sets = [cell[0][2] for cell in cells]
    assert [int(mask.sum()) for mask in sets] == [16, 32, 48, 64] * 2
    for order in (sets[:4], sets[4:]):
        assert all(not (smaller & ~larger).any() for smaller, larger in itertools.pairwise(order))
    assert (sets[0] != sets[4]).any()


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_is_the_evaluation_under_that_ablation_of_random_neurons(shared, letters, kind):
    model, result = shared
    task = load_task(letters)
    sample = sample_tokens(task, "evaluate", model.tokenizer, 300, 32)
    reference = sepcap.collect(model, letters, tokens=500, sites="attn_pre_out", histogram=True)
    neurons = NeuronSet.random(model, {"attn_pre_out": 0.5}, seed=5)
    with sepcap.ablate(model, neurons, kind, reference=reference, seed=5):
        after = evaluate_sample(model, sample, batch_size=balanced(len(sample.rows), 16))
    table = result.table
    row = table[(table["seed"] == 5) & (table["fraction"] == 0.5) & (table["kind"] == kind)].iloc[0]
    assert (row["loss"], row["top1"], row["n"], row["neurons"]) == (after.loss, after.top1, 300, 32)
    assert abs(row["loss"] - result.before.loss) > 1e-4


def test_the_ends_are_the_model_as_it_is_and_the_model_without_the_site(shared, letters):
    model, result = shared
    table = result.table
    start, end = table[table["fraction"] == 0], table[table["fraction"] == 1]
    whole = sepcap.evaluate(model, letters, tokens=300)
    assert len(start) == len(end) == 2 * len(KINDS)
    np.testing.assert_allclose(start["loss"], whole.loss)
    assert (start["top1"] == whole.top1).all()
    with sepcap.ablate(model, ~NeuronSet.empty(model, "attn_pre_out")):
        nothing = sepcap.evaluate(model, letters, tokens=300)
    np.testing.assert_allclose(end[end["kind"] == "zero"]["loss"], nothing.loss)
    # with everything gone, the order in which it went makes no difference to constants
    for kind in ("zero", "mean", "peak"):
        assert end[end["kind"] == kind]["loss"].nunique() == 1


def test_optimal_is_fitted_to_every_set_where_it_is_asked_for(trained, letters):
    result = sweep_ablation(trained, config_of(letters, steps=1, seeds=(0,), kinds=("zero", "optimal"), fit_tokens=300))
    end = result.table[result.table["fraction"] == 1].set_index("kind")["loss"]
    assert end["optimal"] < end["zero"]


def test_a_folder_holds_everything_and_is_read_not_computed_again(trained, letters, shared, tmp_path, monkeypatch):
    result = sweep_ablation(trained, config_of(letters), out=tmp_path / "p")
    assert same_rows(result, shared[1])
    stored = pd.read_parquet(tmp_path / "p" / "tables" / "table.parquet")
    pd.testing.assert_frame_equal(stored, result.table)
    config = json.loads((tmp_path / "p" / "config.json").read_text())
    assert (config["steps"], config["seeds"], config["kinds"], config["neurons"]) == (4, [0, 5], list(KINDS), 64)
    monkeypatch.setattr(module, "ablate", None)
    monkeypatch.setattr(module, "collect_sample", None)
    monkeypatch.setattr(module, "evaluate_sample", None)
    for again in (sweep_ablation(trained, config_of(letters), out=tmp_path / "p"), AblationSweep.load(tmp_path / "p")):
        assert same_rows(again, result)
        assert again.table.equals(result.table)


def test_an_interrupted_sweep_goes_on_and_ends_with_the_same_bits(trained, letters, shared, tmp_path, monkeypatch):
    calls = []

    def dies(*args, **options):
        calls.append(None)
        if len(calls) == 14:
            raise KeyboardInterrupt
        return evaluate_sample(*args, **options)

    monkeypatch.setattr(module, "evaluate_sample", dies)
    with pytest.raises(KeyboardInterrupt):
        sweep_ablation(trained, config_of(letters), out=tmp_path / "p")
    with pytest.raises(FileNotFoundError, match=r"is not finished \(4 of its pieces exist\)"):
        AblationSweep.load(tmp_path / "p")
    del calls[:]
    monkeypatch.setattr(module, "evaluate_sample", lambda *a, **k: calls.append(None) or evaluate_sample(*a, **k))
    assert same_rows(sweep_ablation(trained, config_of(letters), out=tmp_path / "p"), shared[1])
    assert len(calls) == 5 * len(KINDS)


def test_a_folder_of_another_configuration_is_refused_and_left_alone(trained, letters, digits, tmp_path):
    small = {"steps": 1, "seeds": (0,), "kinds": ("zero",)}
    sweep_ablation(trained, config_of(letters, **small), out=tmp_path / "p")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "p").rglob("*") if path.is_file()}
    with pytest.raises(FileExistsError, match=r"steps: 1 stored, 2 requested"):
        sweep_ablation(trained, config_of(letters, **small | {"steps": 2}), out=tmp_path / "p")
    with pytest.raises(FileExistsError, match="samples"):
        sweep_ablation(trained, config_of(digits, **small), out=tmp_path / "p")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "p").rglob("*") if path.is_file()} == before
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="holds no study"):
        sweep_ablation(trained, config_of(letters, **small), out=tmp_path / "full")
    with pytest.raises(FileExistsError, match="is a file"):
        sweep_ablation(trained, config_of(letters, **small), out=tmp_path / "full" / "notes.txt")


def planted(top1_of, seeds=(0, 1), kinds=("zero",), steps=4):
    """A sweep whose top-1 is top1_of(kind, seed, fraction) exactly; the loss is 4 − 2·top1."""

    def rows(top1):
        per_row = np.zeros((5, len(COUNTS)))
        for name, value in {"n": 100, "top1": 100 * top1, "loss": 100 * (4 - 2 * top1)}.items():
            per_row[:, COUNTS.index(name)] = value
        return per_row

    config = planted_config(task="t", site="attn_pre_out", steps=steps, seeds=seeds, kinds=kinds, neurons=64)
    cells = [[[rows(top1_of(kind, seed, step / steps)) for kind in kinds] for step in range(1, steps + 1)] for seed in seeds]
    return AblationSweep.of(config, rows(top1_of(kinds[0], seeds[0], 0)), np.array(cells), np.arange(5))


def test_the_summary_is_that_of_the_planted_lines():
    # seed 0 falls in a straight line from 0.8 to 0, seed 1 falls to half of it in the same steps
    summary = planted(lambda kind, seed, gone: 0.8 * (1 - gone / (1 + seed))).by_kind.iloc[0]
    assert summary["top1_at_50"] == pytest.approx((0.4 + 0.6) / 2)
    assert summary["top1_at_50_seeds_sd"] == pytest.approx(np.std([0.4, 0.6], ddof=1))
    assert summary["loss_at_50"] == pytest.approx(4 - 2 * 0.5)
    assert summary["area"] == pytest.approx((0.5 + 0.75) / 2)
    assert summary["area_seeds_sd"] == pytest.approx(np.std([0.5, 0.75], ddof=1))


def test_half_is_interpolated_where_no_step_is_there():
    assert planted(lambda kind, seed, gone: 1 - gone, steps=5).by_kind["top1_at_50"][0] == pytest.approx(0.5)


def test_what_is_not_a_sweep_is_not_loaded(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no study"):
        AblationSweep.load(tmp_path)
    write_json(tmp_path / "config.json", {"format": FORMAT})
    with pytest.raises(FileNotFoundError, match="a study 'ablation-sweep' was requested"):
        AblationSweep.load(tmp_path)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"steps": 0}, "steps=0"),
        ({"seeds": ()}, "seeds="),
        ({"seeds": (1, 1)}, "without repeats"),
        ({"kinds": ("zero", "maen")}, "Did you mean 'mean'"),
        ({"site": "attn_pre"}, "attn_pre_out"),
    ],
)
def test_a_bad_configuration_is_named(changes, says):
    config = AblationSweepConfig()
    for name, value in changes.items():  # past the type checks of the tests, which would be first
        object.__setattr__(config, name, value)
    with pytest.raises(ValueError, match=says):
        config.__post_init__()


def test_steps_that_hold_no_neuron_are_refused(trained, letters):
    with pytest.raises(ValueError, match="selects no neuron"):
        sweep_ablation(trained, dataclasses.replace(config_of(letters), steps=100))
