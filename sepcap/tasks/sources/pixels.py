"""The part of an image: determined by its pixels, whatever file, dataset or task it is from."""

import hashlib
from collections.abc import Collection
from typing import Any

from sepcap.tasks.task import Split

WITH_TRAINING: dict[Split, Collection[int]] = {"evaluate": range(0, 25), "collect": range(25, 50), "train": range(50, 100)}
"""Percentiles of the hash of an image for each part, if a model of this package was trained on some of the images."""

WITHOUT_TRAINING: dict[Split, Collection[int]] = {
    "evaluate": (*WITH_TRAINING["evaluate"], *range(50, 75)),
    "collect": (*WITH_TRAINING["collect"], *range(75, 100)),
}
"""The same for all other images: an image for collection in one table is never for evaluation in the other."""


def pixel_hash(image: Any) -> str:
    """Hash of an image's pixels, independent of the file format, as hexadecimal digits."""
    return hashlib.sha256(f"{image.mode}{image.size}".encode() + image.tobytes()).hexdigest()


def percentile(key: str) -> int:
    """0 to 99, from a hash of pixels.

    >>> percentile("00" * 28 + "000000ff")
    55
    """
    return int(key[-8:], 16) % 100


def part_of(key: str) -> Split:
    """The part of `WITHOUT_TRAINING` that an image with this hash is in."""
    return next(part for part, percent in WITHOUT_TRAINING.items() if percentile(key) in percent)
