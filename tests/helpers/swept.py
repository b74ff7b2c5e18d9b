"""Small sweeps that tests share."""

import json
from pathlib import Path

from run_folders import bits

import sepcap

SMALL = {"fractions": {"mlp": 0.25}, "steps": 2, "tokens": 150, "eval_tokens": 150, "batch_size": 4, "context": 16}
LOAD = {"device": "cpu"}


def base_of(model: Path, folder: Path, letters, digits, **changes) -> sepcap.PruningConfig:
    """A configuration of which another process finds model and tasks."""
    tasks = {}
    for role, texts in (("forget", letters), ("retain", digits)):
        tasks[role] = folder / f"{role}.jsonl"
        tasks[role].write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return sepcap.PruningConfig(model=str(model), **{role: str(path) for role, path in tasks.items()}, **{**SMALL, **changes})


def cell_bits(out: Path) -> dict:
    """Bits of every cell, without times."""
    return {path.parent.name: bits(path.parent) for path in sorted((out / "cells").glob("*/config.json"))}
