"""Dask: its arrays, chunk by chunk, and files on a cluster of its workers."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from .. import native
from ..errors import ArgumentError, BatchNormError, DTypeError, ShapeError
from ..moments import Moments
from .block import Measured, Sums, measure_block, measure_piece, merged, side_by_side, total_of
from .files import Unreadable
from .packages import need
from .sources import File, check_width, plain

#: Blocks of a file that are one task.
TASK_BLOCKS = 16

#: Parts that are merged in one task. A power of two, for then they are merged in the same pairs.
MERGED = 16


@contextlib.contextmanager
def on_workers(label: str) -> Iterator[None]:
    """Say in one line what happened to the workers."""
    distributed = need("distributed", "dask", "Dask clusters")
    try:
        yield
    except Unreadable as error:
        raise ArgumentError(f"{error} Workers must reach it by the same path.") from error
    except distributed.KilledWorker as error:
        raise BatchNormError(
            f"{label}: given up, since one worker after another died on it "
            f"({str(error).splitlines()[0]}). See the workers' logs; perhaps they lack memory."
        ) from error
    except (OSError, distributed.CancelledError) as error:
        raise BatchNormError(
            f"{label}: the cluster could not measure it ({type(error).__name__}: {error}). "
            "Workers must reach the files by the same paths, and the scheduler must stay."
        ) from error


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
        with on_workers("x"):
            found = client.gather(client.compute(columns))
    return side_by_side(found)


def moments_of_array(x: Any, channel_axis: int, weights: Any) -> Moments:
    """`Moments.of` a Dask array: NaN makes its feature NaN, as it does for NumPy's arrays."""
    if weights is not None:
        raise BatchNormError(
            "weights must be None for a Dask array, whose chunks are measured apart. "
            "Give missing values as NaN to batchnorm.dataset.measure(x, missing='skip')."
        )
    return measure_array(x, channel_axis, None).moments


def _axis_of(x: Any, channel_axis: int) -> int:
    # A delayed value has every attribute that it is asked for.
    if not isinstance(x, need("dask.array", "dask", "Dask arrays").Array):
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
    check_width("x", x.shape[axis])
    return axis


def _measure_chunk(
    chunk: Any, axis: int, missing: str | None, first: int, index: tuple[int, ...]
) -> Measured:
    values = plain(np.asanyarray(chunk), "x")
    if missing is None:
        moments = Moments.of(values, channel_axis=axis)
        return Measured(moments, values.size // max(1, values.shape[axis]))
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
    return merged(parts, parts[0].moments.mean.size)


def normalize_array(x: Any, affine: Any, channel_axis: int) -> Any:
    """Normalize a Dask array, when it is computed."""
    da = need("dask.array", "dask", "Dask arrays")
    axis = _axis_of(x, channel_axis)
    affine.check_features("x", x.shape[axis])
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
    return affine(np.asanyarray(chunk), axis, channels, label="x")


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
    except (OSError, asyncio.TimeoutError, ValueError, TypeError, RuntimeError) as error:
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ArgumentError(
            f"dask must be the address of a scheduler, such as tcp://host:8786, got {address!r}, "
            f"where none answers within {timeout:g} s ({said}). "
            "Start one with `dask scheduler`."
        ) from error
    try:
        client.wait_for_workers(1, timeout=timeout)
    except (OSError, asyncio.TimeoutError) as error:  # Python 3.10 has two of them
        client.close()
        raise ArgumentError(
            f"dask must be the address of a scheduler with workers, got {address!r}, which has "
            f"none within {timeout:g} s. Start some with `dask worker {address}`."
        ) from error
    return client


def measure_files(
    client: Any,
    files: Mapping[int, File],
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
    sums: dict[int, Sums] = {}
    tasks: dict[Any, int] = {}
    left: dict[int, int] = {}
    for k, file in files.items():
        # Workers are started in folders of their own.
        pieces = file.elsewhere(os.path.abspath(file.path)).pieces(TASK_BLOCKS)
        sums[k], left[k] = Sums(), len(pieces)
        for piece in pieces:
            tasks[client.submit(measure_piece, piece, missing, pure=False)] = k
    shares = {k: files[k].nbytes // left[k] for k in files}
    try:
        for task in distributed.as_completed(list(tasks), loop=client.loop):
            k = tasks[task]
            with on_workers(files[k].label):
                sums[k].update(task.result())
            task.release()
            left[k] -= 1
            advance(files[k].label, shares[k])
            if not left[k]:
                finished(k, total_of(sums.pop(k), files[k]))
    finally:
        client.cancel(list(tasks))
