"""The interface of every kind of data: a source, read as a stream of blocks of bounded size.

A source knows its features before a value is read, and can be sent to another process. Where its
blocks are cut depends on nothing but its shape, type and chunks, so that sums are always made in
the same order and the result has the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

from ...errors import ArgumentError, ShapeError
from ...native import Array
from ..addresses import Fingerprint, fingerprint_of

#: Bytes of a block. Two are in memory at a time, one being read while the other is summed: large
#: enough that starting threads costs nothing, small enough to stay far below what a machine has.
BLOCK_BYTES = 1 << 25

#: Most features of an array. Memory grows with their number, by some hundred bytes each.
MOST_FEATURES = 10_000_000


@dataclass(frozen=True)
class Block:
    """Some values of a source.

    Attributes
    ----------
    values : any number of axes
        Valid until the block after the next is read, which reuses its memory.
    axis : int
        The axis of the features in `values`.
    channels : slice
        The features of the source that the block holds. Two blocks share all features or none.
    number : int
        Position among the blocks of the same features, from 0: the order in which they merge.
    where : callable
        Describes where an index of `values` lies in the source.
    nbytes : int
        Progress that this block makes, in the units of `Source.nbytes`.
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
        """Its name in messages."""

    @property
    def features(self) -> int:
        """Number of features."""

    @property
    def names(self) -> tuple[str, ...] | None:
        """Names of the features, if they have any."""

    @property
    def nbytes(self) -> int:
        """Bytes to read."""

    def blocks(self) -> Iterator[Block]:
        """Yield all values, in order."""


class FileSource(Source, Protocol):
    """A source that is a file, which another process can read as well."""

    @property
    def path(self) -> str:
        """Where the file is."""

    @property
    def fingerprint(self) -> Fingerprint:
        """Fingerprint of the file when it was opened."""

    def split(self, blocks: int) -> list[Source]:
        """Split into runs of so many blocks, if each can be read without those before it."""

    def with_path(self, path: str) -> FileSource:
        """Return the same file under another path."""


def check_unchanged(file: FileSource) -> None:
    """Raise if a file is no longer the one that was opened."""
    if fingerprint_of(file.path, file.fingerprint[1]) != file.fingerprint:
        raise ArgumentError(
            f"{file.label}: changed while it was read. Measure it again when it is complete."
        )


def check_width(label: str, features: int) -> None:
    """Raise if there are more features than memory is likely to hold."""
    if features > MOST_FEATURES:
        raise ShapeError(
            f"{label}: must have at most {MOST_FEATURES:,} features, got {features:,}. "
            "Check channel_axis, --channel-axis, which is the axis of the features."
        )
