"""Streams: the split, the order, the cache, connections that break, and what else can go wrong."""

import hashlib
import itertools
import json
import random
import shutil
from dataclasses import replace

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import tiny_tokenizer
from datasets import Dataset, Features, Image, Value
from datasets.packaged_modules.json.json import Json
from datasets.packaged_modules.parquet.parquet import Parquet
from encoders import file_of, load, noise, part_of_image, save_vit

import sepcap
from sepcap.tasks import registry
from sepcap.tasks.batches import sample_tokens
from sepcap.tasks.sources import hub
from sepcap.tasks.sources.hub import HubSource, Streamed
from sepcap.tasks.sources.hub_rows import HubRow, value_of

SHARDS, ROWS, GROUP = 4, 30, 10
SLICE = 8


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of its own for every test, small slices, no waiting."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(hub, "SLICE", SLICE)
    monkeypatch.setattr(hub, "SHUFFLED", 3)
    monkeypatch.setattr(hub, "WAITS", (0.0, 0.0, 0.0))
    return tmp_path / "cache"


def text(i):
    return f"document {i} says {hashlib.sha256(str(i).encode()).hexdigest()}"


def side(document):
    return "evaluate" if int(hashlib.sha256(" ".join(document.split()).encode()).hexdigest(), 16) % 2 else "collect"


@pytest.fixture
def row(tmp_path):
    """120 distinct documents in four files."""
    for shard in range(SHARDS):
        rows = [{"text": text(i), "meta": {"third": i % 3, "none": None}} for i in range(shard * ROWS, (shard + 1) * ROWS)]
        target = tmp_path / "data" / f"train-{shard}.parquet"
        target.parent.mkdir(exist_ok=True)
        Dataset.from_list(rows).to_parquet(target, batch_size=GROUP)
    return HubRow(str(tmp_path / "data"), files="train-*.parquet")


def read(row, split="collect", seed=0):
    """(row number, text) of all documents of a part."""
    return [pair for part in HubSource(row).slices(split, seed) for pair in zip(part["row"], part["text"], strict=True)]


def expected(split, wanted=range(SHARDS * ROWS)):
    return [(i, text(i)) for i in wanted if side(text(i)) == split]


class Line:
    """Counts the tables that the reader of a file format gives, and breaks where it is told to."""

    def __init__(self, monkeypatch, builder=Parquet, breaks=(), error=OSError):
        self.tables = 0
        original = builder._generate_tables

        def generate(builder, *args, **kwargs):
            for pair in original(builder, *args, **kwargs):
                self.tables += 1
                if self.tables in breaks:
                    raise error("line is down")
                yield pair

        monkeypatch.setattr(builder, "_generate_tables", generate)


def test_the_parts_share_nothing_and_miss_nothing(row):
    parts = {split: read(row, split) for split in ("collect", "evaluate")}
    assert parts == {split: expected(split) for split in parts}
    assert all(len(part) > SHARDS * ROWS / 4 for part in parts.values())
    assert isinstance(HubSource(row), Streamed)
    with pytest.raises(ValueError, match="split='train'"):
        HubSource(row).slices("train")


def test_a_filter_keeps_the_row_numbers_of_the_stream(row):
    third = replace(row, filter=(("meta.third", "==", 1),))
    assert read(third) == expected("collect", range(1, SHARDS * ROWS, 3))
    assert HubSource(third).indices("collect", 4) == [i for i, _ in expected("collect", range(1, SHARDS * ROWS, 3))][:4]
    both = replace(row, filter=(("meta.third", "in", (0, 1)), ("meta.third", "not in", (1,))))
    assert read(both) == expected("collect", range(0, SHARDS * ROWS, 3))
    assert read(replace(row, filter=(("meta.none", "!=", 3),))) == []
    with pytest.raises(ValueError, match="no documents to collect"):
        HubSource(replace(row, filter=(("meta.third", ">=", 3),))).documents("collect")


