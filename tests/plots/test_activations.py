"""Activation distributions against numpy histograms of the activations themselves."""

import numpy as np
import pytest
import torch

import sepcap
from sepcap import plots
from sepcap.statistics.histogram import BINS, Histogram, grid_of
from sepcap.statistics.moments import SUMS, NeuronStatistics, Statistics

COUNT = 2048


def statistics(task, z, site="attn_pre_out", **info):
    """Exact statistics of activations z [position, layer, *neuron] that lie in the middle of the histogram's bins."""
    low, high = z.amin(0), z.amax(0)
    grid = grid_of(low, high)
    index = torch.floor(z * 2.0 ** -grid.exponent.double()) - grid.start
    counts = torch.stack([(index == b).sum(0) for b in range(BINS)], dim=-1).int()
    terms = {"positive": z > 0, "total": z, "absolute": z.abs(), "root": z.abs().sqrt(), "deviation": (z - z.mean(0)).square()}
    sums = {name: terms[name].double().sum(0) for name in SUMS}
    return Statistics({site: NeuronStatistics(site, len(z), sums, low, high, Histogram(counts, *grid, low, high))}, {"task": task, **info})


def activations(seed, shape, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn((COUNT, *shape), generator=generator, dtype=torch.float64)


@pytest.fixture
def pair():
    z = [activations(0, (2, 2, 12)), activations(1, (2, 2, 12), 0.5) + 0.25]
    return z, [statistics(task, values) for task, values in zip(("code", "prose"), z, strict=True)]


def lines(fig, name, axis="x"):
    return [t for t in fig.data if t.name == name and t.xaxis == axis and t.mode == "lines"]


def steps(trace):
    """Edges and densities of an outline."""
    density = np.array(trace.customdata)[:-1]
    return float(trace.x0) + float(trace.dx) * np.arange(len(density) + 1), density


def test_panels_are_the_histograms_of_both_tasks_in_the_same_bins(pair):
    z, (forget, retain) = pair
    fig = plots.activation_distributions(forget, retain, layer=1, head=0, neurons=[3, 7], bins=20)
    for axis, neuron in (("x", 3), ("x2", 7)):
        both = [values[:, 1, 0, neuron].numpy() for values in z]
        edges = np.linspace(min(v.min() for v in both), max(v.max() for v in both), 21)
        for values, task in zip(both, ("code", "prose"), strict=True):
            (trace,) = lines(fig, task, axis)
            drawn, density = steps(trace)
            np.testing.assert_allclose(drawn, edges, atol=1e-5)
            expected = np.histogram(values, edges, density=True)[0]
            # the histogram has 512 bins or more over the range: one of its bins at each edge may be divided
            np.testing.assert_allclose(density, expected, atol=0.012)
            assert (density * np.diff(edges)).sum() == pytest.approx(1, abs=1e-5)
            assert f"neuron {neuron}" in trace.hovertemplate
            assert "layer 1, head 0" in trace.hovertemplate
            heights = np.array(trace.y)[:-1]
            np.testing.assert_allclose(heights[density > 0], density[density > 0], rtol=1e-6)
            key = axis.replace("x", "yaxis")
            assert (np.log10(heights[density == 0]) < fig.layout[key].range[0]).all()
            assert (np.log10(heights[density > 0]) > fig.layout[key].range[0]).all()


def test_mean_peak_and_zero_are_marked(pair):
    z, (forget, retain) = pair
    fig = plots.activation_distributions(forget, retain, layer=0, head=1, neurons=[5])
    for task in range(2):
        values = z[task][:, 0, 1, 5].numpy()
        counts, edges = np.histogram(values, 100)
        # near ties may fall either way by the divided bins
        peak = fig.data[3 * task + 1]
        at = int((peak.x[0] - edges[0]) / (edges[1] - edges[0]))
        assert counts[at] >= counts.max() - 3
        mean = fig.data[3 * task + 2]
        assert mean.x == pytest.approx((values.mean(), values.mean()))
        assert (peak.name, mean.name) == ("peak", "mean")
    (zero,) = fig.layout.shapes
    assert (zero.x0, zero.x1) == (0, 0)


def test_zero_is_in_sight_where_no_activation_is_near():
    z = [activations(seed, (1, 3), 0.1) + 5 for seed in (0, 1)]
    fig = plots.activation_distributions(*(statistics(t, v, "mlp") for t, v in zip("ab", z, strict=True)), layer=0, neurons=[2])
    assert fig.layout.xaxis.range[0] < 0


def test_a_head_is_a_row_per_neuron_and_all_together(pair):
    z, (forget, retain) = pair
    fig = plots.activation_distributions(forget, retain, layer=1, head=1, bins=30)
    heats = [t for t in fig.data if t.type == "heatmap"]
    both = [values[:, 1, 1].numpy() for values in z]
    edges = np.linspace(min(v.min() for v in both), max(v.max() for v in both), 31)
    for heat, values, task in zip(heats, both, ("code", "prose"), strict=True):
        expected = np.stack([np.histogram(neuron, edges, density=True)[0] for neuron in values.T])
        shown = np.nan_to_num(10 ** np.array(heat.z, dtype=np.float64))
        np.testing.assert_allclose(shown, expected, atol=0.012)
        assert heat.x0 == pytest.approx((edges[0] + edges[1]) / 2)
        assert list(heat.y) == [str(i) for i in range(12)]
        (pooled,) = lines(fig, task)
        np.testing.assert_allclose(steps(pooled)[1], shown.mean(0), rtol=1e-4, atol=1e-7)
        (mean,) = [t for t in fig.data if t.name == "mean" and t.xaxis == heat.xaxis]
        np.testing.assert_allclose(mean.x, values.mean(0), rtol=1e-4)
        (peak,) = [t for t in fig.data if t.name == "peak" and t.xaxis == heat.xaxis]
        stats = (forget if task == "code" else retain)["attn_pre_out"]
        np.testing.assert_allclose(peak.x, stats.peak[1, 1].numpy(), rtol=1e-4)
    assert len(fig.layout.shapes) == 3  # zero in every panel


def test_both_bases_side_by_side(pair):
    z, (forget, retain) = pair
    turned = [statistics(t, 3 * v, rotation="r") for t, v in zip(("code", "prose"), z, strict=True)]
    fig = plots.activation_distributions(forget, retain, layer=0, head=0, neurons=[4], rotated=tuple(turned))
    original, rotated = steps(lines(fig, "code")[0]), steps(lines(fig, "code", "x2")[0])
    np.testing.assert_allclose(rotated[0], 3 * original[0], rtol=1e-5)
    assert fig.layout.xaxis.domain[1] < fig.layout.xaxis2.domain[0]
    whole = plots.activation_distributions(forget, retain, layer=0, head=0, rotated=tuple(turned))
    assert [t.xaxis for t in whole.data if t.type == "heatmap"] == ["x2", "x3", "x5", "x6"]
    assert {"Original basis", "Rotated basis"} <= {a.text for a in whole.layout.annotations}


def test_a_constant_neuron_has_one_bin():
    still = [statistics(t, torch.full((50, 1, 2), v, dtype=torch.float64), "mlp") for t, v in (("a", 2.0), ("b", 2.0))]
    fig = plots.activation_distributions(*still, layer=0, neurons=[0], bins=10)
    edges, density = steps(fig.data[0])
    assert (density > 0).sum() == 1
    at = int(np.flatnonzero(density)[0])
    assert edges[at] <= 2 <= edges[at + 1]


@pytest.mark.thorough
def test_large_heads_make_small_figures():
    z = [activations(seed, (1, 1, 128)) for seed in (0, 1)]
    stats = [statistics(t, v) for t, v in zip(("a", "b"), z, strict=True)]
    turned = tuple(statistics(t, v, rotation="r") for t, v in zip(("a", "b"), z, strict=True))
    fig = plots.activation_distributions(*stats, layer=0, head=0, rotated=turned)
    assert len(fig.to_json()) < 300_000
    assert len([t for t in fig.data if t.type == "heatmap"]) == 4


def test_names_of_tasks_are_shown_letter_by_letter(pair):
    z, _ = pair
    stats = [statistics(t, v) for t, v in zip(("<script>", "%{y}"), z, strict=True)]
    for neurons in ([1], None):
        text = plots.activation_distributions(*stats, layer=0, head=0, neurons=neurons).to_plotly_json()
        assert "<script>" not in str(text)
        assert "&lt;script&gt;" in str(text)


def test_real_statistics_in_both_bases(tiny_opt, letters, digits):
    rotation = sepcap.interventions.rotation.compute_rotation(tiny_opt)
    original, rotated = (
        [sepcap.collect(tiny_opt, t, tokens=300, sites="attn_value", histogram=True, rotation=r) for t in (letters, digits)]
        for r in (None, rotation)
    )
    fig = plots.activation_distributions(*original, layer=1, head=2, neurons=[0, 7], site="attn_value", rotated=tuple(rotated))
    for i, stats in ((0, original), (1, rotated)):
        trace = fig.data[6 * i]
        values = stats[0]["attn_value"]
        assert steps(trace)[0][0] <= float(values.low[1, 2, 0]) + 1e-6
        assert fig.data[6 * i + 2].x[0] == pytest.approx(float(values.mean[1, 2, 0]))


def test_bad_input(pair):
    _, (forget, retain) = pair
    draw = plots.activation_distributions
    for error, match, options in (
        (IndexError, "layer: 2 does not exist", {"layer": 2, "head": 0}),
        (IndexError, "head: -1 does not exist", {"layer": 0, "head": -1}),
        (IndexError, "neurons: 12 does not exist.*0 to 11", {"layer": 0, "head": 0, "neurons": [3, 12]}),
        (ValueError, "neurons: 0 of them", {"layer": 0, "head": 0, "neurons": []}),
        (ValueError, "2 heads, give one", {"layer": 0, "site": "attn_pre_out"}),
        (ValueError, "Collect it too", {"layer": 0}),
        (ValueError, "bins=1", {"layer": 0, "head": 0, "bins": 1}),
        (ValueError, "same rotation", {"layer": 0, "head": 0, "rotated": (forget, retain)}),
    ):
        with pytest.raises(error, match=match):
            draw(forget, retain, **options)
    turned = [Statistics(dict(s), s.info | {"rotation": "r"}) for s in (retain, forget)]
    with pytest.raises(ValueError, match=r"rotated: statistics of \['prose', 'code'\]"):
        draw(forget, retain, layer=0, head=0, rotated=tuple(turned))
    mlp = statistics("a", activations(0, (1, 20)), "mlp")
    with pytest.raises(ValueError, match="no heads"):
        draw(mlp, mlp, layer=0, head=0, site="mlp")
    with pytest.raises(ValueError, match="up to 256 of the 20 neurons"):
        draw(mlp, mlp, layer=0)


def test_without_histograms_it_is_said_how_to_get_them(pair):
    import dataclasses

    _, (forget, retain) = pair
    bare = Statistics({"attn_pre_out": dataclasses.replace(forget["attn_pre_out"], histogram=None)}, forget.info)
    with pytest.raises(ValueError, match="histogram=True"):
        plots.activation_distributions(bare, retain, layer=0, head=0)
