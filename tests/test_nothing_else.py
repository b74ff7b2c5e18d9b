"""Nothing runs and nothing is written that was not asked for: no process, no connection, no file beside the user's or outside a cache."""

import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import save_tiny, tiny_tokenizer, words
from encoders import save_masked, save_vit
from tiny import write_jsonl

import sepcap

PROCESSES = ("subprocess.Popen", "os.system", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "pty.spawn")
CONNECTIONS = ("socket.connect", "socket.bind", "socket.sendto", "socket.getaddrinfo", "socket.gethostbyname", "urllib.Request")
CHANGES = {
    **dict.fromkeys(("os.mkdir", "os.remove", "os.rmdir", "os.chmod", "os.chown", "os.truncate", "os.utime", "shutil.rmtree"), (0,)),
    **dict.fromkeys(("os.rename", "os.link", "os.symlink", "shutil.copyfile", "shutil.move", "shutil.copytree"), (0, 1)),
    **dict.fromkeys(("shutil.unpack_archive", "shutil.make_archive", "sqlite3.connect"), (0,)),
}
"""Event -> which of its arguments are paths that it changes."""

IN_A_FOLDER = ("os.mkdir", "os.remove", "os.rmdir")
"""Events whose last argument is the number of an open folder."""


class Watch:
    """An audit hook that remembers what is forbidden. Hooks stay as long as the interpreter; this one looks only while it is asked to."""

    def __init__(self) -> None:
        self.allowed: tuple[Path, ...] | None = None
        self.found: list[str] = []
        sys.addaudithook(self.see)

    def see(self, event: str, args: tuple) -> None:
        if self.allowed is None:
            return
        if event in PROCESSES or event in CONNECTIONS:
            self.found.append(f"{event} {args!r:.200}")
        elif event == "open" and self.writes(args):
            self.check(event, args[0])
        else:
            for i in CHANGES.get(event, ()):
                self.check(event, self.within(args[i], args[-1]) if event in IN_A_FOLDER else args[i])

    @staticmethod
    def writes(args: tuple) -> bool:
        _, mode, flags = args
        return bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND)) or bool(set(mode or "") & set("wax+"))

    @staticmethod
    def within(path: Any, folder: int) -> Any:
        """A path of an event that names an open folder by its number, as those of `shutil.rmtree` do; -1 is the working folder."""
        if folder == -1 or not os.path.isdir("/proc/self/fd"):
            return path
        return os.path.join(os.readlink(f"/proc/self/fd/{folder}"), os.fsdecode(path))

    def check(self, event: str, path: str | bytes | os.PathLike | int) -> None:
        if isinstance(path, int):  # an open file, by its number: its opening was looked at
            return
        at = Path(os.path.abspath(os.fsdecode(path)))
        compiled = at.suffix == ".pyc" or ".pyc." in at.name or at.name == "__pycache__" or at.is_relative_to(sys.pycache_prefix or "/none")
        if not (compiled or str(at) == os.devnull or any(at.is_relative_to(folder) for folder in self.allowed or ())):
            self.found.append(f"{event} {at}")


@pytest.fixture(scope="session")
def watch():
    return Watch()


def state(folder: Path) -> dict[str, tuple]:
    """Every file and folder with its bytes and times."""
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.stat().st_mode, path.read_bytes() if path.is_file() else None)
        for path in [folder, *sorted(folder.rglob("*"))]
    }


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A folder of the user's, and an empty one to work in, which is the home folder too."""
    import datasets

    folder, work, cache = (tmp_path / name for name in ("mine", "work", "cache"))
    for one in (folder, work, cache):
        one.mkdir()
    save_tiny("opt", folder / "model")
    texts = words(5, n=60, length=8)
    (folder / "texts").mkdir()
    for i, text in enumerate(texts):
        (folder / "texts" / f"{i}.txt").write_text(text)
    (folder / "rows").mkdir()
    write_jsonl(folder / "rows" / "some.jsonl", texts)
    datasets.Dataset.from_dict({"text": texts}).save_to_disk(folder / "saved")
    monkeypatch.chdir(work)
    monkeypatch.setenv("HOME", str(work))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "cache"))
    monkeypatch.setattr("tempfile.tempdir", str(cache))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", cache)
    return folder


