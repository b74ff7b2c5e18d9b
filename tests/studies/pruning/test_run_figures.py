"""Trajectories, metrics, areas, pruned neurons and thresholds: what is drawn is what the run holds."""

import json
import re

import numpy as np
import plotly.io
import pytest
from planted_runs import maker

from sepcap import plots
from sepcap.studies.pruning.figures.labels import named

CODE = [0.5, 0.3, 0.1, 0.0]
PROSE = [0.4, 0.38, 0.3, 0.1]
NASTY = "<b>bold</b> & $x^2$ %{y}"


@pytest.fixture
def make_run(tmp_path):
    return maker(tmp_path)


@pytest.fixture
def forward(make_run):
    return make_run(CODE, PROSE)


@pytest.fixture
def reverse(make_run):
    return make_run([0.4, 0.2, 0.1, 0.0], [0.5, 0.45, 0.4, 0.1], tasks=("prose", "code"))


@pytest.fixture
def random(make_run):
    return make_run([0.5, 0.35, 0.15, 0.0], [0.4, 0.28, 0.12, 0.0], importance="random")


def traces(fig, **having):
    return [t for t in fig.data if all(getattr(t, key) == value for key, value in having.items())]


def lines_with_hover(fig):
    return [t for t in fig.data if t.hovertext is not None]


def numbers(values):
    return np.array(values, dtype=float)


def test_trajectory_is_relative_performance_with_forget_on_x(forward):
    fig = plots.trajectory(forward)
    (line,) = lines_with_hover(fig)
    np.testing.assert_allclose(numbers(line.x), np.array(CODE) / 0.5, atol=1e-4)
    np.testing.assert_allclose(numbers(line.y), np.array(PROSE) / 0.4, atol=1e-4)
    assert "code (forget)" in fig.layout.xaxis.title.text
    assert "prose (retain)" in fig.layout.yaxis.title.text
    (start,) = [t for t in fig.data if t.text == ("unpruned",)]
    assert (start.x, start.y) == ((1.0,), (1.0,))
    (diagonal,) = [t for t in fig.data if "not separable" in (t.name or "")]
    assert (diagonal.x, diagonal.y) == ((0.0, 1.0), (0.0, 1.0))


def test_trajectory_of_accuracies_themselves(forward):
    fig = plots.trajectory(forward, normalised=False)
    (line,) = lines_with_hover(fig)
    np.testing.assert_allclose(numbers(line.x), CODE, atol=1e-5)
    np.testing.assert_allclose(numbers(line.y), PROSE, atol=1e-5)
    (diagonal,) = [t for t in fig.data if "not separable" in (t.name or "")]
    np.testing.assert_allclose([diagonal.x[-1], diagonal.y[-1]], [0.5, 0.4])


def test_hover_names_step_neurons_and_both_accuracies_with_errors(forward):
    (line,) = lines_with_hover(plots.trajectory(forward))
    row = forward.trajectory.query("step == 2").set_index("role")
    text = line.hovertext[2]
    assert "step 2" in text
    assert "40 of 60 neurons pruned (66.7%)" in text
    for role, task in (("forget", "code"), ("retain", "prose")):
        assert row.loc[role, "top1_se"] > 0
        assert f"{role} {task}: {row.loc[role, 'top1']:.4g} ± {row.loc[role, 'top1_se']:.2g}" in text


def test_label_carries_separability_with_interval(forward, random):
    fig = plots.trajectory({"mine": forward, "random": random})
    names = [t.name for t in lines_with_hover(fig)]
    for label, run in (("mine", forward), ("random", random)):
        s = run.separability("top1")
        low, high = s.percent_interval
        assert f"{label}: {s.percent:.1f}% [{low:.1f}, {high:.1f}]" in names


def test_opposite_directions_share_the_plane_of_the_tasks(forward, reverse):
    fig = plots.trajectory([forward, reverse])
    by_name = {t.name.split(":")[0]: t for t in lines_with_hover(fig)}
    there, back = by_name["abs, forget code"], by_name["abs, forget prose"]
    np.testing.assert_allclose(numbers(there.x), np.array(CODE) / 0.5, atol=1e-4)
    # code is the second run's retain task and still on x
    np.testing.assert_allclose(numbers(back.x), np.array([0.5, 0.45, 0.4, 0.1]) / 0.5, atol=1e-4)
    np.testing.assert_allclose(numbers(back.y), np.array([0.4, 0.2, 0.1, 0.0]) / 0.4, atol=1e-4)
    for axis, task in ((fig.layout.xaxis, "code"), (fig.layout.yaxis, "prose")):
        assert task in axis.title.text
        assert "forget" not in axis.title.text
        assert "retain" not in axis.title.text


