"""The study of modules: every number is what its parts give one by one; interruption, intervals, and what is refused."""

import html

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import words
from scipy import stats
from tiny import fresh

import sepcap
from sepcap.selection.clusters import Clusters
from sepcap.selection.concentration import measure_concentration
from sepcap.statistics.collect import collect_sample
from sepcap.studies.base.seed_samples import sample_seeds
from sepcap.studies.clusters import study
from sepcap.studies.clusters.study import Modularity, ModularityConfig

K = 6
TASKS = {"letters": words(0), "capitals": words(0, alphabet="ABCDEFGH")}


def config_of(digits, **changes):
    tasks = tuple(sepcap.load_task(texts, name=name) for name, texts in TASKS.items())
    retain = sepcap.load_task(digits, name="digits")
    options = {"fractions": (0.1, 0.3), "k": K, "seeds": (0, 1), "draws": 60, "tokens": 300}
    return ModularityConfig(tasks=tasks, retain=retain, **{**options, **changes})


@pytest.fixture(scope="module")
def found(trained_folder, digits):
    """The study in memory; nobody changes it."""
    torch.set_num_threads(1)
    return sepcap.measure_modularity(fresh(trained_folder), config_of(digits))


def same(one, other):
    for name, table in one.tables.items():
        pd.testing.assert_frame_equal(table, other.tables[name], check_exact=True)
    assert set(one.tensors) == set(other.tensors)
    for name, tensor in one.tensors.items():
        assert torch.equal(tensor, other.tensors[name])


def test_there_is_a_row_for_everything(found):
    areas = found.tables["areas"]
    # weights, seeds, tasks, fractions; both clusters under both nulls and two sets chosen by activity; two layers and the total
    assert len(areas) == 2 * 2 * 2 * 2 * 6 * (2 + 1)
    keys = ["weights", "seed", "clusters", "chosen", "null", "task", "fraction", "layer"]
    assert not areas.duplicated(keys).any()
    assert set(areas["task"]) == set(TASKS)
    assert found.tensors["curves"].shape == (96, K + 1)
    assert found.tensors["chance"].shape == (96, 3, K + 1)
    totals = areas[areas["layer"].isna()]
    assert (totals["neurons"] == np.floor(totals["fraction"] * 144)).all()
    # the stored curves belong to the rows of all layers, in their order
    np.testing.assert_allclose(np.trapezoid(found.tensors["curves"], dx=1 / K), totals["area"], atol=1e-12)
    np.testing.assert_allclose(np.trapezoid(found.tensors["chance"][:, 0], dx=1 / K), totals["chance"], atol=1e-12)


@pytest.mark.parametrize("weights", ["trained", "random"])
@pytest.mark.parametrize(("task", "seed", "fraction"), [("letters", 1, 0.1), ("capitals", 0, 0.3)])
def test_every_area_is_that_of_its_parts(found, trained_folder, digits, weights, task, seed, fraction):
    model = sepcap.load_model(trained_folder, device="cpu", random_weights=weights == "random", seed=seed)
    assert torch.equal(found.clusters(seed, weights).labels, sepcap.cluster_neurons(model, k=K, seed=seed).labels)
    found.clusters(seed, weights).check(model)
    config = config_of(digits)
    forget, retain = (
        collect_sample(model, sample_seeds(model, sepcap.load_task(texts, name=name), config).by_seed[seed][0], ("mlp",))
        for name, texts in ((task, TASKS[task]), ("digits", digits))
    )
    mask = sepcap.score(forget, retain).top({"mlp": fraction}).masks["mlp"].numpy()
    areas = found.tables["areas"]
    rows = areas[(areas["weights"] == weights) & (areas["seed"] == seed) & (areas["task"] == task) & (areas["fraction"] == fraction)]
    labels = {"moefied": found.clusters(seed, weights).labels.numpy(), "index": np.stack([np.arange(72) % K] * 2)}
    masks, activity = {"score": mask}, retain["mlp"].abs
    for name, sign in (("least active", 1), ("most active", -1)):
        masks[name] = np.zeros_like(mask)
        for layer, n in enumerate(mask.sum(axis=1)):
            masks[name][layer, np.argsort(sign * activity[layer].numpy(), kind="stable")[:n]] = True
    sets = [("moefied", how, "layer") for how in masks] + [("index", "score", "layer"), ("moefied", "score", "layer and activity")]
    for kind, how, null in sets:
        of_kind = labels[kind]
        mine = rows[(rows["clusters"] == kind) & (rows["chosen"] == how) & (rows["null"] == null)]
        again = measure_concentration(
            sepcap.NeuronSet({"mlp": torch.as_tensor(masks[how])}),
            Clusters(torch.as_tensor(of_kind), K, "made up"),
            draws=60,
            seed=seed,
            matched=retain if null == "layer and activity" else None,
        )
        np.testing.assert_allclose(mine["chance"], again.table["chance"])
        mine = mine[mine["layer"].notna()].sort_values("layer")
        for layer, row in enumerate(mine.to_dict("records")):
            counts = np.sort(np.bincount(of_kind[layer][masks[how][layer]], minlength=K))[::-1]
            n = counts.sum()
            assert row["neurons"] == n
            if n:
                # the area of a staircase of straight lines, point by point
                expected = sum((counts[:j].sum() + counts[: j + 1].sum()) / 2 for j in range(K)) / (n * K)
                assert row["area"] == pytest.approx(expected, abs=1e-12)


