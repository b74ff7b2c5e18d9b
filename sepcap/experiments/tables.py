"""Tables in files."""

from typing import Any

import pandas as pd

from sepcap.errors import CorruptFile

MOST_COLUMNS = 1_000
"""Of a table that is read."""


def read_table(file: Any, most: int) -> pd.DataFrame:
    """A parquet file, which must not promise more rows than there can be: few bytes can stand for many.

    Raises:
        CorruptFile: it cannot be read; the file is named.
    """
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file) as parquet:
            if parquet.metadata.num_rows > most or parquet.metadata.num_columns > MOST_COLUMNS:
                raise ValueError(f"{parquet.metadata.num_rows:,} rows of {parquet.metadata.num_columns:,} columns")
            return parquet.read().to_pandas()
    except Exception as error:  # pyarrow has no common class for what a broken file can raise
        raise CorruptFile(f"{file.name} is corrupt ({error})") from error


def same_table(one: pd.DataFrame, other: pd.DataFrame) -> bool:
    """Whether two tables hold the same numbers and words, in whatever types."""
    if list(one.columns) != list(other.columns) or len(one) != len(other):
        return False
    pairs = ((one[name].astype(object).to_numpy(), other[name].astype(object).to_numpy()) for name in one.columns)
    return all(bool(((a == b) | (pd.isna(a) & pd.isna(b))).all()) for a, b in pairs)
