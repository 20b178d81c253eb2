"""Tables as text, .csv and .tsv, also compressed: cut into whole rows, and parsed by pyarrow."""

from __future__ import annotations

import contextlib
import gzip
import re
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import IO, Any, cast

import numpy as np
from numpy.typing import NDArray

from ...errors import ArgumentError
from ..addresses import fingerprint_of, open_binary, suffix_of
from ..extras import first_line
from .columns import arrow, empty_batch, refuse_digits
from .rows import quote, whole_rows
from .tables import (
    Dialect,
    TableFile,
    by_name,
    choose_columns,
    explain_table_errors,
    fields_of,
    first_few,
)
from .values import EXACT

#: Bytes of text that are parsed together, and so the longest row that there may be.
CSV_BYTES = 1 << 23


class CsvFile(TableFile):
    """A .csv or .tsv file."""

    def _explain_errors(self) -> contextlib.AbstractContextManager[None]:
        return _explain_csv_errors(self.path)

    def schema(self) -> Any:
        """As `TableFile.schema`: features are float64, and all others text."""
        return arrow().schema(list(self._types(self.columns).items()))

    def _types(self, columns: Sequence[str]) -> dict[str, Any]:
        pa = arrow()
        features = {column.name for column in self.chosen}
        return {name: pa.float64() if name in features else pa.string() for name in columns}

    def _read(self, columns: Sequence[str], row_bytes: int | None) -> Iterator[tuple[Any, int]]:
        types = self._types(columns)
        row = 0
        for number, (text, nbytes) in enumerate(_pieces(self.path, self.dialect)):
            names = None if self.dialect.header and number == 0 else self.columns
            piece = _Piece(self.path, self.dialect, text, row, names, len(self.columns) == 1)
            batch = piece.parse(types)
            piece.check_digits(batch)
            row += batch.num_rows
            if batch.num_rows:
                yield batch, nbytes


@dataclass(frozen=True)
class _Piece:
    """Some rows of a file.

    Attributes
    ----------
    path, dialect
        The file, and how it is written.
    text
        The rows, all of them whole.
    row
        Number of the first.
    names
        Names of the columns; None if they are in the first line, or not known.
    alone
        Whether there is one column, so that an empty line is a missing value.
    """

    path: str
    dialect: Dialect
    text: bytes
    row: int = 0
    names: Sequence[str] | None = None
    alone: bool = False

    def parse(self, types: dict[str, Any] | None = None) -> Any:
        """Return the columns that have a type in `types` as a record batch; None for all.

        Raises
        ------
        ArgumentError
            Names the first row that has too few or too many values, or a value that is no number.
        """
        pa = arrow()
        try:
            return self._parse(types)
        except (UnicodeDecodeError, pa.ArrowException) as error:
            self._explain_rows(error)
            for name in (name for name, kind in (types or {}).items() if kind == pa.float64()):
                cells = self._parse({name: pa.binary()}).column(0)
                texts = np.flatnonzero(_kinds_of_cells(cells, self.dialect)[1])
                if texts.size:
                    k = int(texts[0])
                    _refuse_text(self.path, name, cells[k].as_py(), self.row + k)
            raise

    def _explain_rows(self, error: Exception) -> None:
        """Raise if a row has too few or too many values."""
        wrong: list[Any] = []

        def keep(row: Any) -> str:
            wrong.append(row)
            return "error"

        # The text of a row that is not UTF-8 cannot be handed to `keep`.
        readable = replace(self, text=self.text.decode(errors="replace").encode())
        with contextlib.suppress(arrow().ArrowException):
            readable._parse(None, keep)
        if wrong:
            has_names = self.names is None and self.dialect.header
            row = self.row + wrong[0].number - 1 - has_names
            raise ArgumentError(
                f"{self.path}: rows must have {wrong[0].expected_columns} values each, as the "
                f"first line has, got {wrong[0].actual_columns} in row {row} (the first is 0, a "
                f"header not counted), {quote(wrong[0].text)}. Quote values that contain a "
                "separator, or say how it is written by separator= and decimal=, --separator and "
                "--decimal."
            ) from error

    def _parse(self, types: dict[str, Any] | None, invalid_row_handler: Any = None) -> Any:
        pa, csv = arrow(), arrow("pyarrow.csv")
        convert = csv.ConvertOptions(
            strings_can_be_null=False,
            null_values=_nulls(self.dialect),
            decimal_point=self.dialect.decimal,
            column_types=types,
            include_columns=None if types is None else list(types),
        )
        read = csv.ReadOptions(
            block_size=len(self.text),  # one block, in which line breaks may be quoted
            use_threads=invalid_row_handler is None,
            column_names=self.names,
            autogenerate_column_names=self.names is None and not self.dialect.header,
        )
        parse = csv.ParseOptions(
            delimiter=self.dialect.separator_in(self.path),
            ignore_empty_lines=not self.alone,
            invalid_row_handler=invalid_row_handler,
        )
        table = csv.read_csv(pa.BufferReader(self.text), read, parse, convert)
        return (
            table.combine_chunks().to_batches()[0] if table.num_rows else empty_batch(table.schema)
        )

    def check_digits(self, batch: Any) -> None:
        """Raise if float64 does not hold a number that is written without an exponent."""
        pa = arrow()
        columns = by_name(batch)
        large = [
            name
            for name, column in columns.items()
            if pa.types.is_float64(column.type) and _largest(column) >= EXACT
        ]
        for name in large:
            cells = self._parse({name: pa.binary()}).column(0)
            values = columns[name].to_numpy(zero_copy_only=False)
            plain = arrow("pyarrow.compute").match_substring_regex(
                cells, _number(self.dialect.decimal)[0]
            )
            written = plain.to_numpy(zero_copy_only=False)
            for k in np.flatnonzero(written & (abs(values) >= EXACT)).tolist():
                text = cells[k].as_py().decode().strip()
                if Decimal(text.replace(self.dialect.decimal, ".")) != Decimal(values[k]):
                    label = f"{self.path}: column {name!r}, row {self.row + k}"
                    what = "integers" if text.lstrip("+-").isdigit() else "numbers"
                    refuse_digits(label, what, text if len(text) <= 40 else f"{text[:40]}…")


