"""Pruning runs: every step against the same step made by hand with the public functions."""

import json

import datasets
import numpy as np
import pytest
import torch
from tiny import fresh

import sepcap
from sepcap.evaluation.result import METRICS
from sepcap.models.blocks import unembedding
from sepcap.statistics import collect as collect_module
from sepcap.studies.pruning import prune as pruning

BOTH = {"mlp": 0.25, "attn_pre_out": 0.2}


def config_of(forget, retain, **changes) -> sepcap.PruningConfig:
    options = {"fractions": BOTH, "steps": 2, "tokens": 200, "eval_tokens": 200, "batch_size": 4}
    return sepcap.PruningConfig(forget=forget, retain=retain, **{**options, **changes})


@pytest.fixture
def opt(tiny_folders):
    return lambda: fresh(tiny_folders["opt"])


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("importance", "per_layer"), [("abs", True), ("std", False), pytest.param("mean_shift", False, marks=pytest.mark.slow)]
)
def test_steps_are_those_of_a_loop_by_hand(opt, letters, digits, tmp_path, importance, per_layer):
    run = sepcap.prune(opt(), config_of(letters, digits, importance=importance, per_layer=per_layer), out=tmp_path / "run")
    table = run.trajectory.set_index(["step", "role"])
    model, gone = opt(), None
    for step in range(3):
        if step:
            options = {"tokens": 200, "sites": tuple(BOTH), "batch_size": 4}
            scores = sepcap.score(sepcap.collect(model, letters, **options), sepcap.collect(model, digits, **options), importance)
            chosen = scores.top(BOTH, per_layer=per_layer, exclude=gone)
            gone = chosen if gone is None else gone | chosen
            sepcap.delete(model, gone)
            assert run.neurons(step) == gone
            for site in BOTH:
                lowest = float(scores[site][chosen.masks[site]].min())
                assert table.loc[(step, "forget"), f"threshold_{site}"] == lowest
                assert table.loc[(step, "retain"), f"pruned_{site}"] == gone.count(site)
        for role, task in (("forget", letters), ("retain", digits)):
            expected = sepcap.evaluate(model, task, tokens=200, batch_size=4)
            for metric in METRICS:
                np.testing.assert_equal(table.loc[(step, role), metric], expected.value(metric))
                np.testing.assert_equal(table.loc[(step, role), f"{metric}_se"], expected.se(metric))
            assert table.loc[(step, role), "n"] == 200
            assert run.record(step)["tasks"][role]["skip_tokens"] == list(expected.skip_tokens)
            np.testing.assert_array_equal(run.rows(role)[step], expected.per_row)
    counts = [n * s for s in range(3) for n in (144 * 0.25,)]
    assert table.xs("forget", level="role")["pruned_mlp"].tolist() == counts  # in total, not per step


@pytest.mark.parametrize("per_layer", [False, True])
def test_without_collecting_again_the_sets_are_nested_shares_of_one_ranking(opt, letters, digits, tmp_path, per_layer):
    # 0.1 · 3 is a hair above 0.3 and 0.1 · 144 is 14.4: the share of step 3 is ⌊43.2⌋, not 3 · ⌊14.4⌋
    config = config_of(letters, digits, fractions={"mlp": 0.1, "heads": 0.25}, steps=3, recollect=False, per_layer=per_layer)
    run = sepcap.prune(opt(), config, out=tmp_path / "run")
    scores = run.scores()
    for step in (1, 2, 3):
        shares = {"mlp": 0.1 * step, "heads": 0.25 * step}
        assert run.neurons(step) == scores.top(shares, per_layer=per_layer)
        assert len(run.neurons(step - 1) - run.neurons(step)) == 0
        mlp = scores["mlp"]
        ranked = mlp.sort(dim=1, descending=True).values if per_layer else mlp.flatten()[None].sort(descending=True).values
        n = ranked.shape[1] * step // 10
        assert run.neurons(step).count("mlp") == n * len(ranked)
        assert run.record(step)["thresholds"]["mlp"] == float(ranked[:, n - 1].min())


def test_statistics_of_step_0_are_those_of_the_unpruned_model(opt, letters, digits, tmp_path):
    run = sepcap.prune(opt(), config_of(letters, digits), out=tmp_path / "run")
    for role, task in (("forget", letters), ("retain", digits)):
        expected = sepcap.collect(opt(), task, tokens=200, sites=tuple(BOTH), batch_size=4)
        for site in BOTH:
            assert torch.equal(run.statistics(role)[site].abs, expected[site].abs)
            assert torch.equal(run.statistics(role)[site].std, expected[site].std)


