"""Files: safetensors with JSON metadata, written atomically, and read back with errors that help."""

import html
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from sepcap.errors import CorruptFile

log = logging.getLogger(__name__)

PART = ".part"
"""How the name of everything that is not written to its end ends."""


def write_atomically(path: str | Path, data: bytes) -> None:
    """Write a file so that it is either the old one or the whole new one, also after a power cut.

    A process killed in between leaves a hidden file that ends in `PART`.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=PART)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def remove_parts(folder: Path) -> None:
    """Remove what writers that were killed have left in a folder; nobody else may be writing there."""
    for part in sorted(folder.rglob(f".*{PART}")):
        if part.is_dir():
            shutil.rmtree(part)
        else:
            part.unlink(missing_ok=True)


@contextmanager
def sole_writer(folder: Path) -> Iterator[None]:
    """Keep other processes from writing to a folder; the operating system lifts the lock when this one ends, however it does.

    The folder itself is locked, so nothing is left in it. Where the system or the file system has no such locks, none is taken.
    """
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


def save_tensors(path: str | Path, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """Tensors and a JSON header in one safetensors file, atomically."""
    from safetensors.torch import save

    on_cpu = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    write_atomically(path, save(on_cpu, metadata={"sepcap": json.dumps(meta)}))


def load_tensors(path: str | Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `save_tensors` wrote, checked to be of the kind asked for."""
    from safetensors import SafetensorError, safe_open

    if not Path(path).exists():
        raise FileNotFoundError(f"{path} does not exist: no file of {kind} to load")
    if Path(path).is_dir():
        raise IsADirectoryError(f"{path} is a folder; give a file of {kind}, in a run for example steps/0003/neurons.safetensors")
    try:
        with safe_open(str(path), framework="pt") as file:
            meta = json.loads((file.metadata() or {}).get("sepcap", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no iterator of its own)
    except (SafetensorError, json.JSONDecodeError, OSError) as error:
        raise CorruptFile(f"{path} is corrupt or truncated ({error}); delete it and make it again") from error
    held = meta.get("kind") if isinstance(meta, dict) else None
    if held != kind:
        raise CorruptFile(f"{path} holds {held or 'nothing that sepcap wrote'}, and a file of {kind} was asked for")
    return tensors, meta


def read_json(path: str | Path) -> Any:
    """A JSON file, or `CorruptFile` with its name."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CorruptFile(f"{path} is corrupt or truncated ({error}); restore it or start again in another folder") from error


def write_json(path: str | Path, value: Any) -> None:
    """JSON for people to read too, atomically."""
    write_atomically(path, (json.dumps(value, indent=2, sort_keys=False) + "\n").encode())


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
