"""The models that a certificate compares: untouched, pruned, and two kinds of random pruning (METHODS 22)."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch

from sepcap.evaluation.next_token import evaluate_sample
from sepcap.evaluation.trajectory import bisect
from sepcap.interventions.deletion import delete
from sepcap.models.sites import site_shape
from sepcap.models.weights import EveryWeight
from sepcap.selection.neurons import NeuronSet
from sepcap.studies.base.folder import Pieces
from sepcap.tasks.batches import TokenSample

UNTOUCHED, PRUNED, RANDOM, MATCHED, REFERENCE = "untouched", "pruned", "random", "matched", "reference"

NAMES = {
    UNTOUCHED: "untouched model",
    PRUNED: "pruned model",
    RANDOM: "as many random neurons",
    MATCHED: "random pruning of equal effect",
    REFERENCE: "model never trained on forget",
}
"""Kind of model -> its name in figures."""

AMOUNTS = 256
"""Number of equal steps from no neuron to all of them in the search for random pruning of equal effect."""


def amounts(counts: Mapping[str, int], sizes: Mapping[str, int], step: int) -> dict[str, int]:
    """Number of neurons of every site at a step between none (0), the given counts (`AMOUNTS` / 2) and all (`AMOUNTS`).

    >>> [amounts({"mlp": 10}, {"mlp": 30}, step)["mlp"] for step in (0, 64, 128, 192, 256)]
    [0, 5, 10, 20, 30]
    """
    half = AMOUNTS // 2
    if step <= half:
        return {site: round(n * step / half) for site, n in counts.items()}
    return {site: n + round((sizes[site] - n) * (step - half) / half) for site, n in counts.items()}


@dataclass(frozen=True)
class Arm:
    """One of the compared models.

    Attributes:
        kind: one of `NAMES`.
        seed: of its random neurons, and of the order of the texts in fine-tuning.
    """

    kind: str
    seed: int

    @property
    def name(self) -> str:
        """Name of the model among the pieces and in tables."""
        return f"{self.kind}-{self.seed}"


@runtime_checkable
class Compared(Protocol):
    """Models that are compared, each made of one model and gone afterwards."""

    @property
    def kinds(self) -> list[str]:
        """Kinds of models that there are, without the reference."""
        ...

    def seeded(self, kind: str) -> bool:
        """Whether the models of a kind differ by seed before anything is done to them."""
        ...

    def made(self, arm: Arm) -> AbstractContextManager[Any]:
        """The model of an arm; the weights have their bits back afterwards."""
        ...


def different(arms: Compared, kind: str, seeds: Sequence[int]) -> list[Arm]:
    """The models of a kind that differ before fine-tuning."""
    return [Arm(kind, seed) for seed in (seeds if arms.seeded(kind) else seeds[:1])]


class Arms:
    """The compared models, made of one model whose weights are restored after each.

    Args:
        model: the untouched model.
        prune: turns it into the pruned one, in place.
        neurons: the pruned neurons; None if they are not known.
        sites: sites of random neurons, if the pruned neurons are not known.
        held: collection texts of the forget task on which random pruning is matched.
        reference: a model never trained on the forget task.
        metric: accuracy that is matched.
        pieces: keeps the number of random neurons that was found.
        batch_size: rows per forward pass.
    """

    def __init__(
        self,
        model: Any,
        prune: Callable[[Any], None],
        neurons: NeuronSet | None,
        held: TokenSample,
        reference: Any,
        metric: str,
        pieces: Pieces,
        batch_size: int,
    ) -> None:
        self.model, self.prune, self.neurons, self.held, self.reference = model, prune, neurons, held, reference
        self.metric, self.pieces, self.batch_size = metric, pieces, batch_size
        sites = ["mlp"] if neurons is None else [site for site in neurons.masks if neurons.count(site)]
        self.sizes = {site: int(np.prod(site_shape(model, site))) for site in sites}
        # without known neurons, half of the mlp is the middle of the search
        self.counts = {site: n // 2 if neurons is None else neurons.count(site) for site, n in self.sizes.items()}
        self._saved = {id(each): EveryWeight(each) for each in (model, *([] if reference is None else [reference]))}

    @property
    def kinds(self) -> list[str]:
        """Kinds of models that there are."""
        return [UNTOUCHED, PRUNED, *([RANDOM] if self.neurons is not None else []), MATCHED]

    def seeded(self, kind: str) -> bool:
        """Whether the models of a kind have random neurons."""
        return kind in (RANDOM, MATCHED)

    @contextmanager
    def made(self, arm: Arm) -> Iterator[Any]:
        """The model of an arm; its weights have their bits back afterwards."""
        model = self.reference if arm.kind == REFERENCE else self.model
        chosen = self._random(arm)  # a search of its own
        try:
            if arm.kind == PRUNED:
                self.prune(model)
            elif chosen is not None:
                delete(model, chosen)
            yield model
        finally:
            self._saved[id(model)].restore()

    def _random(self, arm: Arm) -> NeuronSet | None:
        if arm.kind == RANDOM:
            return self._drawn(self.counts, arm.seed)
        if arm.kind == MATCHED:
            return self._drawn(amounts(self.counts, self.sizes, self.matched(arm.seed)["step"]), arm.seed)
        return None

    def _drawn(self, counts: Mapping[str, int], seed: int) -> NeuronSet:
        wanted = {site: n for site, n in counts.items() if n}
        return NeuronSet.random(self.model, wanted, seed=seed) if wanted else NeuronSet.empty(self.model, list(counts))

    def matched(self, seed: int) -> dict[str, Any]:
        """How many random neurons of a seed do as much damage as the pruned ones, on held-out collection texts.

        Returns:
            step (see `amounts`), neurons per site, reached (whether any number does), target and found (accuracies).
        """
        name = f"matched-{seed}"
        stored = self.pieces.get(name)
        if stored is not None:
            return stored[1]
        target = self._target()

        def value(step: int) -> float:
            with self._without(self._drawn(amounts(self.counts, self.sizes, step), seed)):
                return self._accuracy()

        if self._whole() <= target:  # nothing was lost
            note = {"step": 0, "reached": True, "found": self._whole()}
        else:
            found = bisect(value, target, AMOUNTS)
            trace = dict(found.trace) | {0: self._whole()}
            # the nearer one of the two ends of the bracket
            step = min((found.above, found.n), key=lambda one: abs(trace[one] - target)) if found.reached else found.n
            note = {"step": step, "reached": found.reached, "found": trace[step]}
        note |= {"target": target, "neurons": amounts(self.counts, self.sizes, note["step"])}
        self.pieces.put(name, {"step": torch.tensor(note["step"])}, note)
        return note

    def _target(self) -> float:
        try:
            self.prune(self.model)
            return self._accuracy()
        finally:
            self._saved[id(self.model)].restore()

    def _whole(self) -> float:
        return self._accuracy()

    @contextmanager
    def _without(self, neurons: NeuronSet) -> Iterator[None]:
        try:
            if neurons:
                delete(self.model, neurons)
            yield
        finally:
            self._saved[id(self.model)].restore()

    def _accuracy(self) -> float:
        return evaluate_sample(self.model, self.held, batch_size=self.batch_size, quiet=True).value(self.metric)
