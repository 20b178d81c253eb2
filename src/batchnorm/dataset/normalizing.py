"""`normalize`: data sets by given statistics, a block at a time."""

from __future__ import annotations

import contextlib
import os
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import DTypeLike

from .. import functional, native
from ..atomic import check_place, replacing, writing
from ..errors import ArgumentError, DTypeError, ShapeError
from ..moments import is_dask
from ..native import Array
from . import sources
from .files import ARRAYS, TABLES, check_apart, find, kind_of, same_file
from .measuring import Meter, Progress, as_paths, check_in_memory
from .sources import ArrayFile, ahead, plain
from .statistics import Statistics, is_statistics
from .tables import TableFile, arrow, by_name


def normalize(
    source: Any,
    statistics: Statistics,
    out: str | Path | None = None,
    *,
    eps: float = 1e-5,
    dtype: DTypeLike | None = None,
    channel_axis: int | None = None,
    header: bool = True,
    array: str | None = None,
    progress: Progress | None = None,
    note: Callable[[str], None] | None = None,
) -> Any:
    """Normalize each feature by the mean and biased variance of a data set.

    Parameters
    ----------
    source : path, (N, C, *S) array, or Dask array
        A file as `measure` takes it, or a folder of them. Of a table, the columns that have
        statistics are normalized and the others passed on.
    statistics : Statistics
        Of C features; those of tables are found by their names.
    out : path
        The file to write: .npy or .npz for arrays, .csv or .parquet for tables. For a folder, a
        folder; files in it keep their names. Never one of the files that are read, nor statistics.
        Not for arrays in memory, nor Dask arrays.
    eps : float
        Added to the variance, inside the root.
    dtype : floating type
        Of the result. That of the data if None; float64 for integers and for columns of .csv files.
    channel_axis : int
        The axis of the features; as the statistics have it if None.
    header, array
        As in `measure`.
    progress : callable
        Called with a name, the bytes done, and the bytes in all.
    note : callable
        Called with what else is worth saying.

    Returns
    -------
    array, Dask array or None
        (x − mean)/√(var + eps), of arrays in memory as an array, of Dask arrays lazily; of files
        None. A missing value stays missing, and a feature of which the statistics saw no value is
        missing altogether. A feature that is constant gives 0.

    Raises
    ------
    BatchNormError
        Features do not match the statistics, eps is 0 and a feature constant, a result exceeds its
        type, or a file cannot be read or written. No file is left half-written.

    References
    ----------
    Ioffe & Szegedy (2015), Algorithm 2, step 11.
    """
    if not isinstance(statistics, Statistics):
        raise ArgumentError(
            f"statistics must be Statistics, got {type(statistics).__name__}. measure returns "
            "them, Statistics.load reads them from a file."
        )
    axis = statistics.channel_axis if channel_axis is None else sources.as_axis(channel_axis)
    affine = _Affine(statistics, eps, _floating(dtype))
    paths = as_paths(source)
    if not paths:
        if out is not None:
            raise ArgumentError("out must be None for arrays; save what is returned.")
        check_in_memory(header=header, array=array)
        if is_dask(source):
            from .cluster import normalize_array

            return normalize_array(source, affine, axis)
        memory = sources.of_memory(source, axis)
        affine.check_features("x", memory.features)
        advance = Meter([memory], progress).by(memory)
        y = affine(memory.values, memory.channel_axis, label="x")
        advance(memory.nbytes)
        return y
    if len(paths) > 1:
        raise ArgumentError(f"source must be one file or folder, got {len(paths)}.")
    if out is None:
        raise ArgumentError("out must be the file to write, got None.")
    target = Path(out)
    files = find(paths, note)
    is_folder = os.path.isdir(paths[0])
    if is_folder:
        _check_folder(Path(paths[0]), target)
    read = {same_file(path): path for path in files}
    jobs: list[tuple[ArrayFile | TableFile, Path]] = []
    for path in files:
        destination = target / path.relative_to(paths[0]) if is_folder else target
        jobs.append((_open(path, affine, axis, header, array), destination))
        _check_kind(path, destination)
        check_apart(destination, read)
        _check_no_statistics(destination)
        if not is_folder:
            check_place(destination, f"a {destination.suffix} file", f"normalized{path.suffix}")
    meter = Meter([file for file, _ in jobs], progress)
    for file, destination in jobs:
        with writing(destination), replacing(destination) as beside:
            if isinstance(file, ArrayFile):
                _write_array(file, affine, beside, destination, meter.by(file))
            else:
                _write_table(file, affine, beside, destination, meter.by(file))
    return None


