"""Shared parts of commands: options beyond single words and numbers, configurations in a command, figures as files."""

import dataclasses
import errno
import inspect
from collections.abc import Callable, Mapping, Sequence
from copy import copy
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


def parse_schedule(words: Sequence[str]) -> tuple[dict[str, float], ...]:
    """`10:mlp=0.05 10:mlp=0.05,heads=1` as the fractions of each of 20 steps; a word without a number of steps is one step."""
    steps: list[dict[str, float]] = []
    for word in words:
        number, colon, amounts = word.partition(":")
        if colon and not (number.isdecimal() and int(number) > 0):
            raise ValueError(f"schedule: {word!r} does not begin with a number of steps, as in 10:mlp=0.05")
        try:
            fractions = parse_fractions(amounts if colon else word)
        except ValueError as error:
            raise ValueError(str(error).replace("fractions", "schedule", 1)) from None
        steps += [dict(fractions) for _ in range(int(number) if colon else 1)]
    return tuple(steps)


ScheduleWords = Annotated[
    tuple[dict[str, float], ...],
    PrimitiveConstructorSpec(
        nargs="*",
        metavar="[STEPS:]SITE=FRACTION|COUNT[,…]",
        instance_from_str=parse_schedule,
        is_instance=lambda value: isinstance(value, tuple),
        str_from_instance=lambda value: [",".join(f"{k}={v!r}" for k, v in step.items()) for step in value],
    ),
]


@dataclass(frozen=True)
class Command:
    """Base of every command: its fields are checked by type, and `~` is the home folder."""

    RESUMES: ClassVar[bool] = False
    """Whether repeating the command resumes an interrupted one in its folder."""

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True)
class OnDevice(Command):
    """Which model a command loads, on which device and in which precision."""

    model: str = "default"
    """"default", a folder, or a hub name."""
    device: str | None = None
    """Device of the model, such as cpu, cuda, cuda:1 or mps; default is the GPU if there is one."""
    dtype: Literal["float32", "bfloat16", "float16", "float64"] = "float32"
    """Precision of the model."""

    def load(self, **options: Any) -> Any:
        """Load the model of the command."""
        from sepcap.models.loading.load import load_model

        return load_model(self.model, device=self.device, dtype=self.dtype, **options)


@dataclass(frozen=True)
class Loading(OnDevice):
    """How a command without a configuration loads and runs its model."""

    batch_size: int = 16
    """Rows per forward pass; halved, with a warning, if memory runs out."""


@dataclass(frozen=True)
class Study(OnDevice):
    """A command that runs a study in a folder; see `study_command`."""

    RESUMES = True
    FUNCTION: ClassVar[str]
    """Name of the study in `sepcap`."""
    CONFIG: ClassVar[type]
    """Class of its configuration."""

    out: Path = Path()
    """Folder of the study; repeat the command to resume after an interruption."""

    def compute(self, model: Any = None, **more: Any) -> Any:
        """Result of the study of a model, or of the one of the command; `more` are arguments that are no fields of its configuration."""
        import sepcap

        how = {"out": self.out, "progress": partial(print, flush=True), **more}
        how["config"] = config_in(self.CONFIG, self)
        return getattr(sepcap, self.FUNCTION)(self.load() if model is None else model, **how)

    def run(self) -> None:
        """Carry out the command."""
        result = self.compute()
        show(result, result.folder)


@dataclass(frozen=True)
class Untrained(Study):
    """A study that can be repeated on a model with random weights, as a control."""

    random_weights: bool = False
    """The control: weights as initialised before training, with the seed of the study."""
    seed: int = 0
    """Seed of the random weights, and of the study."""

    def load(self, **options: Any) -> Any:
        """Load the model of the command, trained or with random weights."""
        return super().load(**{"random_weights": self.random_weights, "seed": self.seed, **options})


@dataclass(frozen=True)
class Group:
    """A command that offers several studies; a subclass names them in its field `study`."""

    study: Any

    def run(self) -> None:
        """Carry out the command."""
        self.study.run()


S = TypeVar("S", bound=Study)

