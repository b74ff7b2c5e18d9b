"""Patching: what is put where, against plain arithmetic on the model's own activations."""

import numpy as np
import pytest
import torch

from sepcap.evaluation.likelihood import log_likelihoods
from sepcap.evaluation.sampling import sampled
from sepcap.interventions.patching import patch_points, put, take

SOURCE = [0, 7, 50, 91, 12, 33]
TARGET = [0, 12, 33]
SITES = [("mlp",), ("attn_pre_out",), ("mlp", "attn_pre_out"), ("resid",)]


def logits(model, ids, hooks=()):
    with torch.inference_mode(), model.hooks(fwd_hooks=list(hooks)):
        return model(torch.tensor([ids]), return_type="logits", use_cache=False)[0]


def seen(model, ids, points, hooks=()):
    """Activations of a whole text, by hooks of their own."""
    kept = {}

    def keep(name):
        def look(z, hook):
            kept[name] = z[0].clone()

        return name, look

    logits(model, ids, [*hooks, *map(keep, points)])
    return kept


@pytest.mark.parametrize("sites", SITES)
def test_activations_are_those_at_the_ends_of_the_texts(tiny, sites):
    points = patch_points(tiny, sites)
    texts = [SOURCE, TARGET, [0, 9]]
    taken = take(tiny, texts, [2, 3, 1], points)
    assert set(taken.values) == set(points)
    for i, (text, n) in enumerate(zip(texts, [2, 3, 1], strict=True)):
        whole = seen(tiny, text, points)
        for name in points:
            torch.testing.assert_close(taken.values[name][i, -n:], whole[name][-n:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("sites", SITES)
def test_a_text_patched_with_its_own_activations_stays_as_it_is(tiny, sites):
    points = patch_points(tiny, sites)
    hooks = put(take(tiny, [SOURCE], [2], points), points, [len(SOURCE)], [2])
    assert (logits(tiny, SOURCE, hooks) - logits(tiny, SOURCE)).abs().max() < 1e-5


def test_the_residual_stream_after_the_last_layer_is_the_prediction(tiny):
    for layers in ([tiny.cfg.n_layers - 1], None):
        points = patch_points(tiny, "resid", layers)
        hooks = put(take(tiny, [SOURCE], [2], points), points, [len(TARGET)], [2])
        patched = logits(tiny, TARGET, hooks)
        torch.testing.assert_close(patched[-1], logits(tiny, SOURCE)[-1], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(patched[-2], logits(tiny, SOURCE)[-2], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(patched[0], logits(tiny, TARGET)[0], atol=1e-5, rtol=1e-5)
        assert (patched[-1] - logits(tiny, TARGET)[-1]).abs().max() > 0.1


@pytest.mark.parametrize("sites", SITES)
def test_a_scale_of_zero_is_zero_ablation_at_the_places(tiny, sites):
    points = patch_points(tiny, sites, [1])

    def zero(z, hook):
        z = z.clone()
        z[:, -1] = 0
        return z

    hooks = put(take(tiny, [SOURCE], [1], points), points, [len(TARGET)], [1], scale=0.0)
    torch.testing.assert_close(logits(tiny, TARGET, hooks), logits(tiny, TARGET, [(name, zero) for name in points]))


def test_places_are_aligned_at_the_end_and_no_others_change(tiny_opt):
    points = patch_points(tiny_opt, "mlp")
    taken = take(tiny_opt, [SOURCE, SOURCE], [3, 1], points)
    # three slots into room for two, and one slot; the second row is patched in its middle
    hooks = put(taken, points, [3, 2], [2, 2], scale=2.0)
    batch = torch.tensor([TARGET, TARGET])
    kept = {}

    def keep(z, hook):
        kept["z"] = z.clone()

    whole, before = seen(tiny_opt, SOURCE, points), seen(tiny_opt, TARGET, points)
    with torch.inference_mode(), tiny_opt.hooks(fwd_hooks=[*hooks[:1], (points[0], keep)]):
        tiny_opt(batch)
    z, name = kept["z"], points[0]
    torch.testing.assert_close(z[0, 1:3], 2 * whole[name][-2:], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(z[0, 0], before[name][0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(z[1, 1], 2 * whole[name][-1], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(z[1, [0, 2]], before[name][[0, 2]], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("sites", SITES)
def test_the_cache_carries_the_patch_on(tiny, sites):
    """Generated with a key-value cache, against a pass over the whole text for every token, patched at the prompt's places."""
    points = patch_points(tiny, sites)
    taken = take(tiny, [SOURCE, SOURCE[:4]], [2, 1], points)
    prompts, room = [TARGET, [0, 40, 41, 42]], [2, 1]
    hooks = {i: lambda i=i: put(taken.of([i]), points, [len(prompts[i])], [room[i]]) for i in range(2)}
    expected = []
    for i in range(2):
        ids = list(prompts[i])
        for _ in range(6):
            ids.append(int(logits(tiny, ids, hooks[i]())[-1].argmax()))
        written = ids[len(prompts[i]) :]
        expected.append(written[: written.index(2)] if 2 in written else written)

    def beginning(chosen):
        return tiny.hooks(fwd_hooks=[hook for i in chosen for hook in hooks[i]()])

    hooked = sum(len(point.fwd_hooks) for point in tiny.hook_dict.values())
    luck = torch.zeros(2, 6, dtype=torch.float64)
    assert sampled(tiny, prompts, luck, 0.0, beginning=beginning) == expected
    assert sampled(tiny, prompts, luck, 0.0) != expected
    # nothing stays hooked
    assert sum(len(point.fwd_hooks) for point in tiny.hook_dict.values()) == hooked


def test_log_likelihoods_are_those_of_the_plain_softmax_whatever_the_batch(tiny):
    prompts, after = [TARGET, SOURCE, [0]], [[5, 6, 7, 8], [9], [10, 11]]
    for size in (1, 2, 3):
        found = log_likelihoods(tiny, prompts, after, batch_size=size)
        assert found.shape == (3, 4)
        for row, prompt, true in zip(found, prompts, after, strict=True):
            p = logits(tiny, [*prompt, *true]).double().log_softmax(-1)
            expected = [float(p[len(prompt) - 1 + k, token]) for k, token in enumerate(true)]
            np.testing.assert_allclose(row[: len(true)], expected, atol=1e-5)
            assert np.isnan(row[len(true) :]).all()


@pytest.mark.parametrize(
    ("sites", "layers", "error", "said"),
    [
        ("mpl", None, ValueError, "sites='mpl' is not known. Did you mean 'mlp'"),
        ("attn_value", None, ValueError, "'attn_pre_out', 'mlp', 'resid'"),
        ((), None, ValueError, "sites is empty"),
        (("mlp", "resid"), None, ValueError, "patch 'resid' alone"),
        ("mlp", [], ValueError, "layers is empty"),
        ("mlp", [2], IndexError, "layers 0 to 1"),
        ("mlp", [-1], IndexError, "layers 0 to 1"),
    ],
)
def test_what_cannot_be_patched_is_refused(tiny_opt, sites, layers, error, said):
    with pytest.raises(error, match=said):
        patch_points(tiny_opt, sites, layers)


def test_more_places_than_there_are_tokens_are_refused(tiny_opt):
    with pytest.raises(ValueError, match=r"slots\[1\]=3: text 1 has 2 tokens"):
        take(tiny_opt, [SOURCE, [0, 4]], [1, 3], patch_points(tiny_opt, "mlp"))
