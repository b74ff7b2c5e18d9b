"""Tasks of the Hugging Face hub: a table row specifies what is read, and `datasets` streams it.

No dataset is downloaded as a whole. The stream is read a few hundred documents at a time; each such slice is written to
the cache of `datasets` once it is complete, with the position in the stream at which the next one begins. Nothing is read
twice, and interrupted reading resumes after the last complete slice.

The part of a document is determined by a hash of its content (the text, or the pixels of the image), as in `DataSource` and
`ImageSource`: the same text or image is in the same part of every task, and no document is in both.
"""

import functools
import hashlib
import itertools
import json
import time
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable
from urllib.parse import quote

import numpy as np

from sepcap.errors import missing_extra, unknown
from sepcap.models.loading.hub import PATIENCE, reachable
from sepcap.progress import progress
from sepcap.tasks.sources.hub_rows import READERS, HubRow, document_of, in_terms_of, split_of
from sepcap.tasks.sources.quiet import quietly
from sepcap.tasks.task import PARTS, Source, Split

VERSION = 2
"""Increased when the way documents are made from rows changes, so that no cache returns the old ones."""

SLICE = 256
"""Number of documents that are read, cached and tokenised at once."""

SHUFFLED = 16
"""Number of slices within which a seed other than 0 shuffles the documents."""

SEEN = 2**20
"""Number of documents remembered in order to drop duplicates."""

WAITS = (1.0, 4.0, 16.0)
"""Seconds before each retry of a broken connection that `datasets` does not resume by itself."""

WAYS_OUT = (
    "Alternatives: a connection (HF_ENDPOINT for a mirror); a copy on disk: sepcap.register_task('mine', repository='path/of/the/folder'); "
    "the local tasks, which need no network; or your own texts, as a file or a list."
)


@runtime_checkable
class Streamed(Source, Protocol):
    """A source whose documents are streamed in slices."""

    def slices(self, split: Split, seed: int = 0) -> Iterator[Any]:
        """`datasets.Dataset` of a few hundred documents each, with a column `row`: their row numbers in the underlying data."""
        ...


def read_from(task: Any) -> str:
    """For errors about a task without data: what its streamed sources read, including the filter; empty if it has none."""
    read = [source.reads for source in task.sources if isinstance(source, HubSource)]
    return f"; it reads {' and '.join(read)}" if read else ""


