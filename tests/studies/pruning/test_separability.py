"""Areas, drops and costs of trajectories drawn by hand (METHODS 11)."""

import dataclasses
import inspect
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sepcap.evaluation.result import COUNTS
from sepcap.studies.pruning.separability import Separability, area, costs_at, separability

TOKENS_PER_ROW = 100
FORGET, RETAIN = [0.6, 0.4, 0.2, 0.05], [0.5, 0.48, 0.4, 0.2]


def rows(accuracy: list[float], n: int = 20) -> np.ndarray:
    """Sums [step, row, count] whose every row has the same accuracy: top-1 as given, top-10 its root."""
    sums = np.zeros((len(accuracy), n, len(COUNTS)))
    for step, a in enumerate(accuracy):
        values = {
            "n": 1,
            "top1": a,
            "top10": math.sqrt(a),
            "skip50_n": 0.5,
            "skip50_top1": 0.5 * a**2,
            "skip50_top10": 0.5 * a,
            "loss": 2.0,
        }
        sums[step] = [TOKENS_PER_ROW * values[name] for name in COUNTS]
    return sums


def noisy_rows(accuracy: list[float], n: int, seed: int) -> np.ndarray:
    """Rows of n texts of different difficulty, each token a hit or a miss."""
    rng = np.random.default_rng(seed)
    sums = rows(accuracy, n)
    difficulty = rng.uniform(0.7, 1.3, n)
    for step, a in enumerate(accuracy):
        sums[step, :, COUNTS.index("top1")] = rng.binomial(TOKENS_PER_ROW, np.clip(a * difficulty, 0, 1))
    return sums


def of(forget: list[float], retain: list[float], **options) -> Separability:
    return separability(rows(forget), rows(retain), **options)


# Area


@pytest.mark.parametrize(
    ("forget", "retain", "expected"),
    [
        ([0.8, 0.6, 0.4, 0.2, 0.0], [0.4, 0.3, 0.2, 0.1, 0.0], 1),  # the diagonal
        ([0.8, 0.4, 0.0], [0.4, 0.4, 0.4], 2),  # retain kept to the end
        ([0.8, 0.8, 0.8], [0.4, 0.2, 0.0], 0),  # forget kept
        ([0.5, 0.5], [0.5, 0.5], 1),  # nothing happens
        ([0.8, 0.4], [0.6, 0.3], 1),  # half-way down the diagonal
        ([1.0, 0.0, 0.0], [1.0, 0.5, 0.0], 1.5),  # triangle below (0, ½)–(1, 1): ¾ of the square
        ([1.0, 0.5, 0.0], [1.0, 0.8, 0.0], 1.3),  # ½·½·0.8 + ½·½·1.8 = 0.65
        ([1.0, 0.5], [1.0, 0.8], 1.3),  # the same walk: the way to (0, 0) is a straight line wherever the run ends
    ],
)
def test_area_of_hand_drawn_trajectories(forget, retain, expected):
    assert float(area(np.array(forget), np.array(retain))) == pytest.approx(expected)
    result = of(forget, retain)
    assert result.area == pytest.approx(expected)
    assert result.percent == pytest.approx(100 * (expected - 1))
    assert result.interval == pytest.approx((expected, expected))  # rows that are all alike leave nothing to chance


def test_the_percentage_has_the_sign_of_the_task_that_drops_first():
    above, below = of([1.0, 0.5, 0.0], [1.0, 0.8, 0.0]), of([1.0, 0.8, 0.0], [1.0, 0.5, 0.0])
    assert (above.area, below.area) == (pytest.approx(1.3), pytest.approx(0.7))
    assert (above.percent, below.percent) == (pytest.approx(30), pytest.approx(-30))


accuracies = st.integers(2, 8).flatmap(lambda n: st.tuples(*[st.lists(st.floats(0.01, 1), min_size=n, max_size=n)] * 2))


