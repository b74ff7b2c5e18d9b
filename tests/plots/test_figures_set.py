"""What `make figures` writes of the demo is of one set of runs: pictures, numbers and the table of docs/reading-results.md."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from planted_runs import maker

import sepcap
from sepcap.selection.score import Scores
from sepcap.studies.pruning.random_neurons.above_random import over_seeds

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
    make_run, samples = maker(tmp_path), {"evaluate": {"forget": "f", "retain": "r"}}
    counted = {"n_documents": {"evaluate": {"forget": 40, "retain": 41}}}
    forward = make_run([0.6, 0.3, 0.1], [0.5, 0.5, 0.4], samples=samples, **counted)
    back = {"samples": {"evaluate": {"forget": "r", "retain": "f"}}, **counted}
    reverse = make_run([0.5, 0.2, 0.1], [0.6, 0.5, 0.4], tasks=("prose", "code"), **back)
    random = [
        make_run([0.6, 0.3, 0.1], [0.5, kept, 0.1], importance="random", baseline="uniform", seed=seed, samples=samples)
        for seed, kept in enumerate((0.25, 0.3))
    ]
    monkeypatch.setattr(sepcap.Run, "scores", lambda self: Scores({"mlp": torch.rand(3, 20)}, {"importance": "abs"}))
    comparison = sepcap.DirectionComparison(tmp_path, forward, reverse, {"uniform": {"forward": random, "reverse": random}})
    monkeypatch.setattr(sepcap, "compare_directions", lambda *_, **__: comparison)
    figures = {}
    monkeypatch.setattr(make.plots, "save", lambda fig, path, width: figures.setdefault(path.name, fig))
    (tmp_path / "page.md").write_text("before\n\n| run | area [95%] | old |\n|---|---|---|\n| forget code | 9 | 9 |\n\nafter\n")
    config = make.FigureConfig(out=tmp_path, page=tmp_path / "page.md")
    make.pruning(None, config)
    return comparison, figures, tmp_path


def test_table_numbers_and_figures_say_the_same(made):
    comparison, figures, folder = made
    s = comparison.forward.separability("top1", baseline=comparison.baselines["uniform"]["forward"])
    numbers = json.loads((folder / "numbers.json").read_text())
    assert numbers["forget code"]["area"] == s.area
    assert numbers["forget code"]["n_documents"] == {"evaluate": {"forget": 40, "retain": 41}}
    percent = "{:.1f}% [{:.1f}, {:.1f}]".format(s.percent, *s.percent_interval)
    above = "{:+.2f} [{:+.2f}, {:+.2f}]".format(s.above_random, *s.above_random_interval)
    page = (folder / "page.md").read_text()
    row = next(line for line in page.splitlines() if line.startswith("| forget code |"))
    assert row.startswith(f"| forget code | {s.area:.2f} [{s.interval[0]:.2f}, {s.interval[1]:.2f}] | {percent} |")
    assert row.endswith(f"| {above} |")
    assert page.startswith("before\n\n| run |")
    found = over_seeds(comparison.groups["random"])
    assert f"| random | {found.mean:.2f} [" in page
    assert page.endswith(f"| 2 seeds, sd {found.sd:.2f} | – |\n\nafter\n")
    assert any(percent in (trace.name or "") for trace in figures["trajectory.png"].data)
    assert any(note.text.replace("<br>", " ") == percent for note in figures["areas.png"].layout.annotations)


def test_the_page_has_the_one_table_that_is_written(make):
    page = (ROOT / "docs" / "reading-results.md").read_text(encoding="utf-8")
    numbers = json.loads((ROOT / "figures" / "numbers.json").read_text())
    written = make.with_demo_table(page, numbers)
    assert written == page, "docs/reading-results.md and numbers.json are of different runs: python figures/make.py --parts pruning"
    assert len(numbers) >= 3
    assert all(written.count(f"| {name} |") == 1 for name in numbers)
    with pytest.raises(ValueError, match="contains 0 tables"):
        make.with_demo_table("nothing", numbers)
