"""MethodComparison compared: the table against areas computed from the runs, resumption, and the figure's numbers."""

import numpy as np
import pytest
from tiny import fresh

import sepcap
from sepcap import plots
from sepcap.statistics.intervals import bootstrap_interval
from sepcap.studies.methods.config import METHODS, PUBLISHED
from sepcap.studies.methods.study import MethodComparison, MethodComparisonConfig, compare_methods
from sepcap.studies.pruning import prune as pruning
from sepcap.studies.pruning.random_neurons.above_random import check_baselines
from sepcap.studies.pruning.separability import halves, separability

CHOSEN = ("mlp", "mlp-offset-mean", "attention-svd", "heads-median")
WAYS = ("forward", "reverse")
SHARES = {"mlp": {"mlp": 0.4}, "attention": {"attn_pre_out": 0.5}, "heads": {"heads": 0.5}}


def config_of(letters, digits, **changes):
    options = {"methods": CHOSEN, "seeds": (0, 1), "steps": 2, "tokens": 300, "eval_tokens": 900, "baseline_seeds": 3, **SHARES}
    return MethodComparisonConfig(forget=letters, retain=digits, **{**options, **changes})


@pytest.fixture(scope="module")
def compared(trained_folder, letters, digits, tmp_path_factory):
    model = fresh(trained_folder)
    before = {name: value.clone() for name, value in model.original_model.named_parameters()}
    out = tmp_path_factory.mktemp("compared") / "methods"
    result = compare_methods(model, config_of(letters, digits), out=out)
    assert all(value.equal(before[name]) for name, value in model.original_model.named_parameters())
    return result


@pytest.fixture(scope="module")
def summary(compared):
    """Its sentences; the intervals in them take a second."""
    return compared.summary()


def test_every_method_direction_and_seed_is_a_run_of_its_own(compared):
    assert len(compared.runs) == 4 * 2 * 2
    for (method, direction, seed), run in compared.runs.items():
        assert run.finished
        assert run.folder == compared.folder / method / f"{direction}-{seed}"
        assert run.config["seed"] == seed
        for field, value in METHODS[method].changes.items():
            assert run.config[field] == value
    # the same evaluation tokens everywhere, the same collected ones for a seed only
    samples = {key: run.config["samples"] for key, run in compared.runs.items()}
    assert len({frozenset(s["evaluate"].values()) for s in samples.values()}) == 1
    assert samples["mlp-offset-mean", "forward", 0]["collect"] == samples["attention-svd", "forward", 0]["collect"]
    assert samples["mlp-offset-mean", "forward", 0]["collect"] != samples["mlp-offset-mean", "forward", 1]["collect"]


def test_beside_every_method_and_direction_stand_random_neurons_matched_with_its_runs(compared):
    """Three draws for two seeds: they are matched with seeds 0, 1 and 0, and take as many of every layer, with the same offset."""
    assert len(compared.baselines) == 4 * 2 * 3
    for (method, direction, draw), random in compared.baselines.items():
        run = compared.runs[method, direction, draw % 2]
        check_baselines(run, [random])
        assert random.folder == compared.folder / method / f"random-{direction}-{draw}"
        assert (random.config["baseline"], random.config["seed"]) == ("per_layer", draw)
        assert random.config["offset"] == METHODS[method].changes.get("offset", "none")
        for site in random.neurons(2).masks:
            assert random.neurons(2).per_layer(site) == run.neurons(2).per_layer(site)
    config = compared.config
    assert (config["baseline"], config["baseline_seeds"]) == ("per_layer", 3)


