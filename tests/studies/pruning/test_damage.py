"""Whatever happens to a file of a folder, reading it gives the same numbers or one error that names the file."""

import os
import re
import shutil
import warnings
from pathlib import Path

import pandas as pd
import pytest
import torch
from damage import DAMAGES, damaged_copies, files_of, numbers_of, outcome
from run_folders import bits, config_of
from tiny import fresh

from sepcap.drawing.page import picture
from sepcap.errors import CorruptFile
from sepcap.storage import read_json, seals_of, write_json
from sepcap.studies import catalog
from sepcap.studies.base.folder import is_finished, open_study
from sepcap.studies.base.result import StudyResult
from sepcap.studies.catalog import load_result
from sepcap.studies.check import check_folder
from sepcap.studies.pruning import prune as pruning
from sepcap.studies.pruning.run import Run

HARMLESS = {"run.log", "metrics.jsonl", "trajectory.parquet"}
"""No number is read from these: a person reads them, or other programs."""


@pytest.fixture(scope="module")
def prepared(tiny_folders, letters, digits):
    return pruning.plan(fresh(tiny_folders["opt"]), config_of(letters, digits, fractions={"mlp": 0.25}))


@pytest.fixture(scope="module")
def whole(prepared, tmp_path_factory):
    return pruning.execute(prepared, tmp_path_factory.mktemp("whole") / "run").folder


FAST = ("flip", "swap")
EACH = pytest.mark.parametrize("damage", [*FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in DAMAGES if name not in FAST)])


@EACH
def test_no_damage_to_a_run_changes_a_number_unseen(whole, tmp_path, damage):
    right = list(numbers_of(load_result(whole)))
    for _, copy, file, named in damaged_copies(whole, tmp_path, [damage]):
        found = outcome(copy, right, named)
        where = file.relative_to(copy)
        assert found == ("same" if file.name in HARMLESS else "error"), (where, damage, found)
        problems = checked(copy)
        # a table made of the metrics is compared number by number; a bit of the file around them may mean nothing
        if file.name != "run.log" and (file.name, damage) not in (("metrics.jsonl", "delete"), ("trajectory.parquet", "flip")):
            assert any(name in problem for problem in problems for name in named), (where, damage, problems)


def checked(folder) -> list[str]:
    try:
        return check_folder(folder).problems
    except FileNotFoundError as error:  # nothing is left that says what the folder is
        return [str(error)]