@settings(max_examples=100, deadline=None)
@given(accuracies, st.floats(0.1, 10))
def test_swapping_the_axes_and_scaling_them(pair, scale):
    """A_xy + A_yx = 2 for every trajectory: ∫y dx + ∫x dy = x₀y₀. Areas do not depend on the units of either axis."""
    x, y = map(np.array, pair)
    assert float(area(x, y) + area(y, x)) == pytest.approx(2)
    assert float(area(scale * x, y)) == pytest.approx(float(area(x, y)))
    assert float(area(x, scale * y)) == pytest.approx(float(area(x, y)))


def test_the_specific_task_is_on_the_x_axis():
    forget, retain = [1.0, 0.5, 0.0], [1.0, 0.8, 0.0]
    assert of(forget, retain, specific="retain").area == pytest.approx(0.7)
    assert of(forget, retain, specific="retain").specific == "retain"
    perfect = ([1.0, 0.0], [1.0, 1.0])
    assert (of(*perfect).area, of(*perfect, specific="retain").area) == (pytest.approx(2), pytest.approx(0))


def test_every_accuracy_has_its_own_area():
    # top-10 is the root of top-1 here, so (½, 0.8) becomes (0.707, 0.894); skip-50 top-1 is its square
    forget, retain = [1.0, 0.5, 0.0], [1.0, 0.8, 0.0]
    for metric, power in (("top1", 1), ("top10", 0.5), ("skip50_top1", 2), ("skip50_top10", 1)):
        x, y = 0.5**power, 0.8**power
        result = of(forget, retain, metric=metric)
        assert result.metric == metric
        assert result.area == pytest.approx(x * y + (1 - x) * (1 + y))
        np.testing.assert_allclose(result.forget, [1, x, 0])
        np.testing.assert_allclose(result.retain, [1, y, 0])


def test_areas_of_several_trajectories_at_once():
    x, y = np.array([[1.0, 0.5, 0.0], [1.0, 1.0, 1.0]]), np.array([[1.0, 0.8, 0.0], [1.0, 0.5, 0.0]])
    np.testing.assert_allclose(area(x, y), [1.3, 0.0])


# Drops and costs


def test_maximum_differential_drop_and_its_step():
    # relative drops of forget 0, 25, 75, 100%; of retain 0, 0, 10, 50%
    result = of([0.8, 0.6, 0.2, 0.0], [0.5, 0.5, 0.45, 0.25])
    assert result.max_drop == pytest.approx(65)
    assert result.max_drop_lost == pytest.approx((75, 10))
    assert result.max_drop_step == 2


def counted(hits_per_step: list[list[float]]) -> np.ndarray:
    """Sums [step, document, count] of top-1 hits, of 100 predictions each."""
    sums = np.zeros((*np.shape(hits_per_step), len(COUNTS)))
    sums[..., COUNTS.index("n")], sums[..., COUNTS.index("top1")] = 100, hits_per_step
    return sums


def test_the_step_is_chosen_on_one_half_and_the_drop_measured_on_the_other():
    """One document is best at step 1, the other at step 2: chosen on either and measured on the other, both drops are the low ones."""
    forget = counted([[80, 80], [20, 60], [40, 24]])  # relative drops 75 and 25, then 50 and 70
    retain = counted([[50, 50], [50, 50], [50, 50]])
    result = separability(forget, retain)
    assert result.max_drop == pytest.approx((50 + 25) / 2)
    assert result.max_drop_lost == pytest.approx(((50 + 25) / 2, 0))  # and so are the losses that are printed beside it
    np.testing.assert_allclose(result.differential_drop, [0, 50, 60])
    assert result.max_drop_step == 2
    assert np.isnan(result.max_drop_interval).all()  # of one document in each half
    # four of each kind: whichever halves are drawn, the mean is of two drops between the lowest and the highest
    many = separability(np.tile(forget, (1, 4, 1)), np.tile(retain, (1, 4, 1)))
    assert many.max_drop <= 60 + 1e-9
    assert many.max_drop_interval[0] <= many.max_drop <= many.max_drop_interval[1]
    with_one = separability(forget[:, :1], retain)
    assert with_one.max_drop == pytest.approx(75)  # no halves: the plain maximum
    assert np.isnan(with_one.max_drop_interval).all()


