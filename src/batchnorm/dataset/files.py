"""Files: which ones are meant, what tells them apart, and what the system says about them."""

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

#: Path without links, name of the array in it, size in bytes and time of change in nanoseconds.
Identity = tuple[str, "str | None", int, int]


class Unreadable(ArgumentError):
    """What the system says about a file, here; elsewhere it may be readable."""


@contextlib.contextmanager
def reading(path: Path | str) -> Iterator[None]:
    """Name the file in what the system says about it."""
    try:
        yield
    except FileNotFoundError as error:
        raise Unreadable(f"{path}: there is no such file or folder. Check its name.") from error
    except OSError as error:
        raise Unreadable(
            f"{path}: cannot be read ({error.strerror or error}). Check its name and permissions."
        ) from error
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
        raise ArgumentError(
            f"{path}: must be a .npz file, and is not or is damaged ({error}). "
            "Write it with numpy.savez."
        ) from error


def identify(path: str | Path, member: str | None = None) -> Identity:
    """What tells a file from another, or from what it is after a change."""
    with reading(path):
        about = os.stat(path)
        return os.path.realpath(path), member, about.st_size, about.st_mtime_ns


def kind_of(path: Path) -> str:
    """Its suffix, in small letters."""
    return path.suffix.lower()


def same_file(path: str | Path) -> Any:
    """What two paths of one file have in common, there or not."""
    try:
        about = os.stat(path)
    except (OSError, ValueError):
        return os.path.realpath(path)
    return about.st_dev, about.st_ino


def check_apart(out: Path, read: Mapping[Any, Path]) -> None:
    """Refuse to write over what is read: files by what `same_file` says of them."""
    if (path := read.get(same_file(out))) is not None:
        raise ArgumentError(
            f"out must not be a file that is read, got {str(out)!r}, which is {str(path)!r}. "
            "Name another."
        )


def find(paths: Sequence[str | Path], note: Callable[[str], None] | None = None) -> list[Path]:
    """The files that are meant: those given, and in folders all of a known kind, by name.

    Parameters
    ----------
    paths
        In the order in which they are to be read.
    note
        Told of statistics that are left out of a folder: they are no data.

    Raises
    ------
    ArgumentError
        Something is not there, is of another kind, is named twice, cannot be read, or a folder
        holds nothing.
    """
    found: list[Path] = []
    for given in paths:
        if not os.fspath(given):
            raise ArgumentError(
                "source must be files or folders, got an empty name. The current folder is '.'."
            )
        path = Path(given)
        if is_folder(path):
            found += _inside(path, note)
        elif kind_of(path) not in ARRAYS + TABLES:
            raise ArgumentError(
                f"{path}: must be a {_kinds()} file or a folder of them, got "
                f"{path.suffix or 'no suffix'}. Convert it, or rename it if it is one of these."
            )
        else:
            found.append(path)
    seen = set()
    for path in found:
        if (file := same_file(path)) in seen:
            raise ArgumentError(
                f"{path}: is named twice, and its values would count twice. Name it once."
            )
        seen.add(file)
    return found


def is_folder(path: Path) -> bool:
    """Whether it is a folder and no file; a pipe or a device, which may have no end, is neither."""
    with reading(path):
        try:
            mode = os.stat(path).st_mode
        except ValueError as error:  # a NUL in its name
            raise OSError(str(error)) from error
    if not stat.S_ISDIR(mode) and not stat.S_ISREG(mode):
        raise ArgumentError(f"{path}: must be a file or a folder, and is neither. Copy it to one.")
    return stat.S_ISDIR(mode)


def _inside(folder: Path, note: Callable[[str], None] | None) -> list[Path]:
    def refuse(error: OSError) -> None:
        with reading(error.filename):
            raise error

    inside = []
    for root, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if name[0] not in "._"]
        for path in (Path(root, name) for name in names if name[0] not in "._"):
            if kind_of(path) not in ARRAYS + TABLES:
                continue
            is_folder(path)  # raises where a link leads nowhere
            if not is_statistics(path):
                inside.append(path)
            elif note is not None:
                note(f"{path} holds statistics and no data: left out")
    if not inside:
        raise ArgumentError(
            f"{folder}: must hold {_kinds()} files, and holds none. Name another folder."
        )
    return sorted(inside)


def _kinds() -> str:
    return ", ".join((*ARRAYS, TABLES[0])) + f" or {TABLES[1]}"
