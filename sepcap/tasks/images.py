"""Tasks of labelled images, for image classifiers (METHODS 9)."""

import functools
import hashlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int

from sepcap.errors import unknown
from sepcap.tasks.batches import Batch, TokenSample, warn_of_less
from sepcap.tasks.sources.hub import Streamed, read_from
from sepcap.tasks.sources.pixels import WITH_TRAINING, WITHOUT_TRAINING, percentile, pixel_hash
from sepcap.tasks.task import Source, Split


class ImageSource:
    """Distinct images of a dataset, in the order of a hash of their pixels, which also determines the part.

    Rows without an image or without a label are left out, as are rows without a text.

    Args:
        dataset: a `datasets.Dataset` with a column `image` and a column `label`.
        labels: labels to include; default is all.
        shares: percentiles of the hash for each part.
    """

    def __init__(
        self, dataset: Any, labels: Iterable[int] | None = None, shares: Mapping[Split, Collection[int]] = WITHOUT_TRAINING
    ) -> None:
        wanted = None if labels is None else set(labels)
        ranked: dict[str, int] = {}
        for i, row in enumerate(dataset):
            image, label = row["image"], row["label"]
            if image is None or label is None:
                continue
            if not isinstance(label, int):
                raise TypeError(f"row {i}: label is a {type(label).__name__}; give whole numbers, the indices of the classifier's outputs")
            if not hasattr(image, "tobytes"):
                raise TypeError(f"row {i}: image is a {type(image).__name__}; cast the column: cast_column('image', datasets.Image())")
            if wanted is None or label in wanted:
                ranked.setdefault(pixel_hash(image), i)
        if not ranked:
            which = "with an image and a label" if wanted is None else f"with an image and a label in {sorted(wanted)}"
            raise ValueError(f"the dataset has no images: {len(dataset)} rows, none {which}")
        keys = sorted(ranked)
        label_of = dataset["label"][:]
        self.fingerprint = hashlib.sha256("".join(f"{key}{label_of[ranked[key]]}" for key in keys).encode()).hexdigest()[:16]
        self._rows = {part: [ranked[key] for key in keys if percentile(key) in percent] for part, percent in shares.items()}
        self._dataset = dataset.select_columns(["image", "label"])

    def documents(self, split: Split) -> Any:
        """The images of one part."""
        if split not in self._rows:
            raise unknown("split", split, self._rows)
        return self._dataset.select(self._rows[split])

    def indices(self, split: Split, n: int) -> list[int] | str:
        """Row numbers in the dataset."""
        return self._rows[split][:n]


def has_images(dataset: Any) -> bool:
    """Whether a dataset consists of images with labels."""
    return {"image", "label"} <= set(dataset.column_names)


@dataclass(frozen=True)
class DigitsSource:
    """The handwritten digits that ship with scikit-learn: 1,797 images of 8×8 pixels.

    A quarter of them is for collection, a quarter for evaluation and half for training.

    Attributes:
        digits: which digits are included.
    """

    digits: tuple[int, ...] = tuple(range(10))

    @functools.cached_property
    def _source(self) -> ImageSource:
        return ImageSource(digits_dataset(), self.digits, WITH_TRAINING)

    @property
    def fingerprint(self) -> str:
        """Hash of the images."""
        return self._source.fingerprint

    def documents(self, split: Split) -> Any:
        """The images of one part."""
        return self._source.documents(split)

    def indices(self, split: Split, n: int) -> list[int] | str:
        """Row numbers in scikit-learn's dataset."""
        return self._source.indices(split, n)


@functools.cache
def digits_dataset() -> Any:
    """All digits as a `datasets.Dataset`; grey values 0 to 16 become 0 to 240."""
    import datasets

    try:
        from PIL import Image
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("the digits need scikit-learn and pillow; install the extra: pip install 'sepcap[vision]'") from error
    pixels, labels = load_digits(return_X_y=True)
    images = [Image.fromarray((row.reshape(8, 8) * 15).astype(np.uint8)) for row in pixels]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    return datasets.Dataset.from_dict({"image": images, "label": labels.tolist()}, features=features)


