"""What CSV and Parquet files have in common: columns, read by pyarrow a batch of rows at a time."""

from __future__ import annotations

import contextlib
import csv
import io
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np

from ...errors import ArgumentError, DTypeError
from ...native import Array
from ..addresses import Fingerprint, explain_read_errors
from ..extras import first_line, import_extra
from .blocks import Block, Source
from .values import EXACT, check_exact

Self = TypeVar("Self", bound="TableFile")


def arrow(module: str = "pyarrow") -> Any:
    """Import pyarrow, or a module of it."""
    return import_extra(module, "data", "CSV and Parquet files")


@dataclass(frozen=True)
class TableFile(ABC):
    """A file of columns, some of which are features.

    Attributes
    ----------
    path, fingerprint
        Where the file is, and its fingerprint when it was opened.
    names
        Names of the columns that are features.
    columns
        Names of all columns, in the order of the file.
    header
        Whether a .csv file begins with a line of names, or is to be written with one.
    together
        Number of columns that are measured at a time, each time from the first row.
    integers
        Columns of integers that are read as float64, which may round them.
    """

    path: str
    fingerprint: Fingerprint
    names: tuple[str, ...]
    columns: tuple[str, ...]
    header: bool
    together: int
    integers: frozenset[str] = frozenset()

    @property
    def label(self) -> str:
        """The path."""
        return self.path

    @property
    def features(self) -> int:
        """Number of columns that are features."""
        return len(self.names)

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
        """Read all rows as (columns, rows) of float64, NaN for null; some columns at a time."""
        for first in range(0, self.features, self.together):
            names = self.names[first : first + self.together]
            row = 0
            for number, (batch, nbytes) in enumerate(self.batches(names, 8 * len(names))):
                values = self.values(batch, names)
                channels = slice(first, first + len(names))
                share = nbytes * len(names) // self.features
                yield Block(values, 0, channels, number, _row_after(row), share)
                row += batch.num_rows

    def values(self, batch: Any, names: Sequence[str]) -> Array:
        """Copy columns of a batch to a (columns, rows) array of float64."""
        values = np.empty((len(names), batch.num_rows))
        columns = by_name(batch)
        for k, name in enumerate(names):
            label = f"{self.path}: column {name!r}"
            values[k] = _as_float64(columns[name], label)
            if name in self.integers and (abs(values[k]) >= EXACT).any():
                check_exact(np.nanmin(values[k]), np.nanmax(values[k]), label)
        return values

    def batches(
        self, columns: Sequence[str], row_bytes: int | None = None
    ) -> Iterator[tuple[Any, int]]:
        """Yield record batches of some columns, each with the bytes of the file that it covers.

        `row_bytes` is the memory of a row; None leaves room for what `normalize` makes of it.
        """
        with self._explain_errors():
            yield from self._read(columns, row_bytes)

    def _explain_errors(self) -> contextlib.AbstractContextManager[None]:
        return explain_table_errors(self.path)

    @abstractmethod
    def _read(self, columns: Sequence[str], row_bytes: int | None) -> Iterator[tuple[Any, int]]:
        """As `batches`, with the errors of pyarrow."""


def _row_after(start: int) -> Callable[[tuple[int, ...]], str]:
    return lambda index: f"row {start + int(index[1])} (the first is 0, a header not counted)"


def by_name(batch: Any) -> dict[str, Any]:
    """Map names to columns; a lookup in the batch itself takes longer the more there are."""
    return dict(zip(batch.schema.names, batch.columns, strict=True))


def _as_float64(column: Any, label: str) -> Array:
    """Convert a column to float64, null to NaN."""
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
def explain_table_errors(path: str, advice: str = "") -> Iterator[None]:
    """Turn pyarrow's errors into one line that names the file; `advice` continues the remedy."""
    with explain_read_errors(path):
        try:
            yield
        except (UnicodeDecodeError, arrow().ArrowException) as error:
            raise ArgumentError(
                f"{path}: cannot be read as a table of numbers ({first_line(error)}). Leave "
                f"columns that are not numbers out by columns=[...], --columns A,B{advice}."
            ) from error


def choose_columns(
    path: str,
    fields: Sequence[tuple[str, Any]],
    columns: Sequence[str] | None,
    is_number: Callable[[Any], bool],
    *,
    advice: str = "",
    advice_on_text: str = "",
) -> tuple[str, ...]:
    """Return the names of the features: those asked for, or all.

    Parameters
    ----------
    path, fields
        The file, and the name and pyarrow type of each of its columns.
    columns
        Names asked for, or None.
    is_number
        Whether a type is one of numbers.
    advice, advice_on_text
        Sentences to add to each error about a column, and a further remedy for columns of text.

    Raises
    ------
    ArgumentError, DTypeError
        Names are repeated, there is no such column, or it does not hold numbers.
    """
    present, types = [name for name, _ in fields], dict(fields)
    if len(types) < len(present):
        repeated = sorted(name for name, n in Counter(present).items() if n > 1)
        raise ArgumentError(
            f"{path}: columns must have different names, got {first_few(repeated)} more than "
            "once. Rename them."
        )
    chosen = tuple(present if columns is None else columns)
    for name in chosen:
        if name not in types:
            raise ArgumentError(
                f"{path}: has no column {name!r}. It has {first_few(present)}. "
                f"Choose among these.{advice}"
            )
    if len(set(chosen)) < len(chosen):
        raise ArgumentError(f"columns must be named once each, got {', '.join(chosen)}.")
    texts = {name: types[name] for name in chosen if not is_number(types[name])}
    if texts:
        numbers = [name for name in present if name not in texts]
        raise DTypeError(
            f"{path}: columns must be numbers, got {first_few(list(texts))} of type "
            f"{next(iter(texts.values()))}. Choose others by columns=[...], "
            f"--columns {_listed(numbers[:5]) or 'A,B'}{advice_on_text}.{advice}"
        )
    return chosen


def _listed(names: Sequence[str]) -> str:
    """Join names as --columns takes them."""
    line = io.StringIO()
    csv.writer(line, lineterminator="").writerow(names)
    return line.getvalue()


def first_few(names: Sequence[str]) -> str:
    """Quote up to five names, and count the rest."""
    shown = ", ".join(map(repr, names[:5]))
    return f"{shown} and {len(names) - 5} more" if len(names) > 5 else shown or "none"
