"""Exact moments of blocks with missing values, merged in a fixed order."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..errors import ArgumentError
from ..moments import Moments
from ..moments import measured as owning
from ..native import Array, Float64
from .sources import Source, ahead, plain

#: What may be done about NaN.
POLICIES = ("refuse", "skip")

#: Features that are merged together, and bytes that are looked at once more together: what is made
#: on the way is to take little memory beside the blocks.
MERGED_FEATURES = 1 << 16
SLICE_BYTES = 1 << 22


class Measured(NamedTuple):
    """Moments of the values that are there, and how many values each feature has with the others.

    The moments' count is () if it is the same for all features.
    """

    moments: Moments
    seen: int

    @property
    def missing(self) -> NDArray[np.int64]:
        """Number of values that are not there: (C,)."""
        count = np.broadcast_to(self.moments.count, self.moments.mean.shape)
        return self.seen - count.astype(np.int64)


class Sums:
    """Moments that are merged as they come, in whatever order, with the same bits in the end.

    Parts of the same features are numbered. The pairs are those of `Moments.merge`: part 2k with
    2k+1, and so on, each as soon as both are there, so that few are kept.
    """

    def __init__(self) -> None:
        # By the first feature, the level (2^level parts are merged), and the number on this level.
        self._nodes: dict[tuple[int, int, int], Measured] = {}

    def add(self, first: int, number: int, part: Measured, level: int = 0) -> None:
        """Add part `number` of the features that begin with `first`."""
        while (other := self._nodes.pop((first, level, number ^ 1), None)) is not None:
            part = plus(other, part) if number & 1 else plus(part, other)
            level, number = level + 1, number >> 1
        self._nodes[first, level, number] = part

    def update(self, other: Sums) -> None:
        """Add all that another has: other parts of the same source."""
        for (first, level, number), part in other._nodes.items():
            self.add(first, number, part, level)

    def total(self, features: int) -> Measured:
        """Moments of all features, when all parts are there."""
        columns: dict[int, Measured] = {}
        for (first, _, _), part in sorted(self._nodes.items(), key=lambda item: item[0]):
            columns[first] = plus(part, columns[first]) if first in columns else part
        parts = list(columns.values())
        if not parts:
            return Measured(Moments(np.zeros(()), np.zeros(features), np.zeros(features)), 0)
        return parts[0] if len(parts) == 1 else side_by_side(parts)


def side_by_side(parts: Sequence[Measured]) -> Measured:
    """Moments of features from those of some of them each."""
    mean = np.concatenate([part.moments.mean for part in parts])
    m2 = np.concatenate([part.moments.m2 for part in parts])
    counts = [part.moments.count for part in parts]
    if any(count.ndim or count != counts[0] for count in counts):
        shapes = [part.moments.mean.shape for part in parts]
        counts = [
            np.concatenate([np.broadcast_to(c, s) for c, s in zip(counts, shapes, strict=True)])
        ]
    return Measured(_owning(counts[0], mean, m2), parts[0].seen)


def merged(parts: Iterable[Measured], features: int) -> Measured:
    """Moments of all parts of the same features."""
    sums = Sums()
    for number, part in enumerate(parts):
        sums.add(0, number, part)
    return sums.total(features)


def plus(a: Measured, b: Measured) -> Measured:
    """Merge two, some features at a time; what overflows is infinite then, or NaN."""
    x, y, features = a.moments, b.moments, a.moments.mean.size
    mean, m2 = np.empty((2, features))
    count = np.empty(np.broadcast_shapes(x.count.shape, y.count.shape))
    with np.errstate(over="ignore", invalid="ignore"):
        for k in range(0, max(features, 1), MERGED_FEATURES):
            some = slice(k, k + MERGED_FEATURES)
            part = _some(x, some) + _some(y, some)
            mean[some], m2[some] = part.mean, part.m2
            count[some if count.ndim else ()] = part.count
    return Measured(_owning(count, mean, m2), a.seen + b.seen)


def _some(x: Moments, features: slice) -> Moments:
    return Moments(x.count[features] if x.count.ndim else x.count, x.mean[features], x.m2[features])


def _owning(count: Any, mean: Float64, m2: Float64) -> Moments:
    """Moments of arrays that are nobody else's: a copy of them would be a peak of memory."""
    if count.ndim and count.size and (count == count[0]).all():
        count = count[0]
    return owning(count, mean, m2)


