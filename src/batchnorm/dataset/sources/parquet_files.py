"""Parquet files, read by pyarrow."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from ..addresses import fingerprint_of
from . import blocks
from .tables import TableFile, arrow, choose_columns, explain_table_errors

#: Columns that are read together, more if they are short: each takes memory for a few pages, of
#: 1 MiB if there is as much in a group of rows.
PARQUET_COLUMNS = 32

#: Bytes that a text is taken to have where the file does not say.
TEXT_BYTES = 4096


class ParquetFile(TableFile):
    """A .parquet file."""

    def _read(self, columns: Sequence[str], row_bytes: int | None) -> Iterator[tuple[Any, int]]:
        # Each column has a buffer of this size. pre_buffer would read whole groups of rows.
        buffer = min(1 << 20, max(1 << 12, blocks.BLOCK_BYTES // max(1, len(columns))))
        parquet = arrow("pyarrow.parquet")
        with parquet.ParquetFile(self.path, buffer_size=buffer, pre_buffer=False) as file:
            if row_bytes is None:
                row_bytes = _row_bytes(file.metadata) + 16 * self.features
            rows, done = max(file.metadata.num_rows, 1), 0
            together = max(1, blocks.BLOCK_BYTES // max(1, row_bytes))
            for batch in file.iter_batches(together, columns=list(columns)):
                before, done = done, done + batch.num_rows
                yield batch, done * self.nbytes // rows - before * self.nbytes // rows


def open_parquet(path: str, *, columns: Sequence[str] | None, header: bool) -> ParquetFile:
    """Read the names of the columns and check that those asked for are numbers.

    Raises
    ------
    ArgumentError, DTypeError
        It is not a table, or lacks a column, or a column is not numbers.
    """
    fingerprint = fingerprint_of(path)
    with (
        explain_table_errors(path),
        arrow("pyarrow.parquet").ParquetFile(path) as file,
    ):
        schema, together = file.schema_arrow, _columns_together(file.metadata)
        fields = list(zip(schema.names, schema.types, strict=True))
    return ParquetFile(
        path=path,
        fingerprint=fingerprint,
        names=choose_columns(path, fields, columns, _is_number),
        columns=tuple(name for name, _ in fields),
        header=header,
        together=together,
    )


def _is_number(kind: Any) -> bool:
    types = arrow().types
    checks = (
        types.is_integer,
        types.is_floating,
        types.is_boolean,
        types.is_decimal,
        types.is_null,
    )
    return any(check(kind) for check in checks)


def _row_bytes(metadata: Any) -> int:
    """Bound the memory of a row, with all its columns."""
    size, groups = 0, [metadata.row_group(k) for k in range(metadata.num_row_groups)]
    for k in range(metadata.num_columns):
        if metadata.schema.column(k).physical_type != "BYTE_ARRAY":
            size += 8
            continue
        # Texts that are often repeated are stored once; their bounds are examples of their length.
        widths = [64]
        for group in groups:
            bounds = group.column(k).statistics
            known = bounds is not None and bounds.has_min_max
            widths.append(max(len(bounds.min_raw), len(bounds.max_raw)) if known else TEXT_BYTES)
        size += 8 + max(widths)
    stored = [g.total_byte_size // max(1, g.num_rows) for g in groups]
    return int(max([size, *stored]))


def _columns_together(metadata: Any) -> int:
    groups = [metadata.row_group(k).total_byte_size for k in range(metadata.num_row_groups)]
    column = max([1, *groups]) // max(1, metadata.num_columns)
    return int(max(PARQUET_COLUMNS, blocks.BLOCK_BYTES // max(1, column)))
