"""Streamed, mergeable moments of every neuron of a site (METHODS 3)."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sepcap.checks import checked
from sepcap.errors import CorruptFile, unknown
from sepcap.models.sites import get_site
from sepcap.statistics.dip import dip_table, dips
from sepcap.statistics.gradients import GradientImportances, GradientSums
from sepcap.statistics.histogram import Histogram, check_count
from sepcap.statistics.replicates import Replicates
from sepcap.storage import html_card, load_tensors, save_tensors

SUMS = ("positive", "total", "absolute", "root", "deviation")


@dataclass(frozen=True, eq=False)
class NeuronStatistics(GradientImportances):
    """Sums over the kept token positions of a dataset, for every neuron of one site.

    Within a block of at most 256 positions, float32 activations are added in float32 (relative error of a sum of
    n terms at most n·2⁻²⁴, so 1.5e-5 in the worst case and near 1e-7 in practice); blocks are added in
    float64. float64 and half-precision activations are added in float64 throughout; in half precision Σz and Σ|z|
    are exact (Σ√|z| to 1e-7). On a GPU all activations are added in float64, except on Apple's GPUs, which have no
    float64: their activations are added on the CPU. Blocks never span two rows of a batch, so shards that were split
    between rows merge to the same sums.

    Squared deviations are summed about the mean of each block, and blocks are combined by Chan's update: the relative
    error of the standard deviation is at most 1e-5 (near 1e-7 in practice), however large the mean is.

    Attributes:
        site: name of the site.
        count: number of positions N.
        sums: `positive` #(z>0), `total` Σz, `absolute` Σ|z|, `root` Σ√|z|, `deviation` Σ(z−z̄)², each float64
            [layer, neuron] or [layer, head, d_head].
        low, high: smallest and largest activation, same shape.
        histogram: histograms of the activations, if they were requested.
        gradients: sums of derivatives of the loss, if they were requested.
        write_norm: ‖W_write‖₂ of every neuron, the norm over d_model of what one unit of it adds to the residual stream.
        replicates: sums of bootstrap replicates over documents, if they were requested.
    """

    site: str
    count: int
    sums: Mapping[str, Float[Tensor, "layer *neuron"]]
    low: Float[Tensor, "layer *neuron"]
    high: Float[Tensor, "layer *neuron"]
    histogram: Histogram | None = None
    gradients: GradientSums | None = None
    write_norm: Float[Tensor, "layer *neuron"] | None = None
    replicates: Replicates | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """(layers, neurons) for mlp, (layers, heads, d_head) for attention."""
        return tuple(self.low.shape)

    def _mean_of(self, name: str) -> Float[Tensor, "layer *neuron"]:
        if self.count == 0:
            raise ValueError(f"statistics of {self.site!r} hold no positions: the mean is undefined")
        return self.sums[name] / self.count

    @property
    def mean(self) -> Float[Tensor, "layer *neuron"]:
        """Σz / N."""
        return self._mean_of("total")

    @property
    def abs(self) -> Float[Tensor, "layer *neuron"]:
        """Σ|z| / N."""
        return self._mean_of("absolute")

    @property
    def sqrt(self) -> Float[Tensor, "layer *neuron"]:
        """Σ√|z| / N."""
        return self._mean_of("root")

    @property
    def rms(self) -> Float[Tensor, "layer *neuron"]:
        """√(Σz² / N)."""
        return (self._mean_of("deviation") + self.mean.square()).sqrt()

    @property
    def std(self) -> Float[Tensor, "layer *neuron"]:
        """√(Σ(z−z̄)² / N): the population standard deviation about the dataset's own mean."""
        return self._mean_of("deviation").sqrt()

    @property
    def freq(self) -> Float[Tensor, "layer *neuron"]:
        """#(z>0) / N; an error for attention, which has no activation function and so no meaningful sign."""
        if not get_site(self.site).activation_function:
            raise ValueError(
                f"importance 'freq' is undefined for site {self.site!r}: attention has no activation function, so a positive "
                "activation means nothing ([SP] appendix B). Use 'abs', 'sqrt', 'rms' or 'std'."
            )
        return self._mean_of("positive")

    @property
    def wanda(self) -> Float[Tensor, "layer *neuron"]:
        """rms(z)·‖W_write‖₂.

        Source: Wanda (arXiv 2306.11695), per neuron.
        """
        if self.write_norm is None:
            raise ValueError(
                f"statistics of {self.site!r} hold no norms of the output weights, which 'wanda' needs: they were collected by an older "
                "version or with rotation=, or merged from models of different weights; collect them again"
            )
        return self.rms * self.write_norm

    @property
    def min(self) -> Float[Tensor, "layer *neuron"]:
        """Smallest activation."""
        return self.low

    @property
    def max(self) -> Float[Tensor, "layer *neuron"]:
        """Largest activation."""
        return self.high

    def require_histogram(self) -> Histogram:
        """The histogram; if it was not collected, an error that states how to collect it."""
        if self.histogram is None:
            raise ValueError(f"statistics of {self.site!r} hold no histograms; collect them with collect(..., histogram=True)")
        if self.count == 0:
            raise ValueError(f"statistics of {self.site!r} hold no positions: the distribution is undefined")
        return self.histogram

    @property
    def peak(self) -> Float[Tensor, "layer *neuron"]:
        """The mode: centre of the fullest of 100 equal bins over the neuron's own [min, max], the lowest in case of ties (METHODS 8).

        Which of two bins is fuller is certain if their counts differ by more than the number of activations within
        range/510 of their edges.
        """
        return self.require_histogram().peak()

    @property
    def median(self) -> Float[Tensor, "layer *neuron"]:
        """The middle activation, or the mean of the two middle ones, to within range/510."""
        return self.quantile(0.5)

    @checked()
    def quantile(self, q: float) -> Float[Tensor, "layer *neuron"]:
        """The activation of rank q·(N − 1), interpolated between neighbouring ranks, to within range/510."""
        return self.require_histogram().quantile(q)

    @property
    def bimodality(self) -> Float[Tensor, "layer *neuron"]:
        """The dip: how far the distribution is from having a single mode, from 0 to 1/4 (METHODS 3).

        Skewed distributions, such as those after a ReLU, have a dip of 0 if they have one mode. About a millisecond per neuron.

        Source: Hartigan and Hartigan (1985).
        """
        return dips(self.require_histogram(), self.site)

    @checked()
    def replicate(self, b: int) -> "NeuronStatistics":
        """The statistics in bootstrap replicate `b`, in which documents count as often as it draws them; without histograms and `snip`.

        `low` and `high` are those of all documents.
        """
        if self.replicates is None:
            raise ValueError(f"statistics of {self.site!r} hold no replicates; collect them with collect(..., replicates=100)")
        if not 0 <= b < len(self.replicates):
            raise IndexError(f"b={b}: there are the replicates 0 to {len(self.replicates) - 1}")
        count, sums, gradients = self.replicates.drawn(b, self.gradients)
        return replace(self, count=count, sums=sums, histogram=None, gradients=gradients, replicates=None)

    def merge(self, other: "NeuronStatistics") -> "NeuronStatistics":
        """Statistics of both datasets together, in any order: sums are added, squared deviations combined by Chan's update."""
        if self.site != other.site or self.shape != other.shape:
            raise ValueError(
                f"cannot merge statistics of {other.site!r} {list(other.shape)} into {self.site!r} {list(self.shape)}: "
                "they belong to different sites or models"
            )
        if (self.histogram is None) != (other.histogram is None):
            raise ValueError(
                f"cannot merge statistics of {self.site!r} with and without histograms: collect both with the same histogram=True or False"
            )
        if (self.gradients is None) != (other.gradients is None):
            raise ValueError(
                f"cannot merge statistics of {self.site!r} with and without gradients: collect both with the same gradients="
            )
        if (self.replicates is None) != (other.replicates is None):
            raise ValueError(
                f"cannot merge statistics of {self.site!r} with and without replicates: collect both with the same replicates="
            )
        gradients = self.gradients and other.gradients and self.gradients.merge(other.gradients)
        replicates = None if self.replicates is None or other.replicates is None else self.replicates.merge(other.replicates)
        norms = self.write_norm, other.write_norm
        same = norms[0] is not None and norms[1] is not None and torch.equal(norms[0], norms[1].to(norms[0].device))
        histogram = None
        if self.histogram is not None and other.histogram is not None:
            check_count(self.count + other.count)
            histogram = self.histogram.merge(other.histogram)
        added = {name: value.to(self.low.device) for name, value in other.sums.items()}
        joined = between(self.count, self.sums["total"], other.count, added["total"])
        sums = {name: self.sums[name] + added[name] + (joined if name == "deviation" else 0) for name in SUMS}
        low = torch.minimum(self.low, other.low.to(self.low.device))
        high = torch.maximum(self.high, other.high.to(self.low.device))
        norm = norms[0] if same else None
        return NeuronStatistics(self.site, self.count + other.count, sums, low, high, histogram, gradients, norm, replicates)

    def to(self, device: str | torch.device) -> "NeuronStatistics":
        """The same statistics on another device."""
        sums = {name: value.to(device) for name, value in self.sums.items()}
        histogram = None if self.histogram is None else self.histogram.to(device)
        gradients = None if self.gradients is None else self.gradients.to(device)
        norm = None if self.write_norm is None else self.write_norm.to(device)
        replicates = None if self.replicates is None else self.replicates.to(device)
        low, high = self.low.to(device), self.high.to(device)
        return NeuronStatistics(self.site, self.count, sums, low, high, histogram, gradients, norm, replicates)

    @checked()
    def save(self, path: str | Path) -> None:
        """Write one safetensors file, atomically."""
        Statistics({self.site: self}).save(path)

    @classmethod
    @checked()
    def load(cls, path: str | Path) -> "NeuronStatistics":
        """Read what `save` wrote."""
        by_site = Statistics.load(path)
        if len(by_site) != 1:
            raise ValueError(f"{path} holds statistics of {', '.join(by_site)}; open it with sepcap.Statistics.load")
        return next(iter(by_site.values()))

    def __repr__(self) -> str:
        beside = "" if self.histogram is None else ", histogram"
        beside += "" if self.gradients is None else f", gradients of {', '.join(self.gradients.names)}"
        beside += "" if self.replicates is None else f", {len(self.replicates)} replicates"
        return f"NeuronStatistics(site={self.site!r}, shape={list(self.shape)}, count={self.count:,}{beside})"