def check_policy(missing: str) -> str:
    """`missing`, if it is one of the things that may be done."""
    if missing not in POLICIES:
        raise ArgumentError(f"missing must be 'refuse' or 'skip', got {missing!r}.")
    return missing


def measure_piece(
    source: Source, missing: str, advance: Callable[[int], None] | None = None
) -> Sums:
    """Measure the blocks of a source, one being read ahead."""
    sums = Sums()
    blocks = ahead(source.blocks())
    try:
        for block in blocks:
            part = measure_block(
                plain(block.values, source.label),
                block.axis,
                missing,
                label=source.label,
                name=partial(_name, source, block.channels.start),
                where=block.where,
            )
            sums.add(block.channels.start, block.number, part)
            if advance is not None:
                advance(block.nbytes)
    finally:
        blocks.close()  # type: ignore[attr-defined]
    return sums


def measure_source(
    source: Source, missing: str, advance: Callable[[int], None] | None = None
) -> Measured:
    """Measure a source from its first block to the last."""
    return total_of(measure_piece(source, missing, advance), source)


def total_of(sums: Sums, source: Source) -> Measured:
    """What a source's blocks amount to."""
    measured = sums.total(source.features)
    check_squares(measured.moments, source.label, partial(_name, source, 0))
    return measured


def _name(source: Source, first: int, index: int) -> str:
    """What messages call a feature of a block whose features begin with `first`."""
    named = f" ({source.names[first + index]!r})" if source.names else ""
    return f"feature {first + index}{named}"


def check_squares(moments: Moments, label: str, name: Callable[[int], str]) -> None:
    """Refuse sums that are no numbers, as they are of numbers that are too large."""
    odd = np.flatnonzero(~(np.isfinite(moments.mean) & np.isfinite(moments.m2)))
    if odd.size:
        raise ArgumentError(
            f"{label}: values are too large, the squares of {name(int(odd[0]))} exceed float64. "
            "Divide them by a constant."
        )


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
    x = np.moveaxis(values, axis, 0)
    seen = math.prod(x.shape[1:])
    odd = np.flatnonzero(~(np.isfinite(moments.mean) & np.isfinite(moments.m2)))
    if odd.size == 0:
        return Measured(moments, seen)
    counts = np.full(moments.mean.shape, moments.count)
    mean, m2 = moments.mean.copy(), moments.m2.copy()
    step = max(1, SLICE_BYTES // max(1, seen * values.itemsize))
    for begin in range(0, odd.size, step):
        some = odd[begin : begin + step]
        rows = np.ascontiguousarray(x[some]).reshape(some.size, -1)  # one row a feature
        present = ~np.isnan(rows)
        if not present.all() and missing == "refuse":
            k = int(np.flatnonzero(~present.all(axis=1))[0])
            lacking = seen - np.count_nonzero(present[k])
            at = _index(x.shape, int(np.argmin(present[k])), int(some[k]), axis)
            raise ArgumentError(
                f"{label}: no value may be missing, got NaN in {name(int(some[k]))} at {where(at)},"
                f" {lacking} in the {seen} values of it that were read together. "
                "missing='skip', --missing skip, leaves them out."
            )
        infinite = np.isinf(rows)
        if infinite.any():
            k, at_k = (int(i) for i in np.argwhere(infinite)[0])
            at = _index(x.shape, at_k, int(some[k]), axis)
            raise ArgumentError(
                f"{label}: values must be finite, got {float(rows[k, at_k])} in "
                f"{name(int(some[k]))} at {where(at)}. Infinite values have no mean; make them NaN "
                "and skip these if they stand for missing ones."
            )
        have = np.count_nonzero(present, axis=1)
        # Features that miss equally many are as many whole columns: few calls, of all alike.
        for n in np.unique(have):
            alike = have == n
            which = some[alike]
            whole = rows[alike][present[alike]].reshape(which.size, int(n))
            part = Moments.of(whole, channel_axis=0)
            counts[which], mean[which], m2[which] = n, part.mean, part.m2
    found = owning(counts, mean, m2)  # type: ignore[arg-type]
    check_squares(found, label, name)
    return Measured(found, seen)


def _index(shape: tuple[int, ...], flat: int, feature: int, axis: int) -> tuple[int, ...]:
    """Index in a block of what is at `flat` among a feature's values, features moved first."""
    rest = [int(i) for i in np.unravel_index(flat, shape[1:])]
    return (*rest[:axis], feature, *rest[axis:])
