"""Files: written atomically, with a seal that reveals later changes, and read back with helpful errors."""

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
"""Suffix of the names of files and folders that are not completely written."""

FORMAT = "sepcap-4"
"""Format version in every config.json. It is raised when a folder of one version cannot be read as one of the other."""

MOST_JSON = 64 * 2**20
"""Size of the longest JSON that is read, in bytes; the documents of a million rows fit."""

MOST_HEADER = 32 * 2**20
"""Size of the longest header of a safetensors file, in bytes."""

BLOCK = 2**20

HELD: ContextVar[tuple[tuple[Path, int, int], ...]] = ContextVar("HELD", default=())
"""Folders being written to, each with its device and inode: if a path now leads to another folder, nothing is written to it."""

SEAL = re.compile(rb'\{\\"seal\\": \\"([0-9a-f]{64})\\"')
"""The seal of a safetensors file in its header, which is JSON inside JSON."""

UNSEALED = "0" * 64


def write_atomically(path: str | Path, data: bytes) -> None:
    """Write a file so that either the old file or the complete new one exists, even after a power cut.

    A link is followed: its target is written. An existing file keeps its permissions; a new one gets those that the umask allows.
    A process killed while writing leaves a hidden file whose name ends in `PART`.

    Raises:
        IsADirectoryError, FileExistsError: the path is a folder, or something else that is not a regular file.
        OSError: the file cannot be written, as on a full disk; the error names the path, and no partial file is left.
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
            # the system's error names no file, or the temporary one
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def output_path(path: str | Path, example: str = "") -> Path:
    """Path of a file to write; anything that exists there must be a regular file.

    Raises:
        IsADirectoryError: the path is a folder; `example` is a valid name within it.
        FileExistsError: the path is a device, FIFO or socket.
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
        raise FileExistsError(f"path={str(path)!r} is a {_kind(mode)}, but only regular files are written; give another name")
    return path


def _kind(mode: int) -> str:
    kinds = {stat.S_IFIFO: "FIFO", stat.S_IFSOCK: "socket", stat.S_IFCHR: "device", stat.S_IFBLK: "device", stat.S_IFDIR: "folder"}
    return kinds.get(stat.S_IFMT(mode), "special file")


def make_folder(folder: Path) -> None:
    """Make a folder and its parents, but never in place of a held folder that was moved or deleted, see `check_held`."""
    check_held(folder)
    folder.mkdir(parents=True, exist_ok=True)


def check_held(folder: Path) -> None:
    """Raise if a folder that is being written to is no longer at its path.

    Raises:
        FileNotFoundError: this folder, or one above it, was moved or deleted since `sole_writer` locked it.
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
                f"{held} was moved or deleted while it was written to. The work done so far moved with it; put it back, "
                "and the same command resumes"
            )


def remove_parts(folder: Path) -> None:
    """Remove the partial files that killed writers have left in a folder; no other process may be writing there."""
    for part in sorted(folder.rglob(f".*{PART}")):
        if part.is_dir() and not part.is_symlink():
            shutil.rmtree(part)
        else:
            part.unlink(missing_ok=True)


class Locked(RuntimeError):
    """Another process is writing to a folder."""


@contextmanager
def sole_writer(folder: Path) -> Iterator[None]:
    """Keep other processes from writing to a folder; the operating system releases the lock when this one ends, however it ends.

    The folder itself is locked, so nothing is left in it. If the system or the file system has no such locks, none is taken.
    While the lock is held, nothing is written to the path once the folder itself was moved or deleted.
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
    """Open a regular file for reading; reading a FIFO, or some devices, would never end.

    Raises:
        FileNotFoundError, IsADirectoryError: the path does not exist, or is a folder.
        CorruptFile: the path is not a regular file, or cannot be read.
    """
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISREG(mode):
            with open(path, "rb") as file:
                yield file
            return
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} does not exist: there is no {what} to load") from error
    except OSError as error:
        raise CorruptFile(f"{path} cannot be read ({error.strerror})") from error
    if stat.S_ISDIR(mode):
        example = ", in a run such as steps/0003/neurons.safetensors" if what == "file of neurons" else ""
        raise IsADirectoryError(f"{path} is a folder; give a {what}{example}")
    raise CorruptFile(f"{path} is a {_kind(mode)}, not a regular file; a {what} is expected there")


