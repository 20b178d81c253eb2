"""Moments of the columns of a matrix of which not every value is there.

With weights, `dof` of what these functions return is not that of the weights: use the biased
variance, ``var()``.
"""

from __future__ import annotations

import numpy as np

from . import _core, native
from .moments import Moments, moments_without_copy
from .native import Array, Float64

__all__ = ["moments_of_present", "moments_of_sparse"]


def moments_of_present(x: Array, weights: Float64 | None = None) -> Moments:
    """Moments of the values of each column of a matrix that are not NaN.

    Parameters
    ----------
    x : (N, C)
        In C or Fortran order; others are copied.
    weights : (N,)
        Weight of each row, finite and not negative; zero hides the row.

    Returns
    -------
    Moments
        As accurate as those of `Moments.of`.
    """
    by_row = not x.flags.f_contiguous
    lines = np.ascontiguousarray(x if by_row else x.T)
    starts = np.arange(len(lines) + 1) * lines.shape[1]
    found = _measure(lines.ravel(), starts, None, x.shape, by_row, weights)
    return moments_without_copy(*found[:3])


def moments_of_sparse(
    values: Array,
    starts: Array,
    places: Array,
    shape: tuple[int, int],
    *,
    by_row: bool,
    weights: Float64 | None = None,
) -> Moments:
    """Moments of each column of a sparse matrix; NaN is missing, and what is not stored zero.

    Parameters
    ----------
    values : (n,)
        What is stored, row by row (CSR) or column by column (CSC), nothing twice.
    starts : (rows + 1,) or (columns + 1,)
        Where in `values` each row or column begins, and the end of the last.
    places : (n,) of int32 or int64
        The column, or row, of each value.
    shape : (rows, columns)
    by_row : bool
        Whether `values` are row by row.
    weights : (rows,)
        Weight of each row, finite and not negative; zero hides the row.

    Returns
    -------
    Moments
        As accurate as those of `Moments.of`. Columns without NaN have the same count.

    Raises
    ------
    ValueError
        `starts` or `places` lie outside of the matrix.
    """
    found = _measure(values, starts, places, shape, by_row, weights)
    missing, stored, stored_low = found[3:]
    w = np.ones(shape[0]) if weights is None else weights
    # The weight of the zeros may be a small difference of large sums. The sum of the high parts is
    # exact: they are multiples of one power of two, and together below 2^53 times that.
    power = np.ldexp(1.0, np.frexp(w.max(initial=0.0) * len(w))[1])
    high = (w + power) - power
    zeros = np.maximum((high.sum() - stored) + ((w - high).sum() - stored_low), 0)
    nothing = np.zeros_like(missing)
    # In this order, the mean is 0 + mean·share, in which nothing cancels.
    moments = Moments(zeros, nothing, nothing) + moments_without_copy(*found[:3])
    # The same for all columns without NaN, rather than the same up to rounding.
    count = np.where(missing > 0, moments.count, w.sum())
    return Moments(count, moments.mean, moments.m2)


def _measure(
    values: Array,
    starts: Array,
    places: Array | None,
    shape: tuple[int, ...],
    by_row: bool,
    weights: Float64 | None,
) -> Float64:
    """Count, mean and m2 of what is stored and not NaN, and the weight of NaN, of both, and what
    rounding has removed from that; of each column.
    """
    rows = np.empty((6, shape[1]))
    _core.moments_of_entries(
        native.for_core(np.ascontiguousarray(values)),
        np.ascontiguousarray(starts, np.int64),
        None if places is None else np.ascontiguousarray(places),
        shape[0],
        shape[1],
        by_row,
        weights,
        *rows,
    )
    return rows