def test_the_model_is_left_as_it_was(trained, digits):
    before = {name: value.clone() for name, value in trained.original_model.named_parameters()}
    sepcap.measure_modularity(trained, config_of(digits, seeds=(0,), control=False))
    assert all(torch.equal(value, before[name]) for name, value in trained.original_model.named_parameters())


@pytest.mark.thorough
def test_an_interrupted_study_goes_on_and_gives_the_same(found, trained, digits, tmp_path, monkeypatch):
    config, calls = config_of(digits), {"clusters": 0, "collected": 0}

    def counted(name, function, stop=None):
        def call(*args, **kwargs):
            if calls[name] == stop:
                raise KeyboardInterrupt
            calls[name] += 1
            return function(*args, **kwargs)

        return call

    clustering, collecting = study.cluster_layer, study.collect_sample
    for stops in ({"clusters": 1}, {"collected": 2}, {"clusters": 2}, {}):
        monkeypatch.setattr(study, "cluster_layer", counted("clusters", clustering, stops.get("clusters")))
        monkeypatch.setattr(study, "collect_sample", counted("collected", collecting, stops.get("collected")))
        if stops:
            with pytest.raises(KeyboardInterrupt):
                sepcap.measure_modularity(trained, config, out=tmp_path / "study")
            with pytest.raises(FileNotFoundError, match="is not finished"):
                Modularity.load(tmp_path / "study")
        else:
            resumed = sepcap.measure_modularity(trained, config, out=tmp_path / "study")
    same(resumed, found)
    assert calls["clusters"] == 2 * 2 * 2  # every layer of every model once
    said = []
    again = sepcap.measure_modularity(trained, config, out=tmp_path / "study", progress=said.append)
    same(again, found)
    assert "is finished; nothing is recomputed" in said[0]
    assert calls["clusters"] == 8
    same(sepcap.load_result(tmp_path / "study"), found)
    with pytest.raises(FileExistsError, match=r"another configuration.*k: 6 stored, 7 requested"):
        sepcap.measure_modularity(trained, config_of(digits, k=7), out=tmp_path / "study")
    same(Modularity.load(tmp_path / "study"), found)


SETS = [(w, c, "score", null) for w in ("trained", "random") for null in ("layer", "layer and activity") for c in ("moefied", "index")]
SETS += [(weights, "moefied", how, "layer") for weights in ("trained", "random") for how in ("least active", "most active")]


