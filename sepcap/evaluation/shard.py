"""One shard of an evaluation, in a worker."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from sepcap.evaluation.next_token import evaluate_sample, evaluated_info, most_frequent_targets
from sepcap.models.loading.load import load_model
from sepcap.progress import silent
from sepcap.storage import save_tensors
from sepcap.tasks.load import load_task
from sepcap.tasks.samples import sample_task
from sepcap.workers.shards import out_of_memory_is_an_error, shard_of


class EvaluateShards:
    """Evaluates shards of a task with a model that is loaded once."""

    def __init__(self, model: str, load: Mapping[str, Any]) -> None:
        self.model = load_model(model, **load)

    def run(self, options: Mapping[str, Any], shard: int, file: str) -> dict[str, Any]:
        """Write the sums per row of one shard.

        Args:
            options: arguments of `sepcap.evaluate`.
            shard: number of the shard.
            file: where to write.

        Returns:
            `rows` of the shard, and what the evaluation of all rows has beside sums; or `state` "failed" with the `error`.
        """
        try:
            sampled = [options[name] for name in ("tokens", "context", "seed", "per_document")]
            sample = sample_task(self.model, load_task(options["task"]), "evaluate", *sampled)
            frequent, size = most_frequent_targets(sample), options["batch_size"]
            rows = shard_of(len(sample.rows), size, shard)
            if rows:
                pass_over = partial(evaluate_sample, self.model, sample.take(rows), batch_size=size, frequent=frequent)
                with silent():
                    sums = out_of_memory_is_an_error(pass_over).per_row
                save_tensors(file, {"rows": torch.from_numpy(sums)}, {"kind": "shard"})
            clusters = {"clusters": sample.clusters.tolist(), "groups": None if sample.groups is None else list(sample.groups)}
            info = evaluated_info(self.model, sample, frequent)
            return {"rows": len(rows), "task": sample.task, "skip": list(frequent), "info": info, **clusters}
        except Exception as error:
            return {"state": "failed", "error": f"{type(error).__name__}: {error}"}
