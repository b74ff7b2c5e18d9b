"""Results of an evaluation: sums per row, and statistics computed from them with documents as the sample (METHODS 9)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int

from sepcap.checks import checked
from sepcap.errors import unknown
from sepcap.latex import latex_table
from sepcap.statistics.intervals import (
    CLUSTERS,
    Cluster,
    Ends,
    bootstrap_interval,
    bootstrap_weights,
    cluster_sums,
    connected,
    ratio_se,
    t_factor,
    t_interval,
)
from sepcap.storage import html_card, load_tensors, save_tensors

METRICS = ("top1", "top10", "skip50_top1", "skip50_top10", "loss")

COUNTS = ("n", "top1", "top10", "skip50_n", "skip50_top1", "skip50_top10", "loss")


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Performance of a model on the evaluation part of a task.

    Attributes:
        task: name of the task.
        per_row: sums per row of the sample, float64 [row, count] in the order of `COUNTS`.
        skip_tokens: the 50 most frequent target tokens of the sample, left out by the skip50 metrics.
        info: sample and model.
        clusters: number of the document of each row; rows with parts of the same documents have the same number. Documents are
            resampled, because tokens of one document are dependent. Default is one document per row.
        groups: the package of each row, if it is known.
    """

    task: str
    per_row: np.ndarray
    skip_tokens: tuple[int, ...]
    info: dict[str, Any]
    clusters: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    groups: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "clusters", np.asarray(self.clusters) if len(self.clusters) else np.arange(len(self.per_row)))
        for name, labels in (("clusters", self.clusters), ("groups", self.groups)):
            if labels is not None and len(labels) != len(self.per_row):
                raise ValueError(f"{name} has {len(labels)} entries for {len(self.per_row)} rows: give one for each row")

    @property
    def n(self) -> int:
        """Number of predictions."""
        return int(self.per_row[:, 0].sum())

    @property
    def n_documents(self) -> int:
        """Number of documents; number of images for an image classifier."""
        return int(self.info.get("n_documents") or self.n_clusters)

    @property
    def n_clusters(self) -> int:
        """Number of clusters for standard errors and intervals: documents, or sets of documents that share rows."""
        return len(self.per_cluster)

    @cached_property
    def per_cluster(self) -> Float[np.ndarray, "cluster count"]:
        """Sums of `per_row` over the rows of every cluster, in the order of `COUNTS`."""
        return cluster_sums(self.per_row, self.clusters)

    @checked()
    def sums(self, cluster: Cluster = "document") -> Float[np.ndarray, "cluster count"]:
        """Sums per document or per package, in the order of `COUNTS`.

        Args:
            cluster: "document", or "package": documents of one package are similar, and packages are then the independent units.

        Raises:
            ValueError: the packages are not known.
        """
        if cluster == "document":
            return self.per_cluster
        return cluster_sums(self.per_row, clusters_by(cluster, self.clusters, self.groups, self.task))

    @checked()
    def value(self, metric: str) -> float:
        """Mean of a metric over its predictions; cross-entropy in nats."""
        return float(ratio(self.per_row, metric))

    @checked()
    def se(self, metric: str, cluster: Cluster = "document") -> float:
        """Standard error of the mean, with documents as clusters (ratio estimator), or packages: see `sums`."""
        return ratio_se(*columns_of(self.sums(cluster), metric))

    @checked()
    def interval(self, metric: str, cluster: Cluster = "document") -> Ends:
        """95% interval of the mean: Student's t with one degree of freedom fewer than documents, or packages.

        >>> evaluation.interval("top1")  # doctest: +SKIP
        (0.412, 0.437)
        """
        return t_interval(self.value(metric), self.se(metric, cluster), len(self.sums(cluster)))

    @property
    def top1(self) -> float:
        """Share of predictions whose target has the highest logit.

        A tie counts against the model in float32; in half precision, where rounding causes many ties, a target tied with k − 1
        others counts 1/k.
        """
        return self.value("top1")

    @property
    def top10(self) -> float:
        """Share of predictions whose target is among the ten highest logits."""
        return self.value("top10")

    @property
    def skip50_top1(self) -> float:
        """top1 without predictions of the 50 most frequent targets."""
        return self.value("skip50_top1")

    @property
    def skip50_top10(self) -> float:
        """top10 without predictions of the 50 most frequent targets."""
        return self.value("skip50_top10")

    @property
    def loss(self) -> float:
        """Mean cross-entropy in nats."""
        return self.value("loss")

    @property
    def perplexity(self) -> float:
        """exp of the mean cross-entropy (not the mean of exp)."""
        with np.errstate(over="ignore"):  # a damaged model can have an infinite perplexity
            return float(np.exp(self.loss))

    @property
    def perplexity_se(self) -> float:
        """Standard error of the perplexity: to first order the perplexity times the standard error of the loss (delta method)."""
        return self.perplexity * self.se("loss")

    @checked()
    def difference(self, before: "Evaluation", metric: str = "top1", *, seed: int = 0, cluster: Cluster = "document") -> tuple[float, Ends]:
        """Change of a metric since `before`, with a 95% bootstrap interval over the documents both were evaluated on.

        Args:
            before: evaluation of the other model on the same tokens.
            metric: one of `METRICS`.
            seed: seed of the bootstrap.
            cluster: what is resampled, "document" or "package"; see `sums`.

        Returns:
            self − before, and the ends of its interval; the same documents are drawn for both, so common variation cancels.
        """
        if not isinstance(before, Evaluation):
            raise TypeError(f"before is a {type(before).__name__}; give the evaluation of the other model on the same tokens")
        if self.info.get("sample") is None or self.info["sample"] != before.info.get("sample") or len(self.per_row) != len(before.per_row):
            raise ValueError(f"before was evaluated on other tokens ({before.task!r}) than this ({self.task!r}): they cannot be paired")
        n = len(self.sums(cluster))
        weights = bootstrap_weights(n, np.random.default_rng(seed))
        old, new = (ratio((weights @ e.sums(cluster))[:, None], metric) for e in (before, self))
        with np.errstate(invalid="ignore"):  # a damaged model can have an infinite loss
            return self.value(metric) - before.value(metric), bootstrap_interval(new - old, n)

    @checked()
    def skip50(self, tokenizer: Any) -> Any:
        """The target tokens that the skip50 metrics leave out, the most frequent first: a DataFrame of token, text and count."""
        return frequent_table(tokenizer, dict(zip(self.skip_tokens, self.info["skip_counts"], strict=True)))

    @checked()
    def save(self, path: str | Path) -> None:
        """Write one safetensors file, atomically."""
        meta = {"kind": "evaluation", "task": self.task, "skip_tokens": list(self.skip_tokens), "info": self.info, "groups": self.groups}
        tensors = {"per_row": torch.from_numpy(self.per_row), "clusters": torch.from_numpy(self.clusters)}
        save_tensors(path, tensors, meta)

    @classmethod
    @checked()
    def load(cls, path: str | Path) -> "Evaluation":
        """Read what `save` wrote.

        Raises:
            CorruptFile: a file of another kind, a damaged one, or one without the document of each row.
        """
        tensors, meta = load_tensors(path, "evaluation", ("per_row", "clusters"))
        per_row, clusters = (tensors[name].numpy() for name in ("per_row", "clusters"))
        groups = None if meta.get("groups") is None else tuple(meta["groups"])
        return cls(meta["task"], per_row, tuple(meta["skip_tokens"]), meta["info"], clusters, groups)

    @checked()
    def as_row(self, cluster: Cluster = "document") -> dict[str, float]:
        """n, n_documents, every metric and perplexity, each with its standard error over documents, or packages: see `sums`."""
        row: dict[str, float] = {"n": float(self.n), "n_documents": float(self.n_documents)}
        for metric in METRICS:
            row |= {metric: self.value(metric), f"{metric}_se": self.se(metric, cluster)}
        return row | {"perplexity": self.perplexity, "perplexity_se": self.perplexity * row["loss_se"]}  # the delta method

    @property
    def table(self) -> Any:
        """A DataFrame of metric, value, value_low and value_high: the ends of the 95% interval (Student's t over documents)."""
        import pandas as pd

        row = self.as_row()
        metrics = [name for name in row if f"{name}_se" in row]
        t = t_factor(self.n_clusters)
        ends = {f"value{end}": [row[m] + sign * t * row[f"{m}_se"] for m in metrics] for end, sign in (("_low", -1), ("_high", 1))}
        return pd.DataFrame({"metric": metrics, "value": [row[m] for m in metrics], **ends})

    def to_latex(self, **options: Any) -> str:
        """`.table` for a paper, with the name of the task above the values; see `sepcap.latex.latex_table`."""
        return latex_table(self.table.rename(columns=lambda name: name.replace("value", self.task)), **options)

    def __repr__(self) -> str:
        top1, loss = (f"{self.value(m):.4f} [{low:.4f}, {high:.4f}]" for m in ("top1", "loss") for low, high in [self.interval(m)])
        return (
            f"Evaluation({self.task!r}, n={self.n:,} in {self.n_documents:,} documents, top1={top1}, top10={self.top10:.4f}, loss={loss}, "
            f"perplexity={self.perplexity:.2f})"
        )

    def _repr_html_(self) -> str:
        import pandas as pd

        found = self.as_row()
        rows: list[dict[str, Any]] = [{"metric": m, "mean": found[m], "standard error": found[f"{m}_se"]} for m in (*METRICS, "perplexity")]
        for row in rows:
            row["95% from"], row["to"] = t_interval(row["mean"], row["standard error"], self.n_clusters)
        how = {"task": self.task, "predictions": f"{self.n:,}", "documents": f"{self.n_documents:,}", "model": self.info.get("model", "")}
        return html_card("Evaluation", how, pd.DataFrame(rows))


