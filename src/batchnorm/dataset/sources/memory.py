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
from .columns import Column, Precision, arrow, is_number, to_float64
from .values import EXACT, check_array, check_exact


@dataclass(frozen=True, eq=False)
class ArrayInMemory:
    """An array of any strides, also one that NumPy has mapped to memory."""

    values: Array
    channel_axis: int
    block_bytes: int
    label: str = "x"
    names: tuple[str, ...] | None = None

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
    """Check an array, a list of rows, or a table of pandas, polars or pyarrow, as a source.

    Raises
    ------
    DTypeError, ShapeError
        It is no array, or one that cannot be measured.
    """
    if hasattr(x, "__arrow_c_stream__") and hasattr(x, "columns"):
        names, values = _read_table(x, label)
        check_array(label, values.shape, values.dtype, channel_axis)
        return ArrayInMemory(values, 1, blocks.BLOCK_BYTES, label, names)
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
    if not hasattr(x, "dtype") and values.dtype.kind == "f" and (abs(values) >= EXACT).any():
        for number in np.asarray(x, dtype=object).ravel():  # what NumPy has rounded
            if isinstance(number, int):
                check_exact(number, number, label)
    axis = check_array(label, values.shape, values.dtype, channel_axis)
    return ArrayInMemory(values, axis, blocks.BLOCK_BYTES, label)


def _read_table(x: Any, label: str) -> tuple[tuple[str, ...], Array]:
    """Names and values of a table, whose integers NumPy would round without a word."""
    pa = arrow()
    is_pandas = type(x).__module__.partition(".")[0] == "pandas"
    table = pa.Table.from_pandas(x, preserve_index=False) if is_pandas else pa.table(x)
    precision = Precision(label)
    values = np.empty((table.num_rows, table.num_columns))
    for k, (name, column) in enumerate(zip(table.column_names, table.columns, strict=True)):
        if not is_number(column.type):
            raise DTypeError(
                f"{label}: columns must be numbers, got {name!r} of type {column.type}. Leave it "
                "out."
            )
        row = 0
        for chunk in column.chunks:
            precision.check(chunk, name)
            values[row : row + len(chunk), k] = to_float64(chunk, Column(name))[0]
            row += len(chunk)
    precision.finish()
    return tuple(table.column_names), values
