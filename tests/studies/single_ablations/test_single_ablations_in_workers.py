"""Single ablations on several workers: the bits of one process, whoever measures a chunk; what is missing is done again."""


import pytest
import torch

import sepcap
from sepcap.errors import warn
from sepcap.studies.single_ablations import measure, units

SIZE = {"tokens": 100, "reference_tokens": 120, "context": 16, "batch_size": 8, "progress": False}
HERE = {"workers": 1, "engine": "here", "load": {"device": "cpu"}}


@pytest.fixture
def small(monkeypatch):
    """Several chunks a layer and several blocks of rows."""
    monkeypatch.setattr(units, "CHUNK", 5)
    of = measure.Rows.of
    monkeypatch.setattr(measure.Rows, "of", lambda sample, _: of(sample, 48))


def same(one, other):
    assert one.tensors.keys() == other.tensors.keys()
    for name, tensor in one.tensors.items():
        assert torch.equal(tensor, other.tensors[name]), name
    for name, table in one.tables.items():
        assert table.equals(other.tables[name])
    drop = ("created", "versions")
    assert {k: v for k, v in one.config.items() if k not in drop} == {k: v for k, v in other.config.items() if k not in drop}


@pytest.mark.thorough
def test_bits_are_those_of_one_process(trained_folder, task_files, small, tmp_path):
    """With pairs, which are known only when all units have been ablated alone."""
    how = {**task_files, **SIZE, "sample": 9, "pairs": 3, "kind": "mean"}
    alone = sepcap.ablate_each(trained_folder, **how, out=tmp_path / "alone")
    cut = sepcap.ablate_each(trained_folder, **how, **HERE, out=tmp_path / "cut")
    same(alone, cut)
    files = [sorted(path.relative_to(folder) for path in folder.rglob("*.*")) for folder in (tmp_path / "alone", tmp_path / "cut")]
    assert files[0] == files[1]
    assert len(list((tmp_path / "cut").rglob("alone-*"))) > 8


def test_it_goes_on_where_one_process_stopped(trained_folder, task_files, small, tmp_path, monkeypatch):
    """A stopped call without workers is finished by one with workers: only missing pieces are measured."""
    how = {**task_files, **SIZE, "sample": 6}
    whole = sepcap.ablate_each(trained_folder, **how, out=tmp_path / "a")
    (tmp_path / "a" / "result.json").unlink()
    pieces = sorted((tmp_path / "a" / "pieces").rglob("alone-*"))
    times = {path: path.stat().st_mtime_ns for path in pieces[1:]}
    pieces[0].unlink()
    same(whole, sepcap.ablate_each(trained_folder, **how, **HERE, out=tmp_path / "a"))
    assert pieces[0].exists()
    assert {path: path.stat().st_mtime_ns for path in times} == times
    heard = []
    sepcap.ablate_each(trained_folder, **how | {"progress": heard.append}, **HERE, out=tmp_path / "a")
    assert "is finished; nothing is recomputed" in heard[0]
    with pytest.raises(FileExistsError, match="threads: 1 stored, 2 requested"):
        sepcap.ablate_each(trained_folder, **how, **HERE, threads=2, out=tmp_path / "a")


def test_neurons_are_sent_in_a_file_and_nothing_is_kept_without_a_folder(trained, trained_folder, task_files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    neurons = sepcap.NeuronSet.empty(trained, "mlp")
    neurons.masks["mlp"][0, [1, 4]] = True
    neurons.masks["mlp"][1, 2] = True
    heard = []
    found = sepcap.ablate_each(trained_folder, **task_files, **SIZE | {"progress": heard.append}, neurons=neurons, **HERE)
    assert found.places.tolist() == [[0, 1], [0, 4], [1, 2]]
    assert heard[0].endswith("by one worker; in this process, 1 thread")
    assert found.folder is None
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_sent_or_fails_is_one_error(trained, trained_folder, task_files, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"model is a .*; give a name or a folder with workers="):
        sepcap.ablate_each(trained, **task_files, **SIZE, **HERE)
    with pytest.raises(TypeError, match=r"forget=.*with workers=, other processes carry out ablate_each"):
        sepcap.ablate_each(trained_folder, **task_files | {"forget": [object()]}, **SIZE, **HERE)
    with pytest.raises(RuntimeError, match=r"ablate_each: resolved failed with IndexError: .*9"):
        sepcap.ablate_each(trained_folder, **task_files, **SIZE, layers=9, **HERE, out=tmp_path / "a")
    assert not (tmp_path / "a").exists()
    monkeypatch.setattr(measure, "halving_batches", lambda *how: warn("out of memory: continuing with batch_size=4"))
    with pytest.raises(RuntimeError, match=r"ablate_each: part alone-0-0 of forget failed with MemoryError: .* give batch_size=4"):
        sepcap.ablate_each(trained_folder, **task_files, **SIZE, sample=3, layers=0, **HERE)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2, 8])
def test_every_number_of_worker_processes_has_the_same_bits(trained_folder, task_files, tmp_path, workers):
    how = {**task_files, **SIZE, "layers": 0}
    there = sepcap.ablate_each(trained_folder, **how, workers=workers, load={"device": "cpu"}, out=tmp_path / "there")
    same(sepcap.ablate_each(trained_folder, **how), there)