def planted(values, neurons=10, control=True, draws=1000):
    """A study with these areas of MoEfication clusters, (task, seed) -> area; chance 0.6, matched on activity 0.65, most 1.

    By index 0.6, random weights 0.7, the least active 0.9, the most active 0.5.
    """
    rows = []
    for weights, clusters, how, null in SETS:
        for (task, seed), value in values.items():
            area = {"index": 0.6, "moefied": value if weights == "trained" else 0.7}[clusters]
            area = {"score": area, "least active": 0.9, "most active": 0.5}[how]
            n = neurons[task] if isinstance(neurons, dict) else neurons
            chance = 0.6 if null == "layer" else 0.65
            rest = {"chance": chance, "chance_low": 0.5, "chance_high": 0.7, "most": 1.0, "p": 0.001 if area > 0.7 else 0.5}
            row = {"weights": weights, "seed": seed, "clusters": clusters, "chosen": how, "null": null, "task": task, "fraction": 0.02}
            row |= {"layer": pd.NA, "neurons": n}
            rows.append(row | {"area": area, "concentration": (area - chance) / (1 - chance)} | rest)
    table = pd.DataFrame(rows).astype({"layer": "Int64"})
    table = table if control else table[table["weights"] == "trained"].reset_index(drop=True)
    config = {"model": "m", "tasks": sorted({t for t, _ in values}), "retain": "r", "k": 4, "fractions": [0.02], "control": control}
    config |= {"seeds": sorted({s for _, s in values}), "n_init": 1, "draws": draws, "documents_shared": {"a": 0.0}}
    config["n_documents"] = {f"{task}-{seed}": 60 + seed for task, seed in values}
    return Modularity(config, {"areas": table}, {})


def test_estimates_are_means_over_seeds_with_students_intervals():
    values = {("a", 0): 0.8, ("a", 1): 0.9, ("a", 2): 0.7, ("b", 0): 0.6, ("b", 1): 0.8, ("b", 2): 1.0}
    result = planted(values)
    table = result.estimates(("task",)).query("chosen == 'score' and null == 'layer'").set_index(["weights", "clusters", "task"])
    for task in "ab":
        areas = [value for (name, _), value in values.items() if name == task]
        row = table.loc[("trained", "moefied", task)]
        low, high = stats.ttest_1samp(areas, 0).confidence_interval(0.95)
        assert (row["area"], row["area_low"], row["area_high"]) == pytest.approx((np.mean(areas), low, high))
        assert row["concentration"] == pytest.approx((np.mean(areas) - 0.6) / 0.4)
        assert row["seeds"] == 3
    pooled = (
        result.estimates().query("chosen == 'score' and null == 'layer'").set_index(["weights", "clusters"]).loc[("trained", "moefied")]
    )
    means = [np.mean([values["a", seed], values["b", seed]]) for seed in range(3)]
    low, high = stats.ttest_1samp(means, 0).confidence_interval(0.95)
    assert (pooled["area"], pooled["area_low"], pooled["area_high"]) == pytest.approx((np.mean(means), low, high))


def test_tasks_are_pooled_by_their_neurons():
    result = planted({("a", 0): 0.9, ("b", 0): 0.6}, neurons={"a": 10, "b": 30})
    pooled = (
        result.estimates().query("chosen == 'score' and null == 'layer'").set_index(["weights", "clusters"]).loc[("trained", "moefied")]
    )
    assert pooled["area"] == pytest.approx((10 * 0.9 + 30 * 0.6) / 40)
    assert np.isnan(pooled["area_low"])  # one seed says nothing about others
    assert "area 0.675, random sets 0.600" in result.summary()[1]


def test_differences_are_seed_by_seed():
    result = planted({("a", 0): 0.8, ("a", 1): 0.9, ("a", 2): 0.7})
    table = result.differences().set_index(["minus", "null"]).sort_index()
    controls = {"index mod k": 0.6, "random weights": 0.7, "the least active": 0.9, "the most active": 0.5}
    for (name, null), row in table.iterrows():
        gaps = [(area - controls[name]) / (0.4 if null == "layer" else 0.35) for area in (0.8, 0.9, 0.7)]
        low, high = stats.ttest_1samp(gaps, 0).confidence_interval(0.95)
        assert (row["difference"], row["difference_low"], row["difference_high"]) == pytest.approx((np.mean(gaps), low, high))


