"""Parts of `sepcap.ablate_each`, in a worker."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import torch

from sepcap.checks import ANY, conform
from sepcap.models.loading.load import load_model
from sepcap.progress import silent
from sepcap.selection.neurons import NeuronSet
from sepcap.storage import save_tensors
from sepcap.studies.base.folder import Pieces, as_json
from sepcap.studies.single_ablations.config import SingleAblationsConfig
from sepcap.studies.single_ablations.measure import MaybeChunk
from sepcap.studies.single_ablations.plan import Plan
from sepcap.workers.shards import heard, out_of_memory_is_an_error


class AblationShards:
    """Plans single ablations, measures chunks of them, and puts them together, with a model that is loaded once.

    Every worker computes scores and constants itself, from the same texts, with the same bits.
    """

    def __init__(self, model: str, load: Mapping[str, Any]) -> None:
        with heard() as self._loading:
            self.model = load_model(model, **load)
        self._plan: tuple[str, Plan | None] = ("", None)
        self._chunks: dict[str, Sequence[MaybeChunk]] = {}
        self._held: tuple[Any, dict[Any, Any]] = (None, {})

    def run(self, do: str, config: Mapping[str, Any], neurons: str | None, **more: Any) -> dict[str, Any]:
        """Carry out one part.

        Args:
            do: name of a method.
            config: fields of the `SingleAblationsConfig`, as JSON.
            neurons: file of the neuron set, if one was given.
            more: arguments of the method, beside the plan.

        Returns:
            What was `found`, as JSON, and `warnings`; or `state` "failed" with the `error`.
        """
        try:
            with silent(), heard() as said:
                plan = self._planned(config, neurons)
                found = out_of_memory_is_an_error(lambda: getattr(self, do)(plan, **more))
            return {"found": found, "warnings": [*self._loading, *said]}
        except Exception as error:
            return {"state": "failed", "error": f"{type(error).__name__}: {error}"}

    def _planned(self, config: Mapping[str, Any], neurons: str | None) -> Plan:
        asked, plan = json.dumps([config, neurons]), self._plan[1]
        if plan is None or asked != self._plan[0]:
            kinds = get_type_hints(SingleAblationsConfig)
            fields = {name: conform(name, value, kinds[name], ANY) for name, value in config.items()}
            plan = Plan.of(self.model, SingleAblationsConfig(**fields), None if neurons is None else NeuronSet.load(neurons))
            self._plan, self._chunks, self._held = (asked, plan), {}, (None, {})
        return plan

    def resolved(self, plan: Plan) -> dict[str, Any]:
        """The configuration to store."""
        return as_json(plan.resolved)

    def cost(self, plan: Plan) -> str:
        """The planned work and its measured cost."""
        return plan.cost()

    def left(self, plan: Plan, folder: str, study: str) -> list[tuple[str, str, int, int]]:
        """Task, stage, block and chunk of every piece that the next unfinished stage lacks; empty if all are there."""
        pieces = Pieces(Path(folder), study)
        for stage in plan.stages(pieces):
            missing = [
                (role, what, i, j)
                for role, one in plan.measurements.items()
                for what, chunks in stage.items()
                for i in range(len(one.rows.order))
                for j in range(len(chunks))
                if not pieces.has(one.name_of(what, i, j))
            ]
            if missing:
                return missing
        return []

    def measure(self, plan: Plan, folder: str, study: str, role: str, what: str, block: int, chunk: int) -> None:
        """Measure one chunk on one block of rows, and write the piece."""
        pieces = Pieces(Path(folder), study)
        if what not in self._chunks:  # a later stage needs all pieces of the ones before it
            self._chunks |= next(stage for stage in plan.stages(pieces) if what in stage)
        if self._held[0] != (role, block):
            self._held = (role, block), {}
        _, units = self._chunks[what][chunk]
        plan.measurements[role].piece(pieces, what, block, chunk, units, self._held[1])

    def arrays(self, plan: Plan, folder: str, study: str, file: str) -> None:
        """Read all pieces, and write the arrays of the result."""
        found = plan.arrays(Pieces(Path(folder), study))
        save_tensors(file, {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in found.items()}, {"kind": "arrays"})
