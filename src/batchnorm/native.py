"""Prepare NumPy arrays for the native core, and allocate its outputs.

All arguments are checked here before a kernel runs, so that a call that raises changes nothing.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator
from typing import Any, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import _core
from .errors import ArgumentError, DTypeError, ShapeError

Array = NDArray[Any]
Float64 = NDArray[np.float64]

ROWS = 5  # of statistics: count, mean, low part of the mean, m2, dof

_SUPPORTED = "float16, bfloat16, float32 or float64"


def as_values(x: ArrayLike, name: str = "x") -> Array:
    """`x` as an array that the core reads; integers and booleans become float64."""
    array = as_array(x, name)
    if not is_supported(array.dtype):  # as numpy.mean does
        kind = np.float64 if array.dtype.kind in "iub" else array.dtype.newbyteorder("=")
        return array.astype(kind)
    return array if is_aligned(array) else array.copy()


def as_array(x: ArrayLike, name: str = "x") -> Array:
    """`x` as an array that `as_values` converts, checked and not yet converted."""
    if isinstance(x, (list, tuple)) and any(map(is_masked, x)):
        raise DTypeError(
            f"{name} must be an array, got a {type(x).__name__} of masked ones, whose masks NumPy "
            "drops. Pass numpy.ma.stack of them."
        )
    array = np.asarray(x)
    dtype = array.dtype
    if is_supported(dtype) or dtype.kind in "iub" or is_supported(dtype.newbyteorder("=")):
        return array
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


def is_masked(x: object) -> bool:
    """Whether `x` is a masked array, without importing numpy.ma, without which there are none."""
    ma = sys.modules.get("numpy.ma")
    return ma is not None and isinstance(x, ma.MaskedArray)


def mask_of(x: object) -> NDArray[np.bool_] | None:
    """The mask of a masked array; None if nothing is masked."""
    if not is_masked(x):
        return None
    mask: NDArray[np.bool_] = np.ma.getmask(cast(Any, x))
    return mask if mask.any() else None


def with_mask_of(x: object, y: Array) -> Array:
    """`y`, as a masked array with a copy of the mask of `x` if `x` is one."""
    if not is_masked(x):
        return y
    masked: np.ma.MaskedArray[Any, Any] = np.ma.MaskedArray(y, np.ma.getmask(cast(Any, x)))
    masked.unshare_mask()
    return masked


def as_weights(weights: ArrayLike, x: Array, channel_axis: int) -> Float64:
    """Weights for the axes of `x` without the channel axis, as float64 broadcast to `x`."""
    w = np.asarray(weights)
    if w.dtype.kind not in "fiub" and not is_bfloat16(w.dtype):
        raise DTypeError(f"weights must be real numbers, got {w.dtype}.")
    shape = x.shape[:channel_axis] + x.shape[channel_axis + 1 :]
    w = w.astype(np.float64)
    if (mask := mask_of(weights)) is not None:
        w[mask] = 0
    try:
        full = np.ascontiguousarray(np.broadcast_to(w, shape))
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


def hide(weights: Float64 | None, mask: Array | None, channel_axis: int) -> Float64 | None:
    """`weights`, or ones, and zero where `mask` is, in the shape of x; None if all are ones.

    Channels share them, with a stride of 0, unless the masks of channels differ.
    """
    if mask is None or not mask.any():
        return weights
    by_channel = channels_first(mask, channel_axis)
    shape = by_channel.shape
    if (by_channel[1:] == by_channel[0]).all():
        by_channel = by_channel[:1]
    w: Any = 1.0 if weights is None else np.moveaxis(weights, channel_axis, 0)[: len(by_channel)]
    hidden = np.where(by_channel, 0.0, w)
    return np.moveaxis(np.broadcast_to(hidden, shape), 0, channel_axis)


def shared_by_channels(weights: Float64 | None, channel_axis: int) -> bool:
    """Whether channels share their weights, as the core's kernels need it."""
    return weights is None or not weights.strides[channel_axis] or weights.shape[channel_axis] == 1


def channels_first(x: Array, channel_axis: int) -> Array:
    """(C, N, *S) in C order: one channel of it has the same layout as any other."""
    return np.ascontiguousarray(np.moveaxis(x, channel_axis, 0))


def each_channel(*arrays: Array | None) -> Iterator[tuple[Any, ...]]:
    """Channel by channel, the views (1, ...) of arrays (C, ...); None remains None."""
    for c in range(next(len(a) for a in arrays if a is not None)):
        yield tuple(None if a is None else a[c : c + 1] for a in arrays)


def _first_bad(w: Float64) -> str:
    bad = w[~(np.isfinite(w) & (w >= 0))]
    return f"{bad[0]} ({bad.size} such)"


