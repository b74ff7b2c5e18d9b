"""Random neurons matched with a run: as many of every layer, and of every bin of activity, none that is gone, and the same bits again."""

import shutil
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from run_folders import bits, config_of
from tiny import fresh

import sepcap
from sepcap.evaluation.result import Evaluation
from sepcap.models.weights import WeightSnapshot
from sepcap.studies.check import check_folder
from sepcap.studies.pruning import prune as pruning
from sepcap.studies.pruning.check_run import problems
from sepcap.studies.pruning.random_neurons.baselines import baseline_config, draw_like, found_again, quantile_bins
from sepcap.studies.pruning.run import Run

STEPS = 4
FRACTIONS = {"mlp": 0.2, "attn_pre_out": 0.1}
KINDS = ("per_layer", "activity")


@pytest.fixture(scope="module")
def model(tiny_folders):
    return fresh(tiny_folders["opt"])


@pytest.fixture(scope="module")
def config(letters, digits):
    return config_of(letters, digits, fractions=FRACTIONS, steps=STEPS)


@pytest.fixture(scope="module")
def selective(model, config, tmp_path_factory):
    return sepcap.prune(model, config, out=tmp_path_factory.mktemp("selective") / "forward", tracker="none")


@pytest.fixture(scope="module", params=KINDS)
def baseline(request, model, config, selective, tmp_path_factory):
    """A baseline of every step of the run."""
    out = tmp_path_factory.mktemp("baseline") / request.param
    return sepcap.prune(model, baseline_config(config, request.param, 0, STEPS, selective.folder), out=out, tracker="none")


# Draws


@pytest.mark.parametrize("seed", range(5))
def test_a_draw_has_the_same_number_of_every_layer_and_bin_and_nothing_that_is_gone(seed):
    rng = np.random.default_rng(seed)
    bins = torch.from_numpy(rng.integers(0, 3, (4, 30)))
    taken, gone = torch.zeros(2, 4, 30, dtype=torch.bool)
    for _ in range(5):  # a run takes some of what it has left, the baseline as many
        new = torch.from_numpy(rng.random((4, 30)) < 0.2) & ~taken
        drawn = draw_like(new, gone, bins, rng)
        assert not (drawn & gone).any()
        for n in range(3):
            assert torch.equal((drawn & (bins == n)).sum(1), (new & (bins == n)).sum(1))
        taken, gone = taken | new, gone | drawn


def test_a_draw_is_uniform_over_what_is_left():
    """Three of the twelve that are left: each comes with probability 1/4, so that of 2000 draws 500 have it, give or take 19."""
    taken, gone = torch.zeros(2, 1, 15, dtype=torch.bool)
    taken[0, :3], gone[0, 12:] = True, True
    rng = np.random.default_rng(0)
    counts = sum(draw_like(taken, gone, torch.zeros(1, 15, dtype=torch.long), rng).int() for _ in range(2000))[0]
    assert counts[12:].tolist() == [0, 0, 0]
    assert (counts[:12] - 500).abs().max() < 5 * 19.4


def test_bins_are_equally_large_and_in_the_order_of_activity():
    activity = torch.from_numpy(np.random.default_rng(0).permutation(200.0 * np.arange(3 * 200)).reshape(3, 200))
    bins = quantile_bins(activity)
    assert bins.unique().tolist() == list(range(10))
    for layer in range(3):
        assert torch.bincount(bins[layer]).tolist() == [20] * 10
        edges = [(activity[layer][bins[layer] == n].min(), activity[layer][bins[layer] == n].max()) for n in range(10)]
        assert all(high < low for (_, high), (low, _) in pairwise(edges))
    assert quantile_bins(torch.zeros(2, 35)).unique().tolist() == [0, 1, 2]  # at least ten to a bin
    assert quantile_bins(torch.zeros(2, 4)).unique().tolist() == [0]


# Runs


