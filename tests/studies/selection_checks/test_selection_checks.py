"""The selection checks on planted models in which every answer is known, and their geometry by hand."""

import dataclasses
import math

import numpy as np
import pandas as pd
import planted
import pytest
import torch

import sepcap
from sepcap.models.weights import fingerprint
from sepcap.studies.base import task_sets as several_tasks
from sepcap.studies.pruning import prune as pruning
from sepcap.studies.selection_checks.parts import crossing, equal_number, meeting_numbers, ranks, where_paths_meet
from sepcap.tasks.load import load_task

WORDS = 12
BUDGET = {"tokens": 1500, "eval_tokens": 800, "batch_size": 64, "seeds": (0, 1)}


@pytest.fixture(scope="module")
def halves(tmp_path_factory):
    return planted.in_mlp(tmp_path_factory.mktemp("halves"), words=WORDS, busy=4)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return planted.in_mlp(tmp_path_factory.mktemp("shared"), words=WORDS, shared=WORDS)


def config_of(plant, *checks, **changes):
    n = plant.truth["a"].masks["mlp"].numel()
    options = {"fractions": (6 / n, 12 / n, 1.0), "pruned": 0.2, "steps": (1, 2), "checks": checks} | BUDGET | changes
    return sepcap.SelectionChecksConfig(forget=load_task(plant.a, name="a"), retain=load_task(plant.b, name="b"), **options)


# keep only


@pytest.mark.thorough
def test_a_task_lives_on_its_own_neurons_alone(halves):
    result = sepcap.check_selection(halves.model, config_of(halves, "keep-only", seeds=tuple(range(6))))
    table = result.tables["keep_only"].set_index(["kept", "n", "evaluated"])
    for kept, other in (("a", "b"), ("b", "a")):
        own, lost = table.loc[(kept, 12, kept)], table.loc[(kept, 12, other)]
        assert (own["relative"], own["relative_low"], own["relative_high"]) == (1, 1, 1)
        assert (lost["relative"], lost["relative_high"]) == (0, 0)
        assert own["minus_random_low"] > 0
        # half of its neurons: about half of its words
        assert 0.35 < table.loc[(kept, 6, kept)]["relative"] < 0.65
    assert (table.xs(28, level="n")["relative"] == 1).all()  # all kept: nothing is pruned
    # the share nearest to one half is 12 of 28
    said = "When only the 42.9% of mlp neurons with the highest scores for a against b are kept, the share of top1 left is: a 1.00 "
    assert result.summary()[0].startswith(f"{said}[1.00, 1.00] (with as many random neurons kept 0.")


def test_kept_alone_a_shared_circuit_serves_both(shared):
    table = sepcap.check_selection(shared.model, config_of(shared, "keep-only", fractions=(0.5, 1.0))).tables["keep_only"]
    both = table.pivot_table(index=["kept", "n"], columns="evaluated", values="relative")
    np.testing.assert_allclose(both["a"], both["b"], atol=0.05)


# small and large steps


@pytest.mark.slow
def test_without_interaction_small_and_large_steps_take_the_same_neurons(halves, tmp_path):
    # the neurons of one half do not depend on each other, so that collecting again changes no score
    result = sepcap.check_selection(halves.model, config_of(halves, "step-size", pruned=12 / 28, steps=(1, 3, 4)), out=tmp_path)
    overlaps = result.tables["step_overlaps"]
    assert (overlaps["share"] == 1).all()
    assert (overlaps[["a", "b", "both"]] == 12).all(axis=None)
    assert overlaps["pruned"].tolist() == ["a"] * 6 + ["b"] * 6
    np.testing.assert_allclose(overlaps["log10_p"], -math.log10(math.comb(28, 12)))
    np.testing.assert_allclose(overlaps["log10_p_corrected"], overlaps["log10_p"] + math.log10(len(overlaps)))
    table = result.tables["steps"]
    assert set(table["run"]) == {"1 step", "3 steps", "4 steps", "1 step, other texts"}
    assert len(table) == 2 * 4 * 2
    assert (table.query("evaluated == pruned")["relative"] == 0).all()
    assert (table.query("evaluated != pruned")["relative"] == 1).all()
    assert (table["minus_first"] == 0).all()
    for side, pruned in enumerate(("a", "b")):
        run = sepcap.Run.load(tmp_path / "runs" / f"forget-{side}" / "3-steps-seed-0")
        assert [len(run.neurons(step)) for step in range(4)] == [0, 4, 8, 12]
        assert run.neurons() == halves.truth[pruned]
    said = result.summary()
    assert (
        "Of the 12 neurons pruned for b, 1 step and 4 steps share 100% (2.3 times chance, corrected p = 10^−6.4); 1 step and 1 "
        in said[3]
    )
    left = "After 4 steps of forgetting a, the share of accuracy left on a is 0.00 [0.00, 0.00]"
    assert said[1].startswith(f"{left}, with as many random neurons pruned 0.")
    assert said[1].endswith("; difference from 1 step 0.00 [0.00, 0.00].")


