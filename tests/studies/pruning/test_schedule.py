"""Schedules: steps that prune different amounts ([SEP] 4.3.5; METHODS 10)."""

import json
import shlex
from dataclasses import replace

import pytest
from run_folders import Stop, bits, config_of, stop_by

import sepcap
from sepcap.cli.main import COMMANDS
from sepcap.cli.options import config_in, parse_schedule
from sepcap.studies.base.fields import Schedule
from sepcap.studies.base.folder import differing_fields
from sepcap.studies.pruning import prune as pruning
from sepcap.studies.pruning.config import PruningConfig
from sepcap.studies.pruning.random_neurons.above_random import equal_steps
from sepcap.studies.pruning.random_neurons.baselines import baseline_config
from sepcap.studies.pruning.report import command

# first mlp, then both, then heads alone
FIRST_MLP = ({"mlp": 0.25}, {"mlp": 0.25}, {"mlp": 0.125, "heads": 1}, {"heads": 2})


def scheduled(letters, digits, **changes):
    return config_of(letters, digits, fractions={"mlp": 0.02}, steps=50, schedule=FIRST_MLP, **changes)


@pytest.fixture
def run(trained, letters, digits, tmp_path):
    return sepcap.prune(trained, scheduled(letters, digits), out=tmp_path / "run")


def test_the_steps_of_a_schedule_are_those_of_a_loop_by_hand(run, trained, letters, digits):
    gone = sepcap.NeuronSet.empty(trained, ("mlp", "attn_pre_out"))
    options = {"tokens": 150, "sites": ("mlp", "attn_pre_out"), "batch_size": 4}
    for step, amounts in enumerate(FIRST_MLP, start=1):
        scores = sepcap.score(sepcap.collect(trained, letters, **options), sepcap.collect(trained, digits, **options))
        chosen = scores.top(amounts, exclude=gone)
        gone = gone | chosen
        sepcap.delete(trained, chosen)
        assert run.neurons(step) == gone
        assert run.record(step)["thresholds"] == chosen.info["threshold"]
    # of 2 × 72 mlp neurons and 2 × 4 heads of 8
    table = run.trajectory[run.trajectory["role"] == "forget"]
    assert table["pruned_mlp"].tolist() == [0, 36, 72, 90, 90]
    assert table["pruned_attn_pre_out"].tolist() == [0, 0, 0, 8, 24]
    assert table["threshold_heads"].isna().tolist() == [True, True, True, False, False]
    assert (run.config["steps"], run.config["fractions"]) == (4, {"mlp": 0.625, "heads": 3})


def test_without_collecting_again_the_sets_are_nested_parts_of_one_ranking(trained, letters, digits, tmp_path):
    run = sepcap.prune(trained, scheduled(letters, digits, recollect=False), out=tmp_path / "run")
    scores = run.scores()
    for step, amounts in enumerate(({"mlp": 0.25}, {"mlp": 0.5}, {"mlp": 0.625, "heads": 1}, {"mlp": 0.625, "heads": 3}), start=1):
        assert run.neurons(step) == scores.top(amounts)
        assert list(run.record(step)["thresholds"]) == list(FIRST_MLP[step - 1])


@pytest.mark.parametrize("done", [1, 3])
def test_an_interrupted_schedule_resumes_to_the_same_bits(run, trained, letters, digits, tmp_path, monkeypatch, done):
    prepared, deletions, delete = pruning.plan(trained, scheduled(letters, digits)), [], pruning.delete

    def counted(*args):
        deletions.append(1)
        return stop_by(Stop)() if len(deletions) == done + 1 else delete(*args)

    with monkeypatch.context() as patch:
        patch.setattr(pruning, "delete", counted)
        with pytest.raises(Stop):
            pruning.execute(prepared, tmp_path / "again")
    assert sepcap.Run.load(tmp_path / "again").steps_done == done
    pruning.execute(prepared, tmp_path / "again")
    assert bits(tmp_path / "again") == bits(run.folder)
    for other in (FIRST_MLP[::-1], (*FIRST_MLP[:3], {"heads": 1}, {"heads": 1}), ()):  # the order, one step more, no schedule
        how = {"schedule": other, "fractions": {"mlp": 0.02}, "steps": 50} if other else {"steps": 4}
        with pytest.raises(FileExistsError, match="schedule"):
            sepcap.prune(trained, config_of(letters, digits, **how), out=run.folder)
    one, every = ({"schedule": [{"mlp": 0.1}, {"heads": n}]} for n in (1, 1.0))  # one head, all heads
    assert "schedule" in differing_fields(one, every)


def test_command_line_python_and_json_are_the_same(run):
    assert parse_schedule(["2:mlp=0.25", "mlp=0.125,heads=1", "heads=2"]) == FIRST_MLP
    assert [tuple(sorted(step.items())) for step in run.config["schedule"]] == [tuple(sorted(step.items())) for step in FIRST_MLP]
    assert json.loads((run.folder / "config.json").read_text())["schedule"] == list(FIRST_MLP)
    words = shlex.split(command(run).replace("\\\n", " "))
    assert words[words.index("--schedule") :][1:4] == ["2:mlp=0.25", "1:mlp=0.125,heads=1", "1:heads=2"]
    assert "--fractions" not in words
    import tyro

    parsed = config_in(PruningConfig, tyro.cli(COMMANDS["prune"], args=words[2:]))
    assert parsed.schedule == FIRST_MLP
    assert parsed.pace.words(lambda amount, site: f"{amount} {site}") == (
        "2 steps of 0.25 mlp, then 1 step of 0.125 mlp, 1 heads, then 1 step of 2 heads"
    )


