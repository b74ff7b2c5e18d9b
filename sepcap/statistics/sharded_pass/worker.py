"""One shard of a collection, in a worker."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from sepcap.statistics.collect import check_positions, collect_sample, correct_in, info_of
from sepcap.statistics.gradients import resolve_gradients
from sepcap.statistics.replicates import Draws
from sepcap.storage import load_tensors
from sepcap.tasks.batches import TokenSample
from sepcap.tasks.shards import ShardsOfTask
from sepcap.tasks.task import Task
from sepcap.workers.engines import named

PASSED_ON = ("sites", "batch_size", "include_bos", "histogram", "k", "checkpoint")
"""Arguments of `sepcap.collect` that are those of every shard."""


class CollectShards(ShardsOfTask):
    """Shards of `sepcap.collect`."""

    SPLIT = "collect"

    def measure(self, task: Task, sample: TokenSample, rows: range, options: Mapping[str, Any], file: str) -> None:
        """Write the statistics of some rows."""
        part, only, draws = sample.take(rows), None, None
        if options["positions"] == "correct":
            only = correct_in(self.model, part, options["batch_size"])
        elif options["positions"] != "all":
            whole = load_tensors(options["positions"], "positions", ("right",))[0]["right"]
            check_positions(whole, sample)
            only = whole[rows.start : rows.stop, : max(map(len, part.rows))]
        if options["replicates"]:
            every = Draws.of(task, sample, options["replicates"], options["seed"])
            draws = replace(every, weights=every.weights[:, rows.start : rows.stop])
        how: dict[str, Any] = {name: options[name] for name in PASSED_ON}
        how["gradients"] = resolve_gradients(options["gradients"])
        collect_sample(self.model, part, **how, rotation=_rotation(options), only=only, draws=draws, part=True).save(file)

    def described(self, sample: TokenSample, options: Mapping[str, Any]) -> dict[str, Any]:
        """The `info` of the whole collection."""
        only = None if options["positions"] == "all" else True
        return {"info": info_of(self.model, sample, options["include_bos"], _rotation(options), only)}


def _rotation(options: Mapping[str, Any]) -> Any:
    return None if options["rotation"] is None else named(options["basis"]).load(options["rotation"])
