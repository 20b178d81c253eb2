"""Arrays in .npy and .npz files."""

from __future__ import annotations

import contextlib
import math
import os
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import IO, Any

import numpy as np

from ...errors import ArgumentError, DTypeError, ShapeError
from ..addresses import (
    Fingerprint,
    explain_read_errors,
    fingerprint_of,
    is_remote,
    open_binary,
    suffix_of,
)
from ..extras import first_line, import_extra
from . import blocks
from .blocks import Block, Source, check_width
from .values import floating_type, is_real

#: Rows of a block, where that takes more memory, up to WIDEST times as much: merging costs as much
#: as some rows do.
BLOCK_ROWS = 32
WIDEST = 2

#: Bytes of one read: a file in a .npz allocates what each read returns.
READ_BYTES = 1 << 22


@dataclass(frozen=True)
class Cut:
    """A contiguous run of an array's memory: (outer, channels, inner) elements from `start` on."""

    start: int
    shape: tuple[int, int, int]
    channel: int
    number: int


@dataclass(frozen=True)
class ArrayFile:
    """A .npy file, or an array in a .npz file.

    Attributes
    ----------
    path, fingerprint
        Where the file is, and its fingerprint when it was opened.
    member
        Name of the file inside a .npz, None for a .npy.
    offset
        Bytes before the first element, in the file or member.
    shape, dtype, fortran_order
        From the header.
    channel_axis
        Counted from the front.
    block_bytes, element_bytes
        Memory that a block may take, and that an element takes while it is worked on.
    first, last
        The source is the blocks from `first` to before `last`.
    """

    path: str
    fingerprint: Fingerprint
    member: str | None
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    fortran_order: bool
    channel_axis: int
    block_bytes: int
    element_bytes: int
    first: int = 0
    last: int | None = None

    names = None

    @property
    def label(self) -> str:
        """The path, with the name of the array in a .npz file."""
        return _label(self.path, self.member)

    @property
    def features(self) -> int:
        """Length of the channel axis."""
        return self.shape[self.channel_axis]

    @property
    def nbytes(self) -> int:
        """Bytes of all elements."""
        return math.prod(self.shape) * self.dtype.itemsize

    def split(self, blocks: int) -> list[Source]:
        """Split a .npy file into runs of blocks; a .npz file must be read from its beginning."""
        if self.member is not None:
            return [self]
        count = sum(1 for _ in self.cuts())
        return [replace(self, first=k, last=k + blocks) for k in range(0, max(count, 1), blocks)]

    def with_path(self, path: str) -> ArrayFile:
        """Return the same file under another path."""
        return replace(self, path=path)

    def layout(self) -> tuple[int, int, int]:
        """Return (outer, channels, inner) as in the file: Fortran order is C order backwards."""
        shape, axis = self.shape, self.channel_axis
        if self.fortran_order:
            shape, axis = shape[::-1], len(shape) - 1 - axis
        return math.prod(shape[:axis]), shape[axis], math.prod(shape[axis + 1 :])

    def cuts(self) -> Iterator[Cut]:
        """Cut the file into blocks, each a contiguous run of it."""
        outer, channels, inner = self.layout()
        row = channels * inner
        if outer * row == 0:
            return
        usual = max(1, self.block_bytes // self.element_bytes)
        room = min(max(usual, BLOCK_ROWS * row), WIDEST * usual)
        if row <= room:
            step = room // row
            for number, o in enumerate(range(0, outer, step)):
                yield Cut(o * row, (min(step, outer - o), channels, inner), 0, number)
            return
        for o in range(outer):
            if inner <= room:
                step = room // inner
                for c in range(0, channels, step):
                    yield Cut(o * row + c * inner, (1, min(step, channels - c), inner), c, o)
            else:
                runs = range(0, inner, room)
                for c in range(channels):
                    for number, i in enumerate(runs, o * len(runs)):
                        start = o * row + c * inner + i
                        yield Cut(start, (1, 1, min(room, inner - i)), c, number)

    def blocks(self) -> Iterator[Block]:
        """Read the blocks from `first` to before `last` into two buffers in turn.

        The file is read, not mapped: pages of a mapping count as memory of this process until the
        system takes them back.
        """
        itemsize = self.dtype.itemsize
        buffers: list[bytearray | None] = [None, None]
        with explain_read_errors(self.path), contextlib.ExitStack() as stack:
            file: IO[bytes] | None = None
            for number, cut in enumerate(islice(self.cuts(), self.first, self.last)):
                if file is None:
                    file = self._open(stack)
                    if self.member is None:
                        file.seek(self.offset + cut.start * itemsize)
                    elif len(file.read(self.offset)) < self.offset:
                        raise EOFError("ended within its header")
                size = math.prod(cut.shape) * itemsize
                buffer = buffers[number % 2]
                if buffer is None or len(buffer) < size:
                    buffer = buffers[number % 2] = bytearray(size)
                view = memoryview(buffer)[:size]
                if read_into(file, view) < size:
                    raise ArgumentError(
                        f"{self.label}: ended while it was read; {size} bytes were expected at "
                        f"element {cut.start}. It has changed or is damaged; write it again."
                    )
                values = np.frombuffer(view, self.dtype).reshape(cut.shape)
                channels = slice(cut.channel, cut.channel + cut.shape[1])
                yield Block(values, 1, channels, cut.number, self._where(cut), size)

    def _open(self, stack: contextlib.ExitStack) -> IO[bytes]:
        if self.member is None:
            file = stack.enter_context(open_binary(self.path))
            if hasattr(os, "posix_fadvise") and not is_remote(
                self.path
            ):  # makes Linux read twice as far ahead
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
            return file
        archive = stack.enter_context(zipfile.ZipFile(stack.enter_context(open_binary(self.path))))
        return stack.enter_context(archive.open(self.member))

    def _where(self, cut: Cut) -> Callable[[tuple[int, ...]], str]:
        def where(index: tuple[int, ...]) -> str:
            flat = cut.start + int(np.ravel_multi_index(index, cut.shape))
            order = "F" if self.fortran_order else "C"
            found = np.unravel_index(flat, self.shape, order)  # type: ignore[call-overload]
            return f"index {tuple(int(i) for i in found)}"

        return where


def read_into(file: IO[bytes], view: memoryview) -> int:
    """Fill `view` as far as the file goes; a single read may return less than there is."""
    done = 0
    while done < len(view):
        got = file.readinto(view[done : done + READ_BYTES])  # type: ignore[attr-defined]
        if not got:
            break
        done += got
    return done


def open_array(path: str, *, array: str | None, channel_axis: int) -> ArrayFile:
    """Read the header of a .npy or .npz file and check that the file is complete.

    Raises
    ------
    ArgumentError, ShapeError, DTypeError
        It is not such a file, is cut short, or holds no array of real numbers with two axes.
    """
    fingerprint = fingerprint_of(path)  # before anything is read, to notice every change
    with explain_read_errors(path):
        if suffix_of(path) == ".npz":
            with open_binary(path) as outer, zipfile.ZipFile(outer) as archive:
                member = _find_member(path, archive, array)
                info = archive.getinfo(member)
                if info.flag_bits & 1:
                    raise ArgumentError(
                        f"{path}: must not be encrypted. Write it with numpy.savez."
                    )
                available = info.file_size
                with archive.open(member) as file:
                    shape, fortran_order, dtype, offset = _read_header(path, file)
        else:
            member, available = None, fingerprint[2]
            with open_binary(path) as file:
                shape, fortran_order, dtype, offset = _read_header(path, file)
    label = _label(path, member)
    if dtype == np.dtype("V2"):  # numpy.save writes bfloat16 as two bytes of unknown type
        dtype = np.dtype(import_extra("ml_dtypes", "data", "bfloat16 arrays").bfloat16)
    if not is_real(dtype):
        raise DTypeError(
            f"{label}: must hold real numbers (float16, bfloat16, float32, float64, integers or "
            f"booleans), got {dtype}. Save it as one of these."
        )
    axis = _check_axis(label, shape, channel_axis)
    check_width(label, shape[axis])
    size = offset + math.prod(shape) * dtype.itemsize
    if available != size:
        raise ArgumentError(
            f"{label}: must have {size} bytes for shape {shape} of {dtype}, got {available}. "
            + (
                "It has been cut short; write or copy it again."
                if available < size
                else "Save arrays that follow this one in files of their own."
            )
        )
    return ArrayFile(
        path=path,
        fingerprint=(fingerprint[0], member, *fingerprint[2:]),
        member=member,
        offset=offset,
        shape=shape,
        dtype=dtype,
        fortran_order=fortran_order,
        channel_axis=axis,
        block_bytes=blocks.BLOCK_BYTES,
        element_bytes=floating_type(dtype).itemsize,  # integers take more when they are summed
    )


def _label(path: str, member: str | None) -> str:
    return str(path) if member is None else f"{path} ({member.removesuffix('.npy')})"


def _check_axis(label: str, shape: tuple[int, ...], channel_axis: int) -> int:
    """Return `channel_axis` counted from the front."""
    if len(shape) < 2:
        raise ShapeError(
            f"{label}: must have at least 2 axes, (N, C) or (N, C, *S), got shape {shape}. "
            "Save a single feature as x[:, None]."
        )
    if not -len(shape) <= channel_axis < len(shape):
        raise ShapeError(
            f"{label}: has no axis {channel_axis}, its shape is {shape}. Choose a channel_axis "
            f"from {-len(shape)} to {len(shape) - 1}."
        )
    return channel_axis % len(shape)


def _find_member(path: str, archive: zipfile.ZipFile, array: str | None) -> str:
    """Return the name of the file in a .npz that holds the array."""
    arrays = [name for name in archive.namelist() if name.endswith(".npy")]
    listed = ", ".join(name.removesuffix(".npy") for name in arrays) or "none"
    if array is not None:
        if f"{array}.npy" not in arrays:
            raise ArgumentError(f"{path}: has no array {array!r}. It holds: {listed}.")
        return f"{array}.npy"
    if len(arrays) != 1:
        raise ArgumentError(
            f"{path}: must hold one array, or array must name one of those in it, got "
            f"{len(arrays)}: {listed}. Choose by array=NAME, --array NAME."
        )
    return arrays[0]


def _read_header(path: str, file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any], int]:
    """Return shape, whether the order is Fortran's, dtype, and bytes up to the first element."""
    counted = _Counted(file)
    try:
        version = np.lib.format.read_magic(counted)  # type: ignore[arg-type]
        if version == (1, 0):
            header = np.lib.format.read_array_header_1_0(counted)  # type: ignore[arg-type]
        elif version == (2, 0):
            header = np.lib.format.read_array_header_2_0(counted)  # type: ignore[arg-type]
        else:
            raise ValueError(f"version {version} of the format")
        if any(length < 0 for length in header[0]):
            raise ValueError(f"shape {header[0]}")
    except OSError:
        raise
    except Exception as error:  # NumPy's parser of headers raises whatever damage leads to
        raise ArgumentError(
            f"{path}: must be an array in NumPy's format, and is not ({first_line(error)}). "
            "Write it with numpy.save."
        ) from None
    shape, fortran_order, dtype = header
    return shape, fortran_order, dtype, counted.position


class _Counted:
    """A stream that counts what is read from it, since `tell` of a member may not."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self.position = file, 0

    def read(self, size: int) -> bytes:
        data = self._file.read(size)
        self.position += len(data)
        return data
