"""What the command line says when something is wrong or stops it: one line, a status, and never a traceback."""

import dataclasses
import os
import signal
import subprocess
import sys
import typing
from dataclasses import dataclass

import pytest

from sepcap.cli import main as cli
from sepcap.cli.main import main
from sepcap.cli.options import Command
from sepcap.cli.running import unboxed

SIGNALS = [("SIGINT", 130, "Ctrl-C"), ("SIGTERM", 143, "SIGTERM"), ("SIGHUP", 129, "SIGHUP")]


def ended_with(words, capsys):
    with pytest.raises(SystemExit) as ended:
        main(words)
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return ended.value.code, said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["prune", "--tokns", "3"], "Unrecognized options: --tokns, 3. Perhaps you meant --tokens"),
        (["prune", "--tokens", "1.5"], "--tokens: '1.5' is not a whole number"),
        (["prune", "--tokens", "0"], "tokens=0: give at least 1"),
        (["prune", "--eps", "nan"], "eps=nan: give a finite number above 0"),
        (["prune", "--fractions", "mlp"], "'mlp' is not of the form site=fraction"),
        (["score", "--batch-size", "-1"], "batch_size=-1: give at least 1"),
        (["evaluate", "--tasks", "--tokens", "100"], "tasks=(): give a tuple of at least one"),
        (["compare", "importances", "--scores", "abs", "tailor"], "scores='tailor'"),
        (["compare", "ablations", "--layer", "0", "--head", "-1"], "head=(-1,): give a tuple of whole numbers, 0 or more"),
        (["prune", "--importance", "rsm"], "invalid choice 'rsm' for argument '--importance'"),
        (["frobnicate"], "Unrecognized options: frobnicate. Available subcommands: demo"),
        (["modules", "overlaps"], "Unrecognized options: overlaps. Available subcommands: concentration"),
        ([], "Expected one of {demo"),
    ],
)
def test_wrong_words_end_in_one_line_that_names_the_option(words, said, capsys):
    status, line = ended_with(words, capsys)
    assert status == 2
    assert line.startswith("sepcap: ")
    assert line.count("\n") == 1
    assert said in line


def test_a_box_is_read_up_to_the_help_in_it():
    assert unboxed("╭─ x ─╮\n│ Error parsing --at: no │\n│ text │\n│ ──── │\n│ Argument helptext: │\n╰──╯\n") == "--at: no text"


@pytest.mark.parametrize(
    ("raised", "status", "said"),
    [
        (IndexError("layer=9: none\nsuch"), 2, "sepcap: layer=9: none such\n"),
        (OSError("full"), 2, "sepcap: full\n"),
        (RuntimeError(), 2, "sepcap: RuntimeError\n"),
        (KeyError("k"), 1, "sepcap: unexpected KeyError: 'k'. With --debug the same command shows the traceback\n"),
        (KeyboardInterrupt(), 130, "\nsepcap: Broken was stopped by Ctrl-C: nothing is kept; the same command starts over\n"),
        (KeyboardInterrupt("stopped after step 3"), 130, "\nsepcap: Broken was stopped by Ctrl-C: stopped after step 3\n"),
    ],
)
def test_errors_of_a_command_are_one_line_and_a_traceback_only_for_who_asks(raised, status, said, capsys, monkeypatch):
    @dataclass(frozen=True)
    class Broken(Command):
        """Fail."""

        def run(self):
            raise raised

    monkeypatch.setitem(cli.COMMANDS, "broken", Broken)
    assert ended_with(["broken"], capsys) == (status, said)
    with pytest.raises(SystemExit):
        main(["broken", "--debug"])
    assert "Traceback" in capsys.readouterr().err


def test_versions_are_said_without_importing_what_they_are_of():
    code = "import sys; from sepcap.cli.main import main; main(['--version'])"
    code += "; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()
    assert [line.split()[0] for line in said] == ["sepcap", "Python", "torch", "transformers", "transformer-lens", "[]"]