def test_table_is_made_of_the_areas_of_the_runs(compared):
    table = compared.by_metric(forget_drop=10.0).set_index(["method", "direction"])
    assert len(table) == 4 * 2
    for method in CHOSEN:
        for direction in WAYS:
            row = table.loc[method, f"forget {compared.task(direction)}"]
            found, random = (
                [separability(*(run.per_cluster(role) for role in ("forget", "retain"))) for run in runs]
                for runs in (
                    [compared.runs[method, direction, seed] for seed in (0, 1)],
                    [compared.baselines[method, direction, seed] for seed in range(3)],
                )
            )
            percents, others = ([100 * (s.area - 1) for s in several] for several in (found, random))
            assert row["separability"] == pytest.approx(np.mean(percents))
            assert row["seeds_sd"] == pytest.approx(abs(percents[0] - percents[1]) / 2**0.5)  # of two values
            replicas, drawn = (100 * (np.mean([s.replicas.area for s in several], axis=0) - 1) for several in (found, random))
            assert (row["low"], row["high"]) == pytest.approx(bootstrap_interval(replicas, min(found[0].n_clusters)))
            assert row["low"] < row["high"] or row["seeds_sd"] == 0  # pruning attention can leave every single hit as it was
            assert row["max_drop"] == pytest.approx(np.mean([s.max_drop for s in found]))
            assert row["max_drop_low"] <= row["max_drop_high"]
            # random neurons are evaluated at both steps here
            assert (row["random"], row["random_seeds"]) == ("per_layer", 3)
            assert row["random_separability"] == pytest.approx(np.mean(others))
            assert row["random_seeds_sd"] == pytest.approx(np.std(others, ddof=1))
            assert row["minus_random"] == pytest.approx(np.mean(percents) - np.mean(others))
            ends = bootstrap_interval(replicas - drawn, min(found[0].n_clusters))
            assert (row["minus_random_low"], row["minus_random_high"]) == pytest.approx(ends)
            if method == "mlp-offset-mean":
                plain = table.loc[("mlp", f"forget {compared.task(direction)}"), "separability"]
                assert row["minus_plain"] == pytest.approx(row["separability"] - plain)
                assert row["minus_plain_low"] <= row["minus_plain"] <= row["minus_plain_high"]
            else:
                assert np.isnan(row["minus_plain"])  # nothing plain of its site was run, or it is that itself
            try:
                expected = np.mean([s.retain_cost(10.0) for s in found])
            except ValueError:
                expected = np.nan
            assert row["retain_cost"] == pytest.approx(expected, nan_ok=True)


def test_the_summary_says_which_random_neurons_and_what_the_selection_itself_gains(compared, summary):
    assert "Every method and direction is compared with random neurons, drawn as many per layer as each run pruned (24 runs)." in summary[0]
    for row in compared.table.query("method in ('mlp-offset-mean', 'attention-svd')").to_dict("records"):
        (one,) = [s for s in summary if s.startswith(f"To {row['direction']}, the selection of {row['method']} itself gains")]
        assert f"gains {row['minus_random']:+.1f} points ({row['minus_random_low']:+.1f} to {row['minus_random_high']:+.1f})" in one
        shared = {"mlp-offset-mean": "with the same offset; of mlp, which has neither, ", "attention-svd": "in the same basis."}
        assert f"over random neurons matched per layer {shared[row['method']]}" in one


def test_the_best_method_is_chosen_on_one_half_of_the_documents_and_measured_on_the_other(compared, summary):
    for direction in WAYS:
        (said,) = [s for s in summary if f"To forget {compared.task(direction)}, " in s and " is highest of 4 " in s]
        first, second = {}, {}
        for method in CHOSEN:
            runs = [compared.runs[method, direction, seed] for seed in (0, 1)]
            for half, values in enumerate((first, second)):
                rng = np.random.default_rng(0)
                parts = [halves(runs[0].per_cluster(role).shape[1], rng)[half] for role in ("forget", "retain")]
                areas = [
                    separability(*(run.per_cluster(role)[:, part] for role, part in zip(("forget", "retain"), parts, strict=True))).area
                    for run in runs
                ]
                values[method] = 100 * (np.mean(areas) - 1)
        best = max(first, key=lambda name: first[name])
        assert f"{best} is highest of 4 on one half of the documents; on the other half it has {second[best]:.1f}% (95%" in said


def test_differences_are_paired_on_the_same_texts(compared):
    """A method minus itself has no interval: the same documents are drawn for both."""
    one, again = (compared.separabilities("mlp", "forward")[0] for _ in range(2))
    np.testing.assert_array_equal(one.replicas.area, again.replicas.area)
    assert one.replicas.area.std() > 0
    assert one.minus(again) == (0, (0, 0))


