"""The same text gives the same tokens in whatever container it comes; what cannot be read is named."""

import csv
import gzip
import json
import os
import re
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from conftest import tiny_tokenizer, words

import sepcap
from sepcap.tasks import documents
from sepcap.tasks.batches import sample_tokens
from sepcap.tasks.documents import Spelling

TEXTS = [f"{text}\nĀ “{i}”, <b>NA</b>" for i, text in enumerate(words(11, n=60, length=8))]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
    datasets.disable_progress_bars()
    return folder


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def tokens(task, tokenizer, **options) -> list[str]:
    loaded = sepcap.load_task(task, **options)
    return [sample_tokens(loaded, split, tokenizer, 400, 32).fingerprint for split in ("collect", "evaluate")]


def lines(ends: str = "\n") -> str:
    return "".join(json.dumps({"id": i, "text": text}) + ends for i, text in enumerate(TEXTS))


def write_csv(file: Path) -> None:
    with file.open("w", newline="", encoding="utf-8-sig") as stream:
        csv.writer(stream).writerows([["id", "text"], *enumerate(TEXTS)])


def write_texts(folder: Path, change) -> None:
    folder.mkdir()
    for i, text in enumerate(TEXTS):
        (folder / f"{i}.txt").write_bytes(change(text))


def write_arrow(file: Path, opened) -> None:
    table = pa.table({"id": range(60), "text": TEXTS})
    with pa.OSFile(str(file), "wb") as sink, opened(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=7)


def write_zstandard(file: Path) -> None:
    zstandard = pytest.importorskip("zstandard")
    file.write_bytes(zstandard.ZstdCompressor().compress(lines().encode()))


DATA = datasets.Dataset.from_dict({"id": list(range(60)), "text": TEXTS})

FILES = {
    "a.jsonl": lambda f: f.write_text(lines()),
    "bom.jsonl": lambda f: f.write_bytes(b"\xef\xbb\xbf" + lines("\r\n\r\n").encode()),
    "a.jsonl.gz": lambda f: f.write_bytes(gzip.compress(lines().encode())),
    "a.jsonl.zst": write_zstandard,
    "list.json": lambda f: f.write_text(json.dumps([{"text": text} for text in TEXTS], indent=1)),
    "a.csv": write_csv,
    "a.parquet": lambda f: pd.DataFrame({"text": TEXTS}).to_parquet(f),
    "categories.parquet": lambda f: pd.DataFrame({"text": pd.Categorical(TEXTS)}).to_parquet(f),
    "stream.arrow": lambda f: write_arrow(f, pa.ipc.new_stream),
    "file.arrow": lambda f: write_arrow(f, pa.ipc.new_file),
    "texts": lambda f: write_texts(f, str.encode),
    "windows": lambda f: write_texts(f, lambda text: ("\ufeff" + text + "\n").replace("\n", "\r\n").encode()),
    "saved": lambda f: DATA.save_to_disk(f, num_shards=3),
    "saved-formatted": lambda f: DATA.with_format("torch").save_to_disk(f),
}


@pytest.mark.parametrize("name", FILES)
def test_every_file_gives_the_same_tokens(tmp_path, tokenizer, name):
    FILES[name](tmp_path / name)
    expected = tokens(TEXTS, tokenizer)
    assert tokens(tmp_path / name, tokenizer) == expected
    assert tokens(str(tmp_path / name), tokenizer, column=None) == expected


BROKEN = [text.replace(" ", "\r\n", 2) for text in TEXTS]
WINDOWS = {
    "a.jsonl": lambda f: f.write_text("".join(json.dumps({"text": text}) + "\n" for text in BROKEN)),
    "a.csv": lambda f: pd.DataFrame({"text": BROKEN}).to_csv(f, index=False, lineterminator="\n"),
    "a.parquet": lambda f: pd.DataFrame({"text": BROKEN}).to_parquet(f),
    "saved": lambda f: datasets.Dataset.from_dict({"text": BROKEN}).save_to_disk(f),
}


@pytest.mark.parametrize("name", WINDOWS)
def test_line_ends_within_a_text_are_the_same_in_every_file(tmp_path, tokenizer, name):
    WINDOWS[name](tmp_path / name)
    assert tokens(tmp_path / name, tokenizer) == tokens([text.replace("\r\n", "\n") for text in BROKEN], tokenizer)
    assert tokens(BROKEN, tokenizer) != tokens(tmp_path / name, tokenizer), "texts given in Python are taken as they are"


