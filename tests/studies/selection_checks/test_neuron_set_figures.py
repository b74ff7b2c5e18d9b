"""Figures of overlaps, cross-task effects and selection checks: what is drawn is what the tables hold."""

import itertools
import json
from typing import Any

import numpy as np
import pandas as pd
import pytest

from sepcap import plots
from sepcap.studies.cross_task.study import CrossTaskPruning
from sepcap.studies.overlaps.result import Overlap
from sepcap.studies.selection_checks.study import SelectionChecks

TASKS = ["<b>one</b>", "two", "three"]
PAIRS = [(TASKS[0], "two"), (TASKS[0], "three"), ("two", "three")]


def overlaps(seeds=(0, 1), control=True) -> Any:
    rng, rows = np.random.default_rng(0), []
    for weights, seed in itertools.product(("trained", "random") if control else ("trained",), seeds):
        for first, second in PAIRS:
            for layer in (None, 0, 1):
                share, other = rng.random(2)
                numbers = {"share": share, "share_of_second": other, "iou": share / 2, "ratio": 9 * share, "ratio_matched": 3 * other}
                counts = {"neurons": 100, "a": 10, "b": 20, "both": 5, "log10_p": -50 * share, "log10_p_corrected": -40 * share}
                counts |= {"log10_p_matched_corrected": -share, "n_documents": 60}
                where = {"weights": weights, "seed": seed, "site": "mlp", "fraction": 0.1, "first": first, "second": second, "layer": layer}
                rows.append(where | numbers | counts)
    table = pd.DataFrame(rows).astype({"layer": "Int64"})
    config = {"tasks": TASKS, "sites": ["mlp"], "fractions": [0.1], "seeds": list(seeds), "model": "m", "documents_shared": {"a": 0.0}}
    return Overlap(config, {"overlap": table})


def heats(fig):
    return [np.array(t.z, dtype=float) for t in fig.data if t.type == "heatmap"]


@pytest.mark.parametrize("layer", [None, 1])
@pytest.mark.parametrize("measure", ["share", "iou", "ratio", "ratio_matched", "log10_p_corrected"])
def test_a_map_has_every_pair_both_ways_and_the_mean_over_seeds(measure, layer):
    result = overlaps()
    maps = heats(plots.overlap(result, measure, layer=layer))
    table = result.table[result.table["layer"].isna() if layer is None else result.table["layer"] == layer]
    sign = -1 if measure == "log10_p_corrected" else 1
    for shown, of_model in zip(maps, (table[table["weights"] == "trained"], table[table["weights"] == "random"]), strict=True):
        assert np.isnan(np.diag(shown)).all()
        for first, second in PAIRS:
            rows = of_model[(of_model["first"] == first) & (of_model["second"] == second)]
            i, j = TASKS.index(first), TASKS.index(second)
            assert shown[i, j] == pytest.approx(sign * rows[measure].mean(), rel=1e-3)
            back = "share_of_second" if measure == "share" else measure
            assert shown[j, i] == pytest.approx(sign * rows[back].mean(), rel=1e-3)


def test_a_map_without_a_control_is_one_panel_and_names_are_plain_text():
    fig: Any = plots.overlap(overlaps(control=False))
    assert len(heats(fig)) == 1
    assert fig.layout.yaxis.ticktext[0] == "&lt;b&gt;one&lt;/b&gt;"
    assert fig.layout.yaxis.range[0] > fig.layout.yaxis.range[1]  # the first task is at the top


def test_what_the_study_does_not_have_is_refused():
    with pytest.raises(ValueError, match="Did you mean 'share'"):
        plots.overlap(overlaps(), "shar")
    with pytest.raises(ValueError, match="Valid: 'mlp'"):
        plots.overlap(overlaps(), site="heads")
    with pytest.raises(ValueError, match=r"it has 0\.1"):
        plots.overlap(overlaps(), fraction=0.3)
    with pytest.raises(ValueError, match="layers 0 to 1"):
        plots.overlap(overlaps(), layer=7)
    with pytest.raises(ValueError, match="did not run"):
        plots.selection_checks_layers(SelectionChecks({"forget": "a", "retain": "b"}, {}))


