"""Overlap of many sets: every number against sets of Python integers and scipy, on scores that are known."""

import dataclasses
import html
import itertools
import math

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from tiny import fresh

import sepcap
from sepcap.models.loading.untrained import untrained
from sepcap.models.weights import fingerprint
from sepcap.selection.overlap import overlap
from sepcap.selection.score import Scores
from sepcap.statistics.collect import collect_sample
from sepcap.studies.base import task_sets as several_tasks
from sepcap.studies.base.seed_samples import disjoint_parts, sample_seeds, what_seeds_share
from sepcap.studies.base.task_sets import NamedTasks
from sepcap.studies.base.text import p_in_words, with_ends
from sepcap.studies.catalog import load_result
from sepcap.studies.overlaps.result import HEADS_AT
from sepcap.studies.overlaps.study import Overlap, selected
from sepcap.tasks.load import load_task
from sepcap.tasks.samples import sample_task
from sepcap.tasks.task import Task

SITES = ("mlp", "attn_pre_out", "attn_value", "heads")
FRACTIONS = (0.125, 0.25, 0.5)


def config_of(letters, digits, **changes):
    tasks = (load_task(letters[:80], name="one"), load_task(letters[80:], name="two"), load_task(digits[:80], name="three"))
    options = {
        "retain": load_task(digits[80:], name="base"),
        "sites": SITES,
        "fractions": FRACTIONS,
        "tokens": 150,
        "seeds": (0,),
    } | changes
    return sepcap.OverlapConfig(tasks=options.pop("tasks", tasks), **options)


@pytest.fixture(scope="module")
def found(trained_folder, letters, digits):
    torch.set_num_threads(1)
    return sepcap.measure_overlap(fresh(trained_folder), config_of(letters, digits, seeds=(0, 5)))


