"""Histograms against the stored activations: the exact 100-bin histogram, order statistics, and the laws of merging (METHODS 3, 8)."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sepcap
from sepcap.statistics.accumulate import Accumulator, gather
from sepcap.statistics.histogram import BINS, PEAK_BINS, Histogram, check_count
from sepcap.statistics.moments import NeuronStatistics, Statistics
from sepcap.storage import load_tensors, save_tensors


def accumulate(*batches: torch.Tensor) -> NeuronStatistics:
    """Statistics with histograms of batches [batch, pos, neuron], all positions kept."""
    accumulator = Accumulator((batches[0].shape[2],), torch.device("cpu"), histogram=True)
    for z in batches:
        accumulator.update(z, torch.ones(z.shape[:2], dtype=torch.bool))
    return gather("mlp", [accumulator])


def in_batches(z: torch.Tensor, n: int = 4) -> list[torch.Tensor]:
    """Stored activations [position, neuron] as n batches of one row."""
    return [part[None] for part in z.tensor_split(n) if len(part)]


def exact_peak(z: np.ndarray) -> tuple[float, np.ndarray]:
    """Centre of the fullest of 100 bins over [min, max], and the counts."""
    counts, edges = np.histogram(z, bins=PEAK_BINS, range=(z.min(), z.max()))
    fullest = int(counts.argmax())
    return (edges[fullest] + edges[fullest + 1]) / 2, counts


def assert_equal(one: Histogram | None, other: Histogram | None) -> None:
    assert one is not None
    assert other is not None
    for name in ("counts", "exponent", "start", "low", "high"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name


# Peak, median and quantiles of hard distributions


def mixture(*parts: tuple[int, float, float]) -> torch.Tensor:
    """Normal samples (how many, mean, standard deviation), shuffled."""
    generator = torch.Generator().manual_seed(1)
    z = torch.cat([mean + std * torch.randn(n, generator=generator) for n, mean, std in parts])
    return z[torch.randperm(len(z), generator=generator)]


def hard_cases() -> dict[str, torch.Tensor]:
    clear = mixture((1500, 1.0, 1.0), (700, 1.3, 0.01))  # which bin of a bell is the fullest is chance; here it is not
    relu = mixture((5000, -2.0, 1.5)).clamp_min(0) ** 2  # two thirds and more are zero, the tail is long
    return {
        "two modes": mixture((3000, -3.0, 0.2), (2000, 4.0, 0.5)),
        "two narrow modes": mixture((2600, -1.0, 1e-5), (2400, 1.237, 1e-5), (10, 0.0, 1.0)),
        # an edge of the 100 bins lies at 0.35, inside of the fine bin that holds the fullest value
        "three values": torch.tensor([-1.0, 0.349, 2.0]).repeat_interleave(torch.tensor([350, 400, 250])),
        "ReLU": relu,
        "leaky spike": torch.cat([torch.zeros(600), mixture((1000, -0.3, 1.0))]),
        "always zero": torch.zeros(700),
        "constant": torch.full((700,), -7.3),
        "two neighbouring numbers": torch.tensor([5.0, np.nextafter(np.float32(5), np.float32(6))]).repeat_interleave(torch.tensor([3, 4])),
        "one far outlier": torch.cat([mixture((2000, 1.0, 0.1)), torch.tensor([1e6])]),
        "outlier first": torch.cat([torch.tensor([-3e7]), mixture((2000, 1.0, 0.1))]),
        "far from zero": 1e4 + 0.05 * clear,
        "tiny": 1e-30 * clear,
        "huge": 1e17 * clear,
        "bfloat16": mixture((3000, 2.0, 1.0)).to(torch.bfloat16),
        "bfloat16 ReLU": relu.to(torch.bfloat16),
        "float16": clear.half(),
        "float64": 3 + 1e-9 * clear.double(),
        "one position": torch.tensor([0.7]),
        "two positions": torch.tensor([0.7, -0.1]),
    }


@pytest.mark.parametrize("case", hard_cases())
def test_peak_median_and_quantiles_lie_within_one_bin_of_the_exact_histogram(case):
    z = hard_cases()[case]
    stored = z.double().numpy()
    bin_width = (stored.max() - stored.min()) / PEAK_BINS
    slack = bin_width * (1 + 1e-6)
    s = accumulate(*in_batches(z[:, None]))
    peak, _ = exact_peak(stored) if bin_width > 0 else (stored[0], None)
    assert abs(float(s.peak) - peak) <= slack
    assert abs(float(s.median) - np.median(stored)) <= slack
    for q in (0, 0.001, 0.1, 0.25, 0.9, 0.999, 1):
        assert abs(float(s.quantile(q)) - np.quantile(stored, q)) <= slack
    assert float(s.quantile(0)) == stored.min()
    assert float(s.quantile(1)) == stored.max()


def test_a_spike_is_exact_where_more_than_half_are_zero():
    s = accumulate(*in_batches(hard_cases()["ReLU"][:, None]))
    assert float(s.median) == 0
    assert float(s.quantile(0.6)) == 0
    assert float(accumulate(torch.full((1, 9, 1), -7.3)).median) == float(torch.tensor(-7.3))


def test_of_equally_full_bins_the_lowest_is_the_peak():
    s = accumulate(torch.tensor([0.0, 0.0, 1.0, 1.0, 0.4]).view(1, 5, 1))
    assert float(s.peak) == pytest.approx(1 / 200)


def test_every_neuron_has_bins_of_its_own():
    """Neurons of a layer, heads and layers that differ by many orders of magnitude do not touch one another."""
    scales = torch.tensor([1e-12, 1.0, 300.0, 1e9, 0.0, 1e-3])
    z = mixture((1200, 0.5, 1.0))[:, None] * scales + torch.tensor([0, 0, 1e4, 0, 2.0, -5.0])
    together = accumulate(*in_batches(z))
    for neuron in range(len(scales)):
        alone = accumulate(*in_batches(z[:, neuron : neuron + 1]))
        assert float(together.peak[0, neuron]) == float(alone.peak)
        assert float(together.median[0, neuron]) == float(alone.median)


# Densities


def test_density_is_the_share_of_positions_in_each_bin():
    z = mixture((4000, 0.0, 1.0), (1000, 6.0, 0.5))
    s = accumulate(*in_batches(torch.stack([z, z.abs()], dim=1)))
    histogram = s.require_histogram()
    for neuron, stored in enumerate((z, z.abs())):
        edges = np.linspace(-5.0, 9.0, 41)
        got = histogram.density(0, (neuron,), edges)
        want = np.histogram(stored.numpy(), edges)[0] / len(stored)
        assert got.sum() == pytest.approx(1)
        # an edge moves at most the activations within one fine bin of it
        width = float(histogram.width[0, neuron])
        near = np.array([(np.abs(stored.numpy() - edge) < width).mean() for edge in edges])
        assert bool((np.abs(got - want) <= near[:-1] + near[1:] + 1e-12).all())
    half = histogram.density(0, (0,), np.array([0.0, 2.0]))  # what lies outside the edges does not count
    assert float(half.sum()) == pytest.approx(float(((z > 0) & (z < 2)).float().mean()), abs=0.01)


def test_density_of_single_values_is_exact():
    values = torch.tensor([0.0, 0.5, 1.0]).repeat_interleave(torch.tensor([5, 3, 2]))
    histogram = accumulate(values.view(1, -1, 1)).require_histogram()
    np.testing.assert_allclose(histogram.density(0, (0,), np.array([0.0, 0.25, 0.5, 1.0])), [0.5, 0, 0.5])
    np.testing.assert_allclose(histogram.density(0, (0,), np.array([-1.0, 0.0, 0.1, 0.9])), [0, 0.5, 0.3])


def test_density_of_a_head_and_what_it_refuses(tiny_opt, letters):
    statistics = sepcap.collect(tiny_opt, letters, tokens=100, sites="attn_value", histogram=True)["attn_value"]
    histogram, edges = statistics.require_histogram(), np.array([-100.0, 100.0])
    assert histogram.density(1, (3, 7), edges) == pytest.approx([1.0])
    for index in ((4, 0), (0, 8), (0,)):
        with pytest.raises(IndexError, match=r"this site has neurons \[2, 4, 8\]"):
            histogram.density(0, index, edges)
    for bad in (np.array([0.0]), np.array([1.0, 0.0])):
        with pytest.raises(ValueError, match="at least two increasing numbers"):
            histogram.density(0, (0, 0), bad)


# One pass, in any order and in any shards

numbers = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, 2.0**-40, 1e15]), st.floats(-(2.0**59), 2.0**59, width=32), st.floats(-4, 4, width=32)
)


@settings(max_examples=40, deadline=None)
@given(st.lists(numbers, min_size=1, max_size=40), st.data())
def test_the_result_depends_on_the_activations_and_not_on_how_they_came(values, data):
    z = torch.tensor(values)
    # closer to zero than 2⁻⁶⁰ of the largest, a product with the bin width may round to zero
    z = torch.where(z.abs() < 2.0**-60, 0, z)
    whole = accumulate(z.view(1, -1, 1)).require_histogram()
    shuffled = torch.tensor(data.draw(st.permutations(z.tolist())))
    cuts = sorted(data.draw(st.lists(st.integers(1, max(1, len(values) - 1)), max_size=4, unique=True)))
    parts = [part.view(1, -1, 1) for part in shuffled.tensor_split(cuts) if len(part)]
    assert_equal(accumulate(*parts).histogram, whole)
    shards = [accumulate(part) for part in parts]
    forwards, backwards = shards[0], shards[-1]
    for shard in shards[1:]:
        forwards = forwards.merge(shard)
    for shard in reversed(shards[:-1]):
        backwards = shard.merge(backwards)
    assert_equal(forwards.histogram, whole)
    assert_equal(backwards.histogram, whole)
    # and the one pass is right: every activation is counted in the bin it lies in
    width, start = float(whole.width), int(whole.start)
    expected = torch.zeros(BINS, dtype=torch.int64)
    for value in z.tolist():
        expected[math.floor(value / width) - start] += 1
    assert whole.counts.flatten().tolist() == expected.tolist()


def test_shards_without_positions_merge_to_what_the_others_hold():
    z = mixture((300, 2.0, 1.0)).view(1, -1, 1)
    empty, full = accumulate(torch.zeros(0, 5, 1)), accumulate(z)
    for merged in (empty.merge(full), full.merge(empty)):
        assert_equal(merged.histogram, full.histogram)
    both = empty.merge(empty)
    assert both.count == 0
    with pytest.raises(ValueError, match="hold no positions: the distribution is undefined"):
        _ = both.peak


def test_a_range_that_grows_by_every_batch_loses_nothing():
    """From one part in a million of the final range upwards: bins double about twenty times."""
    batches = [mixture((200, 0.0, 1.0)).view(1, -1, 1) * 4.0**step * 1e-6 for step in range(12)]
    grown = accumulate(*batches)
    assert_equal(grown.histogram, accumulate(torch.cat(batches, dim=1)).histogram)
    stored = torch.cat(batches, dim=1).flatten().double().numpy()
    assert abs(float(grown.peak) - exact_peak(stored)[0]) <= (stored.max() - stored.min()) / PEAK_BINS


def test_several_threads_count_the_same():
    z = torch.randn(3, 300, 200)  # several blocks of neurons, the last one not full
    one = accumulate(z)
    torch.set_num_threads(2)
    assert_equal(accumulate(z).histogram, one.histogram)


def test_activations_in_inference_mode_are_counted_outside_of_it():
    with torch.inference_mode():
        inside = accumulate(torch.ones(1, 5, 1), torch.zeros(1, 5, 1))
    assert_equal(inside.histogram, accumulate(torch.tensor([1.0, 0.0]).repeat(5).view(1, 10, 1)).histogram)


def test_memory_does_not_depend_on_the_number_of_positions():
    def held(*batches: torch.Tensor) -> int:
        accumulator = Accumulator((3,), torch.device("cpu"), histogram=True)
        for z in batches:
            accumulator.update(z, torch.ones(z.shape[:2], dtype=torch.bool))
        assert accumulator.counter is not None
        return sum(
            x.untyped_storage().nbytes() for x in (*vars(accumulator.counter).values(), *accumulator.counter.grid) if torch.is_tensor(x)
        )

    z = torch.randn(8, 200, 3)
    assert held(z[:1, :5]) == held(z, z * 100, z * 1e4)
    assert accumulate(z[:1, :5]).require_histogram().counts.shape == accumulate(z, z * 1e4).require_histogram().counts.shape == (1, 3, BINS)


def test_statistics_in_a_rotated_basis(tiny, letters):
    """Those of activations that the model's own hooks give once its weights are rotated; the mlp is not concerned."""
    from sepcap.interventions.rotation import compute_rotation, rotate_values

    sites = ("mlp", "attn_pre_out", "attn_value")
    plain = sepcap.collect(tiny, letters, tokens=200, sites=sites, histogram=True)
    rotation = compute_rotation(tiny, "rotate")
    measured = sepcap.collect(tiny, letters, tokens=200, sites=sites, histogram=True, rotation=rotation)
    assert measured.info["rotation"] == rotation.fingerprint
    assert "rotation" not in plain.info
    assert torch.equal(measured["mlp"].median, plain["mlp"].median)
    assert float((measured["attn_value"].mean - plain["attn_value"].mean).abs().max()) > 0.1
    rotate_values(tiny, "rotate")
    edited = sepcap.collect(tiny, letters, tokens=200, sites=sites, histogram=True)
    for site in sites:
        torch.testing.assert_close(measured[site].mean, edited[site].mean, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(measured[site].rms, edited[site].rms, rtol=1e-3, atol=1e-4)
        reach = (edited[site].max - edited[site].min).double()
        assert bool(((measured[site].median - edited[site].median).abs() <= reach / 100 + 1e-4).all())


def test_a_rotation_is_asked_for(tiny_opt, letters):
    with pytest.raises(TypeError, match=r"rotation is a str; give the Rotation that sepcap\.rotate_values returned"):
        sepcap.collect(tiny_opt, letters, tokens=50, rotation="fold")


# What is refused, and what survives a file


def test_without_histograms_there_is_no_peak(tiny_opt, letters):
    s = sepcap.collect(tiny_opt, letters, tokens=50, sites="mlp")["mlp"]
    assert s.histogram is None
    for ask in (lambda: s.peak, lambda: s.median, lambda: s.quantile(0.1)):
        with pytest.raises(ValueError, match=r"'mlp' hold no histograms; collect them with collect\(\.\.\., histogram=True\)"):
            ask()


def test_merging_with_and_without_histograms_is_refused(tiny_opt, letters):
    with_them, without = (sepcap.collect(tiny_opt, letters, tokens=50, histogram=wanted) for wanted in (True, False))
    for one, other in ((with_them, without), (without, with_them)):
        with pytest.raises(ValueError, match="'mlp' with and without histograms: collect both with the same"):
            one.merge(other)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e308])
