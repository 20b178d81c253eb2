"""What statistics are taken of, as a stream of blocks of bounded size.

A source knows its features before a value is read, and can be sent to another process. Where its
blocks are cut depends on nothing but its shape and type, so that sums are always made in the same
order and the result has the same bits.
"""

from __future__ import annotations

import contextlib
import io
import math
import operator
import os
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import IO, Any, Protocol, TypeVar

import numpy as np

from .. import native
from ..errors import ArgumentError, DTypeError, ShapeError
from ..native import Array
from .files import ARRAYS, Identity, identify, kind_of, reading
from .packages import need

#: Bytes of a block. Two are in memory at a time, one read while the other is summed: large enough
#: that starting threads costs nothing, small enough to stay far below what a machine has.
BLOCK_BYTES = 1 << 25

#: Rows of a block, where that takes more memory, up to WIDEST times as much: merging costs as much
#: as some rows do.
BLOCK_ROWS = 32
WIDEST = 2

#: Bytes that are read together: a file in a .npz gives them out in memory of its own.
READ_BYTES = 1 << 22

#: Features of an array at the most. Memory grows with their number, by some hundred bytes each.
MOST_FEATURES = 10_000_000

T = TypeVar("T")


@dataclass(frozen=True)
class Block:
    """Some values of a source.

    Attributes
    ----------
    values : any number of axes
        Its memory is used again for the block after the next.
    axis : int
        Of the features in `values`.
    channels : slice
        Which of the source's features these are. Two blocks share all features or none.
    number : int
        Of the block among those with the same features, from 0: the order in which they merge.
    where : callable
        Says in words where an index of `values` is in the source.
    nbytes : int
        How far this block brings the reader on, in the units of `Source.nbytes`.
    """

    values: Array
    axis: int
    channels: slice
    number: int
    where: Callable[[tuple[int, ...]], str]
    nbytes: int


class Source(Protocol):
    """A file or an array that can be read block by block."""

    @property
    def label(self) -> str:
        """What messages call it."""

    @property
    def features(self) -> int:
        """Their number."""

    @property
    def names(self) -> tuple[str, ...] | None:
        """Of the features, where they have names."""

    @property
    def nbytes(self) -> int:
        """How much there is to read."""

    def blocks(self) -> Iterator[Block]:
        """Its values, in order."""


class File(Source, Protocol):
    """A source that is a file, and can be read again by another process or at another time."""

    @property
    def path(self) -> str:
        """Where it is."""

    @property
    def identity(self) -> Identity:
        """What it was when it was opened."""

    def pieces(self, blocks: int) -> list[Source]:
        """The same in parts of so many blocks, where each can be read without those before it."""

    def elsewhere(self, path: str) -> File:
        """The same by another path."""


def check_unchanged(source: File) -> None:
    """Refuse a file that is no longer the one that was opened."""
    if identify(source.path, source.identity[1]) != source.identity:
        raise ArgumentError(
            f"{source.label}: changed while it was read. Measure it again when it is complete."
        )


def as_axis(channel_axis: Any) -> int:
    """An axis as a plain integer."""
    try:
        return operator.index(channel_axis)
    except TypeError:
        raise ArgumentError(f"channel_axis must be an integer, got {channel_axis!r}.") from None


def check_width(label: str, features: int) -> None:
    """Refuse more features than there is memory for."""
    if features > MOST_FEATURES:
        raise ShapeError(
            f"{label}: must have at most {MOST_FEATURES:,} features, got {features:,}. "
            "channel_axis, --channel-axis, names their axis; perhaps it is another."
        )


# ---- arrays in files ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Cut:
    """A run of an array's memory: (outer, channels, inner) elements from `start` on."""

    start: int
    shape: tuple[int, int, int]
    channel: int
    number: int


