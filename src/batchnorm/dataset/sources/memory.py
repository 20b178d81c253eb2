"""Arrays in memory, also memory-mapped ones."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...errors import DTypeError
from ...native import Array
from ..extras import first_line
from . import blocks
from .blocks import Block
from .values import check_array


@dataclass(frozen=True, eq=False)
class ArrayInMemory:
    """An array of any strides, also one that NumPy has mapped to memory."""

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
        """Bytes of all elements."""
        return self.values.nbytes

    def blocks(self) -> Iterator[Block]:
        """Yield slices along the axis with the largest stride."""
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


def open_memory(x: Any, channel_axis: int, label: str = "x") -> ArrayInMemory:
    """Check an array in memory, or a list of rows, as a source.

    Raises
    ------
    DTypeError, ShapeError
        It is no array, or one that cannot be measured.
    """
    masked = isinstance(x, np.ma.MaskedArray)
    if isinstance(x, (list, tuple)):
        masked = any(isinstance(row, np.ma.MaskedArray) for row in x)
    try:
        values = np.ma.asarray(x) if masked else np.asarray(x)
    except Exception as error:  # of rows that differ, or of tensors elsewhere or with gradients
        raise DTypeError(
            f"{label}: must be an array, and cannot be made one ({first_line(error)}). Pass an "
            "array of NumPy."
        ) from error
    axis = check_array(label, values.shape, values.dtype, channel_axis)
    return ArrayInMemory(values, axis, blocks.BLOCK_BYTES, label)
