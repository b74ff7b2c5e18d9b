"""What commands share: options that are more than a word or a number, configurations in a command, pictures as files."""

import dataclasses
import errno
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from tyro.constructors import PrimitiveConstructorSpec

from sepcap.checks import check_fields

T = TypeVar("T")


def parse_fractions(text: str) -> dict[str, float]:
    """`mlp=0.05,attn_pre_out=20` as a dictionary: a decimal is a share, a whole number a count."""
    fractions = {}
    for part in text.split(","):
        site, equals, number = part.partition("=")
        try:
            share = int(number) if number.strip().isdecimal() else float(number)
        except ValueError:
            equals, share = "", 0.0
        if not equals:
            raise ValueError(f"fractions: {part!r} is not of the form site=fraction, as in mlp=0.05, or site=count, as in mlp=20")
        if site.strip() in fractions:
            raise ValueError(f"fractions: {site.strip()!r} is given twice")
        fractions[site.strip()] = share
    return fractions


Fractions = Annotated[
    dict[str, float],
    PrimitiveConstructorSpec(
        nargs=1,
        metavar="SITE=FRACTION|COUNT[,…]",
        instance_from_str=lambda args: parse_fractions(args[0]),
        is_instance=lambda value: isinstance(value, dict),
        str_from_instance=lambda value: [",".join(f"{k}={v!r}" for k, v in value.items())],
    ),
]


@dataclass(frozen=True)
class Command:
    """What every command has: fields that are checked by kind, with `~` as the home folder."""

    RESUMES: ClassVar[bool] = False
    """Whether the same command goes on in its folder where an interrupted one stopped."""

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True)
class OnDevice(Command):
    """Which model a command loads, and where to."""

    model: str = "default"
    """"default", a folder, or a hub name."""
    device: str | None = None
    """Where the model is, such as cpu, cuda, cuda:1 or mps; default is the GPU when there is one."""

    def load(self, **options: Any) -> Any:
        """The model of the command."""
        from sepcap.models.load import load_model

        return load_model(self.model, device=self.device, **options)


@dataclass(frozen=True)
class Loading(OnDevice):
    """How a command loads its model and runs it; whatever loads one has these options."""

    dtype: Literal["float32", "bfloat16", "float16", "float64"] = "float32"
    """Precision of the model."""
    batch_size: int = 16
    """Rows per forward pass; halved, with a warning, when memory runs out."""

    def load(self, **options: Any) -> Any:
        """The model of the command."""
        return super().load(dtype=self.dtype, **options)


def config_in(kind: type[T], command: Any) -> T:
    """The configuration in a command, without what only the command line knows."""
    # T is a dataclass, which no type says
    return kind(**{f.name: getattr(command, f.name) for f in dataclasses.fields(kind)})  # pyright: ignore[reportArgumentType]


def write_figures(draw: Mapping[str, Callable[[], Any]], folder: Path) -> None:
    """Write pages that open anywhere and, where a browser for the export is found, SVG and PNG; where none is, that is said once.

    Args:
        draw: name of a figure -> what draws it; a ValueError says why there is none.
        folder: gets the files.
    """
    from sepcap.plots import save
    from sepcap.storage import write_atomically

    figures: dict[str, Any] = {}
    for name, make in draw.items():
        try:
            figures[name] = make()
        except ValueError as error:  # an accuracy of 0 cannot be divided by, or a part of a study that was not asked for
            print(f"  (no figure {name!r}: {error})")
    try:
        for name, figure in figures.items():
            print(f"  {save(figure, folder / f'{name}.html')}", flush=True)
        for file, content in _pictures(figures).items():
            write_atomically(folder / file, content)
            print(f"  {folder / file}")
    except OSError as error:
        if not read_only(error, folder):
            raise


def _pictures(figures: Mapping[str, Any]) -> dict[str, bytes]:
    """SVG and PNG of all figures, drawn by one browser because its start takes seconds; nothing where there is none."""
    from sepcap.plots.save import static

    files = {f"{name}{suffix}": (figure, suffix) for name, figure in figures.items() for suffix in (".svg", ".png")}
    if not files:
        return {}
    try:
        return dict(zip(files, static(*map(list, zip(*files.values(), strict=True))), strict=True))
    except (ImportError, RuntimeError) as error:
        print(f"  (pages only, no SVG and PNG: {str(error).splitlines()[0]})")
        return {}


def write_figure(figure: Any, stem: Path) -> None:
    """One figure in the files that `write_figures` writes."""
    write_figures({stem.name: lambda: figure}, stem.parent)


def write_table(table: Any, path: Path) -> None:
    """Write a table as CSV and say where, or that its folder can only be read."""
    from sepcap.storage import write_atomically

    try:
        write_atomically(path, table.to_csv(index=False).encode())
    except OSError as error:
        if not read_only(error, path):
            raise
    else:
        print(f"  {path}")


def read_only(error: OSError, path: Path) -> bool:
    """Whether a picture or table beside a finished result is left out because its folder can only be read; then that is said."""
    if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):
        return False
    print(f"  (no {path}: its folder can only be read)")
    return True


def show(result: Any, folder: Path) -> None:
    """Say what a study found, and write its figures into its folder."""
    for sentence in result.summary():
        print(sentence)
    print(f"\n  {folder}  (sepcap report {folder} makes a page of it)")
    write_figures({kind: partial(result.figure, kind) for kind in result.FIGURES}, folder / "figures")
