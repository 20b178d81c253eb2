"""Arrow files, .arrow and .feather, of both formats of Arrow's IPC, read by pyarrow."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ...errors import ArgumentError
from ..addresses import fingerprint_of
from . import blocks
from .columns import arrow
from .parquet_files import index_columns
from .tables import (
    Dialect,
    TableFile,
    choose_columns,
    damaged,
    explain_table_errors,
    fields_of,
    open_arrow,
)

#: First bytes of a file with an index of its batches, and of version 1 of Feather.
MAGIC, FEATHER_1 = b"ARROW1", b"FEA1"

#: Blocks that a batch of the columns read together may take; batches of Arrow are not bounded.
BATCH_BLOCKS = 4

#: Last bytes of a stream.
END = b"\xff\xff\xff\xff\0\0\0\0"


@dataclass(frozen=True)
class ArrowFile(TableFile):
    """A .arrow or .feather file.

    Attributes
    ----------
    stream
        Whether it is a stream, without an index of its batches.
    """

    stream: bool

    def schema(self) -> Any:
        """As `TableFile.schema`, with what the file says of itself."""
        ipc = arrow("pyarrow.ipc")
        with explain_table_errors(self.path), open_arrow(self.path) as file:
            return (ipc.open_stream if self.stream else ipc.open_file)(file).schema

    def _read(self, columns: Sequence[str], row_bytes: int | None) -> Iterator[tuple[Any, int]]:
        if row_bytes is None:
            row_bytes = 16 * self.features
        fields = [self.columns.index(name) for name in columns]
        before = 0
        with open_arrow(self.path) as file:
            for batch, done in _batches(file, self, fields):
                batch.validate(full=True)  # a damaged one may say that it has more than there is
                share = (done - before) / max(batch.num_rows, 1)
                before = done
                wide = row_bytes + batch.nbytes // max(1, batch.num_rows)
                rows = max(1, blocks.BLOCK_BYTES // wide)
                for start in range(0, batch.num_rows, rows):
                    part = batch.slice(start, rows)
                    yield part, int(share * part.num_rows)


def _batches(file: Any, table: ArrowFile, fields: list[int]) -> Iterator[tuple[Any, int]]:
    """Yield record batches of some columns, each with the bytes of the file up to its end."""
    ipc = arrow("pyarrow.ipc")
    options = ipc.IpcReadOptions(included_fields=fields)
    if not table.stream:
        reader = ipc.open_file(file, options=options)
        for k in range(reader.num_record_batches):
            yield reader.get_batch(k), (k + 1) * table.nbytes // reader.num_record_batches
        return
    with ipc.open_stream(file, options=options) as reader:
        for batch in reader:
            yield batch, file.tell()
    if file.tell() != table.nbytes:
        raise damaged(table.path, "it goes on behind the mark of its end")


def open_arrow_file(
    path: str, *, columns: Sequence[str] | None, numeric: bool, dialect: Dialect
) -> ArrowFile:
    """Read the names of the columns and check that those asked for are numbers.

    Raises
    ------
    ArgumentError, DTypeError
        It is not a table, or lacks a column, or a column is not numbers.
    """
    ipc = arrow("pyarrow.ipc")
    fingerprint = fingerprint_of(path)
    size = fingerprint[2]
    with explain_table_errors(path), open_arrow(path) as file:
        begin = file.read(len(MAGIC))
        if begin.startswith(FEATHER_1):
            raise ArgumentError(
                f"{path}: must be version 2 of Feather, got version 1. Rewrite it with "
                "pyarrow.feather.write_feather."
            )
        stream, largest = begin != MAGIC, 1
        file.seek(max(0, size - len(END)))
        if stream and file.read(len(END)) != END:
            # A stream that is cut between two batches would be a shorter one.
            raise damaged(path, "it does not end as a stream of Arrow does")
        file.seek(0)
        if stream:
            schema = ipc.open_stream(file).schema
        else:
            reader = ipc.open_file(file)
            schema, largest = reader.schema, size // max(1, reader.num_record_batches)
            if reader.num_record_batches == 0:
                file.seek(8)  # behind the magic bytes lies a stream
                if next(iter(ipc.open_stream(file)), None) is not None:
                    raise damaged(path, "its index lists no rows, and it has some")
        fields = fields_of(schema)
    return ArrowFile(
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
        # A column of a batch is read as a whole; a stream is read as a whole in any case.
        together=len(fields)
        if stream
        else max(1, len(fields) * BATCH_BLOCKS * blocks.BLOCK_BYTES // max(1, largest)),
        stream=stream,
    )
