"""What all tables have in common: columns, read by pyarrow a batch of rows at a time."""

from __future__ import annotations

import contextlib
import gzip
import zlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeVar

import numpy as np

from ...errors import ArgumentError, DTypeError
from ...native import Array
from ..addresses import Fingerprint, explain_read_errors, is_remote, open_binary, suffix_of
from ..extras import first_line
from .blocks import Block, Source, check_width
from .columns import (
    Column,
    IsNumber,
    Precision,
    arrow,
    is_number,
    match_elements,
    to_float64,
    width_of,
)

Self = TypeVar("Self", bound="TableFile")


@dataclass(frozen=True)
class Dialect:
    """How tables are written as text.

    Attributes
    ----------
    header
        Whether the first line has the names of the columns.
    separator
        What stands between values; None for that which the file's suffix says.
    decimal
        The decimal point.
    nulls
        What stands for a missing value, beside what always does.
    """

    header: bool = True
    separator: str | None = None
    decimal: str = "."
    nulls: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check each character."""
        if self.separator == "\\t":  # as it is typed in a shell
            object.__setattr__(self, "separator", "\t")
        for text in self.nulls:
            if not isinstance(text, str):
                raise ArgumentError(f"nulls must be texts, got {text!r}. Quote it.")
        for name in ("separator", "decimal"):
            value = getattr(self, name)
            if value is None:
                continue
            if not isinstance(value, str) or len(value) != 1 or not value.isascii():
                raise ArgumentError(f"{name} must be one character of ASCII, got {value!r}.")
            if value.isalnum() or value in '"\r\n\0+-':
                raise ArgumentError(
                    f"{name} must be a character that no number has, nor a quotation mark or line "
                    f"break, got {value!r}."
                )

    def separator_in(self, path: str) -> str:
        """Return what stands between values in a file of this name.

        Raises
        ------
        ArgumentError
            It is the decimal point.
        """
        usual = "\t" if suffix_of(path).startswith(".tsv") else ","
        separator = usual if self.separator is None else self.separator
        if separator == self.decimal:
            raise ArgumentError(
                f"{path}: separator must differ from decimal, got {separator!r} for both. Pass "
                "another by separator=, --separator, such as ';'."
            )
        return separator


@dataclass(frozen=True)
class TableFile(ABC):
    """A file of columns, some of which are features.

    Attributes
    ----------
    path, fingerprint
        Where the file is, and its fingerprint when it was opened.
    chosen
        The columns whose values are features.
    columns
        Names of all columns, in the order of the file.
    dialect
        How it is written as text, or is to be.
    together
        Number of columns that are measured at a time, each time from the first row.
    """

    path: str
    fingerprint: Fingerprint
    chosen: tuple[Column, ...]
    columns: tuple[str, ...]
    dialect: Dialect
    together: int

    @property
    def label(self) -> str:
        """The path."""
        return self.path

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Names of the features."""
        return tuple(name for column in self.chosen for name in column.names)

    @cached_property
    def features(self) -> int:
        """Number of features."""
        return sum(column.features for column in self.chosen)

    @property
    def nbytes(self) -> int:
        """Size of the file."""
        return self.fingerprint[2]

    def split(self, blocks: int) -> list[Source]:
        """Return the whole file: where its rows begin is not known beforehand."""
        return [self]

    def with_path(self: Self, path: str) -> Self:
        """Return the same file under another path."""
        return replace(self, path=path)

    def blocks(self) -> Iterator[Block]:
        """Read all rows as (features, rows) of float64, NaN for null; some columns at a time."""
        start, whole = 0, self.features
        for first in range(0, len(self.chosen), self.together):
            some = self.chosen[first : first + self.together]
            channels = slice(start, start + sum(column.features for column in some))
            start, row = channels.stop, 0
            wide = channels.stop - channels.start
            names = [column.name for column in some]
            for number, (batch, nbytes) in enumerate(self.batches(names, 8 * wide)):
                values, share = self.values(batch, some), nbytes * wide // whole
                yield Block(values, 0, channels, number, row_after(row), share)
                row += batch.num_rows

    def values(self, batch: Any, chosen: Sequence[Column]) -> Array:
        """Copy columns of a batch to a (features, rows) array of float64."""
        columns = by_name(batch)
        if len(chosen) == 1:
            return to_float64(columns[chosen[0].name], chosen[0])
        values = np.empty((sum(column.features for column in chosen), batch.num_rows))
        at = 0
        for column in chosen:
            values[at : at + column.features] = to_float64(columns[column.name], column)
            at += column.features
        return values

    def batches(
        self, columns: Sequence[str], row_bytes: int | None = None
    ) -> Iterator[tuple[Any, int]]:
        """Yield record batches of some columns, each with the bytes of the file that it covers.

        `row_bytes` is the memory of a row; None leaves room for what `normalize` makes of it.

        Raises
        ------
        BatchNormError
            The file is damaged, or float64 cannot hold the numbers of a feature.
        """
        precision = Precision(self.path)
        wanted = set(columns)
        features = [column.name for column in self.chosen if column.name in wanted]
        with self._explain_errors():
            for batch, nbytes in self._read(columns, row_bytes):
                there = by_name(batch)
                for name in features:
                    precision.check(there[name], name)
                yield batch, nbytes
            precision.finish()

    def _explain_errors(self) -> contextlib.AbstractContextManager[None]:
        return explain_table_errors(self.path)

    @abstractmethod
    def schema(self) -> Any:
        """Return the pyarrow schema of the batches of all columns, in the order of the file."""

    @abstractmethod
    def _read(self, columns: Sequence[str], row_bytes: int | None) -> Iterator[tuple[Any, int]]:
        """As `batches`, with the errors of pyarrow."""


