"""Which random runs are baselines of a run: those that took as many neurons of it in the same way, each seed once."""

import dataclasses
import re
import shlex
import shutil
from dataclasses import replace

import pytest
import torch
from run_folders import config_of
from tiny import fresh

import sepcap
from sepcap.selection.neurons import NeuronSet
from sepcap.studies.pruning.random_neurons.above_random import baselines_beside, check_baselines, no_baseline, why_not
from sepcap.studies.pruning.random_neurons.baselines import Matched, baseline_config


@pytest.fixture(scope="module")
def model(tiny_folders):
    return fresh(tiny_folders["opt"])


@pytest.fixture(scope="module")
def runs(model, letters, digits, tmp_path_factory):
    """Both directions, with an offset and without, and random neurons of each; as many go of every layer in all of them."""
    folder = tmp_path_factory.mktemp("runs")
    plain = config_of(letters, digits, per_layer=True)
    configs = {
        "forward": plain,
        "reverse": replace(plain, forget=digits, retain=letters),
        "offset": replace(plain, offset="mean"),
        "std": replace(plain, importance="std"),
    }
    runs = {name: sepcap.prune(model, config, out=folder / name, tracker="none") for name, config in configs.items()}

    def drawn(name, kind, seed, steps=2, **changes):
        at = None if kind == "uniform" else runs[name].folder
        config = replace(baseline_config(configs[name], kind, seed, steps, at), **changes)
        return sepcap.prune(model, config, out=folder / f"random-{kind}-{name}-{seed}-{steps}", tracker="none")

    for name in configs:
        for kind in ("per_layer", "uniform"):
            runs[f"{kind} {name}"] = drawn(name, kind, 0)
    runs |= {"seed 1": drawn("forward", "per_layer", 1), "one step": drawn("forward", "per_layer", 2, steps=1)}
    return runs


@pytest.mark.parametrize(
    ("run", "baseline", "why"),
    [
        ("forward", "per_layer forward", ""),
        ("forward", "uniform forward", ""),
        ("forward", "uniform reverse", ""),  # without an offset uniform neurons have no direction
        ("forward", "one step", ""),
        ("offset", "per_layer offset", ""),
        ("offset", "uniform offset", ""),
        ("forward", "reverse", "selects by 'abs'"),
        ("forward", "per_layer reverse", "'per_layer' has a direction"),
        ("forward", "per_layer std", "is matched with another run"),
        ("forward", "uniform offset", "has offset='mean', and"),
        ("offset", "per_layer forward", "has offset='none', and"),
    ],
)
def test_a_baseline_belongs_to_a_run(runs, run, baseline, why):
    found = why_not(runs[run], runs[baseline])
    assert (found == "") == (why == "")
    assert why in found


def test_baselines_differ_in_their_seed_alone(runs):
    run, one, other = runs["forward"], runs["per_layer forward"], runs["seed 1"]
    check_baselines(run, [one, other])
    for given, message in (
        ([], "baseline is empty; give at least one"),
        ([one, one], r"2 runs with the seeds \[0, 0\]; each counts once"),
        ([one, runs["uniform forward"]], r"2 runs with the kinds \['per_layer', 'uniform'\]"),
        ([one, runs["one step"]], r"2 runs with the numbers of steps \[2, 1\]"),
        ([one, runs["per_layer reverse"]], r"the run in .*random-per_layer-reverse-0-2 forgets"),
    ):
        with pytest.raises(ValueError, match=message):
            check_baselines(run, given)


def test_by_name_only_those_of_the_run_are_found(runs):
    assert {run.folder.name for run in baselines_beside(runs["offset"], "per_layer")} == {"random-per_layer-offset-0-2"}
    assert {run.folder.name for run in baselines_beside(runs["reverse"], "per_layer")} == {"random-per_layer-reverse-0-2"}


def test_a_matched_baseline_has_the_offset_of_its_run(model, runs, letters, digits, tmp_path):
    config = baseline_config(config_of(letters, digits, per_layer=True), "per_layer", 0, 2, runs["offset"].folder)
    with pytest.raises(ValueError, match=r"offset='none': the run in .* has 'mean', which by itself changes accuracies"):
        sepcap.prune(model, config, out=tmp_path / "never")


def test_directions_and_kinds_draw_neurons_of_their_own(runs, monkeypatch):
    """With the same numbers per layer, and one bin: what is drawn depends on the two tasks and the kind, and not on the importance."""
    monkeypatch.setattr(Matched, "bins", lambda self, site, shape: torch.zeros(shape, dtype=torch.long))
    empty = NeuronSet({site: torch.zeros_like(mask) for site, mask in runs["forward"].neurons(1).masks.items()})

    def drawn(name, by_activity=False):
        return Matched(runs[name], 1, by_activity, heads=False).draw(1, empty, 0)

    assert drawn("forward") != drawn("reverse")
    assert drawn("forward") != drawn("forward", by_activity=True)
    assert drawn("forward") == drawn("forward") == drawn("std")


def test_uniform_neurons_with_an_offset_are_drawn_in_both_directions(model, letters, digits, tmp_path):
    """The offset is the retain task's: the random runs of one direction are no baselines of the other."""
    fields = vars(config_of(letters, digits, offset="mean", steps=1, eval_tokens=300))
    fields = {name: value for name, value in fields.items() if name not in ("model", "baseline", "matched")}
    comparison = sepcap.compare_directions(model, **fields, out=tmp_path / "c", baselines=("uniform",), baseline_seeds=1)
    for direction, run in comparison.selective.items():
        check_baselines(run, comparison.baselines["uniform"][direction])
    assert [name for name in comparison.groups if name.startswith("random")] == [
        f"random, {r.config['forget']}" for r in comparison.selective.values()
    ]


@pytest.mark.thorough
def test_a_run_alone_says_what_puts_random_neurons_beside_it(trained_folder, trained, task_files, tmp_path, capsys):
    """The options that it prints, and the call in Python, are carried out as they stand."""
    from sepcap.cli.main import main

    words = ["prune", "--model", str(trained_folder), "--forget", task_files["forget"], "--retain", task_files["retain"], "--steps", "2"]
    words += ["--fractions", "mlp=0.4", "--tokens", "300", "--eval-tokens", "900"]
    main([*words, "--out", str(tmp_path / "runs" / "one")])
    run = sepcap.Run.load(tmp_path / "runs" / "one")
    said = no_baseline(run)
    assert "This run has no random baseline" in said
    assert said in capsys.readouterr().out
    assert "This run has no random baseline" in run.report(tmp_path / "page.html").read_text()
    main([*words, *shlex.split(re.search(r"The same command with `(.*?)`", said)[1])])
    found = run.separability("top1", baseline="per_layer")
    assert (found.seeds, found.baseline) == (1, "per_layer")
    assert no_baseline(run) == ""
    shutil.rmtree(tmp_path / "runs" / "one-random-0")
    config = sepcap.PruningConfig(
        forget=str(task_files["forget"]), retain=str(task_files["retain"]), steps=2, fractions={"mlp": 0.4}, tokens=300, eval_tokens=900
    )
    call = re.search(r"in Python, (.*)\. Then", said)[1]
    eval(call, {"sepcap": sepcap, "dataclasses": dataclasses, "model": trained, "config": config})
    assert run.separability("top1", baseline="per_layer").above_random == found.above_random
