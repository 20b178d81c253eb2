"""Where data lies: paths of this machine, and addresses such as s3://bucket/x.npy by fsspec."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import re
import stat
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from ..errors import ArgumentError, BatchNormError
from .extras import first_line, import_extra

#: Absolute path or address, name of the array inside the file, size in bytes, and what changes
#: whenever the file does: equal if it is the same file and unchanged.
Fingerprint = tuple[str, "str | None", int, "int | str"]

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*(://|::)")

#: Endings that say how a file is compressed; what it holds is said by the ending before.
COMPRESSED = (".gz",)

#: Links of a chain that have no path of their own: simplecache::s3://bucket/x.npy.
_CACHES = ("simplecache", "filecache", "blockcache")

#: What file systems call the version of a file, the most telling first.
_VERSIONS = (
    *("ETag", "etag", "CRC", "mtime", "LastModified", "last_modified", "Last-Modified"),
    *("updated", "modified", "created"),
)


class UnreadableFile(ArgumentError):
    """A file cannot be read here; another machine may be able to."""


def is_remote(address: str | Path) -> bool:
    """Whether this is an address for fsspec rather than a path."""
    return isinstance(address, str) and _SCHEME.match(address) is not None


def check_local(out: str | Path) -> None:
    """Raise unless the file to write is a path of this machine."""
    if is_remote(out):
        raise ArgumentError(f"out must be a path of this machine, got {out!r}. Copy it from there.")


def suffix_of(address: str | Path) -> str:
    """Return the suffix in lower case, of a compressed file the last two, as in .csv.gz."""
    text = str(address)
    if is_remote(address):
        text = _split_chain(text)[1]
        if text.startswith("http"):
            text = text.partition("?")[0]
    root, suffix = os.path.splitext(text.rstrip("/"))
    suffix = suffix.lower()
    if suffix in COMPRESSED:
        suffix = os.path.splitext(root)[1].lower() + suffix
    return suffix if len(suffix) > 1 else ""


@contextlib.contextmanager
def explain_read_errors(address: Path | str) -> Iterator[None]:
    """Turn errors of the system, of fsspec and of damaged files into one line that names it."""
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
    except (BatchNormError, MemoryError):
        raise
    except Exception as error:
        # Packages for remote addresses have exceptions of their own, as for missing credentials.
        if is_remote(address):
            raise UnreadableFile(
                f"{address}: cannot be read ({type(error).__name__}: {first_line(error)}). Check "
                "the address, your access to it, and that the file is complete."
            ) from error
        if isinstance(error, (zipfile.BadZipFile, zlib.error, EOFError)):
            raise ArgumentError(
                f"{address}: is damaged or of another kind ({first_line(error)}). Write or copy "
                "it again."
            ) from error
        raise


# ---- addresses ----------------------------------------------------------------------------------


def remote(address: str) -> tuple[Any, str]:
    """Return the fsspec file system of an address, and its path there.

    Raises
    ------
    BatchNormError
        fsspec or the package for this kind of address is not installed, or none knows it.
    """
    fsspec = import_extra("fsspec.core", "remote", "Addresses such as s3://bucket/x.npy")
    with explain_read_errors(address):
        try:
            fs, path = fsspec.url_to_fs(address)
        except ImportError as error:
            raise BatchNormError(f"{address}: {first_line(error)}.") from error
        except ValueError as error:
            raise ArgumentError(
                f"{address}: must be a path, or an address that fsspec knows ({first_line(error)})."
            ) from error
    return fs, path


def _split_chain(address: str) -> tuple[list[str], str, list[str]]:
    """Split simplecache::zip://x.npy::s3://a.zip at the link that has the path of the file."""
    links = address.split("::")
    k = 0
    while k < len(links) - 1 and links[k].removesuffix("://") in _CACHES:
        k += 1
    return links[:k], links[k], links[k + 1 :]


def _replace_link(address: str, link: str) -> str:
    before, _, after = _split_chain(address)
    return "::".join([*before, link, *after])


def _version(info: Mapping[str, Any]) -> str:
    return next((f"{name} {info[name]}" for name in _VERSIONS if info.get(name)), "")


def _remote_fingerprint(address: str, fresh: bool) -> tuple[int, str]:
    """Size, and what changes with a file, or with any file in a folder."""
    fs, path = remote(address)
    if fresh:
        fs.invalidate_cache()  # or listings made before would be believed
    info = fs.info(path)
    if info["type"] == "directory":
        inside = fs.find(path, detail=True).items()
        return _digest((name, about["size"] or 0, _version(about)) for name, about in inside)
    if info["size"] is None:
        raise UnreadableFile(f"{address}: its server does not tell its size. Download it first.")
    return int(info["size"]), _version(info)


