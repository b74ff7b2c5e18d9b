"""The script that makes the compiled models makes the files that are shipped."""

import importlib
import sys
from pathlib import Path

import pytest

from sepcap.compiled.load import FOLDER
from sepcap.compiled.programs import PAIRS

sys.path.insert(0, str(Path(__file__).parents[2] / "training"))


@pytest.mark.parametrize("name", sorted(PAIRS))
def test_compiled_again_a_model_has_the_same_files_byte_by_byte(name, tmp_path):
    importlib.import_module("compile").compile_model(name, tmp_path)
    made, shipped = ({path.name: path.read_bytes() for path in (folder / name).iterdir()} for folder in (tmp_path, FOLDER))
    assert made.keys() == shipped.keys()
    assert [file for file in made if made[file] != shipped[file]] == []