def test_a_run_is_not_more_or_less_separable_on_the_other_axis(reverse):
    """The label may use the run's own direction: turning the plane over gives 2 − A, and the percentage stays."""
    own, turned = reverse.separability("top1"), reverse.separability("top1", specific="retain")
    assert own.area + turned.area == pytest.approx(2)
    np.testing.assert_allclose(own.percent_interval, turned.percent_interval)


def test_runs_over_other_tasks_do_not_share_a_plane(forward, make_run):
    other = make_run(CODE, PROSE, tasks=("code", "music"))
    with pytest.raises(ValueError, match=r"different tasks.*'music'"):
        plots.trajectory([forward, other])


def test_nothing_to_be_relative_to(make_run):
    with pytest.raises(ValueError, match="unpruned model is 0 on code"):
        plots.trajectory(make_run([0.0, 0.0], [0.4, 0.1]))


def test_a_run_with_step_0_alone_is_a_point_without_percentage(make_run):
    (line,) = lines_with_hover(plots.trajectory(make_run([0.5], [0.4])))
    assert line.x == (1.0,)
    assert "%" not in line.name


@pytest.mark.parametrize("runs", [[], {}, "run", 3, ["run"]])
def test_what_is_no_run_is_refused(runs):
    with pytest.raises(TypeError, match="Run"):
        plots.trajectory(runs)


def test_unknown_metrics_are_refused_with_the_nearest_name(forward):
    for figure in (plots.trajectory, plots.metric_over_steps, plots.areas):
        with pytest.raises(ValueError, match="Did you mean 'top1"):
            figure(forward, "top_1")


def test_runs_are_called_after_what_tells_them_apart(make_run):
    runs = [make_run(CODE, PROSE, seed=seed, importance=importance) for seed, importance in ((0, "abs"), (1, "abs"), (0, "random"))]
    assert sorted(named(runs)) == ["abs, seed 0", "abs, seed 1", "random, seed 0"]
    same = [t.name.split(":")[0] for t in lines_with_hover(plots.trajectory([runs[0], runs[0]]))]
    assert len(set(same)) == 2


def test_seeds_of_one_method_are_their_mean_in_a_band(make_run):
    runs = [make_run([0.5, a, 0.0], [0.4, b, 0.2], seed=i) for i, (a, b) in enumerate([(0.3, 0.4), (0.2, 0.36), (0.1, 0.32)])]
    fig = plots.trajectory(runs)
    (line,) = lines_with_hover(fig)
    np.testing.assert_allclose(numbers(line.x), [1, 0.4, 0], atol=1e-5)
    np.testing.assert_allclose(numbers(line.y), [1, 0.9, 0.5], atol=1e-5)
    (band,) = traces(fig, fill="toself")
    np.testing.assert_allclose(numbers(band.y), [1, 1, 0.5, 0.5, 0.8, 1], atol=1e-5)
    assert "3 seeds" in line.name
    assert len(lines_with_hover(plots.trajectory({str(i): run for i, run in enumerate(runs)}))) == 3


def test_a_list_in_a_mapping_is_one_line_one_row_and_one_curve(make_run, forward):
    seeds = [make_run([0.5, a, 0.0], [0.4, b, 0.2], importance="random", seed=i) for i, (a, b) in enumerate([(0.3, 0.4), (0.1, 0.32)])]
    runs = {"selective": forward, "random": seeds}
    drawn = {t.name.split(":")[0]: t for t in lines_with_hover(plots.trajectory(runs))}
    assert sorted(drawn) == ["random", "selective"]
    np.testing.assert_allclose(numbers(drawn["random"].y), [1, 0.9, 0.5], atol=1e-5)
    of_seeds = [run.separability("top1").area for run in seeds]
    percents = [100 * (value - 1) for value in of_seeds]
    assert f"random: {np.mean(percents):.0f}% (seeds {min(percents):.0f} to {max(percents):.0f})" in drawn["random"].name
    rows = plots.areas(runs)
    (point,) = [t for t in lines_with_hover(rows) if t.name == "random"]
    assert point.x[0] == pytest.approx(np.mean(of_seeds), abs=1e-3)
    (dots,) = [t for t in rows.data if t.mode == "markers" and len(t.x) == 2]
    np.testing.assert_allclose(dots.x, of_seeds, atol=1e-3)
    curves = plots.metric_over_steps(runs, against="step")
    (curve,) = [t for t in lines_with_hover(curves) if t.name == "random" and t.yaxis == "y"]
    np.testing.assert_allclose(numbers(curve.y), [0.5, 0.2, 0.0], atol=1e-5)
    (band,) = [t for t in traces(curves, fill="toself", yaxis="y") if len(t.x) == 6]
    np.testing.assert_allclose(numbers(band.y), [0.5, 0.3, 0, 0, 0.1, 0.5], atol=1e-5)
    with pytest.raises(TypeError, match=r"every entry is a sepcap\.Run, or a list of runs"):
        plots.trajectory({"a": []})


