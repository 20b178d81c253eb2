"""`normalize`: data sets by given statistics, a block at a time."""

from __future__ import annotations

import contextlib
import os
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import DTypeLike

from .. import functional, native
from ..atomic import check_place, replacing
from ..errors import ArgumentError, DTypeError, ShapeError
from ..native import Array
from . import sources
from .block import native_order
from .measuring import Progress, as_paths, is_dask
from .sources import ARRAYS, TABLES, ArrayFile, ahead
from .statistics import Statistics
from .tables import TableFile, arrow, as_float64, reading_table


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
        folder; files in it keep their names. Not for arrays in memory, nor Dask arrays.
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

    Returns
    -------
    array, Dask array or None
        (x − mean)/√(var + eps), of arrays in memory as an array, of Dask arrays lazily; of files
        None. A missing value stays missing, and a feature of which the statistics saw no value is
        missing altogether. A feature that is constant gives 0.

    Raises
    ------
    BatchNormError
        Features do not match the statistics, eps is 0 and a feature constant, or a file cannot be
        read or written. No file is left half-written.

    References
    ----------
    Ioffe & Szegedy (2015), Algorithm 2, step 11.
    """
    axis = statistics.channel_axis if channel_axis is None else channel_axis
    wanted = _floating(dtype)
    affine = _Affine(statistics, eps, wanted)
    paths = as_paths(source)
    if not paths:
        if out is not None:
            raise ArgumentError("out must be None for arrays; save what is returned.")
        if is_dask(source):
            from .cluster import normalize_array

            return normalize_array(source, affine, axis)
        values = native_order(np.asarray(source))
        at = native.channel_axis_of(values, axis)
        _check_features("x", values.shape[at], statistics)
        return affine(values, at)
    if len(paths) > 1:
        raise ArgumentError(f"source must be one file or folder, got {len(paths)}.")
    if out is None:
        raise ArgumentError("out must be the file to write, got None.")
    given, target = Path(paths[0]), Path(out)
    jobs = _jobs(given, target)
    opened: list[tuple[ArrayFile | TableFile, Path]] = []
    for path, destination in jobs:
        opened.append((_open(path, statistics, axis, header, array), destination))
        _check_kind(path, destination)
        _check_apart(path, destination)
        if not given.is_dir():
            check_place(destination, f"a {destination.suffix} file", f"normalized{path.suffix}")
    done, whole = 0, sum(file.nbytes for file, _ in opened)
    for file, destination in opened:

        def advance(nbytes: int, label: str = file.label) -> None:
            nonlocal done
            done = min(done + nbytes, whole)
            if progress is not None:
                progress(label, done, whole)

        advance(0)
        try:
            with replacing(destination) as beside:
                if isinstance(file, ArrayFile):
                    _write_array(file, affine, beside, destination.suffix, advance)
                else:
                    _write_table(file, affine, beside, destination.suffix, advance)
        except OSError as error:
            raise ArgumentError(
                f"{destination}: cannot be written ({error.strerror or error}). Make room, or name "
                "another file."
            ) from error
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

    def result_type(self, dtype: np.dtype[Any]) -> np.dtype[Any]:
        """The type that values of `dtype` are given out in."""
        if self.dtype is not None:
            return self.dtype
        return np.dtype(np.float64) if dtype.kind in "iub" else dtype.newbyteorder("=")

    def __call__(self, values: Array, axis: int, channels: slice = slice(None)) -> Array:
        """Normalize values in the byte order of this machine."""
        result = self.result_type(values.dtype)
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
        return y.astype(result, copy=False)


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


def _check_features(label: str, features: int, statistics: Statistics) -> None:
    if features != statistics.features:
        raise ShapeError(
            f"{label}: must have as many features as the statistics, {statistics.features}, got "
            f"{features}. Choose the channel_axis that was measured, or measure this data."
        )


def _open(
    path: Path, statistics: Statistics, axis: int, header: bool, array: str | None
) -> ArrayFile | TableFile:
    is_table = path.suffix in TABLES
    file = sources.open_source(
        path,
        channel_axis=1 if is_table else axis,
        columns=statistics.names if is_table else None,
        header=header,
        array=array,
    )
    assert isinstance(file, (ArrayFile, TableFile))
    _check_features(file.label, file.features, statistics)
    return file


def _jobs(given: Path, target: Path) -> list[tuple[Path, Path]]:
    """What to read and where to write it."""
    if not given.is_dir():
        return [(path, target) for path in sources.find([given])]
    if target.exists() and not target.is_dir():
        raise ArgumentError(
            f"out must be a folder, as {str(given)!r} is, got the file {str(target)!r}."
        )
    inside = os.path.realpath(target) + os.sep
    if inside.startswith(os.path.realpath(given) + os.sep):
        raise ArgumentError(
            f"out must lie outside the folder that is read, {str(given)!r}, got {str(target)!r}."
        )
    return [(path, target / path.relative_to(given)) for path in sources.find([given])]


def _check_kind(path: Path, destination: Path) -> None:
    kinds = ARRAYS if path.suffix in ARRAYS else TABLES
    if destination.suffix not in kinds:
        raise ArgumentError(
            f"out must end in {' or '.join(kinds)} for {str(path)!r}, got {str(destination)!r}. "
            f"Name it {destination.with_suffix(path.suffix).name!r}."
        )


def _check_apart(path: Path, destination: Path) -> None:
    if destination.exists() and os.path.samefile(path, destination):
        raise ArgumentError(
            f"out must not be the file that is read, got {str(destination)!r} for both. "
            "Name another."
        )


# ---- arrays -------------------------------------------------------------------------------------


def _write_array(
    file: ArrayFile, affine: _Affine, beside: Path, suffix: str, advance: Callable[[int], None]
) -> None:
    """Blocks follow one another in the file, so what is written is what was read, in its place."""
    with contextlib.ExitStack() as stack:
        stream = stack.enter_context(_array_stream(file, beside, suffix))
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
            y = affine(native_order(block.values), block.axis, block.channels)
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
    file: TableFile, affine: _Affine, beside: Path, suffix: str, advance: Callable[[int], None]
) -> None:
    pa = arrow()
    order = file.columns
    writer: Any = None
    with contextlib.ExitStack() as stack:
        for batch, nbytes in _or_nothing(file):
            values = np.empty((file.features, batch.num_rows))
            for k, name in enumerate(file.names):
                values[k] = as_float64(batch.column(name))
            y = affine(values, 0)
            columns = {
                name: _column(pa, y[k], batch.column(name), affine.dtype)
                for k, name in enumerate(file.names)
            }
            columns |= {name: batch.column(name) for name in file.others}
            result = pa.record_batch([columns[name] for name in order], names=list(order))
            if writer is None:
                writer = stack.enter_context(
                    _table_writer(beside, suffix, result.schema, file.header)
                )
            with reading_table(str(beside)):
                writer.write_batch(result)
            advance(nbytes)


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


def _column(pa: Any, y: Array, before: Any, dtype: np.dtype[Any] | None) -> Any:
    """A normalized column; null where it was null, in the floating type that it had."""
    if dtype is not None:
        kind = pa.from_numpy_dtype(dtype)
    else:
        kind = before.type if pa.types.is_floating(before.type) else pa.float64()
    mask = before.is_null().to_numpy(zero_copy_only=False)
    return pa.array(y.astype(kind.to_pandas_dtype()), kind, mask=mask)


def _table_writer(beside: Path, suffix: str, schema: Any, header: bool) -> Any:
    if suffix == ".parquet":
        return arrow("pyarrow.parquet").ParquetWriter(str(beside), schema)
    csv = arrow("pyarrow.csv")
    options = csv.WriteOptions(include_header=header, quoting_style="needed")
    return csv.CSVWriter(str(beside), schema, write_options=options)
