"""Texts from files: the same text from every file format, and errors that name the file and the line or row.

Lines are read and parsed here, not by a library that would treat a path as a pattern, crash on deep nesting, or write its own files
next to the user's. Endless files are not read, and files are not unpacked without a bound.
"""

import contextlib
import csv
import gzip
import hashlib
import io
import json
import os
import stat
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sepcap.errors import missing_extra, unknown
from sepcap.tasks.sources.quiet import quietly

KINDS = {".txt": "text", ".jsonl": "JSON", ".json": "JSON", ".csv": "CSV", ".parquet": "Parquet", ".arrow": "Arrow"}
"""How a file is read, by suffix."""

PACKED = (".gz", ".zst")
"""Suffixes of packed files, which may follow the suffix of a file of lines."""

READ = ".txt, .jsonl, .csv, .parquet or .arrow"
"""Suffixes listed in error messages."""

OF_DATASETS = ("dataset_info.json", "state.json", "dataset_dict.json")
"""Files that `datasets` writes next to its data."""

LONGEST_FILE = 2**30
"""Maximum bytes of a .txt file, which is one document."""

LONGEST_LINE = 2**26
"""Maximum bytes of one line of JSON or one field of CSV."""

FREE, RATIO = 2**26, 200
"""A file may unpack to this many bytes, or to this many times its size: text packs to a third or a tenth."""

MARKED = "utf-8-sig"
"""UTF-8 that may begin with a byte order mark."""

VERSION = 2
"""Increased when the way files are read changes, so that no cache returns the old texts."""

Row = tuple[str, Mapping[str, Any]]
"""Location of a row, and its columns."""


def text_files(path: Path) -> list[Path]:
    """The file itself, or all text files below a folder, except hidden ones.

    Raises:
        ValueError: neither a file nor a folder, no file that can be read, or several kinds of file.
    """
    mode = path.stat().st_mode
    files = sorted(_below(path)) if stat.S_ISDIR(mode) else [path]
    for file in files:
        try:
            regular = stat.S_ISREG(file.stat().st_mode)
        except OSError as error:
            raise ValueError(f"{file} cannot be read: {error.strerror}. Is it a broken link?") from error
        if not regular:
            raise ValueError(f"{file} is not a regular file but a device, a pipe or a socket; give a file or a folder")
    kinds = {_kind(file)[0] for file in files}
    if not files or None in kinds:
        raise ValueError(f"{path} is not a {READ} file and contains none")
    if len(kinds) > 1:
        raise ValueError(f"{path} mixes {sorted(map(str, kinds))} files; give files of one kind")
    return files


def _below(folder: Path) -> Iterator[Path]:
    seen: set[tuple[int, int]] = set()

    def stop(error: OSError) -> None:
        raise error

    for place, subfolders, names in os.walk(folder, followlinks=True, onerror=stop):
        here = os.stat(place)
        if (here.st_dev, here.st_ino) in seen:  # a link back to a folder that was already visited
            subfolders.clear()
            continue
        seen.add((here.st_dev, here.st_ino))
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for name in names:
            file = Path(place, name)
            if not name.startswith(".") and name not in OF_DATASETS and _kind(file)[0] is not None:
                yield file


def _kind(file: Path) -> tuple[str | None, str]:
    """How a file is read, and how it is packed."""
    name, packed = file.name.lower(), ""
    if name.endswith(PACKED):
        name, packed = name.rsplit(".", 1)
        packed = f".{packed}"
    kind = KINDS.get(Path(name).suffix)
    return (None, "") if packed and kind in ("Parquet", "Arrow") else (kind, packed)


def name_of(path: Path) -> str:
    """The name of a file without its format suffixes, or of a folder."""
    name = Path(path.stem) if path.name.lower().endswith(PACKED) else path
    return name.stem


def read_files(path: Path, column: str | None = None) -> Any:
    """All texts of a file or of the files of a folder, as a `datasets.Dataset` with the column `text`; each .txt file is one document.

    A copy is kept in the cache of `datasets`, keyed by the paths, sizes and times of the files.

    Args:
        path: a .txt, .jsonl, .json, .csv, .parquet or .arrow file (all but the last two also packed: .gz, .zst), or a folder with one kind.
        column: column with the texts; default is `text`, else the only column of strings.

    Raises:
        ValueError: a file cannot be read; the error names the file and the line or row.
        TypeError: the text of a row is not a string.
    """
    import datasets
    from datasets.exceptions import DatasetGenerationError

    files = text_files(path)
    states = [(os.path.abspath(file), s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino) for file in files for s in (file.stat(),)]
    key = hashlib.sha256(repr((VERSION, states, column)).encode(errors="surrogateescape")).hexdigest()[:16]
    features = datasets.Features({"text": datasets.Value("large_string")})
    if next(_texts(files, column), None) is None:
        raise ValueError(f"{path} has no text: it contains no rows")
    try:
        return quietly(datasets.Dataset.from_generator, lambda: _texts(files, column), features=features, fingerprint=key)
    except DatasetGenerationError as error:
        raise (error.__cause__ or error) from None


