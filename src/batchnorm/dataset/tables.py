"""CSV and Parquet files by pyarrow, a batch of rows at a time; features are columns."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ArgumentError, DTypeError
from ..native import Array
from .packages import need
from .sources import BLOCK_BYTES, Block, reading

#: Bytes of text that are parsed together, and so the longest line that there may be.
CSV_BYTES = 1 << 23


def arrow(module: str = "pyarrow") -> Any:
    """Pyarrow, or a part of it."""
    return need(module, "data", "CSV and Parquet files")


@dataclass(frozen=True)
class TableFile:
    """Columns of a .csv or .parquet file.

    Attributes
    ----------
    path
    names
        Of the columns that are features.
    columns
        All names, in the order of the file.
    header
        Whether the first line of a .csv file holds the names.
    nbytes
        Size of the file; rows tell how much of it has been read.
    batch_rows
        Rows of a .parquet file that are read together.
    """

    path: str
    names: tuple[str, ...]
    columns: tuple[str, ...]
    header: bool
    nbytes: int
    batch_rows: int

    block_count = None

    @property
    def label(self) -> str:
        """Its path."""
        return self.path

    @property
    def features(self) -> int:
        """Number of columns that are features."""
        return len(self.names)

    @property
    def others(self) -> tuple[str, ...]:
        """The columns that are no features."""
        return tuple(name for name in self.columns if name not in set(self.names))

    def blocks(self, first: int = 0, last: int | None = None) -> Iterator[Block]:
        """All rows, as (columns, rows) of float64 with NaN for null; blocks cannot be chosen."""
        row = 0
        for batch, nbytes in self.batches(self.names):
            # A new array each time: the one before is still being summed.
            values = np.empty((len(self.names), batch.num_rows))
            for k, name in enumerate(self.names):
                values[k] = as_float64(batch.column(name))
            yield Block(values, 0, slice(0, len(self.names)), self._where(row), nbytes)
            row += batch.num_rows

    def _where(self, start: int) -> Callable[[tuple[int, ...]], str]:
        return lambda index: f"row {start + int(index[1])} (the first is 0, a header not counted)"

    def batches(self, columns: Sequence[str]) -> Iterator[tuple[Any, int]]:
        """Record batches of some columns, and by how many bytes of the file each brings us on."""
        with reading_table(self.path):
            if self.path.endswith(".parquet"):
                yield from self._parquet(columns)
            else:
                yield from self._csv(columns)

    def _parquet(self, columns: Sequence[str]) -> Iterator[tuple[Any, int]]:
        with arrow("pyarrow.parquet").ParquetFile(self.path, buffer_size=1 << 20) as file:
            rows, done = max(file.metadata.num_rows, 1), 0
            for batch in file.iter_batches(self.batch_rows, columns=list(columns)):
                before, done = done, done + batch.num_rows
                yield batch, done * self.nbytes // rows - before * self.nbytes // rows

    def _csv(self, columns: Sequence[str]) -> Iterator[tuple[Any, int]]:
        csv, pa = arrow("pyarrow.csv"), arrow()
        features = set(self.names)
        types = {name: pa.float64() if name in features else pa.string() for name in columns}
        with contextlib.ExitStack() as stack:
            file = stack.enter_context(pa.OSFile(self.path))
            reader = open_csv(csv, file, self.header, types)
            stack.callback(reader.close)
            done = 0
            for batch in reader:
                before, done = done, file.tell()  # parsing runs ahead: no more than an estimate
                if batch.num_rows:
                    yield batch, done - before


def open_csv(csv: Any, file: Any, header: bool, types: dict[str, Any] | None = None) -> Any:
    """A streaming reader; with `types`, of these columns only."""
    convert = csv.ConvertOptions(
        strings_can_be_null=False,
        **({} if types is None else {"column_types": types, "include_columns": list(types)}),
    )
    read = csv.ReadOptions(block_size=CSV_BYTES, autogenerate_column_names=not header)
    return csv.open_csv(file, read_options=read, convert_options=convert)


def as_float64(column: Any) -> Array:
    """A column as float64, null as NaN."""
    pa = arrow()
    if pa.types.is_float16(column.type):
        column = column.cast(pa.float32())
    values: Array = column.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)
    return values


@contextlib.contextmanager
def reading_table(path: str) -> Iterator[None]:
    """Put what pyarrow says in one line that names the file."""
    with reading(path):
        try:
            yield
        except arrow().ArrowException as error:
            said = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ArgumentError(
                f"{path}: cannot be read as a table of numbers ({said}). Leave columns that are "
                "not numbers out by columns=[...], --columns A,B; for a .csv file without a line "
                "of names pass header=False, --no-header."
            ) from error


def open_table(path: Path, *, columns: Sequence[str] | None, header: bool) -> TableFile:
    """See which columns a file has, and whether those that are wanted are numbers.

    Raises
    ------
    ArgumentError, DTypeError
        It is not a table, or has not the columns.
    """
    pa = arrow()
    with reading_table(str(path)):
        if path.suffix == ".parquet":
            with arrow("pyarrow.parquet").ParquetFile(path) as file:
                schema = file.schema_arrow
        else:
            with pa.OSFile(str(path)) as text:
                reader = open_csv(arrow("pyarrow.csv"), text, header)
                schema = reader.schema
                reader.close()
    present = list(schema.names)
    repeated = sorted({name for name in present if present.count(name) > 1})
    if repeated:
        raise ArgumentError(
            f"{path}: columns must have different names, got {', '.join(map(repr, repeated))} more "
            "than once. Rename them."
        )
    chosen = present if columns is None else list(columns)
    for name in chosen:
        if name not in present:
            raise ArgumentError(f"{path}: has no column {name!r}. It has {_some(present)}.")
    if len(set(chosen)) < len(chosen):
        raise ArgumentError(f"columns must be named once each, got {', '.join(chosen)}.")
    text = [name for name in chosen if not _is_number(pa, schema.field(name).type, path.suffix)]
    if text:
        numbers = [name for name in present if name not in text]
        what = f"{_some(text)} of type {schema.field(text[0]).type}"
        raise DTypeError(
            f"{path}: columns must be numbers, got {what}. Choose others by columns=[...], "
            f"--columns {','.join(numbers[:5]) or 'A,B'}"
            + (", or pass header=False, --no-header." if header and path.suffix == ".csv" else ".")
        )
    return TableFile(
        path=str(path),
        names=tuple(chosen),
        columns=tuple(present),
        header=header,
        nbytes=path.stat().st_size,
        batch_rows=max(1, BLOCK_BYTES // (8 * max(1, len(chosen)))),
    )


def _is_number(pa: Any, kind: Any, suffix: str) -> bool:
    types = pa.types
    if suffix == ".csv":  # null: nothing but missing values so far
        return bool(types.is_integer(kind) or types.is_floating(kind) or types.is_null(kind))
    return bool(
        types.is_integer(kind)
        or types.is_floating(kind)
        or types.is_boolean(kind)
        or types.is_decimal(kind)
        or types.is_null(kind)
    )


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(map(repr, names[:5]))
    return f"{shown} and {len(names) - 5} more" if len(names) > 5 else shown or "none"