def test_the_lines_per_layer_and_the_points_are_those_of_the_table():
    result = overlaps()
    fig: Any = plots.overlap_layers(result, "iou")
    assert len(fig.data) == 2 * len(PAIRS)
    for (first, second), line in zip(PAIRS, fig.data[::2], strict=True):
        trained = result.table.query("weights == 'trained'").dropna(subset=["layer"])
        rows = trained[(trained["first"] == first) & (trained["second"] == second)]
        np.testing.assert_allclose(line.y, rows.groupby("layer")["iou"].mean(), rtol=1e-4)
    ratios: Any = plots.overlap_ratios(result)
    points, estimates = ratios.data, result.estimates()
    assert [len(t.x) for t in points] == [3, 3, 3, 3]
    for t, (weights, measure) in zip(points, itertools.product(("trained", "random"), ("ratio", "ratio_matched")), strict=True):
        rows = estimates[estimates["weights"] == weights]
        np.testing.assert_allclose(t.x, rows[measure], rtol=1e-4)
        np.testing.assert_allclose(t.error_x.array, rows[f"{measure}_high"] - rows[measure], rtol=1e-3)
    assert ratios.layout.legend.title.text == "95% intervals over 2 seeds"
    assert plots.overlap_ratios(overlaps(seeds=(4,))).layout.legend.title.text == "one seed: no intervals"


def cross_task() -> Any:
    rows = []
    for i, pruned in enumerate(TASKS):
        for j, evaluated in enumerate(TASKS):
            value = 0.1 * (3 * i + j)
            row = {"pruned": pruned, "evaluated": evaluated, "n": 10 + i, "fraction": 0.1}
            for name, number in (("relative", value), ("random", 1 - value), ("minus_random", 2 * value - 1)):
                row |= {name: number, f"{name}_low": number - 0.05, f"{name}_high": number + 0.05}
            rows.append(row)
    bisection = pd.DataFrame([{"task": task, "n": 10 + i, "fraction": (10 + i) / 100} for i, task in enumerate(TASKS)])
    trace = pd.DataFrame([{"task": task, "n": n, "relative": 1 - n / 100} for task in TASKS for n in (100, 50, 10, 11, 12)])
    config = {"tasks": TASKS, "site": "mlp", "metric": "top1", "target": 0.5, "seeds": [0], "model": "m"}
    return CrossTaskPruning(config, {"matrix": pd.DataFrame(rows), "bisection": bisection, "trace": trace})


def test_the_matrix_has_pruned_tasks_in_rows():
    pruned, random = heats(plots.cross_task(cross_task()))
    assert pruned[0, 2] == pytest.approx(0.2)
    assert pruned[2, 0] == pytest.approx(0.6)
    np.testing.assert_allclose(random, 1 - pruned, atol=1e-9)
    fig: Any = plots.cross_task(cross_task())
    assert "relative accuracy 0.200 [0.150, 0.250]" in fig.data[0].hovertext[0][2]


def test_a_bisection_is_drawn_in_order_with_the_found_number_filled():
    fig: Any = plots.cross_task_bisection(cross_task())
    for i, line in enumerate(fig.data):
        assert list(line.x) == [0, 0.1, 0.11, 0.12, 0.5, 1]
        filled = [x for x, colour in zip(line.x, line.marker.color, strict=True) if colour != "white"]
        assert filled == [pytest.approx((10 + i) / 100)]


RUNS = ("1 step", "4 steps", "1 step, other texts")


