"""The plan of a sweep in its folder: every cell has its whole configuration, whatever follows from the fields of the grid."""

import pytest

import sepcap
from sepcap.studies.sweep.folder import config_at, names_of, open_sweep
from sepcap.studies.sweep.grid import cells_of, given, plain


def planned(folder, base, grid):
    """The stored plan, and whether every cell is found in it with its own configuration."""
    cells = cells_of(base, grid)
    fixed = {"kind": "PruningConfig", "base": {name: plain("base", name, value) for name, value in given(base).items()}}
    with open_sweep(folder, fixed | {"load": {}, "threads": 1}, cells) as config:
        for name, cell in zip(names_of(config, cells), cells, strict=True):
            assert config_at(config, name) == cell.config
    return sepcap.load_result(folder)


def test_a_schedule_sets_other_fields_and_is_one_axis(tmp_path):
    """`steps` and `fractions` follow from it: they are stored with the cell, and are no fields of the grid."""
    schedules = [[{"mlp": 0.1}] * 2, [{"mlp": 0.2}] * 3]
    for _ in range(2):
        found = planned(tmp_path / "s", sepcap.PruningConfig(), {"schedule": schedules, "seed": [0, 1]})
        assert list(found.axes) == ["schedule", "seed"]
        assert list(found.table["state"]) == ["planned"] * 4


def test_a_base_field_that_only_some_cells_set_may_not_change(tmp_path):
    grid = [{"importance": ["abs", "rms"]}, {"steps": [20, 30]}]
    planned(tmp_path / "s", sepcap.PruningConfig(steps=10), grid)
    with pytest.raises(FileExistsError, match=r"another base \(steps: 10 stored, 40 requested\)"):
        planned(tmp_path / "s", sepcap.PruningConfig(steps=40), grid)
    found = planned(tmp_path / "s", sepcap.PruningConfig(steps=40), {"steps": [20, 25]})
    assert len(found.table) == 5
    assert found.axes == {"importance": ["abs", "rms"], "steps": [10, 20, 30, 25]}
