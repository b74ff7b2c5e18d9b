"""What both studies of ablation share: their samples, and results that hold the sums of every row of the evaluation."""

import dataclasses
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sepcap.evaluation.next_token import most_frequent_targets
from sepcap.evaluation.result import Evaluation
from sepcap.studies.base.folder import as_json
from sepcap.studies.base.provenance import made_with
from sepcap.studies.base.result import StudyResult
from sepcap.tasks.batches import TokenSample
from sepcap.tasks.load import load_task
from sepcap.tasks.samples import check_context, sample_task

R = TypeVar("R", bound="RowSums")


def samples_of(model: Any, config: Any, *, constants: bool) -> tuple[TokenSample, TokenSample | None, dict[str, Any]]:
    """The tokens to evaluate on, those from which constants are computed, if they are needed, and the resolved configuration."""
    task, context = load_task(config.task), check_context(model, config.context)
    sample = sample_task(model, task, "evaluate", config.tokens, context, per_document=config.per_document)
    samples, collected = {"evaluate": sample}, None
    if constants:
        collected = sample_task(model, task, "collect", config.reference_tokens, context, per_document=config.per_document)
        samples["collect"] = collected
    frequent = most_frequent_targets(sample)
    info = {"asked": sample.asked, "tokens": sample.tokens, "sample": sample.fingerprint, "n_documents": sample.n_documents}
    info |= {"skip_counts": list(frequent.values())}
    resolved = dataclasses.asdict(dataclasses.replace(config, task=task.name, context=context)) | {
        **made_with(model),
        "samples": {part: one.fingerprint for part, one in samples.items()},
        "documents": {part: list(one.indices) for part, one in samples.items()},
        "n_documents": {part: one.n_documents for part, one in samples.items()},
        "evaluation": {"skip_tokens": list(frequent), "groups": sample.groups, "info": info},
    }
    return sample, collected, resolved


class RowSums(StudyResult):
    """A result made of sums per row, from which its tables are computed.

    Attributes:
        tensors: `before` [row, count] of the unablated model, `per_row` [..., row, count] with every ablation, both in the order of
            `COUNTS`, and `clusters` [row], the document of every row.
    """

    @classmethod
    def of(
        cls: type[R],
        config: dict[str, Any],
        before: Float[np.ndarray, "row count"],
        per_row: Float[np.ndarray, "*ablation row count"],
        clusters: Int[np.ndarray, " row"],
    ) -> R:
        """The result with its tables."""
        arrays = {"before": before, "per_row": per_row, "clusters": clusters}
        bare = cls(as_json(config), {}, {name: torch.from_numpy(array) for name, array in arrays.items()})
        return dataclasses.replace(bare, tables=bare._tables())

    def _tables(self) -> dict[str, pd.DataFrame]:
        raise NotImplementedError

    @cached_property
    def before(self) -> Evaluation:
        """Evaluation of the unablated model."""
        return self._evaluation(self.tensors["before"])

    def _evaluation(self, per_row: Tensor) -> Evaluation:
        config, stored = self.config, self.config["evaluation"]
        info = {**stored["info"], "model": config["model"], "documents": config["documents"]["evaluate"]}
        groups = None if stored["groups"] is None else tuple(stored["groups"])
        return Evaluation(config["task"], per_row.numpy(), tuple(stored["skip_tokens"]), info, self.tensors["clusters"].numpy(), groups)