def test_broken_activations_are_reported_as_without_histograms(tiny_opt, letters, value):
    def break_one(z, hook):
        z = z.double() if value == 1e308 else z.clone()
        z[0, 3:5, 0] = torch.tensor([value, -value])
        return z

    with (
        tiny_opt.hooks(fwd_hooks=[("blocks.1.mlp.hook_post", break_one)]),
        pytest.raises(FloatingPointError, match="site 'mlp' in layer 1 are NaN or infinite"),
    ):
        sepcap.collect(tiny_opt, letters, tokens=100, histogram=True)


def test_a_quantile_lies_between_0_and_1():
    with pytest.raises(ValueError, match=r"q=50: give a finite number from 0 to 1"):
        accumulate(torch.zeros(1, 2, 1)).quantile(50)


def test_more_positions_than_an_int32_can_count_are_refused():
    s = accumulate(torch.zeros(1, 2, 1))
    nearly = NeuronStatistics("mlp", 2**31 - 2, s.sums, s.low, s.high, s.histogram)
    with pytest.raises(OverflowError, match="at most 2,147,483,647 positions, not 2,147,483,648"):
        nearly.merge(s)
    check_count(2**31 - 1)


def test_histograms_survive_a_file_a_device_and_a_merge(tiny_opt, letters, digits, tmp_path):
    first, second = (sepcap.collect(tiny_opt, task, tokens=80, sites=("mlp", "attn_value"), histogram=True) for task in (letters, digits))
    first.save(tmp_path / "s.safetensors")
    loaded = Statistics.load(tmp_path / "s.safetensors").to("cpu")
    merged = loaded.merge(second)
    for site in first:
        assert_equal(loaded[site].histogram, first[site].histogram)
        assert torch.equal(loaded[site].median, first[site].median)
        assert int(merged[site].require_histogram().counts[0].flatten(0, -2)[0].sum()) == 160
    first["mlp"].save(tmp_path / "one.safetensors")
    assert_equal(NeuronStatistics.load(tmp_path / "one.safetensors").histogram, first["mlp"].histogram)


def test_files_from_before_histograms_still_load(tiny_opt, letters, tmp_path):
    path = tmp_path / "s.safetensors"
    sepcap.collect(tiny_opt, letters, tokens=50, sites="mlp").save(path)
    tensors, meta = load_tensors(path, "statistics")
    assert not any("histogram" in name for name in tensors)
    save_tensors(path, tensors, meta)
    assert Statistics.load(path)["mlp"].histogram is None
