"""Text of one kind extracted from a source file: prose of docstrings, Python or C++ without comments."""

import ast
import re
import warnings
from collections.abc import Iterator

_GENERATED = re.compile(r"@generated|auto[- ]?generated|automatically generated|generated content|do not (edit|modify)", re.I)
_COMMENTS = re.compile(r"(?:\s*(?:#[^\n]*|//[^\n]*|/\*.*?\*/))*", re.S)


def is_generated(source: str) -> bool:
    """Whether the comments at the top of a source file state that it was generated.

    >>> is_generated("# This file was automatically generated from schema.json\\nx = 1")
    True
    """
    head = _COMMENTS.match(source)
    return head is not None and _GENERATED.search(head.group()) is not None


def is_table(text: str) -> bool:
    """Whether a text is a character table, unicode data or similar, with more digits and punctuation than words."""
    letters = sum(map(str.isalpha, text[:4000]))
    return letters < 0.45 * len(re.sub(r"\s", "", text[:4000]) or " ")


_STRING_OR_COMMENT = re.compile(
    r"""(\"{3}(?:\\.|[^\\])*?\"{3}|'{3}(?:\\.|[^\\])*?'{3}|"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*')|([ \t]*\#[^\n]*)""",
    re.S,
)


def _parse(source: str) -> ast.Module | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in third-party packages do not concern the user
            return ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return None


def _statements(tree: ast.Module) -> Iterator[ast.AST]:
    """All statements. Expressions contain no docstrings, and visiting them too would take most of the time of a first read."""
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
    """Docstrings of a Python source in reading order; empty if it does not parse."""
    tree = _parse(source)
    if tree is None:
        return []
    nodes = sorted(_docstring_nodes(tree), key=lambda n: n[1].lineno)
    return [text for _, _, text in nodes]


def strip_python(source: str) -> str:
    """Python source without docstrings and comments; empty if it does not parse.

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
            continue  # there is other code on the line ("class A: 'text'"): leave it unchanged
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

    A paragraph counts as prose if it has at least eight words, consists of at least 85% letters,
    contains the end of a sentence, and is not in a literal block or a table. In lists of
    parameters (Google and numpy style) the names and types are dropped and their descriptions
    are kept; reST fields (`:param x: …`) are dropped entirely.
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
            continue  # still in the literal block opened by "::"
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
