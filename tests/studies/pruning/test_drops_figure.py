"""Drop against drop, perplexity against perplexity, and perplexity relative to the unpruned model."""

import json

import numpy as np
import pandas as pd
import plotly.io
import pytest
from planted_runs import maker

from sepcap import plots
from sepcap.studies.pruning.figures.drops import drop_against_drop, perplexity_against_perplexity
from sepcap.studies.pruning.run import Run

CODE = [0.5, 0.3, 0.1, 0.0]
PROSE = [0.4, 0.38, 0.3, 0.1]
NASTY = "<b>bold</b> & $x^2$ %{y}"


def perplexity(accuracies):
    """The planted runs have a cross-entropy of 8 − 6·accuracy."""
    return np.exp(8 - 6 * np.array(accuracies))


@pytest.fixture
def make_run(tmp_path):
    return maker(tmp_path)


@pytest.fixture
def run(make_run):
    return make_run(CODE, PROSE)


def lines_of(fig):
    return {t.name: t for t in fig.data if t.hovertext is not None}


def guide_of(fig):
    (guide,) = [t for t in fig.data if "not separable" in (t.name or "")]
    return guide


def numbers(values):
    return np.array([np.nan if v is None else v for v in values], dtype=float)


def test_perplexity_ratio_is_relative_to_the_unpruned_model_on_the_same_task(run):
    table = run.trajectory.set_index(["role", "step"])
    for role, values in (("forget", CODE), ("retain", PROSE)):
        np.testing.assert_allclose(table.loc[role, "perplexity_ratio"], np.exp(6 * (values[0] - np.array(values))), rtol=1e-9)
    np.testing.assert_allclose(run.trajectory["perplexity_ratio"][:2], 1)
    # a table that was written before there was such a column is made anew
    path = run.folder / "trajectory.parquet"
    pd.read_parquet(path).drop(columns="perplexity_ratio").to_parquet(path)
    assert Run(run.folder).trajectory["perplexity_ratio"].equals(run.trajectory["perplexity_ratio"])
    assert "perplexity_ratio" in Run(run.folder).trajectory


def test_drops_are_percent_of_the_unpruned_accuracy_with_retain_on_x(run):
    fig = drop_against_drop(run)
    (line,) = lines_of(fig).values()
    np.testing.assert_allclose(numbers(line.y), [0, 40, 80, 100], atol=1e-3)
    np.testing.assert_allclose(numbers(line.x), [0, 5, 25, 75], atol=1e-3)
    guide = guide_of(fig)
    assert guide.x == guide.y
    assert fig.layout.xaxis.range == fig.layout.yaxis.range
    assert fig.layout.xaxis.range[0] < 0
    assert fig.layout.xaxis.range[1] >= 100
    assert fig.layout.yaxis.title.text == "Drop in top-1 accuracy, code (forget) (%)"
    assert "prose (retain)" in fig.layout.xaxis.title.text
    assert "dropped by 80.0% (forget) and 25.0% (retain): +55.0 points" in line.hovertext[2]
    assert "step 2" in line.hovertext[2]


def test_the_legend_carries_the_maximum_differential_drop(run, make_run):
    random = make_run([0.5, 0.35, 0.15, 0.0], [0.4, 0.24, 0.16, 0.0], importance="random")
    names = list(lines_of(drop_against_drop({"mine": run, "random": random})))
    for label, one in (("mine", run), ("random", random)):
        s = one.separability("top1")
        low, high = s.max_drop_interval
        assert f"{label}: {s.max_drop:.1f} [{low:.1f}, {high:.1f}] at step 2" in names
        assert s.max_drop == pytest.approx({"mine": 55, "random": 10}[label], abs=2)
    alone = make_run([0.5], [0.4])
    assert list(lines_of(drop_against_drop({"alone": alone}))) == ["alone"]


def test_a_task_that_gets_better_stays_in_the_picture(make_run):
    fig = drop_against_drop(make_run([0.5, 0.4], [0.4, 0.5]))
    (line,) = lines_of(fig).values()
    assert numbers(line.x)[1] == pytest.approx(-25)
    assert fig.layout.xaxis.range[0] < -25


