"""Configurations of planted results of ablations."""

from typing import Any


def planted_config(**fields: Any) -> dict[str, Any]:
    """What a result needs to know of its sample, and these fields."""
    evaluation = {"skip_tokens": [], "groups": None, "info": {"sample": "s"}}
    return {"model": "m", "documents": {"evaluate": []}, "evaluation": evaluation, **fields}