def read_text(file: Path) -> str:
    """The text of a .txt file: UTF-8, with or without a byte order mark; lines end in \\n, and a final line end is removed.

    Raises:
        ValueError: not UTF-8, or larger than `LONGEST_FILE`.
    """
    with _opened(file) as stream:
        data = stream.read(LONGEST_FILE + 1)
    if len(data) > LONGEST_FILE:
        raise ValueError(f"{file} is larger than {LONGEST_FILE >> 20} MB, and a .txt file is one document; split it into several")
    return unix_lines(_decoded(data, str(file), MARKED)).removesuffix("\n")


def unix_lines(text: str) -> str:
    """The text with lines that end in \\n: the same text gives the same tokens, whatever container on a disk it is read from.

    >>> unix_lines("one\\r\\ntwo\\rthree")
    'one\\ntwo\\nthree'
    """
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


def _texts(files: Sequence[Path], column: str | None) -> Iterator[dict[str, str]]:
    asked = column is not None
    for file in files:
        kind, _ = _kind(file)
        if kind == "text":
            yield {"text": read_text(file)}
            continue
        allowed = max(FREE, RATIO * file.stat().st_size)
        for where, row in _ROWS[str(kind)](file, column if asked else None):
            column = _column_in(row, column, asked, where)
            text = checked_text(row[column], where, column)
            allowed -= len(text)
            if allowed < 0:
                raise _too_much(file)
            yield {"text": unix_lines(text)}


def _too_much(file: Path) -> ValueError:
    return ValueError(f"{file} unpacks to more than {RATIO} times its size, which no text does; reading stopped")


def _column_in(row: Mapping[str, Any], column: str | None, asked: bool, where: str) -> str:
    """The column of the texts. If not named, it must be the only candidate in every row; otherwise the first row would decide."""
    strings = [name for name, value in row.items() if isinstance(value, str)]
    if column is None:
        return next(iter(row)) if len(row) == 1 else choose_column(list(row), strings, None, where)
    if not asked and column != "text" and ("text" in row or set(strings) - {column}):
        raise ValueError(f"{where} has texts in other columns than {column!r}: {strings}. Specify which to read: load_task(path, column=…)")
    if column not in row:
        raise unknown("column", column, row, f"({where})")
    return column


def checked_text(value: Any, where: str, column: str) -> str:
    """The value itself, if it is a text.

    Raises:
        TypeError: a number, None, a list, ….
        ValueError: half a character (a lone surrogate), which no tokenizer accepts.
    """
    if not isinstance(value, str):
        raise TypeError(f"{where} of column {column!r} is a {type(value).__name__}, not a text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where} of column {column!r} contains half a character, {value[error.start]!r}, which is not text") from None
    return value


def choose_column(names: Sequence[str], strings: Sequence[str], column: str | None, where: str = "the dataset") -> str:
    """The column with the texts: the one asked for, else `text`, else the only column of strings.

    Raises:
        ValueError: no such column; the error lists the columns.
    """
    if column is not None:
        if column not in names:
            raise unknown("column", column, names)
        return column
    if "text" in names:
        return "text"
    if len(strings) == 1:
        return strings[0]
    shown = list(names) if len(names) <= 20 else [*names[:20], "…"]
    raise ValueError(
        f"{where} has no column named 'text'; the columns are {shown}. Specify which one contains the texts: load_task(data, column=...)"
    )


# --- lines ------------------------------------------------------------------------------------------


class _Bounded(io.RawIOBase):
    """An unpacked stream that raises an error once it exceeds the bound for a file of this size."""

    def __init__(self, stream: Any, left: int, file: Path) -> None:
        self._stream, self._left, self._file = stream, left, file

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._stream.read(len(buffer))
        self._left -= len(data)
        if self._left < 0:
            raise _too_much(self._file)
        buffer[: len(data)] = data
        return len(data)


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[Any]:
    packed = _kind(file)[1]
    with file.open("rb") as raw:
        if not packed:
            yield raw
            return
        unpacked, errors = _unpacked(raw, packed, file)
        try:
            yield io.BufferedReader(_Bounded(unpacked, max(FREE, RATIO * file.stat().st_size), file))
        except errors as error:
            raise ValueError(f"{file} cannot be unpacked: {error}. Is it complete?") from error


def _unpacked(raw: Any, packed: str, file: Path) -> tuple[Any, tuple[type[Exception], ...]]:
    """The unpacked stream, and the exceptions that reading it raises if the file is damaged."""
    if packed == ".gz":
        return gzip.GzipFile(fileobj=raw), (EOFError, zlib.error, gzip.BadGzipFile)
    try:
        import zstandard
    except ImportError as error:
        raise missing_extra("zstandard", "hub", f"reading {file}") from error
    return zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True), (zstandard.ZstdError,)


