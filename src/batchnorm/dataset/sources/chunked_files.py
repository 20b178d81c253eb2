"""Arrays in HDF5 and zarr files, read in boxes of whole chunks."""

from __future__ import annotations

import contextlib
import itertools
import math
from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ...errors import ArgumentError
from .arrays import ArrayFile, explain_array_errors
from .blocks import Block

#: Most bytes of a chunk, which is read as a whole.
MOST_CHUNK_BYTES = 1 << 30


class Box(NamedTuple):
    """A part of an array, and its number among those of the same features."""

    place: tuple[slice, ...]
    number: int


@dataclass(frozen=True, kw_only=True)
class ChunkedFile(ArrayFile):
    """An array that a package reads chunk by chunk.

    Attributes
    ----------
    chunks
        Shape of the chunks; all ones if elements can be read one by one.
    """

    chunks: tuple[int, ...]

    def box(self) -> tuple[int, ...]:
        """Return the shape of the boxes: as many whole chunks as fit, along the last axes first."""
        sides = [min(pair) for pair in zip(self.chunks, self.shape, strict=True)]
        room = self.room(math.prod(self.shape[self.channel_axis :]))
        for k in reversed(range(len(sides))):
            sides[k] = min(self.shape[k], sides[k] * max(1, room // math.prod(sides)))
            if sides[k] < self.shape[k]:
                break
        return tuple(sides)

    def cuts(self) -> Iterator[Box]:
        """Cut the array into boxes."""
        if 0 in self.shape:
            return
        sides = [
            [slice(start, min(start + side, n)) for start in range(0, n, side)]
            for n, side in zip(self.shape, self.box(), strict=True)
        ]
        for corner in itertools.product(*(range(len(side)) for side in sides)):
            number = 0
            for axis, k in enumerate(corner):
                if axis != self.channel_axis:
                    number = number * len(sides[axis]) + k
            yield Box(tuple(side[k] for side, k in zip(sides, corner, strict=True)), number)

    @abstractmethod
    def open_array(self, stack: contextlib.ExitStack) -> Any:
        """Open the array, until `stack` closes."""

    def blocks(self) -> Iterator[Block]:
        """Read the boxes from `first` to before `last`."""
        with explain_array_errors(self.path), contextlib.ExitStack() as stack:
            array: Any = None
            for box in itertools.islice(self.cuts(), self.first, self.last):
                if array is None:
                    array = self.open_array(stack)
                    if (array.shape, array.dtype) != (self.shape, self.dtype):
                        raise ArgumentError(
                            f"{self.label}: changed while it was read. Measure it again when it "
                            "is complete."
                        )
                values = np.asarray(array[box.place])
                channels = box.place[self.channel_axis]
                yield Block(
                    values, self.channel_axis, channels, box.number, _where(box), values.nbytes
                )


def _where(box: Box) -> Callable[[tuple[int, ...]], str]:
    def where(index: tuple[int, ...]) -> str:
        place = zip(index, box.place, strict=True)
        return f"index {tuple(int(i) + part.start for i, part in place)}"

    return where


def check_chunks(label: str, chunks: tuple[int, ...], itemsize: int) -> None:
    """Raise if a chunk is larger than memory is likely to hold."""
    if (size := math.prod(chunks) * itemsize) > MOST_CHUNK_BYTES:
        raise ArgumentError(
            f"{label}: must have chunks of at most {MOST_CHUNK_BYTES:,} bytes, which are read as a "
            f"whole, got {chunks} of {size:,} bytes. Write it with smaller chunks."
        )


def chunks_in(shape: tuple[int, ...], chunks: tuple[int, ...]) -> int:
    """Number of chunks of an array."""
    return math.prod(math.ceil(n / side) for n, side in zip(shape, chunks, strict=True))
