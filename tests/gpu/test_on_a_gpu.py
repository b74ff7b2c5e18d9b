"""The core of the package on a CUDA device gives what it gives on the CPU.

The slow tier runs the same tests on a pretended device (see `pretended`), for one family.
"""

import pytest
import torch
from conftest import FAMILIES
from pretended import PretendedDevices, where

import sepcap
from sepcap.models.loading import load
from sepcap.models.sites import SITES

CUDA = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


PLACES = [
    *(pytest.param(("cuda", family), marks=CUDA, id=f"cuda-{family}") for family in FAMILIES),
    pytest.param(("pretended", "opt"), marks=pytest.mark.slow, id="pretended-opt"),
]
"""All families on a real device; more of them on pretended ones are in tests/models/test_devices.py."""


@pytest.fixture(params=PLACES)
def place(request, monkeypatch, tiny_folders):
    """Name of the device, and folder of a tiny model; inside the test the device is there, if only in name."""
    device, family = request.param
    if device == "cuda":
        yield device, tiny_folders[family]
        return
    monkeypatch.setattr(load, "check_device", lambda device: None)
    with PretendedDevices():
        yield "cuda:0", tiny_folders[family]


@pytest.fixture
def both(place):
    """The same tiny model on the CPU and on the GPU."""
    gpu, folder = place
    return [sepcap.load_model(folder, device=device) for device in ("cpu", gpu)]


def test_statistics_are_those_of_the_cpu(both, letters):
    on_cpu, on_gpu = (sepcap.collect(model, letters, tokens=200, sites=tuple(SITES), histogram=True) for model in both)
    for site in SITES:
        assert where(on_gpu[site].abs).type == "cuda"  # accumulated where the activations are
        for name in ("mean", "abs", "sqrt", "rms", "std", "median"):
            torch.testing.assert_close(getattr(on_gpu[site], name).cpu(), getattr(on_cpu[site], name), atol=1e-4, rtol=1e-3)


def test_every_ablation_is_that_of_the_cpu(both, letters):
    losses = []
    for model in both:
        reference = sepcap.collect(model, letters, tokens=100, histogram=True)
        neurons = sepcap.NeuronSet.random(model, {"mlp": 0.2, "attn_pre_out": 0.2}, seed=0)
        losses.append([])
        for kind in ("zero", "mean", "median", "peak", "resample"):
            with sepcap.ablate(model, neurons, kind, reference=reference):
                losses[-1].append(sepcap.evaluate(model, letters, tokens=100).loss)
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)


def test_passes_that_begin_in_the_middle_are_those_of_the_cpu(both, letters):
    how = {"head": ((1, 0),), "kinds": ("mean", "optimal"), "tokens": 100, "reference_tokens": 100, "fit_tokens": 62}
    on_cpu, on_gpu = (sepcap.compare_ablations(model, task=letters, **how).table["delta_loss"].to_numpy() for model in both)
    assert on_gpu == pytest.approx(on_cpu, abs=2e-4)


def test_edits_of_weights_are_those_of_the_cpu(both, letters):
    losses = []
    for model in both:
        sepcap.rotate_values(model)
        rotated = sepcap.evaluate(model, letters, tokens=100).loss
        sepcap.delete(model, sepcap.NeuronSet.random(model, {"mlp": 0.2, "attn_pre_out": 0.2}, seed=0))
        losses.append([rotated, sepcap.evaluate(model, letters, tokens=100).loss])
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)


def test_a_saved_model_is_the_one_that_was_edited(place, letters, tmp_path):
    gpu, folder = place
    model = sepcap.load_model(folder, device=gpu)
    sepcap.delete(model, sepcap.NeuronSet.random(model, {"mlp": 0.2}, seed=0))
    sepcap.save_pretrained(model, tmp_path / "out")
    again = sepcap.load_model(tmp_path / "out", device="cpu")
    assert sepcap.evaluate(again, letters, tokens=100).loss == pytest.approx(sepcap.evaluate(model, letters, tokens=100).loss, abs=1e-4)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_summed_exactly(place, letters, dtype):
    gpu, folder = place
    model = sepcap.load_model(folder, device=gpu, dtype=dtype)
    seen = []
    with model.hooks(fwd_hooks=[("blocks.1.mlp.hook_post", lambda z, hook: seen.append(z.double().flatten(0, 1)))]):
        stats = sepcap.collect(model, letters, tokens=31 * 8, sites="mlp", include_bos=True)["mlp"]
    torch.testing.assert_close(stats.mean[1].cpu(), torch.cat(seen).mean(0).cpu(), atol=1e-12, rtol=1e-9)


def test_a_run_repeats_itself(place, letters, digits, tmp_path):
    gpu, folder = place
    config = sepcap.PruningConfig(forget=letters, retain=digits, fractions={"mlp": 0.1}, steps=1, tokens=200, eval_tokens=200)
    runs = [sepcap.prune(sepcap.load_model(folder, device=gpu), config, out=tmp_path / name) for name in "ab"]
    assert runs[0].neurons() == runs[1].neurons()
