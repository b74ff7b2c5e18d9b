"""Read and compare tables in parquet files."""

from typing import Any

import pandas as pd

from sepcap.errors import CorruptFile

MOST_ROWS = 10_000_000
"""Maximum number of rows of a table to read."""

MOST_COLUMNS = 1_000
"""Maximum number of columns of a table to read."""

MOST_CELLS = 100_000_000
"""Maximum number of rows times columns of a table to read: 0.8 GB of numbers."""

MOST_BYTES = 2**30
"""Maximum bytes of the columns of a table to read, as the file declares them, and of all its strings, with repeats."""


def read_table(file: Any, most: int = MOST_ROWS) -> pd.DataFrame:
    """Read a parquet file of at most `most` rows, of plain columns: a few bytes can encode many rows, or many times one long string.

    Args:
        file: the file, open for reading.
        most: maximum number of rows.

    Raises:
        CorruptFile: it cannot be read, or it is larger than any table of sepcap; the file is named.
    """
    return read_arrow(file, most).to_pandas()


def read_arrow(file: Any, most: int = MOST_ROWS) -> Any:
    """The same as a `pyarrow.Table`, with the metadata of the file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file) as parquet:
            _check_declared(parquet.metadata, most)
            schema = parquet.schema_arrow
        nested = [field.name for field in schema if pa.types.is_nested(field.type)]
        if nested:
            raise ValueError(f"column {nested[0]!r} does not hold numbers or strings")
        strings = [field.name for field in schema if _is_string(field.type)]
        # a dictionary keeps each string once, so that their total is known before they are repeated
        with pq.ParquetFile(file, read_dictionary=strings, page_checksum_verification=True) as parquet:
            table = parquet.read()
        _check_strings(table, strings)
        return table.cast(schema)
    except Exception as error:  # pyarrow has no common class for errors of a broken file
        raise CorruptFile(f"{file.name} is corrupt ({error})") from error


def _is_string(kind: Any) -> bool:
    import pyarrow as pa

    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _check_declared(metadata: Any, most: int) -> None:
    """Raise if the file declares more rows, columns, cells or bytes than a table of sepcap has."""
    rows, columns = metadata.num_rows, metadata.num_columns
    if rows > most or columns > MOST_COLUMNS or rows * columns > MOST_CELLS:
        raise ValueError(f"{rows:,} rows of {columns:,} columns")
    size = sum(metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups))
    if size > MOST_BYTES:
        raise ValueError(f"{size:,} bytes of columns")


def _check_strings(table: Any, strings: list[str]) -> None:
    """Raise if the strings, each repeated as often as it occurs, have more bytes than `MOST_BYTES`."""
    import pyarrow.compute

    pc: Any = pyarrow.compute  # which makes its functions when it is imported, so that their names are not known before

    size = 0
    for name in strings:
        for chunk in table.column(name).chunks:
            size += pc.sum(pc.binary_length(chunk.dictionary).cast("int64").take(chunk.indices)).as_py() or 0
    if size > MOST_BYTES:
        raise ValueError(f"{size:,} bytes of strings")


def same_table(one: pd.DataFrame, other: pd.DataFrame) -> bool:
    """Whether two tables hold the same values, whatever their types."""
    if list(one.columns) != list(other.columns) or len(one) != len(other):
        return False
    pairs = ((one[name].astype(object).to_numpy(), other[name].astype(object).to_numpy()) for name in one.columns)
    return all(bool(((a == b) | (pd.isna(a) & pd.isna(b))).all()) for a, b in pairs)