def _largest(column: Any) -> float:
    """The greatest magnitude in a column; NaN, and -inf for none, compare as small."""
    values = column.to_numpy(zero_copy_only=False)
    least = np.fmin.reduce(values, initial=np.inf)
    return float(max(np.fmax.reduce(values, initial=-np.inf), -least))


def open_csv(
    path: str, *, columns: Sequence[str] | None, numeric: bool, dialect: Dialect
) -> CsvFile:
    """Read the names of the columns and check that those asked for are numbers.

    Raises
    ------
    ArgumentError, DTypeError
        It is not a table, or lacks a column, or a column is not numbers.
    """
    pa = arrow()
    fingerprint = fingerprint_of(path)
    separator = dialect.separator_in(path)
    with _explain_csv_errors(path), contextlib.closing(_pieces(path, dialect)) as pieces:
        text, _ = next(pieces, (b"", 0))
        if not text.strip(b"\r\n"):
            raise ArgumentError(
                f"{path}: must begin with a line of {'names' if dialect.header else 'values'}, and "
                "is empty. Write one, or leave the file out."
            )
        first = _Piece(path, dialect, text).parse()
        fields = fields_of(first.schema)
    present = [name for name, _ in fields]
    if dialect.header and columns is None and _are_numbers(present, dialect):
        raise ArgumentError(
            f"{path}: must begin with a line of names, got the numbers {first_few(present)}. "
            "Pass header=False, --no-header, if they are the first row; name them by "
            "columns=[...], --columns, if they are names."
        )
    wanted = set(present if columns is None else columns)
    for name, cells in zip(present, first.columns, strict=True):
        if name in wanted:
            _check_text(path, name, cells, dialect)
    # A separator at the end of each line makes a last column without a name or values.
    ends_empty = len(fields) > 1 and fields[-1][0] == "" and pa.types.is_null(fields[-1][1])
    return CsvFile(
        path=path,
        fingerprint=fingerprint,
        chosen=choose_columns(
            path,
            fields,
            columns,
            numeric=numeric,
            hidden=[""] if ends_empty else (),
            is_number=_is_number,
            advice=f" It is a single column: values must be separated by {separator!r}, unless you "
            "pass another separator=, --separator."
            if len(present) == 1
            else "",
            advice_on_text=", or pass header=False, --no-header" if dialect.header else "",
        ),
        columns=tuple(present),
        dialect=dialect,
        together=len(present),
    )


def _is_number(kind: Any) -> bool:
    types = arrow().types
    # null: nothing but missing values so far
    return bool(types.is_integer(kind) or types.is_floating(kind) or types.is_null(kind))


