"""The effect of ablating single neurons on every row: which positions change, and the passes that run only those (METHODS 19)."""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sepcap.evaluation.next_token import counts
from sepcap.evaluation.result import COUNTS, METRICS
from sepcap.models.forward import Hook, Stop
from sepcap.models.prefix import Recorded, record, run_part, run_whole, unembed
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
        later: for pairs across layers, the second neuron of each, in a later layer.
    """

    layer: int
    index: Int[Tensor, "unit width"]
    constants: Float[Tensor, " neuron"]
    later: "Units | None" = None

    def __getitem__(self, part: slice) -> "Units":
        return dataclasses.replace(self, index=self.index[part], later=None if self.later is None else self.later[part])

    def differ(self, z: Float[Tensor, "row pos neuron"]) -> Bool[Tensor, "unit row pos"]:
        """Where any neuron of a unit differs from its constant."""
        return torch.stack([(z[..., at] != self.constants.to(z)[at]).any(-1) for at in self.index.to(z.device)])


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

    def where_right(self) -> "Block":
        """The block with only those scored positions at which the unablated model's first choice is right; a tie is not right."""
        right = self.batch.asked & (self.before[..., COUNTS.index("top1")] == 1)
        before = torch.where(right[..., None], self.before, 0)
        return dataclasses.replace(self, batch=dataclasses.replace(self.batch, asked=right), before=before)

    def starts_late(self, shortcuts: Shortcuts) -> bool:
        """Whether passes begin at the first changed position."""
        return shortcuts.prefix and shortcuts.single and self.causal and self.recorded.cache is not None

    def counts_at(self, logits: Float[Tensor, "place vocab"], row: Int[Tensor, " place"], pos: Int[Tensor, " place"]) -> Tensor:
        """Sums at single positions, all of which are scored."""
        answers = self.batch.answers[row, pos]
        return counts(logits, answers, torch.ones_like(answers, dtype=torch.bool), self.skip_ids).to(self.before)


