"""Notebooks run from top to bottom, and what is stored is what their sources give."""

import ast
import json
import re
import sys
from pathlib import Path

import pytest

import sepcap

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"
sys.path.append(str(NOTEBOOKS))
BESIDE = {path.stem for path in NOTEBOOKS.parent.glob("*/*.py") if path.parent.name != "sepcap"}
"""Modules of the repository that no installation has."""
SOURCES = sorted(p for p in NOTEBOOKS.glob("*.py") if p.name != "execute.py")


@pytest.mark.parametrize("source", SOURCES, ids=lambda p: p.stem)
def test_stored_notebook_has_the_cells_of_its_source_and_no_errors(source):
    import jupytext

    stored = jupytext.read(source.with_suffix(".ipynb"))
    assert [c.source for c in stored.cells] == [c.source for c in jupytext.read(source).cells]
    code = [c for c in stored.cells if c.cell_type == "code"]
    assert all(c.execution_count for c in code)
    assert not [o for c in code for o in c.outputs if o.output_type == "error"]


def modules_of(tree):
    """What is imported: "package" or "package.module"."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            yield node.module or ""


@pytest.mark.parametrize("source", SOURCES, ids=lambda p: p.stem)
def test_a_notebook_runs_from_a_pip_install_with_public_names(source):
    tree = ast.parse(source.read_text())
    imported = set(modules_of(tree))
    assert {name for name in imported if name.startswith("sepcap")} == {"sepcap"}
    assert not {name.split(".")[0] for name in imported} & BESIDE
    attributes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    names = {}
    for node in attributes:
        names.setdefault(ast.unparse(node.value), set()).add(node.attr)
    assert names.get("sepcap", set()) <= {*sepcap.__all__, "plots"}
    assert names.get("sepcap.plots", set()) <= set(sepcap.plots.__all__)
    assert "path" not in names.get("sys", set())
    assert not [node.attr for node in attributes if re.match(r"_[^_]", node.attr)]


@pytest.mark.parametrize("source", SOURCES, ids=lambda p: p.stem)
def test_stored_figures_are_seen_without_scripts(source):
    """GitHub, nbviewer and nbconvert show the PNG that stands beside plotly's own data."""
    cells = json.loads(source.with_suffix(".ipynb").read_text(encoding="utf-8"))["cells"]
    shown = [output.get("data", {}) for cell in cells for output in cell.get("outputs", [])]
    assert all("image/png" in data for data in shown if "application/vnd.plotly.v1+json" in data)


def test_warnings_stay_and_progress_bars_go():
    from execute import without_bars

    bars = "collect:  50%|#####     | 1/2 [00:01<00:01, 1.2tok/s]\rcollect: 100%|##########| 2/2\n"
    warning = "/tmp/ipykernel_7/1.py:3: UserWarning: task 'a' has few documents\n  sepcap.collect(model)\n"
    assert without_bars(bars) == ""
    assert without_bars(bars + warning + bars) == "UserWarning: task 'a' has few documents\n"


@pytest.mark.slow
@pytest.mark.parametrize("source", SOURCES, ids=lambda p: p.stem)
def test_notebook_runs(source, tmp_path):
    from execute import NEEDS, execute

    if source.stem in NEEDS:
        pytest.importorskip(NEEDS[source.stem], reason="`make lines` runs it")
    copy = tmp_path / source.name
    copy.write_text(source.read_text())
    assert execute(copy).exists()
