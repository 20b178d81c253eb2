"""`normalize`: data sets by given statistics, a block at a time."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from numpy.typing import DTypeLike

from .. import native
from ..atomic import check_place, explain_write_errors, replacing
from ..errors import ArgumentError, DTypeError
from ..moments import is_dask
from .addresses import below, check_local, file_key, is_folder, is_remote, suffix_of
from .affine import Affine
from .arguments import as_axis, as_source, check_in_memory
from .dask_arrays import normalize_array
from .files import ARCHIVES, ARRAYS, FOLDERS, IMAGES, TABLES, check_not_an_input, find_files
from .meter import Meter, Progress
from .sources import (
    ArrayFile,
    FileOptions,
    TableFile,
    check_unchanged,
    open_file,
    open_memory,
)
from .statistics import Statistics, is_statistics
from .writers import WRITABLE, write_normalized


def normalize(
    source: Any,
    statistics: Statistics,
    out: str | Path | None = None,
    *,
    inverse: bool = False,
    eps: float = 1e-5,
    dtype: DTypeLike | None = None,
    channel_axis: int | None = None,
    header: bool = True,
    separator: str | None = None,
    decimal: str = ".",
    nulls: Sequence[str] | None = None,
    array: str | None = None,
    only: str | None = None,
    progress: Progress | None = None,
    note: Callable[[str], None] | None = None,
) -> Any:
    """Normalize each feature by the mean and biased variance of a data set, or undo that.

    Parameters
    ----------
    source : path, (N, C, *S) array, or Dask array
        A file that `measure` takes, but no image, or a folder of them. In a table, the columns that
        have statistics are normalized and the others copied.
    statistics : Statistics
        Of C features. Columns of tables are matched by their names.
    out : path
        The file to write, of an array for arrays and of a table for tables. If `source` is a
        folder, the folder to write, in which files keep their names. Not an input file, nor saved
        statistics. None for arrays in memory and Dask arrays.
    inverse : bool
        Return to the original values: `source` is what this function made of them, with the same
        `eps`.
    eps : float
        Added to the variance, inside the root.
    dtype : floating type
        Type of the result. None for that of the data, and float64 for integers and .csv files.
    channel_axis : int
        The axis of the features; None for that of the statistics.
    header, separator, decimal, nulls, array, only
        As in `measure`.
    progress : callable
        Called with the name of what is read, the bytes done, and the bytes in all.
    note : callable
        Called with a line about files that are skipped, and for each file that is replaced.

    Returns
    -------
    array, Dask array or None
        (x/scale − mean)/√(var + eps): an array for an array in memory, a lazy Dask array for a Dask
        array, None for files. Missing values stay missing, and a feature without any present value
        in the statistics becomes missing. A constant feature becomes 0.

    Raises
    ------
    BatchNormError
        Features do not match the statistics, eps is 0 and a feature constant, a result overflows
        its type, or a file cannot be read or written. No file is left half-written.

    References
    ----------
    Ioffe & Szegedy (2015), Algorithm 2, step 11.

    Examples
    --------
    >>> import numpy as np
    >>> from batchnorm import dataset
    >>> x = np.array([[1.0, 10.0], [3.0, 30.0]])
    >>> y = dataset.normalize(x, dataset.measure(x))
    >>> dataset.normalize(y, dataset.measure(x), inverse=True)
    array([[ 1., 10.],
           [ 3., 30.]])
    """
    if not isinstance(statistics, Statistics):
        raise ArgumentError(
            f"statistics must be Statistics, got {type(statistics).__name__}. measure returns "
            "them, Statistics.load reads them from a file."
        )
    axis = statistics.channel_axis if channel_axis is None else as_axis(channel_axis)
    affine = Affine(statistics, eps, dtype, inverse=inverse)
    options = FileOptions(None, False, header, separator, decimal, nulls, array, only)
    paths, batches = as_source(source)
    if paths:
        _normalize_files(paths, out, affine, axis, options, progress, note)
        return None
    if batches is not None:
        raise ArgumentError(
            "source must be one array, a file or a folder, got several arrays. Normalize them one "
            "by one."
        )
    if out is not None:
        raise ArgumentError("out must be None for arrays; save what is returned.")
    check_in_memory(options)
    if is_dask(source):
        return normalize_array(source, affine, axis)
    memory = open_memory(source, axis)
    affine.check_features("x", memory.features)
    if None not in (memory.names, statistics.names) and memory.names != statistics.names:
        raise ArgumentError(
            f"x: must have the columns of the statistics, in their order, {statistics.names}, got "
            f"{memory.names}. Choose them by x[list(statistics.names)]."
        )
    advance = Meter([memory], progress).start(memory)
    y = affine(memory.values, memory.channel_axis, label="x")
    advance(memory.nbytes)
    return y


def _normalize_files(
    paths: list[str | Path],
    out: str | Path | None,
    affine: Affine,
    axis: int,
    options: FileOptions,
    progress: Progress | None,
    note: Callable[[str], None] | None,
) -> None:
    """Normalize a file or a folder, after checking that all files can be read and written."""
    if len(paths) > 1:
        raise ArgumentError(f"source must be one file or folder, got {len(paths)}.")
    given = str(paths[0])
    found = find_files([given], note, only=options.only)
    if images := [path for path in found if suffix_of(path) in IMAGES + ARCHIVES]:
        some = affine.statistics
        short = some.features <= 4 and (some.std() > 0).all()
        line = some.normalize_line() if short else "transforms.Normalize"
        raise ArgumentError(
            f"source must be arrays or tables, got {images[0]}. Normalize examples where they are "
            f"loaded, in PyTorch by {line}."
        )
    if out is None:
        raise ArgumentError("out must be the file to write, got None.")
    check_local(out)
    target = Path(out)
    inside = is_folder(given) and suffix_of(given) not in FOLDERS
    if inside:
        _check_folder(given, target)
    inputs = {file_key(path): path for path in found}
    jobs: list[tuple[ArrayFile | TableFile, Path]] = []
    for path in found:
        destination = target / below(given, path) if inside else target
        jobs.append((_open(path, affine, axis, options), destination))
        _check_destination(path, destination, inputs)
        if not inside:
            check_place(
                destination, f"a {suffix_of(destination)} file", f"normalized{suffix_of(path)}"
            )
    meter = Meter([file for file, _ in jobs], progress)
    for file, destination in jobs:
        replaced = destination.exists()
        with explain_write_errors(destination), replacing(destination) as temporary:
            write_normalized(file, affine, temporary, destination, meter.start(file))
            check_unchanged(file)
        if replaced and note is not None:
            note(f"replaced {destination}, which was there before")


def _open(path: str, affine: Affine, axis: int, options: FileOptions) -> ArrayFile | TableFile:
    if suffix_of(path) in TABLES:  # columns have their own axis, and are matched by name
        axis, options = 1, replace(options, columns=affine.statistics.names)
    file = open_file(path, axis, options)
    assert isinstance(file, (ArrayFile, TableFile))  # archives have been refused
    affine.check_features(file.label, file.features)
    if isinstance(file, ArrayFile):
        # What is read, its copy in a wider type, and the result.
        wide = affine.result_type(file.dtype).itemsize
        return replace(file, element_bytes=file.dtype.itemsize + 2 * max(file.element_bytes, wide))
    if affine.dtype is not None and native.is_bfloat16(affine.dtype):
        raise DTypeError(
            f"{path}: dtype must be float16, float32 or float64 for tables, got bfloat16."
        )
    return file


def _check_folder(given: str, target: Path) -> None:
    """Raise if the folder to write is a file or lies inside the folder to read."""
    if os.path.exists(target) and not os.path.isdir(target):
        raise ArgumentError(f"out must be a folder, as {given!r} is, got the file {str(target)!r}.")
    inside = os.path.realpath(target) + os.sep
    if not is_remote(given) and inside.startswith(os.path.realpath(given) + os.sep):
        raise ArgumentError(
            f"out must lie outside the input folder, {given!r}, got {str(target)!r}."
        )


def _check_destination(path: str, destination: Path, inputs: Mapping[Any, str]) -> None:
    """Raise if a file to write is of another kind than `path`, or would overwrite what is kept."""
    given = suffix_of(path)
    kinds = ARRAYS if given in ARRAYS else TABLES
    suffixes = [suffix for suffix in kinds if suffix in WRITABLE]
    if kinds is ARRAYS and given not in WRITABLE:
        suffixes = [".npy"]  # the blocks do not follow one another, as in a .npz they must
    if suffix_of(destination) not in suffixes:
        example = given if given in WRITABLE else suffixes[0]
        raise ArgumentError(
            f"out must end in {' or '.join(suffixes)} for {path!r}, got "
            f"{str(destination)!r}. Name it '{destination.stem or 'normalized'}{example}'."
        )
    check_not_an_input(destination, inputs)
    if is_statistics(destination):  # a slip of --out for --stats
        raise ArgumentError(
            f"out must not be saved statistics, got {str(destination)!r}, which holds some. "
            "Choose another path, or remove the file."
        )
