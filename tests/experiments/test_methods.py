"""Methods compared: the table against areas computed from the runs, resumption, and the figure's numbers."""

import numpy as np
import pytest

import sepcap
from sepcap import plots
from sepcap.experiments import pruning
from sepcap.experiments.methods import METHODS, Methods, MethodsConfig, compare_methods
from sepcap.experiments.methods_config import random_like
from sepcap.experiments.separability import separability
from sepcap.statistics.intervals import bootstrap_interval

CHOSEN = ("mlp", "mlp-offset-mean", "random-mlp-offset-mean", "random-mlp", "attention-svd", "heads-median")
SHARES = {"mlp": {"mlp": 0.4}, "attention": {"attn_pre_out": 0.5}, "heads": {"heads": 0.5}}


def config_of(letters, digits, **changes):
    options = {"methods": CHOSEN, "seeds": (0, 1), "steps": 2, "tokens": 300, "eval_tokens": 1500, **SHARES}
    return MethodsConfig(forget=letters, retain=digits, **{**options, **changes})


@pytest.fixture(scope="module")
def compared(trained_folder, letters, digits, tmp_path_factory):
    model = sepcap.load_model(trained_folder, device="cpu")
    before = {name: value.clone() for name, value in model.original_model.named_parameters()}
    out = tmp_path_factory.mktemp("compared") / "methods"
    result = compare_methods(model, config_of(letters, digits), out)
    assert all(value.equal(before[name]) for name, value in model.original_model.named_parameters())
    return result


def test_every_method_direction_and_seed_is_a_run_of_its_own(compared):
    assert len(compared.runs) == 5 * 2 * 2 + 2
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


def test_table_is_made_of_the_areas_of_the_runs(compared):
    table = compared.table(forget_drop=10.0).set_index(["method", "direction"])
    assert len(table) == 6 * 2
    for method in CHOSEN:
        for direction in ("forward", "reverse"):
            row = table.loc[method, f"forget {compared.task(direction)}"]
            if method == "random-mlp":  # one run for both directions, the roles exchanged
                runs = [compared.runs[method, "forward", seed] for seed in (0, 1)]
                roles = ("forget", "retain") if direction == "forward" else ("retain", "forget")
            else:
                runs = [compared.runs[method, direction, seed] for seed in (0, 1)]
                roles = ("forget", "retain")
            found = [separability(*(run.per_cluster(role) for role in roles)) for run in runs]
            percents = [100 * (s.area - 1) for s in found]
            assert row["separability"] == pytest.approx(np.mean(percents))
            assert row["seeds_sd"] == pytest.approx(abs(percents[0] - percents[1]) / 2**0.5)  # of two values
            replicas = 100 * (np.mean([s.replicas.area for s in found], axis=0) - 1)
            assert (row["low"], row["high"]) == pytest.approx(bootstrap_interval(replicas, min(found[0].n_clusters)))
            assert row["low"] < row["high"] or row["seeds_sd"] == 0  # pruning attention can leave every single hit as it was
            assert row["max_drop"] == pytest.approx(np.mean([s.max_drop for s in found]))
            assert row["max_drop_low"] <= row["max_drop_high"]
            if method == "mlp-offset-mean":
                # the control has the same offset: what is left is what the selection gains
                base = table.loc[("random-mlp-offset-mean", f"forget {compared.task(direction)}"), "separability"]
                assert row["random"] == "random-mlp-offset-mean"
                assert row["minus_random"] == pytest.approx(row["separability"] - base)
                assert row["minus_random_low"] <= row["minus_random"] <= row["minus_random_high"]
                plain = table.loc[("mlp", f"forget {compared.task(direction)}"), "separability"]
                assert row["minus_plain"] == pytest.approx(row["separability"] - plain)
                assert row["minus_plain_low"] <= row["minus_plain"] <= row["minus_plain_high"]
            else:
                assert np.isnan(row["minus_plain"])  # nothing plain of its site was run, or it is that itself
                assert np.isnan(row["minus_random"]) == (method != "mlp")
            try:
                expected = np.mean([s.retain_cost(10.0) for s in found])
            except ValueError:
                expected = np.nan
            assert row["retain_cost"] == pytest.approx(expected, nan_ok=True)


def test_beside_every_method_stand_random_neurons_with_the_same_offset_and_basis():
    for name, method in METHODS.items():
        like = METHODS[random_like(name)]
        assert like.random
        assert like.site == method.site
        for field in ("offset", "rotation"):
            assert like.changes.get(field, "none") == method.changes.get(field, "none")
        # an offset is made of the task to retain, so that its control has a direction; a basis is the model's
        assert like.directions == (("forward", "reverse") if "offset" in method.changes else ("forward",))


