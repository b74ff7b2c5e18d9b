"""Cells of a grid: all combinations, each once, checked before anything is written."""

import dataclasses
import json

import numpy as np
import pytest

import sepcap
from sepcap.learning.fitting import Fitting
from sepcap.studies.catalog import FUNCTIONS, STUDIES, named
from sepcap.studies.sweep.grid import cells_of, config_of, given

BASE = sepcap.PruningConfig()


def test_cells_are_all_combinations_in_order():
    cells = cells_of(BASE, {"importance": ["abs", "rms"], "seed": np.arange(3)})
    assert [dict(cell.fields) for cell in cells] == [{"importance": i, "seed": s} for i in ("abs", "rms") for s in (0, 1, 2)]
    assert len({cell.name for cell in cells}) == 6
    for cell in cells:
        assert config_of("PruningConfig", json.loads(json.dumps(cell.config))) == dataclasses.replace(BASE, **cell.fields)


def test_several_grids_are_joined():
    cells = cells_of(BASE, [{"importance": ["abs"], "seed": [0, 1]}, {"importance": ["random"], "seed": [5]}])
    assert [(cell.fields["importance"], cell.fields["seed"]) for cell in cells] == [("abs", 0), ("abs", 1), ("random", 5)]


def test_a_share_and_a_count_are_two_cells_with_names_of_their_own():
    cells = cells_of(sepcap.PruningConfig(steps=1), {"fractions": [{"mlp": 1}, {"mlp": 1.0}]})
    assert len({cell.name for cell in cells}) == 2
    assert [type(cell.config["fractions"]["mlp"]) for cell in cells] == [int, float]


def test_a_name_is_that_of_the_whole_configuration():
    """The same cell has the same folder whatever else is in the grid; another base gives another."""
    grid = {"seed": [0, 1]}
    assert cells_of(BASE, grid)[1].name == cells_of(BASE, {"seed": [1]})[0].name
    assert cells_of(BASE, grid)[1].name != cells_of(sepcap.PruningConfig(steps=2), grid)[1].name


def test_tokens_are_those_of_the_plan(trained, letters, digits):
    from sepcap.studies.pruning.prune import plan

    small = {"forget": letters, "retain": digits, "tokens": 150, "eval_tokens": 150, "steps": 3, "fractions": {"mlp": 0.2}}
    learned = {"importance": "learned", "recollect": False}
    random = {"importance": "random"}
    for more in ({}, {"recollect": False}, learned, random, {"positions": "correct", "importance": "taylor"}, random | {"offset": "mean"}):
        base = sepcap.PruningConfig(**small, **more)
        assert cells_of(base, {"seed": [0]})[0].tokens == plan(trained, base).work(), more


@pytest.mark.parametrize(("importance", "passes"), [("abs", 1), ("taylor", 2), ("snip", 3), ("ig", 34)])
def test_gradients_count_as_many_forward_passes_as_they_cost(trained, letters, digits, importance, passes):
    from sepcap.studies.pruning.prune import plan

    small = {"forget": letters, "retain": digits, "tokens": 150, "eval_tokens": 100, "steps": 2}
    prepared = plan(trained, sepcap.PruningConfig(**small, fractions={"mlp": 0.2}, importance=importance))
    assert prepared.work() == passes * 2 * 2 * 150 + 3 * 2 * 100
    assert prepared.tokens() == 2 * 2 * 150 + 3 * 2 * 100
    assert ("counted forward" in prepared.cost()) == (passes > 1)


@pytest.mark.parametrize(
    ("grid", "says"),
    [
        ({}, "give at least one field with its values"),
        ([], "give at least one field with its values"),
        ({"seed": []}, r"grid\['seed'\]=\[\]: give at least one value"),
        ({"seed": 3}, r"grid\['seed'\]=3: give its values in a list"),
        ({"importance": "abs"}, r"grid\['importance'\]='abs': give its values in a list"),
        ({"seeds": [0]}, "a field of the grid='seeds' is not known. Did you mean 'seed'"),
        ({"seed": [0, 1, 0]}, r"grid\['seed'\]=\[0, 1, 0\]: 0 is given twice"),
        ([{"seed": [0, 1]}, {"seed": [1]}], "the cell seed=1 is given twice"),
        ([{"importance": ["abs", "rms"]}, {"seed": [0, 1]}], "the cell seed=0 is given twice, also as importance=abs"),
        ({"tokens": [100, 0]}, "cell tokens=0: tokens=0: give at least 1"),
        ({"importance": ["freq"], "steps": [1], "fractions": [{"attn_value": 0.1}]}, r"cell importance=freq.*is undefined"),
        ({"forget": [["a text", object()]]}, "grid.forget=.*: give names, paths, numbers or lists"),
        ({"seed": range(400), "tokens": range(1, 400)}, "159,600 cells; give at most 100,000"),
    ],
)
def test_a_wrong_grid_is_one_error(grid, says):
    with pytest.raises((ValueError, TypeError), match=says):
        cells_of(BASE, grid)


def test_a_base_of_another_class_or_with_python_objects_is_refused():
    with pytest.raises(TypeError, match=r"base=\{.*: give a configuration of a study"):
        cells_of({"seed": 0}, {"seed": [0]})
    with pytest.raises(TypeError, match="base is a Fitting; give a configuration of a study"):
        cells_of(Fitting(), {"seed": [0]})
    with pytest.raises(TypeError, match=r"base\.forget is a object; give names"):
        cells_of(sepcap.PruningConfig(forget=object()), {"seed": [0]})


@pytest.mark.parametrize("kind", FUNCTIONS)
def test_every_study_takes_its_place(kind):
    """The function is that of the configuration, which comes back from JSON as it was."""
    function = named(FUNCTIONS[kind])
    assert function.CONFIG.__name__ == kind
    assert getattr(sepcap, kind) is function.CONFIG
    base = function.CONFIG(**({"study": "sp-figure1"} if kind == "ReproductionConfig" else {}))
    assert config_of(kind, json.loads(json.dumps(given(base)))) == base


def test_every_study_is_in_the_catalog():
    configured = {name for name in sepcap.__all__ if name.endswith("Config")}
    assert configured <= set(FUNCTIONS)
    assert STUDIES["sweep"].endswith(f".{sepcap.Sweep.__name__}")
