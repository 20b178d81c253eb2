"""Moments: the one value from which every mean and variance of this library comes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import _core, native
from .errors import ArgumentError, DTypeError, ShapeError

__all__ = ["Moments"]

Float64 = NDArray[np.float64]

_FIELDS = ("count", "mean", "m2", "dof")


def _zero() -> Float64:
    return np.zeros(())


@dataclass(frozen=True, eq=False)
class Moments:
    """Count, mean and summed squared deviation of each channel, in float64; merges exactly.

    Parameters
    ----------
    count : () or (C,)
        Number of values per channel, or the sum of their weights. Zero: no values seen.
    mean : (C,)
        Mean per channel; zero where count is.
    m2 : (C,)
        Σ(x − mean)² per channel, weighted where there are weights.
    dof : () or (C,)
        Degrees of freedom of the variance: count − 1, the default, for values without weights, and
        Σw − Σw²/Σw with weights w. Moments of weighted values need it to merge rightly.

    Notes
    -----
    m2 / dof is the average of (xᵢ − xⱼ)²/2 over all pairs of values, each weighted by wᵢwⱼ. So it
    does not depend on the scale of the weights, is finite as soon as two of them are not zero, and
    with weights of 0 and 1 it is the unbiased variance m2 / (count − 1).

    ``Moments()`` is the neutral element: it merges with moments of any number of channels and
    leaves them as they are. Merging is associative and commutative up to rounding of float64.

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

    count: Float64 = field(default_factory=_zero)
    mean: Float64 = field(default_factory=_zero)
    m2: Float64 = field(default_factory=_zero)
    dof: Float64 = None  # type: ignore[assignment]  # count - 1, set below

    def __post_init__(self) -> None:
        """Own read-only float64 copies of consistent shapes."""
        count, mean, m2 = (np.array(v, np.float64) for v in (self.count, self.mean, self.m2))
        if self.dof is None:
            dof = np.asarray(np.maximum(count - 1, 0))
        else:
            dof = np.array(self.dof, np.float64)
        if (
            mean.shape != m2.shape
            or mean.ndim > 1
            or count.shape not in ((), mean.shape)
            or dof.shape != count.shape
        ):
            raise ShapeError(
                "mean and m2 must have shape (C,), count and dof () or (C,), got mean "
                f"{mean.shape}, m2 {m2.shape}, count {count.shape}, dof {dof.shape}."
            )
        if np.any(count < 0) or np.any(m2 < 0) or np.any(dof < 0):
            raise ArgumentError("count, m2 and dof must not be negative.")
        self._set(count, mean, m2, dof)

    def _set(self, *values: Float64) -> None:
        for name, value in zip(_FIELDS, values, strict=True):
            value.flags.writeable = False
            object.__setattr__(self, name, value)

    @classmethod
    def of(
        cls, x: ArrayLike, *, channel_axis: int = 1, weights: ArrayLike | None = None
    ) -> Moments:
        """Moments of an array, one per channel.

        Parameters
        ----------
        x : (N, C, *S)
            Any strides; channel-first and channel-last are read in place. A Dask array is measured
            chunk by chunk by the scheduler in use, with NaN for masked values.
        channel_axis : int
            The axis that is kept.
        weights : broadcasts to (N, *S)
            Real, finite, not negative. What a zero weight covers does not matter, NaN and infinity
            included.

        Returns
        -------
        Moments
            Mean within 1e-12·max(|mean|, std) and variance within 1e-9 of the exact values for
            inputs up to float32 and |mean|/std ≤ 1e6; as accurate as a corrected two-pass in
            float64.

        Raises
        ------
        ShapeError
            `x` has fewer than two axes, or `weights` do not broadcast.
        DTypeError
            `x` or `weights` are not real numbers.
        """
        if is_dask(x):
            return _of_dask_array(x, channel_axis, weights)
        values = native.aligned(native.as_values(x))
        axis = native.channel_axis_of(values, channel_axis)
        w = None if weights is None else native.as_weights(weights, values, axis)
        mean, low, m2 = np.empty((3, values.shape[axis]))
        count, dof = _core.forward(native.seen(values), None, axis, 0.0, mean, low, m2, weights=w)
        return measured(count, mean, m2, dof)

    @classmethod
    def merge(cls, parts: Iterable[Moments]) -> Moments:
        """Moments of all the values that the parts are moments of.

        Parts are merged pairwise, in the order given, so that rounding grows with the logarithm
        of their number. No parts give the neutral element.
        """
        stack: list[tuple[int, Moments]] = []
        for part in parts:
            size = 1
            while stack and stack[-1][0] == size:
                part = stack.pop()[1] + part
                size *= 2
            stack.append((size, part))
        total = cls()
        for _, part in reversed(stack):
            total = part + total
        return total

    def __add__(self, other: Moments) -> Moments:
        """Merge two moments (Chan, Golub & LeVeque 1979)."""
        if not isinstance(other, Moments):
            return NotImplemented
        if self.mean.shape != other.mean.shape:
            for neutral, kept in ((self, other), (other, self)):
                if neutral.mean.ndim == 0 and neutral.count == 0:
                    return kept
            raise ShapeError(
                "moments to merge must have the same number of channels, got "
                f"{self.mean.shape} and {other.mean.shape}."
            )
        na, nb = self.count, other.count
        n = na + nb
        share = np.divide(nb, n, out=np.zeros_like(n), where=n > 0)
        with np.errstate(over="ignore"):
            delta = other.mean - self.mean
            step = self.mean + delta * share
            if not np.isfinite(delta).all():  # further apart than float64 reaches
                apart = (1 - share) * self.mean + share * other.mean
                step = np.where(np.isfinite(delta), step, apart)
            # An empty part has no mean to differ from: its share of zero or one must give the
            # other's value to the last bit, and 0 · inf must not arise.
            mean = np.where(nb == 0, self.mean, np.where(na == 0, other.mean, step))
            between = np.where((na == 0) | (nb == 0), 0.0, delta) * delta * na * share
            m2 = self.m2 + other.m2 + np.where((na == 0) | (nb == 0), 0.0, between)
        # Pairs of a value here and a value there; n - 1 exactly where there are no weights.
        across = np.divide(
            nb * (na - self.dof) + na * (nb - other.dof), n, out=np.zeros_like(n), where=n > 0
        )
        return Moments(n, mean, m2, self.dof + other.dof + across)

    def var(self, ddof: float = 0) -> Float64:
        """Variance, m2 / (count − ddof): (C,); NaN where that is not positive.

        With weights, ddof=1 divides by `dof`, Σw − Σw²/Σw, and other values in proportion.
        """
        freedom = (1 - ddof) * self.count + ddof * self.dof
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
            for name in _FIELDS
        )

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        """Count, number of channels, and the values where there are few."""
        if self.mean.size <= 4:
            return f"Moments(count={self.count}, mean={self.mean}, m2={self.m2})"
        return f"Moments(count={self.count}, {self.mean.size} channels)"


