"""Normalized files: arrays to .npy and .npz, tables to tables, a block at a time."""

from __future__ import annotations

import contextlib
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from .. import native
from ..native import Array
from .addresses import open_binary, suffix_of
from .affine import Affine
from .files import TABLES
from .sources import ArrayFile, ChunkedFile, NumpyFile, TableFile, prefetch
from .table_writers import write_table

#: Endings of the files that can be written.
WRITABLE = (".npy", ".npz", *TABLES)


def write_normalized(
    file: ArrayFile | TableFile,
    affine: Affine,
    temporary: Path,
    destination: Path,
    advance: Callable[[int], None],
) -> None:
    """Normalize a file and write it to `temporary`, in the format that `destination` names."""
    write = _write_array if isinstance(file, ArrayFile) else write_table
    write(file, affine, temporary, destination, advance)  # type: ignore[arg-type]


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
