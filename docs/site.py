"""Hooks of MkDocs: pages that are made of other files of the repository, links that work in both places, formulas as MathML.

The sources are read in two places: as files of the repository and as pages of the site. They link as files; here links are changed to
pages of the site. Nothing in the built pages is loaded from elsewhere.
"""

import os
import re
from pathlib import Path, PurePosixPath

import griffe
import latex2mathml.converter
import nbformat
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from nbconvert import MarkdownExporter

ROOT = Path(__file__).parent.parent

NOTEBOOKS = {f"notebooks/{path.name}": f"notebooks/{path.stem}.md" for path in sorted((ROOT / "notebooks").glob("*.ipynb"))}
COPIED = {"CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md", "figures/README.md": "results.md"}
MADE = {page: source for source, page in {**COPIED, **NOTEBOOKS}.items()}
"""Page of the site -> file of the repository that it is made of; all others are files in docs/."""
PAGES = {**COPIED, **NOTEBOOKS, "README.md": "index.md"}
"""File of the repository -> page of the site."""

LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\[\]]*\])*)\]\(([^()\s]+)\)")
FORMULA = re.compile(r'<(span|div) class="arithmatex">(.*?)</\1>', re.DOTALL)
BARE = re.compile(r"^(>>> .+(?:\n.+)*)", re.MULTILINE)
FENCE = re.compile(r"^\s*(```|~~~)")
ITEM = re.compile(r"^(?:[-*]|\d+\.) ")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made of other files, and their pictures."""
    for source, page in COPIED.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    exporter = MarkdownExporter()
    for source, page in NOTEBOOKS.items():
        notebook = nbformat.read(ROOT / source, as_version=4)
        text, resources = exporter.from_notebook_node(notebook, {"unique_key": Path(source).stem, "output_files_dir": Path(source).stem})
        files.append(File.generated(config, page, content=re.sub(r"\n{3,}", "\n\n", text)))
        for name, picture in resources["outputs"].items():
            files.append(File.generated(config, f"notebooks/{name}", content=picture))
    for picture in sorted((ROOT / "figures").glob("*.png")):
        files.append(File.generated(config, f"figures/{picture.name}", abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links between files as links between pages; lists that begin right below a sentence, as GitHub shows them."""
    uri = page.file.src_uri
    return with_lists(relinked(markdown, MADE.get(uri, f"docs/{uri}"), uri))


def relinked(markdown: str, source: str, uri: str) -> str:
    """Replace links to files of the repository by links to pages; of a file that is no page the text is left."""
    here = PurePosixPath(source).parent

    def link(found: re.Match[str]) -> str:
        picture, text, (target, hash_, anchor) = found[1], found[2], found[3].partition("#")
        if "://" in target or not target:
            return found[0]
        path = os.path.normpath(here / target)
        inside = PAGES.get(path) or (path.removeprefix("docs/") if path.startswith("docs/") else None)
        if picture and inside is None:
            inside = path
        return f"{picture}[{text}]({os.path.relpath(inside, PurePosixPath(uri).parent)}{hash_}{anchor})" if inside else text

    return LINK.sub(link, markdown)


def with_lists(markdown: str) -> str:
    """A blank line before the first item of a list, which Python-Markdown needs and GitHub does not."""
    lines, before, fenced = [], "", False
    for line in markdown.split("\n"):
        fenced ^= bool(FENCE.match(line))
        if not fenced and ITEM.match(line) and before.strip() and not ITEM.match(before) and not before.startswith(" "):
            lines.append("")
        lines.append(line)
        before = line
    return "\n".join(lines)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Formulas, which arithmatex has marked, as MathML, which browsers show without a script."""

    def mathml(found: re.Match[str]) -> str:
        formula = found[2].strip()[2:-2].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
        return latex2mathml.converter.convert(formula, display="block" if found[1] == "div" else "inline")

    return FORMULA.sub(mathml, html)


class Docstrings(griffe.Extension):
    """Examples in docstrings as code, and the signatures with which studies are called."""

    def on_object(self, *, obj: griffe.Object, **kwargs: object) -> None:
        """Change the docstring of one object: the parser knows the heading "Examples" only."""
        if obj.docstring is not None:
            text = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
            obj.docstring.value = BARE.sub(r"```pycon\n\1\n```", text)

    def on_function(self, *, func: griffe.Function, **kwargs: object) -> None:
        """Give a function the signature that its decorator makes: `study` of studies/base/runner.py, or `drawn` of drawing/themes.py."""
        if any(str(decorator.value) == "drawn" for decorator in func.decorators):
            for name, default in (("font_size", "7.5"), ("theme", "'light'")):
                func.parameters.add(griffe.Parameter(name, kind=griffe.ParameterKind.keyword_only, default=default))
        if any(str(decorator.value).startswith("study(") for decorator in func.decorators):
            func.parameters["model"].default = func.parameters["config"].default = "None"
            del func.parameters["say"]
            func.parameters.add(griffe.Parameter("progress", annotation="Any", kind=griffe.ParameterKind.keyword_only, default="True"))
            func.parameters.add(griffe.Parameter("fields", annotation="Any", kind=griffe.ParameterKind.var_keyword))
