"""Bootstrap replicates of statistics: every sum is repeated with documents weighted by draws from a Poisson distribution (METHODS 18).

A replicate gives every document a weight drawn from the Poisson distribution of mean 1, about as often as it would occur in a sample of
as many documents drawn with replacement; sums and counts are weighted alike. The weight is a function of the seed, the number of the
replicate and the document alone, so that batches, their order, and how a sample is split into parts have no effect.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sepcap.errors import CorruptFile, warn
from sepcap.statistics.gradients import MEASURED, GradientSums
from sepcap.tasks.batches import TokenSample
from sepcap.tasks.task import Task

ACTIVATIONS = ("positive", "total", "absolute", "root", "square")
"""Sums of activations: #(z>0), Σz, Σ|z|, Σ√|z|, Σz²."""

COUNTS = ("positions", "predictions", "rows")

_CUMULATIVE = np.cumsum([math.exp(-1) / math.factorial(k) for k in range(19)])
"""Probability that a Poisson variable of mean 1 is at most k."""


def poisson_weights(key: str, replicates: int) -> Int[np.ndarray, " replicate"]:
    """Weights of one document: draws of a Poisson distribution of mean 1, from the counter-based generator Philox.

    Args:
        key: 16 hexadecimal digits that encode the seed and the document.
        replicates: number of draws; the first ones do not depend on it.

    Source: Salmon et al. 2011, Parallel random numbers: as easy as 1, 2, 3; Hanley and MacGibbon 2006 for the Poisson bootstrap.

    >>> poisson_weights("0123456789abcdef", 8).tolist() == poisson_weights("0123456789abcdef", 100)[:8].tolist()
    True
    """
    # numpy promises the bits of the generator for all versions, but not those of its distributions
    uniform = (np.random.Philox(key=int(key, 16)).random_raw(replicates) >> np.uint64(11)) * 2.0**-53
    return np.searchsorted(_CUMULATIVE, uniform, side="right")