def checks() -> Any:
    rng, tables = np.random.default_rng(1), {}
    for name, whose, extra in (
        ("keep_only", "kept", [{"fraction": f} for f in (0.1, 0.5, 1.0)]),
        ("curves", "pruned", [{"fraction": f} for f in (0.1, 0.5, 1.0)]),
        ("layers", "pruned", [{"layers": d} for d in (1, 2, 3)]),
        ("steps", "pruned", [{"run": RUNS[i], "steps": k, "fraction": 0.2} for i, k in enumerate((1, 4, 1))]),
    ):
        rows = []
        for who in ("<i>a</i>", "b"):
            for where in extra:
                for evaluated in ("<i>a</i>", "b"):
                    numbers = {}
                    for column in ("relative", "random", "minus_random"):
                        value = rng.random()
                        numbers |= {column: value, f"{column}_low": value - 0.1, f"{column}_high": value + 0.2}
                    rows.append({whose: who, "n": 5, "evaluated": evaluated} | where | numbers)
        tables[name] = pd.DataFrame(rows)
    counts = {"neurons": 50, "a": 10, "b": 10, "both": 7, "ratio": 3.5, "log10_p_corrected": -2.0}
    pairs = itertools.product(("<i>a</i>", "b"), itertools.combinations(RUNS, 2))
    tables["step_overlaps"] = pd.DataFrame([{"pruned": p, "first": f, "second": s, "share": rng.random()} | counts for p, (f, s) in pairs])
    words = ["share of <i>a</i> neurons", "share of b neurons", "accuracy on <i>a</i>", "accuracy on b"]
    found = zip(words, (0.8, 0.7, 0.3, 0.2), strict=True)
    tables["meeting"] = pd.DataFrame([{"what": f"trajectories meet: {w}", "value": v, "low": v - 0.1, "high": v + 0.1} for w, v in found])
    config = {
        "forget": "<i>a</i>",
        "retain": "b",
        "site": "mlp",
        "metric": "top1",
        "layer_fraction": 0.2,
        "checks": ["layers"],
        "model": "m",
    }
    return SelectionChecks(config, tables)


@pytest.mark.parametrize(
    ("kind", "table", "x"), [("keep-only", "keep_only", "fraction"), ("curves", "curves", "fraction"), ("layers", "layers", "layers")]
)
def test_the_panels_draw_both_directions_with_their_intervals_beside_random(kind, table, x):
    result = checks()
    fig, rows = result.figure(kind), result.tables[table]
    whose = "kept" if kind == "keep-only" else "pruned"
    lines = [t for t in fig.data if t.mode == "lines+markers"]
    places = [(evaluated, who) for evaluated in result.pair for who in result.pair]
    for (evaluated, who), line in zip(places, lines, strict=True):
        here = rows[(rows["evaluated"] == evaluated) & (rows[whose] == who)]
        np.testing.assert_allclose(line.x, here[x])
        np.testing.assert_allclose(line.y, here["relative"], rtol=1e-4)
        np.testing.assert_allclose(line.error_y.array, here["relative_high"] - here["relative"], rtol=1e-3)
    random = [t for t in fig.data if t.name == ("random neurons kept" if kind == "keep-only" else "random neurons")]
    assert len(random) == 2
    np.testing.assert_allclose(random[0].y, rows[(rows["evaluated"] == "<i>a</i>") & (rows[whose] == "<i>a</i>")]["random"], rtol=1e-4)


