"""How every study is called, and how it runs in its folder: start or resume it, and write the result last."""

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from operator import attrgetter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

from sepcap.checks import conform, wrong
from sepcap.errors import unknown
from sepcap.models.loading.load import load_model
from sepcap.progress import reporting, tell
from sepcap.studies.base.folder import Pieces, is_finished, open_study
from sepcap.studies.base.result import Result, StudyResult

R = TypeVar("R")

Progress = bool | Callable[[str], Any]
"""True announces the work and shows bars, False shows nothing; a function receives the announcements, and bars are shown."""


def study(
    kind: type, *, loads: bool = True, model_of: Callable[[Any], Any] = attrgetter("model")
) -> Callable[[Callable[..., R]], Callable[..., R]]:
    """Give a function the calling convention of every study.

    The function takes (model, config, *, out, say) and optionally more keywords. It is called with a model or its name, a configuration
    or its fields as keywords, `out`, and `progress`. A name takes the place of the model of the configuration, which is loaded if no
    model is given.

    Args:
        kind: class of the configuration.
        loads: whether the model is loaded here; if not, the function may receive None.
        model_of: returns the name of the model to load from the configuration.
    """

    def decorate(function: Callable[..., R]) -> Callable[..., R]:
        own = inspect.signature(function).parameters

        @functools.wraps(function)
        def call(model: Any = None, config: Any = None, *, progress: Any = True, **given: Any) -> R:
            fields = {name: given.pop(name) for name in list(given) if name not in own}
            if isinstance(model, str | Path):  # a name is a field, which others can depend on
                fields["model"], model = str(model), None
            config = configured(kind, config, fields, others=[*own, "progress"])
            shown = conform("progress", progress, Progress)
            inspect.signature(function).bind(model, config, say=tell, **given)  # a missing argument is an error before a model is loaded
            with reporting(shown) as say:
                if loads and given.get("workers") is None:  # else every worker loads it
                    model = load_model(model_of(config) if model is None else model)
                return function(model, config, say=say, **given)

        described: Any = call  # the type of a function does not declare that it may have a signature of its own
        described.__signature__ = _signature(own, kind)  # what Jupyter and help() show
        described.CONFIG, described.LOADS = kind, loads  # what a sweep makes configurations of, and whether it loads the model
        return described

    return decorate


def configured(kind: type, config: Any, fields: dict[str, Any], others: list[str] | None = None) -> Any:
    """A configuration with some of its fields replaced.

    Raises:
        TypeError: `config` is of another class.
        ValueError: a field that it does not have; the error names the nearest ones.
    """
    if config is not None and not isinstance(config, kind):
        raise wrong("config", config, f"a sepcap.{kind.__name__}, or its fields as keywords")
    known = [field.name for field in dataclasses.fields(kind) if field.init]
    for name in fields:
        if name not in known:
            raise unknown("argument", name, [*known, *(others or [])])
    return kind(**fields) if config is None else dataclasses.replace(config, **fields)


def _signature(own: Any, kind: type) -> inspect.Signature:
    """The signature with all fields of the configuration, for completion in notebooks and `help`."""
    keyword = inspect.Parameter.KEYWORD_ONLY
    either = inspect.Parameter.POSITIONAL_OR_KEYWORD
    first = [inspect.Parameter(name, either, default=None) for name in ("model", "config")]
    others = [p.replace(kind=keyword) for name, p in own.items() if name not in ("model", "config", "say")]
    others.append(inspect.Parameter("progress", keyword, default=True))
    taken = {"model", *(p.name for p in others)}
    listed = [f for f in dataclasses.fields(kind) if f.init and f.name not in taken]
    fields = [inspect.Parameter(f.name, keyword, default=_default(f)) for f in listed]
    return inspect.Signature([*first, *others, *fields])


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    return inspect.Parameter.empty if field.default_factory is dataclasses.MISSING else field.default_factory()


@contextlib.contextmanager
def study_folder(out: str | Path | None, kind: type[StudyResult], config: Mapping[str, Any]) -> Iterator[Pieces]:
    """The pieces of a study, in the given folder or in a temporary one."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory())) / kind.STUDY if out is None else Path(out)
        yield stack.enter_context(open_study(folder, kind.STUDY, config))


def run_study(
    kind: type[Result],
    config: Mapping[str, Any],
    compute: Callable[[Pieces], Result],
    out: str | Path | None,
    cost: Callable[[], str] = str,
    say: Callable[[str], Any] | None = None,
) -> Result:
    """Compute a study, or read it if it is finished.

    Args:
        kind: class of its result.
        config: resolved configuration, as stored in the folder.
        compute: makes the result; the pieces that it stores are reused when an interrupted study is resumed.
        out: folder of the study; None keeps nothing.
        cost: returns the work to do and its cost, in a sentence.
        say: receives that sentence before the work begins, or that the study is finished.
    """
    with study_folder(out, kind, config) as pieces:
        finished = is_finished(pieces)
        if say is not None:
            say(f"{out} is finished; nothing is recomputed" if finished else cost())
        result = kind.load(pieces.folder) if finished else compute(pieces)
    return result if finished or out is None else kind.load(result.save(out))