@dataclass(frozen=True)
class ArrayFile:
    """A .npy file, or an array in a .npz file.

    Attributes
    ----------
    path, identity
        Where and what it is.
    member
        Name of the file inside a .npz, None for a .npy.
    offset
        Of the first element from the beginning of the file or member, in bytes.
    shape, dtype, fortran_order
        As the header has them.
    channel_axis
        From the front.
    block_bytes, element_bytes
        What a block may take, and an element takes while it is worked on.
    first, last
        Blocks from `first` to before `last` are read.
    """

    path: str
    identity: Identity
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
        """Path, and name of the array in it."""
        return self.path if self.member is None else f"{self.path} ({self.member[:-4]})"

    @property
    def features(self) -> int:
        """Length of the channel axis."""
        return self.shape[self.channel_axis]

    @property
    def nbytes(self) -> int:
        """Of the elements."""
        return math.prod(self.shape) * self.dtype.itemsize

    def pieces(self, blocks: int) -> list[Source]:
        """Runs of blocks of a .npy file; a .npz file must be read from its beginning."""
        if self.member is not None:
            return [self]
        count = sum(1 for _ in self.cuts())
        return [replace(self, first=k, last=k + blocks) for k in range(0, max(count, 1), blocks)]

    def elsewhere(self, path: str) -> ArrayFile:
        """The same by another path."""
        return replace(self, path=path)

    def layout(self) -> tuple[int, int, int]:
        """(outer, channels, inner) as they lie in the file: Fortran order is C order backwards."""
        shape, axis = self.shape, self.channel_axis
        if self.fortran_order:
            shape, axis = shape[::-1], len(shape) - 1 - axis
        return math.prod(shape[:axis]), shape[axis], math.prod(shape[axis + 1 :])

    def cuts(self) -> Iterator[Cut]:
        """Cut the file's memory into blocks, each a run of it."""
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
        """The blocks from `first` to before `last`, read into two pieces of memory in turn.

        Read, not mapped: pages of a mapping count as memory of this process until the system takes
        them back.
        """
        itemsize = self.dtype.itemsize
        buffers: list[bytearray | None] = [None, None]
        with reading(self.path), contextlib.ExitStack() as stack:
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
                        f"{self.label}: ended while it was read, {size} bytes were expected at "
                        f"element {cut.start}. It has changed or is damaged; write it again."
                    )
                values = np.frombuffer(view, self.dtype).reshape(cut.shape)
                channels = slice(cut.channel, cut.channel + cut.shape[1])
                yield Block(values, 1, channels, cut.number, self._where(cut), size)

    def _open(self, stack: contextlib.ExitStack) -> IO[bytes]:
        if self.member is None:
            file = stack.enter_context(io.FileIO(self.path))
            if hasattr(os, "posix_fadvise"):  # has Linux read twice as far ahead
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
            return file
        archive = stack.enter_context(zipfile.ZipFile(self.path))
        return stack.enter_context(archive.open(self.member))

    def _where(self, cut: Cut) -> Callable[[tuple[int, ...]], str]:
        def where(index: tuple[int, ...]) -> str:
            flat = cut.start + int(np.ravel_multi_index(index, cut.shape))
            order = "F" if self.fortran_order else "C"
            return f"index {_plain(np.unravel_index(flat, self.shape, order))}"  # type: ignore[call-overload]

        return where


def read_into(file: IO[bytes], view: memoryview) -> int:
    """Fill `view` as far as the file goes; a single read may give less than there is."""
    done = 0
    while done < len(view):
        got = file.readinto(view[done : done + READ_BYTES])  # type: ignore[attr-defined]
        if not got:
            break
        done += got
    return done


def _plain(index: Sequence[Any]) -> tuple[int, ...]:
    return tuple(int(i) for i in index)


