"""Tasks of images: which image is in which part, duplicates, what a processor makes of grey and colours, and the digits."""

import sys

import datasets
import numpy as np
import pytest
import torch
from encoders import dataset_of, images, load, noise, save_vit

import sepcap
from sepcap.tasks import images as module
from sepcap.tasks.images import WITH_TRAINING, WITHOUT_TRAINING, DigitsSource, ImageSource, has_images, pixel_hash, pixels_of, sample_images
from sepcap.tasks.samples import sample_task
from sepcap.tasks.task import Task

PARTS = ("train", "collect", "evaluate")


@pytest.fixture(scope="module")
def grey(tmp_path_factory):
    return load(save_vit(tmp_path_factory.mktemp("grey")))


def bytes_of(dataset):
    return [image.tobytes() for image in dataset["image"]]


@pytest.mark.thorough
def test_digits_are_those_of_scikit_learn():
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    source, seen = DigitsSource(), []
    for part in PARTS:
        rows = source.indices(part, 10_000)
        documents = source.documents(part)
        assert documents["label"] == labels[rows].tolist()
        for image, row in zip(documents["image"], rows, strict=True):
            assert (np.asarray(image).ravel() == pixels[row] * 15).all()
        seen += rows
    assert sorted(seen) == list(range(1797))
    shares = [len(source.documents(part)) / 1797 for part in PARTS]
    np.testing.assert_allclose(shares, [0.5, 0.25, 0.25], atol=0.03)
    for digit in range(10):  # enough of each to measure with
        assert len(DigitsSource((digit,)).documents("evaluate")) > 25


def test_a_digit_is_in_one_part_whichever_digits_are_taken():
    whole, low, high = DigitsSource(), DigitsSource((0, 1, 2, 3, 4)), DigitsSource((5, 6, 7, 8, 9))
    for part in PARTS:
        assert set(low.documents(part)["label"]) == {0, 1, 2, 3, 4}
        halves = low.indices(part, 10_000) + high.indices(part, 10_000)
        assert sorted(halves) == sorted(whole.indices(part, 10_000))
    assert len({source.fingerprint for source in (whole, low, high)}) == 3
    assert DigitsSource((0, 1, 2, 3, 4)).fingerprint == low.fingerprint


@pytest.mark.parametrize("shares", [WITH_TRAINING, WITHOUT_TRAINING])
def test_parts_are_disjoint_and_of_their_size(shares):
    dataset = dataset_of(noise(400), [0] * 400)
    source = ImageSource(dataset, shares=shares)
    parts = {part: source.documents(part) for part in shares}
    found = [pixels for part in parts.values() for pixels in bytes_of(part)]
    assert len(found) == len(set(found)) == 400
    for part, percent in shares.items():
        assert abs(len(parts[part]) / 400 - len(percent) / 100) < 0.1  # four standard deviations
    # whatever order they come in, and whichever others there are
    turned = ImageSource(dataset.select(range(399, 99, -1)), shares=shares)
    there = set(bytes_of(dataset.select(range(100, 400))))
    for part in shares:
        assert bytes_of(turned.documents(part)) == [pixels for pixels in bytes_of(parts[part]) if pixels in there]


def test_equal_images_are_one(tmp_path):
    from PIL import Image

    arrays = noise(30)
    for i, array in enumerate(arrays):  # the same pixels in other file formats, and some twice
        Image.fromarray(array).save(tmp_path / f"{i}.{('png', 'bmp', 'tiff')[i % 3]}")
    files = [str(tmp_path / f"{i}.{('png', 'bmp', 'tiff')[i % 3]}") for i in range(30)]
    again = datasets.Dataset.from_dict({"image": files, "label": list(range(30))}).cast_column("image", datasets.Image())
    whole = datasets.concatenate_datasets([dataset_of(arrays, range(30)), again.cast(dataset_of(arrays[:1], [0]).features)])
    assert len(whole) == 60
    source = ImageSource(whole)
    assert sum(len(source.documents(part)) for part in WITHOUT_TRAINING) == 30
    assert source.fingerprint == ImageSource(dataset_of(arrays, range(30))).fingerprint
    assert pixel_hash(Image.fromarray(noise(1, (4, 16))[0])) != pixel_hash(Image.fromarray(noise(1, (4, 16))[0].reshape(8, 8)))


