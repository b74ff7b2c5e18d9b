"""Shortcuts that a model allows, and effects on all rows of a task, computed piece by piece (METHODS 19)."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sepcap.evaluation.next_token import most_frequent_targets
from sepcap.evaluation.result import COUNTS, METRICS
from sepcap.models.forward import device_of, is_out_of_memory, measuring
from sepcap.models.kinds import inner, kind_of
from sepcap.models.prefix import NO_CACHE, run_part, unembed
from sepcap.models.sites import Population
from sepcap.progress import progress
from sepcap.statistics.collect import halving_batches
from sepcap.statistics.sharded_pass.driver import check_any_right
from sepcap.studies.base.folder import Pieces
from sepcap.studies.single_ablations.passes import Block, Shortcuts, Units, activations, effects, work
from sepcap.studies.single_ablations.units import Chunk
from sepcap.tasks.batches import TokenSample

POSITIONS = 2**14
"""Positions of the rows whose unablated pass is in memory at once; fewer if `batch_size` is below 16."""

PER_ROW = 2**10
"""Such positions for every row of a batch."""

NONE = Shortcuts(silent=True, prefix=False, written=False, single=False)
_EVERY = tuple(Shortcuts(prefix=prefix, written=written) for prefix in (True, False) for written in (True, False))

CANDIDATES: dict[str, tuple[Shortcuts, ...]] = {"causal": _EVERY, "masked": _EVERY[2:], "images": ()}
"""Kind of model -> shortcuts to try, from the fastest down; with none of these, whole rows run from the neuron's layer on."""

SAME = 1e-4
"""Largest relative difference of losses that counts as rounding in float32."""

MaybeChunk = tuple[Tensor, Units | None]

BEFORE: tuple[MaybeChunk, ...] = ((torch.arange(1), None),)
"""In place of chunks: nothing is ablated."""

PROBED = 12
"""Number of units from which the rate is measured."""


@dataclass(frozen=True, eq=False)
class Rows:
    """The rows of a task in blocks of similar length.

    Attributes:
        sample: the tokens.
        order: numbers of the rows of each block, shortest first: little of a block is padding.
    """

    sample: TokenSample
    order: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, sample: TokenSample, positions: int = POSITIONS) -> "Rows":
        """Blocks of at most so many positions."""
        blocks: list[list[int]] = []
        for row in sorted(range(len(sample.rows)), key=lambda i: (len(sample.rows[i]), i)):
            if not blocks or (len(blocks[-1]) + 1) * len(sample.rows[row]) > positions:
                blocks.append([])
            blocks[-1].append(row)
        return cls(sample, tuple(map(tuple, blocks)))

    def block(self, model: Any, i: int, shortcuts: Shortcuts, rows: int | None = None) -> Block:
        """A block with its unablated pass, or its first rows."""
        part = self.sample.take(self.order[i][:rows])
        batch = next(part.batches(len(part.rows))).to(device_of(model))
        skip_ids = torch.tensor(list(most_frequent_targets(self.sample)), dtype=torch.long, device=device_of(model))
        return Block.of(model, batch, skip_ids, kind_of(model) == "causal", shortcuts)


def shortcuts_of(model: Any, population: Population, rows: Rows, constants: Float[Tensor, "layer *neuron"]) -> Shortcuts:
    """The fastest shortcuts whose effects equal those of full passes, tested with one neuron of every layer on two rows.

    A model whose blocks do not add to one stream, or whose keys and values are not kept by position, fails this test.
    """
    dtype = next(p.dtype for p in inner(model).parameters() if p.is_floating_point())
    same = max(SAME, 8 * torch.finfo(dtype).eps)
    with measuring(model):
        truth = _probe(model, population, rows, constants, NONE)
        for candidate in CANDIDATES[kind_of(model)]:
            if candidate.written and population.site.name != "mlp":
                continue
            try:
                found = _probe(model, population, rows, constants, candidate)
            except NO_CACHE as error:
                if is_out_of_memory(error):
                    raise
                continue  # an architecture that does not take a cache, or runs its head otherwise
            if bool(((found - truth).abs() <= same * (1 + truth.abs())).all()):
                return candidate
    return NONE


def _probe(
    model: Any, population: Population, rows: Rows, constants: Float[Tensor, "layer *neuron"], shortcuts: Shortcuts
) -> Float[Tensor, " value"]:
    """Losses of two rows, and per layer their changes when one neuron is ablated and their losses in passes that begin in that layer.

    The neuron is the one that leaves the most positions unchanged before the first that it changes. The passes begin in the middle of
    the rows, if earlier positions are not run: so that keys and values are also tested if no neuron is silent.
    """
    block = rows.block(model, len(rows.order) - 1, shortcuts, rows=2)
    found = [block.before[..., -1].sum(1)]
    half = block.batch.asked.shape[1] // 2
    late = block.batch.asked[:, half:].nonzero(as_tuple=True)
    for layer in population.layers:
        z = activations(model, population, block, layer)
        every = Units(layer, torch.arange(z.shape[2])[:, None], constants[layer].flatten())
        changed = every.differ(z) & block.batch.real
        first = torch.where(changed.any(2), changed.float().argmax(2), -1).sum(1)
        unit = every[slice(at := int(first.argmax()), at + 1)]
        found.append(effects(model, population, block, unit, {layer: z}, shortcuts, 2**12)[0, :, -1])
        losses = block.before[:, half:, -1][late]
        if block.starts_late(shortcuts):
            ran = torch.arange(len(z), device=z.device)
            stream = run_part(model, block.recorded, layer, block.recorded.streams[layer][:, half:], ran, half)
            losses = block.counts_at(unembed(model, block.recorded, stream[late]), late[0], half + late[1])[:, -1]
        found.append(losses)
    return torch.cat(found).cpu()


