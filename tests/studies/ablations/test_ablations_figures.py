"""Figures of ablations: what is drawn is what was measured."""

import dataclasses
import json
import re

import numpy as np
import pandas as pd
import plotly.io
import pytest
from planted_ablations import planted_config

from sepcap import plots
from sepcap.evaluation.result import COUNTS
from sepcap.studies.ablations.config import COMPARED
from sepcap.studies.ablations.heads import AblationComparison
from sepcap.studies.ablations.random_neurons import AblationSweep

N = 100.0


def rows_of(loss, top1, rows=20):
    """Sums per row with these means; rows differ from each other by a level of their own."""
    per_row = np.zeros((rows, len(COUNTS)))
    level = np.resize([-0.1, 0.1], rows)
    for name, value in {"n": 1.0, "loss": loss + level, "top1": top1}.items():
        per_row[:, COUNTS.index(name)] = N * value
    return per_row


def comparison(targets, kinds=COMPARED, unsure=(), rows=20):
    """Kind j on target i changes the loss by 0.01·(10·i + j), and top-1 by a tenth of its negative; unsure ones scatter around 0."""
    before = rows_of(2.0, 0.5, rows)
    per_row = np.stack(
        [[rows_of(2.0 + 0.01 * (10 * i + j), 0.5 - 0.001 * (10 * i + j), rows) for j in range(len(kinds))] for i in range(len(targets))]
    )
    for i, j in unsure:
        per_row[i, j] = before
        per_row[i, j, :, COUNTS.index("loss")] += N * np.resize([-0.2, -0.2, 0.2, 0.2], rows)
    config = planted_config(task="t", targets=targets, controls=0, kinds=kinds)
    return AblationComparison.of(config, before, per_row, np.arange(rows))


def grid(layers=2, heads=3):
    return [(layer, head) for layer in range(layers) for head in range(heads)]


def drawn(fig):
    return [t for t in fig.data if t.hovertext is not None]


def test_one_head_is_a_point_with_its_interval_per_kind():
    fig = plots.ablations(comparison([(3, 1)], unsure=[(0, 2)]))
    points, bars = drawn(fig), [t for t in fig.data if t.hoverinfo == "skip"]
    assert [t.name for t in points] == list(COMPARED)
    np.testing.assert_allclose([t.x[0] for t in points], [0, 0.01, 0, 0.03, 0.04, 0.05], atol=1e-9)
    ticks = dict(zip(fig.layout.yaxis.tickvals, fig.layout.yaxis.ticktext, strict=True))
    assert [ticks[t.y[0]] for t in points] == list(COMPARED)
    for point, bar in zip(points, bars, strict=True):
        assert bar.y == (point.y[0], point.y[0])
        assert bar.x[0] <= point.x[0] <= bar.x[1]
    assert bars[2].x[0] < 0 < bars[2].x[1]
    low, high = fig.layout.xaxis.range
    assert all(low < end < high for bar in bars for end in bar.x)
    for said in ("layer 3, head 1", "peak", "n 2,000"):
        assert said in points[3].hovertext[0]
    assert re.search(r"\+0\.030+ \[0\.030+, 0\.030+\]", points[3].hovertext[0])


def test_a_few_heads_stand_in_groups_with_their_names():
    fig = plots.ablations(comparison([(0, 0), (1, 2)], kinds=("zero", "resample")), "top1")
    points = drawn(fig)
    np.testing.assert_allclose([t.x[0] for t in points], [0, -0.001, -0.01, -0.011], atol=1e-9)
    heights = [t.y[0] for t in points]
    assert heights == sorted(heights, reverse=True)
    assert len(set(heights)) == 4
    names = {note.text: note.y for note in fig.layout.annotations if "ayer" in note.text}
    assert heights[1] < names["Layer 0, head 0"] == heights[0] + 1
    assert heights[2] < names["Layer 1, head 2"] < heights[1]


def test_a_neuron_set_has_a_figure_too():
    assert "neuron set, mean" in drawn(plots.ablations(comparison([None])))[1].hovertext[0]


@pytest.mark.parametrize("metric", ["loss", "top1"])
def test_many_heads_are_a_heat_map_per_kind_on_one_scale(metric):
    found = comparison(grid())
    fig = plots.ablations(found, metric)
    maps = [t for t in fig.data if t.type == "heatmap"]
    assert len(maps) == len(COMPARED)
    for kind, shown in zip(COMPARED, maps, strict=True):
        of_kind = found.table[found.table["kind"] == kind]
        z, ends = np.array(shown.z, dtype=float), np.array(shown.customdata, dtype=float)
        for _, row in of_kind.iterrows():
            assert z[row["layer"], row["head"]] == pytest.approx(row[f"delta_{metric}"], abs=1e-6)
            assert ends[row["layer"], row["head"]][:2] == pytest.approx([row[f"delta_{metric}_low"], row[f"delta_{metric}_high"]], abs=1e-6)
        assert kind in shown.hovertemplate
        assert shown.coloraxis == "coloraxis"
    axis = fig.layout.coloraxis
    # as far to either side of white, and not farther because of a few extreme heads
    assert -axis.cmin == axis.cmax == pytest.approx(np.quantile(np.abs(found.table[f"delta_{metric}"]), 0.95))
    assert axis.colorbar.ticktext[-1 if metric == "loss" else 0][0] in "≥≤"
    white = [colour for at, colour in axis.colorscale if axis.cmin + at * (axis.cmax - axis.cmin) == pytest.approx(0)]
    assert white == ["rgb(255, 255, 255)"]


