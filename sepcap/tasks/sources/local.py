"""Offline tasks: the text and code that every installation of sepcap includes.

`local-prose` is docstrings, package descriptions and the language reference; `local-python` is Python sources without docstrings and
comments; `local-cpp` is the C++ headers that torch ships without comments; `local-code` is both languages in equal numbers of tokens.

Only the standard library and the packages of `PACKAGES` are read, so that installing another package changes no result. Generated
files are left out. The split of a file is determined by a hash of its package-relative path, so that the same file is in the same
split on every machine. The embedded model was trained on `train` only.
"""

import ast
import functools
import hashlib
import importlib.util
import os
import re
import sysconfig
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import UInt32
from safetensors.numpy import load_file

from sepcap.progress import progress
from sepcap.tasks.sources.cleaning import clean_prose, docstrings, is_generated, is_table, strip_cpp_comments, strip_python
from sepcap.tasks.sources.ngrams import SAME, among, copies_and_idiom, runs, sampled, united, without
from sepcap.tasks.sources.quiet import quietly
from sepcap.tasks.task import Split

Kind = Literal["prose", "python", "cpp"]

SPLITS: dict[Split, range] = {"evaluate": range(90, 100), "collect": range(80, 90), "train": range(0, 80)}
"""Percent ranges of the path hash, in order: text that splits share is kept in the first of them and removed from the others."""

VERSION = 4
"""Increased when the documents of a split change, so that no cache returns the old ones."""

MIN_CHARS = 200
"""A file with less text than this after cleaning contains no information about a capability."""

MAX_CHARS = 60_000
"""Longer files are far more often generated tables or bundled data than written by a person."""

PACKAGES = frozenset({
    "accelerate", "beartype", "datasets", "dill", "einops", "filelock", "fsspec", "functorch", "httpx", "huggingface_hub", "jaxtyping",
    "jinja2", "markupsafe", "mpmath", "multiprocess", "networkx", "numpy", "packaging", "pandas", "plotly", "pyarrow", "pydantic",
    "python_dateutil", "dateutil", "pyyaml", "yaml", "regex", "requests", "rich", "safetensors", "scipy", "sympy", "tokenizers", "torch",
    "torchgen", "tqdm", "transformer_lens", "transformers", "typing_extensions", "tyro", "urllib3",
})  # fmt: skip
"""Packages of a plain installation of sepcap: folders of site-packages, and distributions if their names differ."""

TRAINED_ON = Path(__file__).parents[2] / "models" / "assets" / "default" / "trained_on.safetensors"
"""Sampled 13-grams of the training texts of the embedded model, without idiom: `training/train.py` writes it next to the weights."""

TOLERATED = 0.05
"""Maximum share of the 13-grams of a held-out document that the training texts may contain."""

SKIPPED = frozenset({"__pycache__", "node_modules", "lib2to3", "graph_objs", "_generated", "generated"})
"""Folders without source code, or with generated code that is not marked as such in every file."""

OPTIONAL = frozenset({"ensurepip", "idlelib", "test", "tests", "tkinter", "turtledemo", "site-packages", "dist-packages"})
"""Folders of the standard library that some distributions of Python leave out, or that are not part of it."""


class SourceFile(NamedTuple):
    """One file of the installation: its path, and the name that determines its split."""

    path: str
    name: str


_LISTED: dict[tuple[Any, ...], tuple[list[SourceFile], dict[str, int]]] = {}
"""Files found before in this process, and when each folder had last changed: visiting all folders takes half a second."""