@dataclass(frozen=True)
class HubSource:
    """The documents of a row of the table of tasks, streamed."""

    row: HubRow

    @property
    def reads(self) -> str:
        """Description of what is read: repository, configuration, split and filter."""
        row = self.row
        where = ", ".join(part for part in (row.repository, row.configuration, row.split) if part)
        conditions = " and ".join(f"{field} {comparison} {value!r}" for field, comparison, value in row.filter)
        return f"{where} where {conditions}" if conditions else where

    @property
    def fingerprint(self) -> str:
        """Hash of what is read and how, including the commit of the dataset if known; not of the documents."""
        row = self.row
        where = [row.repository, row.configuration, row.split, row.files, row.revision, self.commit]
        what = [row.field, row.label, row.filter]
        return f"hub-{hashlib.sha256(json.dumps([VERSION, where, what]).encode()).hexdigest()[:16]}"

    @property
    def content(self) -> str:
        """What the documents depend on; they are read from a cache by the same."""
        return self.fingerprint

    @property
    def folder(self) -> Path | None:
        """The repository as a folder, if it is one."""
        path = Path(self.row.repository).expanduser()
        return path if path.is_dir() else None

    @functools.cached_property
    def commit(self) -> str | None:
        """Commit of the dataset that is read; None if it cannot be determined.

        A commit that is already in the local cache of the hub is kept: a resumed run has the same data, with or without
        a connection. Give `revision` for another one. For a folder, a hash of the names, sizes and times of the files.
        """
        from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError

        if self.folder is not None:
            files = sorted(path for path in self.folder.rglob("*") if path.is_file())
            states = [(str(path.relative_to(self.folder)), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
            return hashlib.sha256(repr(states).encode()).hexdigest()[:16]
        which = {"repo_id": self.row.repository, "filename": "README.md", "repo_type": "dataset", "revision": self.row.revision}
        try:
            card = try_to_load_from_cache(**which)
        except HFValidationError as error:
            raise FileNotFoundError(
                f"repository={self.row.repository!r} is neither an existing folder nor the name of a dataset on the hub ('owner/name')"
            ) from error
        if not isinstance(card, str):
            if constants.HF_HUB_OFFLINE or not reachable(self.page):
                return None
            try:
                card = hf_hub_download(**which)
            except Exception:
                # gated, no card or a broken connection: reading the documents raises the specific error
                return None
        return Path(card).parent.name

    @property
    def page(self) -> str:
        """URL of the dataset."""
        from huggingface_hub import constants

        return f"{constants.ENDPOINT}/datasets/{self.row.repository}"

    def documents(self, split: Split) -> Any:
        """The first few thousand documents of a part, with a column `text`, or columns `image` and `label`; see `slices` for all."""
        import datasets

        parts = list(itertools.islice(self.slices(split), SHUFFLED))
        if not parts:
            raise ValueError(f"{self.row.repository} has no documents to {split}; what was read: {self.reads}")
        return datasets.concatenate_datasets(parts)

    def indices(self, split: Split, n: int) -> list[int] | str:
        """Row numbers in the stream, before the filter."""
        rows = itertools.chain.from_iterable(part["row"] for part in self.slices(split))
        return list(itertools.islice(rows, n))

    def slices(self, split: Split, seed: int = 0) -> Iterator[Any]:
        """The documents of a part, a few hundred at a time.

        Args:
            split: "collect" or "evaluate".
            seed: 0 keeps the original order. A stream cannot be shuffled as a whole: any other seed shuffles within
                consecutive blocks of 4,096 documents.

        Returns:
            `datasets.Dataset`s with the columns `text` and `row`, or `image`, `label` and `row`. Duplicates are dropped if
            fewer than about a million documents are between them.

        Raises:
            PermissionError: the dataset is gated; the error lists the steps to get access.
            ConnectionError: no network, or a connection that broke and could not be resumed.
            ValueError: a field that does not exist.
        """
        if split not in PARTS:
            raise unknown("split", split, PARTS, "Only the local tasks have a train split.")
        parts = self._in_order(split)
        return _shuffled(parts, seed) if seed else parts

    def _in_order(self, split: Split) -> Iterator[Any]:
        import datasets
        from datasets.exceptions import DatasetGenerationError

        content = {"text": {"text": datasets.Value("string")}, "images": {"image": datasets.Image(), "label": datasets.Value("int64")}}
        own = {"row": datasets.Value("int64"), "key": datasets.Value("string"), "state": datasets.Value("string")}
        features = datasets.Features(content[self.row.content] | own)
        reader = _Reader(self, split)
        number = 0
        while not reader.at_end:
            key = hashlib.sha256(f"{self.fingerprint}{split}{SLICE}slice{number}".encode()).hexdigest()[:16]
            try:
                whole = quietly(datasets.Dataset.from_generator, reader.take, features=features, fingerprint=key)
            except DatasetGenerationError as error:
                raise (error.__cause__ or error) from None  # the cause itself, not its wrapper
            reader.stand_behind(whole)
            number += 1
            if len(whole) > 1:
                yield whole.select(range(len(whole) - 1)).remove_columns(["key", "state"])

    def check_connection(self) -> None:
        """Check once, briefly, whether the data can be reached; `datasets` would retry for minutes.

        Raises:
            ConnectionError: the hub does not answer.
        """
        from huggingface_hub import constants

        if self.folder is None and (constants.HF_HUB_OFFLINE or not reachable(self.page)):
            why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"{constants.ENDPOINT} does not answer within {PATIENCE} s"
            raise ConnectionError(f"{self.row.repository} is streamed from the hub, and {why}. {WAYS_OUT}")

    def stream(self) -> Any:
        """The `datasets.IterableDataset` of all rows, images not decoded."""
        import datasets

        row = self.row
        revision = row.revision if self.folder else self.commit or row.revision
        if row.files is None:
            name = str(self.folder or row.repository)
            dataset = datasets.load_dataset(name, row.configuration, split=row.split, revision=revision, streaming=True)
        else:
            base = self.folder or f"hf://datasets/{row.repository}@{quote(revision or 'main', safe='')}"
            kind = READERS[Path(row.files).suffix]
            dataset = datasets.load_dataset(kind, data_files={row.split: f"{base}/{row.files}"}, split=row.split, streaming=True)
        return self._undecoded(dataset) if row.content == "images" else dataset

    def _undecoded(self, dataset: Any) -> Any:
        """The dataset with images as the bytes of their files."""
        import datasets

        field = str(self.row.field)
        features = dataset.features or dataset._resolve_features().features
        if field not in features:
            raise unknown("field", field, features, f"These are the columns of {self.row.repository}; images need a column of their own.")
        kind = features[field]
        # tables that `datasets` did not write have bytes and path, without the type of an image
        if not isinstance(kind, datasets.Image) and not (isinstance(kind, Mapping) and {"bytes", "path"} == set(kind)):
            raise TypeError(f"field {field!r} of {self.row.repository} contains no images, but {getattr(kind, 'dtype', kind)}")
        return dataset.cast_column(field, datasets.Image(decode=False))

    def raise_if_final(self, error: Exception) -> None:
        """Raise errors that the user can fix and that a retry cannot.

        Raises:
            PermissionError: the dataset is gated.
            FileNotFoundError: there is no such dataset, or none that is visible without logging in.
            ImportError: a package needed to read its files is missing.
            ValueError: no such configuration or split, or files that cannot be read.
        """
        from huggingface_hub.errors import GatedRepoError
        from pyarrow import ArrowInvalid

        chain: list[BaseException] = [error]
        while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
            chain.append(cause)
        texts = [str(e).lower() for e in chain]
        if any(isinstance(e, GatedRepoError) for e in chain) or any("is a gated dataset" in text for text in texts):
            asked = f" ({self.row.gate})" if self.row.gate else ""
            raise PermissionError(
                f"{self.row.repository} is gated{asked}. To get access: 1. log in at {self.page} and accept its terms; "
                "2. create a token with read access in the settings there and pass it to `hf auth login` (or set HF_TOKEN); "
                "3. repeat the call."
            ) from error
        if any("zstd" in text and "not supported" in text for text in texts):
            raise missing_extra("zstandard", "hub", f"reading {self.row.repository}") from error
        if isinstance(error, ArrowInvalid):
            raise ValueError(
                f"{self.row.repository}: {_file_of(error) or 'a file'} cannot be read ({error}). Is it complete? Download it again"
            ) from error
        if isinstance(error, FileNotFoundError | PermissionError | ImportError | ValueError | TypeError):
            raise error


def _file_of(error: Exception) -> str | None:
    """The file that `datasets` was reading, which its errors do not name."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    files = [frame.f_locals.get("file") for frame in frames if frame.f_globals.get("__name__", "").startswith("datasets.")]
    return next((str(file) for file in reversed(files) if isinstance(file, str | Path)), None)


class _Reader:
    """Reads the stream of a source, one slice after another."""

    def __init__(self, source: HubSource, split: Split) -> None:
        self._source, self._split = source, split
        self._state: dict[str, Any] | None = None
        self._next_row = 0
        self.at_end = False
        self._examples: Iterator[Mapping[str, Any]] | None = None
        self._dataset: Any = None
        self._row = source.row
        # a table of fixed size, so that memory does not grow; a slot that is overwritten loses its previous entry
        self._seen = np.zeros(SEEN, dtype=np.uint64)

    def take(self) -> Iterator[dict[str, Any]]:
        """The documents of the next slice, and one extra row with the position where the slice after it begins."""
        taken, empty = 0, {"text": ""} if self._source.row.content == "text" else {"image": None, "label": None}
        if self._examples is None:
            self._examples = self._read()
        what = f"reading {self._source.row.repository} to {self._split}"
        with progress(desc=what, unit=" rows") as bar:
            for example in self._examples:
                bar.update()
                self._next_row += 1
                document = document_of(self._row, example)
                if document is None:
                    continue
                key = document.pop("key")
                if split_of(self._row, key) != self._split or self._remember(key.hex()):
                    continue
                yield document | {"row": self._next_row - 1, "key": key.hex(), "state": ""}
                taken += 1
                if taken == SLICE:
                    yield empty | {"row": self._next_row, "key": "", "state": json.dumps(self._dataset.state_dict())}
                    return
        yield empty | {"row": self._next_row, "key": "", "state": ""}

    def stand_behind(self, whole: Any) -> None:
        """Continue after a slice, which may have been loaded from the cache without reading the stream."""
        rows, keys, states = (whole[name] for name in ("row", "key", "state"))
        if rows[-1] > self._next_row:
            self._next_row, self._examples = rows[-1], None
            for key in keys[:-1]:
                self._remember(key)
        self.at_end = not states[-1]
        self._state = json.loads(states[-1]) if states[-1] else None

    def _remember(self, key: str) -> bool:
        """Whether the document with this hash was seen before; records it as seen."""
        number = np.uint64(int(key[:16], 16))
        slot = int(number % np.uint64(SEEN))
        known = self._seen[slot] == number
        self._seen[slot] = number
        return bool(known)

    def _read(self) -> Iterator[Mapping[str, Any]]:
        """All rows from the current position on; a broken connection is resumed at the same row."""
        self._source.check_connection()
        self._dataset, failures, arrived = None, 0, False
        while True:
            try:
                if self._dataset is None:
                    self._dataset = self._source.stream()
                    self._row = in_terms_of(self._source.row, self._dataset.features)
                if self._state is not None:
                    self._dataset.load_state_dict(self._state)
                for example in self._dataset:
                    failures, arrived = 0, True
                    yield example
                return
            except Exception as error:
                if not arrived:  # a truncated file can look like a damaged one, so it is read once more
                    self._source.raise_if_final(error)
                arrived = False
                # `datasets` raises a plain ConnectionError after retrying for ten minutes
                if failures == len(WAITS) or type(error) is ConnectionError:
                    raise ConnectionError(
                        f"{self._source.row.repository}: the connection broke after {self._next_row:,} rows, and every further attempt "
                        f"failed ({type(error).__name__}: {error}). Complete slices of {SLICE} documents are kept: "
                        "the same call resumes from there."
                    ) from error
                if self._dataset is not None:
                    self._state = self._dataset.state_dict()
                time.sleep(WAITS[failures])
                failures += 1


def _shuffled(parts: Iterator[Any], seed: int) -> Iterator[Any]:
    import datasets

    for number in itertools.count():
        block = list(itertools.islice(parts, SHUFFLED))
        if not block:
            return
        whole = datasets.concatenate_datasets(block)
        order = np.random.default_rng([seed, number]).permutation(len(whole))
        name = "".join(part._fingerprint for part in block)
        for start in range(0, len(whole), SLICE):
            key = hashlib.sha256(f"{name}{seed}-{start}".encode()).hexdigest()[:16]
            yield whole.select(order[start : start + SLICE].tolist(), new_fingerprint=key)
