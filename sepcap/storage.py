"""Files: written atomically, with a seal that says whether they are still what was written, and read back with errors that help."""

import hashlib
import html
import json
import logging
import os
import re
import shutil
import stat
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, BinaryIO

from torch import Tensor

from sepcap.errors import CorruptFile

log = logging.getLogger(__name__)

PART = ".part"
"""How the name of everything that is not written to its end ends."""

FORMAT = "sepcap-2"
"""In every config.json: what wrote the folder. Raised when a folder of the one cannot be read as one of the other."""

MOST_JSON = 64 * 2**20
"""Bytes of the longest JSON that is read; the documents of a million rows fit."""

MOST_HEADER = 32 * 2**20
"""Bytes of the longest header of a safetensors file."""

BLOCK = 2**20

HELD: ContextVar[tuple[tuple[Path, int, int], ...]] = ContextVar("HELD", default=())
"""Folders that are being written to, each with its device and inode: a path that leads elsewhere now is not written to."""

SEAL = re.compile(rb'\{\\"seal\\": \\"([0-9a-f]{64})\\"')
"""Where the seal of a safetensors file stands in its header, which is JSON in JSON."""

UNSEALED = "0" * 64


def write_atomically(path: str | Path, data: bytes) -> None:
    """Write a file so that it is either the old one or the whole new one, also after a power cut.

    A link is followed: what it points to is written. The permissions are those of the file that was there, or what the umask leaves.
    A process killed in between leaves a hidden file that ends in `PART`.

    Raises:
        IsADirectoryError, FileExistsError: there is a folder, or something else that is no regular file.
        OSError: it cannot be written, as on a full disk; the path is named, and nothing half-written is left.
    """
    path = output_path(path)
    check_held(path.parent)
    target = Path(os.path.realpath(path))
    make_folder(target.parent)
    temporary = target.with_name(f".{target.name[:100]}.{uuid.uuid4().hex[:8]}{PART}")
    try:
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if target.exists():
            os.chmod(temporary, stat.S_IMODE(target.stat().st_mode))
        os.replace(temporary, target)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None:
            # what the system says names no file, or the one that was only begun
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def output_path(path: str | Path, example: str = "") -> Path:
    """Where a file is to be written, refused where there is something that is no regular file.

    Raises:
        IsADirectoryError: a folder; `example` is a name within it that would be right.
        FileExistsError: a device, FIFO or socket.
    """
    path = Path(path)
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return path
    if stat.S_ISDIR(mode):
        within = f", as in {str(path / example)!r}" if example else ""
        raise IsADirectoryError(f"path={str(path)!r} is a folder; give the name of the file to write{within}")
    if not stat.S_ISREG(mode):
        raise FileExistsError(f"path={str(path)!r} is a {_kind(mode)}, and only regular files are written; give another name")
    return path


def _kind(mode: int) -> str:
    kinds = {stat.S_IFIFO: "FIFO", stat.S_IFSOCK: "socket", stat.S_IFCHR: "device", stat.S_IFBLK: "device", stat.S_IFDIR: "folder"}
    return kinds.get(stat.S_IFMT(mode), "special file")


def make_folder(folder: Path) -> None:
    """Make a folder with all above it, but nothing in place of a folder that was there when the work began, see `check_held`."""
    check_held(folder)
    folder.mkdir(parents=True, exist_ok=True)


def check_held(folder: Path) -> None:
    """Whether what is being written to still lies where it did.

    Raises:
        FileNotFoundError: this folder, or one above it, was moved or deleted since `sole_writer` took it.
    """
    asked = Path(os.path.abspath(folder))
    for held, device, inode in HELD.get():
        if asked != held and held not in asked.parents:
            continue
        try:
            there = held.stat()
        except OSError:
            there = None
        if there is None or (there.st_dev, there.st_ino) != (device, inode):
            raise FileNotFoundError(
                f"{held} was moved or deleted while it was written to. What is done by now is where it went; put it back, "
                "and the same command goes on"
            )


def remove_parts(folder: Path) -> None:
    """Remove what writers that were killed have left in a folder; nobody else may be writing there."""
    for part in sorted(folder.rglob(f".*{PART}")):
        if part.is_dir() and not part.is_symlink():
            shutil.rmtree(part)
        else:
            part.unlink(missing_ok=True)