@dataclass(frozen=True, eq=False)
class Items:
    """Pairs of a unit and a row that need a pass; `first` is the first position that can change, `stop` follows the last scored one."""

    unit: Int[Tensor, " item"]
    row: Int[Tensor, " item"]
    first: Int[Tensor, " item"]
    stop: Int[Tensor, " item"]

    def __len__(self) -> int:
        return len(self.unit)

    def __getitem__(self, part: Any) -> "Items":
        return Items(self.unit[part], self.row[part], self.first[part], self.stop[part])

    def passes(self, positions: int) -> Iterator["Items"]:
        """Parts of about as many positions, of items that begin near the same position."""
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
        found.append(z.reshape(len(rows), -1, population.size // population.shape[0]).clone())
        raise Stop

    rows = torch.arange(len(block.batch.inputs), device=block.batch.inputs.device)
    with contextlib.suppress(Stop):
        run_whole(model, block.recorded, layer, rows, [(population.site.hook_name(layer), look)])
    return found[0]


def items_of(block: Block, changed: Bool[Tensor, "unit row pos"], shortcuts: Shortcuts) -> Items:
    """The items that need a pass, given the positions at which each unit differs from its constants."""
    asked = block.batch.asked
    scored = torch.where(asked, torch.arange(1, asked.shape[1] + 1, device=asked.device), 0).amax(1)
    ever, first = changed.any(2), changed.float().argmax(2)
    needed = ever & (first < scored) if block.causal else ever & (scored > 0)
    if not shortcuts.silent:
        needed = (scored > 0).expand_as(needed)
    unit, row = needed.nonzero(as_tuple=True)
    if block.starts_late(shortcuts):
        start = torch.where(ever, first, 0)[unit, row].minimum(scored[row] - 1)
        return Items(unit, row, start, scored[row])
    return Items(unit, row, torch.zeros_like(row), torch.full_like(row, changed.shape[2]))


@dataclass(frozen=True, eq=False)
class Sums:
    """Adds up changes of the scored positions of each unit and row; logits of several passes are computed together."""

    model: Any
    block: Block
    into: Float[Tensor, "item count"]
    held: list[tuple[Tensor, ...]] = dataclasses.field(default_factory=list)

    def add_logits(self, to: Tensor, row: Tensor, pos: Tensor, logits: Float[Tensor, "place vocab"]) -> None:
        """Add the changes at some positions, from their logits."""
        self.into.index_add_(0, to, self.block.counts_at(logits, row, pos) - self.block.before[row, pos])

    def add_streams(self, to: Tensor, row: Tensor, pos: Tensor, stream: Float[Tensor, "place d_model"]) -> None:
        """Add the changes at some positions, from the residual stream that leaves the last layer."""
        self.held.append((to, row, pos, stream))
        if sum(len(one[0]) for one in self.held) * self.model.cfg.d_vocab > _logits(self.model):
            self.flush()

    def flush(self) -> None:
        """Compute the logits of the stored streams, and add their changes."""
        if self.held:
            to, row, pos, stream = map(torch.cat, zip(*self.held, strict=True))
            for part in _parts(len(to), self.model):
                self.add_logits(to[part], row[part], pos[part], unembed(self.model, self.block.recorded, stream[part]))
        self.held.clear()


def effects(
    model: Any,
    population: Population,
    block: Block,
    units: Units,
    z: Mapping[int, Float[Tensor, "row pos neuron"]],
    shortcuts: Shortcuts,
    positions: int,
) -> Float[Tensor, "unit row metric"]:
    """Change of the sums of every row, in the order of `METRICS`, when each unit alone is set to its constants.

    Args:
        model: a hooked model, under `measuring`.
        population: the site of the units.
        block: rows with their unablated pass.
        units: what is ablated.
        z: layer -> unablated activations, of the layers of the units.
        shortcuts: which are used.
        positions: positions of one pass.
    """
    changed = changed_by(block, units, z)
    rows, last = len(block.batch.inputs), units.layer == len(block.recorded.streams) - 2
    sums = Sums(model, block, block.before.new_zeros(len(units.index) * rows, len(COUNTS)))
    for part in items_of(block, changed, shortcuts).passes(positions):
        first, stop = int(part.first.min()), min(int(part.stop.max()), block.batch.asked.shape[1])
        wanted = block.batch.asked[part.row, first:stop] & (torch.arange(first, stop, device=part.row.device) >= part.first[:, None])
        if shortcuts.written and last:
            wanted &= changed[part.unit, part.row, first:stop]
        item, at = wanted.nonzero(as_tuple=True)
        unit, row, pos = part.unit[item], part.row[item], first + at
        hooks = [_hook(population, one, part.unit) for one in (units, units.later) if one is not None]
        if not shortcuts.single:
            sums.add_logits(unit * rows + row, row, pos, run_whole(model, block.recorded, units.layer, part.row, hooks)[item, at])
            continue
        if shortcuts.written and last:
            stream = _written(population, block, units, z[units.layer], unit, row, pos)
        elif shortcuts.written:
            places = (part.unit[:, None], part.row[:, None], torch.arange(first, stop, device=part.row.device))
            stream = _written(population, block, units, z[units.layer], *places)
            stream = run_part(model, block.recorded, units.layer + 1, stream, part.row, first, hooks[1:])[item, at]
        else:
            stream = block.recorded.streams[units.layer][part.row, first:stop]
            stream = run_part(model, block.recorded, units.layer, stream, part.row, first, hooks)[item, at]
        sums.add_streams(unit * rows + row, row, pos, stream)
    sums.flush()
    return sums.into.view(len(units.index), rows, -1)[..., COLUMNS]


def changed_by(block: Block, units: Units, z: Mapping[int, Float[Tensor, "row pos neuron"]]) -> Bool[Tensor, "unit row pos"]:
    """Real positions at which a unit differs from its constants."""
    changed = units.differ(z[units.layer])
    if units.later is not None:
        changed |= units.later.differ(z[units.later.layer])
    return changed & block.batch.real


def work(block: Block, units: Units, z: Mapping[int, Tensor], shortcuts: Shortcuts, vocabulary: int) -> float:
    """Cost of `effects` in positions times blocks; the unembedding counts as so many blocks as it has multiplications."""
    changed, layers = changed_by(block, units, z), len(block.recorded.streams) - 1
    items = items_of(block, changed, shortcuts)
    blocks = layers - units.layer - shortcuts.written
    head = vocabulary / (12 * block.recorded.streams[0].shape[-1])
    if shortcuts.written and not blocks:
        return head * float((changed & block.batch.asked).sum())
    return (blocks + head) * float((items.stop - items.first).sum())


def _written(population: Population, block: Block, units: Units, z: Tensor, unit: Tensor, row: Tensor, pos: Tensor) -> Tensor:
    """The residual stream after the units' block at some positions: the unablated one plus the change of the unit's output."""
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
        flat = z.reshape(len(unit), -1, population.size // population.shape[0])
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
