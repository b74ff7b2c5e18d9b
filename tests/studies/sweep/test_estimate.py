"""The time that is left, by hand, from planted seconds; no clock is read."""

import pytest

from sepcap.studies.base.text import duration
from sepcap.studies.sweep.estimate import Estimate


def finished(seconds):
    return {"state": "finished", "seconds": seconds}


def test_the_rate_is_seconds_per_token_of_all_finished_cells():
    estimate = Estimate({"a": 100, "b": 300, "c": 200, "d": 200}, {}, workers=1)
    assert estimate.seconds is None
    assert estimate.in_words() == "time unknown until a cell is finished"
    estimate.add("a", finished(20))
    assert estimate.seconds == pytest.approx(700 * 20 / 100)
    estimate.add("b", finished(40))  # faster per token: statistics were there
    assert estimate.seconds == pytest.approx(400 * 60 / 400)
    assert estimate.in_words() == "about 60 s left, at the rate of 2 finished cells"


@pytest.mark.parametrize(("workers", "left"), [(1, 40), (2, 20), (4, 10), (8, 10)])
def test_workers_share_the_cells_but_not_one_cell(workers, left):
    work = dict.fromkeys("abcde", 1)
    assert Estimate(work, {"a": finished(10)}, workers).seconds == left


def test_cells_that_failed_or_are_not_asked_for_say_nothing_about_the_rate():
    ended = {"a": {"state": "failed", "seconds": 0.1}, "other": finished(5_000), "b": finished(10)}
    estimate = Estimate({"a": 1, "b": 1, "c": 1}, ended, workers=1)
    assert estimate.seconds == 10
    estimate.add("c", finished(10))
    assert estimate.seconds == 0


def test_durations_have_a_unit_that_suits_them():
    assert [duration(s) for s in (0, 1.4, 89, 90, 5_399, 5_400, 40_000)] == [
        "1 s", "1 s", "89 s", "2 minutes", "90 minutes", "1.5 hours", "11.1 hours"
    ]  # fmt: skip