def test_at_every_step_as_many_neurons_as_the_run_of_every_layer_and_bin(selective, baseline):
    matched, before = found_again(baseline), baseline.neurons(0)
    assert not any("could not be compared" in note for note in check_folder(baseline.folder).notes)
    assert baseline.config["baseline"] in baseline.folder.name
    for step in range(1, STEPS + 1):
        mine, theirs = baseline.neurons(step), selective.neurons(step)
        for site in FRACTIONS:
            assert mine.per_layer(site) == theirs.per_layer(site)
            bins = matched.bins(site, tuple(mine.masks[site].flatten(1).shape))
            assert len(bins.unique()) == {"per_layer": 1, "activity": {"mlp": 7, "attn_pre_out": 3}[site]}[baseline.config["baseline"]]
            for n in bins.unique():
                here = bins == n
                assert torch.equal((mine.masks[site].flatten(1) & here).sum(1), (theirs.masks[site].flatten(1) & here).sum(1))
        assert len(before - mine) == 0
        before = mine
    assert before != selective.neurons(STEPS)


def test_nothing_is_collected_and_what_was_said_beforehand_went_through_the_model(model, config, selective, baseline):
    prepared = pruning.plan(model, baseline_config(config, baseline.config["baseline"], 0, STEPS, selective.folder))
    assert prepared.tokens() == sum(baseline.record(step)["tokens"] for step in range(STEPS + 1)) == (STEPS + 1) * 2 * config.eval_tokens
    assert not (baseline.folder / "statistics").exists()
    with pytest.raises(ValueError, match=r"role='retain': random neurons are drawn without statistics"):
        baseline.statistics("retain")
    assert check_folder(baseline.folder).problems == []


@pytest.mark.thorough
def test_a_seed_gives_the_same_bits_and_another_seed_other_neurons(model, config, selective, baseline, tmp_path):
    kind = baseline.config["baseline"]
    again, other = (
        sepcap.prune(model, baseline_config(config, kind, seed, STEPS, selective.folder), out=tmp_path / str(seed), tracker="none")
        for seed in (0, 1)
    )
    assert bits(again.folder) == bits(baseline.folder)
    assert other.neurons(1) != again.neurons(1)
    assert {site: other.neurons(1).per_layer(site) for site in FRACTIONS} == {site: again.neurons(1).per_layer(site) for site in FRACTIONS}


def test_stopped_it_goes_on_to_the_same_bits(model, config, selective, baseline, tmp_path, monkeypatch):
    asked, step = baseline_config(config, baseline.config["baseline"], 0, STEPS, selective.folder), pruning._step

    def stopped(prepared, run, number):
        if number == 3:
            raise KeyboardInterrupt
        step(prepared, run, number)

    with monkeypatch.context() as patch:
        patch.setattr(pruning, "_step", stopped)
        with pytest.raises(KeyboardInterrupt):
            sepcap.prune(model, asked, out=tmp_path / "run", tracker="none")
    assert Run.load(tmp_path / "run").steps_done == 2
    sepcap.prune(model, asked, out=tmp_path / "run", tracker="none")
    assert bits(tmp_path / "run") == bits(baseline.folder)


def test_a_step_of_a_baseline_can_stand_for_several_of_the_run(model, config, selective, tmp_path):
    few = sepcap.prune(model, baseline_config(config, "per_layer", 0, 2, selective.folder), out=tmp_path / "few", tracker="none")
    assert few.config["fractions"] == {"mlp": 0.4, "attn_pre_out": 0.2}
    for step in (1, 2):
        for site in FRACTIONS:
            assert few.neurons(step).per_layer(site) == selective.neurons(2 * step).per_layer(site)


@pytest.mark.thorough
def test_whole_heads_are_drawn_where_heads_went(model, config, tmp_path):
    heads = replace(config, fractions={"heads": 2, "mlp": 0.1})
    run = sepcap.prune(model, heads, out=tmp_path / "forward", tracker="none")
    for kind in KINDS:
        drawn = sepcap.prune(model, baseline_config(heads, kind, 3, STEPS, run.folder), out=tmp_path / kind, tracker="none")
        for step in range(1, STEPS + 1):
            masks = drawn.neurons(step).masks["attn_pre_out"]
            assert torch.equal(masks.all(-1), masks.any(-1))
            assert masks.all(-1).sum(1).tolist() == run.neurons(step).masks["attn_pre_out"].all(-1).sum(1).tolist()