@pytest.mark.slow
def test_a_finished_comparison_is_opened_and_an_interrupted_one_goes_on(compared, trained, letters, digits, monkeypatch):
    expected = compared.table
    assert MethodComparison.load(compared.folder).table.equals(expected)
    (compared.runs["heads-median", "reverse", 1].step_folder(2) / "record.json").unlink()
    steps = []
    step = pruning._step

    def counted(prepared, run, number):
        steps.append((run.folder.parent.name, run.folder.name, number))
        return step(prepared, run, number)

    monkeypatch.setattr(pruning, "_step", counted)
    said = []
    again = compare_methods(trained, config_of(letters, digits), out=compared.folder, progress=said.append)
    assert steps == [("heads-median", "reverse-1", 2)]
    assert again.table.equals(expected)
    assert "16 runs" in said[0]
    assert "1 of them to do, and 24 of random neurons (per_layer, 3 seeds, 2 steps), 0 to do" in said[0]
    with pytest.raises(FileExistsError, match="another configuration"):
        compare_methods(trained, config_of(letters, digits, tokens=200), out=compared.folder)


@pytest.mark.thorough
def test_what_a_model_does_not_allow_is_left_out_unless_asked_for(tiny_folders, letters, digits, tmp_path, monkeypatch):
    from sepcap.studies.methods import study as methods

    model = fresh(tiny_folders["llama"])
    wanted = {name: METHODS[name] for name in ("mlp", "mlp-offset-mean")}
    monkeypatch.setattr(methods, "PUBLISHED", wanted)
    said = []
    config = config_of(letters, digits, methods=(), seeds=(0,), steps=1, tokens=100, eval_tokens=200)
    result = compare_methods(model, config, out=tmp_path / "m", progress=said.append)
    assert result.methods == ["mlp"]
    assert any("mlp-offset-mean is left out: offset: LlamaForCausalLM has no b_out" in line for line in said)
    with pytest.raises(ValueError, match="has no b_out"):
        compare_methods(model, config_of(letters, digits, methods=("mlp-offset-mean",)), out=tmp_path / "n")
    assert not (tmp_path / "n").exists()


@pytest.mark.thorough
def test_gradients_and_output_weights_are_methods_that_a_user_can_choose(trained, letters, digits, tmp_path):
    assert len(PUBLISHED) == 12
    config = config_of(letters, digits, methods=("mlp", "heads-atp", "mlp-taylor"), seeds=(0,), steps=1, baseline_seeds=1)
    result = compare_methods(trained, config, out=tmp_path / "m")
    assert result.methods == ["mlp", "mlp-taylor", "heads-atp"]
    for name, importance in (("mlp", "abs"), ("mlp-taylor", "taylor"), ("heads-atp", "atp")):
        run = result.runs[name, "forward", 0]
        assert run.config["importance"] == importance
        chosen = run.scores().top(run.config["fractions"])
        assert run.neurons(1) == sepcap.NeuronSet(chosen.masks)
    table = result.table.set_index(["method", "direction"])
    assert table.loc["mlp-taylor", "minus_plain"].notna().all()


def test_bad_configurations(letters, digits, tmp_path):
    with pytest.raises(ValueError, match=r"methods='mpl' is not known. Did you mean 'mlp'"):
        config_of(letters, digits, methods=("mpl",))
    with pytest.raises(ValueError, match=r"seeds=\(1, 1\): give a tuple of at least one, without repeats"):
        config_of(letters, digits, seeds=(1, 1))
    with pytest.raises(ValueError, match=r"fractions\['mlp'\]=0.4 in 4 steps prunes 160%"):
        config_of(letters, digits, steps=4)
    with pytest.raises(ValueError, match=r"baseline_steps=3: give a divisor of the 2 steps"):
        config_of(letters, digits, baseline_steps=3)
    with pytest.raises(FileNotFoundError, match="holds no study and no run"):
        MethodComparison.load(tmp_path)


def test_figure_shows_the_numbers_of_the_table(compared):
    table = compared.table
    figure = plots.methods(compared)
    points = [t for t in figure.data if t.mode == "markers" and t.hovertext]
    drawn = [(direction, column) for direction in WAYS for column in ("random_separability", "separability")]
    for trace, (direction, column) in zip(points, drawn, strict=True):
        rows = table[table["direction"] == f"forget {compared.task(direction)}"]
        np.testing.assert_allclose(trace.x, rows[column], rtol=1e-3, atol=1e-3)
        assert len(set(trace.y)) == len(rows)
    shown = list(figure.layout.yaxis.ticktext)
    assert shown == [METHODS[name].label for name in compared.methods]
    low, high = figure.layout.xaxis.range
    assert low < table["low"].min()
    assert high > table["high"].max()
    assert len(figure.to_json()) < 300_000
    with pytest.raises(ValueError, match="metric='loss' is not known"):
        compared.by_metric("loss")
