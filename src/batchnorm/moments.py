"""Moments: count, mean and sum of squared deviations, from which all statistics are computed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import _core, native
from .errors import ArgumentError, DTypeError, ShapeError

__all__ = ["Moments"]

Array = NDArray[Any]
Float64 = NDArray[np.float64]

#: Values that are converted and measured together, so that a cache holds them in float64.
BLOCK_VALUES = 1 << 18

#: Values of the parts that are merged together, and number of parts from which that is faster.
MERGED_VALUES, MERGED_PARTS = 1 << 12, 8


@dataclass(frozen=True, eq=False, init=False)
class Moments:
    """Count, mean and sum of squared deviations of each channel, in float64.

    The sum of two `Moments` is the `Moments` of all their values together.

    Parameters
    ----------
    count : () or (C,)
        Number of values per channel, or the sum of their weights.
    mean : (C,)
        Mean per channel; zero if there are no values.
    m2 : (C,)
        Σ(x − mean)² per channel, or Σw(x − mean)² with weights.
    dof : () or (C,)
        Degrees of freedom of the variance: count − 1, the default, without weights, and
        Σw − Σw²/Σw with weights w. Merging weighted moments needs it.

    Notes
    -----
    m2 / dof is the average of (xᵢ − xⱼ)²/2 over all pairs of values, each with the weight wᵢwⱼ. It
    does not depend on the scale of the weights, is finite if two weights are not zero, and for
    weights of 0 and 1 it is the unbiased variance m2 / (count − 1).

    ``Moments()`` holds no values: adding it to moments of any number of channels changes nothing.
    Merging is associative and commutative up to rounding.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.arange(12.0).reshape(6, 2)
    >>> a, b = Moments.of(x[:4]), Moments.of(x[4:])
    >>> (a + b).mean, (a + b).var()
    (array([5., 6.]), array([11.66666667, 11.66666667]))

    References
    ----------
    Chan, Golub & LeVeque (1979), "Updating formulae and a pairwise algorithm for computing sample
    variances", equations 2.1.
    """

    count: Float64
    mean: Float64
    m2: Float64
    _dof: Float64 | None  # None without weights: of many features, the array is worth sparing

    def __init__(
        self,
        count: ArrayLike = 0.0,
        mean: ArrayLike = 0.0,
        m2: ArrayLike = 0.0,
        dof: ArrayLike | None = None,
    ) -> None:
        """Make read-only float64 copies, and check their shapes and values."""
        n, means, m2s = (
            np.array(native.as_real(v, name), np.float64)
            for v, name in ((count, "count"), (mean, "mean"), (m2, "m2"))
        )
        dofs = None if dof is None else np.array(native.as_real(dof, "dof"), np.float64)
        shape = n.shape if dofs is None else dofs.shape
        if (
            means.shape != m2s.shape
            or means.ndim > 1
            or n.shape not in ((), means.shape)
            or shape != n.shape
        ):
            raise ShapeError(
                "mean and m2 must have shape (C,), count and dof () or (C,), got mean "
                f"{means.shape}, m2 {m2s.shape}, count {n.shape}, dof {shape}."
            )
        if np.any(n < 0) or np.any(m2s < 0) or (dofs is not None and np.any(dofs < 0)):
            raise ArgumentError("count, m2 and dof must not be negative.")
        self._set(n, means, m2s, dofs)

    def _set(self, count: Float64, mean: Float64, m2: Float64, dof: Float64 | None) -> None:
        for value in (count, mean, m2, dof):
            if value is not None:
                value.setflags(write=False)
        # Quicker than object.__setattr__, four times.
        self.__dict__.update(count=count, mean=mean, m2=m2, _dof=dof)

    @property
    def dof(self) -> Float64:
        """Degrees of freedom of the variance: () or (C,)."""
        if self._dof is not None:
            return self._dof
        return np.asarray(np.maximum(self.count - 1, 0))

    @classmethod
    def of(
        cls, x: ArrayLike, *, channel_axis: int = 1, weights: ArrayLike | None = None
    ) -> Moments:
        """Moments of each channel of an array.

        Parameters
        ----------
        x : (N, C, *S)
            Any strides; channel-first and channel-last arrays are read in place. Integers, booleans
            and other byte orders are converted in blocks. The masked values of a masked array are
            ignored, whatever they are. A Dask array is measured chunk by chunk by the scheduler in
            use.
        channel_axis : int
            The axis of the channels; -1 for channels-last arrays.
        weights : broadcasts to (N, *S)
            Weight of each value, finite and not negative. Values with weight zero are ignored, even
            NaN and infinity.

        Returns
        -------
        Moments
            For float32 and narrower types and |mean|/std ≤ 1e6: the mean is within
            1e-12·max(|mean|, std) of the exact value, and the variance has a relative error of at
            most 1e-9. For float64: as accurate as a corrected two-pass algorithm. The count is (),
            or (C,) if the masks of channels differ.

        Raises
        ------
        ShapeError
            `x` has fewer than two axes, or `weights` do not broadcast.
        DTypeError
            `x` or `weights` are not real numbers.
        """
        if is_dask(x):
            return _of_dask_array(x, channel_axis, weights)
        values = native.as_array(x)
        axis = native.channel_axis_of(values, channel_axis)
        w = None if weights is None else native.as_weights(weights, values, axis)
        mask = native.mask_of(x)
        readable = native.is_supported(values.dtype) and native.is_aligned(values)
        if mask is not None or not (readable or values.size <= BLOCK_VALUES):
            return _of_blocks(values, axis, w, mask)
        if not readable:
            values = native.as_values(values)
        count, mean, _, m2, dof = _measure(values, axis, w)
        return moments_without_copy(count, mean, m2, None if w is None else dof)

    @classmethod
    def merge(cls, parts: Iterable[Moments]) -> Moments:
        """Moments of the values of all parts together.

        Parts are merged pairwise, in the order given, so rounding errors grow only with the
        logarithm of their number. Without parts, the result is ``Moments()``. ``sum(parts)`` merges
        one after the other.
        """
        stack: list[tuple[int, Moments]] = []  # powers of two, each less than the one before
        number = 0
        for run in _runs(parts):
            begin = 0
            while begin < len(run):
                # As many as would be merged before any of them meets another part.
                size = 1 << ((len(run) - begin).bit_length() - 1)
                while number % size:
                    size >>= 1
                part = _merge_alike(run[begin : begin + size])
                begin, number = begin + size, number + size
                while stack and stack[-1][0] == size:
                    part = stack.pop()[1] + part
                    size *= 2
                stack.append((size, part))
        if not stack:
            return cls()
        total = stack.pop()[1]
        while stack:
            total = stack.pop()[1] + total
        return total

    def __add__(self, other: Moments) -> Moments:
        """Merge two moments (Chan, Golub & LeVeque 1979)."""
        if not isinstance(other, Moments):
            return NotImplemented
        if self.mean.shape != other.mean.shape:
            for neutral, kept in ((self, other), (other, self)):
                if neutral.mean.ndim == 0 and neutral.count == 0:  # Moments()
                    return kept
            raise ShapeError(
                "moments to merge must have the same number of channels, got "
                f"{self.mean.shape} and {other.mean.shape}."
            )
        na, nb = self.count, other.count
        n = na + nb
        mean, m2 = np.empty((2, self.mean.size))
        _core.merge(
            _as_vector(na),
            _as_vector(self.mean),
            _as_vector(self.m2),
            _as_vector(nb),
            _as_vector(other.mean),
            _as_vector(other.m2),
            mean,
            m2,
        )
        if self.mean.ndim == 0:
            mean, m2 = mean.reshape(()), m2.reshape(())
        if self._dof is None and other._dof is None:
            return moments_without_copy(n, mean, m2)
        return moments_without_copy(n, mean, m2, _merge_dof(na, self.dof, nb, other.dof))

    def __radd__(self, other: object) -> Moments:
        """``0 + moments``, with which ``sum`` begins."""
        return self if isinstance(other, int) and other == 0 else NotImplemented

    def var(self, ddof: float = 0) -> Float64:
        """Variance, m2 / (count − ddof): (C,); NaN where that is not positive.

        With weights, the divisor is count − ddof·(count − dof), so ddof=1 divides by `dof`, which
        is Σw − Σw²/Σw.
        """
        if ddof == 0:
            freedom = self.count
        elif ddof == 1:
            freedom = self.dof
        else:
            freedom = np.asarray((1 - ddof) * self.count + ddof * self.dof)
        if freedom.ndim == 0 and freedom > 0:
            return np.asarray(self.m2 / freedom)
        full = np.broadcast_to(freedom, self.m2.shape)
        undefined = np.full(self.m2.shape, np.nan)
        var: Float64 = np.divide(self.m2, full, out=undefined, where=full > 0)
        return var

    def std(self, ddof: float = 0) -> Float64:
        """Standard deviation, the root of `var`: (C,)."""
        return np.sqrt(self.var(ddof))

    def __eq__(self, other: object) -> bool:
        """Whether count, mean, m2 and dof are equal, element by element (NaN equals NaN)."""
        if not isinstance(other, Moments):
            return NotImplemented
        return all(
            np.array_equal(getattr(self, name), getattr(other, name), equal_nan=True)
            for name in ("count", "mean", "m2", "dof")
        )

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        """Count and number of channels, or the values if there are few."""
        if self.mean.size <= 4:
            return f"Moments(count={self.count}, mean={self.mean}, m2={self.m2})"
        return f"Moments(count={self.count}, {self.mean.size} channels)"


def is_dask(x: object) -> bool:
    """Whether `x` is a Dask collection, without importing Dask."""
    return hasattr(x, "__dask_graph__")


def dask_channel_axis(x: Any, channel_axis: int) -> int:
    """`channel_axis` counted from the front; checks that `x` is a Dask array of real numbers."""
    # A dask.delayed value has every attribute, so check the type of one.
    if not (hasattr(x, "map_blocks") and isinstance(x.dtype, np.dtype)):
        raise DTypeError(
            f"x must be an array, got {type(x).__module__}.{type(x).__name__}. "
            "A Dask DataFrame becomes one by x.to_dask_array(lengths=True)."
        )
    if x.dtype.kind not in "iub" and not native.is_supported(x.dtype.newbyteorder("=")):
        raise DTypeError(f"x must be real numbers, got a Dask array of {x.dtype}.")
    axis = native.channel_axis_of(x, channel_axis)
    if np.isnan(x.shape[axis]):
        raise ShapeError(
            f"x must have a known number of features, got shape {x.shape}. "
            "Call x.compute_chunk_sizes() first."
        )
    return axis


def _of_dask_array(x: Any, channel_axis: int, weights: object) -> Moments:
    """Measure and merge on the scheduler in use, without importing Dask."""
    axis = dask_channel_axis(x, channel_axis)
    if weights is not None:
        raise ArgumentError(
            "weights must be None for a Dask array, whose chunks are measured one by one. "
            "Replace missing values by NaN and call batchnorm.dataset.measure(x, missing='skip')."
        )
    chunks = tuple((1,) * n for n in x.numblocks)
    meta = np.empty((0,) * x.ndim, object)
    parts = x.map_blocks(_of_chunk, axis, dtype=object, chunks=chunks, meta=meta)
    others = tuple(k for k in range(x.ndim) if k != axis)
    return _side_by_side(parts.sum(axis=others, dtype=object).compute())


def _of_chunk(chunk: Any, axis: int) -> NDArray[Any]:
    """Moments of a chunk, as an array of one object, which Dask can add up."""
    part = np.empty((1,) * chunk.ndim, object)
    part[(0,) * chunk.ndim] = Moments.of(chunk, channel_axis=axis)
    return part


def _side_by_side(parts: Sequence[Moments]) -> Moments:
    """Put moments of different channels side by side; one count if each part has the same one."""
    if len(parts) == 1:
        return parts[0]
    mean, m2 = (np.concatenate([getattr(part, name) for part in parts]) for name in ("mean", "m2"))

    def together(values: list[Float64]) -> Float64:
        if all(v.ndim == 0 and v == values[0] for v in values):
            return values[0]
        return np.concatenate(
            [np.broadcast_to(v, part.mean.shape) for v, part in zip(values, parts, strict=True)]
        )

    weighted = any(part._dof is not None for part in parts)
    dof = together([part.dof for part in parts]) if weighted else None
    return moments_without_copy(together([part.count for part in parts]), mean, m2, dof)


# ---- measuring ----------------------------------------------------------------------------------


def _measure(x: Array, axis: int, weights: Float64 | None) -> tuple[Any, ...]:
    """Count, mean, its low part, m2 and dof of values that the core reads.

    Count and dof are numbers, or (C,) if channels do not share their weights.
    """
    if weights is None or native.shared_by_channels(weights, axis):
        values = native.for_core(x)
        mean, low, m2 = np.empty((3, x.shape[axis]))
        count, dof = _core.forward(values, None, axis, 0.0, mean, low, m2, weights=weights)
        return count, mean, low, m2, dof
    apart = (native.channels_first(v, axis) for v in (x, weights))
    found = [np.hstack(_measure(v, 0, w)) for v, w in native.each_channel(*apart)]
    return tuple(np.array(found).T)


def _of_blocks(x: Array, axis: int, weights: Float64 | None, mask: Array | None) -> Moments:
    """Moments of values that are masked, or have to be converted, in bounded memory."""
    channels = x.shape[axis]
    largest = max(range(x.ndim), key=lambda k: (x.shape[k] > 1, abs(x.strides[k])))
    if largest == axis:
        step = BLOCK_VALUES * channels // max(x.size, 1)
    else:  # side by side: many values of few channels, above all where each has a call of the core
        step = BLOCK_VALUES >> (8 if mask is None else 11)
    step = max(1, step)
    # Differences from a mean of the channel lose nothing when they are rounded and merged. Means
    # that are large against the deviation would cost digits of the variance.
    center = np.full(channels, np.nan)
    parts = []
    for c in range(0, max(channels, 1), step):
        at = (slice(None),) * axis + (slice(c, c + step),)
        some = _at(weights, at), _at(mask, at), center[c : c + step]
        parts.append(_of_halves(x[at], axis, *some))
    m = _side_by_side(parts)
    mean = m.mean + np.where(np.isnan(center), 0, center)
    return moments_without_copy(m.count, mean, m.m2, m._dof)


def _of_halves(
    x: Array, axis: int, weights: Float64 | None, mask: Array | None, center: Float64
) -> Moments:
    """Merge the moments of two halves, and so on, down to blocks.

    Means are differences from `center`, which becomes the first finite mean where it is NaN.
    """
    others = [k for k in range(x.ndim) if k != axis]
    cut = max(others, key=lambda k: (x.shape[k] > 1, abs(x.strides[k])))
    middle = x.shape[cut] // 2
    if x.size > BLOCK_VALUES and middle:
        halves = []
        for half in (slice(middle), slice(middle, None)):
            at = (slice(None),) * cut + (half,)
            halves.append(_of_halves(x[at], axis, _at(weights, at), _at(mask, at), center))
        return halves[0] + halves[1]
    hidden = native.hide(weights, mask, axis)
    count, mean, low, m2, dof = _measure(native.as_values(x), axis, hidden)
    first = np.isnan(center) & np.isfinite(mean) & (count > 0)
    center[first] = mean[first]
    with np.errstate(invalid="ignore"):
        about = (mean - np.where(np.isnan(center), 0, center)) + low
    return moments_without_copy(count, about, m2, None if weights is None else dof)


def _at(values: Array | None, index: tuple[slice, ...]) -> Array | None:
    return None if values is None else values[index]


# ---- merging ------------------------------------------------------------------------------------


def _runs(parts: Iterable[Moments]) -> Iterator[list[Moments]]:
    """Parts that follow one another and have the same shapes, not more than memory should hold."""
    run: list[Moments] = []
    shapes: object = None
    most = 0
    for part in parts:
        if not isinstance(part, Moments):
            raise ArgumentError(
                f"parts must be Moments, got {type(part).__name__}. Measure arrays by Moments.of."
            )
        own = (part.mean.shape, part.count.shape, part._dof is None)
        if own != shapes or len(run) == most:
            if run:
                yield run
            run, shapes = [], own
            fitting = max(1, MERGED_VALUES // max(1, part.mean.size))
            most = 1 << (fitting.bit_length() - 1)
        run.append(part)
    if run:
        yield run


def _merge_alike(parts: list[Moments]) -> Moments:
    """Merge 2^k parts of the same shapes, pairs of all at once; every bit is that of ``a + b``."""
    if len(parts) < MERGED_PARTS or parts[0].mean.ndim == 0 or parts[0].mean.size == 0:
        while len(parts) > 1:
            parts = [a + b for a, b in zip(parts[::2], parts[1::2], strict=True)]
        return parts[0]
    mean, m2 = (np.array([getattr(part, name) for part in parts]) for name in ("mean", "m2"))
    count = np.array([part.count for part in parts]).reshape(len(parts), -1)
    weighted = parts[0]._dof is not None
    dof = np.array([part._dof for part in parts]).reshape(count.shape) if weighted else None
    while len(mean) > 1:
        na, nb, n = count[::2], count[1::2], count[::2] + count[1::2]
        to_mean, to_m2 = np.empty((2, len(n), mean.shape[1]))
        each = mean.shape[1] // count.shape[1]  # a count for each value
        _core.merge(
            na.repeat(each, 1).ravel(), mean[::2].ravel(), m2[::2].ravel(),
            nb.repeat(each, 1).ravel(), mean[1::2].ravel(), m2[1::2].ravel(),
            to_mean.ravel(), to_m2.ravel(),
        )  # fmt: skip
        if dof is not None:
            dof = _merge_dof(na, dof[::2], nb, dof[1::2])
        mean, m2, count = to_mean, to_m2, n
    one = parts[0].count.shape
    return moments_without_copy(
        count.reshape(one), mean[0], m2[0], None if dof is None else dof.reshape(one)
    )


def _merge_dof(na: Float64, dof_a: Float64, nb: Float64, dof_b: Float64) -> Float64:
    """Add the pairs of a value in one part and a value in the other; without weights, n - 1."""
    n = na + nb
    pairs = nb * (na - dof_a) + na * (nb - dof_b)
    across: Float64 = np.divide(pairs, n, out=np.zeros_like(n), where=n > 0)
    return dof_a + dof_b + across


def _as_vector(v: Float64) -> Float64:
    """One axis for the core, and a copy of what a message has left unaligned."""
    flags = v.flags
    if v.ndim and flags.aligned and flags.c_contiguous:
        return v
    return np.array(v, np.float64, ndmin=1)


def moments_without_copy(
    count: float | Float64, mean: Float64, m2: Float64, dof: float | Float64 | None = None
) -> Moments:
    """Moments from new arrays that the core has written, without copying or checking them."""
    moments = object.__new__(Moments)
    dofs = None if dof is None else np.array(dof, np.float64)
    moments._set(np.array(count, np.float64), mean, m2, dofs)
    return moments


def as_statistics(moments: Moments) -> Float64:
    """Moments as one array (1, 5, C) with the rows count, mean, low part of the mean, m2, dof."""
    zero = np.zeros_like(moments.mean)
    rows = (moments.count, moments.mean, zero, moments.m2, moments.dof)
    return np.stack([zero + row for row in rows])[None]
