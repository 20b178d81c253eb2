"""Moments of the blocks of a source, without missing values, or with an error that says where."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..errors import ArgumentError
from ..moments import Moments, moments_without_copy
from ..native import Array, Float64
from .parts import PairwiseMerge, Part
from .sources import Block, Source, prefetch
from .sources.values import to_native
from .statistics import feature_label

#: What to do about missing values.
POLICIES = ("refuse", "skip")


@dataclass(frozen=True)
class How:
    """What to do about missing values, and whether to look for the extremes of each feature."""

    missing: str = "refuse"
    extremes: bool = False

    def __post_init__(self) -> None:
        """Raise unless `missing` is one of the policies."""
        if self.missing not in POLICIES:
            raise ArgumentError(f"missing must be 'refuse' or 'skip', got {self.missing!r}.")


#: Bytes of a source up to which starting a thread to read ahead costs more than it saves.
ALONE_BYTES = 1 << 20

#: Bytes of a block that are searched for missing values together, to limit temporary memory.
SLICE_BYTES = 1 << 22


def measure_source(source: Source, how: How, advance: Callable[[int], None] | None = None) -> Part:
    """Measure all blocks of a source."""
    return finish(measure_blocks(source, how, advance), source)


def measure_blocks(
    source: Source, how: How, advance: Callable[[int], None] | None = None
) -> PairwiseMerge:
    """Measure the blocks of a source that may be a part of another."""
    merge = PairwiseMerge()
    blocks = source.blocks()
    if source.nbytes > ALONE_BYTES:
        blocks = prefetch(blocks)
    with contextlib.closing(blocks):  # type: ignore[type-var]  # a generator
        for block in blocks:
            part = measure_block(block, how, label=source.label, names=source.names)
            merge.add(block.channels.start, block.number, part)
            if advance is not None:
                advance(block.nbytes)
    return merge


def finish(merge: PairwiseMerge, source: Source) -> Part:
    """Return the moments of a source, once all of its blocks have been added."""
    part = merge.result(source.features)
    check_overflow(part.moments, source.label, source.names)
    return part


def check_overflow(
    moments: Moments, label: str, names: tuple[str, ...] | None = None, first: int = 0
) -> None:
    """Raise if squares overflowed float64; the moments begin with feature `first`."""
    if (wrong := _not_finite(moments)).size:
        raise ArgumentError(
            f"{label}: values are too large, the squares of "
            f"{feature_label(first + int(wrong[0]), names)} exceed float64. "
            "Divide them by a constant."
        )


def measure_block(
    block: Block, how: How, *, label: str, names: tuple[str, ...] | None = None
) -> Part:
    """Measure one block.

    A NaN makes the moments of its own feature NaN and of no other, so the features with missing
    values are known without a pass of their own.

    Parameters
    ----------
    block
        Some values of a source.
    how
        What to do about NaN, and whether to look for extremes.
    label, names
        The source and its features, for messages.

    Raises
    ------
    ArgumentError
        There is infinity, or NaN that is to be refused, or squares overflow float64.
    """
    values = to_native(block.values, label)
    moments = Moments.of(values, channel_axis=block.axis)
    by_feature = np.moveaxis(values, block.axis, 0)
    total = math.prod(by_feature.shape[1:])
    suspect = _not_finite(moments)
    extremes = _extremes(values, block.axis) if how.extremes else None
    if suspect.size == 0:
        return Part(moments, total, extremes)
    counts = np.full(moments.mean.shape, moments.count)
    mean, m2 = moments.mean.copy(), moments.m2.copy()
    step = max(1, SLICE_BYTES // max(1, total * values.itemsize))
    for begin in range(0, suspect.size, step):
        some = suspect[begin : begin + step]
        rows = np.ascontiguousarray(by_feature[some]).reshape(some.size, -1)  # a row per feature
        present = ~np.isnan(rows)
        if how.missing == "refuse" and not present.all():
            k = int(np.flatnonzero(~present.all(axis=1))[0])
            place = _place(block, int(some[k]), int(np.argmin(present[k])), names)
            raise ArgumentError(
                f"{label}: values must not be missing, got NaN in {place}; "
                f"{total - np.count_nonzero(present[k])} of {total} values of this feature in the "
                "same block are missing. Leave them out by missing='skip', --missing skip."
            )
        infinite = np.isinf(rows)
        if infinite.any():
            k, flat = (int(i) for i in np.argwhere(infinite)[0])
            raise ArgumentError(
                f"{label}: values must be finite, got {float(rows[k, flat])} in "
                f"{_place(block, int(some[k]), flat, names)}. If infinity stands for a missing "
                "value, replace it by NaN and skip missing values."
            )
        kept = np.count_nonzero(present, axis=1)
        # Features with equally many values form a full array: few calls measure all of them.
        for n in np.unique(kept):
            alike = kept == n
            which = some[alike]
            full = rows[alike][present[alike]].reshape(which.size, int(n))
            part = Moments.of(full, channel_axis=0)
            counts[which], mean[which], m2[which] = n, part.mean, part.m2
    found = moments_without_copy(counts, mean, m2)
    check_overflow(found, label, names, block.channels.start)
    return Part(found, total, extremes)


def _extremes(values: Array, axis: int) -> Float64:
    """Return the least and the greatest value of each feature: (2, C); NaN without any."""
    others = tuple(k for k in range(values.ndim) if k != axis)
    if values.size == 0:
        return np.full((2, values.shape[axis]), np.nan)
    return np.stack([f.reduce(values, others).astype(np.float64) for f in (np.fmin, np.fmax)])


def _place(block: Block, feature: int, flat: int, names: tuple[str, ...] | None) -> str:
    """Describe a feature of a block and the place of its value number `flat`."""
    shape = block.values.shape[: block.axis] + block.values.shape[block.axis + 1 :]
    rest = [int(i) for i in np.unravel_index(flat, shape)]
    index = (*rest[: block.axis], feature, *rest[block.axis :])
    return f"{feature_label(block.channels.start + feature, names)} at {block.where(index)}"


def _not_finite(moments: Moments) -> NDArray[np.int64]:
    """Indices of the features whose mean or m2 is NaN or infinite."""
    return np.flatnonzero(~(np.isfinite(moments.mean) & np.isfinite(moments.m2)))
