"""The commands of studies, on a tiny model: what they print is what the study found, and their folder opens again."""

import dataclasses
import inspect

import pandas as pd
import pytest
import tyro

import sepcap
from sepcap.cli.geometry import Dimensions, FindDimensions, Jacobian, Similarity
from sepcap.cli.main import main
from sepcap.cli.options import config_in
from sepcap.cli.studies import Reproduce


@pytest.fixture
def files(task_files):
    return list(task_files.values())


SMALL = ["--tokens", "300", "--context", "16"]


@pytest.mark.thorough
@pytest.mark.parametrize(
    "command",
    [
        ["modules", "concentration", "--k", "6", "--seeds", "0", "1", "--draws", "20", "--fractions", "0.1", *SMALL],
        ["modules", "overlap", "--fractions", "0.1", "0.2", "--sites", "mlp", *SMALL],
        ["modules", "cross-task", "--eval-tokens", "200", "--seeds", "0", *SMALL],
        ["geometry", "similarity", "--what", "resid_post", "--per-category", "3", "--context", "16"],
        ["geometry", "dimensions", "--dims", "3", "5", "--per-category", "3", "--context", "16"],
        ["geometry", "jacobian", "--part", "mlp", "--tokens", "2", "--rows", "2", "--layers", "1"],
    ],
    ids=lambda command: "-".join(command[:2]),
)
def test_a_study_says_what_it_found_and_opens_again(command, files, trained_folder, tmp_path, capsys):
    out = tmp_path / "study"
    tasks = {"concentration": ["--tasks", files[0], "--retain", files[1]], "overlap": ["--tasks", *files, "--retain", "others"]}
    data = ["--task", files[0]] if command[1] == "jacobian" else tasks.get(command[1], ["--tasks", *files])
    main([*command, *data, "--model", str(trained_folder), "--out", str(out)])
    printed = capsys.readouterr().out
    found = sepcap.load_result(out)
    assert all(sentence in printed for sentence in found.summary())
    assert f"sepcap report {out}" in printed
    if command[0] == "modules":  # what it costs comes before what was found
        assert -1 < printed.find("M tokens through") < printed.find(found.summary()[0])


@pytest.mark.thorough
def test_checks_from_the_other_side(files, trained_folder, tmp_path, capsys):
    options = ["--checks", "keep-only", "meeting", "--fractions", "0.2", "0.6", "1.0", "--eval-tokens", "200", "--seeds", "0", *SMALL]
    pair = ["--forget", files[0], "--retain", files[1]]
    main(["modules", "selection", *pair, *options, "--model", str(trained_folder), "--out", str(tmp_path / "checks")])
    printed = capsys.readouterr().out
    assert all(sentence in printed for sentence in sepcap.load_result(tmp_path / "checks").summary())
    assert "no figure 'layers'" in printed
    assert -1 < printed.find("M tokens through the model") < printed.find("When only the")


TINY = ["--per-category", "3", "--context", "16", "--positions", "7", "15", "--batch-size", "4"]


def test_the_control_is_printed_paired_and_drawn(files, trained_folder, tmp_path, capsys, monkeypatch):
    drawn = {}
    monkeypatch.setattr("sepcap.cli.geometry.write_figure", lambda figure, stem: drawn.update({stem.name: figure}))
    main(["geometry", "similarity", "--control", *TINY, "--tasks", *files, "--model", str(trained_folder), "--out", str(tmp_path / "s")])
    found, other = (sepcap.load_result(folder) for folder in (tmp_path / "s", tmp_path / "s" / "random-weights"))
    assert found.config["positions"] == other.config["positions"] == [7, 15]
    assert found.config["model_fingerprint"] != other.config["model_fingerprint"]
    assert found.config["study"] == "activation-similarity"
    assert found.compared(other).to_string(index=False, float_format=lambda x: f"{x:.4f}") in capsys.readouterr().out
    assert {"this model", "random weights"} <= {trace.name for trace in drawn["profile-control"].data}
    with pytest.raises(SystemExit):
        main(["geometry", "similarity", "--control", "--random-weights"])
    assert "give one of them" in capsys.readouterr().err


