"""What the pages name exists: functions and their arguments, commands and their options, files, targets of make."""

import ast
import dataclasses
import importlib
import inspect
import re
import typing
from pathlib import Path

import pytest

import sepcap
from sepcap.cli.main import COMMANDS
from sepcap.studies.reproduce.config import studies

ROOT = Path(__file__).parent.parent
NAMED = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "figures/README.md")
PAGES = [*(ROOT / name for name in NAMED), *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
TREES = "|".join(("benchmarks", "docs", "figures", "notebooks", "sepcap", "tests", "training"))

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())


def code_in(page: Path) -> list[str]:
    """Everything that is set as code: lines of blocks without their comments, and spans in sentences."""
    text = page.read_text()
    lines = [line.partition("#")[0].strip() for _, block in BLOCK.findall(text) for line in block.replace("\\\n", "").splitlines()]
    return lines + [span.replace("\n", " ") for span in re.findall(r"`([^`]+)`", BLOCK.sub("", text))]


def found(name: str) -> object:
    """What a dotted name stands for; modules on its way are imported."""
    at: object = sepcap
    for i, part in enumerate(name.split(".")[1:], 2):
        at = getattr(at, part, None) or importlib.import_module(".".join(name.split(".")[:i]))
    return at


@pages
def test_every_public_name_exists(page):
    for name in re.findall(r"\bsepcap(?:\.[A-Za-z_]\w*)+", "\n".join(code_in(page))):
        assert found(name) is not None, name


def test_examples_give_arguments_that_their_functions_take():
    blocks = [block for page in PAGES for language, block in BLOCK.findall(page.read_text()) if language == "python"]
    calls = [node for block in blocks for node in ast.walk(ast.parse(block)) if isinstance(node, ast.Call)]
    own = [(name, call) for call in calls if re.fullmatch(r"sepcap(\.\w+)+", name := ast.unparse(call.func))]
    assert len(own) > 20
    for name, call in own:
        try:
            inspect.signature(found(name)).bind(*call.args, **{keyword.arg: None for keyword in call.keywords})
        except TypeError as error:
            raise AssertionError(f"{ast.unparse(call)}: {error}") from error


def studies_of(kind: type) -> dict[str, type]:
    """The studies that a command offers, by their words."""
    offered = typing.get_args(typing.get_type_hints(kind, include_extras=True).get("study"))
    return {one.__metadata__[0].name: one.__origin__ for one in offered if hasattr(one, "__metadata__")}


def commands_in(page: Path) -> list[tuple[list[str], str]]:
    """Words and options of every command: `sepcap a | b` is two, and so is `sepcap a b | c`."""
    commands = []
    for code in code_in(page):
        if code.startswith("sepcap ") and not code.startswith("sepcap --"):
            words, dash, options = code.removeprefix("sepcap ").partition(" --")
            first, *others = words.split(" | ")
            before = first.split()[:-1]
            commands += [(words.split(), dash + options) for words in (first, *(" ".join([*before, word]) for word in others))]
    return commands


@pages
def test_every_command_exists_with_its_options(page):
    for words, options in commands_in(page):
        kind = COMMANDS[words[0]]
        if (inner := studies_of(kind)) and words[1:]:
            kind = inner[words[1]]
        if words[0] == "reproduce":
            assert set(words[1:]) <= set(studies()), words
        for option in re.findall(r"--([a-z-]+)", options):
            assert option.replace("-", "_") in {field.name for field in dataclasses.fields(kind)}, (words, option)


@pages
def test_every_option_named_alone_belongs_to_a_command(page):
    kinds = [one for kind in COMMANDS.values() for one in studies_of(kind).values() or [kind]]
    known = {field.name.replace("_", "-") for kind in kinds for field in dataclasses.fields(kind)} | {"help", "version", "debug"}
    for code in code_in(page):
        if option := re.match(r"--([a-z][a-z-]*)", code):
            assert option[1] in known, code


@pages
def test_every_file_exists(page):
    text = page.read_text()
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
        assert "://" in target or (page.parent / target).exists(), target
    for code in code_in(page):
        for name in re.findall(rf"(?<![\w./-])(?:(?:{TREES})/[\w./-]+|[\w-]+\.(?:csv|md|py|toml|txt)\b)", code):
            assert any((folder / name).exists() for folder in (ROOT, page.parent)), name


@pages
def test_every_target_of_make_exists(page):
    targets = set(re.findall(r"^([a-z-]+)(?: [a-z]+)*:", (ROOT / "Makefile").read_text(), re.MULTILINE)) | {"browser", "network"}
    assert {target for code in code_in(page) for target in re.findall(r"^make ([a-z-]+)", code)} <= targets


@pages
def test_every_anchor_is_a_heading(page):
    for target, anchor in re.findall(r"\]\(([^)#\s]*)#([^)]+)\)", page.read_text()):
        if "://" not in target:
            headings = re.findall(r"^#+ (.+)$", (page.parent / target if target else page).read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}, anchor