@contextmanager
def sole_writer(folder: Path) -> Iterator[None]:
    """Keep other processes from writing to a folder; the operating system lifts the lock when this one ends, however it does.

    The folder itself is locked, so nothing is left in it. Where the system or the file system has no such locks, none is taken.
    While it is held, nothing is written to its path when the folder itself has gone from there.
    """
    there = folder.stat()
    held = (Path(os.path.abspath(folder)), there.st_dev, there.st_ino)
    token = HELD.set((*HELD.get(), held))
    try:
        with _locked(folder):
            yield
    finally:
        HELD.reset(token)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    try:
        import fcntl
    except ImportError:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RuntimeError(f"another process is writing to {folder}: wait for it, stop it, or use another folder") from error
        except OSError as error:
            log.info("%s cannot be locked (%s)", folder, error)
        yield
    finally:
        os.close(handle)


@contextmanager
def open_regular(path: str | Path, what: str) -> Iterator[BinaryIO]:
    """A file opened to be read, where it is one; a FIFO would never end, nor would some devices.

    Raises:
        FileNotFoundError, IsADirectoryError: there is no file.
        CorruptFile: something that is no regular file, or cannot be read.
    """
    try:
        if stat.S_ISREG(os.stat(path).st_mode):
            with open(path, "rb") as file:
                yield file
            return
        mode = os.stat(path).st_mode
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} does not exist: there is no {what} to load") from error
    except OSError as error:
        raise CorruptFile(f"{path} cannot be read ({error.strerror})") from error
    if stat.S_ISDIR(mode):
        example = ", in a run for example steps/0003/neurons.safetensors" if what == "file of neurons" else ""
        raise IsADirectoryError(f"{path} is a folder; give a {what}{example}")
    raise CorruptFile(f"{path} is a {_kind(mode)} and no regular file; a {what} belongs there")


