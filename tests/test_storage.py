"""Files are whole or absent, and a broken one is named."""

import contextlib
import json
import os
import shutil
from functools import partial
from pathlib import Path

import pandas as pd
import pytest
import torch
from pydantic import ConfigDict
from typing_extensions import TypedDict

from sepcap.errors import CorruptFile
from sepcap.interventions.rotation import Rotation
from sepcap.selection.clusters import Clusters
from sepcap.selection.score import Scores
from sepcap.statistics.moments import Statistics
from sepcap.storage import (
    PART,
    Locked,
    html_card,
    load_tensors,
    read_json,
    remove_parts,
    save_tensors,
    sole_writer,
    write_atomically,
    write_json,
)


@pytest.mark.parametrize("call", ["fsync", "chmod", "replace"])
def test_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch, call):
    path = tmp_path / "deep" / "file"
    write_atomically(path, b"old")

    def fail(*args):
        raise OSError("no space")

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(OSError, match="no space"):
            write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in path.parent.iterdir()] == ["file"]
    write_atomically(str(path), b"new")
    assert path.read_bytes() == b"new"


def test_nobody_sees_half_a_file(tmp_path, monkeypatch):
    path, seen = tmp_path / "file", []
    write_atomically(path, b"old")
    replace = os.replace

    def look(source, target):
        seen.append((path.read_bytes(), Path(source).read_bytes(), Path(source).parent))
        replace(source, target)

    monkeypatch.setattr(os, "replace", look)
    write_atomically(path, b"new")
    # in the same folder, or the rename would not be atomic
    assert seen == [(b"old", b"new", tmp_path)]


def test_parts_are_removed_and_nothing_else(tmp_path):
    kept = [tmp_path / "a.part", tmp_path / ".hidden", tmp_path / "sub" / "file"]
    gone = [tmp_path / f".a.x{PART}", tmp_path / "sub" / f".b{PART}", tmp_path / "sub" / f".0001{PART}" / f".c{PART}"]
    for path in kept + gone:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    remove_parts(tmp_path)
    assert sorted(p for p in tmp_path.rglob("*") if p.is_file()) == sorted(kept)
    assert not (tmp_path / "sub" / f".0001{PART}").exists()


def test_one_writer_at_a_time(tmp_path):
    with sole_writer(tmp_path), pytest.raises(Locked, match="another process is writing"), sole_writer(tmp_path):
        pass
    with sole_writer(tmp_path):
        pass
    with pytest.raises(KeyError), sole_writer(tmp_path):
        raise KeyError
    with sole_writer(tmp_path):
        assert list(tmp_path.iterdir()) == []


def test_writer_that_died_does_not_block(tmp_path):
    import subprocess
    import sys

    lock = "handle = os.open(sys.argv[1], os.O_RDONLY); fcntl.flock(handle, fcntl.LOCK_EX)"
    script = f"import os, sys, fcntl; {lock}; print('locked', flush=True); sys.stdin.read()"
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "locked\n"
    with pytest.raises(Locked, match="another process is writing"), sole_writer(tmp_path):
        pass
    process.kill()
    process.wait()
    with sole_writer(tmp_path):
        pass


def test_file_system_without_locks(tmp_path, monkeypatch):
    import fcntl

    def refuse(*args):
        raise OSError(9, "Bad file descriptor")

    monkeypatch.setattr(fcntl, "flock", refuse)
    entered = False
    with sole_writer(tmp_path):
        entered = True
    assert entered  # work goes on unlocked instead of failing


def test_tensors_come_back_bit_for_bit_with_their_header(tmp_path):
    whole = torch.arange(24.0, dtype=torch.float64).view(2, 3, 4)
    tensors = {"a": whole[:, 1:].transpose(1, 2), "mask": torch.tensor([[True, False]]), "half": torch.tensor([0.1], dtype=torch.bfloat16)}
    save_tensors(tmp_path / "t.safetensors", tensors, {"kind": "numbers", "info": {"θ": [1, None]}})
    loaded, meta = load_tensors(tmp_path / "t.safetensors", "numbers")
    assert meta == {"kind": "numbers", "info": {"θ": [1, None]}}
    assert all(torch.equal(loaded[name], value) and loaded[name].dtype == value.dtype for name, value in tensors.items())
    with pytest.raises(CorruptFile, match="holds numbers, but a file of statistics was expected"):
        load_tensors(tmp_path / "t.safetensors", "statistics")
    with pytest.raises(FileNotFoundError, match=r"x\.safetensors does not exist: there is no file of statistics"):
        load_tensors(tmp_path / "x.safetensors", "statistics")


