"""Provenance of a result: stored with every run, and compared when a folder is reopened."""

import datetime
import importlib.metadata
from collections.abc import Iterator, Mapping
from typing import Any

from sepcap.models.forward import device_of
from sepcap.models.kinds import inner
from sepcap.models.weights import fingerprint

PACKAGES = ("sepcap", "torch", "transformers", "transformer-lens", "tokenizers", "numpy")
"""Packages that can change the numbers."""


def made_with(model: Any) -> dict[str, Any]:
    """The model, its device and dtype, the versions of packages, and the time."""
    return {
        "model": str(model.cfg.model_name),
        "model_fingerprint": fingerprint(model),
        "dtype": str(next(inner(model).parameters()).dtype),
        "device": str(device_of(model).type),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def documents_behind(counts: Any) -> tuple[int, int] | None:
    """Smallest and largest number of documents in the `n_documents` of a configuration; None if it has none.

    If some of them are of evaluation texts, only these count.

    >>> documents_behind({"collect": {"code": 9}, "evaluate": {"code": 60, "prose": 75}}), documents_behind(3), documents_behind(None)
    ((60, 75), (3, 3), None)
    """
    found = list(_counts(counts, ""))
    evaluated = [n for name, n in found if "evaluate" in name]
    numbers = evaluated or [n for _, n in found]
    return (min(numbers), max(numbers)) if numbers else None


def _counts(counts: Any, name: str) -> Iterator[tuple[str, int]]:
    if isinstance(counts, Mapping):
        for key, value in counts.items():
            yield from _counts(value, f"{name} {key}")
    elif counts is not None:
        yield name, int(counts)