@pytest.mark.thorough
def test_dimensions_that_were_found_are_printed_and_followed_elsewhere(files, trained_folder, tmp_path, capsys):
    """The folder names the half that was searched: of the same texts the other half is shown, of others all."""
    common = ["--per-category", "6", *TINY[2:], "--tasks", *files, "--model", str(trained_folder)]
    folder = tmp_path / "new" / "found"
    main(["geometry", "find-dimensions", "--n", "3", "--locations", "1", "2", *common, "--out", str(folder)])
    table = sepcap.load_result(folder).table
    printed = capsys.readouterr().out
    assert len(table) == 3
    assert all(str(dim) in printed for dim in table["dim"])
    assert "η² and p are of the other half" in printed
    texts = {}
    for name, skip in (("same", "0"), ("others", "6")):
        main(["geometry", "dimensions", "--found", str(folder), "--skip", skip, *common, "--out", str(tmp_path / name)])
        found = sepcap.load_result(tmp_path / name)
        assert found.config["dims"] == table["dim"].tolist()
        texts[name] = (found.config["searched"], len(found.tables["texts"]))
    n = 6 * len(files)
    assert texts == {"same": (n // 2, n // 2), "others": (None, n)}
    main(["geometry", "dimensions", "--n", "2", *common, "--out", str(tmp_path / "searched")])
    assert sepcap.load_result(tmp_path / "searched").config["searched"] == n // 2
    assert "The search for the 2 dimensions used" in capsys.readouterr().out
    for wrong, says in (
        (["find-dimensions", "--n", "2", *common, "--out", str(folder)], "n: 3 stored, 2 requested"),
        (["dimensions", "--found", str(folder), "--dims", "3"], "give one of them"),
        (["dimensions", "--found", str(tmp_path / "no"), *common], "holds no study and no run"),
    ):
        with pytest.raises(SystemExit):
            main(["geometry", *wrong])
        assert says in " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_defaults_are_those_of_the_functions():
    for command in (Similarity, Dimensions, FindDimensions, Jacobian):
        taken = inspect.signature(getattr(sepcap, command.FUNCTION)).parameters
        for field in dataclasses.fields(command.CONFIG):
            assert field.name == "model" or getattr(command(), field.name) == taken[field.name].default, (command, field.name)


def test_a_head_needs_no_layer_but_a_layer_needs_a_head(capsys):
    with pytest.raises(SystemExit):
        main(["geometry", "similarity", "--layer", "2"])
    assert "give head too" in capsys.readouterr().err


def test_two_tasks_of_one_name_are_refused(capsys):
    with pytest.raises(SystemExit):
        main(["geometry", "dimensions", "--tasks", "a/x.txt", "b/x.txt"])
    assert "two have the same name" in capsys.readouterr().err


def test_ablations_of_a_head_are_kept_and_never_written_over(files, trained_folder, tmp_path, capsys):
    options = ["--task", files[0], "--layer", "1", "--head", "2", "--kinds", "zero", "mean", "--tokens", "200"]
    command = ["compare", "ablations", *options, "--model", str(trained_folder), "--out", str(tmp_path / "head")]
    main(command)
    printed = capsys.readouterr().out
    found = sepcap.load_result(tmp_path / "head")
    assert -1 < printed.find("1 set of neurons to ablate in 2 ways") < printed.find(found.summary()[0])
    assert all(sentence in printed for sentence in found.summary())
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "head" / "table.csv"), found.table, check_dtype=False)
    main(command)
    assert "is finished; nothing is recomputed" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main([*command, "--controls", "2"])
    assert "holds another configuration (controls: 0 stored, 2 requested" in capsys.readouterr().err


def test_a_sweep_says_what_it_costs_and_found(files, trained_folder, tmp_path, capsys):
    options = ["--steps", "2", "--seeds", "0", "--kinds", "zero", "mean", "--tokens", "200", "--reference-tokens", "300"]
    main(["ablate", "--task", files[0], *options, "--model", str(trained_folder), "--out", str(tmp_path / "sweep")])
    printed = capsys.readouterr().out
    found = sepcap.load_result(tmp_path / "sweep")
    assert -1 < printed.find("M tokens through the model") < printed.find(found.summary()[0])
    assert all(sentence in printed for sentence in found.summary())
    assert (tmp_path / "sweep" / "figures" / "sweep.html").exists()


def test_neurons_alone_by_command(files, trained_folder, tmp_path, capsys):
    options = ["--sample", "4", "--layers", "1", "--pairs", "2", "--tokens", "200", "--reference-tokens", "100"]
    tasks = ["--forget", files[0], "--retain", files[1]]
    command = ["ablate-each", *tasks, *options, "--model", str(trained_folder), "--out", str(tmp_path / "each")]
    main(command)
    printed = capsys.readouterr().out
    found = sepcap.load_result(tmp_path / "each")
    assert -1 < printed.find("4 mlp neurons ablated alone (zero), each on 200 predictions") < printed.find(found.summary()[0])
    assert len(found.tables["pairs"]) == 1
    assert {path.stem for path in (tmp_path / "each" / "figures").glob("*.html")} == set(found.FIGURES)
    with pytest.raises(SystemExit):
        main([*command, "--heads", "1"])
    assert "site='mlp' has no heads" in capsys.readouterr().err


def test_a_run_is_examined_on_its_own_model(files, trained_folder, tmp_path, capsys):
    pair = ["--forget", files[0], "--retain", files[1]]
    small = ["--fractions", "mlp=0.1", "--steps", "1", "--eval-tokens", "200", *SMALL]
    main(["prune", *pair, *small, "--model", str(trained_folder), "--dtype", "bfloat16", "--out", str(tmp_path / "run")])
    examine = ["examine", "--run-folder", str(tmp_path / "run"), "--tasks", *files, "--n", "2", *SMALL]
    main([*examine, "--out", str(tmp_path / "found")])
    found, run = sepcap.load_result(tmp_path / "found"), sepcap.Run.load(tmp_path / "run")
    assert found.config["model_fingerprint"] == run.config["model_fingerprint"]
    assert len(found.table) == 2
    capsys.readouterr()
    for more, said in ((["--step", "0"], "step=0"), (["--dtype", "float16"], "other weights")):
        with pytest.raises(SystemExit):
            main([*examine, *more, "--out", str(tmp_path / "refused")])
        assert said in capsys.readouterr().err


def test_the_command_of_a_reproduction_is_its_configuration():
    asked = config_in(sepcap.ReproductionConfig, tyro.cli(Reproduce, args=["sp-table2", "--budget", "paper", "--batch-size", "4"]))
    assert asked == sepcap.ReproductionConfig("sp-table2", budget="paper", batch_size=4)
    assert {run.batch_size for run in asked.runs().values()} == {4}
