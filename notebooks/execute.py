"""Execute every notebook from its .py source and store the result beside it (`make notebooks`), or those that are named.

One that needs a package which is not there is left out, and the command says so: `make lines` runs it in the environment that has it.
"""

import os
import sys
from importlib.util import find_spec
from pathlib import Path

import jupytext
from nbclient import NotebookClient

HERE = Path(__file__).parent
NEEDS = {"beside-saelens": "sae_lens"}
"""Notebook -> a package that only the environment of transformer-lens 3.9 has."""

WIDGET = "application/vnd.jupyter.widget-view+json"

# a picture beside plotly's own data, for readers that run no scripts: GitHub, nbviewer, nbconvert
os.environ.setdefault("PLOTLY_RENDERER", "plotly_mimetype+png")


def execute(source: Path) -> Path:
    """Run one .py:percent source from top to bottom; an error in a cell is an error here."""
    notebook = jupytext.read(source)
    notebook.metadata.setdefault("kernelspec", {"display_name": "Python 3", "language": "python", "name": "python3"})
    NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(HERE)}}).execute()
    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:
        # times of execution and progress bars would change at every run and say nothing
        cell.metadata.pop("execution", None)
        if "outputs" in cell:
            cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr" and WIDGET not in o.get("data", {})]
    target = source.with_suffix(".ipynb")
    jupytext.write(notebook, target)
    return target


if __name__ == "__main__":
    for path in sorted(HERE.glob("*.py")):
        if path.name == Path(__file__).name or (sys.argv[1:] and path.stem not in sys.argv[1:]):
            continue
        needed = NEEDS.get(path.stem)
        if needed and find_spec(needed) is None:
            print(f"{path.stem} needs {needed}, which is not installed here: make lines")
        else:
            print(execute(path))