class Statistics(Mapping[str, NeuronStatistics]):
    """Neuron statistics of one dataset: a mapping from site name to `NeuronStatistics`.

    Attributes:
        info: how they were collected: model, task, tokens requested and used, context, whether BOS is included, documents used.
    """

    def __init__(self, by_site: Mapping[str, NeuronStatistics], info: Mapping[str, Any] | None = None) -> None:
        self._by_site = dict(by_site)
        self.info = dict(info or {})

    def __getitem__(self, site: str) -> NeuronStatistics:
        if site not in self._by_site:
            raise unknown("site", site, self._by_site, "Collect it too: collect(..., sites=[...]).")
        return self._by_site[site]

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_site)

    def __len__(self) -> int:
        return len(self._by_site)

    @property
    def n_documents(self) -> int | None:
        """Number of documents, summed over merged parts; None if it is not known."""
        parts = [self.info]
        for part in parts:  # the list grows during the loop
            parts.extend(part.get("merged", ()))
        counts = [part.get("n_documents") for part in parts if "merged" not in part]
        known = [count for count in counts if count is not None]
        return sum(known) if len(known) == len(counts) else None

    def merge(self, other: "Statistics") -> "Statistics":
        """Statistics of both datasets together, site by site; both must have the same sites, model and basis."""
        if not isinstance(other, Statistics):
            raise TypeError(f"other is a {type(other).__name__}; give what sepcap.collect returns")
        if set(self) != set(other):
            raise ValueError(f"cannot merge statistics of sites {sorted(other)} into {sorted(self)}")
        kept = {name: self.info[name] for name in ("model", "rotation") if name in self.info}
        for name in ("model", "rotation"):
            if self.info.get(name) != other.info.get(name):
                mine, theirs = (f"{name} {info[name]!r}" if info.get(name) else f"no {name}" for info in (self.info, other.info))
                raise ValueError(f"cannot merge statistics of {theirs} into those of {mine}: the neurons are not the same")
        return Statistics({s: self[s].merge(other[s]) for s in self}, kept | {"merged": [self.info, other.info]})

    @checked()
    def bimodality(self, heads: bool = False) -> Any:
        """The neurons or heads with the most bimodal activations (METHODS 3; [SEP] 4.3.11 and 4.3.12).

        Args:
            heads: one row per head, with the mean over its neurons, instead of one per neuron.

        Returns:
            DataFrame of site, layer, head (attention only), neuron (in its layer or head) and bimodality, the highest of each site first.

        Raises:
            ValueError: statistics without histograms, or no site with heads.

        Example:
            >>> sepcap.collect(model, "local-code", histogram=True).bimodality(heads=True)  # doctest: +SKIP
        """
        sites = [site for site, stats in self.items() if not heads or len(stats.shape) == 3]
        if not sites:
            raise ValueError(f"heads=True: statistics of {', '.join(self)} have no heads; collect 'attn_pre_out' or 'attn_value'")
        return dip_table({site: self[site].bimodality.cpu() for site in sites}, heads)

    def to(self, device: str | torch.device) -> "Statistics":
        """The same statistics on another device."""
        return Statistics({s: v.to(device) for s, v in self.items()}, self.info)

    @checked()
    def save(self, path: str | Path) -> None:
        """Write one safetensors file, atomically."""
        tensors = {}
        for site, stats in self.items():
            tensors |= {f"{site}.{name}": stats.sums[name] for name in SUMS}
            tensors |= {f"{site}.low": stats.low, f"{site}.high": stats.high}
            if stats.write_norm is not None:
                tensors[f"{site}.write_norm"] = stats.write_norm
            if stats.gradients is not None:
                tensors |= {f"{site}.gradients.{name}": value for name, value in stats.gradients.sums.items()}
            if stats.replicates is not None:
                tensors |= stats.replicates.tensors(site)
            if stats.histogram is not None:
                tensors |= {f"{site}.histogram.{name}": getattr(stats.histogram, name) for name in ("counts", "exponent", "start")}
        counts = {site: stats.count for site, stats in self.items()}
        gradients = {site: stats.gradients.as_json() for site, stats in self.items() if stats.gradients is not None}
        header = {"kind": "statistics", "counts": counts, "gradients": gradients, "info": self.info}
        drawn = {site: dict(stats.replicates.documents) for site, stats in self.items() if stats.replicates is not None}
        save_tensors(path, tensors, header | ({"replicates": drawn} if drawn else {}))

    @classmethod
    @checked()
    def load(cls, path: str | Path) -> "Statistics":
        """Read what `save` wrote."""
        tensors, meta = load_tensors(path, "statistics")
        try:
            by_site = {
                site: NeuronStatistics(
                    site,
                    int(count),
                    {name: tensors[f"{site}.{name}"] for name in SUMS},
                    tensors[f"{site}.low"],
                    tensors[f"{site}.high"],
                    _load_histogram(tensors, site),
                    GradientSums.from_file(tensors, site, meta.get("gradients", {}).get(site)),
                    tensors.get(f"{site}.write_norm"),
                    Replicates.from_file(tensors, site, meta.get("replicates", {}).get(site)),
                )
                for site, count in meta["counts"].items()
            }
        except (KeyError, TypeError) as error:
            raise CorruptFile(f"{path}: {error} is missing or not known; collect the statistics again") from error
        return cls(by_site, meta["info"])

    def __repr__(self) -> str:
        sites = ", ".join(f"{s} {list(v.shape)}" for s, v in self.items())
        count = next(iter(self.values())).count if self else 0
        of = "" if self.n_documents is None else f" of {self.n_documents:,} documents"
        return f"Statistics({self.info.get('task', 'merged')!r}, {count:,} positions{of}: {sites})"

    def _repr_html_(self) -> str:
        import pandas as pd

        rows = [
            {
                "site": site,
                "shape": " × ".join(map(str, v.shape)),
                "positions": f"{v.count:,}",
                "mean": float(v.sums["total"].mean() / max(1, v.count)),
                "rms": float(v.rms.square().mean()) ** 0.5 if v.count else 0.0,
                "min": float(v.low.min()),
                "max": float(v.high.max()),
                "histogram": "no" if v.histogram is None else "yes",
                "gradients": "no" if v.gradients is None else ", ".join(v.gradients.names),
            }
            for site, v in self.items()
        ]
        how = {k: self.info.get(k) for k in ("model", "task", "split", "context", "rotation")} | {"documents": self.n_documents}
        if self.info.get("include_bos"):
            how["BOS"] = "counted"
        if "merged" in self.info:
            how["merged"] = " + ".join(str(part.get("task", "merged")) for part in self.info["merged"])
        return html_card("Statistics", how, pd.DataFrame(rows))


def _load_histogram(tensors: Mapping[str, Tensor], site: str) -> Histogram | None:
    if f"{site}.histogram.counts" not in tensors:
        return None
    return Histogram(*(tensors[f"{site}.{name}"] for name in ("histogram.counts", "histogram.exponent", "histogram.start", "low", "high")))


def between(
    n: int, total: Float[Tensor, "*layer neuron"], m: int, other: Float[Tensor, "*layer neuron"]
) -> Float[Tensor, "*layer neuron"] | float:
    """Excess of Σ(z−z̄)² of two parts together over the two sums: n·m/(n+m) times the squared distance of their means."""
    return (total / n - other / m).square() * (n * m / (n + m)) if n and m else 0.0
