"""Normalized tables, written a batch of rows at a time."""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ArgumentError
from .addresses import suffix_of
from .affine import Affine, narrow
from .extras import first_line
from .sources import TableFile, blocks
from .sources.arrow_files import ArrowFile
from .sources.columns import arrow, empty_batch, from_float64, is_list
from .sources.parquet_files import ParquetFile
from .sources.tables import by_name

#: Rows of a group of a Parquet file whose source has none, as pyarrow has it.
GROUP_ROWS = 1 << 20

#: Blocks that a group of rows may take while it is collected.
GROUP_BLOCKS = 4


def write_table(
    file: TableFile,
    affine: Affine,
    temporary: Path,
    destination: Path,
    advance: Callable[[int], None],
) -> None:
    """Normalize a table and write it to `temporary`, in the format that `destination` names."""
    before = file.schema()
    schema = _schema(file, before, affine)
    with contextlib.ExitStack() as stack:
        writer: Any = None
        for batch, nbytes in itertools.chain(
            file.batches(file.columns), [(empty_batch(before), 0)]
        ):
            result = _normalized(file, batch, affine, schema)
            with _explain_unfit_columns(destination):
                if writer is None:
                    writer = _open_writer(file, temporary, destination, schema)
                    stack.callback(writer.close)
                if result.num_rows:
                    writer.write_batch(result)
            advance(nbytes)
        with _explain_unfit_columns(destination):
            stack.close()


def _normalized(file: TableFile, batch: Any, affine: Affine, schema: Any) -> Any:
    """Return a batch with its features normalized."""
    pa = arrow()
    values = file.values(batch, file.chosen)
    y = affine(values, 0, label=file.label)
    columns = by_name(batch)
    at = 0
    for column in file.chosen:
        rows = slice(at, at := at + column.features)
        kind = schema.field(column.name).type
        dtype = np.dtype((kind.value_type if is_list(kind) else kind).to_pandas_dtype())
        label = f"{file.path}: column {column.name!r}"
        narrowed = narrow(y[rows], dtype, values[rows], label)
        columns[column.name] = from_float64(narrowed, columns[column.name], kind)
    return pa.record_batch([columns[name] for name in file.columns], schema=schema)


@contextlib.contextmanager
def _explain_unfit_columns(destination: Path) -> Iterator[None]:
    try:
        yield
    except arrow().ArrowException as error:
        raise ArgumentError(
            f"{destination}: cannot hold all columns ({first_line(error)}). "
            "Name a .parquet file, which takes every type."
        ) from error


# ---- types --------------------------------------------------------------------------------------


def _schema(file: TableFile, schema: Any, affine: Affine) -> Any:
    """The schema of the result: features are of a floating type, all else stays as it was."""
    pa = arrow()
    changed: dict[str, Any] = {}
    for column in file.chosen:
        at = schema.get_field_index(column.name)
        field = schema.field(at)
        if column.width is None:
            kind = _floating(field.type, affine)
        else:
            inside = field.type.value_field
            kind = pa.list_(inside.with_type(_floating(inside.type, affine)), column.width)
        if kind != field.type:
            changed[column.name] = kind
            schema = schema.set(at, field.with_type(kind))
    return schema.with_metadata(_metadata(schema.metadata, changed))


def _floating(kind: Any, affine: Affine) -> Any:
    pa = arrow()
    if affine.dtype is not None:
        return pa.from_numpy_dtype(affine.dtype)
    return kind if pa.types.is_floating(kind) else pa.float64()


def _metadata(metadata: Any, changed: Mapping[str, Any]) -> Any:
    """What pandas and Hugging Face have noted of a table, with the types of changed columns."""
    if not metadata:
        return metadata
    result = dict(metadata)
    for key, change in ((b"pandas", _change_pandas), (b"huggingface", _change_hugging_face)):
        with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):  # another form
            said = json.loads(result[key])
            change(said, changed)
            result[key] = json.dumps(said).encode()
    return result


def _change_pandas(said: Any, changed: Mapping[str, Any]) -> None:
    for column in said["columns"]:
        kind = changed.get(column["field_name"] or column["name"])
        if kind is None:
            continue
        if is_list(kind):
            column["pandas_type"] = f"list[{_name(kind.value_type)}]"
        else:
            column["pandas_type"] = column["numpy_type"] = _name(kind)
            column["metadata"] = None


def _change_hugging_face(said: Any, changed: Mapping[str, Any]) -> None:
    features = said["info"]["features"]
    for name, kind in changed.items():
        number = {"dtype": _name(kind.value_type if is_list(kind) else kind), "_type": "Value"}
        if is_list(kind):
            features[name]["feature"] = number
        else:
            features[name] = number


