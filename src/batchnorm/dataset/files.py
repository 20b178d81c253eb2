"""Files: which ones a path means, whether they have changed, and errors when reading them."""

from __future__ import annotations

import contextlib
import os
import stat
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import ArgumentError
from .statistics import is_statistics

ARRAYS = (".npy", ".npz")
TABLES = (".csv", ".parquet")

#: Path without links, name of the array inside the file, size in bytes, and modification time in
#: nanoseconds: equal if and only if it is the same file and unchanged.
Fingerprint = tuple[str, "str | None", int, int]


class UnreadableFile(ArgumentError):
    """The operating system cannot read a file here; another machine may be able to."""


@contextlib.contextmanager
def explain_read_errors(path: Path | str) -> Iterator[None]:
    """Turn errors of the system and of zip files into one line that names the file."""
    try:
        yield
    except FileNotFoundError as error:
        raise UnreadableFile(f"{path}: there is no such file or folder. Check its name.") from error
    except OSError as error:
        raise UnreadableFile(
            f"{path}: cannot be read ({error.strerror or error}). Check its name and permissions."
        ) from error
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
        raise ArgumentError(
            f"{path}: must be a valid .npz file, but is damaged or of another kind ({error}). "
            "Write it with numpy.savez."
        ) from error


def fingerprint_of(path: str | Path, member: str | None = None) -> Fingerprint:
    """Fingerprint a file, to tell it from others and from itself after a change."""
    with explain_read_errors(path):
        about = os.stat(path)
        return os.path.realpath(path), member, about.st_size, about.st_mtime_ns


def suffix_of(path: str | Path) -> str:
    """Return the suffix in lower case."""
    return Path(path).suffix.lower()


def file_key(path: str | Path) -> Any:
    """Return a value that is equal for all paths of one file, whether or not it exists."""
    try:
        about = os.stat(path)
    except (OSError, ValueError):
        return os.path.realpath(path)
    return about.st_dev, about.st_ino


def check_not_an_input(out: Path, inputs: Mapping[Any, Path]) -> None:
    """Raise if `out` is one of the input files, given by their `file_key`."""
    if (path := inputs.get(file_key(out))) is not None:
        raise ArgumentError(
            f"out must not be one of the input files, got {str(out)!r}, which is {str(path)!r}. "
            "Choose another path."
        )


def find_files(
    paths: Sequence[str | Path], note: Callable[[str], None] | None = None
) -> list[Path]:
    """List the given files and, for folders, all files of a known kind in them, by name.

    Parameters
    ----------
    paths
        In the order in which they are to be read.
    note
        Called with a line for each file of saved statistics that is skipped in a folder.

    Raises
    ------
    ArgumentError
        A path does not exist, cannot be read, is of an unknown kind or given twice, or a folder
        contains no data.
    """
    found: list[Path] = []
    for given in paths:
        if not os.fspath(given):
            raise ArgumentError(
                "source must be files or folders, got an empty name. The current folder is '.'."
            )
        path = Path(given)
        if is_folder(path):
            found += _files_inside(path, note)
        elif suffix_of(path) not in ARRAYS + TABLES:
            raise ArgumentError(
                f"{path}: must be a {_kinds()} file or a folder of them, got "
                f"{path.suffix or 'no suffix'}. Convert it, or rename it if it is one of these."
            )
        else:
            found.append(path)
    seen = set()
    for path in found:
        if (key := file_key(path)) in seen:
            raise ArgumentError(
                f"{path}: is named twice, and its values would count twice. Name it once."
            )
        seen.add(key)
    return found


def is_folder(path: Path) -> bool:
    """Whether `path` is a folder; raises unless it is a folder or a regular file."""
    with explain_read_errors(path):
        try:
            mode = os.stat(path).st_mode
        except ValueError as error:  # a NUL in its name
            raise OSError(str(error)) from error
    if not stat.S_ISDIR(mode) and not stat.S_ISREG(mode):
        # Reading a pipe or a device may never end.
        raise ArgumentError(
            f"{path}: must be a file or a folder, got a pipe, socket or device. "
            "Copy its content to a file."
        )
    return stat.S_ISDIR(mode)


def _files_inside(folder: Path, note: Callable[[str], None] | None) -> list[Path]:
    def refuse(error: OSError) -> None:
        with explain_read_errors(error.filename):
            raise error

    inside = []
    for root, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if name[0] not in "._"]
        for path in (Path(root, name) for name in names if name[0] not in "._"):
            if suffix_of(path) not in ARRAYS + TABLES:
                continue
            is_folder(path)  # raises for a link to nowhere
            if not is_statistics(path):
                inside.append(path)
            elif note is not None:
                note(f"skipped {path}: it holds saved statistics, not data")
    if not inside:
        raise ArgumentError(
            f"{folder}: must contain {_kinds()} files, got none. Name another folder."
        )
    return sorted(inside)


def _kinds() -> str:
    *others, last = ARRAYS + TABLES
    return f"{', '.join(others)} or {last}"
