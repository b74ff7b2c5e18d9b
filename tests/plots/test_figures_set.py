"""What `make figures` writes of the demo is of one set of runs: pictures, numbers and the table of the README."""

import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from planted_runs import maker

import sepcap
from sepcap.selection.score import Scores

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def make():
    spec = importlib.util.spec_from_file_location("figures_make", ROOT / "figures" / "make.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # dataclasses look their module up
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def made(make, tmp_path, monkeypatch):
    """The part of the demo, of planted runs and without a browser; with the figures as they were saved."""
    run = maker(tmp_path)
    runs = {"forget code": run([0.6, 0.3, 0.1], [0.5, 0.5, 0.4]), "random": run([0.6, 0.3, 0.1], [0.6, 0.3, 0.1], importance="random")}
    monkeypatch.setattr(sepcap.Run, "scores", lambda self: Scores({"mlp": torch.rand(3, 20)}, {"importance": "abs"}))
    table = SimpleNamespace(to_string=lambda index: "")
    comparison = SimpleNamespace(runs=runs, forward=runs["forget code"], table=lambda: table)
    monkeypatch.setattr(make, "compare", lambda *_, **__: comparison)
    figures = {}
    monkeypatch.setattr(make.plots, "save", lambda fig, path, width: figures.setdefault(path.name, fig))
    (tmp_path / "README.md").write_text("before\n\n| run | area [95%] | old |\n|---|---|---|\n| forget code | 9 | 9 |\n\nafter\n")
    config = make.FigureConfig(out=tmp_path, readme=tmp_path / "README.md")
    make.pruning(None, config)
    return runs, figures, tmp_path


def test_table_numbers_and_figures_say_the_same(made):
    runs, figures, folder = made
    s = runs["forget code"].separability("top1")
    numbers = json.loads((folder / "numbers.json").read_text())
    assert numbers["forget code"]["area"] == s.area
    percent = "{:.0f}% [{:.0f}, {:.0f}]".format(s.percent, *s.percent_interval)
    readme = (folder / "README.md").read_text()
    assert f"| forget code | {s.area:.2f} [{s.interval[0]:.2f}, {s.interval[1]:.2f}] | {percent} |" in readme
    assert readme.startswith("before\n\n| run |")
    assert readme.endswith(f"at step {runs['random'].separability('top1').max_drop_step} |\n\nafter\n")
    assert any(percent in (trace.name or "") for trace in figures["trajectory.png"].data)
    assert any(note.text == percent for note in figures["areas.png"].layout.annotations)


def test_the_readme_has_the_one_table_that_is_written(make):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    numbers = json.loads((ROOT / "figures" / "numbers.json").read_text())
    written = make.with_demo_table(readme, numbers)
    assert written == readme, "README and numbers.json are of different runs: python figures/make.py --parts pruning"
    assert len(numbers) == 3
    assert all(written.count(f"| {name} |") == 1 for name in numbers)
    with pytest.raises(ValueError, match="holds 0 tables"):
        make.with_demo_table("nothing", numbers)