def test_the_fingerprint_is_of_images_and_labels():
    arrays = noise(20)
    first = ImageSource(dataset_of(arrays, range(20)))
    assert ImageSource(dataset_of(arrays, range(1, 21))).fingerprint != first.fingerprint
    assert ImageSource(dataset_of(noise(20, seed=1), range(20))).fingerprint != first.fingerprint


def test_rows_of_the_users_dataset():
    labels = [i % 4 for i in range(80)]
    dataset = dataset_of(noise(80), labels)
    source = ImageSource(dataset, labels=(1, 3))
    for part in WITHOUT_TRAINING:
        rows = source.indices(part, 1000)
        assert bytes_of(source.documents(part)) == bytes_of(dataset.select(rows))
        assert source.indices(part, 3) == rows[:3]
        assert {labels[row] for row in rows} == {1, 3}
    assert has_images(dataset)
    assert not has_images(dataset.remove_columns("label"))


def test_a_sample_takes_sources_in_equal_numbers():
    low, high = DigitsSource((0, 1)), DigitsSource((7,))
    sample = sample_images(Task("both", (low, high), "images"), "evaluate", None, 31)
    labels = np.concatenate(sample.rows)
    assert sample.tokens == len(labels) == 31
    assert (labels < 2).sum() == 16
    assert (labels == 7).sum() == 15
    assert sample.indices == (low.indices("evaluate", 16), high.indices("evaluate", 15))
    assert not sample.targets().size
    some = sample.take([30, 0])
    assert [int(row[0]) for row in some.rows] == [7, labels[0]]
    assert bytes_of(some.images) == [bytes_of(sample.images)[30], bytes_of(sample.images)[0]]
    assert some.tokens == 2


def test_the_seed_orders_images():
    task = Task("digits", (DigitsSource(),), "images")
    first, one, again, two = (sample_images(task, "collect", None, 40, seed) for seed in (0, 1, 1, 2))
    assert first.indices[0] == DigitsSource().indices("collect", 40)
    assert one.indices == again.indices != two.indices
    assert one.fingerprint == again.fingerprint
    assert len({sample.fingerprint for sample in (first, one, two)}) == 3
    assert set(one.indices[0]) < set(DigitsSource().indices("collect", 1000))


def test_what_a_batch_holds(grey):
    task = Task("digits", (DigitsSource(),), "images")
    sample = sample_task(grey, task, "evaluate", 21)
    (whole,) = sample.batches(32)
    assert whole.inputs.shape == (21, 1, 8, 8)
    assert whole.mask is None
    assert whole.size == int(whole.asked.sum()) == 21
    assert whole.answers[:, 0].tolist() == DigitsSource().documents("evaluate")["label"][:21]
    parts = list(sample.batches(8))
    assert [len(part.inputs) for part in parts] == [8, 8, 5]
    assert torch.equal(torch.cat([part.inputs for part in parts]), whole.inputs)
    assert torch.equal(torch.cat([part.answers for part in parts]), whole.answers)
    # as the processor of `save_vit` says: from 0 to 255 to 0 to 1, less 0.5, over 0.25
    pixels = np.stack([np.asarray(image) for image in DigitsSource().documents("evaluate")[:21]["image"]])
    np.testing.assert_allclose(whole.inputs[:, 0], (pixels / 255 - 0.5) / 0.25, atol=1e-5)


def test_colours_for_a_grey_model_and_the_reverse(grey, tmp_path):
    colours = load(save_vit(tmp_path, channels=3))
    (of_grey,) = sample_task(colours, images(), "evaluate", 5).batches(8)
    assert of_grey.inputs.shape == (5, 3, 8, 8)
    raw = of_grey.inputs * 0.25 + torch.tensor([0.5, 0.4, 0.3])[:, None, None]
    torch.testing.assert_close(raw, raw[:, :1].expand_as(raw))  # three equal channels
    task = images(shape=(8, 8, 3))
    rows = sample_task(grey, task, "evaluate", 5)
    arrays = np.stack([np.asarray(image) for image in rows.images["image"]]).astype(float)
    luma = (arrays * [0.299, 0.587, 0.114]).sum(-1)  # ITU-R 601, as everywhere
    (of_colours,) = rows.batches(8)
    assert of_colours.inputs.shape == (5, 1, 8, 8)
    np.testing.assert_allclose((of_colours.inputs[:, 0] * 0.25 + 0.5) * 255, luma, atol=1)
    (same,) = sample_task(colours, task, "evaluate", 5).batches(8)
    raw = (same.inputs * 0.25 + torch.tensor([0.5, 0.4, 0.3])[:, None, None]) * 255
    np.testing.assert_allclose(raw.permute(0, 2, 3, 1), arrays, atol=1e-3)