def test_random_neurons_follow_the_schedule(run, trained, letters, digits, tmp_path):
    config = baseline_config(scheduled(letters, digits), "per_layer", seed=0, steps=2, folder=run.folder)
    assert config.schedule == ({"mlp": 0.5}, {"mlp": 0.125, "heads": 3})
    random = sepcap.prune(trained, config, out=tmp_path / "random")
    for step in (1, 2):
        for site in ("mlp", "attn_pre_out"):
            assert random.neurons(step).per_layer(site) == run.neurons(2 * step).per_layer(site)
    assert equal_steps(run, random) == (slice(0, 5, 2), slice(0, 3))
    assert run.separability("top10", baseline=[random]).seeds == 1
    uniform = sepcap.prune(trained, baseline_config(scheduled(letters, digits), "uniform", 0, 4), out=tmp_path / "uniform")
    assert uniform.trajectory["pruned_mlp"].tolist() == run.trajectory["pruned_mlp"].tolist()
    # the same total in the other order is another pace
    backwards = replace(scheduled(letters, digits), importance="random", schedule=FIRST_MLP[::-1])
    other = sepcap.prune(trained, backwards, out=tmp_path / "backwards")
    with pytest.raises(ValueError, match="whose steps prune as much"):
        run.separability("top10", baseline=[other])
    with pytest.raises(ValueError, match=r"which is schedule=.*give these"):
        sepcap.prune(trained, replace(backwards, baseline="per_layer", matched=str(run.folder)), out=tmp_path / "no")


def test_thresholds_are_drawn_where_a_step_selects(run):
    fig = run.figure("threshold")
    drawn = {site: sorted(x for trace in fig.data if trace.legendgroup == site for x in trace.x) for site in ("mlp", "heads")}
    assert drawn == {"mlp": [1, 2, 3], "heads": [3, 4]}


def test_a_schedule_by_hand():
    pace = Schedule(4, {}, FIRST_MLP)
    assert [pace.by(step) for step in (1, 2, 3)] == [{"mlp": 0.25}, {"mlp": 0.5}, {"mlp": 0.625, "heads": 1}]
    assert pace.joined(2).given == ({"mlp": 0.5}, {"mlp": 0.125, "heads": 3})
    assert pace.steps_of("heads") == [3, 4]
    assert [n for n, _ in pace.phases] == [2, 1, 1]
    constant, equal = Schedule(4, {"mlp": 0.1}), Schedule(4, {}, [{"mlp": 0.1}] * 4)
    assert constant.as_much(equal)
    assert not constant.as_much(Schedule(4, {"mlp": 0.2}))
    assert PruningConfig(schedule=[{"mlp": 0.1}] * 10).fractions == {"mlp": 1.0}


@pytest.mark.parametrize(
    ("schedule", "said"),
    [
        ([{"mlp": 0.5}, {}], r"schedule, step 2: fractions=\{\}: give at least one site"),
        ([{"mlp": 0.5}, {"mlp": 0.0}], r"schedule, step 2: fractions\['mlp'\]=0.0: a fraction lies in"),
        ([{"mlp": 0.6}, {"mlp": 0.5}], "schedule, step 2: 110% of 'mlp' would be pruned by then"),
        ([{"mlp": 0.5}, {"mlp": 5}], "schedule, step 2: 'mlp' is a share in one step and a count in another"),
        ([{"heads": 1}, {"attn_pre_out": 0.1}], "'heads' are made of 'attn_pre_out' neurons"),
        ([{"mpl": 0.5}], "schedule, step 1: .*Did you mean 'mlp'"),
    ],
)
def test_a_schedule_that_cannot_be_pruned_is_refused(schedule, said):
    with pytest.raises(ValueError, match=said):
        PruningConfig(schedule=schedule)


def test_what_follows_from_a_schedule_is_not_given_too(trained, letters, digits):
    with pytest.raises(ValueError, match=r"steps=20 with a schedule, from which steps=4 follows; leave it out"):
        PruningConfig(schedule=FIRST_MLP, steps=20)
    with pytest.raises(ValueError, match=r"fractions=.* with a schedule"):
        PruningConfig(schedule=FIRST_MLP, fractions={"mlp": 0.1})
    with pytest.raises(ValueError, match="schedule: its steps prune 9 heads, more than there are: 8 heads"):
        pruning.plan(trained, config_of(letters, digits, fractions={"mlp": 0.02}, steps=50, schedule=[{"heads": 5}, {"heads": 4}]))
    for words, said in ((["x:mlp=0.1"], "does not begin with a number of steps"), (["2:mlp"], "schedule: 'mlp' is not of the form")):
        with pytest.raises(ValueError, match=said):
            parse_schedule(words)