def sha256_of(path: Path) -> str:
    """SHA-256 of a regular file, as hexadecimal digits: what `sha256sum` gives."""
    digest = hashlib.sha256()
    with open_regular(path, "file") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def seals_of(folder: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """What is noted of files in a folder, so that a change of any of them is seen: their sizes and SHA-256."""
    return {name: {"bytes": (folder / name).stat().st_size, "sha256": sha256_of(folder / name)} for name in names}


def damage(folder: Path, name: str, seal: Mapping[str, Any]) -> str:
    """What has become of a file since `seals_of`, in words; empty where it is as it was.

    Args:
        folder: that `name` lies in.
        name: of the file.
        seal: what was noted of it.
    """
    path = folder / name
    try:
        there = path.stat()
    except OSError:
        return f"{path} is missing"
    if not stat.S_ISREG(there.st_mode):
        return f"{path} is a {_kind(there.st_mode)} and no regular file"
    if there.st_size != seal["bytes"]:
        return f"{path} is damaged: it has {there.st_size:,} bytes, and had {seal['bytes']:,} when it was written"
    if sha256_of(path) != seal["sha256"]:
        return f"{path} is damaged: its content is not what was written (SHA-256)"
    return ""


def save_tensors(path: str | Path, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """Tensors and a JSON header in one safetensors file, atomically, with the SHA-256 of all of it in the header."""
    from safetensors.torch import save

    on_cpu = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    # the header has one entry: of several, safetensors changes the order from call to call
    data = save(on_cpu, metadata={"sepcap": json.dumps({"seal": UNSEALED, **meta})})
    found = SEAL.search(data, 0, 8 + int.from_bytes(data[:8], "little"))
    assert found is not None
    write_atomically(path, data[: found.start(1)] + hashlib.sha256(data).hexdigest().encode() + data[found.end(1) :])


def load_tensors(path: str | Path, kind: str, needed: Iterable[str] = ()) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `save_tensors` wrote, checked to be of the kind asked for, unchanged, and with the tensors that are needed."""
    from safetensors import SafetensorError, safe_open

    from sepcap.schemas import HEADERS, Header, validated

    check_seal(path, kind)
    try:
        with safe_open(str(path), framework="pt") as file:
            meta = json.loads((file.metadata() or {}).get("sepcap", "{}"))
            held = meta.get("kind") if isinstance(meta, dict) else None
            if held != kind:
                raise CorruptFile(f"{path} holds {held or 'nothing that sepcap wrote'}, and a file of {kind} was asked for")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no iterator of its own)
    except (SafetensorError, ValueError, RecursionError, OSError) as error:
        raise _damaged(path, str(error)) from error
    for name in needed:
        if name not in tensors:
            raise CorruptFile(f"{path}: tensor {name!r} is missing: it was written by another version, which can read it")
    meta.pop("seal", None)
    return tensors, validated(HEADERS.get(kind, Header), meta, path)


def _damaged(path: str | Path, why: str) -> CorruptFile:
    return CorruptFile(f"{path} is corrupt or truncated ({why}); delete it and make it again")


def check_seal(path: str | Path, kind: str) -> None:
    """Compare a file with the SHA-256 in its header, block by block; nothing is kept of it."""
    with open_regular(path, f"file of {kind}") as file:
        size = os.fstat(file.fileno()).st_size
        first = file.read(8)
        length = int.from_bytes(first, "little")
        if len(first) < 8 or length > min(MOST_HEADER, size - 8):
            raise _damaged(path, "its header is not whole")
        header = file.read(length)
        found = SEAL.search(header)
        if found is None:
            if b"__metadata__" in header[:100] and b"sepcap" in header[:100]:
                raise _damaged(path, "its header is not what was written")
            return  # of another program; the kind says so
        _check_room(path, header, size - 8 - length)
        digest = hashlib.sha256(first + header[: found.start(1)] + UNSEALED.encode() + header[found.end(1) :])
        while block := file.read(BLOCK):
            digest.update(block)
    if digest.hexdigest().encode() != found[1]:
        raise _damaged(path, "its content is not what was written: SHA-256")


def _check_room(path: str | Path, header: bytes, size: int) -> None:
    """A header that promises other than what is there, and a file beyond all memory, which can be large and empty on the disk."""
    try:
        entries = [value for name, value in json.loads(header).items() if name != "__metadata__"]
        end = max((entry["data_offsets"][1] for entry in entries), default=0)
        lying = end != size
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
        raise _damaged(path, f"header: {error}") from error
    if lying:
        raise _damaged(path, f"it holds {size:,} bytes of tensors where its header promises {end:,}")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else size
    if size > memory:
        raise CorruptFile(f"{path} holds {size / 1e9:,.0f} GB of tensors, and this machine has {memory / 1e9:,.0f} GB of memory")


def read_json(path: str | Path, schema: Any) -> Any:
    """A JSON file that `write_json` wrote, checked: regular, not too long, unchanged since, and of the schema.

    Args:
        path: of the file.
        schema: one of `sepcap.schemas`.

    Raises:
        FileNotFoundError: there is none.
        CorruptFile: anything else; the path is named.
    """
    from sepcap.schemas import validated

    with open_regular(path, "file of JSON") as file:
        data = file.read(MOST_JSON + 1)
    if len(data) > MOST_JSON:
        raise CorruptFile(f"{path} is too large: a JSON of sepcap has at most {MOST_JSON:,} bytes")
    restore = "restore it or start again in another folder"
    try:
        value = json.loads(data)
        if not isinstance(value, dict):
            raise CorruptFile(f"{path} is corrupt: it holds a {type(value).__name__}, and should hold an object; {restore}")
        wrote = value.get("format", FORMAT)
        seal = value.pop("sha256", None)
        changed = seal != digest_of(value)
    except (ValueError, RecursionError) as error:
        what = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise CorruptFile(f"{path} is corrupt or truncated ({what}); {restore}") from error
    if wrote != FORMAT:
        raise CorruptFile(f"{path}: format {wrote!r} is not {FORMAT!r}: it was written by another version, which can read it")
    if changed:
        raise CorruptFile(f"{path} is damaged: it was changed after it was written (SHA-256); {restore}")
    return validated(schema, value, path)


def write_json(path: str | Path, value: Mapping[str, Any]) -> None:
    """JSON for people to read too, atomically, with the SHA-256 of what it holds at its end."""
    plain = json.loads(json.dumps(value))
    write_atomically(path, (json.dumps(plain | {"sha256": digest_of(plain)}, indent=2, sort_keys=False) + "\n").encode())


def digest_of(value: Any) -> str:
    """SHA-256 of what JSON can hold, in whatever order and layout it is written."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def html_card(title: str, how: Mapping[str, Any], table: Any) -> str:
    """A compact table with a line that says what it is and how it was made; every text escaped, no colours of its own."""
    made = " · ".join(f"{html.escape(str(k))}: {html.escape(_in_words(v))}" for k, v in how.items() if v is not None)
    body = table.to_html(index=False, escape=True, border=0, float_format=lambda x: f"{x:.4g}", na_rep="–")
    return f"<div><b>{html.escape(title)}</b> <small>{made}</small>{body}</div>"


def said_card(title: str, how: Mapping[str, Any], sentences: Iterable[str]) -> str:
    """What was found, in sentences, with a line that says what it is; every text escaped, no colours of its own."""
    made = " · ".join(f"{html.escape(str(k))}: {html.escape(_in_words(v))}" for k, v in how.items() if v)
    listed = "".join(f"<li>{html.escape(sentence)}</li>" for sentence in sentences)
    return f"<div><b>{html.escape(title)}</b> <small>{made}</small><ul>{listed}</ul></div>"


def _in_words(value: Any) -> str:
    if isinstance(value, Mapping):
        text = ", ".join(f"{k} {_in_words(v)}" for k, v in value.items())
    else:
        text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 120 else f"{text[:119]}…"