@pytest.mark.thorough
@pytest.mark.parametrize("offset", ["mean", "peak"])
def test_an_offset_is_that_of_the_baselines_own_model(model, config, tmp_path, offset):
    """Random neurons need the retain task's statistics for their offset, and those alone."""
    asked = replace(config, offset=offset, steps=2)
    run = sepcap.prune(model, asked, out=tmp_path / "forward", tracker="none")
    drawn = sepcap.prune(model, baseline_config(asked, "per_layer", 0, 2, run.folder), out=tmp_path / "random", tracker="none")
    assert list(drawn.config["samples"]["collect"]) == ["retain"]
    assert sorted(path.stem for path in (drawn.folder / "statistics").iterdir()) == ["retain"]
    block, mask = model.blocks[0].mlp, drawn.neurons(1).masks["mlp"][0]
    constant = getattr(drawn.statistics("retain")["mlp"], offset)[0]
    expected = block.b_out + (constant * mask).float() @ block.W_out
    snapshot = WeightSnapshot(model, asked.sites)
    try:
        drawn.apply(model, 1)
        torch.testing.assert_close(block.b_out, expected)
    finally:
        snapshot.restore()


# What is refused


def test_a_baseline_with_other_numbers_than_its_run_is_found(model, config, selective, tmp_path):
    run = sepcap.prune(model, baseline_config(config, "per_layer", 0, STEPS, selective.folder), out=tmp_path / "random", tracker="none")
    gone, record = run.neurons(STEPS), run.record(STEPS)
    mask = gone.masks["mlp"]
    from_layer = int(mask.sum(1).argmax())
    new = mask & ~run.neurons(STEPS - 1).masks["mlp"]
    mask[from_layer, int(new[from_layer].nonzero()[0])] = False
    to = 1 - from_layer
    mask[to, int((~mask[to]).nonzero()[0])] = True
    tasks = record["tasks"]
    rows = {role: run.rows(role)[STEPS] for role in tasks}
    evaluations = {role: Evaluation(t["task"], rows[role], tuple(t["skip_tokens"]), {}) for role, t in tasks.items()}
    plain = {name: value for name, value in record.items() if name not in ("run", "files", "sha256")}
    run.write_step(STEPS, plain | {"pruned_per_layer": {site: gone.per_layer(site) for site in gone.masks}}, evaluations, gone)
    (found,) = problems(Run.load(run.folder))
    assert "has other numbers of mlp per layer than" in found
    assert "0004" in found


@pytest.mark.thorough
def test_another_run_under_the_same_name_is_another_baseline(model, config, tmp_path):
    folder = tmp_path / "forward"
    sepcap.prune(model, config, out=folder, tracker="none")
    asked = baseline_config(config, "per_layer", 0, STEPS, folder)
    first = sepcap.prune(model, asked, out=tmp_path / "random", tracker="none")
    shutil.rmtree(folder)
    sepcap.prune(model, replace(config, importance="std"), out=folder, tracker="none")
    with pytest.raises(FileExistsError, match="matched_neurons"):
        sepcap.prune(model, asked, out=tmp_path / "random", tracker="none")
    assert found_again(first) is None
    checked = check_folder(first.folder)
    assert not checked.problems
    assert any("could not be compared" in note and str(folder) in note for note in checked.notes)


def test_bad_baselines(model, config, selective, tmp_path):
    with pytest.raises(ValueError, match=r"baseline='per_layer' is a way of drawing random neurons, and importance='abs'"):
        config_of([], [], baseline="per_layer", matched="x")
    with pytest.raises(ValueError, match=r"baseline='activity' with matched=None"):
        config_of([], [], importance="random", baseline="activity")
    with pytest.raises(ValueError, match=r"baseline='uniform' with matched='x'"):
        config_of([], [], importance="random", matched="x")

    def refused(message, kind=ValueError, **changes):
        asked = replace(baseline_config(config, "per_layer", 0, STEPS, selective.folder), **changes)
        with pytest.raises(kind, match=message):
            sepcap.prune(model, asked, out=tmp_path / "never")

    refused(r"steps=3: the run in .* has 4 steps.*give one of \[1, 2, 4\]", steps=3)
    refused(r"fractions={'mlp': 0.1}: the run in .* prunes {'mlp': 0.2, 'attn_pre_out': 0.1} in 4 steps", fractions={"mlp": 0.1})
    refused(r"rotation='fold': the run in .* in the basis 'none'", rotation="fold")
    refused("holds no run", FileNotFoundError, matched=str(tmp_path))
    random = sepcap.prune(model, replace(config, importance="random"), out=tmp_path / "random")
    refused("that run prunes random neurons itself; give one that selects", matched=str(random.folder), baseline="activity")
