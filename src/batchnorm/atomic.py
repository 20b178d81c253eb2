"""Files that are whole or not there, whatever happens while they are written."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from .errors import ArgumentError

__all__ = ["check_place", "replacing", "write_all"]


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
    if out.exists() and not out.is_file():
        found = "a directory" if out.is_dir() else "neither a file nor free"
        raise ArgumentError(
            f"out must be the path of {kind} to write, got {str(out)!r}, which is {found}. "
            f"Name a file, such as {str(out / example if out.is_dir() else example)!r}."
        )
    parent = out.parent
    if not parent.is_dir():
        raise ArgumentError(
            f"out must lie in an existing directory, got {str(out)!r}, but {str(parent)!r} is "
            "none. Create the directory first, or name another."
        )
    # Permission bits do not tell all (a superuser, a read-only file system): try.
    trial = _sibling(out)
    try:
        trial.touch(exist_ok=False)
        trial.unlink()
    except OSError as error:
        raise ArgumentError(
            f"out must lie in a writable directory, got {str(out)!r}, but nothing can be written "
            f"in {str(parent)!r} ({error.strerror}). Change its permissions, or name another."
        ) from error


def _sibling(out: Path) -> Path:
    return out.with_name(f".{out.name}.{os.getpid()}.partial")
