"""Results of studies as folders: what comes back is what was saved, and nothing else is ever overwritten."""

import json
import shutil
from typing import ClassVar

import pandas as pd
import pytest
import torch

from sepcap.errors import CorruptFile
from sepcap.storage import FORMAT, write_json
from sepcap.studies import catalog
from sepcap.studies.base.folder import FINISHED, open_study
from sepcap.studies.base.result import Figures, StudyResult
from sepcap.studies.catalog import load_result


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
    monkeypatch.setitem(catalog.STUDIES, "counted", "counted.Counted")
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
    with pytest.raises(FileExistsError, match="k: 3 stored, 4 requested"):
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
    write_json(tmp_path / "config.json", {"format": FORMAT, "study": "other"})
    with pytest.raises(FileNotFoundError, match="holds other"):
        Counted.load(tmp_path)
    with pytest.raises(ValueError, match="study='other' is not known"):
        load_result(tmp_path)


def test_a_broken_table_is_named(counted, tmp_path):
    counted.save(tmp_path)
    (tmp_path / "tables" / "values.parquet").write_bytes(b"PAR1")
    with pytest.raises(CorruptFile, match=rf"values\.parquet is damaged.*{FINISHED}"):
        Counted.load(tmp_path)


def test_a_piece_of_another_name_or_study_is_refused(tmp_path):
    with open_study(tmp_path / "long", "counted", {"k": 3}) as pieces, open_study(tmp_path / "other", "counted", {"k": 4}) as others:
        pieces.put("first", {"x": torch.ones(2)})
        for put in (pieces, others):
            put.put("second", {"x": torch.zeros(2)})
            shutil.copy(put.folder / "pieces" / "second.safetensors", pieces.folder / "pieces" / "first.safetensors")
            with pytest.raises(CorruptFile, match=r"first\.safetensors holds the piece 'second'"):
                pieces.get("first")


def test_names_in_a_result_do_not_lead_out_of_the_folder(counted, tmp_path):
    folder = counted.save(tmp_path / "study")
    held = json.loads((folder / FINISHED).read_text())
    del held["sha256"]
    for field, value in (("tables", ["../../x"]), ("files", {"../x": next(iter(held["files"].values()))}), ("files", {"/etc/passwd": {}})):
        write_json(folder / FINISHED, held | {field: value})
        with pytest.raises(CorruptFile, match=r"result\.json is corrupt: (tables|files)"):
            Counted.load(folder)


def test_the_card_says_what_was_found(counted):
    assert "<li>3 of &lt;3&gt;</li>" in counted._repr_html_()
    assert "tables: values" in counted._repr_html_()
    assert "<li>nothing was counted</li>" in Counted({"k": 0}, counted.tables)._repr_html_()