def with_images(folder: Path) -> Path:
    """A model for text and images, of which transformers' processors want more packages than there are."""
    import transformers

    sizes = {"num_hidden_layers": 1, "intermediate_size": 32, "num_attention_heads": 2}
    text = {"vocab_size": 320, "hidden_size": 32, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, **sizes}
    vision = {"hidden_size": 16, "image_size": 28, "patch_size": 14, **sizes}
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=319)
    config.architectures = ["Gemma3ForConditionalGeneration"]
    config.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def everything(folder: Path) -> None:
    model = sepcap.load_model(folder / "model", device="cpu")
    for texts in ("texts", "rows", "saved"):
        retain = sepcap.collect(model, str(folder / texts), tokens=100, context=16)
        sepcap.evaluate(model, str(folder / texts), tokens=100, context=16)
    with sepcap.ablate(model, sepcap.NeuronSet.random(model, {"mlp": 0.3}, seed=0), "mean", reference=retain):
        sepcap.evaluate(model, str(folder / "texts"), tokens=100, context=16)
    with pytest.raises(NotImplementedError, match="takes images or sound besides text"):
        sepcap.load_model(folder / "images", device="cpu")


def other_models(folder: Path) -> None:
    """A masked model and an image classifier, which have processors and classes of their own to ask for."""
    masked = sepcap.load_model(folder / "masked", device="cpu")
    sepcap.evaluate(masked, str(folder / "rows"), tokens=100, context=16)
    sepcap.load_model(folder / "vit", device="cpu")


@pytest.mark.parametrize("do", [everything, other_models])
def test_loading_and_measuring_change_nothing_and_ask_nobody(mine, watch, tmp_path, monkeypatch, do):
    """Online: what would ask the hub, if it were not told to be offline, opens a connection."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    if do is everything:
        with_images(mine / "images")
    else:
        save_masked("roberta", mine / "masked")
        save_vit(mine / "vit")
    before = state(mine)
    watch.allowed, watch.found = (tmp_path / "cache",), []
    try:
        do(mine)
    finally:
        watch.allowed = None
    assert watch.found == []
    assert state(mine) == before
    assert list((tmp_path / "work").rglob("*")) == []


FORBIDDEN = {
    "a process": (lambda folder: os.system("true"), "os.system"),
    "a program": (lambda folder: subprocess.run(["true"]), "subprocess.Popen"),
    "a connection": (lambda folder: _connect(), "socket.connect"),
    "a file beside the user's": (lambda folder: (folder / "texts" / "cache.arrow").write_text("x"), "open .*cache.arrow"),
    "a file opened by its flags": (lambda folder: os.close(os.open(folder / "x", os.O_CREAT | os.O_WRONLY)), "open .*mine/x"),
    "a folder": (lambda folder: (folder / "new").mkdir(), "os.mkdir .*new"),
    "another name": (lambda folder: (folder / "texts" / "1.txt").rename(folder / "texts" / "z"), "os.rename .*1.txt"),
    "a copy": (lambda folder: shutil.copyfile(folder / "texts" / "1.txt", folder / "copy"), "shutil.copyfile .*copy"),
    "fewer files": (lambda folder: (folder / "texts" / "1.txt").unlink(), "os.remove .*1.txt"),
}


def _connect() -> None:
    with socket.socket() as one:
        one.settimeout(0.1)
        one.connect_ex(("127.0.0.1", 9))


@pytest.mark.parametrize("what", FORBIDDEN)
def test_the_watch_sees_what_is_forbidden(mine, watch, what):
    do, seen = FORBIDDEN[what]
    watch.allowed, watch.found = (), []
    try:
        do(mine)
    finally:
        watch.allowed = None
    assert [found for found in watch.found if re.match(seen, found)]
