"""Offline tasks: the text and code that every Python installation already carries.

`local-prose` is docstrings, package descriptions and the language reference; `local-python` is
Python sources without docstrings and comments; `local-cpp` is the C++ headers that torch ships
without comments; `local-code` is both languages in equal numbers of tokens.

Every file falls into one split by a hash of its package-relative path, so that the same file is in
the same split on every machine. The embedded model was trained on `train` only.
"""

import ast
import hashlib
import importlib.util
import os
import re
import sysconfig
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from sepcap.progress import progress

Kind = Literal["prose", "python", "cpp"]
Split = Literal["train", "collect", "evaluate"]

SPLITS: dict[str, range] = {"evaluate": range(95, 100), "collect": range(90, 95), "train": range(0, 90)}
"""Percent ranges of the path hash. In this order near-duplicates are kept: a text that is in
`evaluate` is dropped from the other two, so the model never saw it and no split shares it."""

VERSION = 1
"""Raised when the cleaning below changes, so that no cache gives the old text."""

MIN_CHARS = 200
"""A file with less text than this after cleaning says nothing about a capability."""

MAX_CHARS = 60_000
"""Longer files are generated tables or bundled data far more often than something a person wrote."""


OF_EXTRAS = (
    "absl", "absl_py", "detoxify", "immutabledict", "joblib", "k_means_constrained", "lm_eval", "ortools", "PIL", "pillow",
    "scikit_learn", "scipy", "sentence_transformers", "six", "sklearn", "threadpoolctl", "zstandard",
    "boolean", "boolean_py", "cachecontrol", "cyclonedx", "cyclonedx_python_lib", "defusedxml", "ipywidgets", "jupyterlab_widgets",
    "license_expression", "msgpack", "packageurl", "packageurl_python", "peft", "pip_api", "pip_audit", "pip_licenses",
    "pip_requirements_parser", "piplicenses", "prettytable", "py_serializable", "pyparsing", "sae_lens", "serializable", "tomli", "tomli_w",
    "uv", "widgetsnbextension",
)  # fmt: skip
"""What the extras and the tools of development bring: installing one must not change a task."""


class SourceFile(NamedTuple):
    """One file of the installation: where it lies, and the name that decides its split."""

    path: str
    name: str


def bucket(name: str) -> int:
    """Percentile of a package-relative path: stable over machines, Python versions and hash seeds."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") % 100


def split_of(name: str) -> str:
    """The split ("train", "collect" or "evaluate") a package-relative path belongs to."""
    b = bucket(name)
    return next(split for split, percents in SPLITS.items() if b in percents)


def find_files(kind: Kind) -> list[SourceFile]:
    """All files of the running installation that `kind` is made from, ordered by path hash."""
    found: dict[str, SourceFile] = {}
    for prefix, root in _roots():
        for folder, subfolders, files in os.walk(root):
            relative = os.path.relpath(folder, root).replace(os.sep, "/")
            subfolders[:] = sorted(s for s in subfolders if _enter(s, relative, prefix))
            for file in files:
                if _wanted(kind, file, relative) and os.path.isfile(os.path.join(folder, file)):  # no dangling links
                    inside = file if relative == "." else f"{relative}/{file}"
                    if file == "METADATA":
                        # the version is no part of the name: an upgrade must not move a file to another split
                        inside = re.sub(r"-[^/]*?\.dist-info/", "/", inside)
                    found.setdefault(prefix + inside, SourceFile(os.path.join(folder, file), prefix + inside))
    return sorted(found.values(), key=lambda f: hashlib.sha256(f.name.encode()).digest())


def _roots() -> list[tuple[str, str]]:
    """Folders to search, each with what its names begin with.

    All folders of installed packages share one prefix: lib64 is often a link to lib, and the same file must have the
    same name, and so the same split, wherever it was found.
    """
    packages = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    torch = importlib.util.find_spec("torch")
    if torch is not None and torch.origin:  # it may lie outside, in a user's or the system's folder
        packages.append(str(Path(torch.origin).parent.parent))
    return [("stdlib:", sysconfig.get_path("stdlib")), *(("", root) for root in dict.fromkeys(packages))]


def _enter(subfolder: str, relative: str, prefix: str) -> bool:
    if subfolder in ("__pycache__", "node_modules", "lib2to3"):
        return False
    if relative == ".":
        # sepcap's own files would make the text depend on its version; site-packages is a root of its own
        own = subfolder.startswith("sepcap") or _of_an_extra(subfolder)
        return not own and not (prefix and subfolder in ("site-packages", "dist-packages"))
    return True


def _of_an_extra(name: str) -> bool:
    return name.split("-")[0].removesuffix(".py") in OF_EXTRAS


def _wanted(kind: Kind, file: str, relative: str) -> bool:
    if file.startswith("__editable__"):
        return False  # of an installation for development: no text, and another one on every machine
    if relative == "." and _of_an_extra(file):
        return False
    if kind == "cpp":
        return relative.startswith("torch/include") and file.endswith((".h", ".hpp", ".cuh"))
    if kind == "prose" and file == "METADATA":
        return relative.endswith(".dist-info")
    return file.endswith(".py")


def fingerprint(files: list[SourceFile]) -> str:
    """Hash of names and sizes: changes when a package is installed, removed or upgraded."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name}\0{os.path.getsize(file.path)}\n".encode())
    return digest.hexdigest()[:16]