def bucket(name: str) -> int:
    """Percentile of a package-relative path: stable across machines, Python versions and hash seeds."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") % 100


def split_of(name: str) -> str:
    """The split ("train", "collect" or "evaluate") a package-relative path belongs to."""
    b = bucket(name)
    return next(split for split, percents in SPLITS.items() if b in percents)


def package_name(name: str) -> str:
    """The package that a package-relative path belongs to, as spelled in `PACKAGES`; empty for the standard library.

    >>> package_name("PyYAML/METADATA"), package_name("typing_extensions.py"), package_name("stdlib:os.py")
    ('pyyaml', 'typing_extensions', '')
    """
    top = name.partition("/")[0]
    return "" if top.startswith("stdlib:") else top.removesuffix(".py").lower().replace("-", "_")


def find_files(kind: Kind, more: Collection[str] = ()) -> list[SourceFile]:
    """All files of the running installation that `kind` is made from, ordered by path hash.

    Args:
        kind: kind of text.
        more: packages to read in addition to those of `PACKAGES`.
    """
    packages, roots, begun = PACKAGES.union(more), _roots(), time.time_ns()
    known, folders = _LISTED.get(key := (kind, packages, *roots), ([], {}))
    if folders and all(_changed_at(folder) == at for folder, at in folders.items()):
        return list(known)
    found: dict[str, SourceFile] = {}
    folders = {root: _changed_at(root) for _, root in roots}
    for prefix, root in roots:
        for folder, subfolders, files in os.walk(root):
            folders[folder] = _changed_at(folder)
            relative = os.path.relpath(folder, root).replace(os.sep, "/")
            subfolders[:] = sorted(s for s in subfolders if _enter(s, relative, prefix, packages))
            for file in files:
                if not _wanted(kind, file, relative) or not os.path.isfile(os.path.join(folder, file)):  # no dangling links
                    continue
                inside = file if relative == "." else f"{relative}/{file}"
                if file == "METADATA":
                    # the version is not part of the name: an upgrade must not move a file to another split
                    inside = re.sub(r"-[^/]*?\.dist-info/", "/", inside)
                name = prefix + inside
                if prefix or package_name(name) in packages:
                    found.setdefault(name, SourceFile(os.path.join(folder, file), name))
    files = sorted(found.values(), key=lambda f: hashlib.sha256(f.name.encode()).digest())
    # the times of a file system are no finer than some milliseconds: a folder that has just changed may change again unnoticed
    if max(folders.values()) < begun - 10**9:
        _LISTED[key] = (list(files), folders)
    return files


def _changed_at(folder: str) -> int:
    """When a file of a folder was last added, renamed or removed, in nanoseconds; 0 for none."""
    try:
        return os.stat(folder).st_mtime_ns
    except OSError:
        return 0


def _roots() -> list[tuple[str, str]]:
    """Folders to search, each with the prefix of its names.

    All folders of installed packages share one prefix: lib64 is often a link to lib, and the same file must have the
    same name, and so the same split, wherever it was found.
    """
    packages = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    torch = importlib.util.find_spec("torch")
    if torch is not None and torch.origin:  # it may be elsewhere, in a user's or the system's folder
        packages.append(str(Path(torch.origin).parent.parent))
    return [("stdlib:", sysconfig.get_path("stdlib")), *(("", root) for root in dict.fromkeys(packages))]


def _enter(subfolder: str, relative: str, prefix: str, packages: Collection[str]) -> bool:
    if subfolder in SKIPPED or (prefix and subfolder in OPTIONAL):
        return False
    return bool(prefix) or relative != "." or package_name(re.sub(r"-[^/]*?\.dist-info$", "", subfolder)) in packages


def _wanted(kind: Kind, file: str, relative: str) -> bool:
    if kind == "cpp":
        return relative.startswith("torch/include") and file.endswith((".h", ".hpp", ".cuh"))
    if kind == "prose" and file == "METADATA":
        return relative.endswith(".dist-info")
    return file.endswith(".py")


def fingerprint(files: list[SourceFile]) -> str:
    """Hash of names and sizes: changes when a package is upgraded, or one of `PACKAGES` is missing."""
    listed = "".join(f"{file.name}\0{os.stat(file.path).st_size}\n" for file in files)
    return hashlib.sha256(trained_on(TRAINED_ON).tobytes() + listed.encode()).hexdigest()[:16]


def documents(kind: Kind, split: Split, more: Collection[str] = (), earlier: Sequence[str] | None = None) -> Iterator[dict[str, str]]:
    """Cleaned documents of one split in path-hash order, without copies and without text of an earlier split (METHODS 9).

    Near-duplicates within a split count once. Lines that share 13 consecutive words with a document of an earlier split are removed,
    except for idiom; a document that loses more than half of its text is dropped.

    Args:
        kind: kind of text.
        split: "evaluate", "collect" or "train".
        more: additional packages to read, entirely for "train".
        earlier: texts of the splits before this one, if known; otherwise those splits are read too.

    Yields:
        Rows `{"text", "name"}`.
    """
    if earlier is None:
        earlier = []
        for part in before(split):
            earlier += [row["text"] for row in documents(kind, part, earlier=list(earlier))]
    seen = {_paragraph_hash(p) for text in earlier for p in text.split("\n\n")} if kind == "prose" else set()
    names, texts = [], []
    files = find_files(kind, more)
    for file in progress(files, desc=f"reading {kind} ({split})", unit=" files"):
        for name, text in _read(kind, file, split, more):
            if kind == "prose":
                text = _new_paragraphs(text, seen)
            if len(text) >= MIN_CHARS:
                names.append(name)
                texts.append(text)
    trained = trained_on(TRAINED_ON)
    for i, text in cleaned(texts, earlier):
        if split == "train" or among(own := sampled(runs(text)), trained).sum() <= TOLERATED * len(own):
            yield {"text": text, "name": names[i]}


@functools.cache
def trained_on(path: Path) -> UInt32[np.ndarray, " run"]:
    """The 13-grams that `training/train.py` wrote to this path; empty if there is no such file.

    The training texts are from one installation. Another one can have the same text under another name, in another split.
    """
    return load_file(path)["runs"] if path.exists() else np.empty(0, np.uint32)


def before(split: Split) -> tuple[Split, ...]:
    """The splits that keep the text that they share with this one."""
    order = tuple(SPLITS)
    return order[: order.index(split)]


def cleaned(texts: Sequence[str], earlier: Sequence[str]) -> Iterator[tuple[int, str]]:
    """The documents of one part without near-duplicates and without text of earlier parts.

    Args:
        texts: of the part, in order.
        earlier: texts of the earlier parts.

    Yields:
        Number and text of each document that is kept.
    """
    found = [runs(text) for text in texts]
    own, others = ([united([each]) for each in part] for part in (found, map(runs, earlier)))
    (copied, _), common = copies_and_idiom(own, others)
    held = united(others)
    for i, copy in enumerate(copied):
        text = without(texts[i], among(found[i], held) & ~among(found[i], common), MIN_CHARS)
        if not copy and len(text) >= max(MIN_CHARS, (1 - SAME) * len(texts[i])):
            yield i, text


def _read(kind: Kind, file: SourceFile, split: str, more: Collection[str] = ()) -> Iterator[tuple[str, str]]:
    if file.name == "stdlib:pydoc_data/topics.py" and kind == "prose":
        # the language reference is one file of many chapters: each chapter is a document with its own split
        for topic, text in _topics(Path(file.path).read_text(encoding="utf-8")):
            if split_of(name := f"{file.name}#{topic}") == split:
                yield name, clean_prose(text)
        return
    if ("train" if package_name(file.name) in more else split_of(file.name)) != split:
        return
    try:
        source = Path(file.path).read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError):
        return  # a test file in another encoding or a broken link: not usable as text
    if kind != "prose" and is_generated(source):
        return
    if kind == "cpp":
        text = strip_cpp_comments(source)
    elif kind == "python":
        text = strip_python(source)
    elif file.name.endswith("METADATA"):
        text = clean_prose(source.partition("\n\n")[2])
    else:
        text = "\n\n".join(filter(None, (clean_prose(d) for d in docstrings(source))))
    if kind != "prose" and (len(text) > MAX_CHARS or is_table(text)):
        return
    yield file.name, text


def _topics(source: str) -> Iterator[tuple[str, str]]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                if isinstance(key, ast.Constant) and isinstance(value, ast.Constant):
                    yield str(key.value), str(value.value)


def _new_paragraphs(text: str, seen: set[bytes]) -> str:
    """Paragraphs not seen before: documentation repeats whole paragraphs between files."""
    kept = []
    for paragraph in text.split("\n\n"):
        if (key := _paragraph_hash(paragraph)) not in seen:
            seen.add(key)
            kept.append(paragraph)
    return "\n\n".join(kept)


def _paragraph_hash(paragraph: str) -> bytes:
    return hashlib.blake2b(re.sub(r"\W+", " ", paragraph.lower()).encode(), digest_size=8).digest()


@dataclass(frozen=True)
class LocalSource:
    """Text and code of the running Python installation."""

    kind: Kind

    @property
    def fingerprint(self) -> str:
        """Hash of names and sizes of the files."""
        return self._files

    @property
    def content(self) -> str:
        """What the documents depend on; they are read from a cache by the same."""
        return f"{VERSION}{self.fingerprint}"

    @functools.cached_property
    def _files(self) -> str:  # once per task
        return f"local-{self.kind}-{fingerprint(find_files(self.kind))}"

    def documents(self, split: Split) -> Any:
        """Cleaned documents in path-hash order; read once, then loaded from the cache of `datasets`."""
        import datasets

        # a tuple: `datasets` treats every element of a list as a shard, and would read everything once per element
        earlier = tuple(text for part in before(split) for text in self.documents(part)["text"])
        return quietly(
            datasets.Dataset.from_generator,
            documents,
            gen_kwargs={"kind": self.kind, "split": split, "earlier": earlier},
            features=datasets.Features({"text": datasets.Value("string"), "name": datasets.Value("string")}),
            fingerprint=hashlib.sha256(f"{VERSION}{self.fingerprint}{split}".encode()).hexdigest()[:16],
        )

    def indices(self, split: Split, n: int) -> list[int] | str:
        """The first n in path-hash order."""
        return f"0:{n}"