def test_halves_are_their_seed_and_documents_that_are_alike_need_none():
    forget, retain = noisy_rows(FORGET, 20, 1), noisy_rows(RETAIN, 20, 2)
    first, again, other = (separability(forget, retain, seed=seed) for seed in (0, 0, 1))
    assert (first.max_drop, first.max_drop_interval) == (again.max_drop, again.max_drop_interval)
    assert first.max_drop_interval != other.max_drop_interval
    alike = of([0.8, 0.6, 0.2, 0.0], [0.5, 0.5, 0.45, 0.25])
    assert alike.max_drop_interval == pytest.approx((65, 65))


def test_costs_have_intervals_and_an_open_end_where_samples_never_drop_so_far():
    forget, retain = noisy_rows(FORGET, 40, 1), noisy_rows(RETAIN, 40, 2)
    result = separability(forget, retain)
    low, high = result.retain_cost_interval(50)
    assert low < result.retain_cost(50) < high
    least, most = result.forget_drop_interval(20)
    assert least < result.forget_drop(20) < most
    # replica by replica the cost of its own trajectory
    one = Separability.retain_cost(dataclasses.replace(result, forget=result.replicas.forget[7], retain=result.replicas.retain[7]), 50)
    assert costs_at(result.replicas.forget, result.replicas.retain, 50)[7] == pytest.approx(one)
    furthest = 100 * (1 - result.forget[-1] / result.forget[0])
    assert math.isinf(result.retain_cost_interval(furthest)[1])
    with pytest.raises(ValueError, match="prune further"):
        result.retain_cost_interval(furthest + 1)


def test_a_difference_between_runs_is_paired():
    """Two runs over the same documents that keep the same share of every one more or less: their difference has no spread."""
    forget, retain = noisy_rows([0.6], 30, 5), noisy_rows([0.5], 30, 6)
    top1 = COUNTS.index("top1")

    def run(shares_f, shares_r):
        f, r = (np.concatenate([base] * len(shares_f)) for base in (forget, retain))
        f[:, :, top1] *= np.array(shares_f)[:, None]
        r[:, :, top1] *= np.array(shares_r)[:, None]
        return separability(f, r)

    one, other = run([1, 0.5, 0.0], [1, 0.8, 0.0]), run([1, 0.5, 0.0], [1, 0.6, 0.0])
    difference, interval = one.minus(other)
    assert difference == pytest.approx(0.2)
    assert interval == pytest.approx((0.2, 0.2))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"metric": "top10"}, "other: metric is 'top10', here 'top1'"),
        ({"specific": "retain"}, "other: specific is 'retain', here 'forget'"),
        ({"samples": ("prose", "code")}, r"other: samples is \('prose', 'code'\), here \('code', 'prose'\)"),  # the reverse run
        ({"cluster": "package"}, "other: cluster is 'package', here 'document'"),
        ({"seed": 1}, "other: seed is 1, here 0"),
    ],
)
def test_only_areas_over_the_same_documents_are_paired(other, message):
    how = {"samples": ("code", "prose")}
    one = of(FORGET, RETAIN, **how)
    assert one.minus(of(FORGET, RETAIN, **how)) == (0, (0, 0))
    with pytest.raises(ValueError, match=message):
        one.minus(of(FORGET, RETAIN, **{**how, **other}))
    with pytest.raises(ValueError, match=r"other: n_clusters is \(10, 20\), here \(20, 20\)"):
        one.minus(separability(rows(FORGET, 10), rows(RETAIN), **how))


def test_a_run_that_only_hurts_what_was_to_stay_has_no_differential_drop():
    result = of([0.8, 0.8], [0.5, 0.1])
    assert (result.max_drop, result.max_drop_step) == (0, 0)