ON_COMMAND_LINE: dict[Any, Any] = {
    Any: str,
    tuple[Any, ...]: tuple[str, ...],
    dict[str, float]: Fractions,
    tuple[dict[str, float], ...] | list[dict[str, float]]: ScheduleWords,
}
"""Kinds of fields that Python fills with objects -> what is typed instead; a task is a name or a path."""


def study_command(function: str, out: str, defaults: Mapping[str, Any] | None = None, **kinds: Any) -> Callable[[type[S]], type[S]]:
    """Make a command of a class that inherits from a configuration and from `Study`.

    The fields of the configuration become options, with its defaults and docstrings; the command loads the model, calls the function
    and shows its result.

    Args:
        function: name of the study in `sepcap`.
        out: default folder of the result.
        defaults: defaults that differ from those of the configuration, by field.
        kinds: kinds of the options that differ from those of the configuration, by field.
    """

    def decorate(cls: type[S]) -> type[S]:
        config: Any = cls.__mro__[1]
        options: dict[str, Any] = {}
        own = dict(defaults or {})
        for field in dataclasses.fields(config):
            kind = kinds.get(field.name, ON_COMMAND_LINE.get(field.type, field.type))
            if field.init and (kind is not field.type or field.name in own):
                options[field.name] = kind
                default: Any = {"default": field.default, "default_factory": field.default_factory}
                if field.name in own:
                    default = {"default_factory": partial(copy, own[field.name])}
                setattr(cls, field.name, dataclasses.field(**default))
        cls.__annotations__ = {**options, "out": Path, **inspect.get_annotations(cls)}

        cls.out, cls.FUNCTION, cls.CONFIG = Path(out), function, config
        return dataclass(frozen=True, kw_only=True)(cls)

    return decorate


def config_in(kind: type[T], command: Any) -> T:
    """The configuration in a command, without the options of the command line alone."""
    known = dataclasses.fields(kind)  # pyright: ignore[reportArgumentType] (T is a dataclass, which no type expresses)
    return kind(**{f.name: getattr(command, f.name) for f in known if f.init})


def write_figures(draw: Mapping[str, Callable[[], Any]], folder: Path) -> None:
    """Write standalone HTML pages and, if a browser for the export is found, SVG and PNG; if not, this is reported once.

    Args:
        draw: name of a figure -> function that draws it; its ValueError states why there is none.
        folder: for the files.
    """
    from sepcap.drawing.save import save
    from sepcap.storage import write_atomically

    figures: dict[str, Any] = {}
    for name, make in draw.items():
        try:
            figures[name] = make()
        except ValueError as error:  # division by an accuracy of 0, or a part of a study that was not asked for
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
    """SVG and PNG of all figures, drawn by one browser because starting it takes seconds; empty if there is none."""
    from sepcap.drawing.save import static

    files = {f"{name}{suffix}": (figure, suffix) for name, figure in figures.items() for suffix in (".svg", ".png")}
    if not files:
        return {}
    try:
        return dict(zip(files, static(*map(list, zip(*files.values(), strict=True))), strict=True))
    except (ImportError, RuntimeError) as error:
        print(f"  (HTML only, no SVG and PNG: {str(error).splitlines()[0]})")
        return {}


def write_figure(figure: Any, stem: Path) -> None:
    """Write one figure as `write_figures` does."""
    write_figures({stem.name: lambda: figure}, stem.parent)


def write_table(table: Any, path: Path) -> None:
    """Write a table as CSV and print its path, or that its folder is read-only."""
    from sepcap.storage import write_atomically

    try:
        write_atomically(path, table.to_csv(index=False).encode())
    except OSError as error:
        if not read_only(error, path):
            raise
    else:
        print(f"  {path}")


def read_only(error: OSError, path: Path) -> bool:
    """Whether a figure or table of a finished result is left out because its folder is read-only; if so, this is reported."""
    if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):
        return False
    print(f"  (no {path}: its folder is read-only)")
    return True


def show(result: Any, folder: Path) -> None:
    """Print the summary of a study, and write its table and figures to its folder."""
    for sentence in result.summary():
        print(sentence)
    print(f"\n  {folder}  (sepcap report {folder} writes a page about it)")
    write_table(result.table, folder / "table.csv")
    write_figures({kind: partial(result.figure, kind) for kind in result.FIGURES}, folder / "figures")
