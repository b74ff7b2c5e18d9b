"""The documentation is complete, its errors are those of the code, its citation is whole, and its pages load nothing from elsewhere."""

import ast
import os
import re
import subprocess
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

import sepcap
from sepcap.cli.main import COMMANDS

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PYTHON = Path(os.environ.get("SEPCAP_DOCS_PYTHON", ROOT / ".venv-docs" / "bin" / "python"))
HOLE = "…"
"""Stands for what differs between errors with the same words."""


class Mkdocs(yaml.SafeLoader):
    """Reads mkdocs.yml, in which a tag names a Python function."""


Mkdocs.add_multi_constructor("tag:yaml.org,2002:python/", lambda loader, suffix, node: suffix)


def navigated(entry) -> list[str]:
    """The pages of a part of the navigation."""
    if isinstance(entry, str):
        return [entry]
    return [page for part in (entry.values() if isinstance(entry, dict) else entry) for page in navigated(part)]


def test_every_page_is_in_the_navigation_once():
    pages = navigated(yaml.load((ROOT / "mkdocs.yml").read_text(), Mkdocs)["nav"])
    assert max(Counter(pages).values()) == 1
    sources = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}
    notebooks = {f"notebooks/{path.stem}.md" for path in (ROOT / "notebooks").glob("*.ipynb")}
    assert set(pages) == sources | notebooks | {"changelog.md", "contributing.md", "results.md"}


def test_every_public_name_is_on_one_page_of_the_reference():
    shown = Counter(name for page in (DOCS / "api").glob("*.md") for name in re.findall(r"^::: sepcap\.([\w.]+)$", page.read_text(), re.M))
    plots = ast.parse((ROOT / "sepcap" / "plots" / "__init__.py").read_text()).body[-1]
    figures = {f"plots.{name}" for name in ast.literal_eval(plots.value)}
    assert shown == Counter({*(set(sepcap.__all__) - {"plots"}), *figures})


def test_every_command_is_on_the_page_of_commands():
    listed = re.findall(r"^\| `sepcap ([a-z-]+)", (DOCS / "command-line.md").read_text(), re.M)
    assert set(listed) == set(COMMANDS)


def test_every_section_of_the_methods_has_its_concept():
    sections = re.findall(r"^## (\d+)\.", (DOCS / "METHODS.md").read_text(), re.M)
    linked = re.findall(r"\]\(METHODS\.md#(\d+)-", (DOCS / "concepts.md").read_text())
    history = {"17"}  # faults of other tools
    assert len(sections) > 20
    assert set(sections) - history == set(linked) - history


# errors


def words_of(node: ast.expr) -> str:
    """The text of a string in the code, with holes where values are put in."""
    parts = node.values if isinstance(node, ast.JoinedStr) else [node]
    return "".join(part.value if isinstance(part, ast.Constant) and isinstance(part.value, str) else HOLE for part in parts)


def texts_of_the_code() -> set[str]:
    nodes = (node for path in (ROOT / "sepcap").rglob("*.py") for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    return {re.sub(f"{HOLE}+", HOLE, words_of(node)) for node in nodes if isinstance(node, ast.JoinedStr | ast.Constant)}


def test_every_error_of_the_faq_begins_as_one_of_the_code():
    listed = re.findall(r"^### `(.+)`$", (DOCS / "faq.md").read_text(), re.M)
    texts = texts_of_the_code()
    assert len(listed) > 20
    missing = [error for error in listed if not any(text.startswith(error) for text in texts)]
    assert not missing


# citation


def test_the_citation_has_the_fields_of_its_format_and_this_version():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["cff-version"] == "1.2.0"
    assert {"message", "title", "authors"} <= set(cited)  # the required ones
    assert cited["authors"] == [{"name": "The sepcap developers"}]
    assert cited["version"] == sepcap.__version__
    assert cited["type"] == "software"
    assert "doi" not in cited
    for reference in cited["references"]:
        assert {"type", "title", "authors"} <= set(reference)


def test_the_changelog_has_this_version():
    assert f"## {sepcap.__version__}" in (ROOT / "CHANGELOG.md").read_text()


# the built pages


class Loads(HTMLParser):
    """Collects what a page loads by itself; links that a reader follows are not loaded."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.styles = ""
        self._style = False

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self._style = tag == "style"
        self.styles += given.get("style") or ""
        if tag == "link" and given.get("rel") not in ("canonical", "prev", "next", "alternate"):
            self.found.append(given.get("href") or "")
        if tag != "link":
            self.found += [given[name] or "" for name in ("src", "srcset", "data", "poster") if name in given]

    def handle_data(self, data):
        if self._style:
            self.styles += data


def loaded_from_elsewhere(html: str) -> list[str]:
    reader = Loads()
    reader.feed(html)
    urls = reader.found + re.findall(r"url\(['\"]?([^)'\"]+)", reader.styles) + re.findall(r"@import\s+['\"]([^'\"]+)", reader.styles)
    return [url for url in urls if re.match(r"\s*(?:[a-z]+:)?//", url)]


def test_what_a_page_loads_is_told_from_what_it_links_to():
    own = '<a href="https://a.b">x</a><img src="x.png"><link rel="icon" href="../x.png"><img src="data:image/png;,">'
    assert not loaded_from_elsewhere(own)
    for page in (
        '<script src="https://a.b/x.js"></script>',
        '<img src="//a.b/x.png">',
        '<link rel="stylesheet" href="https://a.b/x.css">',
        "<style>@font-face {src: url(https://a.b/x.woff)}</style>",
        "<style>@import 'https://a.b/x.css'</style>",
        '<p style="background: url(http://a.b/x.png)">x</p>',
    ):
        assert len(loaded_from_elsewhere(page)) == 1, page


@pytest.mark.slow
def test_the_pages_build_strictly_and_load_nothing_from_elsewhere(tmp_path):
    env = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(
        [PYTHON, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert built.returncode == 0, built.stderr
    pages = list(tmp_path.rglob("*.html"))
    assert len(pages) > 40
    for page in pages:
        html = page.read_text(encoding="utf-8")
        assert not loaded_from_elsewhere(html), page
        assert 'class="arithmatex"' not in html, page
    for sheet in tmp_path.rglob("*.css"):
        assert not re.findall(r"(?:url\(|@import )['\"]?(?:https?:)?//", sheet.read_text(encoding="utf-8")), sheet
    assert "<math" in (tmp_path / "concepts.html").read_text(encoding="utf-8")
    assert (tmp_path / "notebooks" / "quickstart.html").read_text(encoding="utf-8").count("<img") >= 2