def is_dask(x: object) -> bool:
    """Whether `x` is a Dask collection, told without importing Dask."""
    return hasattr(x, "__dask_graph__")


def dask_channel_axis(x: Any, channel_axis: int) -> int:
    """`channel_axis` counted from the front; checks that `x` is a Dask array of real numbers."""
    # A delayed value has every attribute that it is asked for, so look at the type of one.
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
    """Measure and merge on the scheduler in use, by methods of the array: Dask is not imported."""
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
    merged = parts.sum(axis=others, dtype=object).compute()  # one for each run of channels
    mean, m2 = (np.concatenate([getattr(m, name) for m in merged]) for name in ("mean", "m2"))
    return Moments(merged[0].count, mean, m2)


def _of_chunk(chunk: Any, axis: int) -> NDArray[Any]:
    """Moments of a chunk, as an array of one object, which Dask can add up."""
    if hasattr(chunk, "filled"):  # masked values are missing
        chunk = chunk.astype(np.float64).filled(np.nan)
    values = chunk.astype(chunk.dtype.newbyteorder("="), copy=False)
    part = np.empty((1,) * chunk.ndim, object)
    part[(0,) * chunk.ndim] = Moments.of(values, channel_axis=axis)
    return part


def measured(
    count: float | Float64, mean: Float64, m2: Float64, dof: float | None = None
) -> Moments:
    """Moments from what the core returned: fresh arrays of one length, not checked again."""
    moments = object.__new__(Moments)
    counts = np.array(count, np.float64)
    dofs = np.maximum(counts - 1, 0) if dof is None else dof
    moments._set(counts, mean, m2, np.array(dofs, np.float64))
    return moments


def as_block(moments: Moments) -> Float64:
    """Moments as the core's layers keep them, (1, 5, C): count, mean, its low part, m2 and dof."""
    zero = np.zeros_like(moments.mean)
    rows = (moments.count, moments.mean, zero, moments.m2, moments.dof)
    return np.stack([zero + row for row in rows])[None]
