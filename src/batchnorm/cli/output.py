"""What several commands use: exit statuses, and how they print."""

import csv
import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

__all__ = [
    "DONE",
    "FOUND_WRONG",
    "INTERRUPTED",
    "UNUSABLE",
    "drop_output",
    "make_console",
    "many",
    "note",
    "split_names",
]

DONE, FOUND_WRONG, UNUSABLE, INTERRUPTED = 0, 1, 2, 130


def make_console(**options: Any) -> "Console":
    """Make a console that prints text unchanged, and raises if the reader of a pipe has exited."""
    from rich.console import Console

    class Piped(Console):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError  # rich would exit with 1

    return Piped(emoji=False, **options)


def drop_output() -> None:
    """Discard further output, or Python would report the same error again at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def note(text: str) -> None:
    """Print a line on stderr."""
    print(f"batchnorm: {text}", file=sys.stderr)


def many(number: int, what: str) -> str:
    """Return a number and its noun, in the plural unless the number is 1."""
    return f"{number} {what}{'s' * (number != 1)}"


def split_names(text: str | None) -> list[str] | None:
    """Split ``a,b,c``; names that contain commas are quoted."""
    if text is None:
        return None
    # Commas alone are a mistake, and are refused as a column without a name.
    parts = next(csv.reader([text], skipinitialspace=True), [])
    return [part.strip() for part in parts if part.strip()] or [""]
