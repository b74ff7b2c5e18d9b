"""Read and compare tables in files."""

from typing import Any

import pandas as pd

from sepcap.errors import CorruptFile

MOST_COLUMNS = 1_000
"""Maximum number of columns of a table to read."""


def read_table(file: Any, most: int) -> pd.DataFrame:
    """Read a parquet file of at most `most` rows: a few bytes can encode many rows.

    Raises:
        CorruptFile: it cannot be read; the file is named.
    """
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file) as parquet:
            if parquet.metadata.num_rows > most or parquet.metadata.num_columns > MOST_COLUMNS:
                raise ValueError(f"{parquet.metadata.num_rows:,} rows of {parquet.metadata.num_columns:,} columns")
            return parquet.read().to_pandas()
    except Exception as error:  # pyarrow has no common class for errors of a broken file
        raise CorruptFile(f"{file.name} is corrupt ({error})") from error


def same_table(one: pd.DataFrame, other: pd.DataFrame) -> bool:
    """Whether two tables hold the same values, whatever their types."""
    if list(one.columns) != list(other.columns) or len(one) != len(other):
        return False
    pairs = ((one[name].astype(object).to_numpy(), other[name].astype(object).to_numpy()) for name in one.columns)
    return all(bool(((a == b) | (pd.isna(a) & pd.isna(b))).all()) for a, b in pairs)
