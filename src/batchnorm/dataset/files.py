"""Which files a path means, by the kinds of files that can be read."""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import ArgumentError
from .addresses import file_key, is_remote, join, look_up, parts_of, suffix_of, walk
from .hugging_face import data_files
from .statistics import is_statistics

#: Kinds of files by their endings. Those of one kind are read, checked and written alike.
ARRAYS = (".npy", ".npz", ".h5", ".hdf5", ".zarr")
TABLES = (".csv", ".tsv", ".csv.gz", ".tsv.gz", ".parquet", ".arrow", ".feather")
IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff")
ARCHIVES = (".tar",)
READABLE = ARRAYS + TABLES + IMAGES + ARCHIVES

#: Folders that are one array.
FOLDERS = (".zarr",)


def check_not_an_input(out: Path, inputs: Mapping[Any, str]) -> None:
    """Raise if `out` is one of the input files, given by their `file_key`."""
    if (path := inputs.get(file_key(out))) is not None:
        raise ArgumentError(
            f"out must not be one of the input files, got {str(out)!r}, which is {path!r}. "
            "Choose another path."
        )


def find_files(
    paths: Sequence[str | Path],
    note: Callable[[str], None] | None = None,
    *,
    only: str | None = None,
) -> list[str]:
    """List the given files and, for folders, all files of a known kind in them, by name.

    Parameters
    ----------
    paths
        In the order in which they are to be read; also addresses that fsspec knows.
    note
        Called with a line about the files that are skipped in a folder.
    only
        Pattern of the names of files to take from folders, such as ``*.png``.

    Raises
    ------
    ArgumentError
        A path does not exist, cannot be read, is of an unknown kind or given twice, or a folder
        contains no data.
    """
    found: dict[Any, str] = {}
    for given in paths:
        address = given if isinstance(given, str) else str(given)
        if not address:
            raise ArgumentError(
                "source must be files or folders, got an empty name. The current folder is '.'."
            )
        folder, key = look_up(address)
        if folder and suffix_of(address) not in FOLDERS:
            inside = _files_inside(address, note, only)
        elif suffix_of(address) in READABLE:
            inside = [(address, key)]
        else:
            raise ArgumentError(
                f"{address}: must be a {_kinds()} file or a folder of them, got "
                f"{suffix_of(address) or 'no suffix'}. Convert it, or rename it if it is one of "
                "these."
            )
        for address, key in inside:
            if key in found:
                raise ArgumentError(
                    f"{address}: is named twice, and its values would count twice. Name it once."
                )
            found[key] = address
    return list(found.values())


def _files_inside(
    folder: str, note: Callable[[str], None] | None, only: str | None
) -> list[tuple[str, Any]]:
    """Files in a folder, sorted by name, each with its `file_key`."""
    inside: list[tuple[str, Any]] = []
    skipped: list[str] = []
    for root, folders, names in walk(folder):
        folders[:] = [name for name in folders if name[0] not in "._"]
        arrays = [name for name in folders if suffix_of(name) in FOLDERS]
        folders[:] = [name for name in folders if name not in arrays]
        for name in [*data_files(root, names, only, note), *arrays]:
            if name[0] in "._" or (only is not None and not fnmatch.fnmatch(name, only)):
                continue
            address, suffix = join(root, name), suffix_of(name)
            if suffix not in READABLE:
                skipped.append(address)
                continue
            # Raises for a link to nowhere.
            key = file_key(address) if is_remote(address) else look_up(address)[1]
            if suffix == ".npz" and is_statistics(address):
                if note is not None:
                    note(f"skipped {address}: it holds saved statistics, not data")
            else:
                inside.append((address, key))
    if not inside:
        raise ArgumentError(
            f"{folder}: must contain {_kinds()} files"
            f"{'' if only is None else f' called {only}'}, got none. Name another folder."
        )
    if skipped and note is not None:
        kinds = Counter(suffix_of(name) or "no suffix" for name in skipped)
        listed = ", ".join(f"{n} of {kind}" for kind, n in kinds.most_common(4))
        note(f"skipped {len(skipped)} in {folder} of kinds that are not read: {listed}")
    return sorted(inside, key=lambda item: parts_of(item[0]))


def _kinds() -> str:
    *others, last = READABLE
    return f"{', '.join(others)} or {last}"