def test_steps_have_a_place_each_and_other_texts_an_open_point():
    fig = checks().figure("step-size")
    assert list(fig.layout.xaxis.ticktext) == ["1", "4"]
    points = [t for t in fig.data if t.mode == "markers"]
    lines = [t for t in fig.data if t.mode == "lines+markers"]
    assert [t.name for t in points[:2]] == ["forget &lt;i&gt;a&lt;/i&gt;, 1 step, other texts", "forget b, 1 step, other texts"]
    assert [t.name for t in lines[:2]] == ["forget &lt;i&gt;a&lt;/i&gt;", "forget b"]
    assert {t.marker.color for t in points} == {"white"}
    table = checks().tables["steps"]
    places = [(evaluated, pruned) for evaluated in ("<i>a</i>", "b") for pruned in ("<i>a</i>", "b")]
    for (evaluated, pruned), point, line in zip(places, points, lines, strict=True):
        here = table[(table["evaluated"] == evaluated) & (table["pruned"] == pruned)].set_index("run")
        np.testing.assert_allclose([*line.y, *point.y], here.loc[list(RUNS), "relative"], rtol=1e-4)
        assert list(line.x) == [0, 1]
        assert -0.6 < point.x[0] < 0
        # white bars on white paper are not there to be seen
        assert point.error_y.color == line.error_y.color == line.line.color == point.marker.line.color
        assert point.error_y.array[0] == pytest.approx(0.2, rel=1e-3)


@pytest.mark.parametrize(("kind", "table"), [("keep-only", "keep_only"), ("curves", "curves"), ("layers", "layers")])
def test_a_line_of_one_point_shows_its_interval_and_that_of_random_neurons(kind, table):
    result = checks()
    rows = result.tables[table]
    result.tables[table] = rows[rows["layers" if kind == "layers" else "fraction"] == (1 if kind == "layers" else 0.5)]
    fig = result.figure(kind)
    assert [t.mode for t in fig.data] == ["markers"] * 6
    for t in fig.data:
        assert t.error_y.color == t.marker.color != "white"
    first = result.tables[table].iloc[0]
    random = fig.data[0]
    assert (random.y[0], random.error_y.array[0]) == pytest.approx((first["random"], first["random_high"] - first["random"]), rel=1e-3)


def test_the_map_of_steps_has_every_two_runs_of_both_tasks():
    result = checks()
    fig = result.figure("step-overlaps")
    table = result.tables["step_overlaps"]
    for pruned, shown in zip(result.pair, heats(fig), strict=True):
        assert np.isnan(np.diag(shown)).all()
        for row in table[table["pruned"] == pruned].to_dict("records"):
            i, j = RUNS.index(row["first"]), RUNS.index(row["second"])
            assert shown[i, j] == shown[j, i] == pytest.approx(100 * row["share"], rel=1e-3)
    assert list(fig.layout.yaxis.ticktext) == ["1", "4", "1, other texts"]
    assert fig.layout.annotations[0].text == "10 MLP neurons pruned; 20% shared by chance"
    assert "7 of 10<br>3.5 times chance, corrected p = 0.01" in fig.data[0].hovertext[0][1]


def test_trajectories_begin_at_the_unpruned_model_and_the_point_is_where_they_meet():
    result = checks()
    fig = result.figure("meeting")
    for line, who in zip(fig.data[:2], result.pair, strict=True):
        assert (line.x[0], line.y[0]) == (1, 1)
        rows = result.tables["curves"][result.tables["curves"]["pruned"] == who]
        np.testing.assert_allclose(line.x[1:], rows[rows["evaluated"] == "<i>a</i>"]["relative"], rtol=1e-4)
        np.testing.assert_allclose(line.y[1:], rows[rows["evaluated"] == "b"]["relative"], rtol=1e-4)
    point = fig.data[-1]
    assert (point.x[0], point.y[0]) == pytest.approx((0.3, 0.2))
    assert point.name == "they meet with 80% and 70% of the neurons pruned"
    assert "<i>" not in fig.layout.xaxis.title.text


@pytest.mark.parametrize("width", ["column", "page"])
def test_all_are_plain_data_of_the_width_asked_for(width):
    for result in (overlaps(), cross_task(), checks()):
        for kind in result.FIGURES:
            fig = result.figure(kind, width=width)
            assert json.loads(fig.to_json())["layout"]["width"] == pytest.approx({"column": 380.2, "page": 794.9}[width], abs=1)
