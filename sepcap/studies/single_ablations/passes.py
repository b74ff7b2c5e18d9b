"""The effect of ablating single neurons on every row: which positions change, and the passes that run only those (METHODS 19)."""

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sepcap.evaluation.next_token import counts
from sepcap.evaluation.result import COUNTS, METRICS
from sepcap.models.forward import Hook, Stop, with_hooks
from sepcap.models.prefix import Recorded, passing_on, record, run_part, run_whole, unembed
from sepcap.models.sites import Population
from sepcap.tasks.batches import Batch

LOGITS = {"cpu": 2**22, "cuda": 2**28}
"""Number of logits that are computed at once: 16 MB on a CPU, near its cache, and 1 GB on a GPU."""

COLUMNS = [COUNTS.index(metric) for metric in METRICS]


@dataclass(frozen=True)
class Shortcuts:
    """Parts of a pass that need not be computed, because they cannot have changed.

    Attributes:
        silent: no pass for a row in which the neuron has the value that it is set to at every real position.
        prefix: only positions from the first changed one on, with the keys and values of the unablated pass before it.
        written: the change of an mlp neuron is added to the residual stream after its block, which does not run again.
        single: logits only at scored positions where the residual stream moved.
    """

    silent: bool = True
    prefix: bool = True
    written: bool = True
    single: bool = True


@dataclass(frozen=True, eq=False)
class Units:
    """What is ablated alone, within one layer: neurons, or heads with all their neurons.

    Attributes:
        layer: the layer.
        index: numbers of the neurons within the layer's flattened site; one column for a neuron, d_head for a head.
        constants: what each neuron of the layer is set to, flattened.
    """

    layer: int
    index: Int[Tensor, "unit width"]
    constants: Float[Tensor, " neuron"]

    def __getitem__(self, part: slice) -> "Units":
        return dataclasses.replace(self, index=self.index[part])


@dataclass(frozen=True, eq=False)
class Block:
    """Rows of a task, with their unablated pass.

    Attributes:
        batch: tokens and answers.
        recorded: residual streams, keys and values.
        before: sums of the unablated model at every position, in the order of `COUNTS`.
        skip_ids: tokens that the skip50 metrics leave out.
        causal: whether no position depends on a later one.
    """

    batch: Batch
    recorded: Recorded
    before: Float[Tensor, "row pos count"]
    skip_ids: Int[Tensor, " k"]
    causal: bool

    @classmethod
    def of(cls, model: Any, batch: Batch, skip_ids: Int[Tensor, " k"], causal: bool, shortcuts: Shortcuts) -> "Block":
        """Run the rows once."""
        recorded = record(model, batch.inputs, batch.mask)
        asked = batch.asked
        before = torch.zeros(*asked.shape, len(COUNTS), dtype=torch.float64, device=asked.device)
        block = cls(batch, recorded, before, skip_ids, causal)
        if shortcuts.single:
            row, pos = asked.nonzero(as_tuple=True)
            for part in _parts(len(row), model):
                logits = unembed(model, recorded, recorded.streams[-1][row[part], pos[part]])
                before[row[part], pos[part]] = block.counts_at(logits, row[part], pos[part])
        else:
            for row in range(len(asked)):
                at = torch.tensor([row], device=asked.device)
                pos = asked[row].nonzero()[:, 0]
                logits = run_whole(model, recorded, len(recorded.streams) - 2, at)[0, pos]
                before[row, pos] = block.counts_at(logits, at.expand(len(pos)), pos)
        return block

    def counts_at(self, logits: Float[Tensor, "place vocab"], row: Int[Tensor, " place"], pos: Int[Tensor, " place"]) -> Tensor:
        """Sums at single positions, all of which are scored."""
        answers = self.batch.answers[row, pos]
        return counts(logits, answers, torch.ones_like(answers, dtype=torch.bool), self.skip_ids).to(self.before)


