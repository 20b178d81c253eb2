"""Moments of parts of the data, merged to the same bits in whatever order they arrive."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..moments import Moments, moments_without_copy
from ..native import Float64

#: Features that are merged together, so that temporary arrays stay small beside the blocks.
MERGED_FEATURES = 1 << 16


class Part(NamedTuple):
    """Moments of the present values of some features, and the number of values with missing ones.

    The count of the moments is () if it is the same for all features. The rows of `extremes` are
    the least and the greatest value of each feature, NaN without any; None if not asked for.
    """

    moments: Moments
    total: int
    extremes: Float64 | None = None

    @property
    def missing(self) -> NDArray[np.int64]:
        """Number of missing values: (C,)."""
        count = np.broadcast_to(self.moments.count, self.moments.mean.shape)
        return self.total - count.astype(np.int64)


class PairwiseMerge:
    """Merge numbered parts in pairs, as `Moments.merge` does, but in any order of arrival.

    Part 2k merges with 2k + 1, and so on, as soon as both are there, so that few are kept.
    """

    def __init__(self) -> None:
        # By first feature, level (2^level parts are merged), and number on this level.
        self._waiting: dict[tuple[int, int, int], Part] = {}

    def add(self, first: int, number: int, part: Part, level: int = 0) -> None:
        """Add part `number` of the features that begin with `first`."""
        while (other := self._waiting.pop((first, level, number ^ 1), None)) is not None:
            part = merge_pair(other, part) if number & 1 else merge_pair(part, other)
            level, number = level + 1, number >> 1
        self._waiting[first, level, number] = part

    def update(self, other: PairwiseMerge) -> None:
        """Add the parts of another: other parts of the same data."""
        for (first, level, number), part in other._waiting.items():
            self.add(first, number, part, level)

    def result(self, features: int) -> Part:
        """Return the moments of all features, once all parts have been added."""
        merged: dict[int, Part] = {}
        for (first, _, _), part in sorted(self._waiting.items(), key=lambda item: item[0]):
            merged[first] = merge_pair(part, merged[first]) if first in merged else part
        if not merged:
            return Part(Moments(np.zeros(()), np.zeros(features), np.zeros(features)), 0)
        parts = list(merged.values())
        return parts[0] if len(parts) == 1 else concatenate(parts)


def merge_all(parts: Iterable[Part], features: int) -> Part:
    """Merge parts of the same features, in their order."""
    merge = PairwiseMerge()
    for number, part in enumerate(parts):
        merge.add(0, number, part)
    return merge.result(features)


def concatenate(parts: Sequence[Part]) -> Part:
    """Put moments of different features side by side."""
    mean = np.concatenate([part.moments.mean for part in parts])
    m2 = np.concatenate([part.moments.m2 for part in parts])
    counts = [part.moments.count for part in parts]
    if any(count.ndim or count != counts[0] for count in counts):
        shapes = [part.moments.mean.shape for part in parts]
        counts = [
            np.concatenate([np.broadcast_to(c, s) for c, s in zip(counts, shapes, strict=True)])
        ]
    extremes = [part.extremes for part in parts if part.extremes is not None]
    return Part(
        _own_moments(counts[0], mean, m2),
        parts[0].total,
        np.concatenate(extremes, axis=1) if len(extremes) == len(parts) else None,
    )


def merge_pair(a: Part, b: Part) -> Part:
    """Merge two parts, some features at a time; what overflows becomes infinite or NaN."""
    x, y, features = a.moments, b.moments, a.moments.mean.size
    with np.errstate(over="ignore", invalid="ignore"):
        if features <= MERGED_FEATURES:
            merged = x + y
            count, mean, m2 = merged.count, merged.mean, merged.m2
        else:
            mean, m2 = np.empty((2, features))
            count = np.empty(np.broadcast_shapes(x.count.shape, y.count.shape))
            for k in range(0, features, MERGED_FEATURES):
                some = slice(k, k + MERGED_FEATURES)
                merged = _features_of(x, some) + _features_of(y, some)
                mean[some], m2[some] = merged.mean, merged.m2
                count[some if count.ndim else ()] = merged.count
    if a.extremes is None or b.extremes is None:  # of a part without values, or not asked for
        extremes = a.extremes if b.total == 0 else b.extremes if a.total == 0 else None
    else:
        (low, high), (other_low, other_high) = a.extremes, b.extremes
        extremes = np.stack([np.fmin(low, other_low), np.fmax(high, other_high)])
    return Part(_own_moments(count, mean, m2), a.total + b.total, extremes)


def _features_of(x: Moments, some: slice) -> Moments:
    return Moments(x.count[some] if x.count.ndim else x.count, x.mean[some], x.m2[some])


def _own_moments(count: Any, mean: Float64, m2: Float64) -> Moments:
    """Make moments of new arrays without copying them, with one count if all are equal."""
    if count.ndim and count.size and (count == count[0]).all():
        count = count[0]
    return moments_without_copy(count, mean, m2)
