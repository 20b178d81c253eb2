"""Normalized files: arrays to .npy and .npz, tables to tables, a block at a time."""

from __future__ import annotations

import contextlib
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from .. import native
from .addresses import suffix_of
from .affine import Affine
from .files import TABLES
from .sources import ArrayFile, TableFile, prefetch
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
    """Write the blocks one after another, as they follow one another in the file that is read."""
    with contextlib.ExitStack() as stack:
        stream = stack.enter_context(_array_stream(file, temporary, suffix_of(destination)))
        native_type = file.dtype.newbyteorder("=")
        header = {
            "descr": np.lib.format.dtype_to_descr(_storable(affine.result_type(native_type))),
            "fortran_order": file.fortran_order,
            "shape": file.shape,
        }
        np.lib.format.write_array_header_1_0(stream, header)
        blocks = stack.enter_context(contextlib.closing(prefetch(file.blocks())))
        for block in blocks:
            y = affine(block.values, block.axis, block.channels, label=file.label)
            stream.write(np.ascontiguousarray(y).view(np.uint8).reshape(-1).data)
            advance(block.nbytes)


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
        with zipfile.ZipFile(file.path) as archive:
            compression = archive.getinfo(member).compress_type
    with (
        zipfile.ZipFile(temporary, "w", compression) as archive,
        archive.open(member, "w", force_zip64=True) as stream,
    ):
        yield stream
