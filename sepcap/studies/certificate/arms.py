"""The models that a certificate compares: untouched, pruned, and two kinds of random pruning (METHODS 22)."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from sepcap.evaluation.next_token import evaluate_sample
from sepcap.evaluation.result import ratio
from sepcap.evaluation.trajectory import bisect
from sepcap.interventions.deletion import delete
from sepcap.models.sites import populations, site_shape
from sepcap.models.weights import EveryWeight
from sepcap.selection.neurons import NeuronSet, random_ranks, select
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

AMOUNTS = 1024
"""Number of equal steps from no neuron to all of them in the search for random pruning of equal effect."""


def amounts(counts: Mapping[str, int], sizes: Mapping[str, int], step: int) -> dict[str, int]:
    """Number of neurons, or heads, of every site at a step between none (0), the given counts (`AMOUNTS` / 2) and all (`AMOUNTS`).

    >>> [amounts({"mlp": 10}, {"mlp": 30}, step)["mlp"] for step in (0, 256, 512, 768, 1024)]
    [0, 5, 10, 20, 30]
    """
    half = AMOUNTS // 2
    if step <= half:
        return {site: round(n * step / half) for site, n in counts.items()}
    return {site: n + round((sizes[site] - n) * (step - half) / half) for site, n in counts.items()}


def _as_it_is(model: Any) -> None:
    """No change: the neurons were pruned in the model's own basis."""


@dataclass(frozen=True, eq=False)
class Pruning:
    """How the pruned model comes from the untouched one, and random pruning in the same manner.

    Attributes:
        apply: prunes a model, in place.
        neurons: the pruned neurons; None if they are not known.
        heads: sites of which whole heads were pruned; random heads are drawn there.
        rotate: changes a model to the basis in which the neurons were pruned, in place; it computes the same function.
        offset: site -> constants that take the place of pruned neurons; None for 0.
    """

    apply: Callable[[Any], None]
    neurons: NeuronSet | None = None
    heads: tuple[str, ...] = ()
    rotate: Callable[[Any], None] = _as_it_is
    offset: Mapping[str, Tensor] | None = None

    def drawn(self, model: Any, counts: Mapping[str, int], seed: int) -> NeuronSet:
        """Random neurons, or heads, of every site; smaller numbers with the same seed give subsets."""
        found = NeuronSet.empty(model, list(counts))
        ranks = random_ranks(populations(model, counts), seed)
        for site, n in counts.items():
            if n:
                of_heads = site in self.heads
                chosen, _ = select(ranks, {"heads" if of_heads else site: n}, lambda site=site: ranks[site].mean(-1), site)
                found |= chosen
        return found

    def remove(self, model: Any, neurons: NeuronSet) -> None:
        """Prune other neurons in the same basis and with the same constants, in place."""
        self.rotate(model)
        if neurons:
            delete(model, neurons, self.offset)


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
        pruning: how the pruned one is made of it.
        texts: collection texts of the forget task on which random pruning is matched.
        reference: a model never trained on the forget task.
        metric: accuracy that is matched.
        pieces: keeps the number of random neurons that was found.
        batch_size: rows per forward pass.
    """

    def __init__(
        self, model: Any, pruning: Pruning, texts: Sequence[TokenSample], reference: Any, metric: str, pieces: Pieces, batch_size: int
    ) -> None:
        self.model, self.pruning, self.texts, self.reference = model, pruning, texts, reference
        self.metric, self.pieces, self.batch_size = metric, pieces, batch_size
        known = pruning.neurons
        sites = ["mlp"] if known is None else [site for site in known.masks if known.count(site)]
        shapes = {site: site_shape(model, site) for site in sites}
        each = {site: shape[-1] if site in pruning.heads else 1 for site, shape in shapes.items()}
        self.sizes = {site: int(np.prod(shape)) // each[site] for site, shape in shapes.items()}
        # without known neurons, half of the mlp is the middle of the search
        self.counts = {site: n // 2 if known is None else known.count(site) // each[site] for site, n in self.sizes.items()}
        self._saved = {id(one): EveryWeight(one) for one in (model, *([] if reference is None else [reference]))}

    @property
    def kinds(self) -> list[str]:
        """Kinds of models that there are."""
        return [UNTOUCHED, PRUNED, *([RANDOM] if self.pruning.neurons is not None else []), MATCHED]

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
                self.pruning.apply(model)
            elif chosen is not None:
                self.pruning.remove(model, chosen)
            yield model
        finally:
            self._saved[id(model)].restore()

    def _random(self, arm: Arm) -> NeuronSet | None:
        if arm.kind == RANDOM:
            return self.pruning.drawn(self.model, self.counts, arm.seed)
        if arm.kind == MATCHED:
            return self._drawn(self.matched(arm.seed)["step"], arm.seed)
        return None

    def _drawn(self, step: int, seed: int) -> NeuronSet:
        return self.pruning.drawn(self.model, amounts(self.counts, self.sizes, step), seed)

    def matched(self, seed: int) -> dict[str, Any]:
        """How many random neurons of a seed do as much damage as the pruned ones, on collection texts.

        Returns:
            step (see `amounts`), neurons per site, reached (whether any number does), target and found (accuracies).
        """
        name = f"matched-{seed}"
        stored = self.pieces.get(name)
        if stored is not None:
            return stored[1]
        target, whole = self._after(self.pruning.apply), self._after(_as_it_is)
        found: dict[int, float] = {0: whole}

        def value(step: int) -> float:
            neurons = self._drawn(step, seed)
            return found.setdefault(step, self._after(lambda model: self.pruning.remove(model, neurons)))

        reached = whole <= target or bisect(value, target, AMOUNTS).reached  # in the first case nothing was lost
        # accuracies can rise and fall with the number, so the nearest one can be outside the last bracket
        step = min(found, key=lambda one: (abs(found[one] - target), one)) if reached else AMOUNTS
        chosen = self._drawn(step, seed)
        note = {"step": step, "reached": reached, "found": found[step], "target": target}
        note |= {"neurons": {site: chosen.count(site) for site in self.counts}}
        self.pieces.put(name, {"step": torch.tensor(step)}, note)
        return note

    def _after(self, change: Callable[[Any], None]) -> float:
        """Accuracy on the texts after a change, which is undone."""
        try:
            change(self.model)
            sums = [evaluate_sample(self.model, one, batch_size=self.batch_size, quiet=True).per_cluster for one in self.texts]
            return float(ratio(np.concatenate(sums), self.metric))
        finally:
            self._saved[id(self.model)].restore()
