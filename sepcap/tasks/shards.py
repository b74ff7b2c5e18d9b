"""A worker's pass over one shard of the rows of a task."""

from collections.abc import Mapping
from typing import Any, ClassVar

from sepcap.models.loading.load import load_model
from sepcap.progress import silent
from sepcap.tasks.batches import TokenSample
from sepcap.tasks.load import load_task
from sepcap.tasks.samples import sample_task
from sepcap.tasks.task import Split, Task
from sepcap.workers.shards import heard, out_of_memory_is_an_error, shard_of


class ShardsOfTask:
    """Carries out shards with a model that is loaded once; a pass defines `measure`, `described` and the part of the task."""

    SPLIT: ClassVar[Split]

    def __init__(self, model: str, load: Mapping[str, Any]) -> None:
        with heard() as self._loading:
            self.model = load_model(model, **load)

    def measure(self, task: Task, sample: TokenSample, rows: range, options: Mapping[str, Any], file: str) -> None:
        """Measure some rows of a sample of a task, and write what was found."""
        raise NotImplementedError

    def described(self, sample: TokenSample, options: Mapping[str, Any]) -> dict[str, Any]:
        """What the result of all rows has beside what is measured, as JSON."""
        raise NotImplementedError

    def run(self, options: Mapping[str, Any], shard: int, file: str) -> dict[str, Any]:
        """Write the file of one shard.

        Args:
            options: arguments of the pass.
            shard: number of the shard.
            file: where to write.

        Returns:
            `rows` of the shard, what `described` returns and `warnings`; or `state` "failed" with the `error`.
        """
        try:
            with heard() as said:
                sampled = [options[name] for name in ("tokens", "context", "seed", "per_document")]
                task = load_task(options["task"])
                sample = sample_task(self.model, task, self.SPLIT, *sampled)
                rows = shard_of(len(sample.rows), options["batch_size"], shard)
                if rows:
                    with silent():
                        out_of_memory_is_an_error(lambda: self.measure(task, sample, rows, options, file))
                described = self.described(sample, options)
            return {"rows": len(rows), **described, "warnings": [*self._loading, *said]}
        except Exception as error:
            return {"state": "failed", "error": f"{type(error).__name__}: {error}"}