def open_array(path: Path, *, array: str | None, channel_axis: int) -> ArrayFile:
    """See what is in a .npy or .npz file, and whether all of it is there.

    Raises
    ------
    ArgumentError, ShapeError, DTypeError
        It is not such a file, is cut short, or holds what has no statistics.
    """
    member = None
    identity = identify(path)  # before anything is read, or a change would not be seen
    with reading(path):
        if kind_of(path) == ".npz":
            with zipfile.ZipFile(path) as archive:
                member = _member(path, archive, array)
                about = archive.getinfo(member)
                if about.flag_bits & 1:
                    raise ArgumentError(
                        f"{path}: must not be encrypted. Write it with numpy.savez."
                    )
                available = about.file_size
                with archive.open(member) as file:
                    shape, fortran_order, dtype, offset = _header(path, file)
        else:
            if array is not None:
                raise ArgumentError(
                    f"{path}: array names one in a .npz file, got {array!r} for a .npy file. "
                    "Leave it out."
                )
            available = identity[2]
            with path.open("rb") as file:
                shape, fortran_order, dtype, offset = _header(path, file)
    label = str(path) if member is None else f"{path} ({member[:-4]})"
    if dtype == np.dtype("V2"):  # how numpy.save writes bfloat16, a type of which it knows nothing
        dtype = np.dtype(need("ml_dtypes", "data", "bfloat16 arrays").bfloat16)
    if not (dtype.kind in "iub" or native.is_supported(dtype.newbyteorder("="))):
        raise DTypeError(
            f"{label}: must hold real numbers (float16, bfloat16, float32, float64, integers or "
            f"booleans), got {dtype}. Save it as one of these."
        )
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
    axis = channel_axis % len(shape)
    check_width(label, shape[axis])
    size = math.prod(shape) * dtype.itemsize
    if available > offset + size:
        raise ArgumentError(
            f"{label}: must have {offset + size} bytes for shape {shape} of {dtype}, got "
            f"{available}. Save arrays that follow this one in files of their own."
        )
    if available < offset + size:
        raise ArgumentError(
            f"{label}: must have {offset + size} bytes for shape {shape} of {dtype}, got "
            f"{available}. It has been cut short; write or copy it again."
        )
    return ArrayFile(
        path=str(path),
        identity=(identity[0], member, *identity[2:]),
        member=member,
        offset=offset,
        shape=shape,
        dtype=dtype,
        fortran_order=fortran_order,
        channel_axis=axis,
        block_bytes=BLOCK_BYTES,
        # Integers are summed as float64, which takes more memory than they do.
        element_bytes=8 if dtype.kind in "iub" else dtype.itemsize,
    )


def _member(path: Path, archive: zipfile.ZipFile, array: str | None) -> str:
    arrays = [name for name in archive.namelist() if name.endswith(".npy")]
    listed = ", ".join(name[:-4] for name in arrays) or "none"
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


def _header(path: Path, file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any], int]:
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
    except (ValueError, EOFError) as error:
        raise ArgumentError(
            f"{path}: must be an array in NumPy's format, and is not ({error}). "
            "Write it with numpy.save."
        ) from None
    shape, fortran_order, dtype = header
    return shape, fortran_order, dtype, counted.position


