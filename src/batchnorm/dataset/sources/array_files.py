"""Arrays in .npy and .npz files."""

from __future__ import annotations

import contextlib
import functools
import io
import math
import os
import warnings
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import IO, Any

import numpy as np

from ...errors import ArgumentError
from ..addresses import fingerprint_of, is_remote, open_binary, suffix_of
from ..extras import first_line, import_extra
from .arrays import ArrayFile, array_fields, choose_array, explain_array_errors, label_of
from .blocks import Block, Source

#: Bytes of one read: a file in a .npz allocates what each read returns.
READ_BYTES = 1 << 22

#: Most bytes of a header that are parsed. Those of arrays of numbers have some hundred.
HEADER_BYTES = 10_000

#: Most axes of an array of NumPy.
MOST_AXES = 64


@dataclass(frozen=True)
class Cut:
    """A contiguous run of an array's memory: (outer, channels, inner) elements from `start` on."""

    start: int
    shape: tuple[int, int, int]
    channel: int
    number: int


@dataclass(frozen=True, kw_only=True)
class NumpyFile(ArrayFile):
    """A .npy file, or an array in a .npz file.

    Attributes
    ----------
    offset
        Bytes before the first element, in the file or member.
    fortran_order
        From the header.
    """

    offset: int
    fortran_order: bool

    def split(self, blocks: int) -> list[Source]:
        """Split a .npy file into runs of blocks; a .npz file must be read from its beginning."""
        return [self] if self.member is not None else super().split(blocks)

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
        room = self.room(row)
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
        with explain_array_errors(self.path), contextlib.ExitStack() as stack:
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
            if hasattr(os, "posix_fadvise") and not is_remote(self.path):
                # Makes Linux read twice as far ahead.
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


def open_numpy(path: str, *, array: str | None, channel_axis: int) -> NumpyFile:
    """Read the header of a .npy or .npz file and check that the file is complete.

    Raises
    ------
    ArgumentError, ShapeError, DTypeError
        It is not such a file, is cut short, or holds no array of real numbers with two axes.
    """
    fingerprint = fingerprint_of(path)  # before anything is read, to notice every change
    with explain_array_errors(path), contextlib.ExitStack() as stack:
        file, member, available = stack.enter_context(open_binary(path)), None, fingerprint[2]
        if suffix_of(path) == ".npz":
            archive = stack.enter_context(zipfile.ZipFile(file))
            names = [name for name in archive.namelist() if name.endswith(".npy")]
            member = choose_array(path, [name.removesuffix(".npy") for name in names], array)
            member += ".npy"
            info = archive.getinfo(member)
            if info.flag_bits & 1:
                raise ArgumentError(f"{path}: must not be encrypted. Write it with numpy.savez.")
            available = info.file_size
            file = stack.enter_context(archive.open(member))
        shape, fortran_order, dtype, offset = _read_header(path, file)
    if dtype == np.dtype("V2"):  # numpy.save writes bfloat16 as two bytes of unknown type
        dtype = np.dtype(import_extra("ml_dtypes", "data", "bfloat16 arrays").bfloat16)
    fields = array_fields(path, fingerprint, member, shape, dtype, channel_axis)
    size = offset + math.prod(shape) * dtype.itemsize
    if available != size:
        raise ArgumentError(
            f"{label_of(path, member)}: must have {size} bytes for shape {shape} of {dtype}, got "
            f"{available}. "
            + (
                "It has been cut short; write or copy it again."
                if available < size
                else "Save arrays that follow this one in files of their own."
            )
        )
    return NumpyFile(offset=offset, fortran_order=fortran_order, **fields)


def _read_header(path: str, file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any], int]:
    """Return shape, whether the order is Fortran's, dtype, and bytes up to the first element."""
    magic = file.read(8)
    size = {b"\x01\x00": 2, b"\x02\x00": 4}.get(magic[6:], 0)
    length = file.read(size)
    header = file.read(min(int.from_bytes(length, "little"), HEADER_BYTES + 1))
    try:
        return *_parse_header(magic, length, header), 8 + size + len(header)
    except Exception as error:  # NumPy's parser of headers raises whatever damage leads to
        raise ArgumentError(
            f"{path}: must be an array in NumPy's format, and is not ({first_line(error)}). "
            "Write it with numpy.save."
        ) from None


@functools.lru_cache(maxsize=16)  # many files of a folder have the same
def _parse_header(
    magic: bytes, length: bytes, header: bytes
) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    if len(header) > HEADER_BYTES:
        raise ValueError(f"a header of more than {HEADER_BYTES} bytes")
    version = np.lib.format.read_magic(io.BytesIO(magic))
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"version {version} of the format")
    form = np.lib.format
    read = form.read_array_header_1_0 if version == (1, 0) else form.read_array_header_2_0
    with warnings.catch_warnings():  # about Python 2, which wrote long integers, and odd escapes
        warnings.simplefilter("ignore")
        shape, fortran_order, dtype = read(io.BytesIO(length + header))
    if len(shape) > MOST_AXES or any(extent < 0 for extent in shape):
        raise ValueError(f"shape {shape}")
    return shape, fortran_order, dtype