@dataclass(frozen=True, eq=False)
class Items:
    """Pairs of a unit and a row that need a pass; `first` is the first position that can change, `stop` lies behind the last scored one."""

    unit: Int[Tensor, " item"]
    row: Int[Tensor, " item"]
    first: Int[Tensor, " item"]
    stop: Int[Tensor, " item"]

    def __len__(self) -> int:
        return len(self.unit)

    def __getitem__(self, part: Any) -> "Items":
        return Items(self.unit[part], self.row[part], self.first[part], self.stop[part])

    def passes(self, positions: int) -> Iterator["Items"]:
        """In parts of about as many positions, of items that begin near the same position."""
        order = torch.argsort(self.first, stable=True)
        first, stop = self.first[order].tolist(), self.stop[order].tolist()
        begin = 0
        while begin < len(order):
            end, last = begin, 0
            while end < len(order):
                last = max(last, stop[end])
                if end > begin and (end + 1 - begin) * (last - first[begin]) > positions:
                    break
                end += 1
            yield self[order[begin:end]]
            begin = end


def activations(model: Any, population: Population, block: Block, layer: int) -> Float[Tensor, "row pos neuron"]:
    """Unablated activations of a layer, flattened over heads."""
    found: list[Tensor] = []

    def look(z: Tensor, hook: Any) -> None:
        found.append(z.flatten(2).clone() if z.dim() > 2 else z.clone())
        raise Stop

    rows = torch.arange(len(block.batch.inputs), device=block.batch.inputs.device)
    try:
        run_whole(model, block.recorded, layer, rows, [(population.site.hook_name(layer), look)])
    except Stop:
        pass
    return found[0]


def items_of(block: Block, units: Units, z: Float[Tensor, "row pos neuron"], shortcuts: Shortcuts) -> tuple[Items, Bool[Tensor, "unit row pos"]]:
    """What needs a pass, and where each unit differs from its constants."""
    changed = torch.stack([(z[..., at] != units.constants[at].to(z)).any(-1) for at in units.index.to(z.device)])
    changed &= block.batch.real
    positions = torch.arange(changed.shape[2], device=z.device)
    scored = torch.where(block.batch.asked, positions + 1, 0).amax(1)  # behind the last scored position of each row
    first = torch.where(changed.any(2), changed.float().argmax(2), changed.shape[2])
    needed = first < scored if block.causal else changed.any(2) & (scored > 0)
    if not shortcuts.silent:
        needed = (scored > 0).expand_as(needed)
    unit, row = needed.nonzero(as_tuple=True)
    partly = shortcuts.prefix and block.causal and block.recorded.cache is not None
    start = first[unit, row] if partly else torch.zeros_like(unit)
    whole = torch.full_like(start, changed.shape[2])
    return Items(unit, row, start.minimum(scored[row] - 1) if partly else start, scored[row] if partly else whole), changed


