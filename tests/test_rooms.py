"""The rooms of the package: every import runs down, no circle, no file that is too long, no folder that is too full."""

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

import sepcap

HOME = Path(sepcap.__file__).parent

FLOORS = (
    {"errors", "progress", "torch_defaults"},
    {"checks", "latex", "schemas", "tables"},
    {"storage"},
    {"drawing", "models", "workers"},
    {"tasks"},
    {"statistics"},
    {"selection"},
    {"compiled", "interventions"},
    {"evaluation"},
    {"learning"},
    {"studies.base"},
    {"studies.pruning"},
    {
        "studies.ablations", "studies.certificate", "studies.clusters", "studies.cross_task", "studies.dimensions", "studies.directions",
        "studies.jacobian", "studies.learned", "studies.methods", "studies.overlaps", "studies.paragraphs", "studies.selection_checks",
        "studies.similarity", "studies.single_ablations",
    },
    {"studies.importances", "studies.neuron_profiles", "studies.reproduce", "studies.unlearning"},
    {"studies.catalog"},
    {"studies.sweep"},
    {"studies.check"},
    {"plots"},
    {"cli"},
    {"__main__"},
)  # fmt: skip
"""Rooms from the lowest floor up. A room imports from floors below its own, and from itself."""

LONGEST = 400
"""Lines of a file."""

FULLEST = 12
"""Files of a folder, beside its `__init__.py`."""

FILES = {path.relative_to(HOME).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__"): path for path in HOME.rglob("*.py")}
"""Module below `sepcap.` -> its file."""


def room_of(module: str) -> str:
    parts = module.split(".")
    return ".".join(parts[:2]) if parts[0] == "studies" and len(parts) > 1 else parts[0]


def floor_of(room: str) -> int:
    return next(i for i, rooms in enumerate(FLOORS) if room in rooms)


def imported(source: str) -> Iterator[tuple[int, str]]:
    """Line and module of every import of the package, those inside of functions too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "sepcap" and node.level == 0:
            for name in node.names:
                whole = f"{node.module}.{name.name}".removeprefix("sepcap.")
                yield node.lineno, whole if whole in FILES else node.module.removeprefix("sepcap").removeprefix(".")
        elif isinstance(node, ast.Import):
            yield from ((node.lineno, name.name.removeprefix("sepcap.")) for name in node.names if name.name.startswith("sepcap."))


def wrong_arrows(module: str, source: str) -> list[str]:
    mine, found = room_of(module), []
    for line, other in imported(source):
        if not other or room_of(other) == mine:  # the package itself gives names lazily
            continue
        if floor_of(room_of(other)) >= floor_of(mine):
            found.append(f"line {line} of {module} imports {other}")
    return found


LAZY = {"__main__", "storage"}
"""Beside the command line: modules with imports inside of functions, which keep `sepcap --help` free of torch and pydantic."""


def lazily_imported(source: str) -> list[str]:
    """Modules of the package that functions import."""
    functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    return [module for function in functions for _, module in imported(ast.unparse(function))]


MODULES = sorted(set(FILES) - {"", "__init__", "studies"})


def test_every_room_has_a_floor():
    assert {room_of(module) for module in MODULES} == set().union(*FLOORS)


@pytest.mark.parametrize("module", MODULES)
def test_imports_run_down(module):
    assert wrong_arrows(module, FILES[module].read_text(encoding="utf-8")) == []


def test_an_arrow_up_or_sideways_is_found():
    """The test itself, on what it is to find: up, sideways between studies, and inside a function."""
    source = "from sepcap.cli import main\nfrom sepcap.studies.methods.study import x\ndef f():\n    import sepcap.plots.weights\n"
    assert len(wrong_arrows("studies.clusters.study", source + "from sepcap.studies.base.result import y\n")) == 3


def test_no_circle_of_imports():
    edges = {module: {other for _, other in imported(FILES[module].read_text(encoding="utf-8")) if other in FILES} for module in MODULES}
    left = dict(edges)
    while free := [module for module, others in left.items() if not others & left.keys() - {module}]:
        for module in free:
            del left[module]
    assert left == {}


@pytest.mark.parametrize("module", MODULES)
def test_no_file_is_longer_than_a_reader_can_hold(module):
    assert len(FILES[module].read_text(encoding="utf-8").splitlines()) <= LONGEST


def test_no_folder_is_fuller_than_a_reader_can_hold():
    files = Counter(path.parent.relative_to(HOME).as_posix() for path in FILES.values() if path.stem != "__init__")
    assert {folder: n for folder, n in files.items() if n > FULLEST} == {}


@pytest.mark.thorough
def test_imports_stand_at_the_top_but_where_torch_would_be_loaded_too_early():
    lazy = {module for module in MODULES if lazily_imported(FILES[module].read_text(encoding="utf-8"))}
    assert {module for module in lazy if room_of(module) != "cli"} == LAZY