class _Affine:
    """The map of each feature, for blocks that hold some of them."""

    def __init__(self, statistics: Statistics, eps: float, dtype: np.dtype[Any] | None) -> None:
        seen = statistics.count > 0
        self.statistics = statistics
        self.eps = native.check_eps(eps)
        self.dtype = dtype
        self.mean = np.where(seen, statistics.mean, 0.0)
        self.var = np.where(seen, statistics.var(), 1.0)
        self.unseen = ~seen
        native.check_variance(self.var)
        if self.eps == 0 and not self.var.all():
            k = int(np.flatnonzero(self.var == 0)[0])
            name = f" ({statistics.names[k]!r})" if statistics.names else ""
            raise ArgumentError(
                f"eps must be above zero, got 0: feature {k}{name} is constant. "
                "Leave eps out for 1e-5."
            )

    def check_features(self, label: str, features: int) -> None:
        """Refuse data with other features than were measured."""
        if features != self.statistics.features:
            raise ShapeError(
                f"{label}: must have as many features as the statistics, "
                f"{self.statistics.features}, got {features}. Choose the channel_axis that was "
                "measured, or measure this data."
            )

    def result_type(self, dtype: np.dtype[Any]) -> np.dtype[Any]:
        """The type that values of `dtype` are given out in."""
        if self.dtype is not None:
            return self.dtype
        return np.dtype(np.float64) if dtype.kind in "iub" else dtype.newbyteorder("=")

    def __call__(
        self, values: Array, axis: int, channels: slice = slice(None), *, label: str
    ) -> Array:
        """Normalize values; `label` is what messages call them."""
        result = self.result_type(values.dtype)
        values = plain(values, label)
        if values.dtype.kind in "iub":
            values = values.astype(np.float64)
        elif result.itemsize > values.dtype.itemsize:
            values = values.astype(result)  # before, or digits that were asked for would be lost
        y = functional.batch_norm_inference(
            values, self.mean[channels], self.var[channels], eps=self.eps, channel_axis=axis
        )
        unseen = self.unseen[channels]
        if unseen.any():
            np.moveaxis(y, axis, 0)[unseen] = np.nan
        return narrowed(y, result, values, label)


def narrowed(y: Array, dtype: np.dtype[Any], values: Array, label: str) -> Array:
    """Normalized values in the type asked for, which must hold all that come of finite ones."""
    with np.errstate(over="ignore"):
        y = y.astype(dtype, copy=False)
    infinite = np.isinf(y)
    if infinite.any() and np.isfinite(values[infinite]).any():
        raise ArgumentError(
            f"{label}: normalized values must fit into {dtype}, and some exceed it. Pass a larger "
            "dtype=, --dtype, such as float64, or a larger eps."
        )
    return y


def _floating(dtype: DTypeLike | None) -> np.dtype[Any] | None:
    if dtype is None:
        return None
    try:
        wanted = np.dtype(dtype)
    except TypeError:
        wanted = None
    if wanted is None or not native.is_supported(wanted):
        raise DTypeError(f"dtype must be float16, float32 or float64, got {dtype!r}.")
    return wanted


def _open(
    path: Path, affine: _Affine, axis: int, header: bool, array: str | None
) -> ArrayFile | TableFile:
    is_table = kind_of(path) in TABLES
    file = sources.open_source(
        path,
        channel_axis=1 if is_table else axis,
        columns=affine.statistics.names if is_table else None,
        header=header,
        array=array,
    )
    affine.check_features(file.label, file.features)
    if isinstance(file, ArrayFile):
        # What is read, what it is widened to, and the result.
        wide = affine.result_type(file.dtype).itemsize
        element = file.dtype.itemsize + 2 * max(file.element_bytes, wide)
        return replace(file, element_bytes=element)
    assert isinstance(file, TableFile)
    if affine.dtype is not None and native.is_bfloat16(affine.dtype):
        raise DTypeError(
            f"{path}: dtype must be float16, float32 or float64 for tables, got bfloat16."
        )
    return file


def _check_folder(given: Path, target: Path) -> None:
    if os.path.exists(target) and not os.path.isdir(target):
        raise ArgumentError(
            f"out must be a folder, as {str(given)!r} is, got the file {str(target)!r}."
        )
    inside = os.path.realpath(target) + os.sep
    if inside.startswith(os.path.realpath(given) + os.sep):
        raise ArgumentError(
            f"out must lie outside the folder that is read, {str(given)!r}, got {str(target)!r}."
        )


def _check_kind(path: Path, destination: Path) -> None:
    kinds = ARRAYS if kind_of(path) in ARRAYS else TABLES
    if kind_of(destination) not in kinds:
        raise ArgumentError(
            f"out must end in {' or '.join(kinds)} for {str(path)!r}, got {str(destination)!r}. "
            f"Name it {destination.with_suffix(path.suffix).name!r}."
        )


