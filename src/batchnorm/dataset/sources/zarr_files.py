"""Arrays in zarr folders, of formats 2 and 3, read by the package zarr."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ...errors import ArgumentError
from ..addresses import fingerprint_of, is_folder, is_remote, remote
from ..extras import first_line, import_extra
from .arrays import array_fields, choose_array, explain_array_errors, label_of
from .chunked_files import ChunkedFile, check_chunks
from .values import is_real

#: Of so many chunks, one at least must be stored. Absent ones consist of the fill value.
SPARSE = 1000


@dataclass(frozen=True, kw_only=True)
class ZarrFile(ChunkedFile):
    """An array in a .zarr folder."""

    def open_array(self, stack: contextlib.ExitStack) -> Any:
        """Open the array; there is nothing to close."""
        found = _open(self.path)
        return found if self.member is None else found[self.member]


def open_zarr(path: str, *, array: str | None, channel_axis: int) -> ZarrFile:
    """Look for an array and check that it can be measured.

    Raises
    ------
    ArgumentError, ShapeError, DTypeError
        It is not such a folder, there is no such array, it is not one of real numbers with two
        axes, or hardly anything of it is stored.
    """
    if not is_folder(path):
        raise ArgumentError(f"{path}: must be a zarr folder, got a file. Unpack it.")
    fingerprint = fingerprint_of(path)
    with explain_array_errors(path):
        found, name = _open(path), None
        if array is not None or not hasattr(found, "shape"):
            arrays = {} if hasattr(found, "shape") else dict(_arrays(found))
            name = None if array is None else array.strip("/")
            if name not in arrays:
                several = [
                    key for key, one in arrays.items() if one.ndim >= 2 and is_real(one.dtype)
                ]
                name = choose_array(path, several, array)
            found = arrays[name]
        label = label_of(path, name)
        fields = array_fields(path, fingerprint, name, found.shape, found.dtype, channel_axis)
        itemsize = found.dtype.itemsize
        check_chunks(label, found.chunks, itemsize)
        chunks = found.shards or found.chunks
        if math.prod(chunks) * itemsize > fields["block_bytes"]:
            chunks = found.chunks  # parts of a shard can be read
        written, total = found.nchunks_initialized, found.nchunks
        if written * SPARSE < total:
            raise ArgumentError(
                f"{label}: must have been written, got {written} of {total} chunks, and the rest "
                f"would count as its fill value, {found.fill_value}. Write it, or resize it."
            )
        return ZarrFile(chunks=chunks, **fields)


def _open(path: str) -> Any:
    zarr = import_extra("zarr", "zarr", "zarr folders")
    store: Any = path
    if is_remote(path):
        fs, inside = remote(path)
        store = fs.get_mapper(inside)
    try:
        with warnings.catch_warnings():  # about other files in the folder
            warnings.simplefilter("ignore")
            return zarr.open(store, mode="r")
    except FileNotFoundError as error:  # the folder itself is there
        raise ValueError(first_line(error)) from error


def _arrays(group: Any, before: str = "") -> Iterator[tuple[str, Any]]:
    """Names and arrays of a group and the groups in it."""
    for name, array in group.arrays():
        yield before + name, array
    for name, inside in group.groups():
        yield from _arrays(inside, f"{before}{name}/")
