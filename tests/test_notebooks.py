"""Notebooks run from top to bottom, and what is stored is what their sources give."""

import sys
from pathlib import Path

import pytest

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"
SOURCES = sorted(p for p in NOTEBOOKS.glob("*.py") if p.name != "execute.py")


@pytest.mark.parametrize("source", SOURCES, ids=lambda p: p.stem)
def test_stored_notebook_has_the_cells_of_its_source_and_no_errors(source):
    import jupytext

    stored = jupytext.read(source.with_suffix(".ipynb"))
    assert [c.source for c in stored.cells] == [c.source for c in jupytext.read(source).cells]
    code = [c for c in stored.cells if c.cell_type == "code"]
    assert all(c.execution_count for c in code)
    assert not [o for c in code for o in c.outputs if o.output_type == "error"]


@pytest.mark.slow
@pytest.mark.parametrize("source", SOURCES, ids=lambda p: p.stem)
def test_notebook_runs(source, tmp_path):
    sys.path.insert(0, str(NOTEBOOKS))
    from execute import NEEDS, execute

    if source.stem in NEEDS:
        pytest.importorskip(NEEDS[source.stem], reason="`make lines` runs it")
    copy = tmp_path / source.name
    copy.write_text(source.read_text())
    assert execute(copy).exists()
