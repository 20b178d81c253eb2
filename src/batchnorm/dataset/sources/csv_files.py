"""CSV files, parsed by pyarrow."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from ...errors import ArgumentError
from ..addresses import fingerprint_of
from ..extras import first_line
from .tables import TableFile, arrow, choose_columns, explain_table_errors, first_few

#: Bytes of text that are parsed together, and so the longest line that there may be.
CSV_BYTES = 1 << 23


class CsvFile(TableFile):
    """A .csv file."""

    def _explain_errors(self) -> contextlib.AbstractContextManager[None]:
        return _explain_csv_errors(self.path)

    def _read(self, columns: Sequence[str], row_bytes: int | None) -> Iterator[tuple[Any, int]]:
        pa = arrow()
        features = set(self.names)
        types = {name: pa.float64() if name in features else pa.string() for name in columns}
        with contextlib.ExitStack() as stack:
            file = stack.enter_context(pa.OSFile(self.path))
            # An empty line is a missing value where there is nothing else on a line.
            alone = len(self.columns) == 1
            reader = _open_reader(file, self.header, types, empty_lines=alone)
            stack.callback(reader.close)
            done = 0
            for batch in reader:
                before, done = done, file.tell()  # parsing runs ahead: no more than an estimate
                if batch.num_rows:
                    yield batch, done - before


def open_csv(path: str, *, columns: Sequence[str] | None, header: bool) -> CsvFile:
    """Read the names of the columns and check that those asked for are numbers.

    Raises
    ------
    ArgumentError, DTypeError
        It is not a table, or lacks a column, or a column is not numbers.
    """
    pa = arrow()
    fingerprint = fingerprint_of(path)
    with _explain_csv_errors(path), pa.OSFile(str(path)) as text:
        reader = _open_reader(text, header)
        fields = list(zip(reader.schema.names, reader.schema.types, strict=True))
        reader.close()
    present, types = [name for name, _ in fields], dict(fields)
    if header and columns is None and _are_numbers(present):
        raise ArgumentError(
            f"{path}: must begin with a line of names, got the numbers {first_few(present)}. "
            "Pass header=False, --no-header, if they are the first row; name them by "
            "columns=[...], --columns, if they are names."
        )
    is_integer, is_floating, is_null = pa.types.is_integer, pa.types.is_floating, pa.types.is_null
    names = choose_columns(
        path,
        fields,
        columns,
        # null: nothing but missing values so far
        lambda kind: bool(is_integer(kind) or is_floating(kind) or is_null(kind)),
        advice=" It is a single column: values must be separated by commas."
        if len(present) == 1
        else "",
        advice_on_text=", or pass header=False, --no-header" if header else "",
    )
    return CsvFile(
        path=path,
        fingerprint=fingerprint,
        names=names,
        columns=tuple(present),
        header=header,
        together=len(present),
        integers=frozenset(name for name in names if is_integer(types[name])),
    )


def _open_reader(
    file: Any, header: bool, types: dict[str, Any] | None = None, *, empty_lines: bool = False
) -> Any:
    """Open a streaming reader; with `types`, of these columns only."""
    csv = arrow("pyarrow.csv")
    convert = csv.ConvertOptions(
        strings_can_be_null=False,
        **({} if types is None else {"column_types": types, "include_columns": list(types)}),
    )
    read = csv.ReadOptions(block_size=CSV_BYTES, autogenerate_column_names=not header)
    parse = csv.ParseOptions(ignore_empty_lines=not empty_lines)
    return csv.open_csv(file, read_options=read, parse_options=parse, convert_options=convert)


@contextlib.contextmanager
def _explain_csv_errors(path: str) -> Iterator[None]:
    advice = "; for a file without a line of names pass header=False, --no-header"
    with explain_table_errors(path, advice):
        try:
            yield
        except (UnicodeDecodeError, arrow().ArrowException) as error:
            said = first_line(error)
            if isinstance(error, UnicodeDecodeError) or "UTF8" in said:
                raise ArgumentError(
                    f"{path}: must be text in UTF-8, and is not ({said}). Decompress or convert it."
                ) from error
            raise


def _are_numbers(names: Sequence[str]) -> bool:
    """Whether the names are numbers, some of which may be missing."""
    try:
        return bool([float(name) for name in names if name])
    except ValueError:
        return False
