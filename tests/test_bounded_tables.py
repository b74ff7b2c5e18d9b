"""What a small parquet file may expand to is bounded before it is read; a table comes back with the types that it was written with."""

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sepcap import tables
from sepcap.errors import CorruptFile
from sepcap.tables import read_table


def read(path, most=tables.MOST_ROWS):
    with path.open("rb") as file:
        return read_table(file, most)


def test_numbers_strings_flags_and_what_is_missing_come_back(tmp_path):
    columns = {"a": ["x", None, "x"], "b": [1, 2, 3], "c": [True, False, None], "d": pd.Categorical(["u", "v", "u"]), "e": [0.1, np.nan, 1]}
    table = pd.DataFrame(columns | {"f": pd.array([0, None, 2], dtype="Int64")})
    table.to_parquet(tmp_path / "t.parquet")
    pd.testing.assert_frame_equal(read(tmp_path / "t.parquet"), table)
    for empty in (table.head(0), pd.DataFrame()):
        empty.to_parquet(tmp_path / "t.parquet")
        assert len(read(tmp_path / "t.parquet")) == 0


def repeated(text, times):
    """A column of one string that is written once."""
    return pa.DictionaryArray.from_arrays(pa.array(np.zeros(times, dtype=np.int32)), pa.array([text]))


def test_a_file_that_would_expand_beyond_the_limits_is_not_read(tmp_path, monkeypatch):
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({name: np.zeros(1000) for name in "abcd"}), path)
    assert read(path, 1000).shape == (1000, 4)
    with pytest.raises(CorruptFile, match=r"t\.parquet is corrupt \(1,000 rows of 4 columns"):
        read(path, 999)
    for limit, most in (("MOST_COLUMNS", 3), ("MOST_CELLS", 3999)):
        with monkeypatch.context() as patched:
            patched.setattr(tables, limit, most)
            with pytest.raises(CorruptFile, match=r"1,000 rows of 4 columns"):
                read(path)
    monkeypatch.setattr(tables, "MOST_CELLS", 4000)
    assert read(path).shape == (1000, 4)


def test_a_long_string_that_is_written_once_counts_as_often_as_it_is_used(tmp_path, monkeypatch):
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"a": repeated("x" * 5000, 2000).cast("string")}), path)
    assert path.stat().st_size < 20_000
    monkeypatch.setattr(tables, "MOST_BYTES", 2000 * 5000)
    assert read(path)["a"].str.len().sum() == 2000 * 5000
    monkeypatch.setattr(tables, "MOST_BYTES", 2000 * 5000 - 1)
    with pytest.raises(CorruptFile, match=r"10,000,000 bytes of strings"):
        read(path)
    monkeypatch.setattr(tables, "MOST_BYTES", 4999)
    with pytest.raises(CorruptFile, match=r"bytes of columns"):
        read(path)


def test_no_column_holds_lists(tmp_path):
    pq.write_table(pa.table({"a": [[1] * 1000]}), tmp_path / "t.parquet")
    with pytest.raises(CorruptFile, match="column 'a' does not hold numbers or strings"):
        read(tmp_path / "t.parquet")
