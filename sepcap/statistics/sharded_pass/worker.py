"""One shard of a collection, in a worker."""

from collections.abc import Mapping
from typing import Any

from sepcap.statistics.collect import collect_sample, info_of
from sepcap.statistics.gradients import resolve_gradients
from sepcap.tasks.batches import TokenSample
from sepcap.tasks.shards import ShardsOfTask

SAMPLED = ("task", "tokens", "context", "seed", "per_document")
"""Arguments of `sepcap.collect` that are those of the sample."""


class CollectShards(ShardsOfTask):
    """Shards of `sepcap.collect`."""

    SPLIT = "collect"

    def measure(self, sample: TokenSample, rows: range, options: Mapping[str, Any], file: str) -> None:
        """Write the statistics of some rows."""
        how = {name: value for name, value in options.items() if name not in SAMPLED}
        how["gradients"] = resolve_gradients(how["gradients"])
        collect_sample(self.model, sample.take(rows), **how).save(file)

    def described(self, sample: TokenSample, options: Mapping[str, Any]) -> dict[str, Any]:
        """The `info` of the whole collection."""
        return {"info": info_of(self.model, sample, options["include_bos"])}