@pytest.mark.thorough
def test_numbers_are_compared_in_the_precision_of_their_field(tmp_path):
    tenths = [i / 10 for i in range(11)] * 6
    columns = {
        "text": [text(i) for i in range(66)],
        "half": pa.array(np.array(tenths, dtype=np.float16)),
        "single": pa.array(tenths, pa.float32()),
        "double": pa.array(tenths, pa.float64()),
        "in": pa.array([{"side": t} for t in tenths], pa.struct({"side": pa.float32()})),
        "whole": pa.array([i % 11 for i in range(66)], pa.int32()),
    }
    (tmp_path / "numbers").mkdir()
    pq.write_table(pa.table(columns), tmp_path / "numbers" / "train.parquet")
    row = HubRow(str(tmp_path / "numbers"))

    def rows(*condition):
        part = replace(row, filter=(condition,))
        return sorted(i for split in ("collect", "evaluate") for i, _ in read(part, split))

    for field in ("half", "single", "double", "in.side"):
        for tenth in (0, 1, 3, 7, 10):
            assert rows(field, "==", tenth / 10) == [i for i in range(66) if i % 11 == tenth], field
        assert rows(field, "<=", 0.2) == [i for i in range(66) if i % 11 <= 2]
        assert rows(field, ">=", 0.8) == [i for i in range(66) if i % 11 >= 8]
        assert rows(field, "!=", 0.3) == [i for i in range(66) if i % 11 != 3]
        assert rows(field, "in", (0.1, 0.7)) == [i for i in range(66) if i % 11 in (1, 7)]
        assert rows(field, "not in", [0.1, 0.7]) == [i for i in range(66) if i % 11 not in (1, 7)]
    assert rows("whole", "<=", 2.5) == [i for i in range(66) if i % 11 <= 2]
    assert rows("double", "==", float(np.float32(0.3))) == []  # which is another number in float64
    with pytest.raises(
        TypeError, match=r"filter=\('single', '<=', '0.2'\): field 'single' of .*a float, which cannot be compared with '0.2'"
    ):
        rows("single", "<=", "0.2")


def test_classes_can_be_given_by_name(tmp_path):
    features = Features({"text": Value("string"), "kind": datasets.ClassLabel(names=["ode", "haiku"])})
    rows = {"text": [text(i) for i in range(20)], "kind": [i % 2 for i in range(20)]}
    Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "poems" / "train.parquet")
    row = HubRow(str(tmp_path / "poems"))
    for condition in (("kind", "==", "haiku"), ("kind", "==", 1), ("kind", "in", ("haiku",))):
        assert read(replace(row, filter=(condition,))) == expected("collect", range(1, 20, 2))
    with pytest.raises(ValueError, match=r"class in a filter='hiku' is not known. Did you mean 'haiku'"):
        read(replace(row, filter=(("kind", "==", "hiku"),)))


def test_what_a_filter_left_nothing_of_is_named(row, monkeypatch):
    nothing = replace(row, filter=(("meta.third", "==", 7),))
    monkeypatch.setitem(registry.TASKS, "nothing-left", nothing)
    with pytest.raises(ValueError, match=r"too little text to collect: 0 documents.*it reads .*train where meta.third == 7"):
        sample_tokens(sepcap.load_task("nothing-left"), "collect", tiny_tokenizer(), 30, context=16)