GIVEN = {
    "tuple": lambda: tuple(TEXTS),
    "numpy": lambda: np.array(TEXTS),
    "series": lambda: pd.Series(TEXTS),
    "arrow": lambda: pa.array(TEXTS),
    "column": lambda: DATA["text"],
    "split": lambda: datasets.DatasetDict(train=DATA)["train"],
    **{kind: lambda kind=kind: DATA.with_format(kind) for kind in ("torch", "numpy", "pandas", "arrow")},
    "other columns shown": lambda: DATA.with_format("numpy", columns=["id"]),
}


@pytest.mark.parametrize("kind", GIVEN)
def test_every_object_gives_the_same_tokens(tokenizer, kind):
    assert tokens(GIVEN[kind](), tokenizer) == tokens(TEXTS, tokenizer)


@pytest.mark.parametrize(
    ("given", "right"),
    [
        (lambda: DATA.with_transform(lambda rows: rows), r"with_format\(None\)"),
        (lambda: DATA.to_iterable_dataset(), r"list\(data.take"),
        (lambda: datasets.IterableDatasetDict(test=DATA.to_iterable_dataset()), r"data\['test'\].take"),
        (lambda: datasets.DatasetDict(test=DATA), r"data\['test'\]"),
        (lambda: DATA.to_pandas(), "give the column"),
        (lambda: (text for text in TEXTS), r"list\(texts\)"),
        (lambda: set(TEXTS), r"sorted\(texts\)"),
        (lambda: b"text", "decode"),
        (lambda: pd.Series(["a", float("nan")]), "entry 1 is not one"),
        (lambda: [["a"], ["b"]], "list of list"),
        (lambda: ["a", "b \ud800"], "row 1 .* half a character"),
        (lambda: [Path("a.txt")], "for several give their folder"),
        (lambda: [__file__, __file__], r"load_task\(path\)"),
    ],
    ids=range(13),
)
def test_other_objects_are_refused_with_the_right_call(given, right):
    with pytest.raises((TypeError, ValueError), match=right):
        sepcap.load_task(given())


@pytest.mark.parametrize("name", ["run[1]", "x*", "a::b", "wh?t", " two  words ", "-x", "a#b", "ü 文", "%41", "file:", "{a,b}", "~"])
@pytest.mark.parametrize("kind", [".jsonl", ".parquet", ".arrow", "", "saved"])
def test_paths_are_paths(tmp_path, monkeypatch, name, kind):
    given, other = (datasets.Dataset.from_dict({"text": [f"{word} {i}" for i in range(4)]}) for word in ("this", "other"))
    for file, data in ((f"{name}{kind}", given), (f"run1{kind}", other), (f"xy{kind}", other), (f"what{kind}", other)):
        path = tmp_path / file
        if kind == ".jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in data))
        elif kind == ".parquet":
            data.to_pandas().to_parquet(path)
        elif kind == ".arrow":
            path.write_bytes(b"")
            with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, data.data.schema) as writer:
                writer.write_table(data.data.table)
        elif kind == "saved":
            data.save_to_disk(path) if "::" not in file else path.mkdir()
        else:
            path.mkdir()
            (path / "a.txt").write_text(" ".join(data["text"]))
    if kind == "saved" and "::" in name:  # `datasets` cannot write there, but what is moved there can be read
        given.save_to_disk(tmp_path / "moved")
        (tmp_path / "moved").rename(tmp_path / "there")
        (tmp_path / f"{name}{kind}").rmdir()
        (tmp_path / "there").rename(tmp_path / f"{name}{kind}")
    monkeypatch.chdir(tmp_path)
    for path in (tmp_path / f"{name}{kind}", str(tmp_path / f"{name}{kind}"), Path(f"{name}{kind}")):
        source = sepcap.load_task(path).sources[0]
        assert all(text.startswith("this") for split in ("collect", "evaluate") for text in source.documents(split)["text"])


def test_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.txt").write_text("one two three")
    assert sepcap.load_task("~/a.txt").name == "a"