def row_after(start: int) -> Callable[[tuple[int, ...]], str]:
    """Return what describes the place of an index in a batch whose first row is `start`."""
    return lambda index: f"row {start + int(index[1])} (the first is 0, a header not counted)"


def by_name(batch: Any) -> dict[str, Any]:
    """Map names to columns; a lookup in the batch itself takes longer the more there are."""
    return dict(zip(batch.schema.names, batch.columns, strict=True))


def fields_of(schema: Any) -> list[tuple[str, Any]]:
    """Name and type of each column; raises what `explain_table_errors` explains."""
    return list(zip(schema.names, schema.types, strict=True))


def open_arrow(path: str) -> Any:
    """Open a file for pyarrow, where it lies."""
    pa = arrow()
    return pa.PythonFile(open_binary(path), mode="r") if is_remote(path) else pa.OSFile(str(path))


@contextlib.contextmanager
def explain_table_errors(path: str) -> Iterator[None]:
    """Turn pyarrow's errors into one line that names the file."""
    pa = arrow()
    with explain_read_errors(path):
        try:
            yield
        except OSError as error:
            # Of damage pyarrow tells by a plain one without a number of the system.
            if error.errno is not None or type(error) not in (OSError, gzip.BadGzipFile):
                raise
            raise damaged(path, first_line(error)) from error
        except (EOFError, zlib.error, UnicodeError, pa.ArrowInvalid, pa.ArrowMemoryError) as error:
            raise damaged(path, first_line(error)) from error
        except pa.ArrowException as error:
            raise ArgumentError(
                f"{path}: cannot be read as a table of numbers ({first_line(error)}). Choose its "
                "columns of numbers by columns=[...], --columns A,B."
            ) from error


def damaged(path: str, said: str) -> ArgumentError:
    """Return the error for a file that is not what its suffix says."""
    return ArgumentError(
        f"{path}: is damaged, cut short or not a {suffix_of(path)} file ({said}). Copy it again "
        "from where it came."
    )


def choose_columns(
    path: str,
    fields: Sequence[tuple[str, Any]],
    columns: Sequence[str] | None,
    *,
    numeric: bool = False,
    hidden: Collection[str] = (),
    is_number: IsNumber = is_number,
    advice: str = "",
    advice_on_text: str = "",
) -> tuple[Column, ...]:
    """Return the columns that are features: those asked for, or all.

    Parameters
    ----------
    path, fields
        The file, and the name and pyarrow type of each of its columns.
    columns
        Names asked for, or None.
    numeric
        Whether to leave columns out that are not numbers.
    hidden
        Names of columns that are features only if asked for.
    is_number
        Whether a type is one of numbers.
    advice, advice_on_text
        Sentences to add to each error about a column, and a further remedy for columns of text.

    Raises
    ------
    ArgumentError, DTypeError, ShapeError
        Names are repeated, there is no such column, it does not hold numbers, or there are too many
        features.
    """
    present, types = [name for name, _ in fields], dict(fields)
    if len(types) < len(present):
        repeated = sorted(name for name, n in Counter(present).items() if n > 1)
        raise ArgumentError(
            f"{path}: columns must have different names, got {first_few(repeated)} more than "
            "once. Rename them."
        )
    widths = {name: width_of(kind, is_number) for name, kind in fields}
    lists = {name: n for name, n in widths.items() if n is not None and not is_number(types[name])}
    if columns is None:
        wanted = [name for name in present if name not in hidden]
    else:
        wanted = match_elements(columns, lists)
    for name in wanted:
        if name not in types:
            raise ArgumentError(
                f"{path}: has no column {name!r}. It has {first_few(present)}. "
                f"Choose among these.{advice}"
            )
    if len(set(wanted)) < len(wanted):
        raise ArgumentError(f"columns must be named once each, got {', '.join(wanted)}.")
    if numeric:
        wanted = [name for name in wanted if widths[name] is not None]
    texts = [name for name in wanted if widths[name] is None]
    if texts:
        kind = types[texts[0]]
        numbers = [name for name in present if widths[name] is not None]
        by_choice = f"Choose others by columns=[...], --columns {_listed(numbers[:5]) or 'A,B'}"
        raise DTypeError(
            f"{path}: columns must be numbers{_lists_of_one_length(kind)}, got {first_few(texts)} "
            f"of type {kind}. {by_choice}, or leave them out by numeric=True, --numeric"
            f"{advice_on_text}.{advice}"
        )
    if not wanted:
        raise DTypeError(
            f"{path}: must have a column of numbers, got {first_few(present)}, none of numbers. "
            f"Convert one.{advice}"
        )
    chosen = tuple(Column(name, lists.get(name)) for name in wanted)
    check_width(path, sum(column.features for column in chosen))
    repeated = [n for n, k in Counter(n for c in chosen for n in c.names).items() if k > 1]
    if repeated:
        raise ArgumentError(
            f"{path}: features must have different names, got {first_few(repeated)} for a column "
            "and for an entry of a list. Rename the column."
        )
    return chosen


def _lists_of_one_length(kind: Any) -> str:
    types = arrow().types
    if not (types.is_list(kind) or types.is_large_list(kind)):
        return ""
    return ", or lists of numbers of one fixed length, such as pa.list_(pa.float32(), 3)"


def _listed(names: Sequence[str]) -> str:
    """Join names as --columns takes them: quoted if they contain commas, or spaces at an end."""
    quoted = [
        '"' + name.replace('"', '""') + '"'
        if name != name.strip() or set(name) & set(',"')
        else name
        for name in names
    ]
    return ",".join(quoted)


def first_few(names: Sequence[str]) -> str:
    """Quote up to five names, and count the rest."""
    shown = ", ".join(map(repr, names[:5]))
    return f"{shown} and {len(names) - 5} more" if len(names) > 5 else shown or "none"
