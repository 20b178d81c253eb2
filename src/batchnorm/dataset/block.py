"""Exact moments of blocks with missing values, merged in a fixed order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..errors import ArgumentError
from ..moments import Moments
from ..native import Array, Float64
from .sources import Source, ahead

Int64 = NDArray[np.int64]

#: What may be done about NaN.
POLICIES = ("refuse", "skip")


class Measured(NamedTuple):
    """Moments of the values that are there, and the number of those that are not: (C,)."""

    moments: Moments
    missing: Int64


def check_policy(missing: str) -> str:
    """`missing`, if it is one of the things that may be done."""
    if missing not in POLICIES:
        raise ArgumentError(f"missing must be 'refuse' or 'skip', got {missing!r}.")
    return missing


def measure_source(
    source: Source,
    missing: str,
    advance: Callable[[int], None] | None = None,
    first: int = 0,
    last: int | None = None,
) -> Measured:
    """Measure the blocks of a source from `first` to before `last`, one being read ahead."""
    total = np.zeros(source.features, np.int64)

    def parts() -> Iterator[Moments]:
        blocks = ahead(source.blocks(first, last))
        try:
            for block in blocks:
                part, gone = measure_block(
                    native_order(block.values),
                    block.axis,
                    missing,
                    label=source.label,
                    name=partial(_name, source, block.channels.start),
                    where=block.where,
                )
                total[block.channels] += gone
                yield among_all(part, block.channels, source.features)
                if advance is not None:
                    advance(block.nbytes)
        finally:
            blocks.close()  # type: ignore[attr-defined]

    return Measured(merged(parts(), source.features), total)


def merged(parts: Iterable[Moments], features: int) -> Moments:
    """Moments of all parts, pairwise in the order given; `count` is () if it is the same for all.

    The pairs are those of `Moments.merge`, so 2^k parts merged beforehand, and again, give the same
    bits as all parts at once.
    """
    moments = Moments.merge(parts)
    if moments.mean.ndim == 0:
        return Moments(np.zeros(()), np.zeros(features), np.zeros(features))
    count = moments.count
    if count.ndim and count.size and (count == count[0]).all():
        return Moments(count[0], moments.mean, moments.m2)
    return moments


def native_order(values: Array) -> Array:
    """Values in the byte order of this machine."""
    return values if values.dtype.isnative else values.astype(values.dtype.newbyteorder("="))


def _name(source: Source, first: int, index: int) -> str:
    """What messages call a feature of a block whose features begin with `first`."""
    named = f" ({source.names[first + index]!r})" if source.names else ""
    return f"feature {first + index}{named}"


def among_all(part: Moments, channels: slice, features: int) -> Moments:
    """Moments of some features as moments of all, with no values for the others."""
    if part.mean.size == features:
        return part
    count, mean, m2 = np.zeros((3, features))
    count[channels], mean[channels], m2[channels] = part.count, part.mean, part.m2
    return Moments(count, mean, m2)


def measure_block(
    values: Array,
    axis: int,
    missing: str,
    *,
    label: str,
    name: Callable[[int], str],
    where: Callable[[tuple[int, ...]], str],
) -> Measured:
    """Moments of one block, and how many values each feature misses.

    A NaN makes its own feature's moments NaN and no other's, so what has to be looked at again is
    known without another pass.

    Raises
    ------
    ArgumentError
        There is NaN and it is to be refused, or infinity, or squares exceed float64.
    """
    moments = Moments.of(values, channel_axis=axis)
    none = np.zeros(moments.mean.size, np.int64)
    odd = np.flatnonzero(~(np.isfinite(moments.mean) & np.isfinite(moments.m2)))
    if odd.size == 0:
        return Measured(moments, none)
    x = np.moveaxis(values, axis, 0)
    # One row a feature; the copy is no larger than the block.
    rows = np.ascontiguousarray(x[odd]).reshape(odd.size, -1)
    present = ~np.isnan(rows)
    if not present.all() and missing == "refuse":
        k = int(np.flatnonzero(~present.all(axis=1))[0])
        lacking = int(present.shape[1] - np.count_nonzero(present[k]))
        at = _index(x.shape, int(np.argmin(present[k])), int(odd[k]), axis)
        raise ArgumentError(
            f"{label}: no value may be missing, got NaN in {name(int(odd[k]))} at {where(at)}, "
            f"{lacking} in the {present.shape[1]} values of it that were read together. "
            "missing='skip', --missing skip, leaves them out."
        )
    infinite = np.isinf(rows)
    if infinite.any():
        k, at_k = (int(i) for i in np.argwhere(infinite)[0])
        at = _index(x.shape, at_k, int(odd[k]), axis)
        raise ArgumentError(
            f"{label}: values must be finite, got {float(rows[k, at_k])} in {name(int(odd[k]))} at "
            f"{where(at)}. Infinite values have no mean; make them NaN and skip these if they "
            "stand for missing ones."
        )
    counts: Float64 = np.full(none.shape, moments.count)
    mean, m2, gone = moments.mean.copy(), moments.m2.copy(), none
    have = np.count_nonzero(present, axis=1)
    # Features that miss equally many are as many whole columns: few calls, of all that are alike.
    for n in np.unique(have):
        alike = have == n
        which = odd[alike]
        whole = rows[alike][present[alike]].reshape(which.size, int(n))
        part = Moments.of(whole, channel_axis=0)
        counts[which], mean[which], m2[which] = n, part.mean, part.m2
        gone[which] = rows.shape[1] - n
    if not np.isfinite(m2).all():
        k = int(np.flatnonzero(~np.isfinite(m2))[0])
        raise ArgumentError(
            f"{label}: values are too large, the squares of {name(k)} exceed float64. "
            "Divide them by a constant."
        )
    return Measured(Moments(counts, mean, m2), gone)


def _index(shape: tuple[int, ...], flat: int, feature: int, axis: int) -> tuple[int, ...]:
    """Index in a block of what is at `flat` among a feature's values, features moved first."""
    rest = [int(i) for i in np.unravel_index(flat, shape[1:])]
    return (*rest[:axis], feature, *rest[axis:])