def members(result, weights, seed, task, site, fraction):
    """A set as Python integers per layer, taken from the highest scores by numpy's own sorting."""
    key = HEADS_AT if site == "heads" else site
    values = result.tensors[f"{weights}, seed {seed} | {task} | {key}"].double()
    values = (values.mean(-1) if site == "heads" else values.flatten(1)).numpy()
    n = int(fraction * values.size)
    # of equal scores the first goes: sort by score, then by place
    order = np.lexsort((np.arange(values.size), -values.ravel()))[:n]
    return [{int(i) for i in order if i // values.shape[1] == layer} for layer in range(len(values))], values.size


def test_every_row_is_counted_with_sets_of_integers_and_tested_by_scipy(found):
    keys = ["weights", "seed", "site", "fraction", "first", "second"]
    assert len(found.table) == 4 * 4 * 3 * 3 * 3  # models, sites, fractions, pairs, two layers and the total
    assert set(zip(found.table["weights"], found.table["seed"], strict=True)) == set(itertools.product(("trained", "random"), (0, 5)))
    for (*model, site, fraction, first, second), rows in found.table.groupby(keys):
        (a, n), (b, _) = (members(found, *model, task, site, fraction) for task in (first, second))
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
            # sets in different layers can share nothing
            chance = sum(len(a[layer]) * len(b[layer]) / (n / 2) for layer in layers)
            assert row["ratio"] == pytest.approx(both / chance if chance else math.nan, nan_ok=True)
            pmf = np.ones(1)
            for layer in layers:
                pmf = np.convolve(pmf, stats.hypergeom.pmf(range(n // 2 + 1), n // 2, len(a[layer]), len(b[layer])))
            assert row["log10_p"] == pytest.approx(np.log10(pmf[both:].sum()), abs=1e-9)


def test_p_values_are_corrected_for_all_tests_of_a_repetition(found):
    for (_, rows), name in itertools.product(found.table.groupby(["weights", "seed"]), ("log10_p", "log10_p_matched")):
        tested = rows[name].dropna()
        assert len(tested) <= len(rows)
        expected = np.minimum(1, len(tested) * 10 ** tested.to_numpy())
        np.testing.assert_allclose(10 ** rows[f"{name}_corrected"].dropna(), expected, rtol=1e-9)


def test_every_task_is_scored_against_documents_of_its_own(found, trained, letters, digits):
    """Statistics, scores and random sets of the same activity, made again from the samples by hand."""
    config = config_of(letters, digits)
    config = dataclasses.replace(config, seeds=(0, 5))
    parts = sample_seeds(trained, config.retain, config, parts=3).by_seed[5]
    rows = [{row.tobytes() for row in part.rows} for part in parts]
    assert all(not one & other for one, other in itertools.combinations(rows, 2))
    against = [collect_sample(trained, part, ("mlp",))["mlp"] for part in parts]
    for task, retained in zip(config.tasks, against, strict=True):
        forget = collect_sample(trained, sample_seeds(trained, task, config).by_seed[5][0], ("mlp",))["mlp"]
        torch.testing.assert_close(found.tensors[f"trained, seed 5 | {task.name} | mlp"], forget.abs / (retained.abs + 1e-3))
    activity = against[0].merge(against[1]).merge(against[2]).abs
    sets = [found.neurons(task.name, {"mlp": 0.25}, seed=5) for task in config.tasks[:2]]
    mine = overlap(*sets, matched={"mlp": activity}).query("layer.isna()").iloc[0]
    row = found.totals().query("weights == 'trained' and seed == 5 and site == 'mlp' and fraction == 0.25 and first == 'one'").iloc[0]
    assert (row["second"], row["both"]) == ("two", mine["both"])
    for name in ("expected_matched", "ratio_matched", "log10_p_matched"):
        assert row[name] == pytest.approx(mine[name])


def test_estimates_are_means_over_seeds_and_differences_are_paired_by_seed(found):
    totals = found.totals().set_index(["weights", "site", "fraction", "first", "second", "seed"]).sort_index()
    at = ("mlp", 0.25, "one", "three")
    ratio = {weights: totals.loc[(weights, *at)]["ratio"] for weights in ("trained", "random")}
    estimates = found.estimates().set_index(["weights", "site", "fraction", "first", "second"])
    differences = found.differences().set_index(["site", "fraction", "first", "second"])
    for row, name, values in (
        (estimates.loc[("trained", *at)], "ratio", ratio["trained"]),
        (estimates.loc[("random", *at)], "ratio", ratio["random"]),
        (differences.loc[at], "ratio", ratio["trained"] - ratio["random"]),
    ):
        # of two values t with one degree of freedom is 12.706, and the standard error half of their distance
        half = 12.7062 * abs(values[0] - values[5]) / 2
        assert (row[name], row[f"{name}_low"]) == (pytest.approx(values.mean()), pytest.approx(values.mean() - half, rel=1e-4, abs=1e-4))
    assert estimates.loc[("trained", *at), "log10_p_corrected"] == totals.loc[("trained", *at)]["log10_p_corrected"].max()
    pd.testing.assert_frame_equal(found.tables["differences"], found.differences())


def test_disjoint_parts_of_one_noise_make_no_overlap_and_a_shared_part_does(trained, digits):
    """Two tasks without any difference from retain: each score is noise over noise of the retain documents."""
    rng = np.random.default_rng(0)
    layers, width = 4, 250
    shared, apart = [], []
    for _ in range(60):
        one, two, base, other = (torch.as_tensor(rng.lognormal(0, 0.2, (layers, width))) for _ in range(4))
        sets = [Scores({"mlp": scores}).top({"mlp": 0.1}) for scores in (one / base, two / base, two / other)]
        for found, pair in ((shared, (sets[0], sets[1])), (apart, (sets[0], sets[2]))):
            found.append(overlap(*pair).query("layer.isna()")["log10_p"].iloc[0])
    assert np.mean(np.array(apart) < math.log10(0.05)) < 0.15  # 5%, and four standard errors of 60 draws
    assert np.mean(np.array(shared) < math.log10(0.05)) > 0.9


def test_a_sample_of_fewer_documents_than_parts_is_refused(trained, digits):
    sample = sample_task(trained, load_task(digits, name="base"), "collect", 20, 16)
    with pytest.raises(ValueError, match="task 'base': 2 documents in 20 tokens cannot be split into 3 disjoint parts"):
        disjoint_parts(sample, 3)


def test_a_mixture_and_its_part_are_warned_of(trained, letters, digits):
    one, two = load_task(letters[:20], name="one"), load_task(letters[20:], name="two")
    mixture = Task("both", (*one.sources, *two.sources))
    with pytest.warns(UserWarning, match="'one' and 'both' share documents"):
        NamedTasks.of((one, mixture), load_task(digits, name="base"))
    for config in (sepcap.OverlapConfig(), sepcap.CrossTaskConfig(), sepcap.ModularityConfig()):
        assert "local-code" not in config.tasks


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
    config = config_of(letters, digits, retain="others", control=False, sites=("mlp",), tokens=300)
    result = sepcap.measure_overlap(trained, config)
    assert result.config["retain"] == "others"
    assert set(result.table["weights"]) == {"trained"}
    assert not len(result.differences())
    one, two, three = (sepcap.collect(trained, task, tokens=300, sites="mlp")["mlp"] for task in config.tasks)
    mean = (two.abs * two.count + three.abs * three.count) / (two.count + three.count)
    torch.testing.assert_close(result.tensors["trained, seed 0 | one | mlp"], one.abs / (mean + 1e-3))


@pytest.mark.thorough
def test_the_same_call_goes_on_and_ends_with_the_same_bits(trained, letters, digits, tmp_path, monkeypatch):
    config = config_of(letters, digits, sites=("mlp",))
    calls, real = [], several_tasks.collect_sample

    def stopped(*args, **options):
        calls.append(1)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return real(*args, **options)

    monkeypatch.setattr(several_tasks, "collect_sample", stopped)
    with pytest.raises(KeyboardInterrupt):
        sepcap.measure_overlap(trained, config, out=tmp_path / "study")
    whole = sepcap.measure_overlap(trained, config, out=tmp_path / "study")
    assert len(calls) == 8 + 12 - 7  # three tasks and their retain parts in two models, seven done before
    straight = sepcap.measure_overlap(trained, config)
    pd.testing.assert_frame_equal(whole.table, straight.table)
    assert all(torch.equal(whole.tensors[key], value) for key, value in straight.tensors.items())
    calls.clear()
    back = sepcap.measure_overlap(trained, config, out=tmp_path / "study")
    assert not calls
    assert isinstance(load_result(tmp_path / "study"), Overlap)
    pd.testing.assert_frame_equal(back.table, straight.table)
    with pytest.raises(FileExistsError, match=r"fractions: \[0.125, 0.25, 0.5\] stored, \[0.25\] requested"):
        sepcap.measure_overlap(trained, config_of(letters, digits, sites=("mlp",), fractions=(0.25,)), out=tmp_path / "study")


@pytest.mark.thorough
def test_the_model_is_not_changed_and_the_summary_says_what_was_found(trained, letters, digits):
    before = fingerprint(trained)
    result = sepcap.measure_overlap(trained, config_of(letters, digits, sites=("mlp",), seeds=(0, 1)))
    assert fingerprint(trained) == before
    said = "\n".join(result.summary())
    # the pair is picked among three, so that the intervals of all three hold together
    estimates = result.estimates(3).query("fraction == 0.125").set_index(["first", "second"])
    assert "Bonferroni-corrected for the 3 pairs of which two are picked" in said
    shared = result.config["documents_shared"]
    assert what_seeds_share(shared) in said
    assert set(result.estimates()["documents_shared"]) == {max(shared.values())}
    trained_rows, random_rows = (estimates[estimates["weights"] == weights] for weights in ("trained", "random"))
    pair = trained_rows["ratio"].idxmax()
    difference = result.differences(3).query("fraction == 0.125").set_index(["first", "second"]).loc[pair]
    assert f"of 3 pairs, highest ratio {pair[0]} and {pair[1]}, {trained_rows.loc[pair, 'both']:,.4g} of 18" in said
    assert f"ratio to random sets of the same layers {with_ends(trained_rows.loc[pair], 'ratio')} (p " in said
    assert f"randomly initialised {with_ends(random_rows.loc[pair], 'ratio')} and " in said
    assert f"trained minus randomly initialised {with_ends(difference, 'ratio')} and {with_ends(difference, 'ratio_matched')}" in said
    assert all(f"<li>{html.escape(sentence)}</li>" in result._repr_html_() for sentence in result.summary())
    two = config_of(letters, digits).tasks[::2]
    alone = "\n".join(sepcap.measure_overlap(trained, config_of(letters, digits, tasks=two, sites=("mlp",))).summary())
    # one pair is no choice among pairs, one seed has no interval, and a p of 1 is not a power of ten
    assert not any(words in alone for words in ("highest ratio", "[", "10^−0.0", "10^0", "Bonferroni-corrected for the 1 pairs"))
    assert "One seed: there are no intervals" in alone


def test_p_values_are_written_as_people_write_them():
    told = {0.0: "= 1", math.log10(0.25): "= 0.25", -2.0: "= 0.01", -3.5: "= 10^−3.5", -1234.56: "= 10^−1234.6", math.nan: "undefined"}
    assert {value: p_in_words(value) for value in told} == told


@pytest.mark.thorough
def test_the_cost_is_said_before_anything_is_collected(trained, letters, digits, tmp_path, monkeypatch):
    config = config_of(letters, digits, sites=("mlp",), seeds=(0, 1), tokens=100)
    collected, heard, real = [], [], several_tasks.collect_sample
    monkeypatch.setattr(several_tasks, "collect_sample", lambda *args, **kw: collected.append(1) or real(*args, **kw))
    for _ in range(2):
        sepcap.measure_overlap(trained, config, out=tmp_path / "study", progress=lambda text: heard.append((text, len(collected))))
    # three tasks and as many retain samples, two seeds, two models, of 100 tokens each
    assert [n for _, n in heard] == [0, 24]
    assert "one, two, three against base" in heard[0][0]
    assert "0.0024 M tokens through models" in heard[0][0]
    assert heard[1][0].endswith("all statistics are collected; no model is run again")


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
        ({"sites": ("mlp", "mlp")}, "without repeats"),
        ({"sites": ()}, "give a tuple of at least one"),
        ({"fractions": (0.1, 0.1)}, "without repeats"),
        ({"fractions": (1.5,)}, r"a fraction lies in \(0, 1\]"),
        ({"seeds": (-1,)}, "0 or more"),
        ({"importance": "freq", "sites": ("attn_value",)}, "undefined for 'attn_value'"),
        ({"tokens": 0}, "give at least 1"),
    ],
)
def test_bad_configurations_are_named(changes, says):
    with pytest.raises(ValueError, match=says):
        sepcap.OverlapConfig(**changes)


TUPLES = {
    sepcap.OverlapConfig: ("sites", "fractions", "seeds"),
    sepcap.CrossTaskConfig: ("seeds",),
    sepcap.SelectionChecksConfig: ("checks", "fractions", "steps", "seeds"),
    sepcap.ModularityConfig: ("fractions", "seeds"),
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


def test_seeds_are_whole():
    for kind in (sepcap.OverlapConfig, sepcap.CrossTaskConfig, sepcap.ModularityConfig):
        config = kind()
        object.__setattr__(config, "seeds", (0.5,))
        with pytest.raises(ValueError, match=r"seeds=\(0\.5,\): give a tuple of whole numbers, 0 or more"):
            config.__post_init__()


def test_bad_input_is_named(found, trained, letters, digits):
    with pytest.raises(ValueError, match="selects no neuron"):
        sepcap.measure_overlap(trained, config_of(letters, digits, fractions=(0.001,), sites=("heads",)))
    one = load_task(letters, name="one")
    with pytest.raises(ValueError, match="'one' and 'base' are the same data"):
        sepcap.measure_overlap(
            trained, config_of(letters, digits, tasks=(one, load_task(digits, name="b")), retain=load_task(letters, name="base"))
        )
    with pytest.raises(ValueError, match="two are called 'one'"):
        sepcap.measure_overlap(trained, config_of(letters, digits, tasks=(one, load_task(digits, name="one"))))
    with pytest.raises(ValueError, match=r"no scores 'trained, seed 0 \| four \| mlp'"):
        found.neurons("four", {"mlp": 0.1})