def test_truncated_at_any_byte(tmp_path):
    path = tmp_path / "t.safetensors"
    save_tensors(path, {"a": torch.arange(5.0)}, {"kind": "numbers"})
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(CorruptFile, match=r"t\.safetensors is corrupt or truncated"):
            load_tensors(path, "numbers")


@pytest.mark.parametrize("header", ["{", "[]", "3", "null", "[" * 100_000])
def test_broken_header(tmp_path, header):
    from safetensors.torch import save

    path = tmp_path / "t.safetensors"
    path.write_bytes(save({"a": torch.zeros(1)}, metadata={"sepcap": header}))
    with pytest.raises(CorruptFile, match=r"t\.safetensors"):
        load_tensors(path, "numbers")
    path.write_bytes(save({"a": torch.zeros(1)}))
    with pytest.raises(CorruptFile, match="holds nothing that sepcap wrote"):
        load_tensors(path, "numbers")


def test_any_bit_of_a_tensor_file_that_flips_is_seen(tmp_path):
    path = tmp_path / "t.safetensors"
    save_tensors(path, {"a": torch.arange(3.0), "mask": torch.tensor([True])}, {"kind": "numbers"})
    whole = path.read_bytes()
    for at in range(len(whole)):
        for bit in (0, 5):
            changed = bytearray(whole)
            changed[at] ^= 1 << bit
            path.write_bytes(changed)
            with pytest.raises(CorruptFile, match=r"t\.safetensors"):
                load_tensors(path, "numbers")


@pytest.mark.parametrize(
    ("load", "header", "said"),
    [
        (Clusters.load, {"kind": "clusters", "fingerprint": "f", "info": {}}, "k is missing"),
        (Clusters.load, {"kind": "clusters", "k": 0, "fingerprint": "f", "info": {}}, "k: "),
        (Clusters.load, {"kind": "clusters", "k": 2, "fingerprint": "f", "info": {}}, r"is corrupt \(labels: they range from 0 to 2"),
        (Rotation.load, {"kind": "rotation", "bias": "none", "source": "", "rotated": ""}, "bias: "),
        (Rotation.load, {"kind": "rotation", "bias": "fold", "source": "", "rotated": ""}, "incomplete rotation"),
        (Scores.load, {"kind": "scores", "info": {}, "sites": ["heads"]}, "the scores of 'heads' are missing"),
        (Statistics.load, {"kind": "statistics", "counts": {}, "info": {}, "gradients": {"mlp": 3}}, r"gradients\.mlp: "),
        (Statistics.load, {"kind": "statistics", "counts": {"mlp": 3}, "info": {}}, "mlp"),
        (lambda path: load_tensors(path, "rows"), {"kind": "rows", "columns": "n"}, "columns: "),
        (lambda path: load_tensors(path, "rows"), {"kind": "rows", "columns": [], "groups": {"forget": 3}}, r"groups\.forget: "),
    ],
)
def test_a_header_of_another_shape_names_file_and_field(load, header, said, tmp_path):
    path = tmp_path / "t.safetensors"
    save_tensors(path, {"labels": torch.tensor([[0, 1, 2]])}, header)
    with pytest.raises(CorruptFile, match=rf"t\.safetensors.*{said}"):
        load(path)


class Anything(TypedDict):
    __pydantic_config__ = ConfigDict(extra="allow", strict=True)  # pyright: ignore[reportGeneralTypeIssues]
    a: dict[str, bool]


def test_json(tmp_path):
    path = tmp_path / "a.json"
    value = {"b": [1, 0.1, None, "ü", float("inf")], "a": {"nested": True}}
    write_json(path, value)
    assert read_json(path, Anything) == value
    assert list(json.loads(path.read_text())) == ["b", "a", "sha256"]  # in the order in which it was written
    for broken in (b"", path.read_bytes()[:-3], b"\xff\xff", b"[" * 100_000, b'{"a":' * 100_000, b"9" * 5000):
        path.write_bytes(broken)
        with pytest.raises(CorruptFile, match=r"a\.json is corrupt or truncated"):
            read_json(path, Anything)


def test_a_flipped_bit_of_json_changes_nothing_or_is_seen(tmp_path):
    path, value = tmp_path / "a.json", {"b": [1, 0.1], "a": {"x": True}}
    write_json(path, value)
    whole = path.read_bytes()
    for at in range(len(whole)):
        changed = bytearray(whole)
        changed[at] ^= 1
        path.write_bytes(changed)
        # between two values, blanks may change
        with contextlib.suppress(CorruptFile):
            assert read_json(path, Anything) == value