def test_a_processor_resizes(tmp_path):
    model = load(save_vit(tmp_path, channels=3, side=16))
    (batch,) = sample_task(model, Task("digits", (DigitsSource(),), "images"), "evaluate", 3).batches(4)
    assert batch.inputs.shape == (3, 3, 16, 16)


def test_rows_without_an_image_or_a_label_are_left_out():
    arrays = noise(20)
    whole = dataset_of(arrays, range(20))
    holes = {
        "image": [None if i == 3 else image for i, image in enumerate(whole["image"])],
        "label": [None if i == 5 else i for i in range(20)],
    }
    source, without = (
        ImageSource(datasets.Dataset.from_dict(holes, whole.features)),
        ImageSource(whole.select([*range(3), 4, *range(6, 20)])),
    )
    assert source.fingerprint == without.fingerprint
    assert sorted(i for part in WITHOUT_TRAINING for i in source.indices(part, 99)) == [*range(3), 4, *range(6, 20)]
    nothing = datasets.Dataset.from_dict({"image": [None], "label": [1]}, whole.features)
    with pytest.raises(ValueError, match="no images: 1 rows, none with an image and a label"):
        ImageSource(nothing)


def test_images_under_other_names_are_told_of_the_right_ones():
    dataset = dataset_of(noise(8), range(8)).rename_columns({"image": "img", "label": "fine_label"})
    with pytest.raises(ValueError, match=r"column 'img' contains images.*rename_columns.*'image'.*'label'.*'img', 'fine_label'"):
        sepcap.load_task(dataset)
    with pytest.raises(ValueError, match="column 'image' contains images"):
        sepcap.load_task(dataset.rename_column("img", "image"))


def test_fewer_images_than_asked_for(grey):
    with pytest.warns(UserWarning, match=r"fewer images to evaluate than the 9,999 asked for: 456"):
        sample = sample_task(grey, Task("digits", (DigitsSource(),), "images"), "evaluate", 9999)
    assert (sample.asked, sample.tokens) == (9999, 456)


def test_errors(grey):
    dataset = dataset_of(noise(8), range(8))
    with pytest.raises(ValueError, match=r"no images: 8 rows, none with an image and a label in \[77\]"):
        ImageSource(dataset, labels=(77,))
    named = dataset.cast_column("label", datasets.Value("string"))
    with pytest.raises(TypeError, match="row 0: label is a str; give whole numbers"):
        ImageSource(named)
    encoded = datasets.Dataset.from_dict({"image": [b"no image"], "label": [1]})
    with pytest.raises(TypeError, match=r"row 0: image is a bytes; cast the column"):
        ImageSource(encoded)
    with pytest.raises(ValueError, match="split='train' is not known"):
        ImageSource(dataset).documents("train")
    with pytest.raises(ValueError, match="tokens=0: give at least 1"):
        sepcap.evaluate(grey, images(), tokens=0)
    empty = Task("empty", (ImageSource(dataset, shares={"evaluate": range(0)}),), "images")
    with pytest.raises(ValueError, match="task 'empty' has no images to evaluate"):
        sepcap.evaluate(grey, empty)


@pytest.mark.parametrize("package", ["PIL", "sklearn.datasets"])
def test_a_missing_package_names_the_extra(package, monkeypatch):
    module.digits_dataset.cache_clear()
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=r"scikit-learn.*pillow.*sepcap\[vision\]"):
        DigitsSource().documents("evaluate")


def test_a_classifier_without_pillow_names_the_extra(tmp_path, monkeypatch):
    folder = save_vit(tmp_path)
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ImportError, match=r"pillow.*sepcap\[vision\]"):
        load(folder)


def test_labels_that_the_model_does_not_have_are_refused():
    task = sepcap.load_task("local-digits-high")
    with pytest.raises(ValueError, match=r"labels \[5, 6, 7, 8, 9\], but the model has the classes 0 to 4"):
        sample_images(task, "evaluate", None, 40, channels=1, classes=5)
    assert len(sample_images(task, "collect", None, 40, channels=1, classes=5).rows) == 40


def test_more_than_eight_bits_are_refused():
    from PIL import Image

    with pytest.raises(ValueError, match="I;16"):
        pixels_of([Image.new("I;16", (8, 8))], None, 1)