def columns_of(
    sums: Float[np.ndarray, "*leading count"], metric: str
) -> tuple[Float[np.ndarray, "*leading"], Float[np.ndarray, "*leading"]]:
    """The sums of a metric and of the number of its predictions."""
    if metric not in METRICS:
        raise unknown("metric", metric, METRICS)
    n = "skip50_n" if metric.startswith("skip50") else "n"
    return sums[..., COUNTS.index(metric)], sums[..., COUNTS.index(n)]


def clusters_by(cluster: Cluster, clusters: Int[np.ndarray, " row"], groups: Sequence[str] | None, task: str) -> Int[np.ndarray, " row"]:
    """The documents of rows, or the clusters of rows that share a document or a package.

    Raises:
        ValueError: an unknown `cluster`, or the packages are not known.
    """
    if cluster not in CLUSTERS:
        raise unknown("cluster", cluster, CLUSTERS)
    if cluster == "document":
        return clusters
    if groups is None:
        raise ValueError(f"cluster='package': the packages of {task!r} are not known; local tasks have them. Give cluster='document'")
    return connected(clusters, groups)


def ratio(per_row: np.ndarray, metric: str) -> np.ndarray:
    """Mean of a metric from sums per row or cluster; the last two axes are [row, count]."""
    hits, n = columns_of(per_row, metric)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(hits.sum(-1) / n.sum(-1))


def frequent_table(tokenizer: Any, counts: Mapping[int, int]) -> Any:
    """A DataFrame of token (id), text and count, in the order given."""
    import pandas as pd

    texts = [tokenizer.decode([token]) for token in counts]
    return pd.DataFrame({"token": list(counts), "text": texts, "count": list(counts.values())})