BAD = {
    "json": (b'{"text": "a"}\n{"text": ', "line 2 cannot be read as JSON"),
    "deep": (b'{"text":' + b"[" * 100_000 + b"]" * 100_000 + b"}\n", "line 1 is nested too deeply"),
    "null": (b'{"text": "a"}\n\n{"text": null}\n', "line 3 of column 'text' is a NoneType"),
    "nan": (b'{"text": NaN}\n', "line 1 of column 'text' is a float"),
    "nested": (b'{"text": ["a"]}\n', "line 1 of column 'text' is a list"),
    "half": (b'{"text": "\\ud800"}\n', "line 1 of column 'text' contains half a character"),
    "missing": (b'{"text": "a"}\n{"txt": "a"}\n', "column='text' is not known.*line 2"),
    "other": (b'{"meta": "a"}\n{"meta": "a", "text": "b"}\n', "line 2 has texts in other columns than 'meta'"),
    "strings": (b'"a"\n', "line 1 cannot be read as a row: it is a str"),
    "latin": ('{"text": "a"}\n{"text": "ü"}\n'.encode("latin-1"), "line 2 cannot be read: it is not UTF-8"),
    "digits": (b'{"text": ' + b"9" * 5000 + b"}", "line 1"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_row_among_many_is_named(tmp_path, kind):
    data, says = BAD[kind]
    for name in ("1.jsonl", "2.jsonl", "3.jsonl"):
        (tmp_path / name).write_bytes(data if name == "2.jsonl" else b'{"text": "fine", "meta": 1}\n' * (kind != "other"))
    with pytest.raises((ValueError, TypeError), match=f"(?s){says}") as caught:
        sepcap.load_task(tmp_path)
    assert "2.jsonl" in str(caught.value)


def test_a_bad_file_among_many_is_named(tmp_path):
    FILES["a.parquet"](tmp_path / "a.parquet")
    (tmp_path / "b.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"b\.parquet cannot be read as Parquet"):
        sepcap.load_task(tmp_path)
    (tmp_path / "c.csv").write_text("id,text\n1,a\n2,b,c\n")
    with pytest.raises(ValueError, match=r"c\.csv, line 3 has 3 fields"):
        sepcap.load_task(tmp_path / "c.csv")
    DATA.save_to_disk(tmp_path / "saved")
    file = next((tmp_path / "saved").glob("*.arrow"))
    file.write_bytes(file.read_bytes()[:-500])
    with pytest.raises(ValueError, match=r"arrow of the saved data set cannot be read"):
        sepcap.load_task(tmp_path / "saved")


def test_hidden_files_empty_ones_and_links_back_are_left_out(tmp_path, tokenizer):
    write_texts(tmp_path / "data", str.encode)
    (tmp_path / "data" / "._0.txt").write_bytes(b"\x00\x05\x16\x07\xff")
    (tmp_path / "data" / ".DS_Store").write_bytes(b"\xff")
    (tmp_path / "data" / ".ipynb_checkpoints").mkdir()
    (tmp_path / "data" / ".ipynb_checkpoints" / "0.txt").write_text("old")
    (tmp_path / "data" / "empty.txt").write_text("")
    (tmp_path / "data" / "back").symlink_to(tmp_path / "data")
    assert tokens(tmp_path / "data", tokenizer) == tokens(TEXTS, tokenizer)
    (tmp_path / "data" / "gone.txt").symlink_to(tmp_path / "nowhere.txt")
    with pytest.raises(ValueError, match=r"gone\.txt cannot be read"):
        sepcap.load_task(tmp_path / "data")
    with pytest.raises(ValueError, match=r"empty\.txt has no text"):
        sepcap.load_task(tmp_path / "data" / "empty.txt")


def test_pipes_devices_and_bombs_end_in_one_error(tmp_path, monkeypatch):
    from sepcap.tasks.sources import files

    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "zero.txt").symlink_to("/dev/zero")
    for name in ("pipe.jsonl", "zero.txt"):
        with pytest.raises(ValueError, match=f"{name} is not a regular file"):
            sepcap.load_task(tmp_path / name)
    monkeypatch.setattr(files, "FREE", 2**12)
    for name in ("bomb.jsonl.gz", "bomb.txt.gz"):
        (tmp_path / name).write_bytes(gzip.compress(b'{"text": "a"}\n' * 100_000))
        with pytest.raises(ValueError, match=f"{name} unpacks to more than 200 times its size"):
            sepcap.load_task(tmp_path / name)
    pd.DataFrame({"text": ["a" * 1000] * 5000}).to_parquet(tmp_path / "bomb.parquet")
    with pytest.raises(ValueError, match=r"bomb\.parquet unpacks"):
        sepcap.load_task(tmp_path / "bomb.parquet")
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(lines().encode())[:-20])
    with pytest.raises(ValueError, match=r"cut\.jsonl\.gz cannot be unpacked"):
        sepcap.load_task(tmp_path / "cut.jsonl.gz")
    monkeypatch.setattr(files, "LONGEST_LINE", 1000)
    (tmp_path / "endless.jsonl").write_bytes(b'{"text": "a"}\n{"text": "' + b"a" * 2000)
    with pytest.raises(ValueError, match=r"endless\.jsonl, line 2 is longer"):
        sepcap.load_task(tmp_path / "endless.jsonl")


def test_of_a_saved_dataset_dict_one_split_is_a_task(tmp_path):
    other = datasets.Dataset.from_dict({"text": [text[::-1] for text in DATA["text"]]})
    datasets.DatasetDict({"train": DATA, "test": other}).save_to_disk(tmp_path / "both")
    ways = " or ".join(repr(str(tmp_path / "both" / split)) for split in ("test", "train"))
    with pytest.raises(ValueError, match=rf"both is a saved DatasetDict; choose one of its splits by its path: {re.escape(ways)}"):
        sepcap.load_task(tmp_path / "both")
    for split, data in (("train", DATA), ("test", other)):
        found, expected = sepcap.load_task(tmp_path / "both" / split), sepcap.load_task(data)
        assert found.sources[0].documents("evaluate")["text"] == expected.sources[0].documents("evaluate")["text"]


@pytest.mark.parametrize("name", ["saved", "texts", "a.jsonl", "a.parquet"])
def test_nothing_is_written_beside_the_data(tmp_path, tokenizer, name):
    (tmp_path / "data").mkdir()
    FILES[name](tmp_path / "data" / name)
    before = sorted((str(p), p.stat().st_mtime_ns) for p in (tmp_path / "data").rglob("*"))
    given = [tmp_path / "data" / name, *([datasets.load_from_disk(tmp_path / "data" / name)] if name == "saved" else [])]
    for folder in (tmp_path / "data", tmp_path / "data" / name):
        folder.chmod(0o555)
    try:
        for each in given:
            assert tokens(each, tokenizer) == tokens(TEXTS, tokenizer)
    finally:
        for folder in (tmp_path / "data", tmp_path / "data" / name):
            folder.chmod(0o755)
    assert sorted((str(p), p.stat().st_mtime_ns) for p in (tmp_path / "data").rglob("*")) == before


def test_saved_data_that_changed_under_the_same_fingerprint_are_read_again(tmp_path, tokenizer):
    for name, texts in (("a", TEXTS), ("b", [text.upper() for text in TEXTS])):
        datasets.Dataset.from_dict({"text": texts}).save_to_disk(tmp_path / name)
    first, other = (tokens(datasets.load_from_disk(tmp_path / name), tokenizer) for name in "ab")
    (tmp_path / "b" / "state.json").write_bytes((tmp_path / "a" / "state.json").read_bytes())
    assert tokens(datasets.load_from_disk(tmp_path / "b"), tokenizer) == other != first


class Measuring:
    """One token per word; the most characters that it was given of one text."""

    bos_token_id, eos_token_id, most = 0, 0, 0

    def get_vocab(self):
        return {}

    def __call__(self, texts, **options):
        self.most = max(self.most, *map(len, texts))
        return {"input_ids": [[1 + int(word) % 7 for word in text.split()] for text in texts]}


def test_of_a_long_document_no_more_is_tokenised_than_is_needed(monkeypatch):
    monkeypatch.setattr(documents, "AT_ONCE", 1000)
    long = [" ".join(str(i * k) for i in range(100_000)) for k in (1, 2)]
    assert min(map(len, long)) > 400_000
    samples = {}
    for budget in (100, 1000, 5000):
        tokenizer = Measuring()
        samples[budget] = sample_tokens(sepcap.load_task(long), "collect", tokenizer, budget, 32, per_document=None)
        assert samples[budget].tokens == budget
        assert tokenizer.most <= 4 * (1000 + 7 * 2 * (budget + documents.MARGIN))  # words of up to six digits and a space
    whole = Measuring()([long[sepcap.load_task(long).sources[0].indices("collect", 1)[0]]])["input_ids"][0]
    for budget, sample in samples.items():
        assert [int(t) for row in sample.rows for t in row if t][:budget] == whole[:budget]
    tokenizer = Measuring()
    assert Spelling(tokenizer).beginning(long[0], 5)[:5] == Spelling(tokenizer).ids(long[0][:40])[:5]


def test_a_text_that_spells_special_tokens_is_text(tokenizer):
    texts = [f"<s>{i} euro</s> (?P<s>x) <pad>{text}" for i, text in enumerate(TEXTS)]
    row = np.concatenate(sample_tokens(sepcap.load_task(texts), "collect", tokenizer, 400, 32).rows)
    assert not set(row.tolist()) & {1, 2}
    assert "<s>" in tokenizer.decode(row[row != 0])
    asked = sepcap.load_task(texts, special_tokens=True)
    assert {1, 2} <= set(np.concatenate(sample_tokens(asked, "collect", tokenizer, 400, 32).rows).tolist())
    assert asked.fingerprint != sepcap.load_task(texts).fingerprint