def _name(kind: Any) -> str:
    return str(np.dtype(kind.to_pandas_dtype()))


# ---- formats ------------------------------------------------------------------------------------


def _open_writer(file: TableFile, temporary: Path, destination: Path, schema: Any) -> Any:
    suffix = suffix_of(destination)
    if suffix == ".parquet":
        return _ParquetWriter(file, temporary, schema)
    if suffix in (".arrow", ".feather"):
        ipc = arrow("pyarrow.ipc")
        stream = suffix == ".arrow" and isinstance(file, ArrowFile) and file.stream
        options = ipc.IpcWriteOptions(
            compression="lz4" if suffix == ".feather" else None, emit_dictionary_deltas=True
        )
        return (ipc.new_stream if stream else ipc.new_file)(str(temporary), schema, options=options)
    return _TextWriter(file, temporary, destination, schema)


class _ParquetWriter:
    """Writes groups of as many rows as the source has, each column compressed as there."""

    def __init__(self, file: TableFile, temporary: Path, schema: Any) -> None:
        pa = arrow()
        self._groups: Iterator[int] = iter(())
        compression: Any = "snappy"
        if isinstance(file, ParquetFile):
            self._groups = iter(file.groups())
            known = {"UNCOMPRESSED": "none"}
            codecs = {path: known.get(c, c.lower()) for path, c in file.codecs().items()}
            compression = {
                path: codec
                for path, codec in codecs.items()
                if codec == "none" or pa.Codec.is_available(codec)
            } or compression
        self._writer = arrow("pyarrow.parquet").ParquetWriter(
            str(temporary), schema, compression=compression, write_page_checksum=True
        )
        self._waiting: list[Any] = []
        self._broken = False
        self._rows = self._bytes = 0
        self._size = next(self._groups, GROUP_ROWS)

    def write_batch(self, batch: Any) -> None:
        """Take a batch, and write the groups that are full."""
        while self._rows + batch.num_rows >= self._size:
            first = batch.slice(0, self._size - self._rows)
            batch = batch.slice(first.num_rows)
            self._take(first)
            self._flush()
            self._size = next(self._groups, GROUP_ROWS)
            if not batch.num_rows:
                return
        self._take(batch)
        if self._bytes >= GROUP_BLOCKS * blocks.BLOCK_BYTES:  # the group becomes several
            self._size -= self._rows
            self._flush()

    def _take(self, batch: Any) -> None:
        self._waiting.append(batch)
        self._rows += batch.num_rows
        self._bytes += batch.nbytes

    def _flush(self) -> None:
        waiting, rows = self._waiting, self._rows
        self._waiting, self._rows, self._bytes = [], 0, 0
        if rows:
            self._broken = True  # until it is written
            self._writer.write_table(arrow().Table.from_batches(waiting), row_group_size=rows)
            self._broken = False

    def close(self) -> None:
        """Write what is left, and the index of the file."""
        if self._broken:  # closing would raise another error than what broke it
            return
        self._flush()
        self._writer.close()


class _TextWriter:
    """Writes lines of text as the source has them."""

    def __init__(self, file: TableFile, temporary: Path, destination: Path, schema: Any) -> None:
        pa, csv = arrow(), arrow("pyarrow.csv")
        self._decimal = file.dialect.decimal
        compression = "gzip" if suffix_of(destination).endswith(".gz") else None
        options = csv.WriteOptions(
            include_header=file.dialect.header,
            quoting_style="needed",
            delimiter=file.dialect.separator_in(str(destination)),
        )
        self._schema = schema
        if self._decimal != ".":
            for k, kind in enumerate(schema.types):
                if pa.types.is_floating(kind):
                    self._schema = self._schema.set(k, schema.field(k).with_type(pa.string()))
        with contextlib.ExitStack() as stack:
            stream = stack.enter_context(pa.output_stream(str(temporary), compression))
            self._writer = csv.CSVWriter(stream, self._schema, write_options=options)
            stack.callback(self._writer.close)
            self._stack = stack.pop_all()

    def write_batch(self, batch: Any) -> None:
        """Write a line for each row."""
        pa, pc = arrow(), arrow("pyarrow.compute")
        if self._decimal != ".":
            columns = [
                pc.replace_substring(column.cast(pa.string()), ".", self._decimal)
                if pa.types.is_floating(column.type)
                else column
                for column in batch.columns
            ]
            batch = pa.record_batch(columns, schema=self._schema)
        self._writer.write_batch(batch)

    def close(self) -> None:
        """Write what is left."""
        self._stack.close()
