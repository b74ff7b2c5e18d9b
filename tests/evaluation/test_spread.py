"""What benchmarks/spread.py expects of draws from a finite split, on documents whose variances are planted."""

import importlib.util
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest

PATH = Path(__file__).parents[2] / "benchmarks" / "spread.py"
SPEC = importlib.util.spec_from_file_location("spread", PATH)
spread = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(spread)


@pytest.mark.parametrize("within", [0.0, 0.7, 2.0])
def test_draws_from_a_finite_split_vary_as_expected(within):
    """60 of 100 documents; of each a place is drawn too, whose standard deviation is `within` times that between documents."""
    rng, draws, there, n = np.random.default_rng(1), 3000, 100, 60
    documents = rng.normal(size=there)
    values, errors, residuals = np.empty(draws), np.empty(draws), defaultdict(list)
    for i in range(draws):
        chosen = rng.permutation(there)[:n]
        seen = documents[chosen] + within * rng.normal(size=n)
        values[i], errors[i] = seen.mean(), seen.std(ddof=1) / np.sqrt(n)
        for number, value in zip(chosen.tolist(), seen - documents.mean(), strict=True):
            residuals[number].append(value)
    share = spread.within_share(residuals)
    assert share == pytest.approx(within**2 / (documents.var() + within**2), abs=0.02)
    ratio, low, high = spread.ratio_of(values, spread.expected_errors(errors, np.full(draws, n / there), share))
    assert low - 0.02 < 1 < high + 0.02, (ratio, low, high)
    # the whole variance corrected, as though places were drawn from a finite collection as well, is too small where they differ
    naive, *_ = spread.ratio_of(values, spread.expected_errors(errors, np.full(draws, n / there), 0.0))
    assert (naive > 1.1) == (within > 0)


def test_documents_that_are_seen_once_say_nothing_of_places():
    assert spread.within_share({"a": [1.0], "b": [3.0]}) == 0
    # within: ((0.5² + 0.5²) + (0.5² + 0.5²)) / 2 = 0.5; in all of 0, 1, 4, 5: 4.25
    assert spread.within_share({"a": [0.0, 1.0], "b": [4.0, 5.0], "c": [9.0]}) == pytest.approx(0.5 / 4.25)