@contextmanager
def naming(batch_size: int) -> Iterator[None]:
    """Where memory runs out inside, and smaller passes do not help, a MemoryError names the batch size to give."""
    try:
        yield
    except Exception as error:
        if batch_size == 1 or not is_out_of_memory(error):
            raise
        raise MemoryError(f"too little memory for the unablated pass over many rows: give batch_size={batch_size // 2}") from error


@dataclass(frozen=True, eq=False)
class Measurement:
    """Effects of units on the rows of one task, written piece by piece.

    Attributes:
        model: a hooked model.
        population: the site.
        name: "forget" or "retain", in names of pieces.
        rows: the rows.
        shortcuts: which are used.
        batch_size: rows of one pass; halved when memory runs out. It also limits the rows of a block.
        correct: whether only predictions count that the unablated model makes right.
    """

    model: Any
    population: Population
    name: str
    rows: Rows
    shortcuts: Shortcuts
    batch_size: int
    correct: bool = False

    def before(self, pieces: Pieces) -> Float[np.ndarray, "row count"]:
        """Sums of the unablated model.

        Raises:
            ValueError: only right predictions count, and there is none.
        """
        found = self._assembled(pieces, "before", BEFORE, len(COUNTS))[0]
        if self.correct:
            check_any_right(bool(found[:, 0].any()), self.rows.sample.tokens, self.rows.sample.task)
        return found

    def changes(
        self, pieces: Pieces, what: str, chunks: Sequence[Chunk]
    ) -> Float[np.ndarray, "unit row metric"]:
        """Changes of the sums of every row; pieces that exist are read."""
        return self._assembled(pieces, what, chunks, len(METRICS))

    def _assembled(
        self, pieces: Pieces, what: str, chunks: Sequence[MaybeChunk], columns: int
    ) -> Float[np.ndarray, "unit row column"]:
        units = sum(len(numbers) for numbers, _ in chunks)
        found = np.zeros((units, len(self.rows.sample.rows), columns), dtype=np.float64 if what == "before" else np.float32)
        with progress(total=units * len(self.rows.order), desc=f"{what} {self.rows.sample.task}", unit="unit") as bar:
            for i, order in enumerate(self.rows.order):
                held: dict[Any, Any] = {}
                for j, (numbers, these) in enumerate(chunks):
                    piece = self.piece(pieces, what, i, j, these, held)
                    found[numbers.numpy()[:, None], np.array(order)] = piece["sums"].numpy()
                    bar.update(len(numbers))
        return found

    def piece(self, pieces: Pieces, what: str, i: int, j: int, units: Units | None, held: dict[Any, Any]) -> dict[str, Tensor]:
        """Sums, or their changes by some units, on block `i`, measured if they are not stored; `held` keeps what one block shares."""
        return pieces.once(self.name_of(what, i, j), partial(self._made, held, i, units))[0]

    def name_of(self, what: str, i: int, j: int) -> str:
        """Name of a piece: block `i`, chunk `j`."""
        return f"{self.name}/{what}-{i}-{j}"

    def _made(self, held: dict[Any, Any], i: int, units: Units | None) -> tuple[dict[str, Tensor], None]:
        with measuring(self.model), naming(self.batch_size):
            if "block" not in held:
                held["block"] = self._block(i)
            return {"sums": self._sums(held, units)}, None

    def _block(self, i: int) -> Block:
        block = self.rows.block(self.model, i, self.shortcuts)
        return block.where_right() if self.correct else block

    def _sums(self, held: dict[Any, Any], units: Units | None) -> Tensor:
        block: Block = held["block"]
        if units is None:
            return block.before.sum(1)[None].cpu()
        z = self._activations(held, units)
        length = block.batch.asked.shape[1]

        def one_pass(size: int) -> Tensor:
            return effects(self.model, self.population, block, units, z, self.shortcuts, size * length)

        return halving_batches(one_pass, self.batch_size).float().cpu()

    def _activations(self, held: dict[Any, Any], units: Units) -> Mapping[int, Tensor]:
        """Activations of the layers of some units; those of other layers are dropped."""
        layers = {units.layer} if units.later is None else {units.layer, units.later.layer}
        for layer in [key for key in held if key != "block" and key not in layers]:
            del held[layer]
        for layer in layers - held.keys():
            held[layer] = activations(self.model, self.population, held["block"], layer)
        return {layer: held[layer] for layer in layers}

    def expected(self, chunks: Sequence[Chunk]) -> tuple[float, float]:
        """Estimated seconds for the effects, from the rate of a few units, and the share of the plain loop's work that has to be done.

        The rate is measured on the first block, on units spread evenly over all.
        """
        total, rate, done = 0.0, 0.0, 0.0
        vocabulary, layers = self.model.cfg.d_vocab, len(self.population.layers)
        step = max(1, sum(len(numbers) for numbers, _ in chunks) // PROBED)
        with measuring(self.model), naming(self.batch_size):
            for i in range(len(self.rows.order)):
                held: dict[Any, Any] = {"block": self._block(i)}
                seen = 0
                for numbers, units in chunks:
                    z = self._activations(held, units)
                    total += work(held["block"], units, z, self.shortcuts, vocabulary)
                    few = units[-seen % step :: step]
                    seen += len(numbers)
                    if i == 0 and len(few.index):
                        started = time.perf_counter()
                        self._sums(held, few)
                        rate += time.perf_counter() - started
                        done += work(held["block"], few, z, self.shortcuts, vocabulary)
        head = vocabulary / (12 * self.model.cfg.d_model)
        every = sum(len(row) for row in self.rows.sample.rows) * sum(len(numbers) for numbers, _ in chunks) * (layers + head)
        return total * rate / done if done else 0.0, total / every
