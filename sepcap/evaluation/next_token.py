"""Evaluation: top-k accuracies, cross-entropy and perplexity of next tokens, masked tokens or labels of images (METHODS 9)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sepcap.checks import checked
from sepcap.errors import unknown
from sepcap.models.forward import device_of, logits_of, measuring, output_in_place
from sepcap.progress import progress
from sepcap.statistics.collect import BATCH_SIZE, halving_batches
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
from sepcap.storage import load_tensors, save_tensors
from sepcap.tasks.batches import Batch, TokenSample
from sepcap.tasks.documents import PerDocument
from sepcap.tasks.samples import sample_task
from sepcap.tasks.task import load_task

METRICS = ("top1", "top10", "skip50_top1", "skip50_top10", "loss")
MISS = 2**31 - 1
"""Rank of a target among logits that are no numbers: below every top-k, however few the classes."""

COUNTS = ("n", "top1", "top10", "skip50_n", "skip50_top1", "skip50_top10", "loss")


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What a model achieves on the evaluation part of a task.

    Attributes:
        task: name of the task.
        per_row: sums per row of the sample, float64 [row, count] in the order of `COUNTS`.
        skip_tokens: the 50 most frequent target tokens of the sample, left out by the skip50 metrics.
        info: sample and model.
        clusters: number of the document that each row is of; rows that hold parts of the same documents have the same one. Documents
            are what is drawn: tokens of one document depend on each other. Default is a document per row.
        groups: the package that each row is of, where it is known.
    """

    task: str
    per_row: np.ndarray
    skip_tokens: tuple[int, ...]
    info: dict[str, Any]
    clusters: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    groups: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if not len(self.clusters):
            object.__setattr__(self, "clusters", np.arange(len(self.per_row)))
        object.__setattr__(self, "clusters", np.asarray(self.clusters))
        for name, labels in (("clusters", self.clusters), ("groups", self.groups)):
            if labels is not None and len(labels) != len(self.per_row):
                raise ValueError(f"{name} has {len(labels)} entries for {len(self.per_row)} rows: give one for each row")

    @property
    def n(self) -> int:
        """Number of predictions."""
        return int(self.per_row[:, 0].sum())

    @property
    def n_documents(self) -> int:
        """Number of documents; of images for an image classifier."""
        return int(self.info.get("n_documents") or self.n_clusters)

    @property
    def n_clusters(self) -> int:
        """Number of clusters that standard errors and intervals are of: documents, or sets of documents that share rows."""
        return len(self.per_cluster)

    @cached_property
    def per_cluster(self) -> Float[np.ndarray, "cluster count"]:
        """Sums of `per_row` over the rows of every cluster, in the order of `COUNTS`."""
        return cluster_sums(self.per_row, self.clusters)

    def sums(self, cluster: Cluster = "document") -> Float[np.ndarray, "cluster count"]:
        """Sums per document or per package, in the order of `COUNTS`.

        Args:
            cluster: "document", or "package": what documents of one package share makes them alike, and then packages are what is drawn.

        Raises:
            ValueError: the packages are not known.
        """
        if cluster == "document":
            return self.per_cluster
        return cluster_sums(self.per_row, clusters_by(cluster, self.clusters, self.groups, self.task))

    def value(self, metric: str) -> float:
        """Mean of a metric over its predictions; cross-entropy in nats."""
        return float(ratio(self.per_row, metric))

    def se(self, metric: str, cluster: Cluster = "document") -> float:
        """Standard error of the mean, with documents as clusters (ratio estimator), or packages: see `sums`."""
        return ratio_se(*columns_of(self.sums(cluster), metric))

    def interval(self, metric: str, cluster: Cluster = "document") -> Ends:
        """95% interval of the mean: Student's t with one degree of freedom less than there are documents, or packages.

        >>> evaluation.interval("top1")  # doctest: +SKIP
        (0.412, 0.437)
        """
        return t_interval(self.value(metric), self.se(metric, cluster), len(self.sums(cluster)))

    @property
    def top1(self) -> float:
        """Share of predictions whose target has the highest logit. A tie counts against the model in float32; in half precision, where
        rounding makes many, a target that ties with k − 1 others counts 1/k."""
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
        with np.errstate(over="ignore"):  # a ruined model can have an infinite one
            return float(np.exp(self.loss))

    @property
    def perplexity_se(self) -> float:
        """Standard error of the perplexity: to first order the perplexity times that of the loss (delta method)."""
        return self.perplexity * self.se("loss")

    def difference(self, before: "Evaluation", metric: str = "top1", *, seed: int = 0, cluster: Cluster = "document") -> tuple[float, Ends]:
        """Change of a metric since `before`, with a 95% bootstrap interval over the documents both were evaluated on.

        Args:
            before: evaluation of the other model on the same tokens.
            metric: one of `METRICS`.
            seed: of the bootstrap.
            cluster: what is drawn, "document" or "package"; see `sums`.

        Returns:
            self − before, and the ends of its interval; documents are drawn for both together, so what they share cancels.
        """
        if not isinstance(before, Evaluation):
            raise TypeError(f"before is a {type(before).__name__}; give the evaluation of the other model on the same tokens")
        if self.info.get("sample") is None or self.info["sample"] != before.info.get("sample") or len(self.per_row) != len(before.per_row):
            raise ValueError(f"before was evaluated on other tokens ({before.task!r}) than this ({self.task!r}): they cannot be paired")
        n = len(self.sums(cluster))
        weights = bootstrap_weights(n, np.random.default_rng(seed))
        old, new = (ratio((weights @ e.sums(cluster))[:, None], metric) for e in (before, self))
        with np.errstate(invalid="ignore"):  # a ruined model can have an infinite loss
            return self.value(metric) - before.value(metric), bootstrap_interval(new - old, n)

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
            CorruptFile: a file of something else, a damaged one, or one that does not say which rows are of one document.
        """
        tensors, meta = load_tensors(path, "evaluation", ("per_row", "clusters"))
        per_row, clusters = (tensors[name].numpy() for name in ("per_row", "clusters"))
        groups = None if meta.get("groups") is None else tuple(meta["groups"])
        return cls(meta["task"], per_row, tuple(meta["skip_tokens"]), meta["info"], clusters, groups)

    def as_row(self, cluster: Cluster = "document") -> dict[str, float]:
        """n, n_documents, every metric and perplexity, each with its standard error over documents, or packages: see `sums`."""
        row: dict[str, float] = {"n": float(self.n), "n_documents": float(self.n_documents)}
        for metric in METRICS:
            row |= {metric: self.value(metric), f"{metric}_se": self.se(metric, cluster)}
        return row | {"perplexity": self.perplexity, "perplexity_se": self.perplexity * row["loss_se"]}  # the delta method

    def to_latex(self, **options: Any) -> str:
        """Every metric with its 95% interval (Student's t over documents), for a paper; see `sepcap.latex.latex_table`."""
        import pandas as pd

        from sepcap.latex import latex_table

        row = self.as_row()
        metrics = [name for name in row if f"{name}_se" in row]
        t = t_factor(self.n_clusters)
        ends = {f"{self.task}{end}": [row[m] + sign * t * row[f"{m}_se"] for m in metrics] for end, sign in (("_low", -1), ("_high", 1))}
        return latex_table(pd.DataFrame({"metric": metrics, self.task: [row[m] for m in metrics], **ends}), **options)

    def __repr__(self) -> str:
        top1, loss = (f"{self.value(m):.4f} [{low:.4f}, {high:.4f}]" for m in ("top1", "loss") for low, high in [self.interval(m)])
        return (
            f"Evaluation({self.task!r}, n={self.n:,} in {self.n_documents:,} documents, top1={top1}, top10={self.top10:.4f}, loss={loss}, "
            f"perplexity={self.perplexity:.2f})"
        )

    def _repr_html_(self) -> str:
        import pandas as pd

        from sepcap.storage import html_card

        rows = [{"metric": m, "mean": self.value(m), "standard error": self.se(m)} for m in METRICS]
        rows.append({"metric": "perplexity", "mean": self.perplexity, "standard error": self.perplexity_se})
        for row in rows:
            row["95% from"], row["to"] = t_interval(row["mean"], row["standard error"], self.n_clusters)
        how = {"task": self.task, "predictions": f"{self.n:,}", "documents": f"{self.n_documents:,}", "model": self.info.get("model", "")}
        return html_card("Evaluation", how, pd.DataFrame(rows))


def columns_of(
    sums: Float[np.ndarray, "*leading count"], metric: str
) -> tuple[Float[np.ndarray, "*leading"], Float[np.ndarray, "*leading"]]:
    """The sums of a metric and of the predictions that it is over."""
    if metric not in METRICS:
        raise unknown("metric", metric, METRICS)
    n = "skip50_n" if metric.startswith("skip50") else "n"
    return sums[..., COUNTS.index(metric)], sums[..., COUNTS.index(n)]


def clusters_by(cluster: Cluster, clusters: Int[np.ndarray, " row"], groups: Sequence[str] | None, task: str) -> Int[np.ndarray, " row"]:
    """The documents of rows, or the clusters of rows that share a document or a package.

    Raises:
        ValueError: another word, or the packages are not known.
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


@checked()
def evaluate(
    model: Any,
    task: Any,
    *,
    tokens: int = 100_000,
    batch_size: int = BATCH_SIZE,
    context: int | None = None,
    seed: int = 0,
    per_document: PerDocument = "row",
) -> Evaluation:
    """Measure prediction on the evaluation part of a task (METHODS 9).

    Every token that is neither BOS nor padding is a target. A masked language model has 15% of the tokens hidden, of which 80%
    are the mask token, 10% random and 10% as they were, and is scored on those; an image classifier predicts one label per
    image, and no label is left out by the skip50 metrics. Never more than one batch of logits is held.

    Args:
        model: what `load_model` returns, pruned or ablated or neither.
        task: a task name, a path, a `datasets.Dataset`, a list of strings, or a Task.
        tokens: number of targets; of tokens for a masked language model, of images for an image classifier.
        batch_size: rows per forward pass; halved, with a warning, when memory runs out.
        context: tokens per row; default is the model's context, at most 512.
        seed: order of the documents and places in long ones, and for a masked language model which tokens are hidden; 0 takes documents
            as they come.
        per_document: most tokens of one document: "row" for what fits one row, a number, or None for whole documents.

    Returns:
        Evaluation with `top1`, `top10`, `skip50_top1`, `skip50_top10`, `loss`, `perplexity`, and `se(metric)`.

    Example:
        >>> sepcap.evaluate(model, "local-prose", tokens=20_000).top1  # doctest: +SKIP
    """
    sample = sample_task(model, load_task(task), "evaluate", tokens, context, seed, per_document)
    return evaluate_sample(model, sample, batch_size=batch_size)


def evaluate_sample(model: Any, sample: TokenSample, *, batch_size: int = BATCH_SIZE, quiet: bool = False) -> Evaluation:
    """`evaluate` on tokens that were sampled before."""
    frequent = most_frequent_targets(sample)
    skip = tuple(frequent)

    def one_pass(size: int) -> np.ndarray:
        skip_ids = torch.tensor(skip, dtype=torch.long, device=device_of(model))
        parts = []
        what = f"evaluate {sample.task}"
        bar = progress(total=sample.tokens, desc=what, unit="tok", unit_scale=True, quiet=quiet)
        with measuring(model), bar:
            for batch in sample.batches(size):
                parts.append(evaluate_batch(model, batch.to(device_of(model)), skip_ids).cpu().numpy())
                bar.update(batch.size)
        return np.concatenate(parts)

    info = {
        "skip_counts": list(frequent.values()),
        "model": str(model.cfg.model_name),
        "asked": sample.asked,
        "tokens": sample.tokens,
        "sample": sample.fingerprint,
        "documents": list(sample.indices),
        "n_documents": sample.n_documents,
    }
    return Evaluation(sample.task, halving_batches(one_pass, batch_size), skip, info, **clusters_of(sample))


def clusters_of(sample: TokenSample) -> dict[str, Any]:
    """The document of every row of a sample and its package, as `Evaluation` takes them."""
    return {"clusters": sample.clusters, "groups": sample.groups}


def most_frequent_targets(sample: TokenSample, k: int = 50) -> dict[int, int]:
    """The k most frequent target tokens of a sample and how often they are asked for; of two equal ones the smaller id first."""
    ids, counts = np.unique(sample.targets(), return_counts=True)
    first = np.lexsort((ids, -counts))[:k]
    return dict(zip(ids[first].tolist(), counts[first].tolist(), strict=True))


def frequent_table(tokenizer: Any, counts: Mapping[int, int]) -> Any:
    """A DataFrame of token (id), text and count, in the order given."""
    import pandas as pd

    texts = [tokenizer.decode([token]) for token in counts]
    return pd.DataFrame({"token": list(counts), "text": texts, "count": list(counts.values())})


@torch.inference_mode()
def evaluate_batch(model: Any, batch: Batch, skip_ids: Int[Tensor, " k"]) -> Float[Tensor, "batch count"]:
    """Sums of every row of a batch, in the order of `COUNTS`."""
    with output_in_place(model):
        logits = logits_of(model, batch.inputs, batch.mask)
    every_answer, every_asked, skip_ids = (x.to(logits.device) for x in (batch.answers, batch.asked, skip_ids))
    if logits.shape[1] == 1:  # images: one prediction each, so all at once
        return _counts(logits[:, 0], every_answer[:, 0], every_asked[:, 0], skip_ids)
    scratch = torch.empty(logits[0].shape, dtype=_wide(logits), device=logits.device)
    sums = []
    for row, answers, asked in zip(logits, every_answer, every_asked, strict=True):
        if 2 * int(asked.sum()) < len(asked):  # of a masked model few positions are scored
            row, answers, asked = row[asked], answers[asked], asked[asked]
        sums.append(_counts(row, answers, asked, skip_ids, scratch[: len(row)]).sum(dim=0))
    return torch.stack(sums)


def _counts(
    logits: Float[Tensor, "pos vocab"],
    answers: Int[Tensor, " pos"],
    asked: Bool[Tensor, " pos"],
    skip_ids: Int[Tensor, " k"],
    scratch: Float[Tensor, "pos vocab"] | None = None,
) -> Float[Tensor, "pos count"]:
    """What every position adds to the sums of `COUNTS`."""
    ranks, tied, losses = rank_and_loss(logits, answers, scratch)
    rare = asked & ~torch.isin(answers, skip_ids)
    first, tenth = (hits(ranks, tied, k) for k in (1, 10))
    columns = (asked, asked * first, asked * tenth, rare, rare * first, rare * tenth, torch.where(asked, losses, 0))
    if logits.device.type == "mps":  # which has no float64
        columns = [column.cpu() for column in columns]
    return torch.stack([column.double() for column in columns], dim=1)


def _wide(logits: Float[Tensor, "..."]) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def rank_and_loss(
    logits: Float[Tensor, "pos vocab"], targets: Int[Tensor, " pos"], scratch: Float[Tensor, "pos vocab"] | None = None
) -> tuple[Int[Tensor, " pos"], Int[Tensor, " pos"], Float[Tensor, " pos"]]:
    """Rank of every target (0 is best), how many tokens share it, and the target's cross-entropy in nats.

    The rank is the number of other tokens whose logit is at least the target's. One comparison gives every top-k. Logits of half
    precision have few digits, so that many are equal: only there are the tokens that tie with the target counted too, itself included.
    In float32 that number is 1, and ties count against the model: one that gives every token the same logit has no hits.
    Where the target's logit is not finite or another one is NaN, the rank is `MISS`.
    `scratch` is room for as many logits: taking fresh memory every time would cost more than the arithmetic.
    """
    half = logits.dtype.itemsize == 2
    logits = logits.to(_wide(logits))
    scratch = torch.empty_like(logits) if scratch is None else scratch
    target_logits = logits.gather(1, targets[:, None])
    # comparing into a float buffer: summing booleans is four times slower on a CPU, and floats count exactly to 2^24
    ranks = torch.ge(logits, target_logits, out=scratch).sum(dim=1).long() - 1
    tied = torch.eq(logits, target_logits, out=scratch).sum(dim=1).long() if half else torch.ones_like(ranks)
    losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    # NaN compares false with everything and would rank first
    broken = ~torch.isfinite(target_logits[:, 0]) | losses.isnan()
    return torch.where(broken, MISS, ranks), torch.where(broken, 1, tied), losses


def hits(ranks: Int[Tensor, " pos"], tied: Int[Tensor, " pos"], k: int) -> Float[Tensor, " pos"]:
    """Chance that a target is among the k first where tokens that tie stand in random order: two first ones count 1/2 each for k = 1."""
    better = ranks - tied + 1
    return (k - better).clamp_min(0).minimum(tied) / tied
