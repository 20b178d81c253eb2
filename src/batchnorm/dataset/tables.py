"""CSV and Parquet files by pyarrow, a batch of rows at a time; features are columns."""

from __future__ import annotations

import contextlib
import csv as text_csv
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ArgumentError, DTypeError
from ..native import Array
from .files import Identity, identify, kind_of, reading
from .packages import need
from .sources import BLOCK_BYTES, EXACT, Block, Source, check_exact

#: Bytes of text that are parsed together, and so the longest line that there may be.
CSV_BYTES = 1 << 23

#: Columns of a .parquet file that are read together, more if they are short: each takes memory for
#: a few pages, of 1 MiB if there is as much in a group of rows.
PARQUET_COLUMNS = 32

#: Bytes that a text is taken to have where the file does not say.
TEXT_BYTES = 4096


def arrow(module: str = "pyarrow") -> Any:
    """Pyarrow, or a part of it."""
    return need(module, "data", "CSV and Parquet files")


@dataclass(frozen=True)
class TableFile:
    """Columns of a .csv or .parquet file.

    Attributes
    ----------
    path, identity
        Where and what it is.
    names
        Of the columns that are features.
    columns
        All names, in the order of the file.
    whole
        The columns of a .csv file that begin with integers.
    header
        Whether the first line of a .csv file holds the names.
    together
        How many columns are measured at a time, each time from the first row.
    """

    path: str
    identity: Identity
    names: tuple[str, ...]
    columns: tuple[str, ...]
    whole: frozenset[str]
    header: bool
    together: int

    @property
    def label(self) -> str:
        """Its path."""
        return self.path

    @property
    def features(self) -> int:
        """Number of columns that are features."""
        return len(self.names)

    @property
    def nbytes(self) -> int:
        """Size of the file; rows tell how much of it has been read."""
        return self.identity[2]

    def pieces(self, blocks: int) -> list[Source]:
        """The whole: where rows begin is not known beforehand."""
        return [self]

    def elsewhere(self, path: str) -> TableFile:
        """The same by another path."""
        return replace(self, path=path)

    def blocks(self) -> Iterator[Block]:
        """All rows, as (columns, rows) of float64 with NaN for null; some columns at a time."""
        for first in range(0, self.features, self.together):
            names = self.names[first : first + self.together]
            row = 0
            for number, (batch, nbytes) in enumerate(self.batches(names, 8 * len(names))):
                values = self.values(batch, names)
                channels = slice(first, first + len(names))
                share = nbytes * len(names) // self.features
                yield Block(values, 0, channels, number, self._where(row), share)
                row += batch.num_rows

    def values(self, batch: Any, names: Sequence[str]) -> Array:
        """Columns of a batch as (columns, rows), in memory of their own."""
        values = np.empty((len(names), batch.num_rows))
        columns = by_name(batch)
        for k, name in enumerate(names):
            label = f"{self.path}: column {name!r}"
            values[k] = as_float64(columns[name], label)
            if name in self.whole and (abs(values[k]) >= EXACT).any():
                check_exact(np.nanmin(values[k]), np.nanmax(values[k]), label)
        return values

    def _where(self, start: int) -> Callable[[tuple[int, ...]], str]:
        return lambda index: f"row {start + int(index[1])} (the first is 0, a header not counted)"

    @property
    def _is_parquet(self) -> bool:
        return kind_of(Path(self.path)) == ".parquet"

    def batches(
        self, columns: Sequence[str], row_bytes: int | None = None
    ) -> Iterator[tuple[Any, int]]:
        """Record batches of some columns, and by how many bytes of the file each brings us on.

        `row_bytes` is what a row takes; if None, what it may take with all that is made of it.
        """
        with reading_table(self.path):
            yield from (
                self._parquet(columns, row_bytes) if self._is_parquet else self._csv(columns)
            )

    def _parquet(self, columns: Sequence[str], row_bytes: int | None) -> Iterator[tuple[Any, int]]:
        # The buffer is one of each column. Ahead of time, whole groups of rows would be read.
        buffer = min(1 << 20, max(1 << 12, BLOCK_BYTES // max(1, len(columns))))
        parquet = arrow("pyarrow.parquet")
        with parquet.ParquetFile(self.path, buffer_size=buffer, pre_buffer=False) as file:
            if row_bytes is None:
                row_bytes = row_bytes_of(file.metadata) + 16 * self.features
            rows, done = max(file.metadata.num_rows, 1), 0
            together = max(1, BLOCK_BYTES // max(1, row_bytes))
            for batch in file.iter_batches(together, columns=list(columns)):
                before, done = done, done + batch.num_rows
                yield batch, done * self.nbytes // rows - before * self.nbytes // rows

    def _csv(self, columns: Sequence[str]) -> Iterator[tuple[Any, int]]:
        csv, pa = arrow("pyarrow.csv"), arrow()
        features = set(self.names)
        types = {name: pa.float64() if name in features else pa.string() for name in columns}
        with contextlib.ExitStack() as stack:
            file = stack.enter_context(pa.OSFile(self.path))
            # An empty line is a missing value where there is nothing else on a line.
            alone = len(self.columns) == 1
            reader = open_csv(csv, file, self.header, types, empty_lines=alone)
            stack.callback(reader.close)
            done = 0
            for batch in reader:
                before, done = done, file.tell()  # parsing runs ahead: no more than an estimate
                if batch.num_rows:
                    yield batch, done - before


def by_name(batch: Any) -> dict[str, Any]:
    """The columns of a batch; to look one up in it takes longer the more there are."""
    return dict(zip(batch.schema.names, batch.columns, strict=True))


def row_bytes_of(metadata: Any) -> int:
    """What a row of a .parquet file may take in memory, with all its columns."""
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


def open_csv(
    csv: Any,
    file: Any,
    header: bool,
    types: dict[str, Any] | None = None,
    *,
    empty_lines: bool = False,
) -> Any:
    """A streaming reader; with `types`, of these columns only."""
    convert = csv.ConvertOptions(
        strings_can_be_null=False,
        **({} if types is None else {"column_types": types, "include_columns": list(types)}),
    )
    read = csv.ReadOptions(block_size=CSV_BYTES, autogenerate_column_names=not header)
    parse = csv.ParseOptions(ignore_empty_lines=not empty_lines)
    return csv.open_csv(file, read_options=read, parse_options=parse, convert_options=convert)


def as_float64(column: Any, label: str) -> Array:
    """A column as float64, null as NaN."""
    pa = arrow()
    if pa.types.is_float16(column.type):
        column = column.cast(pa.float32())
    if pa.types.is_int64(column.type) or pa.types.is_uint64(column.type):
        bounds = arrow("pyarrow.compute").min_max(column)
        if bounds["min"].is_valid:
            check_exact(bounds["min"].as_py(), bounds["max"].as_py(), label)
    values: Array = column.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)
    return values


@contextlib.contextmanager
def reading_table(path: str) -> Iterator[None]:
    """Put what pyarrow says in one line that names the file."""
    with reading(path):
        try:
            yield
        except (UnicodeDecodeError, arrow().ArrowException) as error:
            said = str(error).splitlines()[0] if str(error) else type(error).__name__
            is_csv = kind_of(Path(path)) == ".csv"
            if is_csv and (isinstance(error, UnicodeDecodeError) or "UTF8" in said):
                raise ArgumentError(
                    f"{path}: must be text in UTF-8, and is not ({said}). Decompress or convert it."
                ) from error
            raise ArgumentError(
                f"{path}: cannot be read as a table of numbers ({said}). Leave columns that are "
                "not numbers out by columns=[...], --columns A,B"
                + (
                    "; for a file without a line of names pass header=False, --no-header."
                    if is_csv
                    else "."
                )
            ) from error


def open_table(path: Path, *, columns: Sequence[str] | None, header: bool) -> TableFile:
    """See which columns a file has, and whether those that are wanted are numbers.

    Raises
    ------
    ArgumentError, DTypeError
        It is not a table, or has not the columns.
    """
    pa = arrow()
    is_csv = kind_of(path) == ".csv"
    identity = identify(path)
    with reading_table(str(path)):
        if is_csv:
            with pa.OSFile(str(path)) as text:
                reader = open_csv(arrow("pyarrow.csv"), text, header)
                schema = reader.schema
                reader.close()
            together = len(schema.names)
        else:
            with arrow("pyarrow.parquet").ParquetFile(path) as file:
                schema = file.schema_arrow
                together = _columns_together(file.metadata)
        types = list(zip(schema.names, schema.types, strict=True))
    present = [name for name, _ in types]
    if is_csv and header and columns is None and _are_numbers(present):
        raise ArgumentError(
            f"{path}: must begin with a line of names, got the numbers {_some(present)}. Pass "
            "header=False, --no-header, if they are the first row; name them by columns=[...], "
            "--columns, if they are names."
        )
    kinds = dict(types)
    if len(kinds) < len(present):
        seen: set[str] = set()
        repeated = sorted({name for name in present if name in seen or seen.add(name)})  # type: ignore[func-returns-value]
        raise ArgumentError(
            f"{path}: columns must have different names, got {_some(repeated)} more than once. "
            "Rename them."
        )
    chosen = present if columns is None else list(columns)
    for name in chosen:
        if name not in kinds:
            raise ArgumentError(
                f"{path}: has no column {name!r}. It has {_some(present)}. Choose of these."
                + _about_commas(is_csv, present)
            )
    if len(set(chosen)) < len(chosen):
        raise ArgumentError(f"columns must be named once each, got {', '.join(chosen)}.")
    text_ones = [name for name in chosen if not _is_number(pa, kinds[name], is_csv)]
    if text_ones:
        others = set(text_ones)
        numbers = [name for name in present if name not in others]
        what = f"{_some(text_ones)} of type {kinds[text_ones[0]]}"
        raise DTypeError(
            f"{path}: columns must be numbers, got {what}. Choose others by columns=[...], "
            f"--columns {_listed(numbers[:5]) or 'A,B'}"
            + (", or pass header=False, --no-header." if header and is_csv else ".")
            + _about_commas(is_csv, present)
        )
    return TableFile(
        path=str(path),
        identity=identity,
        names=tuple(chosen),
        columns=tuple(present),
        whole=frozenset(n for n in chosen if is_csv and pa.types.is_integer(kinds[n])),
        header=header,
        together=together,
    )


def _columns_together(metadata: Any) -> int:
    groups = [metadata.row_group(k).total_byte_size for k in range(metadata.num_row_groups)]
    column = max([1, *groups]) // max(1, metadata.num_columns)
    return int(max(PARQUET_COLUMNS, BLOCK_BYTES // max(1, column)))


def _are_numbers(names: Sequence[str]) -> bool:
    """Whether what is to be names is numbers, some of which may be missing."""
    try:
        return bool([float(name) for name in names if name])
    except ValueError:
        return False


def _about_commas(is_csv: bool, present: Sequence[str]) -> str:
    if is_csv and len(present) == 1:
        return " It is a single column: values must be separated by commas."
    return ""


def _listed(names: Sequence[str]) -> str:
    """Names as --columns takes them."""
    line = io.StringIO()
    text_csv.writer(line, lineterminator="").writerow(names)
    return line.getvalue()


def _is_number(pa: Any, kind: Any, is_csv: bool) -> bool:
    types = pa.types
    if is_csv:  # null: nothing but missing values so far
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
