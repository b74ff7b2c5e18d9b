"""One shard of an evaluation, in a worker."""

from collections.abc import Mapping
from typing import Any

import torch

from sepcap.evaluation.next_token import evaluate_sample, evaluated_info, most_frequent_targets
from sepcap.storage import save_tensors
from sepcap.tasks.batches import TokenSample
from sepcap.tasks.shards import ShardsOfTask
from sepcap.tasks.task import Task


class EvaluateShards(ShardsOfTask):
    """Shards of `sepcap.evaluate`."""

    SPLIT = "evaluate"

    def measure(self, task: Task, sample: TokenSample, rows: range, options: Mapping[str, Any], file: str) -> None:
        """Write the sums of every row."""
        frequent = most_frequent_targets(sample)
        found = evaluate_sample(self.model, sample.take(rows), batch_size=options["batch_size"], frequent=frequent)
        save_tensors(file, {"rows": torch.from_numpy(found.per_row)}, {"kind": "shard"})

    def described(self, sample: TokenSample, options: Mapping[str, Any]) -> dict[str, Any]:
        """Task, frequent targets and documents of the evaluation."""
        frequent = most_frequent_targets(sample)
        clusters = {"clusters": sample.clusters.tolist(), "groups": None if sample.groups is None else list(sample.groups)}
        return {"task": sample.task, "skip": list(frequent), "info": evaluated_info(self.model, sample, frequent), **clusters}
