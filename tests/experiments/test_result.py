"""Results of studies as folders: what comes back is what was saved, and nothing else is ever overwritten."""

import json
from typing import ClassVar

import pandas as pd
import pytest
import torch

from sepcap.errors import CorruptFile
from sepcap.experiments import result
from sepcap.experiments.result import FINISHED, Figures, StudyResult, load_result, open_study


class Counted(StudyResult):
    STUDY = "counted"
    TITLE = "How many?"
    FIGURES: ClassVar[Figures] = {}

    def summary(self):
        if not self.config["k"]:
            raise ValueError("nothing was counted")
        return [f"{self.config['k']} of <3>"]


@pytest.fixture
def counted(monkeypatch):
    monkeypatch.setitem(result.STUDIES, "counted", "counted.Counted")
    table = pd.DataFrame({"layer": pd.array([0, None], dtype="Int64"), "value": [0.1, float("nan")]})
    return Counted({"model": "tiny", "k": 3}, {"values": table}, {"matrix": torch.arange(6.0).view(2, 3)})


def test_a_saved_result_comes_back_whole(counted, tmp_path):
    back = Counted.load(counted.save(tmp_path / "study"))
    pd.testing.assert_frame_equal(back.tables["values"], counted.tables["values"])
    assert torch.equal(back.tensors["matrix"], counted.tensors["matrix"])
    assert back.config == counted.config == {"study": "counted", "model": "tiny", "k": 3}


def test_a_result_without_tensors_needs_no_file_for_them(counted, tmp_path):
    Counted(counted.config, counted.tables).save(tmp_path)
    assert Counted.load(tmp_path).tensors == {}


def test_another_configuration_is_refused_and_nothing_changes(counted, tmp_path):
    counted.save(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(FileExistsError, match="k: 3 there, 4 asked for"):
        Counted({**counted.config, "k": 4}, counted.tables).save(tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_folder_with_something_else_is_refused(counted, tmp_path):
    (tmp_path / "thesis.tex").write_text("important")
    with pytest.raises(FileExistsError, match="holds no study"):
        counted.save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(FileExistsError, match="is a file"):
        counted.save(tmp_path / "thesis.tex")


def test_pieces_are_there_when_the_study_is_taken_up_again(tmp_path):
    with open_study(tmp_path / "long", "counted", {"k": 3}) as pieces:
        assert pieces.get("first") is None
        pieces.put("first", {"x": torch.ones(2)}, {"tokens": 7})
        with pytest.raises(RuntimeError, match="another process"), open_study(tmp_path / "long", "counted", {"k": 3}):
            pass
    with open_study(tmp_path / "long", "counted", {"k": 3}) as pieces:
        tensors, note = pieces.get("first")
        assert torch.equal(tensors["x"], torch.ones(2))
        assert note == {"tokens": 7}


def test_what_is_not_finished_or_another_study_says_so(counted, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        load_result(tmp_path)
    with open_study(tmp_path, "counted", {"k": 3}):
        pass
    with pytest.raises(FileNotFoundError, match="not finished"):
        Counted.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"study": "other"}))
    with pytest.raises(FileNotFoundError, match="holds other"):
        Counted.load(tmp_path)
    with pytest.raises(ValueError, match="study='other' is not known"):
        load_result(tmp_path)


def test_a_broken_table_is_named(counted, tmp_path):
    counted.save(tmp_path)
    (tmp_path / "tables" / "values.parquet").write_bytes(b"PAR1")
    with pytest.raises(CorruptFile, match=rf"values\.parquet is missing or corrupt.*{FINISHED}"):
        Counted.load(tmp_path)


def test_the_card_says_what_was_found(counted):
    assert "<li>3 of &lt;3&gt;</li>" in counted._repr_html_()
    assert "tables: values" in counted._repr_html_()
    assert "<li>nothing was counted</li>" in Counted({"k": 0}, counted.tables)._repr_html_()
