"""Small sweeps that tests share."""

from pathlib import Path

from run_folders import bits
from tiny import write_jsonl

import sepcap

SMALL = {"fractions": {"mlp": 0.25}, "steps": 2, "tokens": 150, "eval_tokens": 150, "batch_size": 4, "context": 16}
LOAD = {"device": "cpu"}


def base_of(model: Path, folder: Path, letters, digits, **changes) -> sepcap.PruningConfig:
    """A configuration of which another process finds model and tasks."""
    tasks = {role: write_jsonl(folder / f"{role}.jsonl", texts) for role, texts in (("forget", letters), ("retain", digits))}
    return sepcap.PruningConfig(model=str(model), **tasks, **{**SMALL, **changes})


def cell_bits(out: Path) -> dict:
    """Bits of every cell, without times."""
    return {path.parent.name: bits(path.parent) for path in sorted((out / "cells").glob("*/config.json"))}
