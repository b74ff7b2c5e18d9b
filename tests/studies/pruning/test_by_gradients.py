"""Pruning by importances from gradients: each step is that of a loop by hand, runs resume to the same bits, heads are whole."""

import pytest
import torch
from run_folders import Stop, bits, config_of, same_weights, stop_by, weights

import sepcap
from sepcap.selection.names import gradients_for
from sepcap.studies.pruning import prune as pruning


@pytest.mark.parametrize(
    ("importance", "contrast"),
    [
        ("taylor", {}),
        ("relp", {}),
        pytest.param("snip", {}, marks=pytest.mark.slow),
        ("wanda", {}),
        ("abs", {"contrast": "difference", "lam": 2.0}),
        ("taylor", {"contrast": "guarded", "q": 0.3}),
        ("atp", {"lam": 0.0}),
    ],
)
def test_steps_are_those_of_a_loop_by_hand(tiny_opt, letters, digits, tmp_path, importance, contrast):
    """Statistics are collected anew from the pruned model at every step."""
    config = config_of(letters, digits, importance=importance, **contrast)
    before = weights(tiny_opt)
    run = sepcap.prune(tiny_opt, config, out=tmp_path / "run")
    assert same_weights(tiny_opt, before)
    gone = sepcap.NeuronSet.empty(tiny_opt, config.sites)
    how = {"tokens": 150, "sites": config.sites, "batch_size": 4, "gradients": gradients_for(importance)}
    for step in (1, 2):
        scores = sepcap.score(sepcap.collect(tiny_opt, letters, **how), sepcap.collect(tiny_opt, digits, **how), importance, **contrast)
        new = scores.top(config.fractions, exclude=gone)
        gone = gone | new
        sepcap.delete(tiny_opt, new)
        assert run.neurons(step) == gone, step
        if step == 1:
            assert all(torch.equal(run.scores()[site], scores[site]) for site in scores)
    assert {name: run.config[name] for name in ("contrast", "lam", "q") if name in run.config} == contrast
    if contrast:
        with pytest.raises(FileExistsError, match=next(iter(contrast))):
            sepcap.prune(tiny_opt, config_of(letters, digits, importance=importance), out=tmp_path / "run")


def test_a_stopped_run_by_taylor_goes_on_to_the_same_bits(tiny_opt, letters, digits, tmp_path, monkeypatch):
    prepared = pruning.plan(tiny_opt, config_of(letters, digits, importance="taylor"))
    pruning.execute(prepared, tmp_path / "whole")
    before = weights(tiny_opt)
    with monkeypatch.context() as patch:
        calls = iter(range(100))
        collect = pruning.collect_sample
        stop = stop_by(Stop)
        patch.setattr(pruning, "collect_sample", lambda *args, **kwargs: stop() if next(calls) == 1 else collect(*args, **kwargs))
        with pytest.raises(Stop):
            # a plan of its own: the first one has the statistics of the unpruned model in memory
            pruning.execute(pruning.plan(tiny_opt, prepared.config), tmp_path / "stopped")
    assert same_weights(tiny_opt, before)
    pruning.execute(pruning.plan(tiny_opt, prepared.config), tmp_path / "stopped")
    assert bits(tmp_path / "stopped") == bits(tmp_path / "whole")


def test_heads_are_pruned_whole_by_gradients(tiny_opt, letters, digits, tmp_path):
    config = config_of(letters, digits, importance="atp", fractions={"heads": 0.25}, steps=1)
    gone = sepcap.prune(tiny_opt, config, out=tmp_path / "run").neurons(1).masks["attn_pre_out"]
    assert gone.all(-1).sum() == gone.any(-1).sum() == 2


def test_a_run_by_random_neurons_collects_no_gradients(letters, digits):
    assert config_of(letters, digits, importance="random").gradients == ()
    assert config_of(letters, digits, importance="ig_abs").gradients == ("ig",)


def test_a_contrast_that_an_importance_has_anyway_makes_no_other_run(letters, digits):
    """Runs of versions without contrasts have none of the fields, and go on."""
    for importance, contrast in (("abs", "ratio"), ("atp", "difference"), ("random", "guarded")):
        assert config_of(letters, digits, importance=importance, contrast=contrast).contrasted == {}
    assert config_of(letters, digits, contrast="guarded").contrasted == {"contrast": "guarded"}


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"importance": "atp", "contrast": "ratio"}, "atp_abs"),
        ({"importance": "mean_shift", "contrast": "ratio"}, "leave it out"),
        ({"lam": 2.0}, "lam=2.0 belongs to contrast='difference', and the contrast is 'ratio'"),
        ({"contrast": "difference", "q": 0.1}, "q=0.1 belongs to contrast='guarded'"),
        ({"contrast": "difference", "lam": -1.0}, "lam=-1.0"),
        ({"contrast": "guarded", "q": 1.5}, "q=1.5"),
    ],
)
def test_contrasts_that_have_no_meaning_are_refused(letters, digits, fields, said):
    with pytest.raises(ValueError, match=said):
        config_of(letters, digits, **fields)
