"""`measure`: exact statistics of files, arrays and Dask arrays."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from .. import native
from ..atomic import check_place
from ..errors import ArgumentError, ShapeError
from ..moments import is_dask
from .addresses import check_local, file_key, suffix_of
from .arguments import as_axis, as_source, check_in_memory
from .block_moments import How, check_overflow, measure_source
from .cluster import measure_files
from .dask_arrays import measure_array
from .files import ARCHIVES, check_not_an_input, find_files
from .hints import axis_hint
from .images.measuring import check_options, holds_images, journal_options, measure_images
from .journal import Journal, from_bytes, to_bytes
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
from .sources.archives import shown_endings
from .statistics import Statistics, check_replaceable, check_scale, check_suffix


def measure(
    source: Any,
    *,
    channel_axis: int = 1,
    missing: str = "refuse",
    scale: float = 1.0,
    extremes: bool = False,
    columns: Sequence[str] | None = None,
    numeric: bool = False,
    header: bool = True,
    separator: str | None = None,
    decimal: str = ".",
    nulls: Sequence[str] | None = None,
    array: str | None = None,
    only: str | None = None,
    broken: str = "refuse",
    equal_images: bool = False,
    processes: int | None = None,
    out: str | Path | None = None,
    client: Any = None,
    progress: Progress | None = None,
    note: Callable[[str], None] | None = None,
) -> Statistics:
    """Exact count, mean and variance of each feature of a data set, in blocks of bounded size.

    Parameters
    ----------
    source : path, paths, (N, C, *S) array, arrays, or Dask array
        Files of arrays, tables or images; `batchnorm.dataset` lists their kinds. A folder stands
        for all such files in it and its subfolders, sorted by name, except those that begin with a
        dot or an underscore, folders that are links, and saved statistics. Addresses such as
        ``s3://bucket/x.npy`` are read by fsspec. Files may exceed memory, and are merged in the
        order given. A list of arrays with two axes or more, or an iterator of arrays, is a data set
        in batches.
    channel_axis : int
        The axis of the features. The features of a table are its columns, those of images are red,
        green and blue, or grey if all are.
    missing : {"refuse", "skip"}
        What to do about NaN, masked values, and null in tables: raise, or leave each out of its own
        feature. Infinity is always refused.
    scale : float
        Divide all values by this, as by 255 for images.
    extremes : bool
        Find the least and the greatest value of each feature, too; of images they are known.
    columns : names
        Columns of tables that are features; None for all.
    numeric : bool
        Leave columns of tables out that are not numbers.
    header : bool
        Whether .csv files begin with a line of names. If not, columns are called f0, f1, …
    separator : str
        What stands between the values of a .csv file; None for a comma, or a tab in a .tsv file.
    decimal : str
        The decimal point of .csv files, such as ",".
    nulls : texts
        What stands for a missing value in .csv files, beside nothing, NA, NaN, null and the like.
    array : str
        Name of the array in .npz, HDF5 and zarr files; needed if they hold several. In .tar files
        the ending of the members to measure, such as "jpg".
    only : str
        Pattern of the names of files to take from folders, such as ``*.png``.
    broken : {"refuse", "skip"}
        What to do about images that cannot be decoded: raise, after all others have been measured,
        or leave them out. Both name the first ones and their number.
    equal_images : bool
        Let each image count alike, whatever its size, instead of each pixel.
    processes : int
        How many decode images; None for one on each processor.
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
        Called with a line about files that are skipped, when a run is resumed, and if the shape of
        an array looks as if `channel_axis` were wrong.

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
    >>> batches = (np.full((2, 1), k) for k in range(3))
    >>> dataset.measure(batches).mean
    array([1.])
    """
    axis = as_axis(channel_axis)
    how = How(missing, bool(extremes))
    scale = check_scale(scale)
    options = FileOptions(
        *(columns, numeric, header, separator, decimal, nulls, array, only),
        *(broken, equal_images, processes),
    )
    paths, batches = as_source(source)
    if not paths:
        check_in_memory(options, client=None if is_dask(source) else client)
    target = None
    if out is not None:
        check_local(out)
        target = Path(out)
        check_suffix(target)
        check_place(target, "a .npz or .json file", "stats.npz")
        if not paths:
            check_replaceable(target)
    with contextlib.ExitStack() as stack:
        journal, images, listed = None, False, list[str]()
        if paths:
            listed = _find_files(paths, options, target, note)
            if images := holds_images(listed, options):
                check_options(listed, options, axis, missing, client)
        if target is not None and paths:
            about = journal_options(options) if images else _journal_options(axis, how, options)
            journal = stack.enter_context(contextlib.closing(Journal(target, about)))
        if images:
            given = list(map(str, paths))
            found = measure_images(listed, given, options, scale, journal, progress, note)
        elif paths:
            files = _open_files(listed, axis, options, note)
            _note_axis(files[0], files[0].label, axis, note)
            found = _measure_files(files, axis, how, journal, client, progress, note)
        elif batches is not None:
            found = _measure_batches(batches, axis, how, progress, note)
        else:
            _note_axis(source, "x", axis, note)
            found = _measure_array(source, axis, how, client, progress)
        found = found.divided_by(scale)
        if target is not None:
            found.save(target)
        if journal is not None:
            journal.remove()
    return found


def _statistics(
    part: Part,
    how: How,
    axis: int,
    names: tuple[str, ...] | None = None,
    files: tuple[str, ...] = (),
) -> Statistics:
    extremes = part.extremes
    if how.extremes and extremes is None:  # no values
        extremes = np.full((2, part.missing.size), np.nan)
    return Statistics(part.moments, part.missing, names, axis, files, extremes=extremes)


def _measure_array(
    source: Any, axis: int, how: How, client: Any, progress: Progress | None
) -> Statistics:
    """Measure an array in memory, or a Dask array."""
    if is_dask(source):
        part = measure_array(source, axis, how, client=client)
        check_overflow(part.moments, "x")
    else:
        data = open_memory(source, axis)
        part = measure_source(data, how, Meter([data], progress).start(data))
        return _statistics(part, how, axis, data.names)
    return _statistics(part, how, axis)


def _note_axis(data: Any, label: str, axis: int, note: Callable[[str], None] | None) -> None:
    """Say before anything is read if the features are probably on another axis."""
    shape = getattr(data, "shape", None)  # tables have none
    if note is not None and shape is not None and (hint := axis_hint(shape, axis, label)):
        note(str(hint))


def _measure_batches(
    batches: Iterator[Any],
    axis: int,
    how: How,
    progress: Progress | None,
    note: Callable[[str], None] | None,
) -> Statistics:
    """Measure arrays one after another."""
    merge, first = PairwiseMerge(), None
    for k, batch in enumerate(batches):
        label = f"batch {k}"
        if not hasattr(batch, "__array__"):
            raise ArgumentError(
                f"{label}: must be an array, got {type(batch).__name__}. Yield the inputs alone, "
                "as in (x for x, y in loader)."
            )
        data = open_memory(batch, axis, label)
        if first is None:
            first = data
            _note_axis(batch, label, axis, note)
        check_same_features([first, data])
        merge.add(0, k, measure_source(data, how))
        if progress is not None:
            progress(label, 0, 0)
    assert first is not None  # `as_source` refuses an empty iterator
    part = merge.result(first.features)
    check_overflow(part.moments, "source")
    return _statistics(part, how, axis, first.names)


def _journal_options(axis: int, how: How, options: FileOptions) -> dict[str, Any]:
    """Return everything besides the files that the bits of their moments depend on."""
    return {
        **asdict(options),
        **asdict(how),
        "channel_axis": axis,
        "block_bytes": blocks.BLOCK_BYTES,
        "native": native.show_config()["instruction_set"],
    }


def _find_files(
    paths: Sequence[str | Path],
    options: FileOptions,
    target: Path | None,
    note: Callable[[str], None] | None,
) -> list[str]:
    """Find all files, and check that none of them, or anything but statistics, is written."""
    found = find_files(paths, note, only=options.only)
    if target is not None and target.exists():
        check_not_an_input(target, {file_key(path): path for path in found})
        check_replaceable(target)
    return found


def _open_files(
    paths: Sequence[str],
    axis: int,
    options: FileOptions,
    note: Callable[[str], None] | None,
) -> list[FileSource]:
    """Open all files, and check that they can be measured together."""
    files: list[FileSource] = [open_file(path, axis, options) for path in paths]
    check_same_features(files)
    archives = [path for path in paths if suffix_of(path) in ARCHIVES]
    if archives and note is not None and (others := shown_endings(archives[0], options.array)):
        note(f"members of archives that are not measured, as in {archives[0]}: {others}")
    return files


def _measure_files(
    files: Sequence[FileSource],
    axis: int,
    how: How,
    journal: Journal | None,
    client: Any,
    progress: Progress | None,
    note: Callable[[str], None] | None,
) -> Statistics:
    """Measure the files that the journal does not know, and merge all."""
    meter, merge, todo = Meter(files, progress), PairwiseMerge(), dict(enumerate(files))
    if journal is not None:
        for k, file in enumerate(files):
            written = journal.find(file.fingerprint)
            known = None if written is None else from_bytes(written, file.features)
            if known is not None:
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
            journal.add(files[k].fingerprint, to_bytes(part))

    if client is None:
        for k, file in list(todo.items()):
            finished(k, measure_source(file, how, meter.start(file)))
    elif todo:
        meter.start(next(iter(todo.values())))
        measure_files(client, dict(todo), how, meter.advance, finished)
    total = merge.result(files[0].features)
    names = next((file.names for file in files if file.names is not None), None)
    paths = tuple(file.path for file in files)
    check_overflow(total.moments, f"{paths[0]} … {paths[-1]}", names)
    return _statistics(total, how, axis, names, paths)


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