def test_no_two_of_twelve_runs_look_alike(make_run):
    fig = plots.trajectory({f"m{i}": make_run([0.5, 0.1], [0.4, 0.3]) for i in range(12)})
    assert len({(t.line.color, t.marker.symbol) for t in lines_with_hover(fig)}) == 12


def test_metric_of_one_run_with_bands_of_its_standard_error(forward):
    fig = plots.metric_over_steps(forward)
    lines = {t.name: t for t in lines_with_hover(fig)}
    for role, task, values in (("forget", "code", CODE), ("retain", "prose", PROSE)):
        line = lines[f"{task} ({role})"]
        np.testing.assert_allclose(numbers(line.x), [0, 1 / 3, 2 / 3, 1], atol=1e-4)
        np.testing.assert_allclose(numbers(line.y), values, atol=1e-5)
        (band,) = traces(fig, fill="toself", legendgroup=line.legendgroup)
        errors = forward.trajectory.query(f"role == '{role}'")["top1_se"].to_numpy()
        upper, lower = numbers(band.y)[:4], numbers(band.y)[4:][::-1]
        np.testing.assert_allclose(upper - lower, 2 * errors, atol=1e-4)
        np.testing.assert_allclose((upper + lower) / 2, values, atol=1e-4)


def test_metric_of_several_runs_has_a_panel_per_task(forward, reverse):
    fig = plots.metric_over_steps([forward, reverse], "loss", against="step")
    assert [a.text for a in fig.layout.annotations] == ["code", "prose"]
    panels = {(t.name, t.xaxis): t for t in lines_with_hover(fig)}
    table = reverse.trajectory.query("task == 'code'").sort_values("step")
    drawn = panels["abs, forget prose", "x"]
    assert drawn.x == (0, 1, 2, 3)
    np.testing.assert_allclose(numbers(drawn.y), table["loss"], rtol=1e-4)
    assert len(panels) == 4
    assert "nats" in fig.layout.yaxis.title.text


def test_without_a_standard_error_there_is_no_band(make_run):
    run = make_run(CODE, PROSE, rows=1)
    assert run.trajectory["top1_se"].isna().all()
    fig = plots.metric_over_steps(run)
    assert not traces(fig, fill="toself")
    assert "standard error unknown" in lines_with_hover(fig)[0].hovertext[0]


def test_areas_are_those_of_the_runs(forward, reverse, random):
    runs = {"a": forward, "b": reverse, "r": random}
    fig = plots.areas(runs)
    points = {t.name: t for t in lines_with_hover(fig)}
    intervals = {t.y[0]: t.x for t in fig.data if t.hovertext is None}
    for label, run in runs.items():
        s = run.separability("top1")
        assert points[label].x[0] == pytest.approx(s.area, abs=1e-3)
        np.testing.assert_allclose(intervals[points[label].y[0]], s.interval, atol=1e-3)
        assert fig.layout.yaxis.ticktext[points[label].y[0]] == label
    assert any(shape.x0 == shape.x1 == 1 for shape in fig.layout.shapes)
    assert any("not separable" in a.text for a in fig.layout.annotations)
    low, high = fig.layout.xaxis.range
    assert all(low <= end <= high for interval in intervals.values() for end in interval)