def _decoded(data: bytes, where: str, encoding: str = "utf-8") -> str:
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        byte = f"byte {data[error.start]:#04x} at {error.start:,}"
        raise ValueError(f"{where} cannot be read: it is not UTF-8 ({byte}: {error.reason}); convert it first") from error


def _lines(file: Path, stream: Any) -> Iterator[tuple[str, str]]:
    encoding, number = MARKED, 0
    while line := stream.readline(LONGEST_LINE + 1):
        number += 1
        where = f"{file}, line {number}"
        if len(line) > LONGEST_LINE:
            raise ValueError(f"{where} is longer than {LONGEST_LINE >> 20} MB; split it into several")
        yield where, _decoded(line, where, encoding)
        encoding = "utf-8"


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError(f"{where} is nested too deeply to be read") from None
    except ValueError as error:
        raise ValueError(f"{where} cannot be read as JSON: {error}") from error


def _json_rows(file: Path, column: str | None) -> Iterator[Row]:
    listed = file.name.lower().removesuffix(_kind(file)[1]).endswith(".json")
    with _opened(file) as stream:
        for where, line in _lines(file, stream):
            if not line.strip():
                continue
            if listed and line.lstrip().startswith("["):  # one list of all rows
                rest = stream.read(LONGEST_LINE + 1)
                if len(rest) > LONGEST_LINE:
                    raise ValueError(f"{file} is one list longer than {LONGEST_LINE >> 20} MB; write one row per line (.jsonl)")
                rows = _parsed(line + _decoded(rest, str(file)), str(file))
                yield from ((f"{file}, entry {i}", _object(row, f"{file}, entry {i}")) for i, row in enumerate(rows))
                return
            yield where, _object(_parsed(line, where), where)


def _object(row: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(row, dict):
        raise ValueError(f'{where} cannot be read as a row: it is a {type(row).__name__}, not an object such as {{"text": "…"}}')
    return row


def _csv_rows(file: Path, column: str | None) -> Iterator[Row]:
    before, where = csv.field_size_limit(LONGEST_LINE), f"{file}, line 1"
    try:
        with _opened(file) as stream:
            reader = csv.reader((line for _, line in _lines(file, stream)), strict=True)
            header = next(reader, [])
            if len(set(header)) < len(header):
                raise ValueError(f"{file}, line 1 names a column twice: {header[:20]}")
            for fields in reader:
                where = f"{file}, line {reader.line_num}"
                if fields and len(fields) != len(header):
                    raise ValueError(f"{where} has {len(fields)} fields, but the first line names {len(header)} columns")
                if fields:
                    yield where, dict(zip(header, fields, strict=True))
    except csv.Error as error:
        raise ValueError(f"{where} or the row after it cannot be read as CSV: {error}") from error
    finally:
        csv.field_size_limit(before)


# --- tables -----------------------------------------------------------------------------------------


def _table_rows(file: Path, column: str | None) -> Iterator[Row]:
    import pyarrow

    row = 0
    try:
        name, batches = (_parquet if _kind(file)[0] == "Parquet" else _arrow)(file, column)
        for batch in batches:
            batch.validate(full=True)
            for i in range(batch.num_rows):
                yield f"{file}, row {row}", {name: batch.column(name)[i].as_py()}
                row += 1
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{file} cannot be read as {_kind(file)[0]}, row {row} or before it: {error}") from error


def _parquet(file: Path, column: str | None) -> tuple[str, Iterator[Any]]:
    import pyarrow
    from pyarrow import parquet

    # opened here, because a name such as `file:.parquet` would be read as an address
    table = parquet.ParquetFile(pyarrow.memory_map(str(file)))
    chosen = _column_of(table.schema_arrow, column, file)
    return chosen, table.iter_batches(batch_size=256, columns=[chosen])


def _arrow(file: Path, column: str | None) -> tuple[str, Iterator[Any]]:
    import pyarrow

    stream = pyarrow.memory_map(str(file))
    as_file = stream.read(6) == b"ARROW1"
    stream.seek(0)
    table = pyarrow.ipc.open_file(stream) if as_file else pyarrow.ipc.open_stream(stream)
    chosen = _column_of(table.schema, column, file)
    batches = (table.get_batch(i) for i in range(table.num_record_batches)) if as_file else iter(table)
    return chosen, (batch.select([chosen]) for batch in batches)


def _column_of(schema: Any, column: str | None, file: Path) -> str:
    def is_text(kind: Any) -> bool:
        return "string" in str(kind)[:12] or (hasattr(kind, "value_type") and str(kind).startswith("dictionary<values=string"))

    chosen = choose_column(schema.names, [field.name for field in schema if is_text(field.type)], column, str(file))
    if schema.names.count(chosen) > 1:
        raise ValueError(f"{file} has several columns named {chosen!r}")
    return chosen


_ROWS = {"JSON": _json_rows, "CSV": _csv_rows, "Parquet": _table_rows, "Arrow": _table_rows}
