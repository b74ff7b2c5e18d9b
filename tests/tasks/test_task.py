"""Tasks from everything that can name one, and the split that keeps evaluation apart from collection."""

import random

import datasets
import pandas as pd
import pytest
from conftest import words

import sepcap
from sepcap.tasks import registry
from sepcap.tasks.sources import local
from sepcap.tasks.sources.local import LocalSource
from sepcap.tasks.task import Source, Task

TEXTS = words(0, n=21, length=12)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """`datasets` keeps what it reads in a cache of its own; not the user's one here."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def parts(task: Task) -> tuple[list[str], list[str]]:
    return tuple(list(task.sources[0].documents(split)["text"]) for split in ("collect", "evaluate"))


def write(folder, kind: str, texts=TEXTS, column="text"):
    folder.mkdir(exist_ok=True)
    if kind == "txt":
        for i, text in enumerate(texts):
            (folder / f"{i}.txt").write_text(text, encoding="utf-8")
        return folder
    path = folder / f"data.{kind}"
    table = pd.DataFrame({column: texts, "label": range(len(texts))})
    table.to_parquet(path) if kind == "parquet" else table.to_json(path, orient="records", lines=True)
    return path


@pytest.mark.parametrize("kind", ["list", "tuple", "dataset", "txt", "jsonl", "parquet"])
def test_every_kind_of_task_gives_the_same_split(tmp_path, kind):
    given = {
        "list": lambda: TEXTS,
        "tuple": lambda: tuple(TEXTS),
        "dataset": lambda: datasets.Dataset.from_dict({"label": list(range(21)), "text": TEXTS}),
    }.get(kind, lambda: write(tmp_path / "data", kind))()
    task = sepcap.load_task(given)
    collect, evaluate = parts(task)
    assert parts(sepcap.load_task(TEXTS)) == (collect, evaluate)
    assert sorted(collect + evaluate) == sorted(TEXTS)
    assert min(len(collect), len(evaluate)) >= 7  # neither part gets less than a third
    assert not set(collect) & set(evaluate)
    assert task.fingerprint == sepcap.load_task(TEXTS).fingerprint
    assert isinstance(task.sources[0], Source)
    assert sepcap.load_task(task) is task
    assert sepcap.load_task(given, name="mine").name == "mine"
    assert sepcap.load_task(str(given) if kind in ("txt", "jsonl", "parquet") else given).name == task.name


def test_split_does_not_depend_on_the_order_or_on_repetitions():
    expected = parts(sepcap.load_task(TEXTS))
    for seed in range(3):
        shuffled = random.Random(seed).sample(TEXTS * 2, 42)
        assert parts(sepcap.load_task(shuffled)) == expected


def test_texts_that_differ_in_white_space_are_one():
    padded = [f"  {text}\n" for text in TEXTS] + [text.replace(" ", "  ") for text in TEXTS]
    once, twice = sepcap.load_task(TEXTS + padded), sepcap.load_task(padded[::-1] + TEXTS)
    assert once.fingerprint == sepcap.load_task(TEXTS).fingerprint
    assert parts(once) == parts(twice)
    together = [" ".join(text.split()) for part in parts(once) for text in part]
    assert sorted(together) == sorted(TEXTS)


def test_indices_lead_back_to_the_texts():
    given = [TEXTS[3], "", TEXTS[3], *TEXTS]
    source = sepcap.load_task(given).sources[0]
    for split in ("collect", "evaluate"):
        documents = list(source.documents(split)["text"])
        assert [given[i] for i in source.indices(split, len(documents))] == documents
        assert source.indices(split, 2) == source.indices(split, 9)[:2]
    with pytest.raises(ValueError, match=r"split='train' is not known.*Only the local tasks"):
        source.documents("train")


def test_data_that_changes_has_another_fingerprint():
    task = sepcap.load_task(TEXTS)
    assert task.fingerprint != sepcap.load_task(TEXTS[1:]).fingerprint
    assert task.fingerprint != sepcap.load_task([*TEXTS[1:], TEXTS[0].upper()]).fingerprint
    assert task.name == f"texts-{task.fingerprint[:8]}"
    same = [sepcap.load_task(datasets.Dataset.from_dict({"text": t})).name for t in (TEXTS, TEXTS[::-1])]
    assert same[0] == same[1]  # named by content: a run goes on in another process


@pytest.mark.parametrize(
    ("text", "halves"),
    [
        ("aaa bbb\nccc ddd\neee fff\nggg hhh", ("aaa bbb\nccc ddd", "eee fff\nggg hhh")),
        ("aaaa bbbb cccc dddd", ("aaaa bbbb", "cccc dddd")),
        ("a\nbbbb cccc dddd eeee ffff", ("a\nbbbb cccc", "dddd eeee ffff")),  # a line break far from the middle is no middle
        ("abcdefgh", ("abcd", "efgh")),
    ],
)
def test_single_document_is_cut_in_two(text, halves):
    task = sepcap.load_task([text, text, ""])
    assert parts(task) == ([halves[0]], [halves[1]])
    assert [task.sources[0].indices(split, 1) for split in ("collect", "evaluate")] == [[0], [0]]


def test_single_text_file_is_one_document(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("\n\n".join(TEXTS), encoding="utf-8")
    task = sepcap.load_task(path)
    assert task.name == "book"
    collect, evaluate = parts(task)
    assert (len(collect), len(evaluate)) == (1, 1)
    assert f"{collect[0]}\n{evaluate[0]}" == "\n\n".join(TEXTS)
    assert 0.4 < len(collect[0]) / len(path.read_text()) < 0.6


def test_files_that_changed_are_read_again(tmp_path):
    import os

    path = write(tmp_path / "data", "jsonl")
    before = sepcap.load_task(path).fingerprint
    write(tmp_path / "data", "jsonl", TEXTS[:10])
    os.utime(path, (1e9, 1e9))
    assert sepcap.load_task(path).fingerprint != before


def test_column(tmp_path):
    path = write(tmp_path / "data", "jsonl", column="body")
    expected = parts(sepcap.load_task(TEXTS))
    assert parts(sepcap.load_task(path)) == expected  # the only column of strings
    assert parts(sepcap.load_task(path, column="body")) == expected
    with pytest.raises(ValueError, match=r"column='bdy' is not known. Did you mean 'body'\? Valid: 'body', 'label'"):
        sepcap.load_task(path, column="bdy")
    two = datasets.Dataset.from_dict({"title": TEXTS, "body": TEXTS})
    with pytest.raises(ValueError, match=r"no column named 'text'; the columns are \['title', 'body'\]"):
        sepcap.load_task(two)
    with pytest.raises(TypeError, match=r"data\.jsonl, line 1 of column 'label' is a int, not a text"):
        sepcap.load_task(path, column="label")
    with pytest.raises(TypeError, match="row 1 of column 'text' is a NoneType, not a text"):
        sepcap.load_task(datasets.Dataset.from_dict({"text": ["a", None]}))


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ("local-pose", ValueError, "task='local-pose' is not known. Did you mean 'local-prose'"),
        ("no/such/file.txt", FileNotFoundError, "no such file or folder"),
        ("a whole text/" * 1000, ValueError, "Give texts themselves as a list"),
        ([], ValueError, "no text: 0 rows"),
        (["", " \n"], ValueError, "no text: 2 rows, none with text in column 'text'"),
        (["a", 3, None], TypeError, "list of NoneType, int, str; a list must contain only strings"),
        (3.5, TypeError, "task is a float; give a name, a path"),
        ({"text": ["a"]}, TypeError, "task is a dict"),
        (datasets.DatasetDict(train=datasets.Dataset.from_dict({"text": ["a"]})), TypeError, r"choose one of its splits: data\['train'\]"),
    ],
    ids=range(9),
)
def test_bad_tasks(given, error, message):
    with pytest.raises(error, match=message) as caught:
        sepcap.load_task(given)
    assert len(str(caught.value)) < 500


def test_bad_folders_and_files(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty is not a \.txt, \.jsonl, \.csv, \.parquet or \.arrow file and contains none"):
        sepcap.load_task(tmp_path / "empty")
    (tmp_path / "a.xls").write_text("a,b")
    with pytest.raises(ValueError, match=r"a\.xls is not a \.txt"):
        sepcap.load_task(tmp_path / "a.xls")
    mixed = tmp_path / "mixed"
    write(mixed, "txt"), write(mixed, "jsonl")
    with pytest.raises(ValueError, match=r"mixes \['JSON', 'text'\] files"):
        sepcap.load_task(mixed)
    (tmp_path / "broken.jsonl").write_text('{"text": "a"}\n{"text": ')
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and then nothing")
    (tmp_path / "latin.txt").write_bytes("Ü".encode("latin-1"))
    for name in ("broken.jsonl", "broken.parquet", "latin.txt"):
        with pytest.raises(ValueError, match=rf"{name}.* cannot be read"):
            sepcap.load_task(tmp_path / name)


def test_suffixes_in_capitals_and_folders_in_folders(tmp_path):
    (tmp_path / "data" / "deep.txt").mkdir(parents=True)
    for i, text in enumerate(TEXTS):
        (tmp_path / "data" / "deep.txt" / f"{i}.TXT").write_text(text)
    assert parts(sepcap.load_task(tmp_path / "data")) == parts(sepcap.load_task(TEXTS))


def test_names_of_the_local_tasks(monkeypatch):
    assert registry.names()[:4] == ["local-prose", "local-python", "local-cpp", "local-code"]
    monkeypatch.setattr(local, "find_files", lambda kind: [])
    code = sepcap.load_task("local-code")
    assert [source.kind for source in code.sources] == ["python", "cpp"]
    assert code.name == "local-code"
    assert sepcap.load_task("local-code", name="code").name == "code"
    fingerprints = {name: sepcap.load_task(name).fingerprint for name in registry.names()[:4]}
    assert len(set(fingerprints.values())) == 4


def test_local_documents_are_read_once(monkeypatch):
    reads = []

    def documents(kind, split, earlier):
        reads.append(split)
        assert list(earlier) == ([] if split == "evaluate" else [f"{kind} evaluate {i}" for i in range(3)])
        yield from ({"text": f"{kind} {split} {i}", "name": f"{i}"} for i in range(3))

    monkeypatch.setattr(local, "find_files", lambda kind: [])
    monkeypatch.setattr(local, "documents", documents)
    for _ in range(2):
        for split in ("collect", "evaluate"):
            assert LocalSource("cpp").documents(split)["text"][:] == [f"cpp {split} {i}" for i in range(3)]
    assert reads == ["evaluate", "collect"]
    monkeypatch.setattr(local, "VERSION", local.VERSION + 1)  # another cleaning: the cache must not give the old text
    LocalSource("cpp").documents("collect")
    assert reads == 2 * ["evaluate", "collect"]
    assert LocalSource("cpp").indices("collect", 7) == "0:7"


def test_a_text_is_in_the_same_part_of_every_task(letters, digits):
    """What one task collects on, another must not evaluate on."""
    first = sepcap.load_task(letters)
    second = sepcap.load_task([*digits, *letters[:20]])
    for task, other in ((first, second), (second, first)):
        collected = set(task.sources[0].documents("collect")["text"])
        assert collected
        assert not collected & set(other.sources[0].documents("evaluate")["text"])
