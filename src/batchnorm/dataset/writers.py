"""Normalized files: arrays to .npy and .npz, tables to .csv and .parquet, a block at a time."""

from __future__ import annotations

import contextlib
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from .. import native
from ..errors import ArgumentError
from ..native import Array
from .addresses import open_binary, suffix_of
from .affine import Affine, narrow
from .extras import first_line
from .sources import ArrayFile, ChunkedFile, NumpyFile, TableFile, prefetch
from .sources.tables import arrow, by_name

#: Endings of the files that can be written.
WRITABLE = (".npy", ".npz", ".csv", ".parquet")


def write_normalized(
    file: ArrayFile | TableFile,
    affine: Affine,
    temporary: Path,
    destination: Path,
    advance: Callable[[int], None],
) -> None:
    """Normalize a file and write it to `temporary`, in the format that `destination` names."""
    write = _write_array if isinstance(file, ArrayFile) else _write_table
    write(file, affine, temporary, destination, advance)  # type: ignore[arg-type]


# ---- arrays -------------------------------------------------------------------------------------


def _write_array(
    file: ArrayFile,
    affine: Affine,
    temporary: Path,
    destination: Path,
    advance: Callable[[int], None],
) -> None:
    """Write each block in its place: those of NumPy's files follow one another."""
    dtype = affine.result_type(file.dtype.newbyteorder("="))
    header = {
        "descr": np.lib.format.dtype_to_descr(_storable(dtype)),
        "fortran_order": isinstance(file, NumpyFile) and file.fortran_order,
        "shape": file.shape,
    }
    with contextlib.ExitStack() as stack:
        stream = stack.enter_context(_array_stream(file, temporary, suffix_of(destination)))
        np.lib.format.write_array_header_1_0(stream, header)
        blocks = stack.enter_context(contextlib.closing(prefetch(file.blocks())))
        begin = stream.tell() if isinstance(file, ChunkedFile) else 0
        for cut, block in zip(file.cuts(), blocks, strict=True):
            y = affine(block.values, block.axis, block.channels, label=file.label)
            if isinstance(file, ChunkedFile):
                _write_box(stream, begin, file.shape, cut.place, y)
            else:
                stream.write(_bytes_of(y))
            advance(block.nbytes)


def _write_box(
    stream: IO[bytes], begin: int, shape: tuple[int, ...], place: tuple[slice, ...], y: Array
) -> None:
    """Write a part of an array in C order, whose first element lies at `begin`."""
    run = len(shape) - 1  # from this axis on, the part is contiguous
    while run > 0 and y.shape[run] == shape[run]:
        run -= 1
    start = [part.start for part in place]
    for index in np.ndindex(y.shape[:run]):
        corner = [
            i + first for i, first in zip((*index, *[0] * (y.ndim - run)), start, strict=True)
        ]
        stream.seek(begin + int(np.ravel_multi_index(corner, shape)) * y.itemsize)
        stream.write(_bytes_of(y[index]))


def _bytes_of(y: Array) -> memoryview:
    return np.ascontiguousarray(y).view(np.uint8).reshape(-1).data


def _storable(dtype: np.dtype[Any]) -> np.dtype[Any]:
    # numpy.save stores bfloat16 as two bytes of unknown type.
    return np.dtype("V2") if native.is_bfloat16(dtype) else dtype


@contextlib.contextmanager
def _array_stream(file: ArrayFile, temporary: Path, suffix: str) -> Iterator[IO[bytes]]:
    if suffix == ".npy":
        with temporary.open("wb") as stream:
            yield stream
        return
    compression, member = zipfile.ZIP_STORED, "arr_0.npy"
    if file.member is not None:
        member = file.member
        with open_binary(file.path) as outer, zipfile.ZipFile(outer) as archive:
            compression = archive.getinfo(member).compress_type
    with (
        zipfile.ZipFile(temporary, "w", compression) as archive,
        archive.open(member, "w", force_zip64=True) as stream,
    ):
        yield stream


# ---- tables -------------------------------------------------------------------------------------


def _write_table(
    file: TableFile,
    affine: Affine,
    temporary: Path,
    destination: Path,
    advance: Callable[[int], None],
) -> None:
    pa = arrow()
    with contextlib.ExitStack() as stack:
        writer: Any = None
        for batch, nbytes in _batches_or_empty(file):
            values = file.values(batch, file.names)
            y = affine(values, 0, label=file.label)
            columns = by_name(batch)
            for k, name in enumerate(file.names):
                label = f"{file.path}: column {name!r}"
                columns[name] = _column(y[k], columns[name], affine.dtype, values[k], label)
            result = pa.record_batch(
                [columns[name] for name in file.columns], names=list(file.columns)
            )
            with _explain_unfit_columns(destination):
                if writer is None:
                    suffix = suffix_of(destination)
                    writer = _open_writer(temporary, suffix, result.schema, file.header)
                    stack.callback(writer.close)
                writer.write_batch(result)
            advance(nbytes)


@contextlib.contextmanager
def _explain_unfit_columns(destination: Path) -> Iterator[None]:
    try:
        yield
    except arrow().ArrowException as error:
        raise ArgumentError(
            f"{destination}: cannot hold all columns ({first_line(error)}). "
            "Name a .parquet file, which takes every type."
        ) from error


def _batches_or_empty(file: TableFile) -> Iterator[tuple[Any, int]]:
    """Read a table; one without rows gives an empty batch, so that the result has its columns."""
    any_rows = False
    for item in file.batches(file.columns):
        any_rows = True
        yield item
    if not any_rows:
        pa = arrow()
        empty = [pa.array([], pa.float64()) for _ in file.columns]
        yield pa.record_batch(empty, names=list(file.columns)), 0


def _column(y: Array, before: Any, dtype: np.dtype[Any] | None, values: Array, label: str) -> Any:
    """Convert a normalized column to Arrow: null where it was null, in its own floating type."""
    pa = arrow()
    if dtype is not None:
        kind = pa.from_numpy_dtype(dtype)
    else:
        kind = before.type if pa.types.is_floating(before.type) else pa.float64()
    mask = before.is_null().to_numpy(zero_copy_only=False)
    return pa.array(narrow(y, np.dtype(kind.to_pandas_dtype()), values, label), kind, mask=mask)


def _open_writer(temporary: Path, suffix: str, schema: Any, header: bool) -> Any:
    if suffix == ".parquet":
        return arrow("pyarrow.parquet").ParquetWriter(str(temporary), schema)
    csv = arrow("pyarrow.csv")
    options = csv.WriteOptions(include_header=header, quoting_style="needed")
    return csv.CSVWriter(str(temporary), schema, write_options=options)
