"""Every number and flag of the public functions, methods and configurations refuses what is of another kind, and names the argument."""

import collections.abc
import dataclasses
import inspect
import math
import types
import typing
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

import sepcap
from sepcap import checks, plots
from sepcap.checks import ANY, BOUNDS, Bounds, WrongKind, checked, number, whole
from sepcap.studies.catalog import STUDIES

NAN, INF = float("nan"), float("inf")
WRONG = {
    bool: ["no", "True", 1, 0, 1.0, None, NAN, []],
    int: [1.5, True, "3", NAN, INF, None, 1.0, [1]],
    float: [True, "0.5", NAN, INF, -INF, None, [0.5]],
    str: [1, True, None, b"x", ["x"]],
}
"""What is none of a kind."""


def members(kind):
    """The kinds that an annotation lets through beside None."""
    union = typing.get_origin(kind) in (typing.Union, types.UnionType)
    return [one for one in typing.get_args(kind) if one is not type(None)] if union else [kind]


def plain_kind(kind):
    """The one kind that an annotation lets through beside None, if it is one of the table."""
    kinds = members(kind)
    return kinds[0] if len(kinds) == 1 and kinds[0] in WRONG else None


def wrong_values(name, kind, optional, bounds):
    values = [value for value in WRONG[kind] if not (value is None and optional)]
    if kind in (int, float) and bounds.least > -math.inf:
        values.append(kind(bounds.least - 1))
    return values


CONFIGS = [
    kind for name in sepcap.__all__ if dataclasses.is_dataclass(kind := getattr(sepcap, name)) and name.endswith(("Config", "Protocol"))
]


def public_calls():
    """Every public function, and every method of the public classes and of those that `load_result` gives, by its name."""
    studies = [place.rsplit(".", 1) for place in STUDIES.values()]
    classes = [getattr(import_module(f"sepcap.{module}"), name) for module, name in studies]
    things = {name: getattr(sepcap, name) for name in sepcap.__all__} | {f"plots.{name}": getattr(plots, name) for name in plots.__all__}
    for name, thing in (things | {kind.__name__: kind for kind in classes}).items():
        if inspect.ismodule(thing):
            continue
        if not inspect.isclass(thing):
            yield name, thing
            continue
        for method, function in inspect.getmembers(thing, inspect.isroutine):
            if not method.startswith("_") and (inspect.isfunction(function) or inspect.ismethod(function)):
                yield f"{name}.{method}", function


CALLS = dict(public_calls())


class Model:
    """Enough of a model for the checks of kinds, and for nothing after them."""

    cfg = None


def right(name, kind):
    """Something of the right kind for an argument that is not looked at."""
    if name == "model" and str not in members(kind):
        return Model()
    if name in ("self", "cls"):
        return type
    if name == "say":
        return str
    kind = members(kind)[0]
    asked = typing.get_origin(kind) or kind
    if asked is typing.Literal:
        return typing.get_args(kind)[0]
    plain = {str: "x", int: 1, float: 0.5, bool: True, typing.Any: None, slice: slice(None), np.ndarray: np.zeros(1)}
    if asked in plain:
        return plain[asked]
    if getattr(asked, "__module__", "").startswith("jaxtyping") or type(asked).__module__.startswith("jaxtyping"):
        return None
    if asked in (tuple, dict, collections.abc.Mapping):
        return () if asked is tuple else {}
    return [] if asked.__module__ == "collections.abc" else object.__new__(asked)


def wrong_arguments(name, function):
    """Arguments of a public function or method, each with a value of another kind."""
    hints = typing.get_type_hints(function)
    for argument, parameter in inspect.signature(function).parameters.items():
        hint = hints.get(argument, typing.Any)
        kind, optional = plain_kind(hint), type(None) in typing.get_args(hint) or parameter.default is None
        bounds = ANY if "." in name else BOUNDS.get(argument, ANY)  # a method may count from the end, as an index does
        wrong = [] if kind is None else wrong_values(argument, kind, optional, bounds)
        if any(typing.get_origin(one) is typing.Literal for one in members(hint)) and len(members(hint)) == 1:
            wrong = ["no such name", 1]
        yield from ((argument, value) for value in wrong)


@pytest.mark.thorough
@pytest.mark.parametrize("name", sorted(CALLS))
def test_every_public_call_names_an_argument_of_another_kind(name):
    """A function or method that fails here lacks `@checked()` of sepcap.checks."""
    function = getattr(CALLS[name], "__func__", CALLS[name])
    hints, parameters = typing.get_type_hints(function), inspect.signature(function).parameters
    needed = [p for p in parameters.values() if p.default is p.empty and "VAR" not in p.kind.name]
    for argument, value in wrong_arguments(name, function):
        given = {p.name: right(p.name, hints.get(p.name, typing.Any)) for p in needed} | {argument: value}
        first = [given.pop(p.name) for p in parameters.values() if p.kind is p.POSITIONAL_ONLY and p.name in given]
        with pytest.raises(ValueError, match=rf"^{argument}( is a |=).*(give |is not known)"):
            function(*first, **given)


def made(kind, /, **changes):
    """A configuration with values that the type checks of the tests would stop before its own checks see them."""
    config = kind("sp-table2") if kind is sepcap.ReproductionConfig else kind()
    for name, value in changes.items():
        object.__setattr__(config, name, value)
    config.__post_init__()
    return config


