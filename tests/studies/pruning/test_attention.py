"""Pruning attention: in a rotated basis, with offsets, by a seed; every step against a loop by hand."""

import inspect

import pytest
from run_folders import Stop, bits, config_of, same_weights, weights
from tiny import fresh

import sepcap
from sepcap.interventions.rotation import rotate_values
from sepcap.models.weights import fingerprint
from sepcap.studies.pruning import prune as pruning

STEPS = 2
BOTH = {"mlp": 0.25, "attn_pre_out": 0.2}


@pytest.fixture
def opt(tiny_folders):
    return lambda: fresh(tiny_folders["opt"])


# every rotation, every offset, and both ways of collecting; the rest of the table is in the slow tier
EVERY_DAY = {("fold", "none", True), ("rotate", "mean", False), ("none", "mean", True), ("fold", "peak", False)}


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("rotation", "offset", "recollect"),
    [
        pytest.param(*how, recollect, marks=[] if (*how, recollect) in EVERY_DAY else [pytest.mark.slow])
        for how in (("fold", "none"), ("rotate", "mean"), ("none", "mean"), ("fold", "peak"))
        for recollect in (True, False)
    ],
)
def test_steps_are_those_of_a_loop_by_hand(opt, letters, digits, tmp_path, rotation, offset, recollect):
    config = config_of(letters, digits, fractions=BOTH, rotation=rotation, offset=offset, recollect=recollect)
    run = sepcap.prune(opt(), config, out=tmp_path / "run")
    model = opt()
    gone = sepcap.NeuronSet.empty(model, BOTH)
    if rotation != "none":
        rotate_values(model, rotation)
    for step in range(STEPS + 1):
        if step:
            if step == 1 or recollect:
                options = {"tokens": 150, "sites": tuple(BOTH), "batch_size": 4} | ({"histogram": True} if offset == "peak" else {})
                forget, retain = sepcap.collect(model, letters, **options), sepcap.collect(model, digits, **options)
            scores = sepcap.score(forget, retain)
            shares = BOTH if recollect else {site: share * step for site, share in BOTH.items()}
            new = scores.top(shares, exclude=gone if recollect else None) - gone
            gone = gone | new
            constants = None if offset == "none" else {site: getattr(retain[site], offset) for site in BOTH}
            sepcap.delete(model, new, constants)
        assert run.neurons(step) == gone
        for role, task in (("forget", letters), ("retain", digits)):
            loss = sepcap.evaluate(model, task, tokens=150, batch_size=4).value("loss")
            assert run.record(step)["tasks"][role]["metrics"]["loss"] == loss
        made = opt()
        run.apply(made, step)
        assert fingerprint(made) == fingerprint(model)
    losses = [run.record(step)["tasks"]["forget"]["metrics"]["loss"] for step in range(STEPS + 1)]
    assert len(set(losses)) == STEPS + 1


KINDS = [
    {"rotation": "fold", "offset": "mean"},
    {"rotation": "rotate", "offset": "mean", "recollect": False},
    {"offset": "mean", "importance": "random", "seed": 3},
    {"rotation": "fold", "fractions": {"heads": 0.25}, "aggregate": "median"},
    {"offset": "peak", "importance": "js", "fractions": {"attn_value": 0.25, "mlp": 0.2}},
]


@pytest.mark.thorough
@pytest.mark.parametrize("changes", KINDS, ids=lambda c: "-".join(map(str, c.values())))
def test_stopped_after_every_step_it_goes_on_to_the_same_bits(tiny_opt, letters, digits, tmp_path, monkeypatch, changes):
    prepared = pruning.plan(tiny_opt, config_of(letters, digits, **changes))
    before = weights(tiny_opt)
    whole = pruning.execute(prepared, tmp_path / "whole")
    assert same_weights(tiny_opt, before)
    step = pruning._step

    def stop_after(prepared, run, number):
        step(prepared, run, number)
        raise Stop

    out = tmp_path / "run"
    for _ in range(STEPS + 1):
        with monkeypatch.context() as patch:
            patch.setattr(pruning, "_step", stop_after)
            with pytest.raises(Stop):
                pruning.execute(prepared, out)
        assert same_weights(tiny_opt, before)
    assert pruning.execute(prepared, out).finished
    assert bits(out) == bits(whole.folder)