def test_heads_that_were_not_asked_for_stay_empty_and_unsure_ones_get_a_dot():
    targets = [(0, 0), (0, 2), (1, 1), (3, 0), (3, 2)]
    fig = plots.ablations(comparison(targets, kinds=("zero", "mean"), unsure=[(2, 1)]))
    z = np.array([t.z for t in fig.data if t.type == "heatmap"], dtype=float)
    assert z.shape == (2, 4, 3)
    assert {tuple(cell) for cell in np.argwhere(np.isfinite(z[0]))} == set(targets)
    dots = {t.xaxis: list(zip(t.y, t.x, strict=True)) for t in fig.data if t.type == "scatter"}
    assert dots == {"x": [(0, 0)], "x2": [(1, 1)]}  # the first target's zero changes nothing at all


def test_a_model_of_many_heads_makes_a_small_file():
    found = comparison(grid(), rows=2)
    # planted, because a thousand heads have many intervals to compute
    table = pd.DataFrame([{"layer": layer, "head": head, "kind": kind} for layer, head in grid(32, 32) for kind in COMPARED])
    draw = np.random.default_rng(0).normal(size=len(table))
    for column, value in {"delta_loss": draw, "delta_loss_low": draw - 0.5, "delta_loss_high": draw + 0.5}.items():
        table[column] = value
    found = dataclasses.replace(found, tables={"ablations": table})
    assert len(plots.ablations(found).to_json()) < 300_000


def sweep(kinds=("zero", "mean"), seeds=(0, 1)):
    config = planted_config(task="<b>t</b>", site="attn_pre_out", steps=2, seeds=seeds, kinds=kinds, neurons=64)
    cells = [
        [[rows_of(2 + step * (1 + j) + 0.1 * s, 0.5 / (1 + step + j + s)) for j in range(len(kinds))] for step in (1, 2)]
        for s in range(len(seeds))
    ]
    return AblationSweep.of(config, rows_of(2.0, 0.5), np.array(cells), np.arange(20))


def test_the_sweep_is_a_line_per_kind_in_both_panels_within_its_band():
    result = sweep()
    fig = plots.ablation_sweep(result)
    lines, bands = drawn(fig), [t for t in fig.data if t.fill == "toself"]
    assert [(t.name, t.yaxis, t.showlegend) for t in lines] == [
        ("zero", "y", True),
        ("mean", "y", True),
        ("zero", "y2", False),
        ("mean", "y2", False),
        ("zero", "y3", False),
    ]
    for metric, (line, band) in zip(["top1", "top1", "loss", "loss"], zip(lines[:4], bands[:4], strict=True), strict=True):
        of_kind = result.table[result.table["kind"] == line.name].groupby("fraction")[metric]
        np.testing.assert_allclose(line.x, [0, 0.5, 1])
        np.testing.assert_allclose(line.y, of_kind.mean(), rtol=1e-4)
        np.testing.assert_allclose(band.y[:3], of_kind.max(), rtol=1e-4)
        np.testing.assert_allclose(band.y[3:], of_kind.min()[::-1], rtol=1e-4)
    by_seed = result.table.pivot(index="fraction", columns=["kind", "seed"], values="top1")
    paired = by_seed["zero"] - by_seed["mean"]
    np.testing.assert_allclose(lines[4].y, paired.mean(axis=1), rtol=1e-3, atol=1e-9)
    np.testing.assert_allclose(bands[4].y[:3], paired.max(axis=1), rtol=1e-3, atol=1e-9)
    assert "50% of 64 attention pre-out neurons" in lines[0].hovertext[1]
    assert "&lt;b&gt;" in fig.layout.legend.title.text


def test_a_kind_looks_the_same_in_both_figures():
    points = {t.name: t.marker.color for t in drawn(plots.ablations(comparison([(0, 0)])))}
    for line in drawn(plots.ablation_sweep(sweep(kinds=("peak", "zero")))):
        assert line.line.color == points[line.name]


@pytest.mark.parametrize("width", ["column", "page"])
def test_the_figures_are_plain_data(width):
    for fig in (plots.ablations(comparison(grid()), width=width), plots.ablation_sweep(sweep(seeds=(4,)), width=width)):
        assert json.loads(plotly.io.to_json(fig))["layout"]["width"] == pytest.approx({"column": 380.2, "page": 794.9}[width], abs=1)


def test_other_metrics_are_refused():
    with pytest.raises(ValueError, match="Did you mean 'top1'"):
        plots.ablations(comparison(grid()), "top10")
