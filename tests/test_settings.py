"""Results do not depend on what is set in torch around the package: default dtype and device, gradients, threads."""

from contextlib import contextmanager
from typing import Any

import pytest
import torch

import sepcap


@contextmanager
def setting(change, value, before):
    """Something that torch keeps for the whole process, changed and put back."""
    change(value)
    try:
        yield
    finally:
        change(before)


SETTINGS = {
    "default dtype float64": lambda: setting(torch.set_default_dtype, torch.float64, torch.float32),
    "default dtype bfloat16": lambda: setting(torch.set_default_dtype, torch.bfloat16, torch.float32),
    "no gradients": torch.no_grad,
    "inference": torch.inference_mode,
    "default device meta": lambda: setting(torch.set_default_device, "meta", None),
    "default device cpu": lambda: setting(torch.set_default_device, "cpu", None),
    "a device around it": lambda: torch.device("meta"),
    "two threads": lambda: setting(torch.set_num_threads, 2, 1),
}


EVERY_DAY = ("default dtype bfloat16", "a device around it")
"""The two of which the package would notice most; the others take as long, and are in the slow tier."""


def results(folder, forget, retain):
    """A bit of everything that the package computes, as tensors."""
    model = sepcap.load_model(folder, device="cpu")
    options: dict[str, Any] = {"tokens": 100, "context": 16}
    seen = [sepcap.collect(model, texts, histogram=True, **options) for texts in (forget, retain)]
    scores = sepcap.score(seen[0], seen[1])
    neurons = scores.top({"mlp": 0.2, "attn_pre_out": 0.2})
    found = {f"mean of {site}": stats.mean for site, stats in seen[0].items()} | {f"score of {s}": x for s, x in scores.items()}
    for kind in ("zero", "mean", "peak", "resample"):
        with sepcap.ablate(model, neurons, kind, reference=None if kind in ("zero", "resample") else seen[1]):
            measured = sepcap.evaluate(model, retain, **options)
            found[kind] = torch.tensor([measured.loss, measured.top1], dtype=torch.float64, device="cpu")
    ids = torch.arange(20, 36, device="cpu")[None]
    rotation = sepcap.rotate_values(model)
    sepcap.delete(model, neurons, {site: seen[1][site].mean for site in neurons.masks})
    found |= {"singular values": rotation.singular_values, "logits after edits": model(ids)}
    return {name: value.detach().clone() for name, value in found.items()}


@pytest.fixture(scope="module")
def expected(trained_folder, letters, digits):
    return results(trained_folder, letters, digits)


@pytest.mark.parametrize("name", [pytest.param(name, marks=[] if name in EVERY_DAY else [pytest.mark.slow]) for name in SETTINGS])
def test_results_are_the_same(trained_folder, letters, digits, expected, name):
    with SETTINGS[name]():
        got = results(trained_folder, letters, digits)
    assert got.keys() == expected.keys()
    for what, value in expected.items():
        torch.testing.assert_close(got[what], value, rtol=1e-4, atol=1e-5, msg=lambda said, what=what: f"{what}: {said}")
