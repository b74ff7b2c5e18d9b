"""Ways in which a file of a run or a study can be damaged, and what must then be seen of it.

A campaign over many folders takes `DAMAGES`, `files_of` and `outcome` from here.
"""

import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from sepcap.errors import CorruptFile
from sepcap.studies.catalog import load_result
from sepcap.studies.pruning.on_disk.step_files import ROLES
from sepcap.studies.pruning.run import Run


def flip(path: Path, at: float = 0.6, bit: int = 0) -> None:
    """Turn one bit, in the tensors of a safetensors file, at a share of the length of any other."""
    data = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little") if path.suffix == ".safetensors" else 0
    data[start + int((len(data) - start) * at)] ^= 1 << bit
    path.write_bytes(data)


def swap(path: Path, sibling: Path) -> None:
    """Exchange two files."""
    aside = path.with_name("aside")
    os.rename(path, aside)
    os.rename(sibling, path)
    os.rename(aside, sibling)


def replaced(by: Callable[[Path], Any]) -> Callable[[Path], None]:
    """Put something else in the place of a file."""

    def replace(path: Path) -> None:
        path.unlink()
        by(path)

    return replace


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "delete": Path.unlink,
    "truncate": lambda path: os.truncate(path, path.stat().st_size * 2 // 3),
    "empty": lambda path: os.truncate(path, 0),
    "flip": flip,
    "swap": lambda path: swap(path, sibling_of(path)),
    "folder": replaced(Path.mkdir),
    "fifo": replaced(os.mkfifo),
}
"""Name -> what does it to a file."""


def files_of(folder: Path) -> list[Path]:
    """Every file of a folder, in one order."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def sibling_of(path: Path) -> Path:
    """The file that is most like another and holds something else; itself where there is none.

    A file of the same name in a folder beside, or of the same suffix in the same folder.
    """
    # beside a config.json lie other runs, or whole folders that are none of this one
    beside = [] if path.name == "config.json" else path.parent.parent.glob(f"*/{path.name}")
    near = [*beside, *path.parent.glob(f"*{path.suffix}")]
    content = path.read_bytes()
    return next((other for other in sorted(near) if other != path and other.is_file() and other.read_bytes() != content), path)


def numbers_of(result: Any) -> Iterator[Any]:
    """All that can be read of a run, or of the result of a study."""
    if isinstance(result, Run):
        yield dict(result.config)
        yield result.finished
        yield result.trajectory.drop(columns="seconds")  # a step that was made again took another time
        yield result.pruned_per_layer
        for role in ROLES:
            yield torch.from_numpy(result.rows(role))
        for step in range(result.steps_done + 1):
            yield from result.neurons(step).masks.values()
        for role in ROLES if (result.folder / "statistics").exists() else ():
            for site in result.statistics(role).values():
                yield from site.sums.values()
        return
    yield dict(result.config)
    runs = getattr(result, "runs", None) or getattr(result, "results", None)
    if isinstance(runs, dict):
        for run in runs.values():
            yield from numbers_of(run)
        return
    yield from result.tables.values()
    yield from getattr(result, "tensors", {}).values()


def same(one: list[Any], other: list[Any]) -> bool:
    """Whether all numbers are equal, bit for bit."""
    return len(one) == len(other) and all(map(_equal, one, other))


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b) or bool(((a == b) | (a.isnan() & b.isnan())).all())
    return a.equals(b) if isinstance(a, pd.DataFrame) else a == b


def outcome(folder: Path, right: list[Any], named: set[str]) -> str:
    """What reading a damaged folder comes to: "same", "error" with the name of a file, or what is wrong with it in words.

    Args:
        folder: of a run or a study.
        right: `numbers_of` it before the damage.
        named: names of files of which the error must name one.
    """
    try:
        found = list(numbers_of(load_result(folder)))
    except (CorruptFile, OSError) as error:
        return "error" if any(name in str(error) for name in named) else f"an error that names no file: {error}"
    return "same" if same(found, right) else "other numbers, and nothing said"


def damaged_copies(folder: Path, place: Path, names: Iterable[str] = tuple(DAMAGES)) -> Iterator[tuple[str, Path, Path, set[str]]]:
    """A copy of a folder for every file and damage, gone when the next is asked for: damage, copy, file, names that an error may have."""
    for file in files_of(folder):
        name = file.relative_to(folder)
        for damage in names:
            if damage == "swap" and sibling_of(file) == file:
                continue
            copy = shutil.copytree(folder, place / "copy")
            named = {name.as_posix()}
            if damage == "swap":
                named.add(sibling_of(copy / name).relative_to(copy).as_posix())
            DAMAGES[damage](copy / name)
            yield damage, copy, copy / name, named
            shutil.rmtree(copy)