@dataclass(frozen=True, eq=False)
class Draws:
    """The weights of the rows of a sample in every replicate.

    Attributes:
        weights: [replicate, row], float64.
        documents: digest of every document -> the key that its weights are drawn from. It is made of the seed and the document, or of
            the lowest of all documents that it shares rows with, directly or through others: these have the same weights.
    """

    weights: Float[Tensor, "replicate row"]
    documents: dict[str, str]

    @classmethod
    def of(cls, task: Task, sample: TokenSample, replicates: int, seed: int = 0) -> "Draws":
        """Draw the weights.

        Args:
            task: what the sample was taken from.
            sample: rows with their documents.
            replicates: number of replicates.
            seed: seed of the weights of all documents.
        """
        if sample.origins is None or sample.row_documents is None:
            raise ValueError(f"replicates: the sample of {sample.task!r} does not say which documents its rows are of")
        prints = [source.fingerprint for source in task.sources]
        names = [_digest(f"{prints[source]} {sample.split} {number}") for source, number in sample.origins]
        clusters = sample.clusters.tolist()
        together: dict[int, set[str]] = {}
        for cluster, documents in zip(clusters, sample.row_documents, strict=True):
            together.setdefault(cluster, set()).update(names[document] for document in documents)
        keys = {cluster: _digest(f"{seed} {min(members)}") for cluster, members in together.items()}
        drawn = {cluster: poisson_weights(key, replicates) for cluster, key in keys.items()}
        weights = np.stack([drawn[cluster] for cluster in clusters], axis=1)
        return cls(torch.from_numpy(weights).double(), {name: keys[cluster] for cluster, members in together.items() for name in members})


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(eq=False)
class ReplicateSums:
    """Mutable sums of one site in every replicate, filled batch by batch.

    Attributes:
        draws: weights of all rows.
        shape: shape of the site, [layer, *neuron].
        device: where the sums are.
        gradients: names of the sums of gradients.
    """

    draws: Draws
    shape: tuple[int, ...]
    device: torch.device
    gradients: Sequence[str] = ()
    counts: Float[Tensor, "replicate count"] = field(init=False)
    sums: dict[str, Float[Tensor, "replicate layer neuron"]] = field(init=False)

    def __post_init__(self) -> None:
        b, size = len(self.draws.weights), (self.shape[0], math.prod(self.shape[1:]))
        self.counts = torch.zeros(b, len(COUNTS), dtype=torch.float64)
        self.sums = {name: torch.zeros(b, *size, dtype=torch.float64, device=self.device) for name in (*ACTIVATIONS, *self.gradients)}
        self._now: dict[torch.device, Tensor] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of all sums."""
        return sum(value.nbytes for value in self.sums.values())

    def begin(self, first: int, asked: Bool[Tensor, "row pos"]) -> None:
        """Begin a batch of rows, given the number of its first row and the positions of its predictions."""
        self.weights = self.draws.weights[:, first : first + len(asked)]
        self._now = {}
        per_row = torch.stack([asked.sum(1).double().cpu(), torch.ones(len(asked), dtype=torch.float64)], dim=1)
        self.counts[:, 1:] += self.weights @ per_row

    def add(self, name: str, layer: int, values: Float[Tensor, "row neuron"]) -> None:
        """Add the sums of every row of the batch to those of the replicates."""
        if values.device not in self._now:
            self._now[values.device] = self.weights.to(values.device)
        self.sums[name][:, layer] += (self._now[values.device] @ values.double()).to(self.device)

    @torch.no_grad()
    def add_activations(self, layer: int, z: Float[Tensor, "row pos *neuron"], keep: Bool[Tensor, "row pos"]) -> None:
        """Add the activations of a layer at the positions where `keep` is true; all in float64."""
        z, rows = z.detach().flatten(2), []
        if layer == 0:
            self.counts[:, 0] += self.weights @ keep.sum(1).double().cpu()
        for row, kept in zip(z, keep, strict=True):  # one at a time, so that memory is that of one row
            x = row.double() * kept[:, None]
            size = x.abs()
            sums = [(x > 0).sum(0).double(), x.sum(0), size.sum(0), None, x.square().sum(0)]
            # the root of 0 is slow, see Accumulator; those of the smallest number are lost to rounding
            sums[3] = torch.where(sums[2] == 0, 0, size.clamp_min_(torch.finfo(torch.float64).tiny).sqrt_().sum(0))
            rows.append(torch.stack(sums))
        for name, values in zip(ACTIVATIONS, torch.stack(rows, dim=1), strict=True):
            self.add(name, layer, values)

    def gathered(self) -> "Replicates":
        """What was summed."""
        return Replicates(
            self.counts, {name: value.unflatten(2, self.shape[1:]) for name, value in self.sums.items()}, self.draws.documents
        )


@dataclass(frozen=True, eq=False)
class Replicates:
    """Sums of one site over a dataset in every bootstrap replicate.

    Attributes:
        counts: positions, predictions and rows of every replicate, [replicate, 3]; the last two only with gradients.
        sums: name -> [replicate, layer, *neuron], float64; of activations `positive` #(z>0), `total` Σz, `absolute` Σ|z|, `root` Σ√|z|,
            `square` Σz², and those of gradients under their names in `GradientSums`, except `snip`.
        documents: digest of every document -> the key that its weights are drawn from, see `Draws`.
    """

    counts: Float[Tensor, "replicate count"]
    sums: Mapping[str, Float[Tensor, "replicate layer *neuron"]]
    documents: Mapping[str, str]

    def __len__(self) -> int:
        return len(self.counts)

    @property
    def clusters(self) -> int:
        """Number of independent weights: documents, of which those that share rows count once."""
        return len(set(self.documents.values()))

    @property
    def whole(self) -> list[int]:
        """Replicates with a nonzero weight; with one or two documents all weights can be 0."""
        needed = self.counts if len(self.sums) > len(ACTIVATIONS) else self.counts[:, :1]
        return torch.nonzero((needed > 0).all(dim=1)).flatten().tolist()

    def drawn(self, b: int, gradients: GradientSums | None) -> tuple[int, dict[str, Tensor], GradientSums | None]:
        """Number of positions, sums of activations as in `NeuronStatistics`, and sums of gradients of one replicate."""
        positions, predictions, rows = (int(count) for count in self.counts[b])
        own = {name: value[b] for name, value in self.sums.items()}
        square = own["square"] - own["total"].square() / max(1, positions)
        sums = {name: own[name] for name in ACTIVATIONS[:-1]} | {"deviation": square.clamp_min(0)}
        if gradients is not None:
            slopes = {name: own[name] for name in gradients.sums if name in own}
            gradients = GradientSums(predictions, rows, math.nan, slopes, gradients.points)
        return positions, sums, gradients

    def merge(self, other: "Replicates") -> "Replicates":
        """Sums of both datasets together; exact if no document is in both, or those that are share rows with the same ones in both."""
        if len(self) != len(other):
            raise ValueError(f"cannot merge statistics with {len(other)} replicates into those with {len(self)}: collect both with as many")
        clash = [name for name, key in other.documents.items() if self.documents.get(name, key) != key]
        if clash:
            warn(
                f"{len(clash)} document{'s are' if len(clash) > 1 else ' is'} in both statistics, but with other documents in its rows, or "
                "collected with another seed, so that replicates draw it twice: intervals of the merged statistics are too narrow"
            )
        sums = {name: value + other.sums[name].to(value.device) for name, value in self.sums.items()}
        return Replicates(self.counts + other.counts, sums, {**other.documents, **self.documents})

    def to(self, device: str | torch.device) -> "Replicates":
        """The same sums on another device."""
        return replace(self, sums={name: value.to(device) for name, value in self.sums.items()})

    def tensors(self, site: str) -> dict[str, Tensor]:
        """What `Statistics.save` writes beside the header."""
        return {f"{site}.replicates.{name}": value for name, value in {"counts": self.counts, **self.sums}.items()}

    @classmethod
    def from_file(cls, tensors: Mapping[str, Tensor], site: str, header: Mapping[str, Any] | None) -> "Replicates | None":
        """What was stored for a site, or None."""
        if header is None:
            return None
        start = f"{site}.replicates."
        found = {name.removeprefix(start): value for name, value in tensors.items() if name.startswith(start)}
        missing = {"counts", *ACTIVATIONS} - set(found)
        if missing:
            raise CorruptFile(f"the replicates of {site!r} lack {', '.join(sorted(missing))}; collect the statistics again")
        return cls(found.pop("counts"), found, dict(header))


def replicated_sums(gradients: Sequence[str]) -> list[str]:
    """Names of the sums of gradients that replicates hold: all but those of weights, which are not sums over rows."""
    return list(dict.fromkeys(name for asked in gradients if asked != "snip" for name in MEASURED[asked]))
