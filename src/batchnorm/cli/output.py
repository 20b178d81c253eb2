"""What several commands use: exit statuses, and how they print."""

import contextlib
import csv
import errno
import io
import os
import sys
from typing import TYPE_CHECKING, Any, TextIO, TypeGuard

from batchnorm.errors import BatchNormError, printable

if TYPE_CHECKING:
    from rich.console import Console

__all__ = [
    "DONE",
    "FOUND_WRONG",
    "INTERRUPTED",
    "UNUSABLE",
    "drop_broken_output",
    "drop_output",
    "is_output_error",
    "make_console",
    "many",
    "note",
    "split_names",
]

DONE, FOUND_WRONG, UNUSABLE, INTERRUPTED = 0, 1, 2, 130

#: How writing to a redirected file fails; the error names no file.
OUTPUT_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF}


def make_console(**options: Any) -> "Console":
    """Make a console that prints text without control characters, while its reader listens.

    What the command does beside printing goes on.
    """
    from rich.console import Console

    class Piped(Console):
        def on_broken_pipe(self) -> None:
            drop_output()  # rich would exit with 1

        def print(self, *objects: Any, **more: Any) -> None:
            texts = (printable(o, keep="\n") if isinstance(o, str) else o for o in objects)
            super().print(*texts, **more)

    return Piped(emoji=False, **options)


def is_output_error(error: BaseException) -> TypeGuard[OSError]:
    """Whether standard output could not be written."""
    if isinstance(error, BrokenPipeError):
        return True
    return isinstance(error, OSError) and error.filename is None and error.errno in OUTPUT_ERRORS


def drop_output() -> None:
    """Discard further output, or Python would report the same error again at exit."""
    _drop(sys.stdout)


def drop_broken_output() -> None:
    """Discard what is still to be written if it cannot be."""
    try:
        sys.stdout.flush()
    except OSError:
        _drop(sys.stdout)


def note(text: str) -> None:
    """Print a line on stderr, if that can be written."""
    try:
        print(f"batchnorm: {printable(' '.join(text.split()))}", file=sys.stderr)
    except OSError:
        _drop(sys.stderr)


def _drop(stream: TextIO) -> None:
    with contextlib.suppress(io.UnsupportedOperation):  # it has no file
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def many(number: int, what: str) -> str:
    """Return a number and its noun, in the plural unless the number is 1."""
    return f"{number} {what}{'s' * (number != 1)}"


def split_names(text: str | None) -> list[str] | None:
    """Split ``a,b,c``; names that contain commas are quoted."""
    if text is None:
        return None
    try:
        parts = next(csv.reader([text], skipinitialspace=True, strict=True), [])
    except csv.Error as error:
        raise BatchNormError(
            f"names must be separated by commas and quoted as in a .csv file, got {text!r} "
            f"({error})."
        ) from None
    # Commas alone are a mistake, and are refused as a column without a name.
    return [part for part in parts if part] or [""]
