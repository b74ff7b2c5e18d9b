"""Rows of the table of hub tasks: what is read from which dataset, and what a document is."""

import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from sepcap.checks import check_fields
from sepcap.errors import unknown
from sepcap.tasks.sources.pixels import part_of, pixel_hash
from sepcap.tasks.sources.texts import words_digest
from sepcap.tasks.task import PARTS, Split

OPERATORS: dict[str, Callable[[Any, Any], bool]] = {
    "==": operator.eq,
    "!=": operator.ne,
    "<=": operator.le,
    ">=": operator.ge,
    "in": lambda value, values: value in values,
    "not in": lambda value, values: value not in values,
}

READERS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}
"""Name of the `datasets` reader for a file pattern, by suffix."""

Condition = tuple[str, str, Any]
"""Field (nested: "meta.pile_set_name"), an operator of `OPERATORS`, and the value to compare with."""


@dataclass(frozen=True)
class HubRow:
    """One task of the hub.

    Attributes:
        repository: "owner/name" on the hub, or a folder with a copy of it.
        description: of the task, in a few words.
        field: field with the text (or the image); "a.b" is field b in field a. Several texts are joined by an empty line.
        configuration: of the dataset; None for its only one.
        split: of the dataset. Collection and evaluation use two parts of it.
        filter: conditions, all of which a row must meet. A field without a value meets none. Numbers are compared in the precision
            of the field: for a float32 field, 0.2 is rounded to float32. A class can be given by its name.
        label: field with the class of an image, a whole number. Rows without an image or without a label are left out.
        content: "text" or "images".
        files: pattern of the files to read, if `datasets` does not find them by configuration and split.
        revision: branch, tag or commit; None for the main branch.
        licence: as the dataset's page names it.
        gate: what the page requires before it gives access; empty if nothing.
    """

    repository: str
    description: str = ""
    field: str | tuple[str, ...] = "text"
    configuration: str | None = None
    split: str = "train"
    filter: tuple[Condition, ...] = ()
    label: str | None = None
    content: Literal["text", "images"] = "text"
    files: str | None = None
    revision: str | None = None
    licence: str = "see the page of the dataset"
    gate: str = ""

    def __post_init__(self) -> None:
        check_fields(self)
        for condition in self.filter:
            if len(condition) != 3 or condition[1] not in OPERATORS:
                raise ValueError(f"filter={condition!r}: give (field, operator, value), the operator one of {', '.join(OPERATORS)}")
        if self.content == "images" and (self.label is None or not isinstance(self.field, str)):
            raise ValueError("a task of images needs a field with the image and one with its label: field='img', label='fine_label'")
        if self.files is not None and Path(self.files).suffix not in READERS:
            raise ValueError(f"files={self.files!r}: the pattern must end in one of {', '.join(READERS)}")


def in_terms_of(row: HubRow, features: Mapping[str, Any] | None) -> HubRow:
    """The row with filter values as the data stores them: numbers rounded to the precision of the field, classes as numbers.

    Args:
        row: a row of the table.
        features: type of every field in `datasets`; None if the files do not state it (JSON, whose numbers are float64).
    """
    if features is None:
        return row
    conditions = []
    for field, comparison, value in row.filter:
        kind = _feature_of(features, field)
        many = comparison in ("in", "not in") and not isinstance(value, str)
        as_stored = tuple(_as_stored(kind, each) for each in value) if many else _as_stored(kind, value)
        conditions.append((field, comparison, as_stored))
    return replace(row, filter=tuple(conditions))


def _feature_of(features: Mapping[str, Any], field: str) -> Any:
    found: Any = features
    for part in (field,) if field in features else field.split("."):
        found = found.get(part) if isinstance(found, Mapping) else None
    return found


def _as_stored(kind: Any, value: Any) -> Any:
    names = getattr(kind, "names", None)
    if names is not None and isinstance(value, str):
        if value not in names:
            raise unknown("class in a filter", value, names)
        return names.index(value)
    precision = getattr(kind, "dtype", "")
    if precision in ("float16", "float32") and isinstance(value, int | float):
        return float(np.dtype(precision).type(value))
    return value


def document_of(row: HubRow, example: Mapping[str, Any]) -> dict[str, Any] | None:
    """The document in a row of the data with the hash of its content; None if the filter excludes it or it is empty."""
    if not all(_meets(row, condition, value_of(example, condition[0])) for condition in row.filter):
        return None
    return _image_of(row, example) if row.content == "images" else _text_of(row, example)


def split_of(row: HubRow, key: bytes) -> Split:
    """The part of a document with this hash, the same as in `DataSource` and `ImageSource`."""
    return part_of(key.hex()) if row.content == "images" else PARTS[key[-1] % 2]


def _meets(row: HubRow, condition: Condition, found: Any) -> bool:
    field, comparison, value = condition
    if found is None:
        return False
    try:
        return OPERATORS[comparison](found, value)
    except TypeError as error:
        raise TypeError(
            f"filter={condition!r}: field {field!r} of {row.repository} has values such as {found!r}, "
            f"a {type(found).__name__}, which cannot be compared with {value!r}"
        ) from error


def _text_of(row: HubRow, example: Mapping[str, Any]) -> dict[str, Any] | None:
    fields = (row.field,) if isinstance(row.field, str) else row.field
    texts = [value_of(example, field) for field in fields]
    for field, text in zip(fields, texts, strict=True):
        if not isinstance(text, str | None):
            raise TypeError(f"field {field!r} of {row.repository} is a {type(text).__name__}, not a text")
    text = "\n\n".join(text for text in texts if text)
    key = words_digest(text)
    return None if key is None else {"text": text, "key": key}


def _image_of(row: HubRow, example: Mapping[str, Any]) -> dict[str, Any] | None:
    image, label = value_of(example, str(row.field)), value_of(example, str(row.label))
    if image is None or label is None or image["bytes"] is image["path"] is None:
        return None
    if not isinstance(label, int):
        raise TypeError(
            f"field {row.label!r} of {row.repository} is a {type(label).__name__} ({label!r}); "
            "labels are whole numbers, the indices of the classifier's outputs"
        )
    encoded = image["bytes"] or _read_file(image["path"])
    return {"image": {"bytes": encoded, "path": None}, "label": label, "key": bytes.fromhex(pixel_hash(_decoded(row, encoded)))}


def _decoded(row: HubRow, encoded: bytes) -> Any:
    """The image as `datasets` decodes it in all later steps."""
    from datasets import Image

    try:
        return Image().decode_example({"bytes": encoded, "path": None})
    except OSError as error:  # pillow raises this for unknown formats and truncated files
        raise ValueError(f"field {row.field!r} of {row.repository} has a value that is not an image: {error}") from error


def _read_file(path: str) -> bytes:
    from datasets.utils.file_utils import xopen

    with xopen(path, "rb") as file:
        return file.read()


def value_of(example: Mapping[str, Any], field: str) -> Any:
    """The value of a field, which may be nested in another.

    >>> value_of({"text": "x", "meta": {"set": "ArXiv"}}, "meta.set")
    'ArXiv'
    """
    value: Any = example
    for part in (field,) if field in example else field.split("."):
        if not isinstance(value, Mapping) or part not in value:
            raise unknown("field", field, _names(example), "These are the fields of the data.")
        value = value[part]
    return value


def _names(example: Mapping[str, Any]) -> Iterator[str]:
    for name, value in example.items():
        yield name
        if isinstance(value, Mapping):
            yield from (f"{name}.{inner}" for inner in _names(value))
