"""Whether reported standard errors are as large as what they stand for: the spread over draws of documents.

    python benchmarks/spread.py                (100 draws; about ten minutes on two cores)
    python benchmarks/spread.py --draws 10

The embedded model is evaluated on many draws of documents of every task. The ratio is that of the standard deviation over draws and the
root mean square of the reported standard errors; 1 is right. A draw takes n of the N documents of a finite split without replacement, so
that it varies less than documents of an endless one: reported errors are multiplied by √(1 − n/N) before they are compared. The interval
is that of a standard deviation (chi-square). The exit status is 1 where some ratio does not lie with its interval within the bounds.
"""

import argparse
import math

import numpy as np
import pandas as pd
from scipy import stats

import sepcap
from sepcap.progress import progress

TASKS = ("local-prose", "local-python", "local-cpp")
METRICS = ("top1", "loss")
BOUNDS = (0.8, 1.25)


def ratio_of(values: np.ndarray, errors: np.ndarray) -> tuple[float, float, float]:
    """Standard deviation of values over the root mean square of their errors, with its 95% interval."""
    ratio, df = values.std(ddof=1) / math.sqrt((errors**2).mean()), len(values) - 1
    low, high = (math.sqrt(df / stats.chi2.ppf(level, df)) for level in (0.975, 0.025))
    return ratio, ratio * low, ratio * high


def spread(model: object, task: str, draws: int, tokens: int) -> list[dict[str, object]]:
    """A row for every metric of a task."""
    loaded = sepcap.load_task(task)
    there = sum(len(source.documents("evaluate")) for source in loaded.sources)
    found = []
    for seed in progress(range(1, draws + 1), desc=task, unit="draw"):
        found.append(sepcap.evaluate(model, loaded, tokens=tokens, seed=seed))
    finite = np.array([1 - min(e.n_documents, there) / there for e in found])
    rows = []
    for metric in METRICS:
        values, errors = np.array([(e.value(metric), e.se(metric)) for e in found]).T
        ratio, low, high = ratio_of(values, errors * np.sqrt(finite))
        row = {"task": task, "metric": metric, "draws": draws, "documents": np.mean([e.n_documents for e in found]), "in the split": there}
        row |= {"mean": values.mean(), "spread": values.std(ddof=1), "reported": math.sqrt((errors**2).mean())}
        rows.append(row | {"ratio": ratio, "low": low, "high": high, "within": BOUNDS[0] <= low and high <= BOUNDS[1]})
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=100, help="draws of documents per task (default: 100)")
    parser.add_argument("--tokens", type=int, default=15_000, help="predictions of every draw (default: 15000)")
    parser.add_argument("--tasks", nargs="+", default=TASKS, help=f"default: {' '.join(TASKS)}")
    asked = parser.parse_args()
    if asked.draws < 2:
        parser.error("--draws: a spread takes at least 2")
    model = sepcap.load_model()
    table = pd.DataFrame([row for task in asked.tasks for row in spread(model, task, asked.draws, asked.tokens)])
    print(table.to_string(index=False, float_format=lambda value: f"{value:.4g}"))
    return 0 if bool(table["within"].to_numpy().all()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