def effects(
    model: Any,
    population: Population,
    block: Block,
    units: Units,
    z: Float[Tensor, "row pos neuron"],
    shortcuts: Shortcuts,
    positions: int,
    count: Callable[[int, int], Any] = lambda positions, layers: None,
) -> Float[Tensor, "unit row metric"]:
    """Change of the sums of every row, in the order of `METRICS`, when each unit alone is set to its constants.

    Args:
        model: a hooked model, under `measuring`.
        population: the site of the units.
        block: rows with their unablated pass.
        units: what is ablated, in one layer.
        z: unablated activations of that layer.
        shortcuts: which are used.
        positions: positions of one pass.
        count: receives the positions and the number of blocks of every pass.
    """
    items, changed = items_of(block, units, z, shortcuts)
    into = torch.zeros(len(units.index) * len(z), len(COUNTS), dtype=torch.float64, device=block.before.device)
    layers = len(block.recorded.streams) - 1
    places: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    held = 0

    def flush() -> None:
        nonlocal held
        if places:
            unit, row, pos, stream = map(torch.cat, zip(*places, strict=True))
            for part in _parts(len(unit), model):
                logits = unembed(model, block.recorded, stream[part])
                change = block.counts_at(logits, row[part], pos[part]) - block.before[row[part], pos[part]]
                into.index_add_(0, unit[part] * len(z) + row[part], change)
        places.clear()
        held = 0

    for part in items.passes(positions):
        first, stop = int(part.first.min()), int(part.stop.max())
        seen = torch.arange(first, stop, device=z.device)
        wanted = block.batch.asked[part.row, first:stop] & (seen >= part.first[:, None])
        if shortcuts.written and shortcuts.single and units.layer == layers - 1:
            wanted &= changed[part.unit, part.row, first:stop]
        item, at = wanted.nonzero(as_tuple=True)
        if not shortcuts.single:
            logits = run_whole(model, block.recorded, units.layer, part.row, [_hook(population, units, part.unit)])
            change = block.counts_at(logits[item, at], part.row[item], at) - block.before[part.row[item], at]
            into.index_add_(0, part.unit[item] * len(z) + part.row[item], change)
            count(len(part) * (stop - first), layers - units.layer)
            continue
        if shortcuts.written and units.layer == layers - 1:
            stream = _written(population, block, units, z, part.unit[item], part.row[item], first + at)
        else:
            stream = _final(model, population, block, units, z, part, first, stop, shortcuts)[item, at]
        count(len(part) * (stop - first), layers - units.layer - shortcuts.written)
        places.append((part.unit[item], part.row[item], first + at, stream))
        held += len(item)
        if held * model.cfg.d_vocab > _logits(model):
            flush()
    flush()
    return into.view(len(units.index), len(z), -1)[..., COLUMNS]


def _final(
    model: Any, population: Population, block: Block, units: Units, z: Tensor, part: Items, first: int, stop: int, shortcuts: Shortcuts
) -> Float[Tensor, "item pos d_model"]:
    """The residual stream that leaves the last layer."""
    if not shortcuts.written:
        stream = block.recorded.streams[units.layer][part.row, first:stop]
        return run_part(model, block.recorded, units.layer, stream, part.row, first, [_hook(population, units, part.unit)])
    pos = torch.arange(first, stop, device=z.device)
    stream = _written(population, block, units, z, part.unit[:, None], part.row[:, None], pos)
    return run_part(model, block.recorded, units.layer + 1, stream, part.row, first)


def _written(population: Population, block: Block, units: Units, z: Tensor, unit: Tensor, row: Tensor, pos: Tensor) -> Tensor:
    """The residual stream after the units' block at some places: the unablated one plus what the unit writes less."""
    stream = block.recorded.streams[units.layer + 1][row, pos]
    rows = population.rows(units.layer).flatten(0, -2)
    for neuron in units.index.T.to(z.device):
        at = neuron[unit]
        less = units.constants.to(z)[at] - z[row, pos, at]
        stream = torch.addcmul(stream, less[..., None], rows[at])
    return stream


def _hook(population: Population, units: Units, unit: Int[Tensor, " item"]) -> Hook:
    """A hook that sets in every row of the batch the neurons of its item."""

    def put(z: Tensor, hook: Any) -> Tensor:
        flat = z.flatten(2) if z.dim() > 3 else z
        at = units.index.to(z.device)[unit]
        value = units.constants.to(z)[at]
        shape = (len(at), flat.shape[1], at.shape[1])
        return flat.scatter(2, at[:, None].expand(shape), value[:, None].expand(shape)).view(z.shape)

    return population.site.hook_name(units.layer), put


def _logits(model: Any) -> int:
    return LOGITS.get(next(model.parameters()).device.type, LOGITS["cpu"])


def _parts(places: int, model: Any) -> list[slice]:
    """Parts of some positions whose logits are computed at once."""
    size = max(1, _logits(model) // model.cfg.d_vocab)
    return [slice(begin, begin + size) for begin in range(0, places, size)]
