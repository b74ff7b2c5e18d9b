"""The main job: both directions and the random baselines, from one configuration."""

import shutil

import numpy as np
import pytest
import torch
from tiny import fresh

import sepcap
from sepcap.studies.check import check_folder
from sepcap.studies.pruning.generations import continuations
from sepcap.studies.pruning.separability import area

KINDS = ("uniform", "per_layer", "activity")
BASELINES = {"baselines": KINDS, "baseline_seeds": 2}


def config_of(letters, digits, share=0.5, steps=2):
    pair = {"forget": letters, "retain": digits}
    return sepcap.DirectionComparisonConfig(**pair, fractions={"mlp": share}, steps=steps, tokens=300, eval_tokens=1500)


@pytest.fixture(scope="module")
def finished(trained_folder, letters, digits, tmp_path_factory):
    """Twelve runs from one configuration, and what was said; whoever writes takes a copy of the folder."""
    model, said, out = fresh(trained_folder), [], tmp_path_factory.mktemp("directions") / "c"
    before = model.blocks[1].mlp.W_in.clone()
    comparison = sepcap.compare_directions(model, config_of(letters, digits), out=out, **BASELINES, progress=said.append)
    assert torch.equal(model.blocks[1].mlp.W_in, before)
    return comparison, said


@pytest.mark.thorough
def test_three_runs_from_one_configuration(finished):
    comparison, said = finished
    forward, reverse = comparison.forward, comparison.reverse
    # the same tokens with the roles exchanged, so the unpruned model scores the same
    assert forward.config["samples"]["collect"]["forget"] == reverse.config["samples"]["collect"]["retain"]
    assert forward.record(0)["tasks"]["forget"]["metrics"] == reverse.record(0)["tasks"]["retain"]["metrics"]
    assert len(comparison.runs) == 2 + 2 + 4 + 4
    assert {len(run.neurons(1)) for run in comparison.runs.values()} == {72}
    for kind in KINDS[1:]:
        for direction, selective in comparison.selective.items():
            runs = comparison.baselines[kind][direction]
            assert [run.config["seed"] for run in runs] == [0, 1]
            assert {run.config["baseline"] for run in runs} == {kind}
            assert all(run.neurons(1).per_layer("mlp") == selective.neurons(1).per_layer("mlp") for run in runs)
    assert comparison.baselines["uniform"]["forward"] == comparison.baselines["uniform"]["reverse"]
    # what was said beforehand is what went through the model: the unpruned model is evaluated once for all twelve runs
    total = sum(run.record(step)["tokens"] for run in comparison.runs.values() for step in range(3)) - 11 * 3000
    assert total == 2 * 2 * 600 + 3000 + 12 * 2 * 3000
    assert any(f"{total / 1e6:.3g} M tokens through the model" in line and "minutes" in line for line in said)
    assert list(comparison.table["run"]) == list(comparison.groups)
    again = sepcap.DirectionComparison.load(comparison.folder)
    assert {name: run.folder for name, run in again.runs.items()} == {name: run.folder for name, run in comparison.runs.items()}
    assert check_folder(comparison.folder).problems == []


@pytest.mark.thorough
def test_a_run_names_the_baseline_that_it_is_compared_with(trained, letters, digits, tmp_path):
    """The area above random is the difference of areas at equal steps, mean over seeds, over the same documents."""
    drawn = {"baselines": ("per_layer", "uniform"), "baseline_seeds": 2, "baseline_steps": 2}
    comparison = sepcap.compare_directions(trained, config_of(letters, digits, 0.25, steps=4), **drawn, out=tmp_path / "c")
    summary = " ".join(comparison.summary())
    for direction, run in comparison.selective.items():
        for kind in comparison.baselines:
            runs = comparison.baselines[kind][direction]
            s = run.separability("top1", baseline=kind)
            assert (s.baseline, s.seeds) == (kind, 2)
            same = run.separability("top1", baseline=runs)
            assert (s.above_random, s.above_random_interval, s.seeds_sd) == (same.above_random, same.above_random_interval, same.seeds_sd)
            # by hand: trapezoids at steps 0, 2 and 4 of the run, 0, 1 and 2 of the baselines
            f, r = (run.trajectory.query("role == @role").top1.to_numpy()[::2] for role in ("forget", "retain"))
            areas = []
            for other in runs:
                roles = ("forget", "retain") if other.config["forget"] == run.config["forget"] else ("retain", "forget")
                areas.append(area(*(other.trajectory.query("role == @role").top1.to_numpy() for role in roles)))
            assert s.above_random == pytest.approx(area(f, r) - np.mean(areas))
            assert s.seeds_sd == pytest.approx(np.std(areas, ddof=1))
            low, high = s.above_random_interval
            assert low <= s.above_random <= high
            assert s.area == run.separability("top1").area
            assert s.above_random_in_words() in summary
    with pytest.raises(ValueError, match=r"baseline='activity': .* holds no finished random run of that kind for forward"):
        comparison.forward.separability("top1", baseline="activity")
    with pytest.raises(ValueError, match=r"baseline='perlayer' is not known. Did you mean 'per_layer'"):
        comparison.forward.separability("top1", baseline="perlayer")
    with pytest.raises(ValueError, match=r"give random runs that differ only in their seed"):
        comparison.forward.separability("top1", baseline=comparison.reverse)