def channel_axis_of(x: Array, channel_axis: int, name: str = "x") -> int:
    """`channel_axis` counted from the front; checks that `x` has it and at least two axes."""
    if x.ndim < 2:
        raise ShapeError(
            f"{name} must have at least 2 axes, (N, C) or (N, C, *S), got shape {x.shape}. "
            f"A single feature is {name}[:, None]."
        )
    try:
        axis = int(channel_axis.__index__())
    except AttributeError:
        raise ArgumentError(f"channel_axis must be an integer, got {channel_axis!r}.") from None
    if not -x.ndim <= axis < x.ndim:
        raise ShapeError(
            f"channel_axis must be an axis of {name}, from {-x.ndim} to {x.ndim - 1}, got {axis} "
            f"for shape {x.shape}."
        )
    return axis % x.ndim


def per_channel(values: ArrayLike | None, channels: int, name: str, axis: int) -> Float64 | None:
    """A per-channel vector as contiguous and aligned float64."""
    if values is None:
        return None
    v = as_real(values, name)
    if v.shape != (channels,):
        raise ShapeError(
            f"{name} must have shape (C,) = ({channels},), got {v.shape}. The channel axis is "
            f"{axis}; pass channel_axis=-1 for channels-last arrays."
        )
    v = np.ascontiguousarray(v, dtype=np.float64)
    return v if v.flags.aligned else v.copy()


def as_real(values: ArrayLike, name: str) -> Array:
    """`values` as an array of real numbers of any type, none of which is masked."""
    v = np.asarray(values)
    if v.dtype.kind not in "fiub" and not is_bfloat16(v.dtype):
        raise DTypeError(f"{name} must be real numbers, got {v.dtype}.")
    if (mask := mask_of(values)) is not None:
        raise ArgumentError(
            f"{name} must not have masked values, got {np.count_nonzero(mask)} of {v.size} masked. "
            "Give each a value, by filled()."
        )
    return v


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
    raise ArgumentError(
        f"{name} must be finite and not negative, got "
        f"{in_channel(var, ~(np.isfinite(var) & (var >= 0)))}. Recompute the statistics; "
        "a clamped variance would only hide where they went wrong."
    )


def check_finite(values: Float64, name: str) -> None:
    """Raise if a value is NaN or infinite, naming the channel."""
    if not np.isfinite(values).all():
        raise ArgumentError(
            f"{name} must be finite, got {in_channel(values, ~np.isfinite(values))}."
        )


def check_statistics(
    mean: Float64, var: Float64, eps: float, mean_name: str = "mean", var_name: str = "var"
) -> None:
    """Raise unless one can subtract the mean and divide by √(var + ε), naming the channel."""
    check_variance(var, var_name)
    check_finite(mean, mean_name)
    if eps == 0 and not var.all():
        raise ArgumentError(
            f"{var_name} + eps must be above zero, got {in_channel(var, var == 0)}; pass eps > 0."
        )


def in_channel(values: Float64, wrong: NDArray[np.bool_]) -> str:
    """For messages, the first value that is wrong, its channel, and how many are."""
    c = int(np.flatnonzero(wrong)[0])
    return f"{values[c]} in channel {c} ({np.count_nonzero(wrong)} of {values.size} channels)"


def output_like(
    x: Array, out: Array | None, apart_from: tuple[Array, ...], name: str = "x"
) -> Array:
    """`out`, checked, or a new array with the shape, type and memory order of `x`."""
    if out is None:
        return np.empty_like(x, subok=False)
    if not isinstance(out, np.ndarray) or is_masked(out):
        raise DTypeError(
            f"out must be a numpy.ndarray, got {type(out).__name__}."
            + (" Pass its data; masked input gives masked output." if is_masked(out) else "")
        )
    if out.shape != x.shape or out.dtype != x.dtype:
        raise (ShapeError if out.shape != x.shape else DTypeError)(
            f"out must have the shape and type of {name}, {x.shape} {x.dtype}, "
            f"got {out.shape} {out.dtype}."
        )
    if not out.flags.writeable:
        raise ArgumentError("out must be writeable, got a read-only array. Pass a copy of it.")
    if not is_aligned(out):
        raise ArgumentError(
            f"out must be aligned, its address and strides multiples of {out.itemsize} bytes, got "
            f"strides {out.strides}{'' if out.flags.aligned else ' at an odd address'}. "
            f"Pass numpy.empty_like({name})."
        )
    for other in apart_from:
        if _share_memory(out, other):
            raise ArgumentError(
                "out must not share memory with an input (a backward pass still reads it), got "
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


def is_aligned(x: Array) -> bool:
    """Whether elements are aligned and strides multiples of their size."""
    flags = x.flags
    return bool(
        flags.aligned and (flags.c_contiguous or all(s % x.itemsize == 0 for s in x.strides))
    )


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
