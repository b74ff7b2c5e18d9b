"""Execute all notebooks, or the named ones, from their .py sources and store each result next to its source (`make notebooks`).

A notebook that needs a package that is not installed is skipped with a message: `make lines` runs it in the environment with the package.
"""

import os
import re
import sys
from importlib.util import find_spec
from pathlib import Path

import jupytext
from nbclient import NotebookClient

HERE = Path(__file__).parent
NEEDS = {"beside-saelens": "sae_lens"}
"""Notebook -> a package that is only in the environment of transformer-lens 3.9."""

WIDGET = "application/vnd.jupyter.widget-view+json"

# a PNG in addition to plotly's data, for viewers that run no scripts: GitHub, nbviewer, nbconvert
os.environ.setdefault("PLOTLY_RENDERER", "plotly_mimetype+png")


def without_bars(text: str) -> str:
    """What was written to stderr without progress bars, and warnings without the place in a file, which differs between machines.

    >>> without_bars("a:  50%|##  | 1/2\\ra: 100%|####| 2/2\\n/tmp/1.py:3: UserWarning: few documents\\n  call()\\n")
    'UserWarning: few documents\\n'
    """
    lines = re.sub(r"^\S.*?:\d+: (\w*Warning: .*\n)(?:  .*\n)?", r"\1", text, flags=re.MULTILINE).splitlines(keepends=True)
    return "".join(line for line in lines if line.strip() and "\r" not in line and not re.search(r"\d%\||/s\]", line))


def execute(source: Path) -> Path:
    """Run one .py:percent source from top to bottom and return the path of its .ipynb; an error in a cell is raised."""
    notebook = jupytext.read(source)
    notebook.metadata.setdefault("kernelspec", {"display_name": "Python 3", "language": "python", "name": "python3"})
    NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(HERE)}}).execute()
    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:
        # execution times and progress bars would change in every run
        cell.metadata.pop("execution", None)
        for output in cell.get("outputs", []):
            if output.get("name") == "stderr":
                output["text"] = without_bars(output["text"])
        if "outputs" in cell:
            cell.outputs = [o for o in cell.outputs if o.get("text") != "" and WIDGET not in o.get("data", {})]
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
