"""Image classifiers: every number against the plain ViT, image by image; and digits that a trained one forgets."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from encoders import (
    CLASSES,
    SITES,
    check_ablations,
    check_compared,
    check_pruning,
    check_statistics,
    counts,
    images,
    load,
    plain_activations,
    save_vit,
)

import sepcap
from sepcap.models.kinds import kind_of
from sepcap.statistics.collect import collect_sample
from sepcap.tasks.images import DigitsSource
from sepcap.tasks.samples import sample_task

LOW, HIGH = "local-digits-low", "local-digits-high"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_vit(tmp_path_factory.mktemp("vit"))


@pytest.mark.parametrize("channels", [1, 3])
def test_scores_are_the_plain_models(channels, tmp_path):
    """With pixels made by hand from the images, as the processor says."""
    folder = save_vit(tmp_path, channels)
    model, task = load(folder), images(shape=(8, 8, 3)[: channels + 1] if channels == 3 else (8, 8))
    assert kind_of(model) == "images"
    rows = task.sources[0].documents("evaluate")[:50]
    pixels = np.stack([np.asarray(image) for image in rows["image"]]).reshape(50, 8, 8, channels) / 255
    pixels = (pixels - np.array([0.5, 0.4, 0.3])[:channels]) / 0.25
    plain = transformers.AutoModelForImageClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        logits = plain(torch.tensor(pixels).permute(0, 3, 1, 2).float()).logits.double()
    labels = torch.tensor(rows["label"])
    better = (logits >= logits.gather(1, labels[:, None])).sum(1) - 1
    loss = -logits.log_softmax(1).gather(1, labels[:, None])[:, 0]
    assert len({bool(b) for b in better < 1}) == len({bool(b) for b in better < 10}) == 2
    for size in (1, 7, 50):
        result = sepcap.evaluate(model, task, tokens=50, batch_size=size)
        assert result.n == 50
        assert result.per_row.shape[0] == 50  # an image is a row, and has one prediction
        assert counts(result)[:, :3].tolist() == [[1, int(b < 1), int(b < 10)] for b in better]
        np.testing.assert_allclose(counts(result)[:, 3], loss, rtol=1e-4)
    # no label is left out for being frequent
    assert result.skip_tokens == ()
    assert (result.skip50_top1, result.skip50_top10) == (result.top1, result.top10)
    # a proportion's own standard error
    assert result.se("top1") == pytest.approx(np.sqrt(result.top1 * (1 - result.top1) / 49))


def test_top10_is_everything_among_ten(tmp_path):
    assert CLASSES > 10
    model = load(save_vit(tmp_path))
    assert sepcap.evaluate(model, images(), tokens=100).top10 < 1


def test_statistics_are_the_plain_models(folder):
    model, task = load(folder), images()
    sample = sample_task(model, task, "collect", 40)
    z = plain_activations("vit", folder, sample)
    positions = 1 + (8 // 4) ** 2
    for size in (1, 16, 40):
        stats = collect_sample(model, sample, SITES, batch_size=size)
        assert stats["mlp"].count == 40 * positions  # all patches and the one that the label is read from
        check_statistics(stats, z)
    assert sepcap.collect(model, task, tokens=40).info["tokens"] == 40


def test_collect_and_evaluate_read_different_images(folder):
    model = load(folder)
    collected = sepcap.collect(model, LOW, tokens=100).info["documents"][0]
    evaluated = sepcap.evaluate(model, LOW, tokens=100).info["documents"][0]
    trained = DigitsSource().indices("train", 10_000)
    assert len(collected) == len(evaluated) == 100
    assert len({*collected, *evaluated, *trained}) == 200 + len(trained)


def test_ablations(folder):
    check_ablations("vit", folder, images())


@pytest.mark.thorough
def test_ablations_compared(folder):
    check_compared("vit", folder, images())


@pytest.mark.thorough
def test_pruning_resumes_and_saves(folder, tmp_path):
    check_pruning("vit", folder, images(range(6)), images(range(6, CLASSES), seed=1), tmp_path)


@pytest.fixture(scope="session")
def trained_vit(tmp_path_factory):
    """A ViT of two layers that has seen the digits' train part for a few seconds."""
    sys.path.insert(0, str(Path(__file__).parents[2] / "training"))
    from vit import ViTTraining, train_vit

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = train_vit(ViTTraining(tmp_path_factory.mktemp("digits"), layers=2, d_model=32, heads=4, steps=400, learning_rate=5e-3))
    torch.set_num_threads(threads)
    return folder


def test_a_trained_model_reads_digits(trained_vit):
    model = load(trained_vit)
    result = sepcap.evaluate(model, "local-digits", tokens=450)
    assert result.top1 > 0.85


@pytest.mark.thorough
def test_digits_are_forgotten_and_the_others_kept(trained_vit, tmp_path):
    """Chosen neurons cost the digits 0 to 4 more than 5 to 9, and the difference is more than that of random neurons."""
    model, gap = load(trained_vit), {}
    for importance in ("abs", "random"):
        config = sepcap.PruningConfig(
            forget=LOW, retain=HIGH, fractions={"mlp": 0.12}, steps=3, tokens=150, eval_tokens=200, importance=importance
        )
        run = sepcap.prune(model, config, out=tmp_path / importance)
        top1 = run.trajectory.pivot(index="step", columns="role", values="top1")
        lost = 1 - top1 / top1.loc[0]
        gap[importance] = (lost.forget - lost.retain).max()
    assert gap["abs"] > 0.15
    assert gap["abs"] > gap["random"] + 0.1