def test_pruned_neurons_per_layer_step_and_site(make_run):
    run = make_run(CODE, PROSE, sites={"attn_pre_out": (3, 2, 3), "mlp": (3, 20)})
    fig = plots.pruned_neurons(run)
    maps = traces(fig, type="heatmap")
    assert len(maps) == 2
    assert ["MLP" in a.text for a in fig.layout.annotations] == [True, False]
    for site, each, drawn in (("mlp", 20, maps[0]), ("attn_pre_out", 6, maps[1])):
        table = run.pruned_per_layer.query(f"site == '{site}'").pivot(index="layer", columns="step", values="pruned").to_numpy()
        assert np.array_equal(drawn.customdata, table)
        np.testing.assert_allclose(drawn.z, table / each, atol=1e-4)
        assert f"of {each:,} neurons" in drawn.hovertemplate
    assert (fig.layout.coloraxis.cmin, fig.layout.coloraxis.cmax) == (0, 1)


def test_thresholds_are_those_recorded_on_a_logarithmic_axis(forward):
    fig = plots.thresholds(forward)
    (line,) = lines_with_hover(fig)
    assert line.x == (1, 2, 3)
    np.testing.assert_allclose(line.y, [10, 5, 10 / 3], rtol=1e-4)
    assert fig.layout.yaxis.type == "log"


def test_a_threshold_of_0_stays_in_the_picture(make_run):
    run = make_run(CODE, PROSE, thresholds=lambda site, step: [9.0, 3.0, 0.0][step - 1])
    fig = plots.thresholds(run)
    positive, zero = lines_with_hover(fig)
    assert (positive.x, positive.y) == ((1, 2), (9.0, 3.0))
    assert zero.x == (3,)
    assert "score 0<" in zero.hovertext[0]
    place = list(fig.layout.yaxis.tickvals).index(zero.y[0])
    assert fig.layout.yaxis.ticktext[place] == "0"
    assert fig.layout.yaxis.range[0] < np.log10(zero.y[0]) < np.log10(3.0)


def test_thresholds_that_are_not_positive_or_not_there(make_run, random):
    fig = plots.thresholds(make_run(CODE, PROSE, thresholds=lambda site, step: 1.0 - step))
    assert fig.layout.yaxis.type == "linear"
    np.testing.assert_allclose(lines_with_hover(fig)[0].y, [0, -1, -2])
    with pytest.raises(ValueError, match="random"):
        plots.thresholds(random)
    with pytest.raises(ValueError, match="no pruning step"):
        plots.thresholds(make_run([0.5], [0.4]))


def test_text_from_outside_is_shown_letter_by_letter(make_run):
    run = make_run(CODE, PROSE, tasks=(NASTY, "prose"))
    other = make_run(CODE, PROSE, tasks=(NASTY, "prose"), importance="random")
    figures = [
        plots.trajectory({NASTY: run}),
        plots.metric_over_steps([run, other]),
        plots.metric_over_steps(run),
        plots.areas({NASTY: run}),
    ]
    for fig in figures:
        # plotly's own way of reading: tags first, then entities; the template of layout.meta holds nothing from outside
        written = json.dumps(fig.to_plotly_json(), default=str)
        assert "<b>bold" not in written
        assert "%{y}" not in written
        assert "$" not in written
        assert "&lt;b&gt;bold" in written


def test_nothing_global_is_changed(forward):
    before = plotly.io.templates.default, sorted(plotly.io.templates)
    figures = [
        plots.trajectory(forward),
        plots.metric_over_steps(forward),
        plots.pruned_neurons(forward),
        plots.thresholds(forward),
        plots.areas(forward),
    ]
    assert (plotly.io.templates.default, sorted(plotly.io.templates)) == before
    for fig in figures:
        # nothing of the default theme is mixed in
        assert fig.layout.template.layout.plot_bgcolor == "white"
        assert fig.layout.template.layout.xaxis.gridcolor is None


def test_the_run_draws_itself(forward):
    for kind in ("trajectory", "metric", "pruned", "threshold"):
        assert len(forward.figure(kind).data) > 0


@pytest.mark.thorough
def test_a_long_run_stays_small(make_run):
    """Every step is written with few digits: 50 steps of 12 layers in tens of kilobytes."""
    steps = np.linspace(1, 0, 51)
    run = make_run(0.5 * steps**2 / 3 * np.pi / np.e, 0.4 * steps, sites={"mlp": (12, 50)}, rows=4)
    for fig in (plots.trajectory(run), plots.metric_over_steps(run), plots.pruned_neurons(run)):
        assert len(fig.to_json()) < 50_000
        # no number has more than seven significant digits
        written = json.dumps([trace.to_plotly_json() for trace in fig.data], default=list)
        assert not re.search(r"[1-9]\d{7}", written.replace(".", ""))
