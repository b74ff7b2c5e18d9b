"""Peak and median on real activations: every neuron of the embedded model, against activations that a plain hook stored (METHODS 8)."""

import numpy as np
import pytest
import torch

import sepcap
from sepcap.statistics.collect import collect_sample
from sepcap.statistics.histogram import BINS, PEAK_BINS
from sepcap.tasks.batches import sample_tokens

pytestmark = pytest.mark.slow
"""Made-up activations are in test_histogram.py; here a tenth of the time of all fast tests goes into reading real prose."""

HOOKS = {"mlp": "mlp.hook_post", "attn_pre_out": "attn.hook_z", "attn_value": "attn.hook_v"}
LAYERS = (0, 3, 5)


@pytest.fixture(scope="module")
def collected():
    """Statistics of 3,000 tokens of prose, and the stored activations of some layers, (site, layer) -> [position, neuron]."""
    model = sepcap.load_model(device="cpu")
    sample = sample_tokens(sepcap.load_task("local-prose"), "collect", model.tokenizer, 3000, 256)
    statistics = collect_sample(model, sample, tuple(HOOKS), batch_size=5, histogram=True)
    stored: dict[tuple[str, int], list[torch.Tensor]] = {}
    for batch in sample.batches(7):
        names = {f"blocks.{layer}.{hook}": (site, layer) for site, hook in HOOKS.items() for layer in LAYERS}
        with torch.no_grad():
            _, cache = model.run_with_cache(batch.inputs, names_filter=list(names))
        for name, key in names.items():
            stored.setdefault(key, []).append(cache[name][batch.keep].flatten(1))
    return statistics, {key: torch.cat(parts).double().numpy() for key, parts in stored.items()}


def neurons(collected, site):
    """Streamed peak and median, and stored activations, neuron by neuron."""
    statistics, stored = collected
    peak, median = (x.flatten(1).numpy() for x in (statistics[site].peak, statistics[site].median))
    for layer in LAYERS:
        for neuron, z in enumerate(stored[site, layer].T):
            yield peak[layer, neuron], median[layer, neuron], z, max((z.max() - z.min()) / PEAK_BINS, 1e-9)


@pytest.mark.parametrize("site", HOOKS)
def test_median_lies_within_one_bin(collected, site):
    for _, median, z, bin_width in neurons(collected, site):
        assert abs(median - np.median(z)) <= 1.001 * bin_width


@pytest.mark.parametrize(("site", "share"), [("mlp", 0.999), ("attn_pre_out", 0.85), ("attn_value", 0.85)])
def test_peak_lies_within_one_bin_of_the_fullest(collected, site, share):
    """Always, but where several bins of a bell are so nearly equal that the activations within a fine bin of their edges decide."""
    right = []
    for peak, _, z, bin_width in neurons(collected, site):
        low, high = z.min(), z.max()
        if low == high:
            assert peak == low
            continue
        counts, edges = np.histogram(z, bins=PEAK_BINS, range=(low, high))
        # the fullest bins, numpy's choice or one as full
        centres = (edges[:-1] + edges[1:]) / 2
        right.append(np.abs(centres[counts == counts.max()] - peak).min() <= 1.001 * bin_width)
        # activations that an edge may take from either side: those in the fine bin that it cuts
        sides = np.sort(z)
        fine = (high - low) / (BINS / 2 - 1)
        near = np.searchsorted(sides, edges[1:-1] + fine) - np.searchsorted(sides, edges[1:-1] - fine)
        near = np.concatenate([[0], near, [0]])
        doubt = near[:-1] + near[1:]
        chosen, fullest = int(np.abs(centres - peak).argmin()), int(counts.argmax())
        assert counts[chosen] + doubt[chosen] + doubt[fullest] >= counts[fullest]
        # and it is a bin that chance alone would make as full
        assert counts[max(0, chosen - 1) : chosen + 2].max() >= counts[fullest] - 2 * np.sqrt(counts[fullest])
    assert np.mean(right) >= share


def test_the_streamed_counts_are_those_of_the_stored_activations(collected):
    statistics, stored = collected
    for (site, layer), z in stored.items():
        histogram = statistics[site].require_histogram()
        part = next(x for i, x in enumerate(histogram.layers()) if i == layer)
        for neuron in (0, 17, 200):
            width, start = float(histogram.width[layer].flatten()[neuron]), int(part.start[neuron])
            counted = np.bincount(np.floor(z[:, neuron] / width).astype(int) - start, minlength=BINS)
            # two forward passes of other batch sizes differ in their last bits, which may move an activation over an edge
            assert np.abs(counted - part.counts[neuron].numpy()).sum() <= 0.01 * len(z)
