"""Where data lies: paths of this machine, and addresses such as s3://bucket/x.npy by fsspec."""

from __future__ import annotations

import contextlib
import io
import os
import re
import stat
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Any

from ..errors import ArgumentError, BatchNormError
from .extras import first_line, import_extra

#: Real path or address, name of the array inside the file, size in bytes, and what changes whenever
#: the file does: equal if and only if it is the same file and unchanged.
Fingerprint = tuple[str, "str | None", int, "int | str"]

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*(://|::)")

#: Endings that say how a file is compressed; what it holds is said by the ending before.
COMPRESSED = (".gz",)


class UnreadableFile(ArgumentError):
    """A file cannot be read here; another machine may be able to."""


def is_remote(address: str | Path) -> bool:
    """Whether this is an address for fsspec rather than a path."""
    return isinstance(address, str) and _SCHEME.match(address) is not None


def suffix_of(address: str | Path) -> str:
    """Return the suffix in lower case, of a compressed file the last two, as in .csv.gz."""
    path = PurePosixPath(address) if is_remote(address) else Path(address)
    suffixes = [suffix.lower() for suffix in path.suffixes]
    return "".join(suffixes[-2:] if suffixes[-1:] and suffixes[-1] in COMPRESSED else suffixes[-1:])


@contextlib.contextmanager
def explain_read_errors(address: Path | str) -> Iterator[None]:
    """Turn errors of the system, of fsspec and of zip files into one line that names the file."""
    try:
        yield
    except FileNotFoundError as error:
        raise UnreadableFile(
            f"{address}: there is no such file or folder. Check its name."
        ) from error
    except OSError as error:
        raise UnreadableFile(
            f"{address}: cannot be read ({error.strerror or first_line(error)}). Check its name "
            "and permissions."
        ) from error
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
        raise ArgumentError(
            f"{address}: must be a valid .npz file, but is damaged or of another kind ({error}). "
            "Write it with numpy.savez."
        ) from error
    except (BatchNormError, MemoryError):
        raise
    except Exception as error:
        # Packages for remote addresses have exceptions of their own, as for missing credentials.
        if not is_remote(address):
            raise
        raise UnreadableFile(
            f"{address}: cannot be read ({type(error).__name__}: {first_line(error)}). Check the "
            "address and your access to it."
        ) from error


def remote(address: str) -> tuple[Any, str]:
    """Return the fsspec file system of an address, and its path there.

    Raises
    ------
    BatchNormError
        fsspec or the package for this kind of address is not installed, or none knows it.
    """
    fsspec = import_extra("fsspec.core", "remote", "Addresses such as s3://bucket/x.npy")
    try:
        fs, path = fsspec.url_to_fs(address)
    except ImportError as error:
        raise BatchNormError(f"{address}: {first_line(error)}.") from error
    except ValueError as error:
        raise ArgumentError(
            f"{address}: must be a path, or an address that fsspec knows ({first_line(error)})."
        ) from error
    return fs, path


def open_binary(address: str | Path) -> IO[bytes]:
    """Open a file for reading, where it lies."""
    if not is_remote(address):
        return io.FileIO(address)  # reads into memory of the caller
    fs, path = remote(str(address))
    opened: IO[bytes] = fs.open(path, "rb")
    return opened


def fingerprint_of(address: str | Path, member: str | None = None) -> Fingerprint:
    """Fingerprint a file, or a folder that is one array, to tell it from itself after a change."""
    with explain_read_errors(address):
        if is_remote(address):
            fs, path = remote(str(address))
            info = fs.info(path)
            if info["type"] == "directory":
                inside = fs.find(path, detail=True)
                size = sum(about["size"] or 0 for about in inside.values())
                return str(address), member, size, str(sorted(fs.ukey(name) for name in inside))
            return str(address), member, info["size"] or 0, fs.ukey(path)
        about = os.stat(address)
        size, changed = about.st_size, about.st_mtime_ns
        if stat.S_ISDIR(about.st_mode):
            found = [
                os.stat(Path(root, name)) for root, _, names in os.walk(address) for name in names
            ]
            size = sum(one.st_size for one in found)
            changed = max((one.st_mtime_ns for one in found), default=changed)
        return os.path.realpath(address), member, size, changed


def file_key(address: str | Path) -> Any:
    """Return a value that is equal for all paths of one file, whether or not it exists."""
    if is_remote(address):
        return str(address)
    try:
        about = os.stat(address)
    except (OSError, ValueError):
        return os.path.realpath(address)
    return about.st_dev, about.st_ino


def is_folder(address: str | Path) -> bool:
    """Whether this is a folder; raises unless it is a folder or a regular file."""
    with explain_read_errors(address):
        if is_remote(address):
            fs, path = remote(str(address))
            return str(fs.info(path)["type"]) == "directory"
        try:
            mode = os.stat(address).st_mode
        except ValueError as error:  # a NUL in its name
            raise OSError(str(error)) from error
    if not stat.S_ISDIR(mode) and not stat.S_ISREG(mode):
        # Reading a pipe or a device may never end.
        raise ArgumentError(
            f"{address}: must be a file or a folder, got a pipe, socket or device. "
            "Copy its content to a file."
        )
    return stat.S_ISDIR(mode)


def walk(folder: str) -> Iterator[tuple[str, list[str], list[str]]]:
    """Walk a folder from the top, as os.walk does; removing a folder's name leaves it out."""

    def refuse(error: OSError) -> None:
        with explain_read_errors(error.filename):
            raise error

    if not is_remote(folder):
        yield from os.walk(folder, onerror=refuse)
        return
    fs, path = remote(folder)
    with explain_read_errors(folder):
        for root, folders, names in fs.walk(path):
            yield fs.unstrip_protocol(root), folders, names


def join(folder: str, name: str) -> str:
    """The address of a file in a folder."""
    return f"{folder.rstrip('/')}/{name}" if is_remote(folder) else os.path.join(folder, name)


def parts_of(address: str) -> tuple[str, ...]:
    """Folders and name, by which files are sorted."""
    return tuple(address.split("/")) if is_remote(address) else Path(address).parts
