"""Every result of a study, `Run` included, has the same surface, and every study returns one."""

import inspect
import typing
from importlib import import_module

import pandas as pd
import pytest
from planted_runs import maker

import sepcap
from sepcap.studies.base.folder import read_config
from sepcap.studies.base.result import Shown
from sepcap.studies.catalog import FUNCTIONS, STUDIES
from sepcap.studies.pruning.planned import name_study
from sepcap.workers.engines import named

SURFACE = ("config", "folder", "table", "tables", "summary", "figure", "to_latex", "save", "load", "report", "__repr__", "_repr_html_")
RESULTS = {place: named(place) for place in (*STUDIES.values(), "studies.pruning.run.Run")}


@pytest.mark.parametrize("kind", RESULTS.values(), ids=lambda kind: kind.__name__)
def test_every_result_has_the_same_surface(kind):
    names = set(dir(kind)).union(*(cls.__annotations__ for cls in kind.__mro__ if "__annotations__" in vars(cls)))
    instance = {"config", "folder"} if kind is sepcap.Run else set()  # set when a run is opened
    assert set(SURFACE) - names - instance == set()
    for name in ("table", "tables"):
        assert not callable(getattr(kind, name, None)), f"{kind.__name__}.{name} is a method"
    first = {name: list(inspect.signature(getattr(kind, name)).parameters) for name in ("figure", "save", "report", "load")}
    assert first["figure"][1] == "kind"
    assert first["report"][1] == "path"
    assert first["save"][1:] == ["folder"]
    assert first["load"][:1] == ["folder"]
    assert kind.__repr__ is not object.__repr__


@pytest.mark.parametrize("place", FUNCTIONS.values())
def test_every_study_returns_a_result(place):
    assert inspect.unwrap(named(place)).__annotations__["return"] in RESULTS.values()


def test_every_public_function_that_is_a_study_is_in_the_catalog():
    studies = {name for name in sepcap.__all__ if hasattr(getattr(sepcap, name), "CONFIG")}
    assert studies == {place.rsplit(".", 1)[1] for place in FUNCTIONS.values()}


@pytest.mark.parametrize("kind", RESULTS.values(), ids=lambda kind: kind.__name__)
def test_every_result_has_a_title_and_figures(kind):
    assert issubclass(kind, Shown) or kind is sepcap.Run
    assert kind.TITLE
    assert kind.FIGURES
    module = import_module(kind.__module__)
    assert typing.get_type_hints(kind, vars(module)) is not None


def test_a_copied_run_is_the_same_run(tmp_path):
    run = maker(tmp_path)([0.5, 0.1], [0.4, 0.3])
    copied = sepcap.Run.load(run.save(tmp_path / "deep" / "copy"))
    pd.testing.assert_frame_equal(copied.table, run.table)
    assert copied.config == run.config
    assert run.save(run.folder) == run.folder
    with pytest.raises(FileExistsError, match="is not an empty folder"):
        run.save(tmp_path / "deep")
    with pytest.raises(ValueError, match="would be copied into itself"):
        run.save(run.folder / "inner")
    assert not list(tmp_path.rglob("*.part"))


def test_the_default_figure_of_a_run_is_its_first(tmp_path):
    run = maker(tmp_path)([0.5, 0.1], [0.4, 0.3])
    assert run.figure(None) == run.figure() == run.figure("trajectory")
    with pytest.raises(ValueError, match="figure='nonsense' is not known"):
        run.figure("nonsense")


def test_runs_that_never_began_are_planned_no_longer(tmp_path):
    """A call that was interrupted, then repeated with other runs, must not leave a study that is never finished."""
    name_study(tmp_path, "compare_directions", {"begun": None, "deep/begun": "0" * 64, "never": None})
    for name in ("begun", "deep/begun"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").write_text("{}")
    name_study(tmp_path, "compare_directions", {"begun": "1" * 64, "other": None})
    assert read_config(tmp_path)["runs"] == {"begun": "1" * 64, "deep/begun": "0" * 64, "other": None}
    name_study(tmp_path, "compare_directions", {"begun": "1" * 64}, whole=False)
    assert read_config(tmp_path)["runs"] == {"begun": "1" * 64, "deep/begun": "0" * 64, "other": None}
