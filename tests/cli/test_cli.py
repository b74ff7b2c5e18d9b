"""The command line: what it parses, what it prints, and that it costs nothing to ask for help."""

import importlib
import json
import subprocess
import sys

import plotly.graph_objects as go
import pytest

import sepcap
from sepcap.cli.main import COMMANDS, main
from sepcap.cli.options import parse_fractions, write_figures
from sepcap.cli.pruning import Prune


def test_fractions_of_the_issue():
    assert parse_fractions("mlp=0.05,attn_pre_out=0.02") == {"mlp": 0.05, "attn_pre_out": 0.02}


@pytest.mark.parametrize("text", ["mlp", "mlp=", "mlp=a", "=", "mlp=0.1,,"])
def test_fractions_of_another_form_are_refused_with_the_right_form(text):
    with pytest.raises(ValueError, match=r"site=fraction, as in mlp=0\.05"):
        parse_fractions(text)


@pytest.fixture
def two_files(tmp_path, letters, digits):
    """The two tasks as a user has them: a folder of .txt files and a .jsonl file."""
    folder = tmp_path / "letters"
    folder.mkdir()
    for i, text in enumerate(letters):
        (folder / f"{i}.txt").write_text(text)
    lines = tmp_path / "digits.jsonl"
    lines.write_text("".join(json.dumps({"text": t}) + "\n" for t in digits))
    return folder, lines


def test_prune_writes_a_run_and_prints_it(trained_folder, two_files, tmp_path, capsys):
    forget, retain = two_files
    arguments = ["prune", "--model", str(trained_folder), "--forget", str(forget), "--retain", str(retain)]
    arguments += ["--fractions", "mlp=0.25,attn_pre_out=0.25", "--steps", "2", "--importance", "abs"]
    arguments += ["--tokens", "300", "--eval-tokens", "300", "--seed", "0", "--out", str(tmp_path / "run")]
    main(arguments)
    printed = capsys.readouterr().out
    assert "forget letters, retain digits, 2 steps of 25% of mlp, 25% of attn_pre_out" in printed
    assert "Separability(top1: area=" in printed
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["fractions"] == {"mlp": 0.25, "attn_pre_out": 0.25}
    assert (tmp_path / "run" / "trajectory.parquet").exists()


def test_score_takes_importances_from_gradients(trained_folder, two_files, tmp_path, capsys):
    forget, retain = two_files
    arguments = ["score", "--model", str(trained_folder), "--forget", str(forget), "--retain", str(retain), "--tokens", "200"]
    main([*arguments, "--fractions", "mlp=0.25", "--importance", "taylor", "--contrast", "difference", "--out", str(tmp_path / "scores")])
    assert "Scores(taylor: mlp [2, 72])" in capsys.readouterr().out
    assert sepcap.Statistics.load(tmp_path / "scores" / "forget.safetensors")["mlp"].gradients.names == ("atp", "taylor", "fisher")
    assert sepcap.NeuronSet.load(tmp_path / "scores" / "neurons.safetensors").info["contrast"] == "difference"


def no_browser(*_):
    raise RuntimeError("there is no browser\nand more that is not said")


@pytest.mark.slow
def test_the_demo_compares_both_directions_with_random(trained_folder, two_files, tmp_path, capsys, monkeypatch):
    forget, retain = two_files
    monkeypatch.chdir(tmp_path)
    arguments = ["demo", "--model", str(trained_folder), "--forget", str(forget), "--retain", str(retain)]
    arguments += ["--fractions", "mlp=0.5", "--steps", "2", "--tokens", "300", "--eval-tokens", "1500", "--baseline-seeds", "2"]
    monkeypatch.setattr("sepcap.drawing.save.static", no_browser)
    main(arguments)
    printed = capsys.readouterr().out
    assert printed.count("HTML only") == 1
    assert printed.count("no SVG and PNG: there is no browser") == 1
    assert printed.splitlines()[-1].split()[0].endswith(".html")
    assert sum("step 1 of 2" in line or "step 2 of 2" in line for line in printed.splitlines()) >= 4  # no terminal: a line per step
    for name in ("forget letters", "forget digits", "random per layer, letters", "random per layer, digits", "2 seeds"):
        assert name in printed
    assert "letters prompt, before" in printed
    assert "digits prompt, after" in printed
    assert (tmp_path / "runs/demo/figures/trajectory.html").exists()
    names = ("forward", "reverse", "random-per_layer-reverse-1")
    directions = {name: json.loads((tmp_path / f"runs/demo/{name}/config.json").read_text()) for name in names}
    assert directions["forward"]["forget"] == directions["reverse"]["retain"] == "letters"
    random = directions["random-per_layer-reverse-1"]
    assert (random["importance"], random["baseline"], random["seed"]) == ("random", "per_layer", 1)
    assert random["forget"] == "digits"