@pytest.mark.thorough
def test_a_single_number_of_steps_is_compared_with_other_texts_alone_and_the_cost_is_said_before(halves, tmp_path):
    config, heard = config_of(halves, "step-size", pruned=12 / 28, steps=(3,)), []
    evaluated = []
    with pytest.MonkeyPatch.context() as patched:
        for module in (several_tasks, pruning):
            real = module.evaluate_sample
            patched.setattr(module, "evaluate_sample", lambda *args, real=real, **kw: evaluated.append(1) or real(*args, **kw))
        result = sepcap.check_selection(halves.model, config, out=tmp_path, progress=lambda text: heard.append((text, len(evaluated))))
    # whole, two random sets, and from both sides 3 steps after step 0 and one after step 0, all on two tasks
    assert heard == [(heard[0][0], 0)]
    assert "15 sets evaluated" in heard[0][0]
    assert len(evaluated) == 2 * 15
    said = result.summary()
    assert len(said) == 7
    assert said[-1] == "In brackets 95% intervals: over texts, and for random neurons over texts and 2 seeds."
    assert "and 1 step, other texts share 100%" in said[0]
    assert not any("difference from" in sentence for sentence in said)
    sepcap.check_selection(halves.model, config, out=tmp_path, progress=lambda text: heard.append((text, len(evaluated))))
    assert "is finished; nothing is recomputed" in heard[1][0]
    assert len(evaluated) == 2 * 15


def test_runs_end_with_equally_many_neurons():
    config = sepcap.SelectionChecksConfig(pruned=0.2, steps=(1, 2, 3))
    assert equal_number(config, 100) == 18
    with pytest.raises(ValueError, match="takes a multiple of 6"):
        equal_number(config, 25)


# layer by layer


def test_layers_are_taken_from_the_last_and_the_scores_stay_what_they_are(halves):
    result = sepcap.check_selection(halves.model, config_of(halves, "layers", layer_fraction=0.5))
    table = result.tables["layers"].set_index(["pruned", "layers", "evaluated"])
    assert table.xs("a", level="evaluated")["n"].tolist() == [7, 7, 14, 14]  # half of 14 per layer, both tasks
    forget, retain = (sepcap.collect(halves.model, text, tokens=1500, sites="mlp", batch_size=64) for text in (halves.a, halves.b))
    before = sepcap.score(forget, retain)["mlp"]
    top = sepcap.score(forget, retain).top({"mlp": 0.5}, per_layer=True).masks["mlp"]
    truth = halves.truth["a"].masks["mlp"]
    for last, layers in ((1, [1]), (2, [0, 1])):
        mask = torch.zeros_like(top)
        mask[layers] = top[layers]
        pruned = int((mask & truth).sum())
        # a neuron is one of twelve equally frequent words
        assert table.loc[("a", last, "a")]["relative"] == pytest.approx(1 - pruned / WORDS, abs=0.05)
        assert pruned > 0
    # deleting in the last layer changes no activation before it: collecting again would select the same
    model, last = halves.model, sepcap.NeuronSet({"mlp": torch.stack([torch.zeros_like(top[0]), top[1]])})
    snapshot = several_tasks.WeightSnapshot(model, ("mlp",))
    sepcap.delete(model, last)
    again = [sepcap.collect(model, text, tokens=1500, sites="mlp", batch_size=64) for text in (halves.a, halves.b)]
    snapshot.restore()
    assert torch.equal(sepcap.score(*again)["mlp"][0], before[0])


# where both directions meet


def test_independent_halves_meet_where_everything_of_both_is_pruned(halves):
    result = sepcap.check_selection(halves.model, config_of(halves, "meeting"))
    found = result.tables["meeting"].set_index("what")["value"]
    # 12 neurons of each task and 4 of neither: nothing is shared before all 12 and some of the 4 are in
    assert found["selections first share a neuron"] >= 13 / 28
    assert found["trajectories meet: accuracy on a"] == pytest.approx(0, abs=1e-12)
    assert found["trajectories meet: accuracy on b"] == pytest.approx(0, abs=1e-12)
    # own accuracy is 0 from 12 on and the other's falls to 0 with everything pruned
    assert found["accuracy on a: curves cross"] == pytest.approx(1)
    shared = result.tables["shared"].set_index("n")
    assert shared["both"].tolist() == [0, 0, 28]
    assert shared["neither"].tolist() == [16, 4, 0]
    per_layer = zip(*(halves.truth[task].per_layer("mlp") for task in "ab"), strict=True)
    assert shared.loc[12, "both_by_chance"] == pytest.approx(sum(a * b / 14 for a, b in per_layer))
    curves = result.tables["curves"].set_index(["pruned", "n", "evaluated"])
    assert curves.loc[("a", 12, "a")]["relative"] == 0
    assert curves.loc[("a", 12, "b")]["relative"] == 1


def test_ranks_are_places_from_the_highest_score_and_sets_meet_by_counting():
    assert ranks(torch.tensor([[0.5, 2.0], [2.0, 0.1]])).tolist() == [3, 1, 2, 4]
    rng = np.random.default_rng(0)
    for n in (1, 2, 7, 30):
        a, b = (torch.from_numpy(rng.permutation(n) + 1) for _ in range(2))
        first = next(k for k in range(1, n + 1) if ((a <= k) & (b <= k)).any())
        covered = next(k for k in range(1, n + 1) if ((a <= k) | (b <= k)).all())
        assert meeting_numbers(a, b) == (first, covered)