@pytest.mark.thorough
def test_a_run_minus_itself_is_nothing_on_every_draw_of_the_documents(trained, letters, digits, tmp_path):
    """Differences are paired: with all neurons pruned in one step, random neurons are the selected ones."""
    comparison = sepcap.compare_directions(trained, config_of(letters, digits, 1.0, steps=1), out=tmp_path / "c", baseline_seeds=2)
    s = comparison.forward.separability("top1", baseline="per_layer")
    assert (s.above_random, s.above_random_interval, s.seeds_sd) == (0, (0, 0), 0)


def test_bad_baselines_of_a_comparison(trained, letters, digits, tmp_path):
    config = config_of(letters, digits, 0.25, steps=4)
    for message, options in (
        ("baselines", {"baselines": ("global",)}),
        ("baseline_seeds=0: give at least 1", {"baseline_seeds": 0}),
        ("baseline_steps=3: give a divisor of the 4 steps", {"baseline_steps": 3}),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            sepcap.compare_directions(trained, config, out=tmp_path / "c", **options)
    assert not (tmp_path / "c").exists()


@pytest.mark.thorough
def test_a_comparison_goes_on_where_it_was(finished, trained, letters, digits, tmp_path, monkeypatch):
    first, _ = finished
    config, out = config_of(letters, digits), first.folder
    from sepcap.studies.pruning import prune as pruning

    monkeypatch.setattr(pruning, "_step", None)  # nothing is left to do
    again = sepcap.compare_directions(trained, config, out=out, **BASELINES)
    assert again.forward.trajectory.equals(first.forward.trajectory)
    # asked for with baselines of other steps, nothing is changed
    plan = (out / "config.json").read_bytes()
    with pytest.raises(FileExistsError, match="another configuration"):
        sepcap.compare_directions(trained, config, out=out, **BASELINES, baseline_steps=1)
    assert (out / "config.json").read_bytes() == plan
    # what lies beside the runs and is none is passed over: a study, and a run that is damaged
    copy = shutil.copytree(out, tmp_path / "c")
    run = sepcap.Run(copy / "forward")
    known = run.separability("top1", baseline="per_layer")
    assert known.above_random == again.forward.separability("top1", baseline="per_layer").above_random
    shutil.copytree(copy, copy / "study", ignore=shutil.ignore_patterns("study"))
    shutil.copytree(copy / "reverse", copy / "damaged")
    (copy / "damaged" / "config.json").write_text("{")
    beside = run.separability("top1", baseline="per_layer")
    assert (beside.above_random, beside.seeds) == (known.above_random, known.seeds)


def test_continuations_before_and_after_give_the_model_back(trained, letters, digits, tmp_path):
    config = sepcap.PruningConfig(forget=letters, retain=digits, fractions={"mlp": 1.0}, steps=1, tokens=300, eval_tokens=300)
    run = sepcap.prune(trained, config, out=tmp_path / "run")
    before = trained.blocks[0].mlp.W_out.clone()
    texts = continuations(trained, run, step=1)
    assert list(texts["kind"]) == [run.config["forget"], run.config["retain"]]
    for prompt, task in zip(texts["prompt"], (letters, digits), strict=True):
        assert prompt
        assert any(prompt in text for text in task)
    assert torch.equal(trained.blocks[0].mlp.W_out, before)
    sepcap.delete(trained, run.neurons(1))
    from sepcap.evaluation.generation import continuation

    assert list(texts["after"]) == [continuation(trained, p) for p in texts["prompt"]]
