"""Checks of arguments that `measure` and `normalize` have in common."""

from __future__ import annotations

import operator
from pathlib import Path
from typing import Any

from ..errors import ArgumentError
from .sources import FileOptions


def as_axis(channel_axis: Any) -> int:
    """Return an axis as a plain integer."""
    try:
        return operator.index(channel_axis)
    except TypeError:
        raise ArgumentError(f"channel_axis must be an integer, got {channel_axis!r}.") from None


def as_paths(source: Any) -> list[str | Path]:
    """Return the paths that `source` consists of, or none if it is an array."""
    if isinstance(source, (str, Path)):
        return [source]
    if isinstance(source, (list, tuple)):
        if not source:
            raise ArgumentError("source must be at least one file or folder, got none.")
        if any(isinstance(s, (str, Path)) for s in source):
            for s in source:
                if not isinstance(s, (str, Path)):
                    raise ArgumentError(
                        f"source must be paths or one array, got {type(s).__name__} beside paths. "
                        "Save it to a file, or measure it apart."
                    )
            return list(source)
    return []


def check_in_memory(options: FileOptions, client: Any = None) -> None:
    """Raise if an argument is given that does not apply to arrays in memory."""
    given = {
        "columns": options.columns is not None,
        "header": not options.header,
        "array": options.array is not None,
        "client": client is not None,
    }
    for name in (name for name, is_given in given.items() if is_given):
        raise ArgumentError(
            f"{name} must be left out for arrays in memory: it applies to files"
            f"{' and Dask arrays' if name == 'client' else ''} only."
        )