def _check_no_statistics(destination: Path) -> None:
    """Refuse to write over what was measured: a slip of --out for --stats."""
    if is_statistics(destination):
        raise ArgumentError(
            f"out must not be saved statistics, got {str(destination)!r}, which holds some. Name "
            "another, or remove it."
        )


# ---- arrays -------------------------------------------------------------------------------------


def _write_array(
    file: ArrayFile,
    affine: _Affine,
    beside: Path,
    destination: Path,
    advance: Callable[[int], None],
) -> None:
    """Blocks follow one another in the file, so what is written is what was read, in its place."""
    with contextlib.ExitStack() as stack:
        stream = stack.enter_context(_array_stream(file, beside, kind_of(destination)))
        native_type = file.dtype.newbyteorder("=")
        header = {
            "descr": np.lib.format.dtype_to_descr(_storable(affine.result_type(native_type))),
            "fortran_order": file.fortran_order,
            "shape": file.shape,
        }
        np.lib.format.write_array_header_1_0(stream, header)
        blocks = ahead(file.blocks())
        stack.callback(blocks.close)  # type: ignore[attr-defined]
        for block in blocks:
            y = affine(block.values, block.axis, block.channels, label=file.label)
            stream.write(np.ascontiguousarray(y).view(np.uint8).reshape(-1).data)
            advance(block.nbytes)


def _storable(dtype: np.dtype[Any]) -> np.dtype[Any]:
    # As numpy.save stores bfloat16: two bytes, of which it knows no more.
    return np.dtype("V2") if native.is_bfloat16(dtype) else dtype


@contextlib.contextmanager
def _array_stream(file: ArrayFile, beside: Path, suffix: str) -> Iterator[IO[bytes]]:
    if suffix == ".npy":
        with beside.open("wb") as stream:
            yield stream
        return
    compression, member = zipfile.ZIP_STORED, "arr_0.npy"
    if file.member is not None:
        member = file.member
        with zipfile.ZipFile(file.path) as archive:
            compression = archive.getinfo(member).compress_type
    with (
        zipfile.ZipFile(beside, "w", compression) as archive,
        archive.open(member, "w", force_zip64=True) as stream,
    ):
        yield stream


# ---- tables -------------------------------------------------------------------------------------


def _write_table(
    file: TableFile,
    affine: _Affine,
    beside: Path,
    destination: Path,
    advance: Callable[[int], None],
) -> None:
    pa = arrow()
    with contextlib.ExitStack() as stack:
        writer: Any = None
        for batch, nbytes in _or_nothing(file):
            values = file.values(batch, file.names)
            y = affine(values, 0, label=file.label)
            columns = by_name(batch)
            for k, name in enumerate(file.names):
                columns[name] = _column(
                    pa,
                    y[k],
                    columns[name],
                    affine.dtype,
                    values[k],
                    f"{file.path}: column {name!r}",
                )
            result = pa.record_batch(
                [columns[name] for name in file.columns], names=list(file.columns)
            )
            with _writing_table(destination):
                if writer is None:
                    writer = _table_writer(beside, kind_of(destination), result.schema, file.header)
                    stack.callback(writer.close)
                writer.write_batch(result)
            advance(nbytes)


@contextlib.contextmanager
def _writing_table(destination: Path) -> Iterator[None]:
    try:
        yield
    except arrow().ArrowException as error:
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ArgumentError(
            f"{destination}: cannot hold all columns ({said}). Name a .parquet file, which takes "
            "every type."
        ) from error


def _or_nothing(file: TableFile) -> Iterator[tuple[Any, int]]:
    """The batches of a table, or one without rows, so that the result has the columns too."""
    any_rows = False
    for item in file.batches(file.columns):
        any_rows = True
        yield item
    if not any_rows:
        pa = arrow()
        yield (
            pa.record_batch(
                [pa.array([], pa.float64()) for _ in file.columns], names=list(file.columns)
            ),
            0,
        )


def _column(
    pa: Any, y: Array, before: Any, dtype: np.dtype[Any] | None, values: Array, label: str
) -> Any:
    """A normalized column; null where it was null, in the floating type that it had."""
    if dtype is not None:
        kind = pa.from_numpy_dtype(dtype)
    else:
        kind = before.type if pa.types.is_floating(before.type) else pa.float64()
    mask = before.is_null().to_numpy(zero_copy_only=False)
    return pa.array(narrowed(y, np.dtype(kind.to_pandas_dtype()), values, label), kind, mask=mask)


def _table_writer(beside: Path, suffix: str, schema: Any, header: bool) -> Any:
    if suffix == ".parquet":
        return arrow("pyarrow.parquet").ParquetWriter(str(beside), schema)
    csv = arrow("pyarrow.csv")
    options = csv.WriteOptions(include_header=header, quoting_style="needed")
    return csv.CSVWriter(str(beside), schema, write_options=options)
