"""Bars: widgets or text where somebody looks, nothing elsewhere; they know what there is to do and move; costs are said first."""

import contextlib
import io
import re
import subprocess
import sys
from pathlib import Path

import pytest

import sepcap
from sepcap import progress as module
from sepcap.progress import progress, tell

ROOT = Path(__file__).parent.parent
KERNEL = """
import sys, types
sys.modules["ipykernel.zmqshell"] = types.ModuleType("zmqshell")
sys.modules["IPython"] = types.ModuleType("IPython")
sys.modules["IPython"].get_ipython = object
sys.modules["ipywidgets"] = None
"""
"""What tqdm takes for a notebook without ipywidgets."""


def python(code):
    """Standard error of a script that ends well; warnings of tqdm end it."""
    told = [sys.executable, "-c", code]
    done = subprocess.run(told, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_a_notebook_without_widgets_gets_text_and_no_advice():
    assert "TqdmWarning: IProgress not found" in python(KERNEL + "import tqdm.auto")
    bar = "for _ in sepcap.progress.progress('abc', delay=0, mininterval=0, leave=True): pass"
    shown = python(f"{KERNEL}\nimport sepcap; sepcap.PruningConfig\nimport tqdm.auto\n{bar}")
    assert "Warning" not in shown
    assert re.search(r"33%.*1/3 \[.*100%.*3/3 \[", shown, re.DOTALL)


def test_nothing_is_printed_where_nobody_looks():
    code = "from sepcap.progress import progress, tell\ntell('This takes a minute.')\nfor _ in progress('abc', delay=0, leave=True): pass"
    assert python(code) == ""


@pytest.mark.slow
def test_a_notebook_with_widgets_gets_a_widget(tmp_path):
    import nbformat
    from nbclient import NotebookClient

    pytest.importorskip("ipywidgets")
    cell = nbformat.v4.new_code_cell("from sepcap.progress import progress\nfor _ in progress('abc', delay=0, leave=True): pass")
    notebook = nbformat.v4.new_notebook(cells=[cell])
    NotebookClient(notebook, resources={"metadata": {"path": str(ROOT)}}).execute()
    assert [list(output.data) for output in cell.outputs] == [["text/plain", "application/vnd.jupyter.widget-view+json"]]
    assert not notebook.cells[0].outputs[0].get("name")


class Terminal(io.StringIO):
    def isatty(self):
        return True


def in_terminal(what, *args, **options):
    """What stands in a terminal afterwards; of an iterable that is gone through to its end."""
    with contextlib.redirect_stderr(Terminal()) as terminal:
        list(what(*args, **options) or ())
    return terminal.getvalue()


def test_a_terminal_gets_text_after_two_seconds():
    assert in_terminal(progress, "abc", leave=True) == ""
    shown = in_terminal(progress, "abc", desc="pieces", leave=True, delay=0, mininterval=0)
    assert re.search(r"pieces: +0%.*1/3.*2/3.*pieces: 100%.*3/3", shown, re.DOTALL)


def test_what_a_caller_shows_is_not_shown_again():
    assert in_terminal(progress, "abc", delay=0, quiet=True) == ""


def test_a_cost_is_said_to_a_terminal_and_logged(caplog):
    with caplog.at_level("INFO", logger="sepcap"):
        assert in_terminal(tell, "This takes a minute.") == "This takes a minute.\n"
    assert [record.getMessage() for record in caplog.records] == ["This takes a minute."]


def test_every_bar_of_the_package_comes_from_here():
    importing = {p.name for p in (ROOT / "sepcap").rglob("*.py") if re.search(r"^\s*(from|import) tqdm", p.read_text(), re.MULTILINE)}
    assert importing == {"progress.py"}


class Told:
    """Bars and costs in the order in which they came: ["what is said", [description, total, parts], …]."""

    def __init__(self):
        self.all = []

    def bar(self, iterable=None, *, disable, desc="", total=None, initial=0, **_):
        from tqdm import tqdm

        kept = [desc, total if iterable is None else len(iterable), [initial]]
        if not disable:
            self.all.append(kept)

        class Bar(tqdm):
            def update(self, n=1):
                kept[2].append(n)
                return super().update(n)

        return Bar(iterable, total=total, initial=initial, delay=1e9, file=io.StringIO())

    def write(self, text, **_):
        self.all.append(text)


@pytest.fixture
def told(monkeypatch):
    found = Told()
    monkeypatch.setattr(module, "watched", lambda: True)
    monkeypatch.setattr(module, "tqdm", found.bar)
    monkeypatch.setattr(module.text_bar, "write", found.write)
    return found.all


def moved_to_the_end(bar):
    _, total, parts = bar
    return sum(parts) == total and len(parts) > 2


@pytest.mark.parametrize("what", ["collect", "evaluate"])
def test_passes_over_tokens_say_how_many_and_move_batch_by_batch(what, told, tiny_opt, letters):
    getattr(sepcap, what)(tiny_opt, letters, tokens=300, batch_size=2)
    (bar,) = told
    assert bar[0].split()[0] == what
    assert bar[1] == 300
    assert moved_to_the_end(bar)


def test_a_run_says_its_cost_before_its_first_step(told, tiny_opt, letters, digits, tmp_path):
    config = sepcap.PruningConfig(forget=letters, retain=digits, fractions={"mlp": 0.5}, steps=2, tokens=100, eval_tokens=100)
    sepcap.prune(tiny_opt, config, out=tmp_path / "run")
    assert re.search(r"2 steps of 50% of.*M tokens through the model.*from the beginning", told[0])
    assert told[1] == ["prune abs", 3, [0, 1, 1, 1]]
    told.clear()
    sepcap.prune(tiny_opt, config, out=tmp_path / "run")
    assert told == [f"{tmp_path / 'run'} is finished; nothing is recomputed"]


def test_a_comparison_of_ablations_says_its_cost_and_moves(told, tiny_opt, letters):
    kinds = ("zero", "mean", "optimal")
    sepcap.compare_ablations(
        tiny_opt, task=letters, layer=0, kinds=kinds, tokens=100, reference_tokens=100, fit_tokens=60, batch_size=2
    )
    assert re.search(r"^4 sets of neurons to ablate in 3 ways on 100 tokens.*100 tokens to collect; fits on 60", told[0])
    assert {bar[0].split()[0] for bar in told[1:]} == {"collect", "fit", "ablate"}
    assert all(moved_to_the_end(bar) for bar in told[1:])


def test_a_sweep_of_ablations_says_its_cost_and_moves(told, tiny_opt, letters):
    config = sepcap.AblationSweepConfig(task=letters, steps=2, seeds=(0,), kinds=("zero", "mean"), tokens=100, reference_tokens=100)
    sepcap.sweep_ablation(tiny_opt, config)
    said = [text for text in told if isinstance(text, str)]
    assert re.search(r"2 steps in 1 random order, 2 sets in 2 ways on 100 tokens of .* M tokens through the model", said[0])
    (bar,) = [bar for bar in told if bar[0].startswith("ablate")]
    assert moved_to_the_end(bar)
