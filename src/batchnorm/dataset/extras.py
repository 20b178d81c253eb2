"""Optional packages, imported when a data set needs them."""

from __future__ import annotations

from ..extras import import_extra as import_extra


def first_line(error: BaseException) -> str:
    """Return the first line of a package's error message, or its type if it has none."""
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__