def _pieces(path: str, dialect: Dialect) -> Generator[tuple[bytes, int], None, None]:
    """Yield the text of a file in pieces of whole rows, each with the bytes read for it."""
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(open_binary(path))
        text: IO[bytes] = file
        if suffix_of(path).endswith(".gz"):
            text = stack.enter_context(cast(IO[bytes], gzip.GzipFile(fileobj=file)))
        separator = dialect.separator_in(path).encode()
        done, begin = 0, True
        for rows in whole_rows(lambda size: _read(text, size), separator, CSV_BYTES, path):
            before, done = done, file.tell()
            if begin and dialect.header:
                rows = rows.lstrip(b"\r\n")  # a line of names is not empty
            begin = begin and not rows
            if rows:
                yield rows, done - before


def _read(file: IO[bytes], size: int) -> bytes:
    """Read so many bytes, fewer only at the end: what is parsed together depends on no buffer."""
    data = file.read(size)
    if 0 < len(data) < size:
        several = [data]
        while size := size - len(data):
            if not (data := file.read(size)):
                break
            several.append(data)
        return b"".join(several)
    return data


# ---- what is not a number -----------------------------------------------------------------------


def _nulls(dialect: Dialect) -> list[str]:
    """What stands for a missing value."""
    usual: list[str] = arrow("pyarrow.csv").ConvertOptions().null_values
    return [*usual, *dialect.nulls]


def _number(decimal: str) -> tuple[str, str]:
    """Patterns of a number without an exponent, and of any number, of a column's text."""
    point = re.escape(decimal)
    digits = rf"[-+]?([0-9]+({point}[0-9]*)?|{point}[0-9]+)"
    special = "[-+]?(?i:inf|infinity|nan)"
    return rf"^[ \t]*{digits}[ \t]*$", rf"^[ \t]*({digits}([eE][-+]?[0-9]+)?|{special})[ \t]*$"


def _kinds_of_cells(cells: Any, dialect: Dialect) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Where a column of bytes has a number, and where neither a number nor a missing value."""
    pa, pc = arrow(), arrow("pyarrow.compute")
    numbers = pc.match_substring_regex(cells, _number(dialect.decimal)[1])
    nulls = pa.array([text.encode() for text in _nulls(dialect)], pa.binary())
    texts = pc.invert(pc.or_(numbers, pc.is_in(cells, nulls)))
    return numbers.to_numpy(zero_copy_only=False), texts.to_numpy(zero_copy_only=False)


def _check_text(path: str, name: str, cells: Any, dialect: Dialect) -> None:
    """Raise if a column that was taken for text has no more texts than numbers."""
    pa = arrow()
    if not (pa.types.is_string(cells.type) or pa.types.is_binary(cells.type)):
        return
    cells = cells.cast(pa.binary())
    numbers, texts = _kinds_of_cells(cells, dialect)
    if np.count_nonzero(numbers) >= np.count_nonzero(texts) > 0:
        k = int(np.flatnonzero(texts)[0])
        _refuse_text(path, name, cells[k].as_py(), k)


def _refuse_text(path: str, name: str, cell: bytes, row: int) -> None:
    """Raise for a cell that is no number."""
    raise ArgumentError(
        f"{path}: column {name!r} must be numbers, got {quote(cell)} in row {row} (the first is 0, "
        f"a header not counted). If it stands for a missing value, pass nulls=[{quote(cell)}], "
        f"--nulls {quote(cell)}; otherwise correct it, or leave the column out by columns=[...], "
        "--columns."
    )


def _are_numbers(names: Sequence[str], dialect: Dialect) -> bool:
    """Whether the names are numbers, some of which may be missing."""
    try:
        return bool([float(name.replace(dialect.decimal, ".")) for name in names if name])
    except ValueError:
        return False


@contextlib.contextmanager
def _explain_csv_errors(path: str) -> Iterator[None]:
    with explain_table_errors(path):
        try:
            yield
        except (UnicodeDecodeError, arrow().ArrowException) as error:
            said = first_line(error)
            if isinstance(error, UnicodeDecodeError) or "UTF8" in said:
                raise ArgumentError(
                    f"{path}: must be text in UTF-8, and is not ({said}). Convert it; if it is "
                    "compressed, name it .csv.gz."
                ) from error
            raise ArgumentError(
                f"{path}: cannot be read as a table of numbers ({said}). Leave columns that are "
                "not numbers out by columns=[...], --columns A,B; for a file without a line of "
                "names pass header=False, --no-header."
            ) from error