def test_killed_before_the_first_step_the_basis_is_kept(tiny_opt, letters, digits, tmp_path, monkeypatch):
    prepared = pruning.plan(tiny_opt, config_of(letters, digits, rotation="fold"))
    before = weights(tiny_opt)

    def stop(*args):
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(pruning, "_step", stop)
        with pytest.raises(Stop):
            pruning.execute(prepared, tmp_path / "run")
    assert same_weights(tiny_opt, before)
    left = bits(tmp_path / "run")["rotation.safetensors"]
    monkeypatch.setattr(pruning, "compute_rotation", stop)
    run = pruning.execute(prepared, tmp_path / "run")
    assert bits(run.folder)["rotation.safetensors"] == left
    assert run.rotation().bias == "fold"


@pytest.mark.parametrize("change", [{"offset": "mean"}, {"offset": "peak", "fractions": {"attn_value": 0.25}}])
def test_offset_without_output_bias_is_refused_before_anything_is_written(tiny_folders, letters, digits, tmp_path, change):
    model = fresh(tiny_folders["llama"])
    with pytest.raises(ValueError, match="offset: LlamaForCausalLM has no b_"):
        sepcap.prune(model, config_of(letters, digits, **change), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_settings_that_make_no_sense_are_refused(letters, digits):
    with pytest.raises(ValueError, match="rotation='fold' needs attention neurons, but fractions has none"):
        config_of(letters, digits, fractions={"mlp": 0.1}, rotation="fold")
    with pytest.raises(ValueError, match="seed=-1: give a whole number, 0 or more"):
        config_of(letters, digits, seed=-1)
    for name in ("rotation", "offset"):
        config = config_of(letters, digits)
        object.__setattr__(config, name, "folded")
        # types are checked while testing, and would refuse this first
        with pytest.raises(ValueError, match=f"{name}='folded' is not known"):
            inspect.unwrap(sepcap.PruningConfig.__post_init__)(config)


def test_apply_is_for_the_model_of_the_run(opt, letters, digits, tmp_path):
    model = opt()
    run = sepcap.prune(model, config_of(letters, digits, rotation="fold", offset="mean"), out=tmp_path / "run")
    run.apply(model, 1)
    pruned = fingerprint(model)
    with pytest.raises(ValueError, match=r"model has other weights .* than the one this run was made with"):
        run.apply(model, 2)
    assert fingerprint(model) == pruned
    again = opt()
    with pytest.raises(IndexError, match="step=3"):
        run.apply(again, 3)
    run.apply(again)
    assert fingerprint(again) != pruned
    (run.step_folder(1) / "biases.safetensors").unlink()
    untouched = opt()
    before = fingerprint(untouched)
    with pytest.raises(RuntimeError, match=r"biases.safetensors is missing"):
        run.apply(untouched, 1)
    assert fingerprint(untouched) == before


def test_the_seed_decides_what_is_collected_and_not_what_is_evaluated(opt, letters, digits, tmp_path):
    plans = [pruning.plan(opt(), config_of(letters, digits, seed=seed)) for seed in (0, 1, 1, 2)]
    collected = [plan.resolved["samples"]["collect"]["forget"] for plan in plans]
    assert collected[1] == collected[2]
    assert len(set(collected)) == 3
    assert len({plan.resolved["samples"]["evaluate"]["forget"] for plan in plans}) == 1
    # the recorded documents are those that the rows are parts of, in that order
    (documents,) = plans[1].resolved["documents"]["collect"]["forget"]
    assert set(documents) != set(plans[0].resolved["documents"]["collect"]["forget"][0])
    assert not set(documents) & set(plans[1].resolved["documents"]["evaluate"]["forget"][0])
    rows = [plans[1].model.tokenizer.decode(row[1:]) for row in plans[1].collect["forget"].rows]
    assert all(row in letters[i] for row, i in zip(rows, documents, strict=True))


@pytest.mark.parametrize(
    "changes", [{"rotation": "fold", "offset": "mean"}, {"offset": "mean", "importance": "random"}, {"offset": "peak"}]
)
def test_cost_stated_is_cost_paid(opt, letters, digits, tmp_path, changes):
    prepared = pruning.plan(opt(), config_of(letters, digits, **changes))
    run = pruning.execute(prepared, tmp_path / "run")
    assert run.trajectory.drop_duplicates("step")["tokens"].sum() == prepared.tokens()
    paid = sum(path.stat().st_size for path in run.folder.rglob("*") if path.is_file())
    assert prepared.disk() == pytest.approx(paid, rel=1 / 3)
