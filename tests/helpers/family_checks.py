"""What has to hold for a family: the tests run these checks, and docs/families.py makes its table of them.

Each takes a row of the table, a folder with the row's model, the sites to check and an empty folder. It raises what the package
raises where the architecture cannot do it (NotImplementedError), and an AssertionError where the package is wrong.
"""

import contextlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from conftest import words
from family_rows import BACKEND, CLASSES, Family
from plain import Plain, token_ids

import sepcap
from sepcap.models.forward import logits_of, measuring
from sepcap.models.kinds import kind_of
from sepcap.models.sites import get_site, live_weight, site_shape
from sepcap.studies.pruning import prune as pruning
from sepcap.tasks.samples import sample_task

TOKENS = 60
LOGITS = 1e-4

Check = Callable[[Family, Path, tuple[str, ...], Path], None]


def load(folder, dtype="float32"):
    return sepcap.load_model(folder, device="cpu", dtype=dtype, backend=BACKEND)


def inputs_of(model):
    """Token ids, or pixels of three images."""
    if kind_of(model) == "images":
        return torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return token_ids()


def tasks_of(model):
    """Two tasks that the model takes."""
    if kind_of(model) == "images":
        return images(0), images(1)
    return words(0, n=8), words(0, n=8, alphabet="0123456789")


