"""`measure`: exact statistics of files, arrays and Dask arrays."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .. import native
from ..atomic import check_place
from ..errors import ArgumentError, ShapeError
from ..moments import is_dask
from .arguments import as_axis, as_paths, check_in_memory
from .block_moments import check_overflow, check_policy, measure_source
from .cluster import measure_files
from .dask_arrays import measure_array
from .files import check_not_an_input, file_key, find_files
from .journal import Journal
from .meter import Meter, Progress
from .parts import PairwiseMerge, Part
from .sources import (
    FileOptions,
    FileSource,
    Source,
    blocks,
    check_unchanged,
    open_file,
    open_memory,
)
from .statistics import Statistics, check_suffix


def measure(
    source: Any,
    *,
    channel_axis: int = 1,
    missing: str = "refuse",
    columns: Sequence[str] | None = None,
    header: bool = True,
    array: str | None = None,
    out: str | Path | None = None,
    client: Any = None,
    progress: Progress | None = None,
    note: Callable[[str], None] | None = None,
) -> Statistics:
    """Exact count, mean and variance of each feature of a data set, in blocks of bounded size.

    Parameters
    ----------
    source : path, list of paths, (N, C, *S) array, or Dask array
        Files end in .npy, .npz, .csv or .parquet. A folder stands for all such files in it and its
        subfolders, sorted by name, except those that begin with a dot or an underscore, folders
        that are links, and saved statistics. Files may exceed memory, and are merged in the order
        given.
    channel_axis : int
        The axis of the features. The features of a table are its columns.
    missing : {"refuse", "skip"}
        What to do about NaN, masked values, and null in tables: raise, or leave each out of its own
        feature. Infinity is always refused.
    columns : names
        Columns of tables that are features; None for all.
    header : bool
        Whether .csv files begin with a line of names. If not, columns are called f0, f1, …
    array : str
        Name of the array in .npz files; needed if they hold several.
    out : path
        Where to save the statistics, .npz or .json; not one of the input files. If the run is
        interrupted, the same call resumes it and reads only files that were not done or have
        changed.
    client : distributed.Client
        A cluster to run on. Its workers read the files themselves, by the same paths.
    progress : callable
        Called with the name of what is read, the bytes done, and the bytes in all. Not called for
        Dask arrays.
    note : callable
        Called with a line for each file that is skipped, and when a run is resumed.

    Returns
    -------
    Statistics
        As exact as `Moments.of` all values at once, and the same to the last bit each time, on any
        number of threads, after an interruption, and on a cluster, if the machines have the same
        instruction set.

    Raises
    ------
    BatchNormError
        A file does not exist, is damaged or of another kind; files differ in their features; values
        are missing, infinite or not numbers. The message names file, feature and place.

    Examples
    --------
    >>> import numpy as np
    >>> from batchnorm import dataset
    >>> found = dataset.measure(np.array([[1.0, 10.0], [3.0, 30.0]]))
    >>> found.mean, found.var(), found.count
    (array([ 2., 20.]), array([  1., 100.]), array([2., 2.]))
    """
    axis = as_axis(channel_axis)
    check_policy(missing)
    if columns is not None and (isinstance(columns, str) or not list(columns)):
        raise ArgumentError(
            f"columns must be a list of names, got {columns!r}. Put names in a list, or leave "
            "columns out for all."
        )
    options = FileOptions(None if columns is None else list(columns), header, array)
    paths = as_paths(source)
    if not paths:
        check_in_memory(options, client=None if is_dask(source) else client)
    target = None
    if out is not None:
        target = Path(out)
        check_suffix(target)
        check_place(target, "a .npz or .json file", "stats.npz")
    with contextlib.ExitStack() as stack:
        journal = None
        if target is not None and paths:
            journal = stack.enter_context(
                contextlib.closing(_journal(target, axis, missing, options))
            )
        if paths:
            files = _open_files(paths, axis, options, target, note)
            found = _measure_files(files, axis, missing, journal, client, progress, note)
        else:
            found = _measure_array(source, axis, missing, client, progress)
        if target is not None:
            found.save(target)
        if journal is not None:
            journal.remove()
    return found


def _measure_array(
    source: Any, axis: int, missing: str, client: Any, progress: Progress | None
) -> Statistics:
    """Measure an array in memory, or a Dask array."""
    if is_dask(source):
        part = measure_array(source, axis, missing, client=client)
        check_overflow(part.moments, "x")
    else:
        data = open_memory(source, axis)
        part = measure_source(data, missing, Meter([data], progress).start(data))
    return Statistics(part.moments, part.missing, channel_axis=axis)


def _journal(target: Path, axis: int, missing: str, options: FileOptions) -> Journal:
    """Open the journal of runs that give the same bits."""
    return Journal(
        target,
        {
            **asdict(options),
            "channel_axis": axis,
            "missing": missing,
            "block_bytes": blocks.BLOCK_BYTES,
            "native": native.show_config()["instruction_set"],
        },
    )


def _open_files(
    paths: Sequence[str | Path],
    axis: int,
    options: FileOptions,
    target: Path | None,
    note: Callable[[str], None] | None,
) -> list[FileSource]:
    """Find and open all files, and check that they can be measured together."""
    found = find_files(paths, note)
    if target is not None:
        check_not_an_input(target, {file_key(path): path for path in found})
    files: list[FileSource] = [open_file(path, axis, options) for path in found]
    check_same_features(files)
    return files


def _measure_files(
    files: Sequence[FileSource],
    axis: int,
    missing: str,
    journal: Journal | None,
    client: Any,
    progress: Progress | None,
    note: Callable[[str], None] | None,
) -> Statistics:
    """Measure the files that the journal does not know, and merge all."""
    meter, merge, todo = Meter(files, progress), PairwiseMerge(), dict(enumerate(files))
    if journal is not None:
        for k, file in enumerate(files):
            if (known := journal.find(file)) is not None:
                merge.add(0, k, known)
                del todo[k]
                meter.skip(file.nbytes)
        if len(todo) < len(files) and note is not None:
            note(
                f"resuming: {len(files) - len(todo)} of {len(files)} files were measured by an "
                f"interrupted run and have not changed since ({journal.path})"
            )

    def finished(k: int, part: Part) -> None:
        check_unchanged(files[k])
        merge.add(0, k, part)
        del todo[k]
        if journal is not None and todo:
            journal.add(files[k], part)

    if client is None:
        for k, file in list(todo.items()):
            finished(k, measure_source(file, missing, meter.start(file)))
    elif todo:
        meter.start(next(iter(todo.values())))
        measure_files(client, dict(todo), missing, meter.advance, finished)
    total = merge.result(files[0].features)
    names = next((file.names for file in files if file.names is not None), None)
    paths = tuple(file.path for file in files)
    check_overflow(total.moments, f"{paths[0]} … {paths[-1]}", names)
    return Statistics(total.moments, total.missing, names, axis, paths)


def check_same_features(sources: Sequence[Source]) -> None:
    """Raise if the number of features or their names differ.

    Raises
    ------
    ShapeError
        Names two files that differ.
    """
    first = sources[0]
    named = next((source for source in sources if source.names is not None), first)
    for other in sources:
        if other.features != first.features:
            raise ShapeError(
                f"{other.label}: must have as many features as {first.label}, {first.features}, "
                f"got {other.features}. Measure them apart, or choose channel_axis or columns."
            )
        if other.names is not None and named.names is not None and other.names != named.names:
            at = next(k for k, n in enumerate(other.names) if n != named.names[k])
            raise ShapeError(
                f"{other.label}: must have the columns of {named.label} in the same order, got "
                f"{other.names[at]!r} for {named.names[at]!r}. Name them in one order by "
                "columns=[...], --columns A,B."
            )
