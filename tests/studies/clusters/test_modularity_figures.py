"""Figures of the study of modules: what is drawn is what was measured."""

import json
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from sepcap import plots
from sepcap.studies.clusters.study import Modularity

K, LAYERS = 4, 3
EMPTY = "<br>no selected neurons in layer 2"
COUNTS = {"moefied": [6, 2, 0, 0], "index": [3, 2, 2, 1]}
SETS = [(clusters, "score", null) for clusters in COUNTS for null in ("layer", "layer and activity")]
SETS += [("moefied", how, "layer") for how in ("least active", "most active")]


def cumulative(counts):
    return np.concatenate([[0], np.cumsum(sorted(counts, reverse=True))]) / sum(counts)


def planted(tasks=("a", "<b>b</b>"), seeds=(0, 1, 2), control=True, fractions=(0.02,)):
    """Every layer of every set has the same counts; concentration differs by layer and seed."""
    rows, curves, chances = [], [], []
    chance = np.linspace(0, 1, K + 1) ** 0.5
    for weights in ("trained", "random") if control else ("trained",):
        for seed in seeds:
            for clusters, how, null in SETS:
                counts = COUNTS[clusters]
                for task in tasks:
                    for fraction in fractions:
                        keys = {"weights": weights, "seed": seed, "clusters": clusters, "chosen": how, "null": null}
                        keys |= {"task": task, "fraction": fraction}
                        curve = cumulative(counts if weights == "trained" else COUNTS["index"])
                        area = np.trapezoid(curve, dx=1 / K)
                        for layer in (*range(LAYERS), None):
                            # layer 2 holds nothing in the trained model
                            n = 0 if layer == 2 and weights == "trained" else 8
                            here = area + 0.01 * (layer or 0) + 0.001 * seed
                            rest = {
                                "chance": 0.6 if null == "layer" else 0.62,
                                "chance_low": 0.55,
                                "chance_high": 0.65,
                                "most": 1.0,
                                "p": 0.01,
                            }
                            row = {"layer": pd.NA if layer is None else layer, "neurons": n, "area": here} | rest
                            row["concentration"] = (here - 0.6) / 0.4
                            rows.append(keys | row)
                        curves.append(curve)
                        mean = chance if null == "layer" else chance**0.9
                        chances.append([mean, 0.9 * mean, np.minimum(1, 1.1 * mean)])
    tensors = {"curves": torch.tensor(np.array(curves)), "chance": torch.tensor(np.array(chances))}
    tensors |= {f"labels-trained-{seed}": torch.zeros(LAYERS, 8, dtype=torch.int32) for seed in seeds}
    config = {"model": "m", "tasks": list(tasks), "retain": "r$x$", "k": K, "fractions": list(fractions), "control": control}
    config |= {"seeds": list(seeds), "documents_shared": {"a": 0.0}}
    config["n_documents"] = {f"{task}-{seed}": 60 for task in tasks for seed in seeds}
    return Modularity(config, {"areas": pd.DataFrame(rows).astype({"layer": "Int64"})}, tensors)


def named(fig) -> dict[str, Any]:
    return {t.name: t for t in fig.data if t.name}


def test_curves_are_the_cumulative_shares_and_the_legend_their_areas():
    lines = named(plots.concentration_curve(planted()))
    expected = {
        "MoEfication clusters: 0.813": cumulative(COUNTS["moefied"]),
        "random sets, as many per layer: 0.600": np.linspace(0, 1, K + 1) ** 0.5,
        "random sets, matched on activity too: 0.620": np.linspace(0, 1, K + 1) ** 0.45,
        "arbitrary clusters (neuron index modulo k): 0.595": cumulative(COUNTS["index"]),
        "MoEfication, random weights: 0.595": cumulative(COUNTS["index"]),
        "random sets per layer, random weights: 0.600": np.linspace(0, 1, K + 1) ** 0.5,
        "neurons least active on retain: 0.813": cumulative(COUNTS["moefied"]),
        "neurons most active on retain: 0.813": cumulative(COUNTS["moefied"]),
    }
    assert list(lines) == list(expected)
    for name, curve in expected.items():
        np.testing.assert_allclose(lines[name].x, [0, 25, 50, 75, 100])
        np.testing.assert_allclose(lines[name].y, 100 * curve, rtol=1e-4)


def test_bands_go_round_the_random_sets():
    fig: Any = plots.concentration_curve(planted())
    bands = [t for t in fig.data if t.fill == "toself"]
    chance = np.linspace(0, 1, K + 1) ** 0.5
    assert len(bands) == 3
    np.testing.assert_allclose(bands[0].y, 100 * np.concatenate([np.minimum(1, 1.1 * chance), (0.9 * chance)[::-1]]), rtol=1e-4)


def test_the_axis_ends_where_all_lines_have_arrived():
    assert planted().figure("curve").layout.xaxis.range == (0, 100)
    result = planted()
    curves, chance = result.tensors["curves"], result.tensors["chance"]
    curves[:, 2:] = chance[:, :, 2:] = 1
    assert result.figure("curve").layout.xaxis.range == (0, 50)


def test_one_task_alone():
    result = planted(tasks=("a", "b"))
    totals = result.tables["areas"][result.tables["areas"]["layer"].isna()].reset_index(drop=True)
    mine = (totals["task"] == "b") & (totals["weights"] == "trained") & (totals["clusters"] == "moefied")
    result.tensors["curves"][torch.tensor(mine.tolist()), 1] = 0.9
    # the first line is that of the MoEfication clusters
    heights = {task: next(iter(named(plots.concentration_curve(result, task=task)).values())).y[1] for task in ("a", "b", None)}
    assert heights == {"a": 75, "b": 90, None: 82.5}


