"""Examples of the pages and of the docstrings, found without running them."""

import doctest
import importlib
import re
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs").rglob("*.md"))

BLOCK = re.compile(r"(?:^<!-- (not run: [^\n]+) -->\n)?^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
"""A block of Python on a page; a comment in the line before says why it is not run."""

SKIPPED = doctest.OPTIONFLAGS_BY_NAME["SKIP"]


def page_code(page: Path) -> str:
    """The blocks of a page that are run, one after the other, as one program."""
    return "\n".join(code for reason, code in BLOCK.findall(page.read_text(encoding="utf-8")) if not reason)


def modules_with_examples() -> list[str]:
    """Modules of the package with an example in a docstring."""
    paths = sorted((ROOT / "sepcap").rglob("*.py"))
    having = [path for path in paths if re.search(r"^\s+>>> ", path.read_text(encoding="utf-8"), re.MULTILINE)]
    return [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in having]


def examples_in(module: ModuleType) -> list[doctest.DocTest]:
    """The examples of the docstrings of a module."""
    return [test for test in doctest.DocTestFinder().find(module) if test.examples]


def examples_of(name: str) -> list[doctest.DocTest]:
    """The same, by the name of the module."""
    return examples_in(importlib.import_module(name))


def skipped_code(test: doctest.DocTest) -> str:
    """The statements of an example that doctest leaves out, because they need a model."""
    return "".join(example.source for example in test.examples if example.options.get(SKIPPED))
