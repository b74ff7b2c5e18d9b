"""Compare reported standard errors with the standard deviation over draws of documents.

    python benchmarks/spread.py                (100 draws; about five minutes on two cores)
    python benchmarks/spread.py --draws 10

The embedded model is evaluated on many draws of documents of every task. Reported errors assume that documents are drawn independently.
So documents are shuffled here as a plain list; the default, documents from all packages in turn, varies less. The ratio is the standard
deviation over draws divided by the root mean square of the expected errors; its correct value is 1. A draw takes n of the N documents of a
split without replacement, and of each long document a part from a random position. Variation between documents is thus sampled from a
finite population, and variation between positions in a document is not: of a reported variance v with a share w within documents,
(1 − (1 − w) n/N) v is expected. w is estimated from documents in several draws. The interval is that of a standard deviation (chi-square).
The exit status is 1 if the interval of any ratio is not within the bounds.
"""

import argparse
import math
import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

import sepcap
from sepcap.evaluation.next_token import evaluate_sample
from sepcap.evaluation.result import columns_of
from sepcap.progress import progress
from sepcap.tasks.samples import sample_task
from sepcap.tasks.task import Task

TASKS = ("local-prose", "local-python", "local-cpp")
METRICS = ("top1", "loss")
BOUNDS = (0.8, 1.25)


def ratio_of(values: np.ndarray, errors: np.ndarray) -> tuple[float, float, float]:
    """Standard deviation of values over the root mean square of their errors, with its 95% interval."""
    ratio, df = values.std(ddof=1) / math.sqrt((errors**2).mean()), len(values) - 1
    low, high = (math.sqrt(df / stats.chi2.ppf(level, df)) for level in (0.975, 0.025))
    return ratio, ratio * low, ratio * high


def within_share(residuals: Mapping[object, Sequence[float]]) -> float:
    """Share of the variance of documents' residuals that is within documents, between positions; documents drawn once do not count.

    Args:
        residuals: document -> its residual in every draw that contains it.
    """
    several = [np.array(values) for values in residuals.values() if len(values) > 1]
    if not several:
        return 0.0
    within = sum(((values - values.mean()) ** 2).sum() for values in several) / sum(len(values) - 1 for values in several)
    return float(min(1.0, within / np.concatenate(several).var()))


def expected_errors(errors: np.ndarray, drawn: np.ndarray, within: float) -> np.ndarray:
    """Expected errors of draws from a finite split, from reported errors, the share of documents drawn and the share within documents."""
    return errors * np.sqrt(1 - (1 - within) * drawn)


@dataclass(frozen=True)
class WithoutPackages:
    """The documents of a source as a plain list, shuffled as a whole."""

    source: Any

    @property
    def fingerprint(self) -> str:
        """Hash of the documents."""
        return f"{self.source.fingerprint}-without-packages"

    def documents(self, split: Any) -> Any:
        """The documents of one part, without names."""
        return self.source.documents(split).select_columns(["text"])

    def indices(self, split: Any, n: int) -> list[int] | str:
        """Row numbers of documents in the underlying data."""
        return self.source.indices(split, n)


def spread(model: Any, task: str, draws: int, tokens: int) -> list[dict[str, object]]:
    """One row of the table per metric, for one task."""
    (source,) = sepcap.load_task(task).sources
    loaded, there = Task(task, (WithoutPackages(source),)), len(source.documents("evaluate"))
    found, documents = [], []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about few documents, which is the case tested here
        for seed in progress(range(1, draws + 1), desc=task, unit="draw"):
            sample = sample_task(model, loaded, "evaluate", tokens, seed=seed)
            found.append(evaluate_sample(model, sample))
            # the sample has one source, so numbers of documents in the sample are those in the source
            documents.append([tuple(sample.indices[0][number] for number in of_row) for of_row in sample.row_documents or ()])
    drawn = np.array([e.n_documents / there for e in found])
    rows = []
    for metric in METRICS:
        values, errors = np.array([(e.value(metric), e.se(metric)) for e in found]).T
        residuals: dict[object, list[float]] = defaultdict(list)
        for evaluation, of_rows in zip(found, documents, strict=True):
            sums, n = columns_of(evaluation.per_cluster, metric)
            for names, residual in zip(of_rows, (sums - values.mean() * n) / n.mean(), strict=True):
                residuals[names].append(residual)
        within = within_share(residuals)
        ratio, low, high = ratio_of(values, expected_errors(errors, drawn, within))
        row = {"task": task, "metric": metric, "draws": draws, "documents": np.mean([e.n_documents for e in found]), "in the split": there}
        row |= {"mean": values.mean(), "spread": values.std(ddof=1), "reported": math.sqrt((errors**2).mean()), "within": within}
        rows.append(row | {"ratio": ratio, "low": low, "high": high, "in bounds": BOUNDS[0] <= low and high <= BOUNDS[1]})
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=100, help="draws of documents per task (default: 100)")
    parser.add_argument("--tokens", type=int, default=5_000, help="predictions per draw (default: 5000)")
    parser.add_argument("--tasks", nargs="+", default=TASKS, help=f"default: {' '.join(TASKS)}")
    asked = parser.parse_args()
    if asked.draws < 2:
        parser.error("--draws: a standard deviation needs at least 2")
    model = sepcap.load_model()
    table = pd.DataFrame([row for task in asked.tasks for row in spread(model, task, asked.draws, asked.tokens)])
    print(table.to_string(index=False, float_format=lambda value: f"{value:.4g}"))
    return 0 if bool(table["in bounds"].to_numpy().all()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
