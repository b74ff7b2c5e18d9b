"""bfloat16 and float16 on the CPU: exact sums of the activations that there are, and numbers without NaN."""

import math

import numpy as np
import pytest
import torch

import sepcap
from sepcap.models.sites import SITES
from sepcap.tasks.load import load_task
from sepcap.tasks.samples import sample_task

HALVES = ("bfloat16", "float16")


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("folder", ["opt", "mistral"])
def test_statistics_are_exact_sums_of_half_precision_activations(tiny_folders, letters, folder, dtype):
    model = sepcap.load_model(tiny_folders[folder], device="cpu", dtype=dtype)
    seen = {(site, layer): [] for site in SITES for layer in range(2)}

    def keep(site, layer):
        return SITES[site].hook_name(layer), lambda z, hook: seen[site, layer].append(z.clone())

    counted = [batch.keep for batch in sample_task(model, load_task(letters), "collect", 372, 32).batches(5)]
    with model.hooks(fwd_hooks=[keep(*key) for key in seen]):
        found = sepcap.collect(model, letters, tokens=372, sites=tuple(SITES), batch_size=5, context=32)
    for (site, layer), parts in seen.items():
        assert {part.dtype for part in parts} == {getattr(torch, dtype)}
        z = torch.cat([part[kept] for part, kept in zip(parts, counted, strict=True)]).flatten(1).double().numpy()
        assert found[site].count == len(z) == 372
        for name, values in (("total", z), ("absolute", np.abs(z)), ("positive", (z > 0).astype(float))):
            exact = np.array([math.fsum(column) for column in values.T])  # rounded once, at the end
            assert np.array_equal(found[site].sums[name][layer].flatten().numpy(), exact), (site, layer, name)
        root = np.sqrt(np.abs(z)).sum(0)
        np.testing.assert_allclose(found[site].sums["root"][layer].flatten().numpy(), root, rtol=1e-6)
        np.testing.assert_allclose(found[site].std[layer].flatten().numpy(), z.std(0), rtol=1e-6, atol=1e-7 * np.abs(z).max())
        assert np.array_equal(found[site].low[layer].flatten().numpy(), z.min(0).astype(np.float32))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("folder", ["opt", "gpt2", "llama"])
def test_half_precision_loses_digits_and_nothing_else(tiny_folders, letters, folder, dtype):
    half, whole = (sepcap.load_model(tiny_folders[folder], device="cpu", dtype=d) for d in (dtype, "float32"))
    neurons = sepcap.NeuronSet.random(half, {"mlp": 0.2, "attn_pre_out": 0.2}, seed=0)
    losses = []
    for model in (half, whole):
        with sepcap.ablate(model, neurons, "zero"):
            ablated = sepcap.evaluate(model, letters, tokens=200).loss
        sepcap.delete(model, neurons)
        losses.append([ablated, sepcap.evaluate(model, letters, tokens=200).loss])
    assert np.isfinite(losses).all()
    assert losses[0] == pytest.approx(losses[1], rel=5e-3 if dtype == "bfloat16" else 1e-3)
