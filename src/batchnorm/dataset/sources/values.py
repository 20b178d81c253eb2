"""Values as the kernels take them: native byte order, NaN for masked values, exact integers."""

from __future__ import annotations

from typing import Any

import numpy as np

from ... import native
from ...errors import ArgumentError, DTypeError, ShapeError
from ...native import Array
from .blocks import check_width

#: Below this, every integer is a float64; a float64 of this size may have been rounded to it.
EXACT = 2**53


def is_real(dtype: np.dtype[Any]) -> bool:
    """Whether values of this type can be measured, in whatever byte order."""
    return dtype.kind in "iub" or native.is_supported(dtype.newbyteorder("="))


def check_array(label: str, shape: tuple[int, ...], dtype: np.dtype[Any], channel_axis: int) -> int:
    """Return `channel_axis` counted from the front, if the array can be measured.

    Raises
    ------
    DTypeError, ShapeError
        It is not one of real numbers, or has fewer than two axes, not this one, or a vast one.
    """
    if not is_real(dtype):
        raise DTypeError(
            f"{label}: must hold real numbers (float16, bfloat16, float32, float64, integers or "
            f"booleans), got {dtype}. Convert it to one of these."
        )
    if len(shape) < 2:
        raise ShapeError(
            f"{label}: must have at least 2 axes, (N, C) or (N, C, *S), got shape {shape}. "
            "A single feature is x[:, None]."
        )
    if not -len(shape) <= channel_axis < len(shape):
        raise ShapeError(
            f"{label}: has no axis {channel_axis}, its shape is {shape}. Choose a channel_axis "
            f"from {-len(shape)} to {len(shape) - 1}."
        )
    check_width(label, shape[channel_axis])
    return channel_axis % len(shape)


def floating_type(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Return the type in native byte order, or float64 for integers and booleans."""
    return np.dtype(np.float64) if dtype.kind in "iub" else dtype.newbyteorder("=")


def to_native(values: Array, label: str) -> Array:
    """Return values in native byte order, with NaN where they are masked.

    Raises
    ------
    ArgumentError
        There are integers that float64 cannot hold exactly.
    """
    masked: Any = values if isinstance(values, np.ma.MaskedArray) else None
    if values.dtype.kind in "iu" and values.dtype.itemsize == 8:
        present = values if masked is None else masked.compressed()
        if present.size:
            check_exact(present.min(), present.max(), label)
    if masked is not None:
        filled: Array = masked.astype(floating_type(values.dtype)).filled(np.nan)
        return filled
    return values if values.dtype.isnative else values.astype(values.dtype.newbyteorder("="))


def check_exact(least: Any, most: Any, label: str) -> None:
    """Raise if float64 rounds integers in this range: every digit of the result could be wrong."""
    if int(most) >= EXACT or int(least) <= -EXACT:
        beyond = most if int(most) >= EXACT else least
        raise ArgumentError(
            f"{label}: integers must be below 2**53 in magnitude, so that float64 holds them "
            f"exactly, got {int(beyond)}. Subtract a constant first."
        )
