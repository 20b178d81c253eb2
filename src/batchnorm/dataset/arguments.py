"""Checks of arguments that `measure` and `normalize` have in common."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..errors import ArgumentError
from ..moments import is_dask
from .sources import FileOptions


def as_axis(channel_axis: Any) -> int:
    """Return an axis as a plain integer."""
    try:
        return operator.index(channel_axis)
    except TypeError:
        raise ArgumentError(f"channel_axis must be an integer, got {channel_axis!r}.") from None


def as_source(source: Any) -> tuple[list[str | Path], Iterator[Any] | None]:
    """Tell paths, batches and a single array apart.

    Returns
    -------
    paths : list
        Paths and addresses; empty if it is something else.
    batches : iterator, or None
        Of arrays, if it is an iterator or a list of arrays with two axes or more.
    """
    if isinstance(source, (str, Path)):
        return [source], None
    if isinstance(source, Mapping):
        raise ArgumentError(
            f"source must be paths, one array or batches, got a {type(source).__name__} of several "
            "by name. Pass one of them."
        )
    several = isinstance(source, (list, tuple))
    one = hasattr(source, "__array__") or hasattr(source, "__arrow_c_stream__")
    one = one or is_dask(source) or not hasattr(source, "__iter__")
    if not several and one:
        return [], None
    items = iter(source)
    first = list(itertools.islice(items, 1))
    if not first:
        raise ArgumentError("source must be at least one file, folder or batch, got none.")
    items = itertools.chain(first, items)
    if several and not any(isinstance(s, (str, Path)) for s in source):
        if len(getattr(first[0], "shape", ())) < 2:  # numbers, or rows of one array
            return [], None
        if isinstance(source, tuple):
            raise ArgumentError(
                "source must be one array, or a list or an iterator of batches, got a tuple of "
                "arrays, as of inputs and targets. Pass the inputs alone, or a list."
            )
        return [], items
    if not isinstance(first[0], (str, Path)) and not several:
        return [], items
    paths = list(items)
    for s in paths:
        if not isinstance(s, (str, Path)):
            raise ArgumentError(
                f"source must be paths, one array or batches, got {type(s).__name__} beside "
                "paths. Save it to a file, or measure it apart."
            )
    return paths, None


def check_in_memory(options: FileOptions, **others: Any) -> None:
    """Raise if an argument is given that does not apply to arrays in memory."""
    given = {f.name: getattr(options, f.name) for f in fields(options)} | others
    left_out = {f.name: f.default for f in fields(options)}
    for name in (name for name, value in given.items() if value != left_out.get(name)):
        raise ArgumentError(
            f"{name} must be left out for arrays in memory: it applies to files"
            f"{' and Dask arrays' if name == 'client' else ''} only."
        )
