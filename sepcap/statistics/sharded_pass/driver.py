"""Collection in shards: the statistics of all shards are merged in their order (METHODS 3)."""

from collections.abc import Callable, Mapping
from functools import reduce
from pathlib import Path
from typing import Any

from torch import Tensor

from sepcap.statistics.backward import check_gradients
from sepcap.statistics.moments import Statistics
from sepcap.storage import save_tensors
from sepcap.workers.shards import SHARDS, in_shards


def collect_in_shards(model: Any, options: Mapping[str, Any], **where: Any) -> Statistics:
    """`sepcap.collect` in shards.

    Args:
        model: name or folder of the model.
        options: the other arguments of `collect`.
        where: workers, engine, load, threads, gpus_per_run.

    Raises:
        ValueError: a loaded model, or no prediction that is right with positions="correct".
        TypeError: an argument that is an object of Python, other than a rotation and positions.
    """
    plain, write = dict(options), dict[str, Callable[[Path], Any]]()
    plain["sites"] = options["sites"] if isinstance(options["sites"], str) else list(options["sites"])
    plain["task"] = str(plain["task"]) if isinstance(plain["task"], Path) else plain["task"]
    if hasattr(rotation := options["rotation"], "activations"):
        kind = type(rotation)
        plain |= {"rotation": "", "basis": f"{kind.__module__}.{kind.__qualname__}".removeprefix("sepcap.")}
        write["rotation"] = rotation.save
    if isinstance(right := options["positions"], Tensor):
        plain["positions"] = ""
        write["positions"] = lambda path: save_tensors(path, {"right": right}, {"kind": "positions"})
    found = in_shards("collect", "statistics.sharded_pass.worker.CollectShards", model, plain, _merged, **where, write=write)
    if not isinstance(right, str) or right == "correct":
        check_any_right(any(stats.count for stats in found.values()), found.info["tokens"], found.info["task"])
    check_gradients({site: stats.gradients for site, stats in found.items() if stats.gradients is not None})
    return found


def _merged(files: list[Path], outcomes: list[dict[str, Any]]) -> Statistics:
    parts = map(Statistics.load, files)
    merged = reduce(Statistics.merge, parts)
    return Statistics(dict(merged.items()), outcomes[0]["info"] | {"shards": SHARDS})


def check_any_right(any_right: bool, tokens: int, task: str) -> None:
    """Check that there is a position to which statistics can be restricted.

    Raises:
        ValueError: nothing is predicted right.
    """
    if not any_right:
        raise ValueError(
            f"positions='correct': the model predicts none of {tokens:,} tokens of {task!r} right, so no position is left; "
            "give positions='all'"
        )