def test_a_crossing_is_linear_between_shares_and_waits_until_the_curves_have_parted():
    at = np.array([0.0, 0.2, 0.4, 1.0])
    assert crossing(at, np.array([1, 1.1, 0.5, 0.0]), np.array([1, 1.0, 0.8, 0.0])) == pytest.approx(1.0)
    assert crossing(at, np.array([1, 0.6, 0.5, 0.4]), np.array([1, 1.0, 0.3, 0.0])) == pytest.approx(0.2 + 0.2 * 0.4 / 0.6)
    assert math.isnan(crossing(at, np.ones(4), np.ones(4)))
    assert math.isnan(crossing(at, np.full(4, 0.2), np.ones(4)))


def test_paths_meet_at_the_first_point_after_their_common_start():
    at = np.array([0.0, 0.5, 1.0])
    first = np.array([[1.0, 1.0], [0.0, 1.0], [1.0, 0.0]])  # left, then down to the right
    second = np.array([[1.0, 1.0], [1.0, 0.5], [0.0, 0.5]])  # down, then left: y = 0.5 is crossed at x = 0.5
    assert where_paths_meet(at, first, second) == pytest.approx((0.75, 0.75, 0.5, 0.5))
    assert where_paths_meet(at, second, first) == pytest.approx((0.75, 0.75, 0.5, 0.5))
    ends = np.array([[1.0, 1.0], [1.0, 0.0], [0.0, 0.0]])
    assert where_paths_meet(at, np.array([[1.0, 1.0], [0.0, 1.0], [0.0, 0.0]]), ends) == pytest.approx((1, 1, 0, 0))
    assert np.isnan(where_paths_meet(at, np.array([[1.0, 1.0], [0.5, 1.0], [0.0, 1.0]]), ends)).all()
    along = np.array([[1.0, 1.0], [0.8, 0.8], [0.0, 0.0]])
    # the same line: they meet at the first corner of either
    assert where_paths_meet(at, along, np.array([[1.0, 1.0], [0.9, 0.9], [0.0, 0.0]])) == pytest.approx((0.25, 0.5, 0.9, 0.9))


# the model and the folder


@pytest.mark.slow
def test_the_model_comes_back_as_it_was_and_an_interrupted_study_goes_on(halves, tmp_path, monkeypatch):
    before = fingerprint(halves.model)
    config = config_of(halves, "keep-only", "step-size", "layers", "meeting", seeds=(0,), fractions=(0.25, 1.0))
    straight = sepcap.check_selection(halves.model, config)
    assert fingerprint(halves.model) == before
    for module, at in ((several_tasks, 9), (pruning, 5)):
        calls, real = [], module.evaluate_sample

        def stopped(*args, calls=calls, at=at, real=real, **options):
            calls.append(1)
            if len(calls) == at:
                raise KeyboardInterrupt
            return real(*args, **options)

        with monkeypatch.context() as patched:
            patched.setattr(module, "evaluate_sample", stopped)
            with pytest.raises(KeyboardInterrupt):
                sepcap.check_selection(halves.model, config, out=tmp_path / "study")
        assert fingerprint(halves.model) == before
    again = sepcap.check_selection(halves.model, config, out=tmp_path / "study")
    assert list(again.tables) == list(straight.tables)
    for name, table in straight.tables.items():
        pd.testing.assert_frame_equal(again.tables[name], table, check_dtype=False)
    with pytest.raises(FileExistsError, match=r"layer_fraction: 0\.2 stored, 0\.3 requested"):
        sepcap.check_selection(halves.model, dataclasses.replace(config, layer_fraction=0.3), out=tmp_path / "study")
    assert len(again.summary()) >= 8
    with pytest.raises(ValueError, match="Did you mean 'layers'"):
        again.figure("layer")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"checks": ()}, "at least one"),
        ({"fractions": (0.5, 0.1)}, "increasing"),
        ({"fractions": (0.5, 1.2)}, r"lies in \(0, 1\]"),
        ({"steps": (0, 1)}, r"steps=\(0, 1\): give a tuple of whole numbers, 1 or more"),
        ({"steps": (2, 1)}, "steps=.*increasing"),
        ({"pruned": 0.0}, r"lies in \(0, 1\]"),
        ({"seeds": (-1,)}, "0 or more"),
    ],
)
def test_bad_configurations_are_named(changes, says):
    with pytest.raises(ValueError, match=says):
        sepcap.SelectionChecksConfig(**changes)


def test_shares_that_select_nothing_are_refused_before_anything_is_run(halves):
    with pytest.raises(ValueError, match="selects no neuron"):
        sepcap.check_selection(halves.model, config_of(halves, "layers", layer_fraction=0.01))
    with pytest.raises(ValueError, match="same data"):
        sepcap.check_selection(halves.model, sepcap.SelectionChecksConfig(forget=halves.a, retain=halves.a, checks=("meeting",), **BUDGET))