def test_random_neurons_with_an_offset_are_pruned_in_both_directions(compared):
    for direction in ("forward", "reverse"):
        runs = [compared.runs["random-mlp-offset-mean", direction, seed] for seed in (0, 1)]
        found = compared.separabilities("random-mlp-offset-mean", direction)
        assert [s.area for s in found] == [run.separability("top1").area for run in runs]
        for run in runs:
            assert (run.config["importance"], run.config["offset"]) == ("random", "mean")
            assert run.config["forget"] == compared.task(direction)
    for row in compared.table().query("method == 'mlp-offset-mean'").to_dict("records"):
        (said,) = [s for s in compared.summary() if s.startswith(f"To {row['direction']}, the selection of mlp-offset-mean itself gains")]
        assert f"gains {row['minus_random']:+.1f} points ({row['minus_random_low']:+.1f} to {row['minus_random_high']:+.1f})" in said
        assert "from random-mlp-offset-mean; of mlp, which has neither, " in said


def test_differences_are_paired_on_the_same_texts(compared):
    """A method minus itself has no interval: the same documents are drawn for both."""
    one, again = (compared.separabilities("mlp", "forward")[0] for _ in range(2))
    np.testing.assert_array_equal(one.replicas.area, again.replicas.area)
    assert one.replicas.area.std() > 0
    assert one.minus(again) == (0, (0, 0))


@pytest.mark.slow
def test_a_finished_comparison_is_opened_and_an_interrupted_one_goes_on(compared, trained, letters, digits, monkeypatch):
    expected = compared.table()
    assert Methods.load(compared.folder).table().equals(expected)
    (compared.runs["heads-median", "reverse", 1].step_folder(2) / "record.json").unlink()
    steps = []
    step = pruning._step

    def counted(prepared, run, number):
        steps.append((run.folder.parent.name, run.folder.name, number))
        return step(prepared, run, number)

    monkeypatch.setattr(pruning, "_step", counted)
    said = []
    again = compare_methods(trained, config_of(letters, digits), compared.folder, say=said.append)
    assert steps == [("heads-median", "reverse-1", 2)]
    assert again.table().equals(expected)
    assert "22 runs" in said[0]
    assert "1 of them to do" in said[0]
    with pytest.raises(FileExistsError, match="another configuration"):
        compare_methods(trained, config_of(letters, digits, tokens=200), compared.folder)


def test_what_a_model_does_not_allow_is_left_out_unless_asked_for(tiny_folders, letters, digits, tmp_path, monkeypatch):
    from sepcap.experiments import methods

    model = sepcap.load_model(tiny_folders["llama"], device="cpu")
    wanted = {name: METHODS[name] for name in ("mlp", "mlp-offset-mean", "random-mlp")}
    monkeypatch.setattr(methods, "METHODS", wanted)
    said = []
    config = config_of(letters, digits, methods=(), seeds=(0,), steps=1, tokens=100, eval_tokens=200)
    result = compare_methods(model, config, tmp_path / "m", say=said.append)
    assert result.methods == ["mlp", "random-mlp"]
    assert any("mlp-offset-mean is left out: offset: LlamaForCausalLM has no b_out" in line for line in said)
    with pytest.raises(ValueError, match="has no b_out"):
        compare_methods(model, config_of(letters, digits, methods=("mlp-offset-mean",)), tmp_path / "n")
    assert not (tmp_path / "n").exists()


def test_bad_configurations(letters, digits, tmp_path):
    with pytest.raises(ValueError, match=r"methods='mpl' is not known. Did you mean 'mlp'"):
        config_of(letters, digits, methods=("mpl",))
    with pytest.raises(ValueError, match=r"seeds=\(1, 1\): give a tuple of at least one, each once"):
        config_of(letters, digits, seeds=(1, 1))
    with pytest.raises(ValueError, match=r"fractions\['mlp'\]=0.4 in 4 steps takes 160%"):
        config_of(letters, digits, steps=4)
    with pytest.raises(FileNotFoundError, match="holds no study and no run"):
        Methods.load(tmp_path)


def test_figure_shows_the_numbers_of_the_table(compared):
    table = compared.table()
    figure = plots.methods(compared)
    points = [t for t in figure.data if t.mode == "markers" and t.hovertext]
    assert len(points) == 2
    for trace, direction in zip(points, ("forward", "reverse"), strict=True):
        rows = table[table["direction"] == f"forget {compared.task(direction)}"]
        np.testing.assert_allclose(trace.x, rows["separability"], rtol=1e-4)
        assert len(set(trace.y)) == len(rows)
    shown = list(figure.layout.yaxis.ticktext)
    assert shown == [METHODS[name].label for name in compared.methods]
    low, high = figure.layout.xaxis.range
    assert low < table["low"].min()
    assert high > table["high"].max()
    assert len(figure.to_json()) < 300_000
    with pytest.raises(ValueError, match="metric='loss' is not known"):
        compared.table("loss")
