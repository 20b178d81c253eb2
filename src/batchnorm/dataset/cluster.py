"""Dask: its arrays, chunk by chunk, and files on a cluster of its workers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from .. import native
from ..errors import ArgumentError, BatchNormError, DTypeError, ShapeError
from ..moments import Moments
from .block import Measured, measure_block, measure_source, merged, native_order
from .packages import need
from .sources import Source

#: Blocks of a file that are one task. A power of two, for then the moments of a file have the same
#: bits as without a cluster: `Moments.merge` would have merged just these with one another.
TASK_BLOCKS = 16

#: Parts that are merged in one task.
MERGED = 16


# ---- arrays -------------------------------------------------------------------------------------


def measure_array(
    x: Any, channel_axis: int, missing: str | None, *, client: Any = None
) -> Measured:
    """Measure a Dask array: every chunk by itself, then merged in the order of the chunks.

    `missing` None leaves NaN as it is. Chunks may be cut along any axis; chunks of other examples
    of the same features are merged, and features put side by side in the end. The order in which
    workers finish changes nothing.
    """
    dask = need("dask", "dask", "Dask arrays")
    axis = _axis_of(x, channel_axis)
    chunk = dask.delayed(_measure_chunk, pure=False)
    merge = dask.delayed(_merge, pure=False)
    blocks = np.moveaxis(x.to_delayed(), axis, 0)
    columns = []
    for c in range(blocks.shape[0]):
        first = sum(x.chunks[axis][:c])
        parts = [
            chunk(block, axis, missing, first, index)
            for index, block in zip(
                np.ndindex(blocks.shape[1:]), blocks[c].reshape(-1), strict=True
            )
        ]
        while len(parts) > 1:
            parts = [merge(parts[k : k + MERGED]) for k in range(0, len(parts), MERGED)]
        columns += parts
    if client is None:
        found = dask.compute(*columns)
    else:
        found = [future.result() for future in client.compute(columns)]
    counts = [np.broadcast_to(part.moments.count, part.moments.mean.shape) for part in found]
    count, mean, m2, gone = (
        np.concatenate(values)
        for values in (
            counts,
            [part.moments.mean for part in found],
            [part.moments.m2 for part in found],
            [part.missing for part in found],
        )
    )
    total = Moments(count, mean, m2)
    return Measured(merged([total], mean.size), gone)


def _axis_of(x: Any, channel_axis: int) -> int:
    if not hasattr(x, "to_delayed") or not hasattr(x, "chunks"):
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


def _measure_chunk(
    chunk: Any, axis: int, missing: str | None, first: int, index: tuple[int, ...]
) -> Measured:
    values = native_order(np.asarray(chunk))
    if missing is None:
        moments = Moments.of(values, channel_axis=axis)
        return Measured(moments, np.zeros(moments.mean.size, np.int64))
    at = (*index[:axis], 0, *index[axis:])
    return measure_block(
        values,
        axis,
        missing,
        label="x",
        name=lambda k: f"feature {first + k}",
        where=lambda i: f"index {tuple(map(int, i))} of a chunk (block {at} but for the features)",
    )


def _merge(parts: list[Measured]) -> Measured:
    moments = Moments.merge(part.moments for part in parts)
    return Measured(moments, np.sum([part.missing for part in parts], axis=0))


def normalize_array(x: Any, affine: Any, channel_axis: int) -> Any:
    """Normalize a Dask array, when it is computed."""
    da = need("dask.array", "dask", "Dask arrays")
    axis = _axis_of(x, channel_axis)
    if x.shape[axis] != affine.statistics.features:
        raise ShapeError(
            f"x: must have as many features as the statistics, {affine.statistics.features}, got "
            f"{x.shape[axis]}. Choose the channel_axis that was measured."
        )
    # Which features a chunk holds: an array cut like x along its channel axis, one entry long
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


def _normalize_chunk(chunk: Any, index: Any, *, affine: Any, axis: int) -> Any:
    channels = slice(int(index.flat[0]), int(index.flat[-1]) + 1) if index.size else slice(0, 0)
    return affine(native_order(np.asarray(chunk)), axis, channels)


# ---- files --------------------------------------------------------------------------------------


def connect(address: str, timeout: float = 10.0) -> Any:
    """A client of the scheduler at `address`, once it has a worker.

    Raises
    ------
    ArgumentError
        Nobody answers there, or no worker is ready within `timeout` seconds.
    """
    distributed = need("distributed", "dask", "Dask clusters")
    try:
        client = distributed.Client(address, timeout=timeout, set_as_default=False)
    except (OSError, TimeoutError, ValueError) as error:
        raise ArgumentError(
            f"dask must be the address of a scheduler, such as tcp://host:8786, got {address!r}, "
            f"where none answers within {timeout:g} s ({str(error).splitlines()[0]}). "
            "Start one with `dask scheduler`."
        ) from error
    try:
        client.wait_for_workers(1, timeout=timeout)
    except (OSError, TimeoutError) as error:
        client.close()
        raise ArgumentError(
            f"dask must be the address of a scheduler with workers, got {address!r}, which has "
            f"none within {timeout:g} s. Start some with `dask worker {address}`."
        ) from error
    return client


def measure_files(
    client: Any,
    files: Mapping[int, Source],
    missing: str,
    advance: Callable[[str, int], None],
    finished: Callable[[int, Measured], None],
) -> None:
    """Measure files in tasks of bounded size on the workers, which read the files themselves.

    A task whose worker dies is done again by another. Parts are merged in their order, whoever
    measured them, and when.

    Raises
    ------
    BatchNormError
        As without a cluster; or so many workers died on one task, or the cluster went away.
    """
    distributed = need("distributed", "dask", "Dask clusters")
    parts: dict[int, dict[int, Measured]] = {}
    tasks: dict[Any, tuple[int, int]] = {}
    expected: dict[int, int] = {}
    for k, source in files.items():
        count = source.block_count
        ranges = [(0, None)] if not count else _ranges(count)
        expected[k], parts[k] = len(ranges), {}
        for number, (first, last) in enumerate(ranges):
            task = client.submit(measure_source, source, missing, None, first, last, pure=False)
            tasks[task] = (k, number)
    try:
        for task in distributed.as_completed(list(tasks), loop=client.loop):
            k, number = tasks[task]
            try:
                parts[k][number] = task.result()
            except distributed.KilledWorker as error:
                raise BatchNormError(
                    f"{files[k].label}: given up, since one worker after another died on it "
                    f"({str(error).splitlines()[0]}). See the workers' logs; perhaps they lack "
                    "memory."
                ) from error
            except (OSError, distributed.CancelledError) as error:
                raise BatchNormError(
                    f"{files[k].label}: the cluster could not measure it "
                    f"({type(error).__name__}: {error}). Workers must reach the files by the same "
                    "paths, and the scheduler must stay."
                ) from error
            task.release()
            advance(files[k].label, files[k].nbytes // expected[k])
            if len(parts[k]) == expected[k]:
                done = [parts[k][n] for n in range(expected[k])]
                gone = np.sum([part.missing for part in done], axis=0)
                moments = merged((part.moments for part in done), files[k].features)
                del parts[k]
                finished(k, Measured(moments, gone))
    finally:
        client.cancel(list(tasks))


def _ranges(count: int) -> list[tuple[int, int | None]]:
    return [(k, min(k + TASK_BLOCKS, count)) for k in range(0, count, TASK_BLOCKS)]
