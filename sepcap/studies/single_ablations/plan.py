"""Samples, references and pieces of single ablations (METHODS 19)."""

import dataclasses
from collections.abc import Iterator, Sequence
from functools import cached_property
from hashlib import sha256
from typing import Any

import numpy as np
import torch

from sepcap.evaluation.next_token import most_frequent_targets
from sepcap.evaluation.result import METRICS
from sepcap.interventions.constants import CONSTANTS, check_constants
from sepcap.models.sites import Population, bind
from sepcap.selection.names import gradients_for
from sepcap.selection.neurons import NeuronSet
from sepcap.selection.score import score
from sepcap.statistics.collect import collect_sample
from sepcap.studies.base.folder import Pieces, as_json
from sepcap.studies.base.provenance import made_with
from sepcap.studies.base.text import counted, duration
from sepcap.studies.single_ablations.config import SingleAblationsConfig
from sepcap.studies.single_ablations.measure import BEFORE, PER_ROW, POSITIONS, MaybeChunk, Measurement, Rows, shortcuts_of
from sepcap.studies.single_ablations.result import TASKS, SingleAblations
from sepcap.studies.single_ablations.units import Chunk, all_pairs, chosen, chunks, drawn, named_pairs, pair_chunks
from sepcap.tasks.batches import TokenSample
from sepcap.tasks.load import load_task
from sepcap.tasks.samples import check_context, sample_task
from sepcap.tasks.task import Split

