"""Datasets in HDF5 files, read by h5py."""

from __future__ import annotations

import contextlib
import errno
import importlib
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ...errors import ArgumentError
from ..addresses import fingerprint_of, is_remote, open_binary
from ..extras import import_extra
from .arrays import array_fields, choose_array, explain_array_errors, label_of
from .chunked_files import ChunkedFile, check_chunks, chunks_in
from .values import is_real


@dataclass(frozen=True, kw_only=True)
class Hdf5File(ChunkedFile):
    """A dataset in a .h5 or .hdf5 file."""

    def open_array(self, stack: contextlib.ExitStack) -> Any:
        """Open the dataset, until `stack` closes."""
        return stack.enter_context(_opened(self.path))[self.member]


def open_hdf5(path: str, *, array: str | None, channel_axis: int) -> Hdf5File:
    """Look for a dataset and check that it can be measured.

    Raises
    ------
    ArgumentError, ShapeError, DTypeError
        It is not such a file, there is no such dataset, not all of its values lie in this file, or
        it is not one of real numbers with two axes.
    """
    fingerprint = fingerprint_of(path)
    with explain_array_errors(path), _opened(path) as file:
        h5py = import_extra("h5py", "hdf5", "HDF5 files")
        name = None if array is None else array.strip("/")
        found = file.get(name) if name else None
        if not isinstance(found, h5py.Dataset):
            name = choose_array(path, list(_datasets(file, h5py)), array)
            found = file[name]
        label = label_of(path, name)
        fields = array_fields(path, fingerprint, name, found.shape or (), found.dtype, channel_axis)
        chunks = found.chunks or (1,) * found.ndim
        check_chunks(label, chunks, found.dtype.itemsize)
        _check_stored_here(label, found, file.filename)
        _check_filters(label, found, h5py)
        return Hdf5File(chunks=chunks, **fields)


@contextlib.contextmanager
def _opened(path: str) -> Iterator[Any]:
    h5py = import_extra("h5py", "hdf5", "HDF5 files")
    with contextlib.ExitStack() as stack:
        place: Any = stack.enter_context(open_binary(path)) if is_remote(path) else path
        try:
            file = stack.enter_context(h5py.File(place, "r"))
        except OSError as error:
            if error.errno == errno.EAGAIN:
                raise ArgumentError(
                    f"{path}: is open for writing in another process. Measure it when that is done."
                ) from error
            if error.errno is not None:  # h5py's text repeats it at length
                raise OSError(error.errno, os.strerror(error.errno)) from error
            raise
        yield file


def _datasets(file: Any, h5py: Any) -> Iterator[str]:
    """Names of the datasets of numbers with two axes or more, not followed through links."""
    # Not by `visit`, which goes round for ever in some damaged files.
    waiting, seen = [""], set()
    while waiting:
        group = waiting.pop(0)
        inside = file[group] if group else file
        for name in inside:
            path = f"{group}/{name}" if group else name
            if not isinstance(inside.get(name, getlink=True), h5py.HardLink):
                continue
            found = inside[name]
            place = h5py.h5o.get_info(found.id).addr
            if place in seen:
                continue
            seen.add(place)
            if isinstance(found, h5py.Group):
                waiting.append(path)
            elif isinstance(found, h5py.Dataset) and found.shape is not None and found.ndim >= 2:
                with contextlib.suppress(TypeError):  # of types that NumPy does not have
                    if is_real(found.dtype):
                        yield path


def _check_stored_here(label: str, dataset: Any, filename: str) -> None:
    """Raise unless all values were written, to this file.

    A change of another file would not be noticed, and HDF5 gives the fill value, 0, for what was
    never written and for what a virtual dataset no longer finds.
    """
    if dataset.is_virtual or dataset.external or dataset.file.filename != filename:
        raise ArgumentError(
            f"{label}: must lie in this file, got a link or view to another. Name the files that "
            "hold the values."
        )
    if dataset.chunks is None:
        stored, unit = dataset.id.get_storage_size(), "bytes"
        expected = math.prod(dataset.shape) * dataset.id.get_type().get_size()
    else:
        stored, unit = _count_chunks(dataset), "chunks"
        expected = chunks_in(dataset.shape, dataset.chunks)
    if stored < expected:
        raise ArgumentError(
            f"{label}: must have been written as a whole, got {stored} of {expected} {unit}, and "
            "the rest would count as its fill value. Write it, or resize the dataset to what was."
        )


def _count_chunks(dataset: Any) -> int:
    """Count the stored chunks that have a place in the array; damage may move them elsewhere."""
    if not hasattr(dataset.id, "chunk_iter"):  # with HDF5 before 1.12.3
        return int(dataset.id.get_num_chunks())
    places: set[tuple[int, ...]] = set()
    dataset.id.chunk_iter(lambda chunk: places.add(chunk.chunk_offset))
    return sum(
        all(at < n and at % side == 0 for at, n, side in zip(*given, strict=True))
        for given in ((place, dataset.shape, dataset.chunks) for place in places)
    )


def _check_filters(label: str, dataset: Any, h5py: Any) -> None:
    """Raise if the chunks are compressed in a way that HDF5 does not know."""
    properties = dataset.id.get_create_plist()
    for k in range(properties.get_nfilters()):
        code, _, _, name = properties.get_filter(k)
        if not h5py.h5z.filter_avail(code):
            with contextlib.suppress(ImportError):  # registers many
                importlib.import_module("hdf5plugin")
        if not h5py.h5z.filter_avail(code):
            raise ArgumentError(
                f"{label}: is compressed by filter {code} ({name.decode(errors='replace')}), which "
                "HDF5 does not have. pip install hdf5plugin adds more filters."
            )
