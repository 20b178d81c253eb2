"""`measure`: exact statistics of files, arrays and Dask arrays."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ..atomic import check_place
from ..errors import ArgumentError, BatchNormError, ShapeError
from ..moments import Moments
from . import sources
from .block import Measured, check_policy, measure_source, merged
from .journal import Journal
from .sources import Source
from .statistics import Statistics, check_suffix

#: Told which file is being read, and how many bytes are done of how many.
Progress = Callable[[str, int, int], None]


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
        Files end in .npy, .npz, .csv or .parquet; of a folder, all such files in it are meant, in
        the order of their names. Files need not fit in memory, and are merged in the order given.
    channel_axis : int
        The axis whose entries are features. Columns are the features of a table.
    missing : {"refuse", "skip"}
        What to do about NaN, and null in tables: raise, or leave each out of its own feature.
        Infinity is always refused.
    columns : names
        The columns of tables that are features; all of them if None.
    header : bool
        Whether .csv files begin with a line of names. Columns are called f0, f1, … if not.
    array : str
        Which array of .npz files; needed where they hold several.
    out : path
        Where to save the statistics, .npz or .json. Of a run that was interrupted, files that were
        done and have not changed since are not read again.
    client : distributed.Client
        A cluster to run on. Its workers read the files themselves, by the same paths.
    progress : callable
        Called with a name, the bytes done, and the bytes in all.
    note : callable
        Called with what else is worth saying.

    Returns
    -------
    Statistics
        As exact as `Moments.of` all values at once, and the same to the last bit each time, on any
        number of threads, after an interruption, and for files on a cluster.

    Raises
    ------
    BatchNormError
        A file is not there, damaged or of another kind; files differ in their features; values are
        missing, infinite or no numbers. The message names file, feature and place.

    Examples
    --------
    >>> import numpy as np
    >>> from batchnorm import dataset
    >>> found = dataset.measure(np.array([[1.0, 10.0], [3.0, 30.0]]))
    >>> found.mean, found.var(), found.count
    (array([ 2., 20.]), array([  1., 100.]), array([2., 2.]))
    """
    check_policy(missing)
    if isinstance(columns, str):
        raise ArgumentError(f"columns must be a list of names, got {columns!r}. Put it in a list.")
    target = None if out is None else Path(out)
    if target is not None:
        check_suffix(target)
        check_place(target, "a .npz or .json file", "stats.npz")
    if is_dask(source):
        from .cluster import measure_array

        measured = measure_array(source, channel_axis, missing, client=client)
        found = Statistics(*measured, channel_axis=channel_axis)
    elif not (paths := as_paths(source)):
        data = sources.of_memory(source, channel_axis)
        found = Statistics(*measure_source(data, missing), channel_axis=channel_axis)
    else:
        files = sources.find(paths, target)
        opened = [
            sources.open_source(
                path, channel_axis=channel_axis, columns=columns, header=header, array=array
            )
            for path in files
        ]
        check_alike(opened)
        journal = None
        if target is not None and len(opened) > 1:
            options = {"channel_axis": channel_axis, "missing": missing, "columns": columns}
            options |= {"header": header, "array": array, "block_bytes": sources.BLOCK_BYTES}
            journal = Journal(target, options)
        parts = _measure_files(opened, missing, journal, client, progress, note)
        total = merged((part.moments for part in parts), opened[0].features)
        found = Statistics(
            total,
            sum(part.missing for part in parts),  # type: ignore[arg-type]
            opened[0].names,
            channel_axis,
            tuple(map(str, files)),
        )
        if target is not None:
            found.save(target)
        if journal is not None:
            journal.remove()
        return found
    if target is not None:
        found.save(target)
    return found


def _measure_files(
    opened: Sequence[Source],
    missing: str,
    journal: Journal | None,
    client: Any,
    progress: Progress | None,
    note: Callable[[str], None] | None,
) -> list[Measured]:
    """Each file's own moments, those that the journal knows from there."""
    whole = sum(source.nbytes for source in opened)
    done = 0
    parts: dict[int, Measured] = {}
    for k, source in enumerate(opened):
        known = None if journal is None else journal.find(source)
        if known is not None:
            parts[k] = known
            done += source.nbytes
    if parts and note is not None and journal is not None:
        note(
            f"{len(parts)} of {len(opened)} files were measured by a run that was interrupted, "
            f"and have not changed since ({journal.path})"
        )

    def advance(label: str, nbytes: int) -> None:
        nonlocal done
        done = min(done + nbytes, whole)
        if progress is not None:
            progress(label, done, whole)

    def finished(k: int, measured: Measured) -> None:
        parts[k] = measured
        if journal is not None and len(parts) < len(opened):
            journal.add(opened[k], measured)

    todo = [k for k in range(len(opened)) if k not in parts]
    if todo:
        advance(opened[todo[0]].label, 0)
    if client is not None:
        from .cluster import measure_files

        measure_files(client, {k: opened[k] for k in todo}, missing, advance, finished)
    else:
        for k in todo:
            source = opened[k]
            advance(source.label, 0)
            finished(k, measure_source(source, missing, partial(advance, source.label)))
    return [parts[k] for k in range(len(opened))]


def check_alike(opened: Sequence[Source]) -> None:
    """See that all files have the same features.

    Raises
    ------
    ShapeError
        Numbers or names differ; two files are named.
    """
    first = opened[0]
    for other in opened[1:]:
        if other.features != first.features:
            raise ShapeError(
                f"{other.label}: must have as many features as {first.label}, {first.features}, "
                f"got {other.features}. Measure them apart, or choose channel_axis or columns."
            )
        if other.names != first.names and other.names is not None and first.names is not None:
            at = next(k for k, n in enumerate(other.names) if n != first.names[k])
            raise ShapeError(
                f"{other.label}: must have the columns of {first.label} in the same order, got "
                f"{other.names[at]!r} for {first.names[at]!r}. Name them in one order by "
                "columns=[...], --columns A,B."
            )


def as_paths(source: Any) -> list[str | Path]:
    """The paths that `source` is; none if it is an array."""
    if isinstance(source, (str, Path)):
        return [source]
    if isinstance(source, (list, tuple)) and any(isinstance(s, (str, Path)) for s in source):
        for s in source:
            if not isinstance(s, (str, Path)):
                raise ArgumentError(f"source must be paths or one array, got {type(s).__name__}.")
        return list(source)
    return []


def is_dask(x: Any) -> bool:
    """Whether this is one of Dask's collections; Dask is not needed to tell."""
    return hasattr(x, "__dask_graph__")


def moments_of_dask(x: Any, channel_axis: int, weights: Any) -> Moments:
    """`Moments.of` a Dask array: NaN makes its feature NaN, as it does for NumPy's arrays."""
    from .cluster import measure_array

    if weights is not None:
        raise BatchNormError(
            "weights must be None for a Dask array, whose chunks are measured apart. "
            "Give missing values as NaN to batchnorm.dataset.measure(x, missing='skip')."
        )
    return measure_array(x, channel_axis, None).moments