@pytest.mark.parametrize("null", ["layer", "layer and activity"])
@pytest.mark.parametrize("task", [None, "a"])
def test_the_profile_is_that_of_the_estimates(task, null):
    result = planted()
    lines = named(plots.concentration_profile(result, task=task, null=null))
    table: Any = result.estimates(("layer",) if task is None else ("layer", "task"))
    table = table[(table["null"] == null) & (table["chosen"] == "score")]
    names = ["MoEfication clusters", "arbitrary clusters (neuron index modulo k)", "MoEfication, random weights"]
    by_activity = ["neurons least active on retain", "neurons most active on retain"]
    assert list(lines) == names + by_activity * (null == "layer")
    lines = {name: lines[name] for name in names}
    keys = (("trained", "moefied"), ("trained", "index"), ("random", "moefied"))
    for line, (weights, clusters) in zip(lines.values(), keys, strict=True):
        rows = table[(table["weights"] == weights) & (table["clusters"] == clusters)]
        rows = rows if task is None else rows[rows["task"] == task]
        assert [round(x) for x in line.x] == rows["layer"].tolist() == ([0, 1] if weights == "trained" else [0, 1, 2])
        np.testing.assert_allclose(line.y, rows["concentration"], rtol=1e-4)
        np.testing.assert_allclose(line.error_y.array, rows["concentration_high"] - rows["concentration"], rtol=1e-3, atol=1e-6)
        np.testing.assert_allclose(line.error_y.arrayminus, rows["concentration"] - rows["concentration_low"], rtol=1e-3, atol=1e-6)
        assert f"layer 1<br>concentration {rows['concentration'].iloc[1]:.3f}".replace("-", "−") in line.hovertext[1]


def test_one_seed_has_points_without_intervals():
    line = next(iter(named(plots.concentration_profile(planted(seeds=(3,)))).values()))
    assert line.error_y.array == (None, None)
    assert "[" not in line.hovertext[0]


def test_without_the_control_there_are_no_lines_of_it():
    result = planted(control=False)
    names = [name.split(":")[0] for name in named(plots.concentration_curve(result))]
    random = ["random sets, as many per layer", "random sets, matched on activity too"]
    by_activity = ["neurons least active on retain", "neurons most active on retain"]
    assert names == ["MoEfication clusters", *random, "arbitrary clusters (neuron index modulo k)", *by_activity]
    assert len(named(plots.concentration_profile(result))) == 2


def test_names_from_outside_are_shown_letter_by_letter():
    for kind in ("curve", "profile"):
        title = planted().figure(kind, task="<b>b</b>").layout.legend.title.text
        assert title.startswith("&lt;b&gt;b&lt;/b&gt; against r&#36;x&#36;<br>top 2% of the MLP neurons; k = 4 clusters per layer<br>")


@pytest.mark.parametrize("width", ["column", "page"])
def test_the_figures_are_plain_data(width):
    for kind in ("curve", "profile"):
        fig = planted().figure(kind, width=width)
        assert json.loads(fig.to_json())["layout"]["width"] == pytest.approx({"column": 380.2, "page": 794.9}[width], abs=1)


def test_the_middle_share_is_drawn_unless_another_is_asked_for():
    result = planted(fractions=(0.01, 0.03, 0.2))
    for kind in ("curve", "profile"):
        assert "top 3% of" in result.figure(kind).layout.legend.title.text
        assert "top 20% of" in result.figure(kind, fraction=0.2).layout.legend.title.text
        with pytest.raises(ValueError, match=r"fraction=0.5: the study has 0.01, 0.03, 0.2"):
            result.figure(kind, fraction=0.5)
        with pytest.raises(ValueError, match="task='c' is not known"):
            result.figure(kind, task="c")


def test_an_interval_that_goes_on_beyond_the_axis_is_marked_where_it_is_cut():
    result = planted()
    areas = result.tables["areas"]
    spread = (areas["layer"] == 0) & (areas["weights"] == "trained") & (areas["clusters"] == "moefied")
    # three seeds: 0.64 ± 0.4 in units of the area is 0.1 ± 2.5 in concentration
    areas.loc[spread, "area"] = areas.loc[spread, "seed"].map({0: 0.24, 1: 0.64, 2: 1.04})
    row = result.estimates(("layer",)).query("weights == 'trained' and clusters == 'moefied' and chosen == 'score' and layer == 0").iloc[0]
    assert row["concentration_low"] < -1
    assert row["concentration_high"] > 1
    fig: Any = plots.concentration_profile(result)
    main = next(iter(named(fig).values()))
    marks = {t.marker.symbol: t for t in fig.data if t.mode == "markers"}
    assert set(marks) == {"triangle-down", "triangle-up"}
    for symbol, end in (("triangle-down", -1), ("triangle-up", 1)):
        assert list(marks[symbol].x) == [main.x[0]]  # layer 0 of that line alone
        assert list(marks[symbol].y) == [end]
        assert marks[symbol].marker.color == main.line.color
    assert main.y[0] + main.error_y.array[0] == pytest.approx(1, abs=1e-3)
    assert main.y[0] - main.error_y.arrayminus[0] == pytest.approx(-1, abs=1e-3)
    assert "the interval continues" in fig.layout.legend.title.text
    whole: Any = plots.concentration_profile(planted())
    assert len(whole.data) == 3
    assert "continues" not in whole.layout.legend.title.text


def test_one_seed_is_not_said_to_have_intervals():
    assert planted(seeds=(3,)).figure("profile").layout.legend.title.text.endswith(f"one seed: no intervals{EMPTY}")
    assert planted().figure("profile").layout.legend.title.text.endswith(f"95% intervals over 3 seeds{EMPTY}")
