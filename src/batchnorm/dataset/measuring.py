"""`measure`: exact statistics of files, arrays and Dask arrays."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from .. import native
from ..atomic import check_place
from ..errors import ArgumentError, ShapeError
from ..moments import is_dask
from . import sources
from .block import Measured, Sums, check_policy, check_squares, measure_source
from .files import check_apart, find, same_file
from .journal import Journal
from .sources import Source
from .statistics import Statistics, check_suffix

#: Meter which file is being read, and how many bytes are done of how many.
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
        Files end in .npy, .npz, .csv or .parquet; of a folder, all such files in it and below are
        meant, in the order of their names, but not what begins with a dot or an underscore, folders
        that are links, or saved statistics. Files need not fit in memory, and are merged in the
        order given.
    channel_axis : int
        The axis whose entries are features. Columns are the features of a table.
    missing : {"refuse", "skip"}
        What to do about NaN, masked values, and null in tables: raise, or leave each out of its own
        feature. Infinity is always refused.
    columns : names
        The columns of tables that are features; all of them if None.
    header : bool
        Whether .csv files begin with a line of names. Columns are called f0, f1, … if not.
    array : str
        Which array of .npz files; needed where they hold several.
    out : path
        Where to save the statistics, .npz or .json; not one of the files that are read. Of a run
        that was interrupted, files that were done and have not changed since are not read again.
    client : distributed.Client
        A cluster to run on. Its workers read the files themselves, by the same paths.
    progress : callable
        Called with a name, the bytes done, and the bytes in all. Not for Dask arrays.
    note : callable
        Called with what else is worth saying.

    Returns
    -------
    Statistics
        As exact as `Moments.of` all values at once, and the same to the last bit each time, on any
        number of threads, after an interruption, and for files on a cluster, if the machines have
        the same instruction set.

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
    axis = sources.as_axis(channel_axis)
    check_policy(missing)
    if columns is not None and (isinstance(columns, str) or not list(columns)):
        raise ArgumentError(
            f"columns must be a list of names, got {columns!r}. Put names in a list, or leave "
            "columns out for all."
        )
    paths = as_paths(source)
    reading: dict[str, Any] = {
        "columns": columns and list(columns),
        "header": header,
        "array": array,
    }
    if not paths:
        check_in_memory(**reading, client=None if is_dask(source) else client)
    target = journal = None
    if out is not None:
        target = Path(out)
        check_suffix(target)
        check_place(target, "a .npz or .json file", "stats.npz")
    if target is not None and paths:
        options = {**reading, "channel_axis": axis, "missing": missing}
        options |= {
            "block_bytes": sources.BLOCK_BYTES,
            "native": native.show_config()["instruction_set"],
        }
        journal = Journal(target, options)
    with contextlib.closing(journal) if journal is not None else contextlib.nullcontext():
        if paths:
            found = _measure_paths(
                paths, axis, missing, reading, target, journal, client, progress, note
            )
        else:
            found = _measure_array(source, axis, missing, client, progress)
        if target is not None:
            found.save(target)
        if journal is not None:
            journal.remove()
    return found


def check_in_memory(
    *,
    columns: Sequence[str] | None = None,
    header: bool = True,
    array: str | None = None,
    client: Any = None,
) -> None:
    """Refuse what can be said of files only."""
    said = {
        "columns": columns is not None,
        "header": not header,
        "array": array is not None,
        "client": client is not None,
    }
    for name, given in said.items():
        if given:
            raise ArgumentError(
                f"{name} must be left out for arrays in memory: it is about files"
                f"{' and Dask arrays' if name == 'client' else ''}."
            )


def _measure_array(
    source: Any, axis: int, missing: str, client: Any, progress: Progress | None
) -> Statistics:
    """An array in memory, or of Dask."""
    if is_dask(source):
        from .cluster import measure_array

        measured = measure_array(source, axis, missing, client=client)
        check_squares(measured.moments, "x", lambda k: f"feature {k}")
    else:
        data = sources.of_memory(source, axis)
        measured = measure_source(data, missing, Meter([data], progress).by(data))
    return Statistics(measured.moments, measured.missing, channel_axis=axis)


class Meter:
    """How far the work is, for who wants to know."""

    def __init__(self, of: Sequence[Source], progress: Progress | None) -> None:
        self._whole, self._done, self._progress = sum(s.nbytes for s in of), 0, progress

    def skip(self, nbytes: int) -> None:
        """Count bytes that were done before."""
        self._done += nbytes

    def __call__(self, label: str, nbytes: int = 0) -> None:
        """Say that something with this name went on by some bytes."""
        self._done = min(self._done + nbytes, self._whole)
        if self._progress is not None:
            self._progress(label, self._done, self._whole)

    def by(self, source: Source) -> Callable[[int], None]:
        """What to call with bytes of a source that begins now."""
        self(source.label)
        return partial(self, source.label)


def _measure_paths(
    paths: Sequence[str | Path],
    axis: int,
    missing: str,
    reading: dict[str, Any],
    target: Path | None,
    journal: Journal | None,
    client: Any,
    progress: Progress | None,
    note: Callable[[str], None] | None,
) -> Statistics:
    """All files, merged as they are done; those that the journal knows from there."""
    files = find(paths, note)
    if target is not None:
        check_apart(target, {same_file(path): path for path in files})
    opened = [sources.open_source(path, channel_axis=axis, **reading) for path in files]
    names = check_alike(opened)
    meter, sums, todo = Meter(opened, progress), Sums(), dict(enumerate(opened))
    for k, source in enumerate(opened):
        known = None if journal is None else journal.find(source)
        if known is not None:
            sums.add(0, k, known)
            del todo[k]
            meter.skip(source.nbytes)
    if len(todo) < len(opened) and note is not None and journal is not None:
        note(
            f"{len(opened) - len(todo)} of {len(opened)} files were measured by a run that was "
            f"interrupted, and have not changed since ({journal.path})"
        )

    def finished(k: int, measured: Measured) -> None:
        sources.check_unchanged(opened[k])
        sums.add(0, k, measured)
        del todo[k]
        if journal is not None and todo:
            journal.add(opened[k], measured)

    if client is None:
        for k, source in list(todo.items()):
            finished(k, measure_source(source, missing, meter.by(source)))
    elif todo:
        from .cluster import measure_files

        meter(next(iter(todo.values())).label)
        measure_files(client, dict(todo), missing, meter, finished)
    total = sums.total(opened[0].features)
    check_squares(
        total.moments,
        f"{files[0]} … {files[-1]}",
        lambda k: f"feature {k}{f' ({names[k]!r})' if names else ''}",
    )
    return Statistics(total.moments, total.missing, names, axis, tuple(map(str, files)))


def check_alike(opened: Sequence[Source]) -> tuple[str, ...] | None:
    """The names of the features, after seeing that all files have the same.

    Raises
    ------
    ShapeError
        Numbers or names differ; two files are named.
    """
    first = opened[0]
    named = next((source for source in opened if source.names is not None), first)
    for other in opened:
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
    return named.names


def as_paths(source: Any) -> list[str | Path]:
    """The paths that `source` is; none if it is an array."""
    if isinstance(source, (str, Path)):
        return [source]
    if isinstance(source, (list, tuple)):
        if not source:
            raise ArgumentError("source must be at least one file or folder, got none.")
        if any(isinstance(s, (str, Path)) for s in source):
            for s in source:
                if not isinstance(s, (str, Path)):
                    raise ArgumentError(
                        f"source must be paths or one array, got {type(s).__name__} beside paths. "
                        "Save it to a file, or measure it apart."
                    )
            return list(source)
    return []
