"""Collection in shards: the statistics of all shards are merged in their order (METHODS 3)."""

from collections.abc import Mapping
from functools import reduce
from pathlib import Path
from typing import Any

from sepcap.statistics.moments import Statistics
from sepcap.workers.shards import SHARDS, in_shards

NOT_IN_SHARDS = {"rotation": None, "positions": "all", "replicates": 0}
"""Arguments of `collect` that are of all rows together, with the value that says no."""


def collect_in_shards(model: Any, options: Mapping[str, Any], **where: Any) -> Statistics:
    """`sepcap.collect` in shards.

    Args:
        model: name or folder of the model.
        options: the other arguments of `collect`.
        where: workers, engine, load, threads.

    Raises:
        ValueError: an argument that is of all rows together.
    """
    for name, none in NOT_IN_SHARDS.items():
        if options[name] is not none and not (isinstance(options[name], str | int) and options[name] == none):
            raise ValueError(f"{name} with workers=: it is of all rows together; leave it at {none!r}, or collect without workers=")
    sites = options["sites"] if isinstance(options["sites"], str) else list(options["sites"])
    plain = {name: value for name, value in options.items() if name not in NOT_IN_SHARDS} | {"sites": sites}
    plain["task"] = str(plain["task"]) if isinstance(plain["task"], Path) else plain["task"]
    return in_shards("collect", "statistics.sharded_pass.worker.CollectShards", model, plain, _merged, **where)


def _merged(files: list[Path], outcomes: list[dict[str, Any]]) -> Statistics:
    parts = map(Statistics.load, files)
    merged = reduce(Statistics.merge, parts)
    return Statistics(dict(merged.items()), outcomes[0]["info"] | {"shards": SHARDS})