class _Counted:
    """A stream that knows how much was read from it, where `tell` may not."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self.position = file, 0

    def read(self, size: int) -> bytes:
        data = self._file.read(size)
        self.position += len(data)
        return data


# ---- arrays in memory ---------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class ArrayInMemory:
    """An array, or one mapped to memory by NumPy, of any strides."""

    values: Array
    channel_axis: int
    block_bytes: int
    label: str = "x"

    names = None

    @property
    def features(self) -> int:
        """Length of the channel axis."""
        return int(self.values.shape[self.channel_axis])

    @property
    def nbytes(self) -> int:
        """Of the elements."""
        return self.values.nbytes

    def blocks(self) -> Iterator[Block]:
        """Slices along the axis that is slowest in memory."""
        x = self.values
        if x.size == 0:
            return
        cut = max(range(x.ndim), key=lambda k: (x.shape[k] > 1, abs(x.strides[k])))
        step = max(1, self.block_bytes * x.shape[cut] // max(x.nbytes, 1))
        whole = cut != self.channel_axis
        for number, start in enumerate(range(0, x.shape[cut], step)):
            part = slice(start, min(start + step, x.shape[cut]))
            values = x[(slice(None),) * cut + (part,)]
            channels = slice(0, self.features) if whole else part

            def where(index: tuple[int, ...], start: int = start) -> str:
                return f"index {tuple(int(i) + start * (k == cut) for k, i in enumerate(index))}"

            yield Block(values, self.channel_axis, channels, number * whole, where, values.nbytes)


def of_memory(x: Any, channel_axis: int) -> ArrayInMemory:
    """An array as a source."""
    values = x if isinstance(x, np.ma.MaskedArray) else np.asarray(x)
    if values.dtype.kind not in "iub" and not native.is_supported(values.dtype.newbyteorder("=")):
        native.as_values(values)  # raises
    axis = native.channel_axis_of(values, channel_axis)
    check_width("x", values.shape[axis])
    return ArrayInMemory(values, axis, BLOCK_BYTES)


#: Below this, every integer is a float64; a float64 of this size may have been rounded to it.
EXACT = 2**53


def plain(values: Array, label: str) -> Array:
    """Values as the kernels take them: in this machine's byte order, NaN where they are masked.

    Raises
    ------
    ArgumentError
        There are integers that float64 cannot hold.
    """
    masked: Any = values if isinstance(values, np.ma.MaskedArray) else None
    if values.dtype.kind in "iu" and values.dtype.itemsize == 8:
        there = values if masked is None else masked.compressed()
        if there.size:
            check_exact(there.min(), there.max(), label)
    if masked is not None:
        floating = np.float64 if values.dtype.kind in "iub" else values.dtype.newbyteorder("=")
        filled: Array = masked.astype(floating).filled(np.nan)
        return filled
    return values if values.dtype.isnative else values.astype(values.dtype.newbyteorder("="))


def check_exact(least: Any, most: Any, label: str) -> None:
    """Refuse a range of integers that float64 rounds: the result could be wrong in every digit."""
    if int(most) >= EXACT or int(least) <= -EXACT:
        beyond = most if int(most) >= EXACT else least
        raise ArgumentError(
            f"{label}: integers must be below 2**53 in magnitude, as float64 holds them, got "
            f"{int(beyond)}. Subtract a constant first."
        )


# ---- files of any kind --------------------------------------------------------------------------


def open_source(
    path: Path,
    *,
    channel_axis: int,
    columns: Sequence[str] | None,
    header: bool,
    array: str | None,
) -> File:
    """See what a file holds.

    Raises
    ------
    BatchNormError
        What it holds has no statistics, or is not what its name says.
    """
    if kind_of(path) in ARRAYS:
        if columns is not None:
            raise ArgumentError(
                f"{path}: arrays have no named columns, got columns {', '.join(columns)}. "
                "Leave columns out."
            )
        return open_array(path, array=array, channel_axis=channel_axis)
    from . import tables

    if array is not None:
        raise ArgumentError(f"{path}: array names one in a .npz file, got {array!r}. Leave it out.")
    if channel_axis not in (1, -1):
        raise ArgumentError(
            f"{path}: the features of a table are its columns, channel_axis 1, got "
            f"{channel_axis}. Leave it out."
        )
    return tables.open_table(path, columns=columns, header=header)


def ahead(items: Iterator[T]) -> Iterator[T]:
    """The same items, the next being made in a thread while one is worked on."""
    done = object()
    with ThreadPoolExecutor(1, "batchnorm-read") as thread:
        try:
            pending = thread.submit(next, items, done)
            while (item := pending.result()) is not done:
                pending = thread.submit(next, items, done)
                yield item  # type: ignore[misc]
        finally:
            # The generator is closed by who runs it: files and readers are its own.
            pending.cancel()
            close = getattr(items, "close", None)
            if close is not None:
                thread.submit(close).result()
