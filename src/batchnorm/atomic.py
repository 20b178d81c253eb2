"""Files that are whole or not there, if what writes them raises or is interrupted.

A process that is killed, by SIGTERM as by SIGKILL, leaves ``.NAME.PID.partial`` beside the file,
and nothing waits for the disk: what a loss of power does is up to the file system.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from .errors import ArgumentError

__all__ = ["check_place", "explain_write_errors", "replacing", "write_all"]


@contextlib.contextmanager
def explain_write_errors(path: Path) -> Iterator[None]:
    """Name the file in what the system says when it cannot be written."""
    try:
        yield
    except BrokenPipeError:
        raise  # the reader of a pipe has gone: nothing is wrong with a file
    except OSError as error:
        raise ArgumentError(
            f"{path}: cannot be written ({error.strerror or error}). Make room, or name another "
            "file."
        ) from error


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a path beside `path` to write to; it takes the place of `path` if the block succeeds.

    The folder is made where there is none. What an exception leaves behind is removed.
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
    """Write files so that each is whole or untouched; the first is replaced when all are there."""
    with contextlib.ExitStack() as pending:
        for path, content in contents.items():
            pending.enter_context(replacing(path)).write_bytes(content)


def check_place(out: Path, kind: str, example: str) -> None:
    """Refuse a path that could not be written in the end, before the work is done.

    Parameters
    ----------
    out
        The file to write.
    kind, example
        What it is to hold, as in "an HTML file", and what it may be called.

    Raises
    ------
    ArgumentError
        It is not a file, its folder does not exist, or nothing can be written there.
    """
    # os.path, since pathlib raises where a name is too long or a directory may not be searched.
    is_dir = os.path.isdir(out)
    if os.path.exists(out) and not os.path.isfile(out):
        found = "a directory" if is_dir else "neither a file nor free"
        raise ArgumentError(
            f"out must be the path of {kind} to write, got {str(out)!r}, which is {found}. "
            f"Name a file, such as {str(out / example if is_dir else example)!r}."
        )
    parent = out.parent
    if not os.path.isdir(parent):
        raise ArgumentError(
            f"out must lie in an existing directory, got {str(out)!r}, but {str(parent)!r} is "
            "none. Create the directory first, or name another."
        )
    # Permission bits do not tell all (a superuser, a read-only file system): try.
    trial = _sibling(out)
    try:
        trial.touch(exist_ok=False)
        trial.unlink()
    except (OSError, ValueError) as error:
        raise ArgumentError(
            f"out must lie in a writable directory, got {str(out)!r}, but it cannot be written in "
            f"{str(parent)!r} ({getattr(error, 'strerror', None) or error}). Change its "
            "permissions, or name another."
        ) from error


def _sibling(out: Path) -> Path:
    return out.with_name(f".{out.name}.{os.getpid()}.partial")