@pytest.mark.parametrize("aggregate", ["mean", "median"])
def test_heads_go_whole_and_in_the_order_of_their_scores(opt, letters, digits, tmp_path, aggregate):
    run = sepcap.prune(opt(), config_of(letters, digits, fractions={"heads": 0.25}, steps=1, aggregate=aggregate), out=tmp_path / "run")
    values = run.scores()["attn_pre_out"].numpy()
    heads = np.mean(values, axis=-1) if aggregate == "mean" else np.median(values, axis=-1)
    best = {tuple(map(int, np.unravel_index(i, heads.shape))) for i in np.argsort(-heads, axis=None)[:2]}
    mask = run.neurons(1).masks["attn_pre_out"]
    assert {(layer, head) for layer, head in mask.any(-1).nonzero().tolist()} == best
    assert torch.equal(mask.all(-1), mask.any(-1))
    assert run.record(1)["thresholds"]["heads"] == pytest.approx(min(heads[h] for h in best), rel=1e-12)


@pytest.mark.thorough
@pytest.mark.parametrize("per_layer", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_random_neurons_are_never_drawn_twice_and_come_from_the_seed(opt, letters, digits, tmp_path, per_layer):
    def run(name, seed):
        fractions = {"mlp": 0.25, "heads": 0.25}
        config = config_of(letters, digits, fractions=fractions, steps=4, importance="random", seed=seed, per_layer=per_layer)
        return sepcap.prune(opt(), config, out=tmp_path / name)

    first, again, other = run("first", 0), run("again", 0), run("other", 1)
    for step in range(1, 5):
        new = first.neurons(step) - first.neurons(step - 1)
        # a quarter at each of four steps: drawing a neuron again would leave one over at the end
        assert (new.count("mlp"), new.count("attn_pre_out")) == (36, 16)
        heads = new.masks["attn_pre_out"]
        assert torch.equal(heads.any(-1), heads.all(-1))
        if per_layer:
            assert first.neurons(step).per_layer("mlp") == [18 * step] * 2
            assert first.neurons(step).per_layer("attn_pre_out") == [8 * step] * 2
        assert first.neurons(step) == again.neurons(step)
    assert len(~first.neurons(4)) == 0
    assert first.neurons(1) != other.neurons(1)
    steps = [first.neurons(s) - first.neurons(s - 1) for s in (1, 2)]
    assert steps[0].masks["mlp"].tolist() != steps[1].masks["mlp"].tolist()


def test_everything_can_go(opt, letters, digits, tmp_path):
    run = sepcap.prune(opt(), config_of(letters, digits, fractions={"mlp": 1.0, "attn_value": 1.0}, steps=1), out=tmp_path / "run")
    assert len(~run.neurons(1)) == 0
    assert run.trajectory["loss"].notna().all()


def state_of(model) -> dict[str, torch.Tensor]:
    state = {name: p.detach().clone() for name, p in model.original_model.named_parameters()}
    for layer, block in enumerate(model.blocks):
        for part, names in ((block.mlp, ("W_in", "b_in", "W_gate", "W_out")), (block.attn, ("W_Q", "W_K", "W_V", "b_V", "W_O"))):
            state |= {f"{layer}.{name}": value.detach().clone() for name in names if (value := getattr(part, name, None)) is not None}
    return state


@pytest.mark.parametrize("failing", [None, pytest.param(ValueError, marks=pytest.mark.slow), KeyboardInterrupt])
def test_the_model_comes_back_bit_for_bit(tiny, letters, digits, tmp_path, monkeypatch, failing):
    def hooks():  # the bridge of an OPT comes with some of its own
        return {name: len(point.fwd_hooks) for name, point in tiny.hook_dict.items()}

    ids = torch.arange(3, 23)[None]
    hooked = hooks()
    before, logits, attention = state_of(tiny), tiny(ids).clone(), tiny.original_model.config._attn_implementation
    calls = []

    def evaluate(*args, **kwargs):
        calls.append(1)
        if failing and len(calls) == 5:  # in step 2, with neurons of two steps gone
            raise failing("full")
        return original(*args, **kwargs)

    original = pruning.evaluate_sample
    monkeypatch.setattr(pruning, "evaluate_sample", evaluate)
    fractions = {"mlp": 0.25, "attn_pre_out": 0.25, "attn_value": 0.25}
    config = config_of(letters, digits, fractions=fractions)
    if failing:
        with pytest.raises(failing):
            sepcap.prune(tiny, config, out=tmp_path / "run")
    else:
        sepcap.prune(tiny, config, out=tmp_path / "run")
        assert sepcap.Run.load(tmp_path / "run").trajectory.groupby("step")["loss"].mean().nunique() == 3
    after = state_of(tiny)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert torch.equal(tiny(ids), logits)
    assert tiny.original_model.config._attn_implementation == attention
    assert hooks() == hooked


def test_model_may_be_a_folder(tiny_folders, opt, letters, digits, tmp_path):
    folder = str(tiny_folders["opt"])
    by_config = sepcap.prune(config=config_of(letters, digits, model=folder, steps=1), out=tmp_path / "a")
    by_argument = sepcap.prune(folder, config_of(letters, digits, steps=1), out=tmp_path / "b")
    by_object = sepcap.prune(opt(), config_of(letters, digits, steps=1), out=tmp_path / "c")
    assert by_config.neurons(1) == by_argument.neurons(1) == by_object.neurons(1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fractions": {"mlp": 0.001}}, r"fractions\['mlp'\]=0.001 selects no neuron"),
        ({"fractions": {"mlp": 0.01}, "per_layer": True}, r"selects no neuron: 0.01 of 72 of a layer"),
        ({"fractions": {"heads": 0.1}}, r"fractions\['heads'\]=0.1 selects no neuron: 0.1 of 8 "),
        ({"fractions": {"attn_value": 0.01}}, r"fractions\['attn_value'\]=0.01 selects no neuron"),
        ({"context": 64}, "sees at most 32 tokens"),
    ],
)
def test_refused_before_anything_is_written(opt, letters, digits, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        sepcap.prune(opt(), config_of(letters, digits, **changes), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_fractions_beyond_what_there_is_are_refused(letters, digits):
    with pytest.raises(ValueError, match=r"fractions\['mlp'\]=0.4 in 3 steps prunes 120%"):
        config_of(letters, digits, fractions={"mlp": 0.4}, steps=3)


def test_forgetting_and_retaining_the_same_data_is_refused(opt, letters, tmp_path):
    same = datasets.Dataset.from_dict({"text": letters[::-1]})
    for retain in (letters, list(letters), same):
        with pytest.raises(ValueError, match="forget and retain are the same data"):
            sepcap.prune(opt(), config_of(letters, retain), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("changes", [{"steps": 3}, {"steps": 3, "recollect": False}, {"steps": 3, "importance": "random"}])
def test_cost_stated_is_cost_paid(opt, letters, digits, tmp_path, monkeypatch, changes):
    config = config_of(letters, digits, tokens=300, eval_tokens=170, **changes)
    prepared = pruning.plan(opt(), config)
    seen = []

    def counting(function, ids_at):
        def wrapped(*args, **kwargs):
            seen.append(int((args[ids_at] != 0).sum()))  # BOS and padding are token 0 here
            return function(*args, **kwargs)

        return wrapped

    monkeypatch.setattr(unembedding, "logits_of", counting(unembedding.logits_of, 1))
    monkeypatch.setattr(collect_module, "run_hooks", counting(collect_module.run_hooks, 1))
    run = pruning.execute(prepared, tmp_path / "run")
    # once per step with recollect (the statistics of step 0 serve step 1), else once, for random neurons never; four evaluations of both
    collections = 0 if config.importance == "random" else 3 if config.recollect else 1
    expected = 2 * 300 * collections + 2 * 170 * 4
    assert prepared.tokens() == expected == sum(seen)
    assert run.trajectory.drop_duplicates("step")["tokens"].sum() == expected
    assert f"{expected / 1e6:.3g} M tokens" in prepared.cost()
    assert "144 mlp neurons, 64 attn_pre_out neurons" in prepared.cost()
    paid = sum(p.stat().st_size for p in run.folder.rglob("*") if p.is_file())
    assert prepared.disk() == pytest.approx(paid, rel=1 / 3)


def test_fewer_tokens_than_asked_for_are_recorded(opt, letters, digits, tmp_path):
    with pytest.warns(UserWarning, match="fewer tokens to evaluate than the 1,000,000 asked for"):
        run = sepcap.prune(opt(), config_of(letters[:6], digits[:6], steps=1, eval_tokens=1_000_000), out=tmp_path / "run")
    found = run.config["tokens_found"]["evaluate"]
    assert run.config["eval_tokens"] == 1_000_000
    assert 100 < found["forget"] < 5000
    assert run.trajectory.query("role == 'forget'")["n"].tolist() == [found["forget"]] * 2


def test_two_files_of_one_name_can_be_told_apart(tiny_opt, letters, digits, tmp_path):
    paths = []
    for folder, texts in (("a", letters), ("b", digits)):
        (tmp_path / folder).mkdir()
        paths.append(tmp_path / folder / "data.jsonl")
        paths[-1].write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    config = sepcap.PruningConfig(forget=str(paths[0]), retain=str(paths[1]), fractions={"mlp": 0.5}, steps=1, tokens=200, eval_tokens=200)
    run = sepcap.prune(tiny_opt, config, out=tmp_path / "run")
    names = run.config["forget"], run.config["retain"]
    assert names[0] != names[1]
    assert all(name.startswith("data-") for name in names)


def test_random_without_recollection_takes_as_many_as_a_selective_run(tiny_opt, letters, digits, tmp_path):
    """⌊fraction·step·N⌋ in total, like for like: 0.15 of 144 is 21.6 a step."""
    gone = {}
    for importance in ("abs", "random"):
        config = sepcap.PruningConfig(
            forget=letters,
            retain=digits,
            fractions={"mlp": 0.15},
            steps=3,
            importance=importance,
            recollect=False,
            tokens=200,
            eval_tokens=200,
        )
        run = sepcap.prune(tiny_opt, config, out=tmp_path / importance)
        gone[importance] = [len(run.neurons(step)) for step in range(4)]
        assert not run.neurons(1) - run.neurons(2)
    assert gone["random"] == gone["abs"] == [0, 21, 43, 64]
