"""Parquet files, read by pyarrow."""

from __future__ import annotations

import base64
import contextlib
import json
from collections.abc import Iterator, Sequence
from typing import Any

from ..addresses import fingerprint_of
from . import blocks
from .columns import arrow
from .tables import (
    Dialect,
    TableFile,
    choose_columns,
    damaged,
    explain_table_errors,
    fields_of,
    open_arrow,
)

#: Columns that are read together, more if they are short: each takes memory for a few pages, of
#: 1 MiB if there is as much in a group of rows.
PARQUET_COLUMNS = 32

#: Rows that are read to see how much memory a row takes.
SAMPLE_ROWS = 1024


class ParquetFile(TableFile):
    """A .parquet file."""

    def schema(self) -> Any:
        """As `TableFile.schema`, with what the file says of itself."""
        with explain_table_errors(self.path), open_parquet_file(self.path) as file:
            return file.schema_arrow

    def groups(self) -> list[int]:
        """Return the number of rows in each group of rows."""
        with explain_table_errors(self.path), open_parquet_file(self.path) as file:
            return [group.num_rows for group in _groups(file.metadata)]

    def codecs(self) -> dict[str, str]:
        """Return how each column is compressed, by its path in the file.

        To be called when rows have been read: pyarrow ends the process if it is asked about a
        column of a damaged file, and raises if it reads it.
        """
        with explain_table_errors(self.path), open_parquet_file(self.path) as file:
            first = [g.column(k) for g in _groups(file.metadata)[:1] for k in range(g.num_columns)]
            return {column.path_in_schema: column.compression for column in first}

    def _read(self, columns: Sequence[str], row_bytes: int | None) -> Iterator[tuple[Any, int]]:
        # Each column has a buffer of this size. pre_buffer would read whole groups of rows.
        buffer = min(1 << 20, max(1 << 12, blocks.BLOCK_BYTES // max(1, len(columns))))
        with open_parquet_file(self.path, buffer_size=buffer) as file:
            if row_bytes is None:
                row_bytes = _row_bytes(file, columns) + 16 * self.features
            rows, done = file.metadata.num_rows, 0
            share = self.nbytes / max(rows, 1)
            together = max(1, blocks.BLOCK_BYTES // max(1, row_bytes))
            for batch in file.iter_batches(together, columns=list(columns)):
                before, done = done, done + batch.num_rows
                yield batch, int(done * share) - int(before * share)
            if done != rows or rows != sum(g.num_rows for g in _groups(file.metadata)):
                raise damaged(self.path, f"it has {done:,} rows, and says that it has {rows:,}")


def open_parquet(
    path: str, *, columns: Sequence[str] | None, numeric: bool, dialect: Dialect
) -> ParquetFile:
    """Read the names of the columns and check that those asked for are numbers.

    Raises
    ------
    ArgumentError, DTypeError
        It is not a table, or lacks a column, or a column is not numbers.
    """
    fingerprint = fingerprint_of(path)
    with explain_table_errors(path), open_parquet_file(path) as file:
        schema, together = file.schema_arrow, _columns_together(file.metadata)
        fields = fields_of(schema)
        _check_types(path, file, fields)
    return ParquetFile(
        path=path,
        fingerprint=fingerprint,
        chosen=choose_columns(
            path,
            fields,
            columns,
            numeric=numeric,
            hidden=index_columns(schema),
        ),
        columns=tuple(name for name, _ in fields),
        dialect=dialect,
        together=together,
    )


@contextlib.contextmanager
def open_parquet_file(path: str, buffer_size: int = 0) -> Iterator[Any]:
    """Open a file whose pages are compared with their checksums, if they have any."""
    with open_arrow(path) as source:
        yield arrow("pyarrow.parquet").ParquetFile(
            source, buffer_size=buffer_size, pre_buffer=False, page_checksum_verification=True
        )


def _check_types(path: str, file: Any, fields: list[tuple[str, Any]]) -> None:
    """Raise if types of numbers are not those of the schema that Arrow has written beside them.

    Nothing else tells of damage to the types that Parquet has, which have no checksum.
    """
    pa = arrow()
    written = (file.metadata.metadata or {}).get(b"ARROW:schema")
    if written is None:
        return
    for name, kind in fields_of(pa.ipc.read_schema(pa.py_buffer(base64.b64decode(written)))):
        read = dict(fields).get(name, kind)
        if pa.types.is_decimal(kind) and pa.types.is_decimal(read):
            same = (kind.precision, kind.scale) == (read.precision, read.scale)
        else:
            either = pa.types.is_floating(kind) or pa.types.is_floating(read)
            same = kind == read or not either
        if not same:
            raise damaged(path, f"column {name!r} is {read} in one place and {kind} in another")


def index_columns(schema: Any) -> list[str]:
    """Names of the columns that are the index of a data frame of pandas."""
    try:
        said = json.loads((schema.metadata or {}).get(b"pandas", b"{}"))["index_columns"]
        return [name for name in said if isinstance(name, str)]
    except (ValueError, KeyError, TypeError):
        return []


def _groups(metadata: Any) -> list[Any]:
    return [metadata.row_group(k) for k in range(metadata.num_row_groups)]


def _row_bytes(file: Any, columns: Sequence[str]) -> int:
    """Bound the memory of a row, with all its columns."""
    # What the file says of its columns does not bound texts, and may be damaged.
    sample = next(file.iter_batches(SAMPLE_ROWS, columns=list(columns)), None)
    read = 0 if sample is None else sample.nbytes // max(1, sample.num_rows)
    stored = [g.total_byte_size // max(1, g.num_rows) for g in _groups(file.metadata)]
    return int(max([8 * len(columns), read, *stored]))


def _columns_together(metadata: Any) -> int:
    group = max([1, *(group.total_byte_size for group in _groups(metadata))])
    column = group // max(1, metadata.num_columns)
    return int(max(PARQUET_COLUMNS, blocks.BLOCK_BYTES // max(1, column)))
