"""From what a pass kept to what a profile shows: contexts, samples per quantile, preferred tokens, histograms (METHODS 23)."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sepcap.statistics.histogram import Layer
from sepcap.studies.neuron_profiles.stream import Group, Reading
from sepcap.tasks.batches import TokenSample

QUANTILES = (0.0, 0.5, 0.9, 0.99, 1.0)
"""Ends of the groups from which samples are drawn: the lower half, up to 90%, up to 99%, and the top percent."""

BINS = 48
"""Bins of the histograms of a profile, over the range of both tasks."""

RAW = ("counts", "exponent", "start", "low", "high")


def reduced(
    groups: Sequence[Group], n: int, kept: Sequence[tuple[dict[str, Tensor], Layer]], reading: Reading, config: Any
) -> dict[str, Tensor]:
    """What is shown of one task, with the units in their order."""
    whole: dict[str, Tensor] = {}

    def put(numbers: Tensor, found: Mapping[str, Tensor]) -> None:
        for name, value in found.items():
            whole.setdefault(name, value.new_zeros(n, *value.shape[1:]))[numbers] = value

    for group, (found, layer) in zip(groups, kept, strict=True):
        ends = torch.stack([layer.quantile(q) for q in QUANTILES], 1)
        put(group.numbers, {name: value for name, value in found.items() if name.startswith("top/") or value.dim() == 1})
        put(group.numbers, {f"raw/{name}": part for name, part in zip(RAW, layer, strict=True)} | {"quantiles": ends})
        put(group.numbers, preferred(found["by_token"], found["abs"], reading, config.listed))
        put(group.numbers, drawn(found["pool"], ends, reading, config.samples, (config.seed, group.layer)))
    whole = {name: value.float() if value.dtype == torch.float64 else value for name, value in whole.items()}
    starts = whole["top/position"] - reading.before
    whole |= _texts("top", whole["top/row"], starts, whole["top/position"], reading)
    whole |= _texts("sample", whole["sample/row"], whole["sample/start"], whole["sample/position"], reading)
    row, source = whole["top/row"].flatten().tolist(), whole["top/source"].flatten().tolist()
    tokens = [int(reading.seen[r][s]) if s >= 0 else -1 for r, s in zip(row, source, strict=True)]
    whole["top/source_token"] = torch.tensor(tokens).view_as(whole["top/source"])
    return whole


def preferred(
    by_token: Float[Tensor, "unit column"], mean: Float[Tensor, " unit"], reading: Reading, listed: int
) -> dict[str, Tensor]:
    """Tokens with the highest mean |activation|, relative to the mean over all positions; -1 where there is none above that mean."""
    counts = reading.counts.double()
    at = by_token / counts
    lift = torch.where(mean[:, None] > 0, at / mean[:, None], 0)
    ids = (reading.columns < len(counts)).nonzero()[:, 0]
    best = lift.sort(dim=1, descending=True, stable=True).indices[:, :listed]
    value = lift.gather(1, best)
    token = torch.where(value > 1, ids[best], -1)
    found = {"token": token, "lift": value, "mean": at.gather(1, best), "count": reading.counts[best]}
    short = listed - best.shape[1]
    return {f"preferred/{name}": torch.nn.functional.pad(x, (0, short), value=-1) for name, x in found.items()}


def drawn(
    pool: Float[Tensor, "unit window pos"], ends: Float[Tensor, "unit end"], reading: Reading, samples: int, seed: Sequence[int]
) -> dict[str, Tensor]:
    """Random positions of the random windows, some for each group of quantiles; row -1 where a group has too few."""
    n, groups = len(pool), len(QUANTILES) - 1
    shape = (n, groups, samples)
    found = {
        "sample/row": torch.full(shape, -1),
        "sample/start": torch.zeros(shape, dtype=torch.long),
        "sample/position": torch.full(shape, -1),
        "sample/activation": torch.full(shape, torch.nan),
        "sample/window": torch.full((*shape, pool.shape[2]), torch.nan),
    }
    generator = np.random.default_rng([*seed, 24])
    for unit, (values, of) in enumerate(zip(pool.numpy(), ends.numpy(), strict=True)):
        for group in range(groups):
            inside = (values <= of[group + 1]) & ((values > of[group]) if group else np.isfinite(values))
            window, position = np.nonzero(inside)
            for place, i in enumerate(generator.permutation(len(window))[:samples]):
                row, start = reading.pool[window[i]]
                at = (unit, group, place)
                found["sample/row"][at], found["sample/start"][at] = row, start
                found["sample/position"][at] = start + int(position[i])
                found["sample/activation"][at] = float(values[window[i], position[i]])
                found["sample/window"][at] = pool[unit, window[i]]
    return found


def _texts(name: str, rows: Tensor, starts: Tensor, positions: Tensor, reading: Reading) -> dict[str, Tensor]:
    """Token ids of windows, and the document at each position; -1 where there is none."""
    tokens = np.full((rows.numel(), reading.window), -1, dtype=np.int32)
    documents = np.full(rows.numel(), -1)
    for i, (row, start, position) in enumerate(zip(*(x.flatten().tolist() for x in (rows, starts, positions)), strict=True)):
        if row >= 0:
            tokens[i] = reading.tokens(row, start)
            documents[i] = document_of(reading.sample, row, position)
    found = {"tokens": torch.from_numpy(tokens).view(*rows.shape, -1), "document": torch.from_numpy(documents).view_as(rows)}
    return {f"{name}/{key}": value for key, value in found.items()} | {f"{name}/start": starts}


def document_of(sample: TokenSample, row: int, position: int) -> int:
    """Number of the document at a position of a row, in the sample."""
    if sample.row_documents is None:
        return row
    here = sample.row_documents[row]
    special = getattr(sample, "special", (sample.bos,))
    # documents of a row are separated by a special token
    before = int(np.isin(sample.rows[row][1 : position + 1], [i for i in special if i is not None]).sum())
    return here[min(before, len(here) - 1)]


def histograms_of(parts: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Share of the positions of each task in equal bins over the range of both.

    Returns:
        "edges" [unit, bin + 1], and for each task "…/histogram" [unit, bin], which adds up to 1.
    """
    low = torch.stack([part["raw/low"] for part in parts.values()]).amin(0).double()
    high = torch.stack([part["raw/high"] for part in parts.values()]).amax(0).double()
    steps = torch.linspace(0, 1, BINS + 1, dtype=torch.float64)
    edges = low[:, None] + (high - low)[:, None] * steps
    edges[:, -1] = high
    found: dict[str, Tensor] = {"edges": edges}
    for role, part in parts.items():
        layer = Layer(*(part[f"raw/{name}"] for name in RAW))
        last = torch.nextafter(edges[:, -1:], torch.full_like(edges[:, -1:], torch.inf))
        below = layer.below(torch.cat([edges[:, :-1], last], 1))
        share = below.diff(dim=1)
        # the top edge belongs to the last bin
        share[:, -1] += layer.counts.sum(1) - below[:, -1]
        found[f"{role}/histogram"] = share / layer.counts.sum(1, keepdim=True).clamp_min(1)
    return found
