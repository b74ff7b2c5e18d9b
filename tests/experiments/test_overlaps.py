"""Overlaps of many sets: every number against sets of Python integers and scipy, on scores that are known."""

import html
import itertools
import math

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

import sepcap
from sepcap.experiments import several_tasks
from sepcap.experiments.overlaps import HEADS_AT, Overlaps, selected, told_p
from sepcap.experiments.result import load_result
from sepcap.models.untrained import untrained
from sepcap.models.weights import fingerprint
from sepcap.selection.score import Scores
from sepcap.tasks.task import load_task

SITES = ("mlp", "attn_pre_out", "attn_value", "heads")
FRACTIONS = (0.125, 0.25, 0.5)


def config_of(letters, digits, **changes):
    tasks = (load_task(letters[:20], name="one"), load_task(letters[20:], name="two"), load_task(digits[:20], name="three"))
    options = {"retain": load_task(digits[20:], name="base"), "sites": SITES, "fractions": FRACTIONS, "tokens": 300} | changes
    return sepcap.OverlapConfig(tasks=options.pop("tasks", tasks), **options)


@pytest.fixture(scope="module")
def found(trained_folder, letters, digits):
    torch.set_num_threads(1)
    return sepcap.overlaps(sepcap.load_model(trained_folder, device="cpu"), config_of(letters, digits, control_seeds=(0, 5)))