def test_the_published_way_of_saying_it():
    """OPT-6.7B: 80% of the code accuracy costs about 20% of the pile's."""
    result = of([0.7, 0.42, 0.14, 0.0], [0.5, 0.475, 0.4, 0.2])
    assert result.retain_cost(80.0) == pytest.approx(20)


def test_costs_are_interpolated_between_steps():
    # forget drops 0, 40, 80, 100%; retain 0, 5, 20, 60%
    result = of([1.0, 0.6, 0.2, 0.0], [0.5, 0.475, 0.4, 0.2])
    assert result.retain_cost(40.0) == pytest.approx(5)
    assert result.retain_cost(60.0) == pytest.approx(12.5)
    assert result.retain_cost(90.0) == pytest.approx(40)
    assert result.retain_cost(100.0) == pytest.approx(60)
    assert result.forget_drop(5.0) == pytest.approx(40)
    assert result.forget_drop(35.0) == pytest.approx(80 + 20 * 15 / 40)
    assert result.forget_drop(result.retain_cost(70.0)) == pytest.approx(70)


def test_costs_count_from_where_the_drop_is_first_reached():
    # forget drops 0, 60, 50, 90%; retain 0, 10, 10, 40%
    result = of([1.0, 0.4, 0.5, 0.1], [1.0, 0.9, 0.9, 0.6])
    assert result.retain_cost(55.0) == pytest.approx(10 * 55 / 60)
    assert result.retain_cost(60.0) == pytest.approx(10)
    assert result.retain_cost(70.0) == pytest.approx(10 + 30 * 20 / 40)


def test_costs_that_cannot_be_given():
    result = of([1.0, 0.6, 0.2], [1.0, 1.0, 0.9])
    with pytest.raises(ValueError, match=r"forget_drop=90.0: the largest drop of this run is 80\.0%"):
        result.retain_cost(90.0)
    with pytest.raises(ValueError, match=r"retain_cost=50.0: the largest drop of this run is 10\.0%"):
        result.forget_drop(50.0)
    for drop in (0.8, 0.0, -5.0, 101.0):
        with pytest.raises(ValueError, match=f"forget_drop={drop}: give a relative drop in percent"):
            result.retain_cost(drop)


# Intervals


def width(result: Separability) -> float:
    return result.interval[1] - result.interval[0]


@pytest.mark.parametrize("specific", ["forget", "retain"])
def test_the_interval_contains_the_point_and_shrinks_with_more_rows(specific):
    few, many = (separability(noisy_rows(FORGET, n, 1), noisy_rows(RETAIN, n, 2), specific=specific) for n in (20, 320))
    for result in (few, many):
        assert result.interval[0] < result.area < result.interval[1]
        assert result.percent_interval[0] < result.percent < result.percent_interval[1]
    # as the root of the number of rows: a quarter for sixteen times as many
    assert width(many) / width(few) == pytest.approx(1 / 4, rel=0.5)


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    truth = of(FORGET, RETAIN).area
    intervals = [separability(noisy_rows(FORGET, 40, 2 * i), noisy_rows(RETAIN, 40, 2 * i + 1)).interval for i in range(60)]
    covered = sum(low <= truth <= high for low, high in intervals)
    # Binomial(60, 0.95): fewer than 50 has a probability below 1e-3 even at 92%, and covering always would need intervals twice as wide
    assert covered >= 50
    assert np.median([high - low for low, high in intervals]) < 6 * np.std([(low + high) / 2 for low, high in intervals])