def test_json_of_another_shape_names_file_and_field(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"a": {"x": 1}})
    with pytest.raises(CorruptFile, match=r"a\.json is corrupt: a\.x"):
        read_json(path, Anything)
    write_json(path, {"b": {}})
    with pytest.raises(CorruptFile, match=r"a\.json is corrupt: a is missing"):
        read_json(path, Anything)
    path.write_text("[1]")
    with pytest.raises(CorruptFile, match=r"a\.json is corrupt: it holds a list"):
        read_json(path, Anything)
    write_json(path, {"format": "other-1", "a": {}})
    with pytest.raises(CorruptFile, match=r"a\.json: format 'other-1' is not 'sepcap-4'"):
        read_json(path, Anything)


@pytest.mark.parametrize("kind", ["fifo", "device", "folder", "loop", "nothing"])
def test_what_is_no_regular_file_is_refused_at_once(tmp_path, kind):
    path = special(tmp_path / "a.json", kind)
    for read in (lambda: read_json(path, Anything), lambda: load_tensors(path, "numbers")):
        with pytest.raises((CorruptFile, OSError), match=r"a\.json"):
            read()
    if kind != "nothing":
        with pytest.raises(OSError, match=r"a\.json"):
            write_atomically(path, b"x")
        assert path.is_symlink() or not path.is_file()


def special(path: Path, kind: str) -> Path:
    """Something that is no regular file."""
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    elif kind == "loop":
        path.symlink_to(path.name)
    return path


def test_a_huge_file_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "a.json"
    with path.open("wb") as file:
        file.truncate(2**40)  # of zeros, and empty on the disk
    with pytest.raises(CorruptFile, match=r"a\.json is too large"):
        read_json(path, Anything)
    with pytest.raises(CorruptFile, match=r"a\.json"):
        load_tensors(path, "numbers")
    header = json.dumps(
        {"__metadata__": {"sepcap": '{"seal": "' + "0" * 64 + '"}'}, "a": {"dtype": "U8", "shape": [2**40], "data_offsets": [0, 2**40]}}
    )
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header.encode())
        file.truncate(8 + len(header) + 2**40)
    with pytest.raises(CorruptFile, match=r"a\.json holds 1,100 GB of tensors"):
        load_tensors(path, "numbers")


def test_a_link_is_followed_and_permissions_stay(tmp_path):
    target, link = tmp_path / "elsewhere" / "target", tmp_path / "link"
    target.parent.mkdir()
    target.write_bytes(b"old")
    target.chmod(0o640)
    link.symlink_to(target)
    write_atomically(link, b"new")
    assert link.is_symlink()
    assert target.read_bytes() == b"new"
    assert target.stat().st_mode & 0o777 == 0o640
    dangling = tmp_path / "dangling"
    dangling.symlink_to(target.with_name("to-be"))
    write_atomically(dangling, b"new")
    assert dangling.is_symlink()
    assert target.with_name("to-be").read_bytes() == b"new"


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_umask_is_respected(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        write_atomically(tmp_path / "file", b"")
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == mode


def test_a_full_disk_names_the_path_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match=r"No space left on device: .*file'"):
        write_atomically(tmp_path / "file", b"x")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("how", ["moved", "replaced", "deleted"])
def test_a_folder_that_goes_while_it_is_written_to_is_not_made_again(tmp_path, how):
    folder = tmp_path / "run"
    folder.mkdir()
    with sole_writer(folder):
        write_atomically(folder / "sub" / "one", b"1")
        (shutil.rmtree if how == "deleted" else partial(shutil.move, dst=tmp_path / "moved"))(folder)
        if how == "replaced":
            folder.mkdir()
        with pytest.raises(FileNotFoundError, match="was moved or deleted while it was written to"):
            write_atomically(folder / "sub" / "two", b"2")
        assert folder.exists() == (how == "replaced")
    if how == "replaced":
        assert list(folder.iterdir()) == []
    write_atomically(folder / "sub" / "two", b"2")  # afterwards it is a path like any other


def test_card_escapes_what_it_shows():
    card = html_card("<b>", {"task": "<script>"}, pd.DataFrame({"<i>": ["<u>"], "x": [0.123456]}))
    assert "<script>" not in card
    assert "&lt;u&gt;" in card
    assert "&lt;i&gt;" in card
    assert "0.1235" in card