def sha256_of(path: Path) -> str:
    """SHA-256 of a regular file, as hexadecimal digits, as `sha256sum` prints it."""
    digest = hashlib.sha256()
    with open_regular(path, "file") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def seals_of(folder: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Sizes and SHA-256 of files in a folder, by which later changes are detected."""
    return {name: {"bytes": (folder / name).stat().st_size, "sha256": sha256_of(folder / name)} for name in names}


def damage(folder: Path, name: str, seal: Mapping[str, Any]) -> str:
    """How a file has changed since `seals_of`, in words; empty if it has not.

    Args:
        folder: the folder that contains the file.
        name: name of the file.
        seal: its entry of `seals_of`.
    """
    path = folder / name
    try:
        there = path.stat()
    except OSError:
        return f"{path} is missing"
    if not stat.S_ISREG(there.st_mode):
        return f"{path} is a {_kind(there.st_mode)}, not a regular file"
    if there.st_size != seal["bytes"]:
        return f"{path} is damaged: it has {there.st_size:,} bytes, but had {seal['bytes']:,} when it was written"
    if sha256_of(path) != seal["sha256"]:
        return f"{path} is damaged: its content has changed since it was written (SHA-256)"
    return ""


def save_tensors(path: str | Path, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """Write tensors and a JSON header to one safetensors file, atomically, with the SHA-256 of all of it in the header."""
    from safetensors.torch import save

    on_cpu = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    # the header has one entry: with several, safetensors changes their order from call to call
    data = save(on_cpu, metadata={"sepcap": json.dumps({"seal": UNSEALED, **meta})})
    found = SEAL.search(data, 0, 8 + int.from_bytes(data[:8], "little"))
    assert found is not None
    write_atomically(path, data[: found.start(1)] + hashlib.sha256(data).hexdigest().encode() + data[found.end(1) :])


def load_tensors(path: str | Path, kind: str, needed: Iterable[str] = ()) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a file of `save_tensors`, checked to be of the expected kind, unchanged, and to contain the needed tensors."""
    from safetensors import SafetensorError, safe_open

    from sepcap.schemas import HEADERS, Header, validated

    check_seal(path, kind)
    try:
        with safe_open(str(path), framework="pt") as file:
            meta = json.loads((file.metadata() or {}).get("sepcap", "{}"))
            held = meta.get("kind") if isinstance(meta, dict) else None
            if held != kind:
                raise CorruptFile(f"{path} holds {held or 'nothing that sepcap wrote'}, but a file of {kind} was expected")
            names = file.keys()
            tensors = {name: file.get_tensor(name) for name in names}
    except (SafetensorError, ValueError, RecursionError, OSError) as error:
        raise _damaged(path, str(error)) from error
    for name in needed:
        if name not in tensors:
            raise CorruptFile(f"{path}: tensor {name!r} is missing: the file was written by another version of sepcap, which can read it")
    meta.pop("seal", None)
    return tensors, validated(HEADERS.get(kind, Header), meta, path)


def _damaged(path: str | Path, why: str) -> CorruptFile:
    return CorruptFile(f"{path} is corrupt or truncated ({why}); delete it and recreate it")


def check_seal(path: str | Path, kind: str) -> None:
    """Compare a file with the SHA-256 in its header, block by block, without keeping its content in memory."""
    with open_regular(path, f"file of {kind}") as file:
        size = os.fstat(file.fileno()).st_size
        first = file.read(8)
        length = int.from_bytes(first, "little")
        if len(first) < 8 or length > min(MOST_HEADER, size - 8):
            raise _damaged(path, "its header is incomplete")
        header = file.read(length)
        found = SEAL.search(header)
        if found is None:
            if b"__metadata__" in header[:100] and b"sepcap" in header[:100]:
                raise _damaged(path, "its header has changed since it was written")
            return  # a file of another program, which the check of the kind rejects
        _check_room(path, header, size - 8 - length)
        digest = hashlib.sha256(first + header[: found.start(1)] + UNSEALED.encode() + header[found.end(1) :])
        while block := file.read(BLOCK):
            digest.update(block)
    if digest.hexdigest().encode() != found[1]:
        raise _damaged(path, "its content has changed since it was written: SHA-256")


def _check_room(path: str | Path, header: bytes, size: int) -> None:
    """Raise if the header does not match the size of the file, or if the file, which may be sparse, exceeds the machine's memory."""
    try:
        entries = [value for name, value in json.loads(header).items() if name != "__metadata__"]
        end = max((entry["data_offsets"][1] for entry in entries), default=0)
        lying = end != size
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
        raise _damaged(path, f"header: {error}") from error
    if lying:
        raise _damaged(path, f"it holds {size:,} bytes of tensors, but its header declares {end:,}")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else size
    if size > memory:
        raise CorruptFile(f"{path} holds {size / 1e9:,.0f} GB of tensors, but this machine has {memory / 1e9:,.0f} GB of memory")


def read_json(path: str | Path, schema: Any) -> Any:
    """Read a file of `write_json`, checked to be regular, not too long, unchanged and valid under the schema.

    Args:
        path: path of the file.
        schema: one of `sepcap.schemas`.

    Raises:
        FileNotFoundError: the file does not exist.
        CorruptFile: any other fault; the error names the path.
    """
    from sepcap.schemas import validated

    with open_regular(path, "file of JSON") as file:
        data = file.read(MOST_JSON + 1)
    if len(data) > MOST_JSON:
        raise CorruptFile(f"{path} is too large: a JSON file of sepcap has at most {MOST_JSON:,} bytes")
    restore = "restore it or start again in another folder"
    try:
        value = json.loads(data)
        if not isinstance(value, dict):
            raise CorruptFile(f"{path} is corrupt: it holds a {type(value).__name__}, but should hold an object; {restore}")
        wrote = value.get("format", FORMAT)
        seal = value.pop("sha256", None)
        changed = seal != digest_of(value)
    except (ValueError, RecursionError) as error:
        what = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise CorruptFile(f"{path} is corrupt or truncated ({what}); {restore}") from error
    if wrote != FORMAT:
        raise CorruptFile(f"{path}: format {wrote!r} is not {FORMAT!r}: it was written by another version of sepcap, which can read it")
    if changed:
        raise CorruptFile(f"{path} is damaged: it was changed after it was written (SHA-256); {restore}")
    return validated(schema, value, path)


def write_json(path: str | Path, value: Mapping[str, Any]) -> None:
    """Write human-readable JSON, atomically, with the SHA-256 of its content at its end."""
    plain = json.loads(json.dumps(value))
    write_atomically(path, (json.dumps(plain | {"sha256": digest_of(plain)}, indent=2, sort_keys=False) + "\n").encode())


def digest_of(value: Any) -> str:
    """SHA-256 of a JSON value, independent of the order and layout in which it is written."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def html_card(title: str, how: Mapping[str, Any], table: Any) -> str:
    """A compact HTML table with a line that states its title and settings; all text is escaped, no colours are set."""
    body = table.to_html(index=False, escape=True, border=0, float_format=lambda x: f"{x:.4g}", na_rep="–")
    return _card(title, {name: value for name, value in how.items() if value is not None}, body)


def said_card(title: str, how: Mapping[str, Any], sentences: Iterable[str]) -> str:
    """Findings as a list of sentences in HTML, with a line that states title and settings; all text is escaped, no colours are set."""
    listed = "".join(f"<li>{html.escape(sentence)}</li>" for sentence in sentences)
    return _card(title, {name: value for name, value in how.items() if value}, f"<ul>{listed}</ul>")


def _card(title: str, how: Mapping[str, Any], body: str) -> str:
    made = " · ".join(f"{html.escape(str(k))}: {html.escape(_in_words(v))}" for k, v in how.items())
    return f"<div><b>{html.escape(title)}</b> <small>{made}</small>{body}</div>"


def _in_words(value: Any) -> str:
    if isinstance(value, Mapping):
        text = ", ".join(f"{k} {_in_words(v)}" for k, v in value.items())
    else:
        text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 120 else f"{text[:119]}…"