FEW = 64
"""Largest number of ablations whose cost is not measured beforehand."""


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """Samples and checked inputs; nothing is computed yet.

    Attributes:
        population: the site.
        places: places of the units that are ablated alone.
        samples: "forget" and "retain" -> "collect" and "evaluate" -> tokens.
        resolved: the configuration to store.
    """

    model: Any
    config: SingleAblationsConfig
    population: Population
    places: torch.Tensor
    samples: dict[str, dict[str, TokenSample]]
    resolved: dict[str, Any]

    @classmethod
    def of(cls, model: Any, config: SingleAblationsConfig, neurons: NeuronSet | None) -> "Plan":
        """Check everything, and load the texts."""
        population = bind(model, config.site)
        places = drawn(chosen(population, config, neurons), config.sample, config.seed)
        pairs = config.pairs
        if isinstance(pairs, int):
            if pairs > len(places):
                raise ValueError(f"pairs={pairs}: {len(places)} neurons are ablated alone; give at most that")
        elif pairs is not None:
            pairs = named_pairs(population, pairs, places)
        context, samples = check_context(model, config.context), {}
        tasks = {role: load_task(getattr(config, role)) for role in TASKS}
        sizes: dict[Split, int] = {"collect": config.reference_tokens, "evaluate": config.tokens}
        for role, task in tasks.items():
            how = {"context": context, "per_document": config.per_document}
            samples[role] = {split: sample_task(model, task, split, size, **how) for split, size in sizes.items()}
        plain = dataclasses.replace(config, pairs=None, context=context, **{role: task.name for role, task in tasks.items()})
        flat = {f"{role} {split}": sample for role, parts in samples.items() for split, sample in parts.items()}
        resolved = dataclasses.asdict(plain) | {
            **made_with(model),
            "pairs": pairs,
            "threads": torch.get_num_threads(),
            "shape": list(population.shape),
            "chosen": int(chosen(population, config, neurons).sum()),
            "neurons": None if neurons is None else sha256(places.numpy().tobytes()).hexdigest()[:16],
            "samples": {name: sample.fingerprint for name, sample in flat.items()},
            "documents": {name: list(sample.indices) for name, sample in flat.items()},
            "n_documents": {name: sample.n_documents for name, sample in flat.items()},
            "evaluation": {role: _evaluation(parts["evaluate"]) for role, parts in samples.items()},
        }
        return cls(model, config, population, places, samples, resolved)

    def cost(self) -> str:
        """The planned work and its cost, from the measured rate of a few neurons."""
        c, n, unit = self.config, len(self.places), "head" if self.config.whole_heads else "neuron"
        which = "" if c.positions == "all" else ", counted where the whole model is right"
        tokens = ", ".join(f"{self.samples[role]['evaluate'].tokens:,} predictions of {self.resolved[role]}" for role in TASKS) + which
        said = f"{self.resolved['model']}: {counted(n, f'{c.site} {unit}')} ablated alone ({c.kind}), each on {tokens}"
        if c.pairs is not None:
            said += f", and {counted(self._pairs(), 'pair')} of them"
        if n + self._pairs() <= FEW:
            return said
        todo = [*self.alone]
        if pairs := self._likely_pairs():
            todo += pair_chunks(self.population, self.places, torch.tensor(pairs), self.constants)
        both = [one.expected(todo) for one in self.measurements.values()]
        minutes = " and ".join(duration(seconds) for seconds, _ in both)
        shares = " and ".join(f"{share:.0%}" for _, share in both)
        return f"{said}; at the rate measured just now {minutes}, since {shares} of the work of whole passes is left to do"

    def _pairs(self) -> int:
        return len(self._likely_pairs())

    def _likely_pairs(self) -> list[list[int]]:
        """Pairs whose cost is announced: for pairs=k those of k neurons spread evenly, since it is not known yet which they are."""
        pairs = self.resolved["pairs"]
        return all_pairs(np.linspace(0, len(self.places) - 1, pairs).astype(int).tolist()) if isinstance(pairs, int) else pairs or []

    @cached_property
    def references(self) -> list[Any]:
        """Statistics of the collection parts of forget and retain."""
        how: dict[str, Any] = {"batch_size": self.config.batch_size, "gradients": gradients_for(self.config.importance)}
        histogram = self.config.kind == "peak"
        return [collect_sample(self.model, self.samples[r]["collect"], self.config.site, histogram=histogram, **how) for r in TASKS]

    @cached_property
    def constants(self) -> torch.Tensor:
        """What each neuron is set to."""
        every = NeuronSet({self.config.site: torch.ones(self.population.shape, dtype=torch.bool)})
        constants = CONSTANTS[self.config.kind](every, self.references[1])
        check_constants(every, constants, "constants")
        return constants[self.config.site].cpu()

    @cached_property
    def measurements(self) -> dict[str, Measurement]:
        """A measurement on each task, with the shortcuts that the model allows on it."""
        found = {}
        for role in TASKS:
            rows = Rows.of(self.samples[role]["evaluate"], min(POSITIONS, PER_ROW * self.config.batch_size))
            shortcuts = shortcuts_of(self.model, self.population, rows, self.constants)
            correct = self.config.positions == "correct"
            found[role] = Measurement(self.model, self.population, role, rows, shortcuts, self.config.batch_size, correct)
        return found

    @cached_property
    def alone(self) -> list[Chunk]:
        """The units that are ablated alone."""
        return chunks(self.population, self.places, self.constants)

    def pairs(self, pieces: Pieces) -> list[list[int]] | None:
        """Numbers of the units of each pair; the k most harmful units are known when all have been ablated alone."""
        asked = self.resolved["pairs"]
        if not isinstance(asked, int):
            return asked
        change = self.measurements["forget"].changes(pieces, "alone", self.alone)[..., METRICS.index("loss")].astype(np.float64).sum(1)
        return all_pairs(np.argsort(-change, kind="stable")[:asked].tolist())

    def stages(self, pieces: Pieces) -> Iterator[dict[str, Sequence[MaybeChunk]]]:
        """What is measured, in chunks; later stages depend on the pieces of earlier ones."""
        yield {"before": BEFORE, "alone": self.alone}
        if (pairs := self.pairs(pieces)) is not None:
            yield {"together": pair_chunks(self.population, self.places, torch.tensor(pairs), self.constants)}

    def arrays(self, pieces: Pieces) -> dict[str, np.ndarray]:
        """Measure all units, then the pairs."""
        forget, retain = self.references
        scores = score(forget, retain, self.config.importance)[self.config.site]
        arrays: dict[str, Any] = {"places": self.places.numpy(), "score": scores.double().cpu().numpy()}
        for role, one in self.measurements.items():
            arrays[f"{role}/before"] = one.before(pieces)
            arrays[f"{role}/clusters"] = one.rows.sample.clusters
            arrays[f"{role}/alone"] = one.changes(pieces, "alone", self.alone)
        if (pairs := self.pairs(pieces)) is not None:
            arrays["pairs"] = np.array(pairs)
            together = pair_chunks(self.population, self.places, torch.tensor(pairs), self.constants)
            for role, one in self.measurements.items():
                arrays[f"{role}/together"] = one.changes(pieces, "together", together)
        return arrays

    def compute(self, pieces: Pieces) -> SingleAblations:
        """The result."""
        return SingleAblations.of(as_json(self.resolved), self.arrays(pieces))


def _evaluation(sample: TokenSample) -> dict[str, Any]:
    frequent = most_frequent_targets(sample)
    info = {"asked": sample.asked, "tokens": sample.tokens, "sample": sample.fingerprint, "n_documents": sample.n_documents}
    return {"skip_tokens": list(frequent), "groups": sample.groups, "info": info | {"skip_counts": list(frequent.values())}}
