"""Provenance of a result: stored with every run, and compared when a folder is reopened."""

import datetime
import importlib.metadata
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
