"""Dask arrays, measured and normalized chunk by chunk."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..moments import dask_channel_axis
from ..native import Array
from .affine import Affine
from .block_moments import How, measure_block
from .cluster import explain_cluster_errors
from .extras import import_extra
from .parts import Part, concatenate, merge_all
from .sources import Block, check_width

#: Parts that one task merges. A power of two, so that the pairs are those of `PairwiseMerge`.
MERGED_PARTS = 16


def measure_array(x: Any, channel_axis: int, how: How, *, client: Any = None) -> Part:
    """Measure each chunk of a Dask array, and merge in the order of the chunks.

    Chunks may be cut along any axis: those of the same features are merged, and the features put
    side by side in the end. The order in which workers finish changes nothing.
    """
    dask = import_extra("dask", "dask", "Dask arrays")
    axis = _check_axis(x, channel_axis)
    measure = dask.delayed(_measure_chunk, pure=False)
    merge = dask.delayed(_merge, pure=False)
    chunks = np.moveaxis(x.to_delayed(), axis, 0)
    columns = []
    for c, first in enumerate(np.cumsum([0, *x.chunks[axis][:-1]]).tolist()):
        indices = np.ndindex(chunks.shape[1:])
        parts = [measure(chunks[c][index], axis, how, first, index) for index in indices]
        while len(parts) > 1:
            parts = [merge(parts[k : k + MERGED_PARTS]) for k in range(0, len(parts), MERGED_PARTS)]
        columns += parts
    if client is None:
        found = dask.compute(*columns)
    else:
        with explain_cluster_errors("x"):
            found = client.gather(client.compute(columns))
    return concatenate(found)


def _check_axis(x: Any, channel_axis: int) -> int:
    axis = dask_channel_axis(x, channel_axis)
    check_width("x", x.shape[axis])
    return axis


def _measure_chunk(chunk: Any, axis: int, how: How, first: int, index: tuple[int, ...]) -> Part:
    values: Array = np.asanyarray(chunk)
    place = (*index[:axis], 0, *index[axis:])
    block = Block(
        values,
        axis,
        slice(first, first + values.shape[axis]),
        number=0,
        where=lambda i: (
            f"index {tuple(map(int, i))} of a chunk (block {place} but for the features)"
        ),
        nbytes=values.nbytes,
    )
    return measure_block(block, how, label="x")


def _merge(parts: list[Part]) -> Part:
    return merge_all(parts, parts[0].moments.mean.size)


def normalize_array(x: Any, affine: Affine, channel_axis: int) -> Any:
    """Return a Dask array that is normalized when it is computed."""
    da = import_extra("dask.array", "dask", "Dask arrays")
    axis = _check_axis(x, channel_axis)
    affine.check_features("x", x.shape[axis])
    # Tells each chunk its features: an array cut like x along its channel axis, one entry long
    # along the others.
    shape = [1] * x.ndim
    shape[axis] = x.shape[axis]
    chunks = [(1,)] * x.ndim
    chunks[axis] = x.chunks[axis]
    index = da.from_array(np.arange(x.shape[axis]).reshape(shape), chunks=tuple(chunks))
    dtype = affine.result_type(x.dtype)
    return da.map_blocks(
        _normalize_chunk,
        x,
        index,
        affine=affine,
        axis=axis,
        dtype=dtype,
        meta=np.empty((0,) * x.ndim, dtype),
    )


def _normalize_chunk(chunk: Any, index: Any, *, affine: Affine, axis: int) -> Array:
    channels = slice(int(index.flat[0]), int(index.flat[-1]) + 1) if index.size else slice(0, 0)
    return affine(np.asanyarray(chunk), axis, channels, label="x")