@pytest.mark.parametrize(("name", "status", "by"), SIGNALS)
def test_a_signal_while_it_begins_is_a_line_and_a_status(name, status, by, tmp_path):
    command = [sys.executable, "-X", "importtime", "-m", "sepcap", "prune", "--out", "run"]
    def not_ignored():  # nohup and jobs in the background hand on that these signals are ignored, which sepcap respects
        signal.signal(getattr(signal, name), signal.SIG_DFL)

    options = {"cwd": tmp_path, "stderr": subprocess.PIPE, "text": True, "env": os.environ | {"PYTHONPATH": os.getcwd()}}
    with subprocess.Popen(command, preexec_fn=not_ignored, **options) as process:
        for line in process.stderr:
            if line.rstrip().endswith("tyro._strings"):  # the signals are taken before the first import of another package
                process.send_signal(getattr(signal, name))
                break
        said = [line for line in process.stderr if not line.startswith("import time:")]
        assert process.wait(60) == status
    assert said[-1].startswith(f"sepcap: stopped by {by} before anything was done; run the same command")
    assert not any("Traceback" in line for line in said)
    assert not list(tmp_path.iterdir())


def commands_of(kind):
    """A command, or the studies that it offers."""
    study = typing.get_type_hints(kind).get("study")
    inner = [one for one in typing.get_args(study) if dataclasses.is_dataclass(one)]
    return [found for one in inner for found in commands_of(one)] or [kind]


def test_every_command_that_loads_a_model_takes_where_how_and_how_much_at_once():
    plain = {"Check", "Models", "Tasks"}
    without = {"Report": {"dtype", "batch_size", "model"}, "Jacobian": {"batch_size"}, "Jumps": {"dtype"}}  # said in docs/command-line.md
    found = {one.__name__: one for kind in cli.COMMANDS.values() for one in commands_of(kind)}
    assert len(found) == len(cli.COMMANDS) - 3 + 12
    assert plain <= set(found)
    for name in set(found) - plain:
        wanted = {"model", "device", "dtype", "batch_size"}
        assert wanted & set(found[name].__dataclass_fields__) == wanted - without.get(name, set()), name


def test_a_value_with_a_dash_is_told_the_way_that_works(capsys):
    status, line = ended_with(["evaluate", "--tasks", "-x.jsonl"], capsys)
    assert status == 2
    assert "--tasks=-x.jsonl, or a file as ./-x.jsonl" in line
    status, line = ended_with(["evaluate", "--tasks=-x.jsonl", "--tokens", "0"], capsys)
    assert "tokens=0" in line


def test_a_file_of_found_dimensions_is_read_only_where_it_is_one(tmp_path, capsys):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    for name, content in (("words", b"a,b\n1,2\n"), ("half", b"dim,location,p\n1.5,1,0.1\n"), ("empty", b""), ("bytes", b"\xff\xfe\x00")):
        (tmp_path / name).write_bytes(content)
    with open(tmp_path / "huge", "wb") as file:
        file.truncate(2**31)
    for name in ("fifo", "folder", "words", "half", "empty", "bytes", "huge"):
        status, line = ended_with(["geometry", "dimensions", "--found", str(tmp_path / name)], capsys)
        assert (status, line.count("\n")) == (2, 1)
        assert str(tmp_path / name) in line


@pytest.mark.slow
@pytest.mark.parametrize(("name", "status", "by"), SIGNALS)
def test_a_run_stopped_by_a_signal_goes_on_with_the_same_command(name, status, by, tmp_path):
    command = [
        sys.executable,
        "-m",
        "sepcap",
        "prune",
        "--steps",
        "3",
        "--fractions",
        "mlp=0.3",
        "--tokens",
        "2000",
        "--eval-tokens",
        "2000",
    ]
    command += ["--out", str(tmp_path / "run")]
    env = os.environ | {"PYTHONPATH": os.getcwd()}
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env) as process:
        for line in process.stdout:
            if "step 0" in line:
                process.send_signal(getattr(signal, name))
        assert process.wait(300) == status
        said = process.stderr.read()
    assert f"stopped by {by}" in said
    assert "the same command resumes from there" in said
    assert "Traceback" not in said
    assert not [path for path in tmp_path.rglob("*") if path.name.endswith(".part")]
    again = subprocess.run(command, capture_output=True, text=True, env=env, check=True)
    assert "Separability" in again.stdout