def documents(kind: Kind, split: Split) -> Iterator[dict[str, str]]:
    """Cleaned documents of one split in path-hash order, near-duplicates dropped.

    Yields rows `{"text", "name"}`. Only the splits that take precedence over `split` are read
    beside it, so `evaluate` and `collect` never have to read the nine tenths that are `train`.
    """
    files = find_files(kind)
    near = NearDuplicates()
    paragraphs_seen: set[bytes] = set()
    for current in SPLITS:
        for file in progress(files, desc=f"reading {kind} ({current})", unit=" files"):
            for name, text in _read(kind, file, current):
                if kind == "prose":
                    text = _new_paragraphs(text, paragraphs_seen)
                if len(text) < MIN_CHARS or near.seen(text):
                    continue
                if current == split:
                    yield {"text": text, "name": name}
        if current == split:
            return


def _read(kind: Kind, file: SourceFile, split: str) -> Iterator[tuple[str, str]]:
    if file.name == "stdlib:pydoc_data/topics.py" and kind == "prose":
        # the language reference is one file of many chapters: each chapter is a document with a split of its own
        for topic, text in _topics(Path(file.path).read_text(encoding="utf-8")):
            if split_of(name := f"{file.name}#{topic}") == split:
                yield name, clean_prose(text)
        return
    if split_of(file.name) != split:
        return
    try:
        source = Path(file.path).read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError):
        return  # a test file of another encoding or a broken link: not text that we can use
    if kind == "cpp":
        text = strip_cpp_comments(source)
    elif kind == "python":
        text = strip_python(source)
    elif file.name.endswith("METADATA"):
        text = clean_prose(source.partition("\n\n")[2])
    else:
        text = "\n\n".join(filter(None, (clean_prose(d) for d in docstrings(source))))
    if kind != "prose" and (len(text) > MAX_CHARS or _is_table(text)):
        return
    yield file.name, text


def _topics(source: str) -> Iterator[tuple[str, str]]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                if isinstance(key, ast.Constant) and isinstance(value, ast.Constant):
                    yield str(key.value), str(value.value)


def _is_table(text: str) -> bool:
    """Character tables, unicode data and the like: more digits and punctuation than words."""
    letters = sum(map(str.isalpha, text[:4000]))
    return letters < 0.45 * len(re.sub(r"\s", "", text[:4000]) or " ")


# --- Python -------------------------------------------------------------------------------------

_STRING_OR_COMMENT = re.compile(
    r"""(\"{3}(?:\\.|[^\\])*?\"{3}|'{3}(?:\\.|[^\\])*?'{3}|"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*')|([ \t]*\#[^\n]*)""",
    re.S,
)


def _parse(source: str) -> ast.Module | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's packages are not our user's business
            return ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return None


def _statements(tree: ast.Module) -> Iterator[ast.AST]:
    """All statements. Expressions hold no docstrings, and visiting them too would take most of the time of a first reading."""
    waiting: list[ast.AST] = [tree]
    while waiting:
        yield (node := waiting.pop())
        for name in ("body", "orelse", "finalbody", "handlers", "cases"):
            waiting.extend(getattr(node, name, ()))