def members(result, model, task, site, fraction):
    """A set as Python integers per layer, taken from the highest scores by numpy's own sorting."""
    key = HEADS_AT if site == "heads" else site
    values = result.tensors[f"{model} | {task} | {key}"].double()
    values = (values.mean(-1) if site == "heads" else values.flatten(1)).numpy()
    n = int(fraction * values.size)
    # of equal scores the first goes: sort by score, then by place
    order = np.lexsort((np.arange(values.size), -values.ravel()))[:n]
    return [{int(i) for i in order if i // values.shape[1] == layer} for layer in range(len(values))], values.size


def test_every_row_is_counted_with_sets_of_integers_and_tested_by_scipy(found):
    keys = ["model", "site", "fraction", "first", "second"]
    assert len(found.table) == 3 * 4 * 3 * 3 * 3  # models, sites, fractions, pairs, two layers and the total
    assert found.models == ["trained", "random weights, seed 0", "random weights, seed 5"]
    for (model, site, fraction, first, second), rows in found.table.groupby(keys):
        (a, n), (b, _) = (members(found, model, task, site, fraction) for task in (first, second))
        for row in rows.to_dict("records"):
            layers = range(2) if pd.isna(row["layer"]) else [row["layer"]]
            one, other = (set().union(*(side[layer] for layer in layers)) for side in (a, b))
            of = n if pd.isna(row["layer"]) else n // 2
            both, size, size_too = len(one & other), len(one), len(other)
            assert (row["a"], row["b"], row["both"], row["neurons"]) == (size, size_too, both, of)
            if not size or not size_too:
                assert math.isnan(row["log10_p"])
                continue
            assert row["share"] == pytest.approx(both / size)
            assert row["share_of_second"] == pytest.approx(both / size_too)
            assert row["iou"] == pytest.approx(both / len(one | other))
            assert row["ratio"] == pytest.approx(both / of / (size / of * size_too / of))
            assert row["log10_p"] == pytest.approx(stats.hypergeom.logsf(both - 1, of, size, size_too) / math.log(10), abs=1e-9)
            if pd.isna(row["layer"]):
                chance = sum(len(x) * len(y) / (n / 2) for x, y in zip(a, b, strict=True))
                # sets in different layers cannot meet by this chance
                assert row["ratio_in_layers"] == pytest.approx(both / chance if chance else math.nan, nan_ok=True)


def test_p_values_are_corrected_for_all_tests_of_a_model(found):
    for _, rows in found.table.groupby("model"):
        tested = rows["log10_p"].dropna()
        assert len(tested) <= len(rows)
        expected = np.minimum(1, len(tested) * 10 ** tested.to_numpy())
        np.testing.assert_allclose(10 ** rows["log10_p_corrected"].dropna(), expected, rtol=1e-9)


def test_sets_grow_with_the_fraction_and_come_from_one_set_of_scores(found):
    for task, site in itertools.product(("one", "two", "three"), ("mlp", "attn_value")):
        small, large = (found.neurons(task, {site: fraction}) for fraction in (0.125, 0.5))
        assert not (small - large)
        assert len(large) == large.masks[site].numel() // 2


def test_heads_are_counted_as_heads():
    values = torch.zeros(2, 4, 3)
    values[0, 1], values[1, 2], values[1, 3, 0] = 2.0, 1.0, 9.0  # one high neuron makes a mean of 3
    assert selected(Scores({HEADS_AT: values}), "heads", 0.25).tolist() == [[False, True, False, False], [False, False, False, True]]


def test_against_the_others_is_against_their_tokens_together(trained, letters, digits):
    config = config_of(letters, digits, retain="others", control_seeds=(), sites=("mlp",))
    result = sepcap.overlaps(trained, config)
    assert result.config["retain"] == "others"
    assert result.models == ["trained"]
    one, two, three = (sepcap.collect(trained, task, tokens=300, sites="mlp")["mlp"] for task in config.tasks)
    mean = (two.abs * two.count + three.abs * three.count) / (two.count + three.count)
    torch.testing.assert_close(result.tensors["trained | one | mlp"], one.abs / (mean + 1e-3))


def test_the_same_call_goes_on_and_ends_with_the_same_bits(trained, letters, digits, tmp_path, monkeypatch):
    config = config_of(letters, digits, sites=("mlp",))
    calls, real = [], several_tasks.collect_sample

    def stopped(*args, **options):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return real(*args, **options)

    monkeypatch.setattr(several_tasks, "collect_sample", stopped)
    with pytest.raises(KeyboardInterrupt):
        sepcap.overlaps(trained, config, out=tmp_path / "study")
    whole = sepcap.overlaps(trained, config, out=tmp_path / "study")
    assert len(calls) == 6 + 8 - 5  # four tasks in two models, five done before
    straight = sepcap.overlaps(trained, config)
    pd.testing.assert_frame_equal(whole.table, straight.table)
    assert all(torch.equal(whole.tensors[key], value) for key, value in straight.tensors.items())
    calls.clear()
    back = sepcap.overlaps(trained, config, out=tmp_path / "study")
    assert not calls
    assert isinstance(load_result(tmp_path / "study"), Overlaps)
    pd.testing.assert_frame_equal(back.table, straight.table)
    with pytest.raises(FileExistsError, match=r"fractions: \[0.125, 0.25, 0.5\] there, \[0.25\] asked for"):
        sepcap.overlaps(trained, config_of(letters, digits, sites=("mlp",), fractions=(0.25,)), out=tmp_path / "study")


def test_the_model_is_not_changed_and_the_summary_says_what_was_found(trained, letters, digits):
    before = fingerprint(trained)
    result = sepcap.overlaps(trained, config_of(letters, digits, sites=("mlp",), control_seeds=(0, 1)))
    assert fingerprint(trained) == before
    said = "\n".join(result.summary())
    totals = result.totals().query("model == 'trained' and fraction == 0.125")
    highest = totals.loc[totals["ratio"].idxmax()]
    pairs = result.totals().query("model != 'trained' and fraction == 0.125").set_index(["first", "second"])
    control = pairs.loc[(highest["first"], highest["second"])]["ratio"]
    assert f"{highest['both']} of {highest['a']}" in said
    assert f"randomly initialised {control.min():.2f} to {control.max():.2f} times (2 seeds)" in said
    assert all(f"<li>{html.escape(sentence)}</li>" in result._repr_html_() for sentence in result.summary())
    two = config_of(letters, digits).tasks[::2]
    assert not any("most in common" in sentence for sentence in sepcap.overlaps(trained, config_of(letters, digits, tasks=two)).summary())
    # one control is one number, no span; and a p of 1 is not a power of ten
    alone = "\n".join(sepcap.overlaps(trained, config_of(letters, digits, sites=("mlp",), control_seeds=(0,))).summary())
    one = result.totals().query("model == 'random weights, seed 0' and fraction == 0.125").set_index(["first", "second"])
    assert f"randomly initialised {one.loc[(highest['first'], highest['second'])]['ratio']:.2f} times (1 seed)" in alone
    assert "10^−0.0" not in alone
    assert "10^0" not in alone


def test_p_values_are_written_as_people_write_them():
    told = {0.0: "= 1", math.log10(0.25): "= 0.25", -2.0: "= 0.01", -3.5: "= 10^−3.5", -1234.56: "= 10^−1234.6", math.nan: "undefined"}
    assert {value: told_p(value) for value in told} == told


def test_the_cost_is_said_before_anything_is_collected(trained, letters, digits, tmp_path, monkeypatch):
    config = config_of(letters, digits, sites=("mlp",), control_seeds=(0, 1))
    collected, heard, real = [], [], several_tasks.collect_sample
    monkeypatch.setattr(several_tasks, "collect_sample", lambda *args, **kw: collected.append(1) or real(*args, **kw))
    for _ in range(2):
        sepcap.overlaps(trained, config, out=tmp_path / "study", say=lambda text: heard.append((text, len(collected))))
    # four tasks in three models of 300 tokens each
    assert [n for _, n in heard] == [0, 12]
    assert "one, two, three against base" in heard[0][0]
    assert "0.0036 M tokens through models" in heard[0][0]
    assert heard[1][0].endswith("every task is collected; nothing goes through models again")


def test_the_control_is_the_same_configuration_before_training(trained, trained_folder):
    make = untrained(trained)
    state = torch.random.get_rng_state()
    made, loaded = make(3), sepcap.load_model(trained_folder, device="cpu", random_weights=True, seed=3)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert fingerprint(made) == fingerprint(loaded)
    assert fingerprint(make(4)) != fingerprint(made)
    assert made.tokenizer("abc")["input_ids"] == trained.tokenizer("abc")["input_ids"]
    assert "random weights (seed 3)" in made.cfg.model_name
    assert "random" not in trained.cfg.model_name


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"sites": ("mlp", "mlp")}, "each once"),
        ({"sites": ()}, "give a tuple of at least one"),
        ({"fractions": (0.1, 0.1)}, "each once"),
        ({"fractions": (1.5,)}, r"a fraction lies in \(0, 1\]"),
        ({"control_seeds": (-1,)}, "0 or more"),
        ({"importance": "freq", "sites": ("attn_value",)}, "undefined for 'attn_value'"),
        ({"tokens": 0}, "give at least 1"),
    ],
)
def test_bad_configurations_are_named(changes, says):
    with pytest.raises(ValueError, match=says):
        sepcap.OverlapConfig(**changes)


