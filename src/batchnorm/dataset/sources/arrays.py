"""What files of arrays have in common: a shape, a type, an axis of features, numbered blocks."""

from __future__ import annotations

import contextlib
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np

from ...errors import ArgumentError, BatchNormError
from ..addresses import Fingerprint, explain_read_errors, is_remote, suffix_of
from ..extras import first_line
from . import blocks
from .blocks import Block, Source
from .values import check_array, floating_type

Self = TypeVar("Self", bound="ArrayFile")

#: Rows of a block, where that takes more memory, up to WIDEST times as much: merging costs as much
#: as some rows do.
BLOCK_ROWS = 32
WIDEST = 2


@dataclass(frozen=True, kw_only=True)
class ArrayFile(ABC):
    """An array in a file.

    Attributes
    ----------
    path, fingerprint
        Where the file is, and its fingerprint when it was opened.
    member
        Name of the array inside the file; None if the file is the array.
    shape, dtype
        Of the array.
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
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    channel_axis: int
    block_bytes: int
    element_bytes: int
    first: int = 0
    last: int | None = None

    names = None

    @property
    def label(self) -> str:
        """The path, with the name of the array inside the file."""
        return label_of(self.path, self.member)

    @property
    def features(self) -> int:
        """Length of the channel axis."""
        return self.shape[self.channel_axis]

    @property
    def nbytes(self) -> int:
        """Bytes of all elements."""
        return math.prod(self.shape) * self.dtype.itemsize

    def split(self, blocks: int) -> list[Source]:
        """Split into runs of so many blocks."""
        count = sum(1 for _ in self.cuts())
        return [replace(self, first=k, last=k + blocks) for k in range(0, max(count, 1), blocks)]

    def with_path(self: Self, path: str) -> Self:
        """Return the same file under another path."""
        return replace(self, path=path)

    def room(self, row: int) -> int:
        """Elements of a block, given the elements of a row of all features."""
        usual = max(1, self.block_bytes // self.element_bytes)
        return min(max(usual, BLOCK_ROWS * row), WIDEST * usual)

    @abstractmethod
    def cuts(self) -> Iterator[Any]:
        """Cut the array into blocks."""

    @abstractmethod
    def blocks(self) -> Iterator[Block]:
        """Read the blocks from `first` to before `last`."""


def array_fields(
    path: str,
    fingerprint: Fingerprint,
    member: str | None,
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
    channel_axis: int,
) -> dict[str, Any]:
    """Check that an array can be measured, and return the arguments of every `ArrayFile`.

    Raises
    ------
    DTypeError, ShapeError
        As from `check_array`.
    """
    return {
        "path": path,
        "fingerprint": (fingerprint[0], member, *fingerprint[2:]),
        "member": member,
        "shape": shape,
        "dtype": dtype,
        "channel_axis": check_array(label_of(path, member), shape, dtype, channel_axis),
        "block_bytes": blocks.BLOCK_BYTES,
        "element_bytes": floating_type(dtype).itemsize,  # integers take more when summed
    }


def label_of(path: str, member: str | None) -> str:
    """Name an array in messages."""
    return str(path) if member is None else f"{path} ({member.removesuffix('.npy')})"


def choose_array(path: str, arrays: Sequence[str], array: str | None) -> str:
    """Return the name of the array that is asked for, or of the only one.

    Raises
    ------
    ArgumentError
        There is no such array, or not exactly one if none is asked for.
    """
    listed = ", ".join(arrays[:10]) or "none"
    listed += f" and {len(arrays) - 10} more" if len(arrays) > 10 else ""
    if array is not None:
        if array not in arrays:
            raise ArgumentError(f"{path}: has no array {array!r}. It holds: {listed}.")
        return array
    if len(arrays) != 1:
        raise ArgumentError(
            f"{path}: must hold one array, or array must name one of those in it, got "
            f"{len(arrays)}: {listed}. Choose by array=NAME, --array NAME."
        )
    return arrays[0]


@contextlib.contextmanager
def explain_array_errors(path: str) -> Iterator[None]:
    """Turn errors of the system, and whatever damage leads to, into one line."""
    with explain_read_errors(path):
        try:
            yield
        except BatchNormError:
            raise
        except Exception as error:
            # A number says that it comes from the system, and not from a package.
            if is_remote(path) or (isinstance(error, OSError) and error.errno is not None):
                raise
            raise ArgumentError(
                f"{path}: must be a valid {suffix_of(path)} file, but is damaged or of another "
                f"kind ({first_line(error)}). Write or copy it again."
            ) from error