@dataclass(frozen=True, eq=False)
class ImageSample(TokenSample):
    """A fixed number of images of a task. Its `rows` are their labels, one each, and its `tokens` count images.

    Attributes:
        images: `datasets.Dataset` with the images and labels, in order.
        processor: image processor of the model.
        channels: input channels of the model: 1 for grey, 3 for colours.
    """

    images: Any
    processor: Any
    channels: int

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """The images in order, `batch_size` at a time, preprocessed by the model's processor."""
        for start in range(0, len(self.rows), batch_size):
            part = self.images[start : start + batch_size]
            pixels = pixels_of(part["image"], self.processor, self.channels)
            labels = torch.tensor(part["label"])[:, None]
            every = torch.ones_like(labels, dtype=torch.bool)
            yield Batch(pixels, every, every, every, labels, None)

    def take(self, rows: Sequence[int]) -> "ImageSample":
        """The sample restricted to some of the images, given by number."""
        chosen = super().take(rows)
        return type(self)(**{**vars(chosen), "images": self.images.select(rows)})

    def targets(self) -> Int[np.ndarray, " prediction"]:
        """Empty: no label is excluded as too frequent, as there are no skip-50 variants for images."""
        return np.empty(0, dtype=np.int64)


def pixels_of(images: Sequence[Any], processor: Any, channels: int) -> Float[torch.Tensor, "image channel height width"]:
    """The model's inputs for some images, converted to grey or colour as the model requires."""
    mode = "L" if channels == 1 else "RGB"
    for image in images:
        if image.mode.startswith(("I", "F")):  # pillow would clip everything above 255
            raise ValueError(f"an image has the mode {image.mode!r}, with more than 8 bits per channel; convert it to 'L' or 'RGB' first")
    return processor([image.convert(mode) for image in images], return_tensors="pt")["pixel_values"]


def sample_images(
    task: Any, split: Split, processor: Any, images: int, seed: int = 0, *, channels: int = 3, classes: int | None = None
) -> ImageSample:
    """The first images of a part of a task, one source after another; see `sample_tokens`.

    Args:
        task: a Task of images.
        split: "collect" or "evaluate".
        processor: image processor of the model.
        images: number of images.
        seed: of the order of the images; 0 keeps the original order.
        channels: input channels of the model: 1 for grey, 3 for colours.
        classes: number of classes of the model; in "evaluate", labels must be among them.
    """
    import datasets

    if images < 1:
        raise ValueError(f"tokens={images}: give at least 1 image")
    shares = [images // len(task.sources) + (i < images % len(task.sources)) for i in range(len(task.sources))]
    parts, indices = [], []
    for source, share in zip(task.sources, shares, strict=True):
        used: list[int] = []
        for piece, rows in _slices(source, split, seed):
            parts.append(piece.select(range(min(len(piece), share - len(used)))))
            used += rows[: len(parts[-1])]
            if len(used) == share:
                break
        indices.append(used)
    if not any(map(len, parts)):
        raise ValueError(f"task {task.name!r} has no images to {split}{read_from(task)}")
    found = datasets.concatenate_datasets([part for part in parts if len(part)])
    if len(found) < images:
        warn_of_less(task.name, split, len(found), images, "images")
    labels = tuple(np.array([label]) for label in found["label"][:])
    wrong = sorted({int(label) for label in found["label"][:] if classes is not None and not 0 <= label < classes})
    if wrong and split == "evaluate":
        raise ValueError(f"task {task.name!r} has the labels {wrong[:5]}, but the model has the classes 0 to {(classes or 0) - 1}")
    digest = hashlib.sha256(f"{task.fingerprint} {split} {len(found)} {seed}".encode()).hexdigest()[:16]
    return ImageSample(
        task.name,
        split,
        labels,
        None,
        images,
        len(found),
        tuple(indices),
        digest,
        found,
        processor,
        channels,
        row_documents=tuple((i,) for i in range(len(found))),
        origins=tuple((source, number) for source, used in enumerate(indices) for number in used),
    )


def _slices(source: Source, split: Split, seed: int) -> Iterator[tuple[Any, list[int]]]:
    """The images of a part and their row numbers in the underlying data, some at a time if they are streamed."""
    if isinstance(source, Streamed):
        for piece in source.slices(split, seed):
            yield piece.select_columns(["image", "label"]), piece["row"][:]
        return
    dataset = source.documents(split)
    order = np.random.default_rng(seed).permutation(len(dataset)) if seed else np.arange(len(dataset))
    rows = source.indices(split, len(dataset))
    yield dataset.select(order), [int(i if isinstance(rows, str) else rows[i]) for i in order]