def test_the_same_rows_are_drawn_at_every_step():
    """Texts that differ in difficulty but all lose the same share: normalised accuracies are the same in every resample."""
    base_f, base_r = noisy_rows([0.6], 30, 5), noisy_rows([0.5], 30, 6)
    forget, retain = (np.concatenate([base] * 3) for base in (base_f, base_r))
    top1 = COUNTS.index("top1")
    forget[:, :, top1] *= np.array([1, 0.5, 0.1])[:, None]
    retain[:, :, top1] *= np.array([1, 0.9, 0.6])[:, None]
    result = separability(forget, retain)
    assert width(result) < 1e-9
    assert result.area == pytest.approx(of([1, 0.5, 0.1], [1, 0.9, 0.6]).area)


def test_the_two_tasks_may_have_different_numbers_of_rows():
    result = separability(noisy_rows(FORGET, 20, 1), noisy_rows(RETAIN, 35, 2))
    assert result.interval[0] < result.area < result.interval[1]


def test_rows_weigh_by_their_tokens():
    """A dataset's accuracy is hits over predictions, not the mean of its rows' accuracies."""
    forget = rows([1.0, 0.0], n=2)
    forget[:, 0] *= 3  # a row of 300 predictions ...
    forget[1, 0, COUNTS.index("top1")] = 300  # ... that keeps all of them right
    assert separability(forget, rows([1.0, 1.0])).forget[1] == pytest.approx(0.75)


def test_the_bootstrap_is_its_seed():
    forget, retain = noisy_rows(FORGET, 20, 1), noisy_rows(RETAIN, 20, 2)
    first, again, other = (separability(forget, retain, seed=seed) for seed in (0, 0, 1))
    assert first.interval == again.interval
    assert first.percent_interval == again.percent_interval
    assert first.interval != other.interval
    assert first.area == other.area


# What is refused


def test_areas_are_made_of_accuracies():
    with pytest.raises(ValueError, match=r"metric='loss' is not known.*Areas are computed from accuracies"):
        of(FORGET, RETAIN, metric="loss")
    with pytest.raises(ValueError, match=r"metric='top_1' is not known. Did you mean 'top1'"):
        of(FORGET, RETAIN, metric="top_1")
    with pytest.raises(ValueError, match=r"specific='forgot' is not known. Did you mean 'forget'"):
        # types are checked while testing, and would refuse this first
        inspect.unwrap(separability)(rows(FORGET), rows(RETAIN), specific="forgot")


@pytest.mark.parametrize(("forget", "retain", "role"), [([0.0, 0.0], [0.5, 0.5], "forget"), ([0.5, 0.5], [0.0, 0.0], "retain")])
def test_a_model_that_never_could_has_nothing_to_lose(forget, retain, role):
    with pytest.raises(ValueError, match=f"top1 of the unpruned model is 0 on the {role} task"):
        of(forget, retain)


def test_the_summary_says_what_the_numbers_are():
    result = dataclasses.replace(of([1.0, 0.5, 0.0], [1.0, 0.8, 0.0]), above_random=0.25, above_random_interval=(0.1, 0.4), seeds=1)
    parts = (
        "top1",
        "area=1.300",
        "30.0%",
        "max_drop=30.0 [30.0, 30.0] at step 1",
        "+0.250 [+0.100, +0.400] above random neurons (1 seed)",
        "20 and 20 clusters of documents",
    )
    for part in (*parts, "at the last step forget"):
        assert part in repr(result)


def test_interval_of_the_percentage_is_that_of_the_area_and_is_unknown_for_a_single_row():
    rng = np.random.default_rng(0)

    def rows(n):
        table = np.zeros((3, n, len(COUNTS)))
        table[..., COUNTS.index("n")] = 100
        table[..., COUNTS.index("top1")] = np.array([80, 40, 0])[:, None] + rng.integers(-8, 1, size=(3, n))
        table[2, :, COUNTS.index("top1")] = 0
        return table

    found = separability(rows(30), rows(30))
    assert found.interval[0] <= 1 <= found.interval[1]
    np.testing.assert_allclose(found.percent_interval, 100 * (np.array(found.interval) - 1))
    single = separability(rows(1), rows(1))
    assert np.isnan(single.interval).all()
    assert np.isnan(single.percent_interval).all()