def test_the_summary_says_numbers_intervals_and_controls():
    said = planted({("a", 0): 0.8, ("a", 1): 0.9, ("a", 2): 0.7}).summary()
    assert "intervals over 3 seeds" in said[0]
    for part in ("area 0.800 [0.552, 1.048], random sets 0.600", "concentration 0.500 [", "by index mod k 0.000 [0.000, 0.000]"):
        assert part in said[1]
    assert "random weights and their own clusters 0.250" in said[1]
    assert "also matched on activity on r 0.429 [" in said[1]
    assert "chosen by that activity alone: the least active 0.750 [0.750, 0.750], the most active −0.250 [" in said[1]
    # each minus its control: 0.5 and 0, 0.25, 0.75, −0.25
    for part in (
        "0.500 [",
        "vs index mod k, ",
        "0.250 [",
        "vs random weights, ",
        "−0.250 [",
        "vs the least active, ",
        "vs the most active.",
    ):
        assert part in said[1]
    assert said[1].endswith("99% of random sets: 2 of 3 sets, 2 when also matched on activity, 0 in clusters by index.")
    assert "random weights and their own clusters" not in planted({("a", 0): 0.8}, control=False).summary()[1]


def test_with_few_draws_it_is_said_that_none_of_them_is_as_concentrated():
    # two sets beat all 20 draws (p = 1/21) and one beats 19 of them
    result = planted({("a", 0): 0.8, ("a", 1): 0.9, ("a", 2): 0.7}, draws=20)
    areas = result.tables["areas"]
    areas["p"] = [1 / 21, 1 / 21, 2 / 21] + [0.5] * (len(areas) - 3)  # the first three are those of the layer null
    said = result.summary()[1]
    than = "More concentrated than every one of 20 random sets"
    assert said.endswith(f"{than}: 2 of 3 sets, 0 when also matched on activity, 0 in clusters by index.")
    # from 99 on the smallest p is one in a hundred
    for draws, p, n in ((98, 1 / 99, 3), (99, 1 / 100, 3), (99, 2 / 100, 0), (1000, 10 / 1001, 3), (1000, 11 / 1001, 0)):
        again = planted({("a", 0): 0.8, ("a", 1): 0.9, ("a", 2): 0.75}, draws=draws)
        again.tables["areas"]["p"] = [p] * 3 + [0.5] * (len(areas) - 3)
        than = "99% of random sets" if draws >= 99 else "every one of 98 random sets"
        assert f"More concentrated than {than}: {n} of 3 sets" in again.summary()[1]


def test_one_seed_has_no_intervals_and_what_is_undefined_is_said_to_be():
    result = planted({("a", 0): 0.8})
    assert "No intervals" in result.summary()[0]
    assert "[" not in "".join(result.summary())
    result.tables["areas"]["most"] = result.tables["areas"]["chance"]  # all neurons: no set of that size is more concentrated
    said = result.summary()[1]
    assert "concentration undefined, against random sets also matched on activity on r undefined" in said
    assert "In clusters by index mod k undefined" in said
    assert "nan" not in said.lower()


def test_unknown_names(found):
    with pytest.raises(ValueError, match=r"by='tasks' is not known. Did you mean 'task'"):
        found.estimates(("tasks",))
    with pytest.raises(ValueError, match="labels-trained-7"):
        found.clusters(7)
    with pytest.raises(ValueError, match=r"figure='curves' is not known. Did you mean 'curve'"):
        found.figure("curves")
    assert "areas 288 rows" in repr(found)
    assert f"<li>{html.escape(found.summary()[0])}</li>" in found._repr_html_()


def test_the_page_about_it_shows_the_estimates_first(found, tmp_path):
    assert list(found.tables) == ["estimates", "differences", "areas", "clusters"]
    pd.testing.assert_frame_equal(found.tables["estimates"], found.estimates(("task",)))
    pd.testing.assert_frame_equal(found.tables["differences"], found.differences(("task",)))
    page = found.report(tmp_path / "page.html").read_text()
    for said in (Modularity.TITLE, "letters", "Concentration by layer", "random sets"):
        assert said in page
