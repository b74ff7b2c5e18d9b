"""Resample ablation of masked language models and image classifiers, against passes of the plain model over the donors alone."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from encoders import SITES, images, load, masking_tokenizer, ragged, save_masked, save_vit
from plain import Plain

import sepcap
from sepcap.evaluation.next_token import evaluate_sample
from sepcap.interventions.resample import get_draw
from sepcap.models.forward import logits_of
from sepcap.tasks.images import DigitsSource
from sepcap.tasks.task import Task

FAMILIES = ("roberta", "bert")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {family: save_masked(family, tmp_path_factory.mktemp(family)) for family in FAMILIES}


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def vit_folder(tmp_path_factory):
    return save_vit(tmp_path_factory.mktemp("vit"))


def activations(plain, inputs):
    """(site, layer) -> activations of one input, alone."""
    seen = {}
    plain.run(inputs[None], look=lambda site, layer, z: seen.__setitem__((site, layer), z[0].clone()))
    return seen


def with_donor(plain, inputs, donor, neurons):
    """Logits of the plain model for one input whose neurons have what the donor has at the same position."""
    found, n = activations(plain, donor), len(donor)
    length = len(inputs)

    def put(site, layer, z):
        mask = neurons.masks[site][layer]
        of = found[site, layer]
        # beyond the donor's end its positions from 1 on come again
        positions = [p if p < n else 1 + (p - 1) % (n - 1) for p in range(length)] if donor.dim() == 1 else range(len(of))
        z[0][..., mask] = of[list(positions)][..., mask]

    return plain.run(inputs[None], look=put)[0]


def sentences(model, letters, lengths=(20, 9, 14)):
    """A padded batch as a masked language model takes it, and its rows without padding."""
    sample = ragged(model, letters)
    rows = [np.append(row[: n - 1], row[-1]) for row, n in zip((r for r in sample.rows if len(r) > 21), lengths, strict=False)]
    (batch,) = replace(sample, rows=tuple(rows)).batches(8)
    return batch, [batch.inputs[i, : len(row)] for i, row in enumerate(rows)]


@pytest.mark.parametrize("plain_hooks", [False, True])
def test_two_rows_of_a_masked_model_swap(family, folders, letters, plain_hooks):
    model, plain = load(folders[family]), Plain(family, folders[family])
    neurons = sepcap.NeuronSet.random(model, dict.fromkeys(SITES, 0.3))
    batch, rows = sentences(model, letters, (20, 9))
    ablation = sepcap.ablate(model, neurons, "resample")
    with model.hooks(fwd_hooks=ablation.fwd_hooks) if plain_hooks else ablation:
        logits = logits_of(model, batch.inputs, batch.mask)
    for i, row in enumerate(rows):
        expected = with_donor(plain, row, rows[1 - i], neurons)
        torch.testing.assert_close(logits[i, : len(row)], expected, atol=1e-4, rtol=0)
        assert (expected - plain.run(row[None])[0]).abs().max() > 0.05


@pytest.mark.parametrize("source", ["tokens", "characters", "texts"])
def test_donors_of_a_masked_model(family, folders, letters, digits, source):
    model, plain = load(folders[family]), Plain(family, folders[family])
    neurons = sepcap.NeuronSet.random(model, dict.fromkeys(SITES, 0.3))
    batch, rows = sentences(model, letters)
    source = digits if source == "texts" else source
    donors = get_draw(model, source, 3)([row.numpy() for row in rows], 0, [])
    special = masking_tokenizer(family).all_special_ids
    assert sum(int(np.isin(row, special).sum()) for row in rows) > 2 * len(rows)  # beginnings, ends and mask tokens
    for row, donor in zip(rows, donors, strict=True):
        fixed = np.isin(row, special)
        assert fixed.sum() >= 2
        assert (donor[fixed] == row.numpy()[fixed]).all()
        assert not np.isin(donor[~fixed], special).any()
        assert (donor[~fixed] != row.numpy()[~fixed]).mean() > 0.5
    with sepcap.ablate(model, neurons, "resample", source=source, seed=3):
        logits = logits_of(model, batch.inputs, batch.mask)
    for i, row in enumerate(rows):
        expected = with_donor(plain, row, torch.from_numpy(donors[i]), neurons)
        torch.testing.assert_close(logits[i, : len(row)], expected, atol=1e-4, rtol=0)


def test_evaluation_of_a_masked_model_does_not_depend_on_the_batch(family, folders, letters, digits):
    model = load(folders[family])
    neurons = sepcap.NeuronSet.random(model, dict.fromkeys(SITES, 0.3))
    sample = ragged(model, letters)
    ablation, losses = sepcap.ablate(model, neurons, "resample", source=digits), []
    for size in (2, 16):
        with ablation:
            losses.append(evaluate_sample(model, sample, batch_size=size).per_row[:, -1])
    np.testing.assert_allclose(*losses, rtol=1e-4)
    assert abs(losses[0] - evaluate_sample(model, sample).per_row[:, -1]).max() > 1e-3


def pictures(n=4, seed=0):
    return torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("plain_hooks", [False, True])
def test_images_of_a_batch_swap(vit_folder, plain_hooks):
    model, plain, pixels = load(vit_folder), Plain("vit", vit_folder), pictures(2)
    neurons = sepcap.NeuronSet.random(model, dict.fromkeys(SITES, 0.3))
    ablation = sepcap.ablate(model, neurons, "resample")
    with model.hooks(fwd_hooks=ablation.fwd_hooks) if plain_hooks else ablation:
        logits = logits_of(model, pixels)[:, 0]
    for i in range(2):
        expected = with_donor(plain, pixels[i], pixels[1 - i], neurons)
        torch.testing.assert_close(logits[i], expected, atol=1e-4, rtol=0)
        assert (expected - plain.run(pixels[i][None])[0]).abs().max() > 0.02


def test_no_image_is_its_own_donor(vit_folder):
    rows = list(pictures(6).numpy())
    orders = set()
    for seed in range(4):
        donors = get_draw(load(vit_folder), "batch", seed)(rows, 0, [])
        order = [next(i for i, row in enumerate(rows) if row is donor) for donor in donors]
        assert sorted(order) == list(range(6))
        assert all(i != donor for i, donor in enumerate(order))
        orders.add(tuple(order))
    assert len(orders) > 1


def test_one_image_takes_from_the_one_before(vit_folder):
    model, plain, pixels = load(vit_folder), Plain("vit", vit_folder), pictures(2)
    neurons = sepcap.NeuronSet.random(model, dict.fromkeys(SITES, 0.3))
    with sepcap.ablate(model, neurons, "resample"):
        with pytest.raises(ValueError, match="another source=: 'pixels' or a task"):
            logits_of(model, pixels[:1])
        logits = logits_of(model, pixels[1:])[:, 0]
    torch.testing.assert_close(logits[0], with_donor(plain, pixels[1], pixels[0], neurons), atol=1e-4, rtol=0)


@pytest.mark.parametrize("source", ["pixels", "images"])
def test_donors_of_images(vit_folder, source):
    model, plain, pixels = load(vit_folder), Plain("vit", vit_folder), pictures()
    neurons = sepcap.NeuronSet.random(model, dict.fromkeys(SITES, 0.3))
    source = images(name="others", seed=5) if source == "images" else source
    donors = get_draw(model, source, 7)(list(pixels.numpy()), 0, [])
    ablation = sepcap.ablate(model, neurons, "resample", source=source, seed=7)
    for _ in range(2):  # entered again, it begins anew
        with ablation:
            logits = logits_of(model, pixels)[:, 0]
            again = logits_of(model, pixels)[:, 0]
        for i in range(4):
            expected = with_donor(plain, pixels[i], torch.from_numpy(donors[i]), neurons)
            torch.testing.assert_close(logits[i], expected, atol=1e-4, rtol=0)
        assert (again - logits).abs().max() > 0.02  # another pass, other donors


@pytest.mark.parametrize("channels", [1, 3])
def test_random_pixels(channels, tmp_path):
    model = load(save_vit(tmp_path, channels))
    rows = list(np.zeros((40, channels, 8, 8), dtype=np.float32))
    draw = get_draw(model, "pixels", 1)
    donors = np.stack(draw(rows, 0, []))
    assert donors.shape == (40, channels, 8, 8)
    raw = donors * 0.25 + np.array([0.5, 0.4, 0.3])[:channels, None, None]
    # as bright as pixels can be: uniform from 0 to 1 in every channel and place
    assert raw.min() >= -1e-6
    assert raw.max() <= 1 + 1e-6
    assert np.ptp(raw) > 0.99
    np.testing.assert_allclose(raw.mean((0, 2, 3)), 0.5, atol=4 / np.sqrt(12 * 40 * 64))
    np.testing.assert_allclose(raw.var((0, 2, 3)), 1 / 12, atol=0.01)
    # an image's donor is the same whatever the batch; other seeds, other images
    assert (draw(rows[:3], 5, [])[0] == donors[5]).all()
    assert (get_draw(model, "pixels", 2)(rows, 0, [])[0] != donors[0]).any()


def test_other_images_are_those_for_collecting(vit_folder):
    model = load(vit_folder)
    task = Task("digits", (DigitsSource((3,)), DigitsSource((8,))), "images")
    donors = get_draw(model, task, 0)(list(pictures(60).numpy()), 0, [])
    known = {}
    for source in task.sources:
        for image, label in zip(*source.documents("collect")[:].values(), strict=True):
            known[((np.asarray(image) / 255 - 0.5) / 0.25).astype(np.float32).round(3).tobytes()] = label
    labels = [known[donor[0].round(3).tobytes()] for donor in donors]
    assert 10 < labels.count(3) < 50  # of both sources
    assert len({donor.tobytes() for donor in donors}) > 20


def test_errors(vit_folder, folders):
    vit, roberta = load(vit_folder), load(folders["roberta"])
    with pytest.raises(ValueError, match=r"source='tokens' is not known\..* For this model: 'batch', 'pixels'; or a task"):
        sepcap.ablate(vit, layer=0, head=0, kind="resample", source="tokens")
    with pytest.raises(ValueError, match=r"source='pixels' is not known\..* For this model: 'batch', 'tokens', 'characters'"):
        sepcap.ablate(roberta, layer=0, head=0, kind="resample", source="pixels")
