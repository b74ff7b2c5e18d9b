"""Folders of studies: damage to any file is seen, a finished one needs no writing, and one that moves stops its study."""

import errno
import os
import pathlib
import shutil
from pathlib import Path

import planted_results
import pytest
import torch
from damage import DAMAGES, damaged_copies, numbers_of, outcome
from pages import Page

import sepcap
from sepcap.studies.base.folder import FINISHED, open_study
from sepcap.studies.base.runner import run_study
from sepcap.studies.catalog import load_result
from sepcap.studies.check import check_folder

PLANTED = {"single-ablations": planted_results.single_ablations, "compare-importances": planted_results.importances}
PLANTED |= {"learned-ranking": planted_results.learned, "jumps": planted_results.jumps}


@pytest.mark.parametrize("study", PLANTED)
def test_no_damage_to_a_newer_study_changes_a_number_unseen(study, tmp_path):
    folder = PLANTED[study]().save(tmp_path / "study")
    right = list(numbers_of(load_result(folder)))
    assert check_folder(folder).problems == []
    for damage, copy, file, named in damaged_copies(folder, tmp_path, DAMAGES):
        found = outcome(copy, right, named)
        unfinished = damage == "delete" and file.name == FINISHED and "not finished" in found
        assert found == "error" or unfinished, (damage, file.relative_to(copy), found)


def make_read_only(folder, monkeypatch):
    """Whatever changes a file or folder below fails as on a read-only file system; permissions do not bind every user."""

    def refused(name, *paths):
        def instead(*args, **options):
            changes = name != "open" or args[1] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            there = [Path(os.path.abspath(os.fspath(args[i]))) for i in paths]
            if changes and any(path == folder or folder in path.parents for path in there):
                raise OSError(errno.EROFS, "Read-only file system", str(args[0]))
            return original(*args, **options)

        original = getattr(os, name)
        return instead

    names = {"open": (0,), "mkdir": (0,), "unlink": (0,), "rmdir": (0,), "rename": (0, 1), "replace": (0, 1), "chmod": (0,)}
    for name, paths in names.items():
        instead = refused(name, *paths)
        monkeypatch.setattr(os, name, instead)
        # Python 3.10: paths keep the functions of os that they were imported with
        if hasattr(accessor := getattr(pathlib, "_NormalAccessor", None), name) and name != "open":
            monkeypatch.setattr(accessor, name, staticmethod(instead))


def test_a_finished_study_in_a_read_only_folder_is_run_again_and_reported_elsewhere(tmp_path, monkeypatch):
    made = planted_results.learned()
    folder = made.save(tmp_path / "study")
    make_read_only(folder, monkeypatch)
    with pytest.raises(OSError, match="Read-only file system"):
        (folder / "new").mkdir()
    said = []
    again = run_study(type(made), made.config, lambda pieces: pytest.fail("computed again"), folder, str, said.append)
    assert said == [f"{folder} is finished; nothing is recomputed"]
    assert torch.equal(again.tensors["scores/mlp"], made.tensors["scores/mlp"])
    assert sepcap.load_result(folder).table.equals(again.table)
    jumps = planted_results.jumps().save(tmp_path / "jumps")
    make_read_only(jumps, monkeypatch)
    monkeypatch.setattr("sepcap.studies.pruning.jumps.find.Jumps.summary", lambda self: ["as planted"])
    page = Page(load_result(jumps).report(tmp_path / "page.html"))
    assert set(page.figures) == {"figure-jumps", "figure-tokens"}
    with pytest.raises(OSError, match="Read-only file system"):
        load_result(jumps).report()


@pytest.mark.parametrize("how", ["moved", "deleted"])
def test_a_study_whose_folder_goes_stops_with_a_sentence_and_leaves_no_stub(tmp_path, how):
    made, out = planted_results.jumps(), tmp_path / "study"
    computed = []

    def compute(pieces):
        for number in range(2):
            if pieces.get(f"{number}") is None:
                computed.append(number)
                pieces.put(f"{number}", {"x": torch.ones(2)})
            if number == 0 and len(computed) == 1:
                (shutil.rmtree if how == "deleted" else lambda path: shutil.move(path, tmp_path / "elsewhere"))(out)
        return made

    with pytest.raises(FileNotFoundError, match=r"study was moved or deleted while it was written to.*the same command resumes"):
        run_study(type(made), made.config, compute, out)
    assert not out.exists()
    if how == "moved":
        shutil.move(tmp_path / "elsewhere", out)
        assert run_study(type(made), made.config, compute, out).folder == out
        assert computed == [0, 1, 1]  # the first piece was kept
    with open_study(tmp_path / "other", "jumps", {"a": 1}):
        pass  # nothing is held any more


class Enough(Exception):
    """The cost was said; no work is to follow."""


def until_said(text):
    raise Enough(text)


SMALL = {"tokens": 300, "eval_tokens": 300}
THROUGH = r"about \S+ M tokens through the model"
COSTS = {
    "learn_ranking": (SMALL | {"steps": 2, "step_tokens": 50}, f"in 2 steps .*{THROUGH}"),
    "check_selection": (
        SMALL | {"checks": ("keep-only",), "fractions": (0.5, 1.0), "seeds": (0,)},
        r"sets evaluated, \S+ M tokens through the model",
    ),
    "compare_methods": (
        {"tokens": 300, "eval_tokens": 900, "methods": ("mlp",), "seeds": (0,), "steps": 2, "mlp": {"mlp": 0.4}},
        r"runs in .* M tokens through the model, about \d+ minutes",
    ),
    "measure_modularity": (
        {"tokens": 300, "k": 4, "n_init": 1, "seeds": (0,), "control": False},
        r"about \S+ min .* M tokens through the models",
    ),
}
"""Study -> small settings, and what its cost says."""


@pytest.mark.parametrize("name", COSTS)
def test_the_cost_is_said_before_the_work(name, trained, letters, digits, tmp_path):
    options, said = COSTS[name]
    tasks = {"tasks": (letters,), "retain": digits} if name == "measure_modularity" else {"forget": letters, "retain": digits}
    with pytest.raises(Enough, match=said):
        getattr(sepcap, name)(trained, **tasks, **options, out=tmp_path / "study", progress=until_said)
    assert [path.name for path in (tmp_path / "study").rglob("*") if path.is_file()] in ([], ["config.json"])
