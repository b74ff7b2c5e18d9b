"""What wandb wrote while offline, read back with its own messages: the file is a log of records as LevelDB frames them."""

import json
import time
from pathlib import Path

BLOCK = 32_768
HEADER = 7
FULL, LAST = 1, 4


def records(path: Path):
    """The records of one `run-….wandb`, as wandb's own protocol buffers."""
    from wandb.proto.wandb_internal_pb2 import Record

    data = path.read_bytes()
    assert data[:4] == b":W&B"
    at, whole = HEADER, b""
    while at + HEADER <= len(data):
        if (room := BLOCK - at % BLOCK) < HEADER:
            at += room
            continue
        n, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        if at + HEADER + n > len(data):
            return
        whole += data[at + HEADER : at + HEADER + n]
        at += HEADER + n
        if kind in (FULL, LAST):
            record = Record()
            record.ParseFromString(whole)
            yield record
            whole = b""


def values_in(record) -> dict:
    """The values of a history record, by name."""
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}


def _all_records(path: Path, limit_s: float = 20) -> list:
    """All records up to the one that ends a run: wandb's process writes it a moment after the run was let go of."""
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        found = list(records(path))
        if any(record.WhichOneof("record_type") == "exit" for record in found):
            return found
        time.sleep(0.05)
    raise AssertionError(f"{path} has no end")


def logged(folder: Path) -> dict:
    """Of all files below a folder: the ids of the runs, their configuration, how they ended, and the values step by step."""
    found = {"ids": set(), "projects": set(), "config": {}, "exits": [], "steps": {}}
    paths = sorted(folder.rglob("run-*.wandb"), key=lambda path: path.stat().st_mtime_ns)
    for path in paths:
        for record in _all_records(path):
            kind = record.WhichOneof("record_type")
            if kind == "run":
                found["ids"].add(record.run.run_id)
                found["projects"].add(record.run.project)
                found["config"] |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
            elif kind == "exit":
                found["exits"].append(record.exit.exit_code)
            elif kind == "history":
                values = values_in(record)
                found["steps"].setdefault(values["_step"], []).append(values)
    return found