def test_a_file_that_is_cut_off_is_named(row, tmp_path):
    whole = (tmp_path / "data" / "train-2.parquet").read_bytes()
    (tmp_path / "data" / "train-2.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"data: .*train-2.parquet cannot be read .*Download it again"):
        read(row)
    (tmp_path / "data" / "train-0.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"data: .*train-0.parquet cannot be read"):
        read(row)


@pytest.fixture
def pictures(tmp_path):
    """A folder with 40 images, every fourth of which, and every fifth label, is missing."""
    files = [{"bytes": file_of(array), "path": None} for array in noise(40)]
    rows = [{"picture": None if i % 4 == 3 else files[i], "kind": None if i % 5 == 4 else i % 7, "name": f"kind {i}"} for i in range(40)]
    features = Features({"picture": Image(), "kind": Value("int64"), "name": Value("string")})
    Dataset.from_list(rows, features=features).to_parquet(tmp_path / "pictures" / "train.parquet")
    return HubRow(str(tmp_path / "pictures"), field="picture", label="kind", content="images")


def test_rows_without_an_image_or_a_label_are_left_out(pictures):
    found = sorted(i for split in ("collect", "evaluate") for part in HubSource(pictures).slices(split) for i in part["row"])
    assert found == [i for i in range(40) if i % 4 != 3 and i % 5 != 4]


def test_images_that_are_none_are_refused_in_one_sentence(pictures, tmp_path, monkeypatch):
    def first(**changes):
        next(HubSource(replace(pictures, **changes)).slices("collect"))

    with pytest.raises(ValueError, match=r"field='pictur' is not known. Did you mean 'picture'\?.*columns of .*pictures"):
        first(field="pictur")
    with pytest.raises(TypeError, match=r"field 'kind' of .*pictures contains no images, but int64"):
        first(field="kind")
    with pytest.raises(ValueError, match=r"field='knid' is not known. Did you mean 'kind'"):
        first(label="knid")
    with pytest.raises(TypeError, match=r"field 'name' of .*pictures is a str \('kind 0'\); labels are whole numbers"):
        first(label="name")
    rows = [{"picture": {"bytes": b"cut off", "path": None}, "kind": 1}]
    Dataset.from_list(rows, features=Features({"picture": Image(), "kind": Value("int64")})).to_parquet(tmp_path / "bad" / "train.parquet")
    with pytest.raises(ValueError, match=r"field 'picture' of .*bad has a value that is not an image"):
        first(repository=str(tmp_path / "bad"))
    monkeypatch.setitem(registry.TASKS, "no-images", replace(pictures, filter=(("name", "==", "x"),)))
    model = load(save_vit(tmp_path / "vit"))
    with pytest.raises(ValueError, match=r"'no-images' has no images to evaluate; it reads .*pictures, train where name == 'x'"):
        sepcap.evaluate(model, "no-images", tokens=5)


def test_duplicates_are_dropped_and_variants_in_white_space_are_duplicates(tmp_path):
    texts = [text(i % 40) for i in range(60)] + [text(i).replace(" ", "\n ") for i in range(40)]
    Dataset.from_dict({"text": texts}).to_parquet(tmp_path / "data" / "train-0.parquet")
    row = HubRow(str(tmp_path / "data"), files="train-0.parquet")
    next(HubSource(row).slices("collect"))
    assert read(row) == expected("collect", range(40))  # the first slice now comes from the cache


def test_a_seed_shuffles_blocks_of_slices(row):
    plain, one, again, other = read(row), read(row, seed=1), read(row, seed=1), read(row, seed=2)
    assert one == again
    assert plain != one != other
    block = 3 * SLICE
    for start in range(0, len(plain), block):
        assert sorted(one[start : start + block]) == plain[start : start + block]
        assert one[start : start + block] != plain[start : start + block]


def test_what_was_read_once_is_not_read_again(row, monkeypatch):
    first = read(row)
    line = Line(monkeypatch, breaks=range(1, 99))
    assert read(row) == first
    assert read(row, seed=3)
    assert line.tables == 0
    with pytest.raises(ConnectionError):
        read(row, "evaluate")


def test_slices_that_are_missing_between_cached_ones_are_read_where_they_belong(row, cache):
    read(row)
    numbers = {}
    for folder in cache.glob("generator/*"):
        (file,) = folder.rglob("*.arrow")
        numbers[min(Dataset.from_file(str(file))["row"])] = folder
    for first in sorted(numbers)[0:3:2]:
        shutil.rmtree(numbers[first])
    assert read(row) == expected("collect")


def test_only_as_much_is_read_as_is_asked_for(row, monkeypatch):
    line = Line(monkeypatch)
    list(itertools.islice(HubSource(row).slices("collect"), 2))
    read_rows = [i for i, _ in expected("collect")][2 * SLICE - 1]
    assert line.tables <= read_rows // GROUP + 2
    assert line.tables < SHARDS * ROWS / GROUP


@pytest.mark.parametrize("broken", [(1,), (3,), (4, 5), (2, 4, 9), (11, 12, 13)])
def test_a_connection_that_breaks_is_taken_up_at_the_row_it_had(row, monkeypatch, broken):
    line = Line(monkeypatch, breaks=broken)
    assert read(row) == expected("collect")
    assert line.tables >= SHARDS * ROWS / GROUP + len(broken)


def test_compressed_lines_and_images_are_taken_up_too(tmp_path, monkeypatch):
    import gzip

    folder = tmp_path / "lines"
    folder.mkdir()
    for shard in range(SHARDS):
        lines = "".join(json.dumps({"text": text(i)}) + "\n" for i in range(shard * ROWS, (shard + 1) * ROWS))
        (folder / f"{shard}.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    Line(monkeypatch, Json, breaks=(2, 3, 6))
    assert read(HubRow(str(folder))) == expected("collect")

    different = [file_of(array) for array in noise(20)]
    pictures = [{"picture": {"bytes": different[i // 2], "path": None}, "kind": i % 7} for i in range(40)]
    features = Features({"picture": Image(), "kind": Value("int64")})
    Dataset.from_list(pictures, features=features).to_parquet(tmp_path / "images" / "train.parquet", batch_size=GROUP)
    Line(monkeypatch, breaks=(2, 4))
    source = HubSource(HubRow(str(tmp_path / "images"), field="picture", label="kind", content="images"))
    parts = [part.cast_column("image", Image(decode=False)) for part in source.slices("collect")]
    found = [
        (i, image["bytes"], label) for part in parts for i, image, label in zip(part["row"], part["image"], part["label"], strict=True)
    ]
    assert found == [(i, different[i // 2], i % 7) for i in range(0, 40, 2) if part_of_image(different[i // 2]) == "collect"]


def test_a_connection_that_stays_broken_leaves_whole_slices_only(row, cache, monkeypatch):
    with monkeypatch.context() as patch:
        Line(patch, breaks=range(6, 99))
        with pytest.raises(ConnectionError, match=r"broke after 50 rows.*line is down.*resumes from there") as caught:
            read(row)
        assert str(row.repository) in str(caught.value)
    whole = len([pair for pair in expected("collect") if pair[0] < 50]) // SLICE
    kept = list(cache.glob("generator/*/*/dataset_info.json"))
    assert len(kept) == whole > 0
    assert not list(cache.rglob("*incomplete"))
    line = Line(monkeypatch)
    assert read(row) == expected("collect")
    begun = [i for i, _ in expected("collect")][whole * SLICE - 1] // ROWS  # the file in which the last whole slice ended
    assert line.tables == (SHARDS - begun) * ROWS / GROUP


def test_where_datasets_has_given_up_nobody_tries_again(row, monkeypatch):
    line = Line(monkeypatch, breaks=range(2, 99), error=ConnectionError)
    with pytest.raises(ConnectionError, match="broke after 10 rows"):
        read(row)
    assert line.tables == 2


def test_a_stream_that_ends_with_a_slice_and_one_without_a_document(row, tmp_path):
    texts = [text for _, text in expected("collect")][: 2 * SLICE]
    Dataset.from_dict({"text": texts}).to_parquet(tmp_path / "even" / "train.parquet")
    even = HubRow(str(tmp_path / "even"))
    for _ in range(2):
        assert [text for _, text in read(even)] == texts
        assert read(even, "evaluate") == []


def test_tokens_of_a_stream_come_from_its_documents(row, monkeypatch):
    tokenizer = tiny_tokenizer()
    monkeypatch.setitem(registry.TASKS, "stream-of-tokens", row)
    task = sepcap.load_task("stream-of-tokens")
    whole = {"context": 16, "per_document": None}
    sample, larger = (sample_tokens(task, "collect", tokenizer, tokens, **whole) for tokens in (300, 900))
    shuffled = sample_tokens(task, "collect", tokenizer, 300, seed=5, **whole)
    for each in (sample, larger):
        rows = [i for i, _ in expected("collect")][: len(each.indices[0])]
        assert each.indices == (rows,)
        tokens = [t for i in rows for t in tokenizer(text(i), add_special_tokens=False)["input_ids"]]
        assert len(tokens) - len(tokenizer(text(rows[-1]), add_special_tokens=False)["input_ids"]) < each.tokens + 16
        kept = np.concatenate(each.rows)
        assert kept[kept != each.bos].tolist() == tokens[: each.tokens]
    assert set(shuffled.indices[0]) <= {i for i, _ in expected("collect")[: 3 * SLICE]}
    first = tokenizer(text(shuffled.indices[0][0]), add_special_tokens=False)["input_ids"]
    assert shuffled.rows[0][1:].tolist() == first[:15]
    assert shuffled.indices[0] != sample.indices[0]
    # by default each gives one row, in the order of the stream
    parts = sample_tokens(task, "collect", tokenizer, 300, context=16)
    assert parts.indices == ([i for i, _ in expected("collect")][:20],)
    assert parts.n_documents == len(parts.rows) == 20
    for row, i in zip(parts.rows, parts.indices[0], strict=True):
        assert tokenizer.decode(row[1:]) in text(i)


def test_the_fingerprint_follows_what_is_read(row, tmp_path):
    rows = [row, replace(row, filter=(("meta.third", "==", 1),)), replace(row, split="test"), replace(row, field="meta")]
    assert len({HubSource(each).fingerprint for each in rows}) == len(rows)
    assert HubSource(row).fingerprint == HubSource(replace(row, description="another", licence="other")).fingerprint
    before = HubSource(row).fingerprint
    Dataset.from_dict({"text": ["more"]}).to_parquet(tmp_path / "data" / "train-9.parquet")
    assert HubSource(row).fingerprint != before


def test_fields_that_are_not_there_are_named_with_those_that_are(row):
    with pytest.raises(
        ValueError, match=r"field='txt' is not known. Did you mean 'text'\? Valid: 'meta', 'meta.none', 'meta.third', 'text'"
    ):
        read(replace(row, field="txt"))
    with pytest.raises(ValueError, match=r"field='meta.thrid' .* 'meta.third'"):
        read(replace(row, filter=(("meta.thrid", "==", 1),)))
    with pytest.raises(TypeError, match=r"field 'meta.third' of .* is a int, not a text"):
        read(replace(row, field="meta.third"))
    assert value_of({"a": {"b": {"c": 1}}}, "a.b.c") == 1
    assert value_of({"a.b": 2, "a": {"b": 1}}, "a.b") == 2


def test_several_fields_are_joined(tmp_path):
    rows = [{"question": f"Why {i}?", "answer": f"Because {i}." if i % 2 else None} for i in range(8)]
    Dataset.from_list(rows).to_parquet(tmp_path / "qa" / "train.parquet")
    row = HubRow(str(tmp_path / "qa"), field=("question", "answer"))
    found = dict(read(row) + read(row, "evaluate"))
    assert found == {i: f"Why {i}?\n\nBecause {i}." if i % 2 else f"Why {i}?" for i in range(8)}


def test_without_a_network_the_error_comes_at_once_and_names_ways_out(monkeypatch):
    source = HubSource(HubRow("nobody/nothing-of-this-name"))
    assert source.commit is None
    assert source.fingerprint.startswith("hub-")
    with pytest.raises(ConnectionError, match=r"nobody/nothing-of-this-name is streamed.*HF_HUB_OFFLINE is set.*register_task"):
        source.documents("collect")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "reachable", lambda url: False)
    with pytest.raises(ConnectionError, match=r"does not answer within 1\.5 s"):
        HubSource(HubRow("nobody/nothing-of-this-name")).documents("collect")


@pytest.mark.parametrize("missing", ["/there/is/no/such", "two words", "a/b/c"])
def test_a_name_that_can_be_neither_folder_nor_dataset(missing):
    with pytest.raises(FileNotFoundError, match="is neither an existing folder nor the name of a dataset"):
        HubSource(HubRow(missing)).documents("collect")


def test_zstd_without_its_package_names_the_extra(tmp_path, monkeypatch):
    lines = "".join(json.dumps({"text": text(i)}) + "\n" for i in range(50))
    (tmp_path / "pile").mkdir()
    (tmp_path / "pile" / "test.jsonl.zst").write_bytes(pa.compress(lines.encode(), codec="zstd", asbytes=True))
    row = HubRow(str(tmp_path / "pile"), split="test")
    if not datasets.config.ZSTANDARD_AVAILABLE:
        with pytest.raises(ImportError, match=r"zstandard.*sepcap\[hub\]"):
            read(row)
        return
    Line(monkeypatch, Json, breaks=(1,))
    assert read(row) == expected("collect", range(50))


def test_random_breaks_never_lose_or_repeat_a_document(row, monkeypatch, tmp_path):
    rng = random.Random(0)
    for trial in range(6):
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / f"cache-{trial}")
        with monkeypatch.context() as patch:
            Line(patch, breaks=sorted(rng.sample(range(1, 24), 3)), error=rng.choice([OSError, EOFError, TimeoutError]))
            assert read(row, "evaluate") == expected("evaluate")
