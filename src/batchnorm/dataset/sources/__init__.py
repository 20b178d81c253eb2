"""What can be measured: arrays and tables in files, and arrays in memory.

`blocks` is the interface that all of them have, and each kind is a module beside it. To read
another format, write such a module and open it in `open_file`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...errors import ArgumentError
from ..addresses import suffix_of
from ..files import ARCHIVES, ARRAYS
from .archives import ArraysInTar, open_arrays_in_tar
from .array_files import NumpyFile, open_numpy
from .arrays import ArrayFile
from .arrow_files import open_arrow_file
from .blocks import Block, FileSource, Source, check_unchanged, check_width
from .chunked_files import ChunkedFile
from .csv_files import open_csv
from .hdf5_files import open_hdf5
from .memory import ArrayInMemory, open_memory
from .parquet_files import open_parquet
from .prefetching import prefetch
from .tables import Dialect, TableFile
from .zarr_files import open_zarr

__all__ = [
    "ArrayFile",
    "ArrayInMemory",
    "Block",
    "ChunkedFile",
    "FileOptions",
    "FileSource",
    "NumpyFile",
    "Source",
    "TableFile",
    "check_unchanged",
    "check_width",
    "open_file",
    "open_memory",
    "prefetch",
]


#: What opens files of one array or several, by their endings.
_OPEN_ARRAY = {
    ".npy": open_numpy,
    ".npz": open_numpy,
    ".h5": open_hdf5,
    ".hdf5": open_hdf5,
    ".zarr": open_zarr,
}


@dataclass(frozen=True)
class FileOptions:
    """How files are read, as `measure` explains it."""

    columns: Sequence[str] | None = None
    numeric: bool = False
    header: bool = True
    separator: str | None = None
    decimal: str = "."
    nulls: Sequence[str] | None = None
    array: str | None = None
    only: str | None = None
    broken: str = "refuse"
    equal_images: bool = False
    processes: int | None = None

    def __post_init__(self) -> None:
        """Check what does not depend on a file."""
        for name in ("columns", "nulls"):
            value = getattr(self, name)
            if value is not None:
                if isinstance(value, str) or not list(value):
                    raise ArgumentError(
                        f"{name} must be a list of texts, got {value!r}. Put them in a list, or "
                        f"leave {name} out."
                    )
                object.__setattr__(self, name, list(value))


def open_file(
    path: str, channel_axis: int, options: FileOptions
) -> ArrayFile | ArraysInTar | TableFile:
    """Read what a file says about its content, and check that it can be measured.

    Raises
    ------
    BatchNormError
        It is damaged or of another kind, holds no numbers, or the options do not apply to it.
    """
    suffix = suffix_of(path)
    if suffix in ARCHIVES:
        return open_arrays_in_tar(path, array=options.array, channel_axis=channel_axis)
    if options.array is not None and (suffix not in ARRAYS or suffix == ".npy"):
        raise ArgumentError(
            f"{path}: array names one in a .npz file, HDF5 or zarr, got {options.array!r} for a "
            f"{suffix} file. Leave it out."
        )
    if suffix in ARRAYS:
        for name in ("columns", "numeric", "separator", "nulls"):
            if value := getattr(options, name):
                raise ArgumentError(
                    f"{path}: {name} is for tables, got {value!r} for an array. Leave it out."
                )
        return _OPEN_ARRAY[suffix](path, array=options.array, channel_axis=channel_axis)
    if channel_axis not in (1, -1):
        raise ArgumentError(
            f"{path}: the features of a table are its columns, channel_axis 1, got "
            f"{channel_axis}. Leave it out."
        )
    open_table = _TABLES.get(suffix, open_csv)
    return open_table(
        path,
        columns=options.columns,
        numeric=options.numeric,
        dialect=Dialect(
            options.header, options.separator, options.decimal, tuple(options.nulls or ())
        ),
    )


_TABLES = {
    ".parquet": open_parquet,
    ".arrow": open_arrow_file,
    ".feather": open_arrow_file,
}
