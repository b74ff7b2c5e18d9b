"""What does not belong together is refused: evaluations of other tokens, statistics of other neurons, activities that are no numbers."""

import dataclasses

import pytest
import torch

import sepcap
from sepcap.selection.matching import activity_of


def test_a_difference_is_of_two_evaluations_of_the_same_tokens(tiny_opt, letters):
    one = sepcap.evaluate(tiny_opt, letters, tokens=200)
    assert one.difference(one)[0] == 0
    unknown = dataclasses.replace(one, info={})
    with pytest.raises(ValueError, match="evaluated on other tokens"):
        unknown.difference(unknown)
    for wrong in ("foo", "n"):
        with pytest.raises(ValueError, match="metric"):
            one.se(wrong)


def test_statistics_of_other_neurons_are_not_merged(tiny_opt, letters):
    plain = sepcap.collect(tiny_opt, letters, tokens=200, sites="attn_value")
    rotated = sepcap.collect(tiny_opt, letters, tokens=200, sites="attn_value", rotation=sepcap.compute_rotation(tiny_opt))
    both = rotated.merge(rotated)
    assert both.info["rotation"] == rotated.info["rotation"]
    assert both["attn_value"].count == 2 * rotated["attn_value"].count
    with pytest.raises(ValueError, match=r"cannot merge statistics of rotation .* into those of no rotation"):
        plain.merge(rotated)
    other = sepcap.Statistics(plain, plain.info | {"model": "another"})
    with pytest.raises(ValueError, match="cannot merge statistics of model 'another'"):
        plain.merge(other)


def test_activities_that_are_no_numbers_match_nothing():
    good = torch.rand(2, 30)
    assert torch.equal(activity_of({"mlp": good}, "mlp"), good)
    with pytest.raises(ValueError, match=r"matched.*1 activities that are NaN"):
        activity_of({"mlp": good.index_put((torch.tensor(0), torch.tensor(1)), torch.tensor(float("nan")))}, "mlp")
    with pytest.raises(ValueError, match="no site 'mlp'; it is empty"):
        activity_of({}, "mlp")
    with pytest.raises(TypeError, match="matched is a Tensor"):
        activity_of(good, "mlp")