TUPLES = {
    sepcap.OverlapConfig: ("sites", "fractions", "control_seeds"),
    sepcap.CrossTaskConfig: ("seeds",),
    sepcap.CrossChecksConfig: ("checks", "fractions", "steps", "seeds"),
    sepcap.ModulesConfig: ("fractions", "seeds"),
}


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in TUPLES.items() for name in names])
def test_what_is_no_tuple_or_holds_something_else_is_named(kind, name):
    default = getattr(kind(), name)
    # set afterwards, as whoever runs without a type checker gives it
    for wrong in (0, 0.5, None, "mlp", ([0],), (None,), ("x",), (default[0], default[0])):
        config = kind()
        object.__setattr__(config, name, wrong)
        with pytest.raises(ValueError, match=rf"^({name}|site)="):
            config.__post_init__()
    object.__setattr__(config, name, list(default))
    config.__post_init__()
    assert getattr(config, name) == default


def test_a_control_is_left_out_by_an_empty_tuple_and_seeds_are_whole():
    assert sepcap.OverlapConfig(control_seeds=()).control_seeds == ()
    for kind, name in ((sepcap.OverlapConfig, "control_seeds"), (sepcap.CrossTaskConfig, "seeds"), (sepcap.ModulesConfig, "seeds")):
        config = kind()
        object.__setattr__(config, name, (0.5,))
        with pytest.raises(ValueError, match=rf"{name}=\(0\.5,\): give a tuple of whole numbers, 0 or more"):
            config.__post_init__()


def test_bad_input_is_named(found, trained, letters, digits):
    with pytest.raises(ValueError, match="selects no neuron"):
        sepcap.overlaps(trained, config_of(letters, digits, fractions=(0.001,), sites=("heads",)))
    one = load_task(letters, name="one")
    with pytest.raises(ValueError, match="'one' and 'base' are the same data"):
        sepcap.overlaps(
            trained, config_of(letters, digits, tasks=(one, load_task(digits, name="b")), retain=load_task(letters, name="base"))
        )
    with pytest.raises(ValueError, match="two are called 'one'"):
        sepcap.overlaps(trained, config_of(letters, digits, tasks=(one, load_task(digits, name="one"))))
    with pytest.raises(ValueError, match=r"no scores 'trained \| four \| mlp'"):
        found.neurons("four", {"mlp": 0.1})
