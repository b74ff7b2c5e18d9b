"""What the tests of run folders share."""

import json
from pathlib import Path

import pandas as pd
import torch

import sepcap

STEPS = 2


def config_of(letters, digits, **changes) -> sepcap.PruningConfig:
    options = {"fractions": {"mlp": 0.25, "attn_pre_out": 0.25}, "steps": STEPS, "tokens": 150, "eval_tokens": 150, "batch_size": 4}
    return sepcap.PruningConfig(forget=letters, retain=digits, **{**options, **changes})


def bits(folder: Path) -> dict:
    """Every file of a run, without times: the log, `created` and `seconds`."""
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(folder).as_posix()
        if name == "run.log":
            continue
        if name == "trajectory.parquet":
            files[name] = pd.read_parquet(path).drop(columns="seconds").to_json()
        elif path.suffix == ".jsonl":
            lines = map(json.loads, path.read_text().splitlines())
            files[name] = [{k: v for k, v in line.items() if k != "seconds"} for line in lines]
        elif path.suffix == ".json":
            files[name] = {k: v for k, v in json.loads(path.read_text()).items() if k not in ("created", "seconds", "sha256")}
        else:
            files[name] = path.read_bytes()
    return files


def weights(model) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.original_model.named_parameters()}


def same_weights(model, before) -> bool:
    return all(torch.equal(value, before[name]) for name, value in model.original_model.named_parameters())


class Stop(Exception):
    """An error that nothing in the package expects."""


def stop_by(kind):
    def stop():
        raise kind("now")

    return stop