def _digest(files: Iterable[tuple[str, int, int | str]]) -> tuple[int, str]:
    """Bytes of all files, and a hash of their names, sizes and versions."""
    listed = sorted(files)
    text = "\n".join(f"{name} {size} {version}" for name, size, version in listed)
    digest = hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()
    return sum(size for _, size, _ in listed), digest


# ---- both ---------------------------------------------------------------------------------------


def open_binary(address: str | Path) -> IO[bytes]:
    """Open a file for reading, where it lies."""
    if not is_remote(address):
        return io.FileIO(address)  # reads into memory of the caller
    fs, path = remote(str(address))
    opened: IO[bytes] = fs.open(path, "rb")
    return opened


def fingerprint_of(
    address: str | Path, member: str | None = None, *, fresh: bool = True
) -> Fingerprint:
    """Fingerprint a file, or a folder that is one array, to tell it from itself after a change.

    What a listing has told of a remote file is asked for again if `fresh`.
    """
    with explain_read_errors(address):
        if is_remote(address):
            return str(address), member, *_remote_fingerprint(str(address), fresh)
        about = os.stat(address)
        if stat.S_ISDIR(about.st_mode):
            return os.path.abspath(address), member, *_digest(_files_in(address))
        return os.path.abspath(address), member, about.st_size, about.st_mtime_ns


def _files_in(folder: str | Path) -> Iterator[tuple[str, int, int]]:
    before = len(os.fspath(folder))
    for root, _, names in os.walk(folder, onerror=_refuse):
        for name in names:
            path = os.path.join(root, name)
            about = os.stat(path)
            yield path[before:], about.st_size, about.st_mtime_ns


def _refuse(error: OSError) -> None:
    with explain_read_errors(error.filename):
        raise error


def look_up(address: str | Path) -> tuple[bool, Any]:
    """Whether this is a folder, and its `file_key`; raises unless it is a folder or a file."""
    with explain_read_errors(address):
        if is_remote(address):
            fs, path = remote(str(address))
            return str(fs.info(path)["type"]) == "directory", file_key(address)
        try:
            about = os.stat(address)
        except ValueError as error:  # a NUL in its name
            raise OSError(str(error)) from error
    if not stat.S_ISDIR(about.st_mode) and not stat.S_ISREG(about.st_mode):
        # Reading a pipe or a device may never end.
        raise ArgumentError(
            f"{address}: must be a file or a folder, got a pipe, socket or device. "
            "Copy its content to a file."
        )
    return stat.S_ISDIR(about.st_mode), (about.st_dev, about.st_ino)


def is_folder(address: str | Path) -> bool:
    """Whether this is a folder; raises unless it is a folder or a regular file."""
    return look_up(address)[0]


def file_key(address: str | Path) -> Any:
    """Return a value that is equal for all paths of one file, whether or not it exists."""
    if is_remote(address):
        fs, path = remote(str(address))
        if "file" not in (fs.protocol if isinstance(fs.protocol, tuple) else (fs.protocol,)):
            return str(address)
        address = path
    try:
        about = os.stat(address)
    except (OSError, ValueError):
        return os.path.realpath(address)
    return about.st_dev, about.st_ino


def walk(folder: str) -> Iterator[tuple[str, list[str], list[str]]]:
    """Walk a folder from the top, as os.walk does; removing a folder's name leaves it out."""
    if not is_remote(folder):
        yield from os.walk(folder, onerror=_refuse)
        return
    fs, path = remote(folder)
    fs.invalidate_cache()
    with explain_read_errors(folder):
        for root, folders, names in fs.walk(path, on_error="raise"):
            yield _replace_link(folder, fs.unstrip_protocol(root)), folders, names


def join(folder: str, name: str) -> str:
    """The address of a file in a folder."""
    if not is_remote(folder):
        return os.path.join(folder, name)
    link = _split_chain(folder)[1]
    return _replace_link(folder, f"{link}{'' if link.endswith('/') else '/'}{name}")


def below(folder: str, address: str) -> str:
    """The path of a file from the folder that it was found in by `walk`."""
    if not is_remote(folder):
        return os.path.relpath(address, folder)
    fs, path = remote(folder)
    return _split_chain(address)[1][len(fs.unstrip_protocol(path).rstrip("/")) :].lstrip("/")


def parts_of(address: str) -> list[str]:
    """Folders and name, by which files are sorted."""
    if is_remote(address):
        return _split_chain(address)[1].split("/")
    return address.replace(os.sep, "/").split("/")