@pytest.mark.parametrize("config", CONFIGS)
def test_every_field_of_a_configuration_names_what_is_of_another_kind(config):
    hints = typing.get_type_hints(config)
    for field in dataclasses.fields(config):
        hint = hints[field.name]
        kind, optional = plain_kind(hint), type(None) in typing.get_args(hint)
        bounds = ANY if field.name == "which" else BOUNDS.get(field.name, ANY)
        wrong = [] if kind is None else wrong_values(field.name, kind, optional, bounds)
        if typing.get_origin(hint) is typing.Literal:
            wrong = ["no such name", 1, None]
        if typing.get_origin(hint) in (tuple, dict):
            wrong = [0, None, NAN, "mlp", *[(object(),)] * (typing.Any not in typing.get_args(hint))]
        for value in wrong:
            with pytest.raises(ValueError, match=rf"^{field.name}( is a |=|\[)"):
                made(config, **{field.name: value})


def test_numbers_and_flags_of_numpy_become_pythons_own():
    shares = {"mlp": np.float64(0.25)}
    config = made(sepcap.PruningConfig, steps=np.int64(2), recollect=np.bool_(False), eps=np.float32(0.5), fractions=shares)
    assert [type(v) for v in (config.steps, config.recollect, config.eps, config.fractions["mlp"])] == [int, bool, float, float]
    assert made(sepcap.AblationSweepConfig, seeds=list(np.arange(2))).seeds == (0, 1)
    assert whole("tokens", np.uint8(3)) == 3
    assert number("scale", 2) == 2


def test_a_task_where_the_model_should_be_is_named_as_that():
    with pytest.raises(
        WrongKind, match=r"model is a str; give what sepcap.load_model returns \(and task is a model: the two are swapped\)"
    ):
        sepcap.collect("local-code", Model())


def takes_a_path(kind):
    return kind is Path or any(map(takes_a_path, typing.get_args(kind)))


def path_arguments():
    for name, function in CALLS.items():
        hints = typing.get_type_hints(getattr(function, "__func__", function))
        for argument, kind in hints.items():
            if argument != "return" and takes_a_path(kind):
                yield pytest.param(function, argument, kind, id=f"{name}-{argument}")


PATHS = sorted(path_arguments(), key=lambda param: param.id)


@pytest.mark.parametrize(("function", "argument", "kind"), PATHS)
def test_the_home_folder_is_meant_in_every_path(function, argument, kind, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    plain = getattr(function, "__func__", function)
    if hasattr(plain, "__signature__"):  # a study: its function is checked after its model is loaded
        plain = plain.__wrapped__
    seen = {}

    def instead(function, signature, arguments, bounds):
        conform_all(function, signature, arguments, bounds)
        seen.update(arguments)
        raise InterruptedError

    conform_all = checks._conform_all
    monkeypatch.setattr(checks, "_conform_all", instead)
    hints = typing.get_type_hints(plain)
    needed = [p for p in inspect.signature(plain).parameters.values() if p.default is p.empty and "VAR" not in p.kind.name]
    for given, meant in (("~/a", f"{tmp_path}/a"), (Path("~/a"), tmp_path / "a"), ("./~", "./~"), ("a~", "a~")):
        rest = {p.name: right(p.name, hints.get(p.name, typing.Any)) for p in needed if p.name not in ("self", "cls")} | {argument: given}
        rest |= {p.name: None for p in needed if p.name == "self"} | {p.name: type for p in needed if p.name == "cls"}
        with pytest.raises(InterruptedError):
            plain(**rest)
        assert seen[argument] == meant
    if typing.Any not in typing.get_args(kind):
        with pytest.raises(WrongKind, match=f"^{argument}=5: give "):
            plain(**rest | {argument: 5})


def test_methods_with_paths_were_found():
    found = {param.id for param in PATHS}
    some = {"plots.save-path", "Evaluation.load-path", "Run.report-path", "evaluate_toxicity-prompts", "StudyResult.save-folder"}
    assert some <= found


def test_bounds_say_what_would_be_right():
    said = {
        Bounds(0): "a number, 0 or more",
        Bounds(0, above=True): "a number above 0",
        Bounds(0, 1): "a number from 0 to 1",
        Bounds(0, 1, above=True): "a number above 0 to 1",
        Bounds(0, 1, above=True, below=True): "a number between 0 and 1",
        Bounds(most=3): "a number, at most 3",
        ANY: "a number",
    }
    assert {bounds: bounds.words("a number") for bounds in said} == said


@pytest.mark.skipif(not hasattr(KeyboardInterrupt, "add_note"), reason="notes came with Python 3.11")
def test_an_interrupt_says_what_is_kept_and_how_to_go_on():
    @checked()
    def work(out: str | None = None) -> None:
        raise KeyboardInterrupt

    @checked(stopped="the model may be changed in part")
    def edit() -> None:
        work()

    for call, said in (
        (work, "sepcap.work was stopped: nothing is kept; call it again"),
        (lambda: work("runs/x"), "sepcap.work was stopped: finished work is kept in runs/x; the same call resumes from there"),
        (edit, "sepcap.edit was stopped: the model may be changed in part"),
    ):
        with pytest.raises(KeyboardInterrupt) as stopped:
            call()
        assert stopped.value.__notes__ == [said]
