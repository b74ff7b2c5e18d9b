"""One shard of a collection, in a worker."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from sepcap.models.loading.load import load_model
from sepcap.progress import silent
from sepcap.statistics.collect import collect_sample, info_of
from sepcap.statistics.gradients import resolve_gradients
from sepcap.tasks.load import load_task
from sepcap.tasks.samples import sample_task
from sepcap.workers.shards import out_of_memory_is_an_error, shard_of


class CollectShards:
    """Collects shards of a task with a model that is loaded once."""

    def __init__(self, model: str, load: Mapping[str, Any]) -> None:
        self.model = load_model(model, **load)

    def run(self, options: Mapping[str, Any], shard: int, file: str) -> dict[str, Any]:
        """Write the statistics of one shard.

        Args:
            options: arguments of `sepcap.collect`.
            shard: number of the shard.
            file: where to write.

        Returns:
            `rows` of the shard, and `info` of the whole collection; or `state` "failed" with the `error`.
        """
        how = dict(options)
        try:
            sampled = [how.pop(name) for name in ("tokens", "context", "seed", "per_document")]
            sample = sample_task(self.model, load_task(how.pop("task")), "collect", *sampled)
            rows = shard_of(len(sample.rows), how["batch_size"], shard)
            info = info_of(self.model, sample, how["include_bos"])
            if rows:
                how["gradients"] = resolve_gradients(how["gradients"])
                with silent():
                    out_of_memory_is_an_error(partial(collect_sample, self.model, sample.take(rows), **how)).save(file)
            return {"rows": len(rows), "info": info}
        except Exception as error:
            return {"state": "failed", "error": f"{type(error).__name__}: {error}"}