@pytest.mark.parametrize("relative", [False, True])
def test_perplexities_on_axes_of_equally_many_decades(run, make_run, relative):
    other = make_run([0.6, 0.2], [0.3, 0.29], tasks=("code", "poems"))
    fig = perplexity_against_perplexity({"a": run, "b": other}, relative=relative)
    for label, code, prose in (("a", CODE, PROSE), ("b", [0.6, 0.2], [0.3, 0.29])):
        line = lines_of(fig)[label]
        x, y = perplexity(prose), perplexity(code)
        np.testing.assert_allclose(numbers(line.x), x / (x[0] if relative else 1), rtol=1e-4)
        np.testing.assert_allclose(numbers(line.y), y / (y[0] if relative else 1), rtol=1e-4)
    x_axis, y_axis = fig.layout.xaxis, fig.layout.yaxis
    assert (x_axis.type, y_axis.type) == ("log", "log")
    assert np.diff(x_axis.range) == pytest.approx(np.diff(y_axis.range))
    for axis, name in ((x_axis, "x"), (y_axis, "y")):
        values = np.concatenate([numbers(getattr(t, name)) for t in lines_of(fig).values()])
        assert axis.range[0] < np.log10(values.min()) < np.log10(values.max()) < axis.range[1]
        assert len(axis.tickvals) >= 2
        assert all(axis.range[0] <= np.log10(tick) <= axis.range[1] for tick in axis.tickvals)
    # along the guide both grow by one factor, from every unpruned model on
    x, y = numbers(guide_of(fig).x), numbers(guide_of(fig).y)
    starts = np.flatnonzero(np.r_[True, np.isnan(x[:-1])])
    np.testing.assert_allclose(x[starts + 1] / x[starts], y[starts + 1] / y[starts])
    short_of = np.stack([axis.range[1] - np.log10(v[starts + 1]) for axis, v in ((x_axis, x), (y_axis, y))])
    np.testing.assert_allclose(short_of.max(axis=0), 0, atol=1e-9)  # and it ends where it has left the picture
    drawn = {(round(float(t.x[0]), 2), round(float(t.y[0]), 2)) for t in lines_of(fig).values()}
    assert {(round(float(x[i]), 2), round(float(y[i]), 2)) for i in starts} == drawn
    assert len(starts) == (1 if relative else 2)
    assert "code (forget)" in y_axis.title.text
    assert "poems" not in x_axis.title.text
    assert ("Relative" in x_axis.title.text) is relative
    assert f"perplexity (forget) {perplexity(CODE)[1]:.4g}, ×{np.exp(6 * 0.2):.4g}" in lines_of(fig)["a"].hovertext[1]


def test_an_infinite_perplexity_leaves_a_gap(run, make_run, monkeypatch):
    from sepcap.studies.pruning.figures import drops

    series = drops.series

    def ruined(run, role, metric):
        values, errors = series(run, role, metric)
        return np.where(np.arange(len(values)) == 3, 1000.0, values), errors

    monkeypatch.setattr(drops, "series", ruined)
    fig = perplexity_against_perplexity(run)
    (line,) = lines_of(fig).values()
    assert line.x[3] is None
    assert np.isfinite(fig.layout.xaxis.range).all()


def test_ticks_are_written_as_people_write_them(make_run):
    for span, texts in ((0.02, None), (0.3, {"200", "500", "1,000"}), (1.0, {"1,000"})):
        fig = perplexity_against_perplexity(make_run([0.5, 0.5 - span / 2], [0.5, 0.5 - span / 2]))
        axis = fig.layout.xaxis
        assert 2 <= len(axis.tickvals) <= 7
        for value, text in zip(axis.tickvals, axis.ticktext, strict=True):
            assert float(text.replace(",", "")) == pytest.approx(value, rel=5e-3)
        assert texts is None or texts & set(axis.ticktext)


def test_what_cannot_be_drawn_is_refused(run, make_run):
    with pytest.raises(ValueError, match="Did you mean 'top1"):
        drop_against_drop(run, "top_1")
    with pytest.raises(ValueError, match="unpruned model is 0 on code"):
        drop_against_drop(make_run([0.0, 0.0], [0.4, 0.1]))
    for figure in (drop_against_drop, perplexity_against_perplexity):
        with pytest.raises(TypeError, match="Run"):
            figure([])


def test_text_from_outside_is_shown_letter_by_letter_and_nothing_global_changes(make_run):
    before = plotly.io.templates.default, sorted(plotly.io.templates)
    run = make_run(CODE, PROSE, tasks=(NASTY, NASTY))
    for fig in (drop_against_drop({NASTY: run}), perplexity_against_perplexity({NASTY: run}, width="page")):
        written = json.dumps(fig.to_plotly_json(), default=str)
        assert "<b>bold" not in written
        assert "%{y}" not in written
        assert "$" not in written
        assert "&lt;b&gt;bold" in written
        assert fig.layout.template.layout.plot_bgcolor == "white"
    assert (plotly.io.templates.default, sorted(plotly.io.templates)) == before


@pytest.mark.thorough
def test_a_long_run_stays_small(make_run, tmp_path):
    steps = np.linspace(1, 0, 51)
    run = make_run(0.5 * steps**2 / 3 * np.pi / np.e, 0.4 * steps, rows=4)
    for fig in (drop_against_drop(run), perplexity_against_perplexity(run)):
        assert len(fig.to_json()) < 50_000
    assert plots.save(fig, tmp_path / "p.html").exists()
