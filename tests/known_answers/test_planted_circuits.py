"""Selective pruning must find what was planted, on real weights and through the public functions (METHODS 16)."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import planted
import pytest
import torch

import sepcap
from sepcap.tasks.batches import sample_tokens
from sepcap.tasks.load import load_task

TOKENS = 800
WORDS = 12


@pytest.fixture(scope="module")
def two_circuits(tmp_path_factory):
    return planted.in_mlp(tmp_path_factory.mktemp("two_circuits"), words=WORDS, busy=4)


@pytest.fixture(scope="module")
def leaking_circuits(tmp_path_factory):
    """Every neuron is active everywhere: its own words differ from the others in degree only."""
    return planted.in_mlp(tmp_path_factory.mktemp("leaking_circuits"), words=WORDS, busy=4, leak=0.1, seed=1)


@pytest.fixture(scope="module")
def shared_circuit(tmp_path_factory):
    return planted.in_mlp(tmp_path_factory.mktemp("shared_circuit"), words=WORDS, shared=WORDS)


@pytest.fixture(scope="module")
def attention_circuits(tmp_path_factory):
    return planted.in_attention(tmp_path_factory.mktemp("attention_circuits"))


def size(plant: planted.Planted, site: str) -> int:
    return plant.truth["a"].masks[site].numel()


def prune(plant: planted.Planted, out: Path, forget: str, fractions: dict[str, float], steps: int, **options) -> sepcap.Run:
    retain = {"a": "b", "b": "a"}[forget]
    config = sepcap.PruningConfig(
        forget=getattr(plant, forget),
        retain=getattr(plant, retain),
        fractions=fractions,
        steps=steps,
        tokens=TOKENS,
        eval_tokens=TOKENS,
        batch_size=64,
        **options,
    )
    return sepcap.prune(plant.model, config, out=out / f"forget_{forget}")


def check_trajectory(plant: planted.Planted, run: sepcap.Run, forget: str, site: str) -> None:
    """Every accuracy of the run is the share of targets that follow a word whose neuron is left, counted on the tokens themselves."""
    table = run.trajectory.sort_values("step")
    for role, task in (("forget", forget), ("retain", {"a": "b", "b": "a"}[forget])):
        rows = sample_tokens(load_task(getattr(plant, task)), "evaluate", plant.model.tokenizer, TOKENS, planted.CONTEXT).rows
        words = [int(word) for row in rows for word, target in pairwise(row) if target != 0]
        measured = table.loc[table["role"] == role, "top1"].to_numpy()
        for step in range(run.steps_done + 1):
            pruned = run.neurons(step).masks[site]
            predicted = np.mean([word in plant.needs and not pruned[plant.needs[word]] for word in words])
            np.testing.assert_allclose(measured[step], predicted, atol=1e-12)


# Two independent halves


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("kind", "forget"),
    [
        ("two_circuits", "a"),
        ("leaking_circuits", "b"),
        pytest.param("two_circuits", "b", marks=pytest.mark.slow),
        pytest.param("leaking_circuits", "a", marks=pytest.mark.slow),
    ],
)
def test_independent_halves_are_perfectly_separable(kind, forget, request, tmp_path):
    plant = request.getfixturevalue(kind)
    run = prune(plant, tmp_path, forget, {"mlp": 3 / size(plant, "mlp")}, steps=5)
    assert run.neurons(4) == plant.truth[forget]  # 4 × 3 neurons: precision = recall = 1
    for step in range(1, 4):
        assert len(run.neurons(step)) == 3 * step
        assert len(run.neurons(step) - plant.truth[forget]) == 0
    assert run.separability("top1").area >= 1.98
    assert run.separability("top1", specific="retain").area <= 0.02
    assert run.separability("top1").percent >= 98
    # the fifth step has nothing left to gain, and takes neurons on which the forget task does not depend
    assert run.trajectory.query("role == 'forget' and step >= 4")["top1"].tolist() == [0, 0]
    check_trajectory(plant, run, forget, "mlp")


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("per_layer", "recollect"),
    [(True, True), (False, False), *(pytest.param(one, not one, marks=pytest.mark.slow) for one in (True, False))],
)
def test_every_way_of_selecting_finds_the_planted_neurons(two_circuits, per_layer, recollect, tmp_path):
    masks = two_circuits.truth["a"].masks["mlp"]
    # per layer, one step takes as many from each: the layer with fewer planted ones says how many steps stay within them
    fewest = int(masks.sum(dim=1).min())
    steps = fewest if per_layer else WORDS // 3
    fraction = 1 / masks.shape[1] if per_layer else 3 / masks.numel()
    run = prune(two_circuits, tmp_path, "a", {"mlp": fraction}, steps, per_layer=per_layer, recollect=recollect)
    assert len(run.neurons() - two_circuits.truth["a"]) == 0
    if per_layer:
        assert run.neurons().per_layer("mlp") == [fewest, fewest]
    else:
        assert run.neurons() == two_circuits.truth["a"]


@pytest.mark.parametrize("importance", ["abs", "sqrt", "rms", "std", "freq"])
@pytest.mark.parametrize("forget", ["a", "b"])
def test_every_importance_ranks_the_planted_neurons_first(two_circuits, forget, importance):
    retain = {"a": "b", "b": "a"}[forget]
    f, r = (sepcap.collect(two_circuits.model, getattr(two_circuits, task), tokens=TOKENS) for task in (forget, retain))
    scores = sepcap.score(f, r, importance, sites=["mlp"])
    assert scores.top({"mlp": WORDS / size(two_circuits, "mlp")}) == two_circuits.truth[forget]


@pytest.mark.parametrize("importance", ["abs", "sqrt", "rms"])
def test_a_degree_of_difference_is_enough(leaking_circuits, importance):
    f, r = (sepcap.collect(leaking_circuits.model, task, tokens=TOKENS) for task in (leaking_circuits.a, leaking_circuits.b))
    scores = sepcap.score(f, r, importance, sites=["mlp"])
    assert scores.top({"mlp": WORDS / size(leaking_circuits, "mlp")}) == leaking_circuits.truth["a"]
    # activation on the forget task alone would take the neurons that are always on
    largest = f["mlp"].abs.flatten().argsort(descending=True)[:4]
    assert bool(leaking_circuits.truth["busy"].masks["mlp"].flatten()[largest].all())


def test_mean_shift_cannot_tell_the_direction(two_circuits):
    """|difference of means| is symmetric in the two tasks: both halves rank above the neurons that are always on."""
    f, r = (sepcap.collect(two_circuits.model, task, tokens=TOKENS) for task in (two_circuits.a, two_circuits.b))
    there, back = (sepcap.score(x, y, "mean_shift", sites=["mlp"])["mlp"] for x, y in ((f, r), (r, f)))
    torch.testing.assert_close(there, back)
    assert sepcap.score(f, r, "mean_shift", sites=["mlp"]).top({"mlp": 24 / 28}) == two_circuits.truth["a"] | two_circuits.truth["b"]


@pytest.mark.parametrize("remove", ["delete", "ablate"])
def test_removing_the_planted_neurons_removes_one_task_and_nothing_of_the_other(two_circuits, tmp_path, remove):
    before = {task: sepcap.evaluate(two_circuits.model, getattr(two_circuits, task), tokens=TOKENS) for task in "ab"}
    if remove == "delete":
        sepcap.save_pretrained(two_circuits.model, tmp_path)
        model = sepcap.load_model(tmp_path, device="cpu")
        sepcap.delete(model, two_circuits.truth["a"])
        after = {task: sepcap.evaluate(model, getattr(two_circuits, task), tokens=TOKENS) for task in "ab"}
    else:
        with sepcap.ablate(two_circuits.model, two_circuits.truth["a"]):
            after = {task: sepcap.evaluate(two_circuits.model, getattr(two_circuits, task), tokens=TOKENS) for task in "ab"}
    assert before["a"].top1 > 0.9
    assert after["a"].top1 == 0
    np.testing.assert_allclose(after["b"].per_row, before["b"].per_row, rtol=1e-5)


# One circuit, and what lies between


@pytest.mark.thorough
@pytest.mark.parametrize("forget", ["a", pytest.param("b", marks=pytest.mark.slow)])
def test_a_shared_circuit_is_not_separable(shared_circuit, forget, tmp_path):
    # scores differ by ε and by chance only, so which neurons go first means nothing; each costs both tasks one word in twelve
    run = prune(shared_circuit, tmp_path, forget, {"mlp": 1 / size(shared_circuit, "mlp")}, steps=WORDS)
    assert run.separability("top1").area == pytest.approx(1, abs=0.05)
    assert abs(run.separability("top1").percent) <= 5
    assert run.separability("top1", specific="retain").area == pytest.approx(1, abs=0.05)
    assert run.neurons() == shared_circuit.truth["both"]
    check_trajectory(shared_circuit, run, forget, "mlp")


@pytest.mark.slow  # its two ends are the tests above
def test_area_falls_from_two_to_one_as_more_is_shared(tmp_path):
    """With a share s of the words on shared neurons the trajectory is (1,1) → (s,1) → (0,1−s) → (0,0): A = 2 − s²."""
    areas = []
    for shared in (0, 3, 6, 9, 12):
        folder = tmp_path / str(shared)
        plant = planted.in_mlp(folder / "model", words=WORDS, shared=shared, seed=shared)
        steps = (2 * WORDS - shared) // 3
        run = prune(plant, folder, "a", {"mlp": 3 / size(plant, "mlp")}, steps)
        own = (WORDS - shared) // 3
        assert run.neurons(own) == plant.truth["a"] or own == 0
        assert run.neurons(own + shared // 3) == plant.truth["a"] | plant.truth["both"]
        areas.append(run.separability("top1").area)
    assert (np.diff(areas) < -0.02).all()
    np.testing.assert_allclose(areas, [2 - (shared / WORDS) ** 2 for shared in (0, 3, 6, 9, 12)], atol=0.03)


# Random baselines


@pytest.mark.thorough
@pytest.mark.parametrize("forget", ["a", pytest.param("b", marks=pytest.mark.slow)])
def test_random_neurons_of_the_same_layers_separate_nothing_where_the_selection_separates_all(two_circuits, forget, tmp_path):
    """Both tasks have neurons in every layer: what separates is which of them go, not how many of every layer."""
    fractions = {"mlp": 3 / size(two_circuits, "mlp")}
    selective = prune(two_circuits, tmp_path, forget, fractions, steps=4)
    how = {"importance": "random", "baseline": "per_layer", "matched": str(selective.folder)}
    runs = [prune(two_circuits, tmp_path / str(seed), forget, fractions, steps=4, seed=seed, **how) for seed in range(3)]
    for run in runs:
        check_trajectory(two_circuits, run, forget, "mlp")
        for step in range(5):
            assert run.neurons(step).per_layer("mlp") == selective.neurons(step).per_layer("mlp")
    s = selective.separability("top1", baseline=runs)
    assert s.area >= 1.98
    areas = np.array([run.separability("top1").area for run in runs])
    assert s.above_random == pytest.approx(s.area - areas.mean())
    assert abs(areas.mean() - 1) < 4 * max(s.seeds_sd, 0.05) / np.sqrt(3)
    assert (areas < 1.6).all()


@pytest.mark.slow
def test_random_pruning_separates_nothing_on_average(two_circuits, tmp_path):
    """The words of both tasks are interchangeable for a random order, so that E[A] = 1 though every single run departs from it."""
    n = size(two_circuits, "mlp")
    runs = [prune(two_circuits, tmp_path / str(seed), "a", {"mlp": 4 / n}, steps=7, importance="random", seed=seed) for seed in range(5)]
    for run in runs:
        check_trajectory(two_circuits, run, "a", "mlp")
        for step in range(1, 8):
            assert len(run.neurons(step)) == 4 * step  # none is drawn twice
            assert len(run.neurons(step - 1) - run.neurons(step)) == 0
    areas = np.array([run.separability("top1").area for run in runs])
    assert len({run.neurons(1).masks["mlp"].numpy().tobytes() for run in runs}) == 5
    assert abs(areas.mean() - 1) < 4 * max(areas.std(ddof=1), 0.05) / np.sqrt(5)
    selective = prune(two_circuits, tmp_path, "a", {"mlp": 4 / n}, steps=7)
    above = selective.separability("top1", baseline=runs[0]).above_random
    assert above == pytest.approx(selective.separability("top1").area - areas[0])


# Attention


@pytest.mark.thorough
@pytest.mark.parametrize("forget", ["a", pytest.param("b", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("key", "per_step", "options"), [("attn_pre_out", 2, {}), ("heads", 4, {}), ("heads", 4, {"aggregate": "median"})])
def test_planted_heads_are_found(attention_circuits, forget, key, per_step, options, tmp_path):
    steps = 8 // per_step  # eight neurons, or two heads of four
    run = prune(attention_circuits, tmp_path, forget, {key: per_step / size(attention_circuits, "attn_pre_out")}, steps, **options)
    assert run.neurons() == attention_circuits.truth[forget]
    assert run.separability("top1").area >= 1.98
    assert run.separability("top1", specific="retain").area <= 0.02
    check_trajectory(attention_circuits, run, forget, "attn_pre_out")


@pytest.mark.parametrize("site", ["attn_pre_out", "attn_value"])
@pytest.mark.parametrize("importance", ["abs", "sqrt", "rms", "std"])
def test_every_importance_finds_the_planted_attention_neurons(attention_circuits, site, importance):
    tasks = attention_circuits.a, attention_circuits.b
    f, r = (sepcap.collect(attention_circuits.model, task, tokens=TOKENS, sites=site) for task in tasks)
    selected = sepcap.score(f, r, importance).top({site: 8 / size(attention_circuits, "attn_pre_out")})
    assert torch.equal(selected.masks[site], attention_circuits.truth["a"].masks["attn_pre_out"])
