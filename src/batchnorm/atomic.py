"""Write files completely or not at all, also if writing raises or is interrupted.

A process that is killed, by SIGTERM or SIGKILL, leaves ``.NAME.PID.partial`` beside the file.
Nothing is synchronized to the disk: after a loss of power the file system decides.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from .errors import ArgumentError

__all__ = [
    "check_page",
    "check_place",
    "explain_write_errors",
    "is_same",
    "replacing",
    "write_all",
]


@contextlib.contextmanager
def explain_write_errors(path: Path) -> Iterator[None]:
    """Turn errors of the system into one line that names the file."""
    try:
        yield
    except BrokenPipeError:
        raise  # the reader of a pipe is gone: nothing is wrong with the file
    except OSError as error:
        raise ArgumentError(
            f"{path}: cannot be written ({error.strerror or error}). Make room, or name another "
            "file."
        ) from error


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`, which replaces `path` if the block succeeds.

    A missing folder is created. After an exception the temporary file is removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = _sibling(path)
    try:
        yield beside
        os.replace(beside, path)
    finally:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)


def write_all(contents: dict[Path, bytes]) -> None:
    """Write each file completely or not at all; none is replaced before all are written."""
    with contextlib.ExitStack() as pending:
        for path, content in contents.items():
            pending.enter_context(replacing(path)).write_bytes(content)


def check_page(out: Path, example: str) -> None:
    """Raise if a page could not be written, or a slip would put it in place of another file.

    Raises
    ------
    ArgumentError
        As `check_place`, or `out` does not end in .html or .htm.
    """
    check_place(out, "an HTML page", example)
    if out.suffix.lower() not in (".html", ".htm"):
        raise ArgumentError(
            f"out must be a page that ends in .html, got {str(out)!r}. Name it such as {example!r}."
        )


def is_same(one: Path, other: Path) -> bool:
    """Whether two paths lead to the same file, which need not exist."""
    try:
        return os.path.samefile(one, other)
    except OSError:
        return os.path.realpath(one) == os.path.realpath(other)


def check_place(out: Path, kind: str, example: str, name: str = "out") -> None:
    """Raise if a file could not be written, before the work for it begins.

    Parameters
    ----------
    out
        The file to write.
    kind, example
        The kind of file, as in "an HTML file", and an example of its name.
    name
        Of the argument or option, for messages.

    Raises
    ------
    ArgumentError
        `out` is a folder or a device, its folder does not exist, or it is not writable.
    """
    # os.path, since pathlib raises if a name is too long or a directory may not be searched.
    is_dir = os.path.isdir(out)
    if os.path.exists(out) and not os.path.isfile(out):
        found = "a directory" if is_dir else "not a regular file"
        raise ArgumentError(
            f"{name} must be the path of {kind} to write, got {str(out)!r}, which is {found}. "
            f"Name a file, such as {str(out / example if is_dir else example)!r}."
        )
    parent = out.parent
    if not os.path.isdir(parent):
        raise ArgumentError(
            f"{name} must lie in an existing directory, got {str(out)!r}, but {str(parent)!r} is "
            "not one. Create the directory first, or name another."
        )
    # Permission bits are not enough (a superuser, a read-only file system), so try.
    trial = _sibling(out)
    try:
        trial.touch(exist_ok=False)
        trial.unlink()
    except (OSError, ValueError) as error:
        raise ArgumentError(
            f"{name} must lie in a writable directory, got {str(out)!r}, but cannot write to "
            f"{str(parent)!r} ({getattr(error, 'strerror', None) or error}). Change its "
            "permissions, or name another."
        ) from error


def _sibling(out: Path) -> Path:
    return out.with_name(f".{out.name}.{os.getpid()}.partial")