@pytest.mark.slow
def test_score_and_evaluate(tiny_folders, two_files, tmp_path, capsys):
    forget, retain = map(str, two_files)
    model = ["--model", str(tiny_folders["opt"])]
    main(
        [
            "score",
            *model,
            "--forget",
            forget,
            "--retain",
            retain,
            "--fractions",
            "mlp=0.25",
            "--tokens",
            "300",
            "--replicates",
            "20",
            "--out",
            str(tmp_path / "s"),
        ]
    )
    printed = capsys.readouterr().out
    assert "mlp 36 of 144" in printed
    assert "the selection in 20 bootstrap replicates of the documents:" in printed
    assert (tmp_path / "s" / "stability.html").exists()
    main(["evaluate", *model, "--tasks", forget, retain, "--tokens", "300", "--neurons", str(tmp_path / "s" / "neurons.safetensors")])
    table = capsys.readouterr().out
    assert "skip50_top10_se" in table
    assert "perplexity" in table


def test_lists(capsys):
    main(["tasks"])
    assert "local-prose" in capsys.readouterr().out
    main(["models"])
    assert "default" in capsys.readouterr().out


def test_an_error_is_one_line_and_a_status(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["prune", "--forget", "local-cod", "--out", "never"])
    assert stopped.value.code == 2
    assert "Did you mean 'local-code'" in capsys.readouterr().err


def test_every_option_of_prune_is_a_documented_field():
    import dataclasses

    from sepcap.studies.pruning.config import PruningConfig

    assert {f.name for f in dataclasses.fields(PruningConfig)} < {f.name for f in dataclasses.fields(Prune)}
    # the defaults of a run are the same in Python and on the command line
    config = PruningConfig()
    assert all(getattr(Prune(), f.name) == getattr(config, f.name) for f in dataclasses.fields(PruningConfig))
    assert all(command.__doc__ for command in COMMANDS.values())


LIGHT = (
    "import sepcap; dir(sepcap)",
    "import sepcap.cli.main",
    "from sepcap.cli.main import main\ntry: main(['--help'])\nexcept SystemExit: pass",
)
"""What imports nothing heavy, in the order in which one process does it."""


def test_nothing_heavy_is_imported_before_it_is_needed():
    heavy = ("torch", "transformers", "transformer_lens", "datasets", "pandas", "plotly", "numpy")
    check = f"import sys; print('\\nimported', *(m for m in {heavy} if m in sys.modules))"
    code = "\n".join(f"{light}\n{check}" for light in LIGHT)
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert [line for line in out.splitlines() if line.startswith("imported")] == ["imported"] * len(LIGHT)


def test_public_names_exist():
    import sepcap

    for name in sepcap.__all__:
        assert getattr(sepcap, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'colect'"):
        sepcap.colect  # noqa: B018


def test_all_pictures_of_a_command_are_drawn_by_one_browser(tmp_path, monkeypatch, capsys):
    drawn = []

    def static(figures, suffixes):
        drawn.append(list(zip(figures, suffixes, strict=True)))
        return [f"{figure.layout.title.text} {suffix}".encode() for figure, suffix in drawn[-1]]

    def nothing():
        raise ValueError("an accuracy of 0")

    monkeypatch.setattr(importlib.import_module("sepcap.drawing.save"), "static", static)
    figures = {name: go.Figure(layout={"title": {"text": name}}) for name in ("one", "two.5")}
    write_figures({name: lambda figure=figure: figure for name, figure in figures.items()} | {"none": nothing}, tmp_path)
    assert [len(call) for call in drawn] == [4]
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.suffix != ".html"} == {
        f"{name}{suffix}": f"{name} {suffix}".encode() for name in figures for suffix in (".svg", ".png")
    }
    printed = capsys.readouterr().out
    assert "(no figure 'none': an accuracy of 0)" in printed
    assert all(str(path) in printed for path in tmp_path.iterdir())
