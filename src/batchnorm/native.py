"""Prepare NumPy arrays for the native core, and allocate its outputs.

All arguments are checked here before a kernel runs, so that a call that raises changes nothing.
"""

from __future__ import annotations

import math
import os
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import _core
from .errors import ArgumentError, DTypeError, ShapeError

Array = NDArray[Any]
Float64 = NDArray[np.float64]

ROWS = 5  # of statistics: count, mean, low part of the mean, m2, dof

_SUPPORTED = "float16, bfloat16, float32 or float64"


def as_values(x: ArrayLike, name: str = "x") -> Array:
    """`x` as an array of a supported floating type; integers and booleans become float64."""
    array = np.asarray(x)
    if is_supported(array.dtype):
        return array
    if array.dtype.kind in "iub":  # as numpy.mean does
        return array.astype(np.float64)
    raise DTypeError(
        f"{name} must be real numbers of type {_SUPPORTED} (or integers), got {array.dtype}."
        + (f" Convert it, e.g. {name}.astype(numpy.float64)." if array.dtype.kind == "f" else "")
    )


def is_supported(dtype: np.dtype[Any]) -> bool:
    """Whether the kernels read this type."""
    if dtype.kind == "f":
        return dtype.itemsize <= 8 and dtype.isnative
    return is_bfloat16(dtype)


def is_bfloat16(dtype: np.dtype[Any]) -> bool:
    """Whether this is `ml_dtypes.bfloat16`, by name, so that the package need not be imported."""
    return dtype.kind == "V" and dtype.name == "bfloat16"


def as_weights(weights: ArrayLike, x: Array, channel_axis: int) -> Float64:
    """Weights for the axes of `x` without the channel axis, as float64 broadcast to `x`."""
    w = np.asarray(weights)
    if w.dtype.kind not in "fiub" and not is_bfloat16(w.dtype):
        raise DTypeError(f"weights must be real numbers, got {w.dtype}.")
    shape = x.shape[:channel_axis] + x.shape[channel_axis + 1 :]
    try:
        full = np.ascontiguousarray(np.broadcast_to(w.astype(np.float64), shape))
    except ValueError:
        raise ShapeError(
            f"weights must broadcast to the shape of x without its channel axis, {shape}, got "
            f"{w.shape}. Weights of whole examples have shape ({shape[0]},"
            f"{' 1,' * (len(shape) - 1)}) here."
        ) from None
    if full.size and not (np.isfinite(full).all() and full.min() >= 0):
        raise ArgumentError(
            "weights must be finite and not negative; use 0 to leave a value out, got "
            f"{_first_bad(full)}."
        )
    return np.broadcast_to(np.expand_dims(full, channel_axis), x.shape)


def _first_bad(w: Float64) -> str:
    bad = w[~(np.isfinite(w) & (w >= 0))]
    return f"{bad[0]} ({bad.size} such)"


def channel_axis_of(x: Array, channel_axis: int) -> int:
    """`channel_axis` counted from the front; checks that `x` has it and at least two axes."""
    if x.ndim < 2:
        raise ShapeError(
            f"x must have at least 2 axes, (N, C) or (N, C, *S), got shape {x.shape}. "
            "A single feature is x[:, None]."
        )
    try:
        axis = int(channel_axis.__index__())
    except AttributeError:
        raise ArgumentError(f"channel_axis must be an integer, got {channel_axis!r}.") from None
    if not -x.ndim <= axis < x.ndim:
        raise ShapeError(
            f"channel_axis must be an axis of x, from {-x.ndim} to {x.ndim - 1}, got {axis} for "
            f"shape {x.shape}."
        )
    return axis % x.ndim


def per_channel(values: ArrayLike | None, channels: int, name: str, axis: int) -> Float64 | None:
    """A per-channel vector as contiguous float64."""
    if values is None:
        return None
    v = np.asarray(values)
    if v.dtype.kind not in "fiub" and not is_bfloat16(v.dtype):
        raise DTypeError(f"{name} must be real numbers, got {v.dtype}.")
    if v.shape != (channels,):
        raise ShapeError(
            f"{name} must have shape (C,) = ({channels},), got {v.shape}. The channel axis is "
            f"{axis}; pass channel_axis=-1 for channels-last arrays."
        )
    return np.ascontiguousarray(v, dtype=np.float64)