def again(prepared, folder, named) -> str:
    """What the same call comes to in a damaged folder."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a tracker whose file is no file
            done = pruning.execute(prepared, folder)
    except (CorruptFile, OSError) as error:
        return "error" if any(name in str(error) for name in named) else f"an error that names no file: {error}"
    return "done" if done.finished else "returned a run that is not finished"


@EACH
def test_a_damaged_run_is_refused_or_made_whole(prepared, whole, tmp_path, damage):
    expected = bits(whole)
    for _, copy, file, named in damaged_copies(whole, tmp_path, [damage]):
        found, where = again(prepared, copy, named), file.relative_to(copy)
        assert found in ("error", "done"), (where, found)
        unread = file.name in ("run.log", "metrics.jsonl") and damage in ("folder", "fifo")
        # a bit of the file around the numbers may mean nothing to the run, and something to another reader
        if found == "done" and not unread and (file.name, damage) != ("trajectory.parquet", "flip"):
            assert bits(copy) == expected, where
        if file.suffix == ".safetensors":
            assert found == "error", where


def test_the_error_says_what_to_do_and_that_helps(prepared, whole, tmp_path):
    copy = shutil.copytree(whole, tmp_path / "run")
    DAMAGES["flip"](copy / "steps" / "0001" / "neurons.safetensors")
    assert not Run.load(copy).finished
    with pytest.raises(CorruptFile, match=r"0001/neurons\.safetensors is damaged.*Delete .*0001 and the steps after it"):
        pruning.execute(prepared, copy)
    for step in (1, 2):
        shutil.rmtree(copy / "steps" / f"{step:04d}")
    assert pruning.execute(prepared, copy).finished
    assert bits(copy) == bits(whole)
    assert check_folder(copy).problems == []


@pytest.mark.parametrize("damage", ["flip", "truncate"])
def test_a_damaged_run_is_not_finished_not_loaded_and_not_reported(whole, tmp_path, damage, capsys):
    from sepcap.cli.main import main

    copy = shutil.copytree(whole, tmp_path / "run")
    DAMAGES[damage](copy / "statistics" / "forget.safetensors")
    run, page = Run.load(copy), tmp_path / "page.html"
    assert not run.finished
    assert re.search(r"damaged: .*forget\.safetensors", repr(run))
    for read in (lambda: load_result(copy), lambda: run.report(page), lambda: Run.load(whole).report(page, baseline=run)):
        with pytest.raises(CorruptFile, match=r"forget\.safetensors"):
            read()
    with pytest.raises(SystemExit) as end:
        main(["report", str(copy), "--out", str(page)])
    assert end.value.code == 2
    assert re.fullmatch(r"sepcap: .*forget\.safetensors is damaged.*\n", capsys.readouterr().err)
    assert not page.exists()


def test_a_file_that_is_damaged_after_it_was_loaded_ends_the_page(whole, tmp_path):
    copy = shutil.copytree(whole, tmp_path / "run")
    run = load_result(copy)
    assert run.finished
    DAMAGES["flip"](copy / "statistics" / "forget.safetensors")
    with pytest.raises(CorruptFile, match=r"forget\.safetensors"):
        picture("scores", "Scores", lambda: run.figure("scores"))


def resealed(folder: Path, name: str, record: Path) -> None:
    """A file that was exchanged together with what the record says of it."""
    value = read_json(record, dict)
    value["files"] |= seals_of(folder, [name])
    write_json(record, value)


def test_what_is_there_twice_is_compared(whole, tmp_path):
    steps = [Path("steps") / f"{step:04d}" for step in range(3)]
    cases = {
        "statistics/forget.safetensors": ("statistics/retain.safetensors", steps[0], "holds those of retain"),
        "steps/0001/rows.safetensors": ("steps/0002/rows.safetensors", steps[1], "other values of forget than rows.safetensors"),
        "steps/0001/neurons.safetensors": ("steps/0002/neurons.safetensors", steps[1], "other numbers of neurons per layer"),
        "steps/0002/neurons.safetensors": ("steps/0000/neurons.safetensors", steps[2], "lacks neurons that were pruned by step 1"),
    }
    for name, (other, step, says) in cases.items():
        copy = shutil.copytree(whole, tmp_path / step.name / Path(name).name)
        shutil.copy(copy / other, copy / name)
        resealed(copy, name, copy / step / "record.json")
        assert any(says in problem for problem in check_folder(copy).problems), name
    copy = shutil.copytree(whole, tmp_path / "samples")
    record = read_json(copy / steps[1] / "record.json", dict)
    record["tasks"]["forget"]["sample"] = "another"
    write_json(copy / steps[1] / "record.json", record)
    assert any("other tokens than config.json names" in problem for problem in check_folder(copy).problems)


def test_the_number_of_documents_is_that_of_the_sample(whole, tmp_path):
    """It stands in config.json, which names the sample, and in every step; no cluster of rows is less than a document."""
    copy = shutil.copytree(whole, tmp_path / "step")
    record = read_json(copy / "steps/0001/record.json", dict)
    documents = record["tasks"]["forget"]["metrics"]["n_documents"]
    record["tasks"]["forget"]["metrics"]["n_documents"] = documents + 1
    write_json(copy / "steps/0001/record.json", record)
    (found,) = [problem for problem in check_folder(copy).problems if "0001" in problem]
    assert "other values of forget than rows.safetensors and config.json give: n_documents" in found
    copy = shutil.copytree(whole, tmp_path / "all")
    config = read_json(copy / "config.json", dict)
    assert config["n_documents"]["evaluate"]["forget"] == documents
    config["n_documents"]["evaluate"]["forget"] = 1
    write_json(copy / "config.json", config)
    assert any(f"has {documents:.0f} clusters of forget, and config.json names 1 documents" in p for p in check_folder(copy).problems)


def test_unexpected_files_are_named_and_an_unfinished_run_is_none(whole, tmp_path):
    copy = shutil.copytree(whole, tmp_path / "run")
    (copy / "statistics" / "thesis.txt").write_text("mine")
    (copy / ".config.json.abcd.part").write_text("")
    assert [problem.rsplit("/", 1)[1] for problem in check_folder(copy).problems] == [
        ".config.json.abcd.part was left by a killed process",
        "thesis.txt is unexpected",
    ]
    copy = shutil.copytree(whole, tmp_path / "part")
    shutil.rmtree(copy / "steps" / "0002")
    found = check_folder(copy)
    assert any("not finished: 1 of 2 steps" in note for note in found.notes)
    assert all("trajectory" in problem or "metrics" in problem for problem in found.problems)


def test_a_finished_run_is_opened_without_writing(prepared, whole, monkeypatch):
    for name in ("mkdir", "open", "rename", "replace", "unlink"):
        monkeypatch.setattr(f"os.{name}", lambda *args, **kwargs: pytest.fail(f"wrote: {args}"))
    assert pruning.execute(prepared, whole).finished


@pytest.mark.parametrize("how", ["moved", "deleted"])
def test_a_run_whose_folder_goes_stops_with_a_sentence_and_leaves_no_stub(prepared, tmp_path, monkeypatch, how):
    step, out = pruning._step, tmp_path / "run"

    def then_gone(prepared, run, number):
        step(prepared, run, number)
        if number == 0:
            (shutil.rmtree if how == "deleted" else lambda path: shutil.move(path, tmp_path / "elsewhere"))(out)

    with monkeypatch.context() as patch:
        patch.setattr(pruning, "_step", then_gone)
        with pytest.raises((FileNotFoundError, CorruptFile), match="run"):
            pruning.execute(prepared, out)
    assert not out.exists()
    if how == "moved":
        shutil.move(tmp_path / "elsewhere", out)
        assert pruning.execute(prepared, out).finished


def test_a_disk_that_is_full_leaves_no_half_of_a_step(prepared, tmp_path, monkeypatch):
    def full(source, target):
        if Path(target).name == "neurons.safetensors" and "0001" in str(target):
            raise OSError(28, "No space left on device")  # names no file, as that of a write
        original(source, target)

    original = os.replace
    with monkeypatch.context() as patch:
        patch.setattr("os.replace", full)
        with pytest.raises(OSError, match=r"No space left on device: .*neurons\.safetensors"):
            pruning.execute(prepared, tmp_path / "run")
    assert [path.name for path in (tmp_path / "run" / "steps").iterdir()] == ["0000"]
    assert pruning.execute(prepared, tmp_path / "run").finished


class Counted(StudyResult):
    STUDY = "counted"
    TITLE = "How many?"
    FIGURES = {}  # noqa: RUF012

    def summary(self):
        return ["3"]


def test_no_damage_to_a_study_changes_a_number_unseen(tmp_path, monkeypatch):
    monkeypatch.setitem(catalog.STUDIES, "counted", "counted.Counted")
    monkeypatch.setattr(catalog, "named", lambda path: Counted)
    tables = {name: pd.DataFrame({"value": torch.arange(float(i), 50.0).tolist()}) for i, name in enumerate(("first", "second"))}
    study = Counted({"model": "tiny"}, tables, {"matrix": torch.arange(6.0)})
    with open_study(tmp_path / "study", "counted", study.config) as pieces:
        for i in range(2):
            pieces.put(f"piece-{i}", {"x": torch.full((3,), float(i))})
    folder = study.save(tmp_path / "study")
    right = list(numbers_of(load_result(folder)))
    assert check_folder(folder).problems == []
    assert len(files_of(folder)) == 7
    for damage, copy, file, named in damaged_copies(folder, tmp_path):
        found, where = outcome(copy, right, named), file.relative_to(copy)
        if (file.name, damage) == ("result.json", "delete"):
            assert "is not finished" in found
            continue
        assert found == "error", (where, damage, found)
        assert any(name in problem for problem in checked(copy) for name in named), (where, damage)
        with pytest.raises((CorruptFile, OSError)) as error, open_study(copy, "counted", study.config) as pieces:
            is_finished(pieces)
        assert any(name in str(error.value) for name in named), (where, damage)


def test_the_command_says_what_is_wrong_and_ends_with_2(whole, tmp_path, capsys):
    from sepcap.cli.main import main

    main(["check", str(whole)])
    assert "All files are as they were written." in capsys.readouterr().out
    copy = shutil.copytree(whole, tmp_path / "run")
    for name in ("neurons", "rows"):
        DAMAGES["flip"](copy / "steps" / "0001" / f"{name}.safetensors")
    with pytest.raises(SystemExit) as end:
        main(["check", str(copy)])
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert "neurons.safetensors is damaged" in said
    assert "rows.safetensors is damaged" in said
