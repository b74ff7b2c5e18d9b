"""One pass over a task, reduced to what a profile shows: strongest contexts, random windows, sums per token, histograms (METHODS 23).

Nothing that is kept grows with the number of tokens: per unit k contexts, the activations of `POOL` windows, a histogram, and one sum for
every token that is frequent enough.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sepcap.models.devices import layer_device
from sepcap.models.forward import Hook, device_of, evaluating, measuring, run_hooks
from sepcap.models.sites import Population, get_site
from sepcap.progress import progress
from sepcap.statistics.collect import halving_batches
from sepcap.statistics.histogram import HistogramCounter, Layer, grid_of
from sepcap.tasks.batches import Batch, TokenSample

POOL = 64
"""Random windows per task from which the samples per quantile are drawn."""

ADDITIVE = 2e-2
"""Largest relative difference between an activation and the sum of its contributions that counts as rounding."""

PATTERN = "blocks.{layer}.attn.hook_pattern"

PART = 4096
"""Positions of which sums are computed at once."""

AT_ONCE = 2**24
"""Values at source tokens that are held at once, of as many units as that allows: 64 MB in float32."""

Place = tuple[int, int]
"""Row, and position in it."""


@dataclass(frozen=True, eq=False)
class Group:
    """The units of one site in one layer.

    Attributes:
        population: the site.
        layer: the layer.
        numbers: numbers of the units among all.
        index: number of each neuron in its flattened layer, or of each head.
        heads: whether the units are whole heads.
    """

    population: Population
    layer: int
    numbers: Int[Tensor, " unit"]
    index: Int[Tensor, " unit"]
    heads: bool

    @property
    def mixes(self) -> bool:
        """Whether an activation is a sum over source tokens, weighted by attention."""
        return self.population.site.name == "attn_pre_out"

    def shaped(self, z: Float[Tensor, "batch pos ..."]) -> Float[Tensor, "batch pos ..."]:
        """Activations of the whole layer in the shape of the site, in float32 or wider."""
        wide = z if z.dtype == torch.float64 else z.float()
        return wide.reshape(*z.shape[:2], *self.population.shape[1:])

    def gram(self) -> Float[Tensor, "unit d_head d_head"]:
        """W_O W_Oᵀ of each head: ‖z W_O‖² = z (W_O W_Oᵀ) zᵀ."""
        rows = self.population.rows(self.layer).detach()[self.index.to(self.population.rows(self.layer).device)].float()
        return rows @ rows.transpose(1, 2)

    def of(self, z: Float[Tensor, "batch pos ..."]) -> Float[Tensor, "batch pos unit"]:
        """Activations of the units: of a neuron its own, of a head the norm of what it adds to the residual stream."""
        shaped = self.shaped(z)
        if not self.heads:
            return shaped.flatten(2)[:, :, self.index.to(z.device)]
        return norms_of(shaped[:, :, self.index.to(z.device)], self.gram().to(z.device))


def norms_of(z: Float[Tensor, "batch pos unit d_head"], gram: Float[Tensor, "unit d_head d_head"]) -> Float[Tensor, "batch pos unit"]:
    """‖z W_O‖₂ of each head."""
    return torch.einsum("bpud,ude,bpue->bpu", z, gram.to(z), z).clamp_min(0).sqrt()


def first_highest(x: Float[Tensor, "..."], dim: int) -> Int[Tensor, "..."]:
    """Where the highest value stands; the first place of equal ones, on every device."""
    shape = [1] * x.dim()
    shape[dim] = -1
    place = torch.arange(x.shape[dim], device=x.device).view(shape)
    return torch.where(x == x.amax(dim, keepdim=True), place, x.shape[dim]).amin(dim).clamp_max(x.shape[dim] - 1)


class Sources:
    """The source token that contributes most to an activation of an attention neuron or head, within one layer and batch.

    z at position t is the sum over source positions s of pattern[t, s]·v[s]; of a head, the contribution of s is the norm of what
    it adds to the residual stream.
    """

    def __init__(self, group: Group) -> None:
        self.group = group
        self.held: dict[str, Any] = {}
        self.additive = True

    def hooks(self, then: Callable[[Tensor], None]) -> list[Hook]:
        """Hooks that keep values, pattern and activations, and pass the activations on when all three are there.

        Some architectures show their pattern after the activations that are computed from it.
        """

        def keep(name: str, tensor: Tensor, hook: Any) -> None:
            self.held[name] = tensor
            if len(self.held) == 3:
                then(self.held["z"])
                self.held = {}

        layer, sites = self.group.layer, {"values": get_site("attn_value"), "z": self.group.population.site}
        named = {name: site.hook_name(layer) for name, site in sites.items()} | {"pattern": PATTERN.format(layer=layer)}
        return [(hook, partial(keep, name)) for name, hook in named.items()]

    def strongest(
        self, z: Float[Tensor, "batch pos ..."], position: Int[Tensor, "batch unit"]
    ) -> tuple[Int[Tensor, "batch unit"], Float[Tensor, "batch unit"]]:
        """Position of the source, and its contribution, for one position per row and unit."""
        units = max(1, AT_ONCE // (z.shape[0] * z.shape[1] * self.group.population.shape[2]))
        parts = [self._strongest(z, some, position[:, some]) for some in torch.arange(position.shape[1], device=z.device).split(units)]
        source, contribution = (torch.cat(column, 1) for column in zip(*parts, strict=True))
        return source, contribution

    def _strongest(
        self, z: Float[Tensor, "batch pos ..."], some: Int[Tensor, " unit"], position: Int[Tensor, "batch unit"]
    ) -> tuple[Int[Tensor, "batch unit"], Float[Tensor, "batch unit"]]:
        """The same of some units of the group."""
        group, (_, heads, d_head) = self.group, self.group.population.shape
        index = group.index.to(z.device)[some]
        head = index if group.heads else index // d_head
        values = self.held["values"].reshape(*z.shape[:2], -1, d_head).to(z.device, torch.float32)
        of = values[:, :, head // (heads // values.shape[2])]  # [batch, pos, unit, d_head]
        row = torch.arange(len(z), device=z.device)[:, None]
        weights = self.held["pattern"].to(z.device, torch.float32)[row, head[None], position]  # [batch, unit, source]
        there = group.shaped(z)[row, position, head[None]].float()  # [batch, unit, d_head]
        mixed = torch.einsum("bus,bsud->bud", weights, of)
        scale = there.abs().amax(-1)
        self.additive &= bool(((mixed - there).abs().amax(-1) <= ADDITIVE * scale + 1e-6).all())
        if group.heads:
            parts = weights * norms_of(of, group.gram()[some.to(group.population.rows(group.layer).device)]).transpose(1, 2)
            sign = torch.ones_like(scale)
        else:
            dim = index % d_head
            parts = weights * of.permute(0, 2, 1, 3)[:, torch.arange(len(dim)), :, dim].permute(1, 0, 2)
            sign = there.gather(2, dim[None, :, None].expand(len(z), -1, 1))[..., 0].sign()
        source = first_highest(parts * sign[..., None], 2)
        return source, parts.gather(2, source[..., None])[..., 0]


@dataclass(frozen=True, eq=False)
class Reading:
    """What a pass reads, and what it is to keep.

    Attributes:
        sample: the rows.
        seen: the token ids that the model is given, row by row.
        k, window, before: number of contexts, their length, and how many tokens of it precede the strongest.
        pool: random windows: (row, start).
        columns: token id -> its column among the tokens that are counted; the last column is for all others.
        counts: occurrences of each of them.
    """

    sample: TokenSample
    seen: tuple[np.ndarray, ...]
    k: int
    window: int
    before: int
    pool: tuple[Place, ...]
    columns: Int[Tensor, " token"]
    counts: Int[Tensor, " column"]

    @classmethod
    def of(cls, sample: TokenSample, vocabulary: int, config: Any, causal: bool) -> "Reading":
        """Choose the windows and the tokens to count, before the model runs."""
        seen, counts = [], torch.zeros(vocabulary, dtype=torch.long)
        for batch in sample.batches(config.batch_size):
            for ids, real in zip(batch.inputs, batch.real, strict=True):
                seen.append(ids[real].numpy())
            counts += torch.bincount(batch.inputs[batch.keep], minlength=vocabulary)
        frequent = (counts >= config.min_count).nonzero()[:, 0]
        columns = torch.full((vocabulary,), len(frequent))
        columns[frequent] = torch.arange(len(frequent))
        starts = [(row, start) for row, ids in enumerate(seen) for start in range(0, len(ids), config.window)]
        chosen = np.random.default_rng([config.seed, 23]).choice(len(starts), min(POOL, len(starts)), replace=False)
        before = config.window * 3 // 4 if causal else config.window // 2
        pool = tuple(starts[i] for i in sorted(chosen.tolist()))
        return cls(sample, tuple(seen), config.k, config.window, before, pool, columns, counts[frequent])

    def tokens(self, row: int, start: int) -> Int[np.ndarray, " pos"]:
        """Token ids of a window; -1 beyond the row."""
        return window_of(self.seen[row], start, self.window, -1)


def window_of(values: np.ndarray, start: int, length: int, outside: Any) -> np.ndarray:
    """`length` values from `start` on, which can be negative; filled where there are none.

    >>> window_of(np.array([5, 6, 7]), -1, 3, 0).tolist()
    [0, 5, 6]
    """
    found = np.full(length, outside, dtype=values.dtype)
    first, last = max(0, start), min(len(values), start + length)
    found[first - start : last - start] = values[first:last]
    return found


class Kept:
    """What is kept of the units of one group."""

    def __init__(self, group: Group, reading: Reading, sources: Sources | None) -> None:
        n, k, self.group, self.reading, self.sources = len(group.index), reading.k, group, reading, sources
        self.device = device = layer_device(group.population.model, group.layer)
        self.top = {
            "strength": torch.full((n, k), -torch.inf, device=device),
            "activation": torch.zeros(n, k, device=device),
            "window": torch.full((n, k, reading.window), torch.nan, device=device),
            **{name: torch.full((n, k), -1, device=device) for name in ("row", "position", "source")},
            "contribution": torch.full((n, k), torch.nan, device=device),
        }
        self.by_token = torch.zeros(len(reading.counts) + 1, n, dtype=torch.float64, device=device)
        self.pool = torch.full((len(reading.pool), reading.window, n), torch.nan, device=device)
        self.counter = HistogramCounter(n, device)
        self.low = torch.full((n,), torch.inf, device=device)
        self.high = -self.low
        self.sums = torch.zeros(3, n, dtype=torch.float64, device=device)
        self.count = 0

    def hooks(self, batch: Batch, first: int) -> list[Hook]:
        """Hooks that add the activations of a batch."""
        if self.sources is not None:
            return self.sources.hooks(partial(self.add, batch=batch, first=first))
        name = self.group.population.site.hook_name(self.group.layer)
        return [(name, lambda z, hook: self.add(z, batch, first))]

    def add(self, z: Float[Tensor, "batch pos ..."], batch: Batch, first: int) -> None:
        """Add the activations of a batch whose first row has the number `first`."""
        x, keep = self.group.of(z), batch.keep
        if not bool(torch.isfinite(x[keep]).all()):
            raise FloatingPointError(
                f"activations of site {self.group.population.site.name!r} in layer {self.group.layer} are NaN or infinite; load the "
                "model with dtype='float32' or 'bfloat16', and look for NaN or infinite weights"
            )
        x = x.float()
        self._add_sums(x[keep], self.reading.columns.to(x.device)[batch.inputs[keep]])
        self._add_top(x, z, keep, first)
        shown = x.masked_fill(~keep[..., None], torch.nan)
        for i, (row, start) in enumerate(self.reading.pool):
            if first <= row < first + len(x):
                part = shown[row - first, start : start + self.reading.window]
                self.pool[i, : len(part)] = part

    def _add_sums(self, x: Float[Tensor, "n unit"], columns: Int[Tensor, " n"]) -> None:
        self.low, self.high = torch.minimum(self.low, x.amin(0)), torch.maximum(self.high, x.amax(0))
        self.counter.add([x], self.low, self.high)
        for part, of in zip(x.split(PART), columns.split(PART), strict=True):
            wide = part.double()
            self.sums += torch.stack([wide.sum(0), wide.abs().sum(0), (part > 0).sum(0).double()])
            self.by_token.index_add_(0, of, wide.abs())
        self.count += len(x)

    def _add_top(self, x: Float[Tensor, "batch pos unit"], z: Tensor, keep: Bool[Tensor, "batch pos"], first: int) -> None:
        """Of every row its strongest position; of these and those that are held, the k strongest, in case of ties the earlier row."""
        strength = x.abs().masked_fill(~keep[..., None], -torch.inf)
        position = first_highest(strength, 1)  # [batch, unit]
        row = torch.arange(len(x), device=x.device)
        at = position[..., None] - self.reading.before + torch.arange(self.reading.window, device=x.device)  # [batch, unit, window]
        inside = (at >= 0) & (at < x.shape[1])
        at = at.clamp(0, x.shape[1] - 1)
        unit = torch.arange(x.shape[2], device=x.device)[None, :, None]
        window = x[row[:, None, None], at, unit]
        window = window.masked_fill(~(inside & keep[row[:, None, None], at]), torch.nan)
        source, contribution = torch.full_like(position, -1), torch.full(position.shape, torch.nan, device=x.device)
        if self.sources is not None:
            source, contribution = self.sources.strongest(z, position)
        new = {
            "strength": strength.amax(1),
            "activation": x.gather(1, position[:, None])[:, 0],
            "window": window,
            "row": (first + row)[:, None].expand_as(position),
            "position": position,
            "source": source,
            "contribution": contribution,
        }
        both = {name: torch.cat([held, new[name].transpose(0, 1).to(held)], 1) for name, held in self.top.items()}
        best = both["strength"].sort(dim=1, descending=True, stable=True).indices[:, : self.reading.k]
        for name, values in both.items():
            order = best if values.dim() == 2 else best[..., None].expand(-1, -1, values.shape[2])
            self.top[name] = values.gather(1, order)

    def finished(self) -> tuple[dict[str, Tensor], Layer]:
        """What was kept, on the CPU and with the unit first, and the histograms."""
        layer = Layer(self.counter.counts(self.low, self.high), *grid_of(self.low, self.high), self.low, self.high)
        silent = ~(self.top["strength"] > 0)
        top = {name: self.top[name] for name in ("activation", "window", "row", "position", "source", "contribution")}
        for name in ("row", "position", "source"):
            top[name] = top[name].masked_fill(silent, -1)
        if self.sources is not None and not self.sources.additive:
            top["source"], top["contribution"] = torch.full_like(top["source"], -1), torch.full_like(top["contribution"], torch.nan)
        mean, absolute, positive = self.sums / max(1, self.count)
        found = {f"top/{name}": value for name, value in top.items()}
        found |= {"mean": mean, "abs": absolute, "positive": positive, "low": self.low, "high": self.high}
        found |= {"by_token": self.by_token[:-1].T, "pool": self.pool.permute(2, 0, 1)}
        return {name: value.cpu() for name, value in found.items()}, Layer(*(part.cpu() for part in layer))


def read(model: Any, groups: Sequence[Group], reading: Reading, batch_size: int) -> list[tuple[dict[str, Tensor], Layer]]:
    """One pass over a task: per group what was kept of its units, and their histograms.

    Raises:
        FloatingPointError: NaN or infinite activations.
    """
    sample = reading.sample

    def one_pass(size: int) -> list[Kept]:
        sources = [Sources(group) if group.mixes and PATTERN.format(layer=group.layer) in model.hook_dict else None for group in groups]
        kept = [Kept(group, reading, of) for group, of in zip(groups, sources, strict=True)]
        # the fused attention kernel stores no pattern
        setting = evaluating if any(of is not None for of in sources) else measuring
        with setting(model), progress(total=sample.tokens, desc=f"examine {sample.task}", unit="tok", unit_scale=True) as bar:
            for number, batch in enumerate(sample.batches(size)):
                here = batch.to(device_of(model))
                hooks = [hook for each in kept for hook in each.hooks(_on(here, each.device), number * size)]
                run_hooks(model, here.inputs, hooks, here.mask)
                bar.update(batch.size)
        return kept

    with torch.inference_mode(False):
        return [each.finished() for each in halving_batches(one_pass, batch_size)]


def _on(batch: Batch, device: torch.device) -> Batch:
    return batch if batch.keep.device == device else batch.to(device)