def check_eps(eps: float) -> float:
    """ε as a float: finite and not negative."""
    try:
        value = float(eps)
    except (TypeError, ValueError):
        raise ArgumentError(f"eps must be a number, got {eps!r}.") from None
    if not (math.isfinite(value) and value >= 0):
        raise ArgumentError(f"eps must be finite and not negative, got {eps!r}.")
    return value


def check_variance(var: Float64, name: str = "var") -> None:
    """Raise if a variance is negative or not finite, naming the channel."""
    if not var.size or (var.min() >= 0 and var.max() < math.inf):  # False if there is a NaN
        return
    wrong = ~(np.isfinite(var) & (var >= 0))
    c = int(np.flatnonzero(wrong)[0])
    raise ArgumentError(
        f"{name} must be finite and not negative, got {var[c]} in channel {c}"
        f" ({int(wrong.sum())} of {var.size} channels). Recompute the statistics; "
        "a clamped variance would only hide where they went wrong."
    )


def output_like(x: Array, out: Array | None, apart_from: tuple[Array, ...]) -> Array:
    """`out`, checked, or a new array with the shape, type and memory order of `x`."""
    if out is None:
        return np.empty_like(x, subok=False)
    if not isinstance(out, np.ndarray):
        raise DTypeError(f"out must be a numpy.ndarray, got {type(out).__name__}.")
    if out.shape != x.shape or out.dtype != x.dtype:
        raise (ShapeError if out.shape != x.shape else DTypeError)(
            f"out must have the shape and type of x, {x.shape} {x.dtype}, "
            f"got {out.shape} {out.dtype}."
        )
    if not out.flags.writeable:
        raise ArgumentError("out must be writeable, got a read-only array. Pass a copy of it.")
    for other in apart_from:
        if _share_memory(out, other):
            raise ArgumentError(
                "out must not share memory with an input (the backward pass still reads it), got "
                "an overlapping array. Pass another array, or leave out=None."
            )
    return out


def _share_memory(a: Array, b: Array) -> bool:
    if not np.may_share_memory(a, b):
        return False
    try:
        limit: Any = 10_000  # NumPy's own stubs know only its named limits
        return np.shares_memory(a, b, max_work=limit)
    except RuntimeError:  # numpy.exceptions.TooHardError: undecided, so refuse
        return True


def for_core(x: Array) -> Array:
    """`x` as it is passed to the core: bfloat16, which has no buffer format, as uint16."""
    if is_bfloat16(x.dtype):
        bits: Array = x.view(np.uint16)
        return bits
    return x


def aligned(x: Array) -> Array:
    """`x`, or a copy if elements are not aligned or strides are not multiples of their size."""
    flags = x.flags
    if flags.aligned and (flags.c_contiguous or all(s % x.itemsize == 0 for s in x.strides)):
        return x
    copied: Array = x.copy()
    return copied


def read_arrays_in_place() -> None:
    """Let the core read NumPy's arrays where they lie, if they lie as it expects."""
    probe = np.zeros((2, 3, 4), np.float32)[:, ::2].transpose(2, 0, 1)
    dtypes = tuple(np.dtype(t) for t in (np.float32, np.float64, np.float16, np.uint16))
    address = probe.__array_interface__["data"][0]
    strides = [s // probe.itemsize for s in probe.strides]
    _core.use_numpy(
        np.ndarray, dtypes, np.empty, np.empty_like, probe, address, list(probe.shape), strides
    )


def use_environment() -> None:
    """Take BATCHNORM_ISA (baseline, avx2 or avx512) from the environment."""
    name = os.environ.get("BATCHNORM_ISA")
    if not name:
        return
    known = _core.instruction_sets()
    if name not in known:
        raise ArgumentError(
            f"BATCHNORM_ISA must be one of the instruction sets that this machine supports, "
            f"{', '.join(known)}, got {name!r}. Unset it to use the best one."
        )
    _core.use_instruction_set(name)


def show_config() -> dict[str, Any]:
    """Version, instruction set, threads and cache that are in use.

    Returns
    -------
    dict
        version, instruction_set (in use), instruction_sets (that this machine supports), openmp,
        threads, last_level_cache (bytes).
    """
    from ._version import __version__

    return {
        "version": __version__,
        "instruction_set": _core.instruction_set(),
        "instruction_sets": _core.instruction_sets(),
        "openmp": _core.has_openmp(),
        "threads": _core.threads(),
        "last_level_cache": _core.last_level_cache(),
    }