def images(seed):
    """Images of noise with arbitrary labels."""
    import datasets
    from PIL import Image

    pixels = np.random.default_rng(seed).integers(0, 256, (6 * TOKENS, 8, 8), dtype=np.uint8)
    rows = {"image": [Image.fromarray(p) for p in pixels], "label": [i % CLASSES for i in range(len(pixels))]}
    return datasets.Dataset.from_dict(rows, datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")}))


def some_neurons(model, sites):
    return sepcap.NeuronSet.random(model, dict.fromkeys(sites, 0.3), seed=1)


def sites_fire(row, folder, sites, out):
    """Every site is computed in every layer, in the shape of its weights, and what it is set to reaches the logits."""
    model = load(folder)
    inputs = inputs_of(model)
    before = logits_of(model, inputs)
    torch.testing.assert_close(before, plain_logits(row, folder, inputs), atol=LOGITS, rtol=0)
    for site in sites:
        shape = site_shape(model, site)
        for layer in range(shape[0]):
            seen = []

            def add(z, hook, seen=seen):
                seen.append(tuple(z.shape[2:]))
                return z + 1

            with model.hooks(fwd_hooks=[(get_site(site).hook_name(layer), add)]):
                after = logits_of(model, inputs)
            assert seen == [shape[1:]], f"{site} of layer {layer} has shape {seen}, its weights {shape[1:]}"
            assert (after - before).abs().max() > 1e-3, f"{site} of layer {layer} does not reach the logits"


def statistics_are_the_plain_models(row, folder, sites, out):
    """What is collected is what plain torch hooks see in the plain model."""
    model = load(folder)
    task = tasks_of(model)[0]
    stats = sepcap.collect(model, task, tokens=TOKENS, sites=sites, batch_size=4)
    plain, parts = Plain(row.layout, folder), {}
    for batch in sample_task(model, sepcap.load_task(task), "collect", TOKENS).batches(1):

        def look(site, layer, z, keep=batch.keep[0]):
            parts.setdefault((site, layer), []).append((z[0][keep] if len(keep) > 1 else z[0]).double())

        plain.run(batch.inputs, look=look)
    for site in sites:
        z = torch.stack([torch.cat(parts[site, layer]) for layer in range(len(model.blocks))])
        expected = {
            "mean": z.mean(1),
            "abs": z.abs().mean(1),
            "rms": z.square().mean(1).sqrt(),
            "std": z.std(1, correction=0),
            "min": z.amin(1),
            "max": z.amax(1),
        }
        assert stats[site].count == z.shape[1] >= TOKENS
        for name, value in expected.items():
            got = getattr(stats[site], name).double()
            torch.testing.assert_close(got, value, rtol=1e-4, atol=1e-5, msg=lambda m, at=f"{name} of {site}": f"{at}: {m}")


def half_precision_is_the_plain_models(row, folder, sites, out):
    """In bfloat16 and float16: logits as near to those of float32 as the plain model's are, and statistics near to those of float32."""
    inputs = inputs_of(load(folder))
    exact, task = plain_logits(row, folder, inputs), tasks_of(load(folder))[0]
    expected = sepcap.collect(load(folder), task, tokens=TOKENS, sites=sites)
    for name, dtype in (("bfloat16", torch.bfloat16), ("float16", torch.float16)):
        model = load(folder, name)
        assert dtype in {parameter.dtype for parameter in model.parameters()}  # some keep a few in float32
        plain = Plain(row.layout, folder, dtype=dtype).run(inputs).float().reshape(exact.shape)
        with measuring(model):
            measured = logits_of(model, inputs)
        for logits in (logits_of(model, inputs), measured):
            assert logits.dtype == dtype
            assert rms(logits.float() - exact) < 1.3 * rms(plain - exact) + 1e-4, f"{name}: farther from float32 than the plain model"
        stats = sepcap.collect(model, task, tokens=TOKENS, sites=sites)
        for site in sites:
            assert stats[site].count == expected[site].count
            off = rms(stats[site].mean.double() - expected[site].mean.double()) / rms(expected[site].std.double())
            assert off < 0.05, f"{name}: means of {site} are {off:.3f} standard deviations off"


def rms(x):
    return float(x.square().mean().sqrt())


def deletion_is_zero_ablation(row, folder, sites, out):
    """Neurons deleted by weights, ablated by hooks, and zeroed in the plain model by torch hooks: the same logits."""
    model = load(folder)
    inputs, neurons = inputs_of(model), some_neurons(model, sites)
    expected = plain_logits(row, folder, inputs, zero=neurons.masks)
    assert (expected - logits_of(model, inputs)).abs().max() > 1e-3, "the set does not matter"
    with sepcap.ablate(model, neurons):
        torch.testing.assert_close(logits_of(model, inputs), expected, atol=LOGITS, rtol=0)
    sepcap.delete(model, neurons)
    torch.testing.assert_close(logits_of(model, inputs), expected, atol=LOGITS, rtol=0)


def rotation_keeps_logits(row, folder, sites, out, bias):
    """The logits stay as they were and the weights do not; undone, the weights are the same bits."""
    model = load(folder)
    inputs = inputs_of(model)
    before = logits_of(model, inputs)
    rotation = sepcap.compute_rotation(model, bias)
    weights = model.blocks[0].attn.W_V.detach().clone()
    rotation = sepcap.rotate_values(model, bias)
    assert (model.blocks[0].attn.W_V - weights).abs().max() > 1e-2
    torch.testing.assert_close(logits_of(model, inputs), before, atol=LOGITS, rtol=0)
    rotation.undo(model)
    assert torch.equal(model.blocks[0].attn.W_V, weights)


def saved_is_plain(row, folder, sites, out):
    """What is saved, whole, pruned, and edited in what the sites read, is a checkpoint that transformers loads, with the same logits."""
    model = load(folder)
    inputs = inputs_of(model)
    edits = {
        "whole": lambda: None,
        "pruned": lambda: sepcap.delete(model, some_neurons(model, sites)),
        "edited": lambda: shake_what_is_read(model, sites),
    }
    before = None
    for name, edit in edits.items():
        edit()
        sepcap.save_pretrained(model, out / name)
        saved = plain_logits(row, out / name, inputs)
        torch.testing.assert_close(logits_of(model, inputs), saved, atol=LOGITS, rtol=0)
        torch.testing.assert_close(logits_of(load(out / name), inputs), saved, atol=LOGITS, rtol=0)
        assert before is None or (saved - before).abs().max() > 1e-3, f"{name}: nothing changed"
        before = saved


@torch.no_grad()
def shake_what_is_read(model, sites):
    """Other W_V and W_in: whether deletion reaches them makes no difference to the logits, once the outputs are zero."""
    generator = torch.Generator().manual_seed(0)
    for block in model.blocks:
        for part, name in sorted({("mlp", "W_in") if site == "mlp" else ("attn", "W_V") for site in sites}):
            weight = live_weight(getattr(block, part), name)
            weight.mul_(0.5 + torch.rand(weight.shape, generator=generator))


def pruning_resumes(row, folder, sites, out):
    """A run of two steps, and one that is stopped in its second step and resumed: the same neurons, the same measurements."""
    model = load(folder)
    forget, retain = tasks_of(model)
    config = sepcap.PruningConfig(
        forget=forget,
        retain=retain,
        fractions=dict.fromkeys(sites, 0.25),
        steps=2,
        tokens=TOKENS,
        eval_tokens=TOKENS,
    )
    before = logits_of(model, inputs_of(model))
    whole = sepcap.prune(model, config, out=out / "whole")
    assert whole.finished
    assert torch.equal(logits_of(model, inputs_of(model)), before), "the model is not as it came"
    with mock.patch.object(pruning, "delete", stopping_at(2)), contextlib.suppress(Stop):
        sepcap.prune(model, config, out=out / "stopped")
    assert not sepcap.Run(out / "stopped").finished
    again = sepcap.prune(model, config, out=out / "stopped")
    assert again.finished
    columns = [c for c in whole.trajectory.columns if c != "seconds"]
    assert again.trajectory[columns].equals(whole.trajectory[columns])
    for site in sites:
        mask = again.neurons(2).masks[site]
        assert torch.equal(mask, whole.neurons(2).masks[site])
        assert mask.float().mean() == 0.5


def profiles_hold_contexts(row, folder, sites, out):
    """Profiles of neurons, by `sepcap.examine`: their strongest contexts on both tasks, in the order of the activation."""
    model = load(folder)
    how = {"tasks": tasks_of(model), "tokens": 150, "k": 3, "window": 8, "min_count": 2, "progress": False}
    for site in sites:
        first = tuple(0 for _ in site_shape(model, site))
        found = sepcap.examine(model, [first], site=site, **how)
        for task, contexts in found.contexts(0).query("group == 'strongest'").groupby("task"):
            assert contexts["activation"].abs().is_monotonic_decreasing, f"{site}, {task}"


CHECKS: dict[str, Check] = {
    "sites": sites_fire,
    "statistics": statistics_are_the_plain_models,
    "half precision": half_precision_is_the_plain_models,
    "deletion": deletion_is_zero_ablation,
    "rotation, fold": partial(rotation_keeps_logits, bias="fold"),
    "rotation, rotate": partial(rotation_keeps_logits, bias="rotate"),
    "saving": saved_is_plain,
    "pruning": pruning_resumes,
    "profiles": profiles_hold_contexts,
}
"""The columns of the table."""


class Stop(Exception):
    """What stops a run in the middle."""


def stopping_at(call):
    """`sepcap.delete`, which fails when it is called for that time."""
    calls = []

    def delete(*args):
        calls.append(args)
        if len(calls) == call:
            raise Stop
        sepcap.delete(*args)

    return delete


def plain_logits(row, folder, inputs, **options):
    """[batch, pos, vocab], or [batch, 1, class]."""
    logits = Plain(row.layout, folder).run(inputs, **options)
    return logits if logits.dim() == 3 else logits[:, None]