def _docstring_nodes(tree: ast.Module) -> Iterator[tuple[ast.AST, ast.Expr, str]]:
    for node in _statements(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.body:
            first = node.body[0]
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
                yield node, first, first.value.value


def docstrings(source: str) -> list[str]:
    """Docstrings of a Python source in reading order; none when it does not parse."""
    tree = _parse(source)
    if tree is None:
        return []
    nodes = sorted(_docstring_nodes(tree), key=lambda n: n[1].lineno)
    return [text for _, _, text in nodes]


def strip_python(source: str) -> str:
    """Python source without docstrings and comments; empty when it does not parse.

    >>> strip_python("def f():\\n    'Say it.'\\n    return 1  # one")
    'def f():\\n    return 1'
    """
    tree = _parse(source)
    if tree is None:
        return ""
    lines = source.split("\n")
    for node, expression, _ in _docstring_nodes(tree):
        start, end = expression.lineno - 1, (expression.end_lineno or expression.lineno) - 1
        if lines[start].encode()[: expression.col_offset].strip():
            continue  # something else stands on the line ("class A: 'text'"): leave it whole
        only = len(getattr(node, "body", [])) == 1 and not isinstance(node, ast.Module)
        replacement = " " * expression.col_offset + "pass" if only else None
        for i in range(start, end + 1):
            lines[i] = "\0"
        if replacement:
            lines[start] = replacement
    kept = "\n".join(line for line in lines if line != "\0")
    without = _STRING_OR_COMMENT.sub(lambda m: m.group(1) or "", kept)
    return _tidy(without)


def strip_cpp_comments(source: str) -> str:
    """C++ source without `//` and `/* */` comments (license texts and documentation are prose)."""
    pattern = r"""("(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*')|([ \t]*//[^\n]*|[ \t]*/\*.*?\*/)"""
    return _tidy(re.sub(pattern, lambda m: m.group(1) or "", source, flags=re.S))


def _tidy(code: str) -> str:
    code = "\n".join(line.rstrip() for line in code.split("\n"))
    return re.sub(r"\n{3,}", "\n\n", code).strip()


# --- prose --------------------------------------------------------------------------------------

_ROLE = re.compile(r":[a-zA-Z:+-]+:`~?([^`<]+?)(?:\s*<[^>`]*>)?`")
_LINK = re.compile(r"!?\[([^\]]*)\]\([^)]*\)|`([^`<]+?)\s*<[^>`]*>`_{1,2}")
_NOT_PROSE = re.compile(r"\s*(>>>|\.\.\.|\||\+[-=+]|<|#|\[\d*\]|\$|%)")
_FIELD = re.compile(
    r"\s*(?:[*-]?\s*`{0,2}[\w.*\[\]]+`{0,2}\s*(?:\([^)]*\))?\s*:(?=\s|$)"  # x (int): …   Returns:
    r"|\.\.\s+\w+::.*$"  # .. note::
    r"|[*-]\s+|\d+\.\s+)"  # list items
)
_HEADER = re.compile(r"\s*([-=~^*#\"'`+_.]{3,}\s*$|\*{0,2}\w+\*{0,2} : .*$|:\w[^:]*:.*$|\.\.\s|@\w+)")


def clean_prose(text: str) -> str:
    """Sentences of a docstring or description, without doctests, code blocks, tables and field names.

    A paragraph counts as prose when it has at least eight words, is made of letters by 85%,
    contains the end of a sentence, and does not stand in a literal block or a table. In lists of
    parameters (Google and numpy style) the names and types are dropped and the sentences that describe them
    stay; reST fields (`:param x: …`) are dropped whole.
    """
    lines = text.expandtabs(4).split("\n")
    indents = [len(line) - len(line.lstrip()) for line in lines[1:] if line.strip()]
    margin = min(indents, default=0)
    lines = [lines[0].lstrip(), *(line[margin:] for line in lines[1:])]
    text = re.sub(r"(?ms)^\s*(```|~~~).*?^\s*\1[^\n]*$", "\n", "\n".join(lines))
    kept: list[str] = []
    literal_indent: int | None = None
    for block in re.split(r"\n\s*\n", text):
        block_lines = [line for line in block.split("\n") if line.strip()]
        if not block_lines:
            continue
        indent = len(block_lines[0]) - len(block_lines[0].lstrip())
        if literal_indent is not None and indent > literal_indent:
            continue  # still inside the block that "::" opened
        literal_indent = indent if re.search(r"::\s*$", block_lines[-1]) else None
        if any(_NOT_PROSE.match(line) for line in block_lines) or _has_table(block_lines):
            continue
        kept.extend(filter(_is_prose, map(_plain, _paragraphs(block_lines))))
    return "\n\n".join(kept)


def _paragraphs(lines: list[str]) -> Iterator[str]:
    """Split a block where a header, a parameter or a list item begins, and drop its name."""
    current: list[str] = []
    for line in lines:
        if _HEADER.match(line):
            if set(line.strip()) <= set("-=~^*#\"'`+_."):
                current = current[:-1]  # an underline: the line above it is a title
            yield " ".join(current)
            current = []
        elif field := _FIELD.match(line):
            yield " ".join(current)
            current = [line[field.end() :]]
        else:
            current.append(line)
    yield " ".join(current)


def _plain(paragraph: str) -> str:
    paragraph = _LINK.sub(lambda m: m.group(1) or m.group(2) or "", _ROLE.sub(r"\1", paragraph))
    return re.sub(r"\s+", " ", paragraph.replace("``", "").replace("**", "").replace("::", ":")).strip()


def _has_table(lines: list[str]) -> bool:
    columns = sum(bool(re.search(r"\S\s{2,}\S", re.sub(r"([.:?!])\s{2}", r"\1 ", line.strip()))) for line in lines)
    return columns > len(lines) / 2 or any(re.search(r"={4,}\s+={2,}|-{4,}\s+-{2,}|\|.*\|", line) for line in lines)


def _is_prose(paragraph: str) -> bool:
    words = paragraph.split()
    letters = sum(c.isalpha() or c == " " for c in paragraph)
    return len(words) >= 8 and letters >= 0.85 * len(paragraph) and bool(re.search(r"[a-z)`'\"][.?!](\s|$)", paragraph))


def _new_paragraphs(text: str, seen: set[bytes]) -> str:
    """Paragraphs not met before: documentation repeats whole paragraphs between files."""
    kept = []
    for paragraph in text.split("\n\n"):
        key = hashlib.blake2b(re.sub(r"\W+", " ", paragraph.lower()).encode(), digest_size=8).digest()
        if key not in seen:
            seen.add(key)
            kept.append(paragraph)
    return "\n\n".join(kept)


# --- near-duplicates ----------------------------------------------------------------------------


class NearDuplicates:
    """Finds texts that share about four fifths of their lines with one met before.

    MinHash over the distinct stripped lines (16 permutations, 4 bands of 4); a candidate that shares
    a band counts as a duplicate when 13 of the 16 minima agree. Copies vendored under another path
    with a changed import are found; independent files that share a licence or an import are not.
    """

    PERMUTATIONS = 16
    NEEDED = 13

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self._multiply = rng.integers(1, 2**31, size=(self.PERMUTATIONS, 1), dtype=np.uint64) * 2 + 1
        self._bands: dict[bytes, list[np.ndarray]] = {}

    def seen(self, text: str) -> bool:
        """Whether a near-duplicate of `text` was asked about before; remembers `text` if not."""
        signature = self._signature(text)
        keys = [bytes([i]) + signature[4 * i : 4 * i + 4].tobytes() for i in range(4)]
        for key in keys:
            for other in self._bands.get(key, ()):
                if int((other == signature).sum()) >= self.NEEDED:
                    return True
        for key in keys:
            self._bands.setdefault(key, []).append(signature)
        return False

    def _signature(self, text: str) -> np.ndarray:
        units = {line.strip() for line in text.split("\n")} - {""}
        if len(units) < 30:
            # a few long paragraphs or a short header: lines are too coarse, so overlapping word triples
            words = text.split()
            units = {" ".join(words[i : i + 3]) for i in range(max(1, len(words) - 2))}
        hashes = np.fromiter((zlib.crc32(unit.encode()) for unit in units), np.uint64, len(units))
        return ((hashes[None, :] + 1) * self._multiply >> np.uint64(7) & np.uint64(0xFFFFFFFF)).min(axis=1)
