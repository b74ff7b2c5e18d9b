"""Warnings point at the line that called the package."""

import pytest

import sepcap


def test_a_warning_points_at_the_line_that_called_the_package(tiny_opt, letters):
    with pytest.warns(UserWarning, match="fewer tokens to evaluate than the 1,000,000 asked for") as told:
        sepcap.evaluate(tiny_opt, letters, tokens=1_000_000, context=16)
    assert [warning.filename for warning in told] == [__file__]
