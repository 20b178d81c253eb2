"""What a page of features shows: plain arrays and texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["Features", "Note", "Table"]

Float64 = NDArray[np.float64]


class Note(NamedTuple):
    """Something worth knowing about some features.

    Attributes
    ----------
    kind : str
        In a word, for the rows of the features.
    what, remedy : str
        In a sentence or two each.
    features : tuple of int
        Empty if it is not about single features.
    """

    kind: str
    what: str
    remedy: str = ""
    features: tuple[int, ...] = ()


class Table(NamedTuple):
    """Another table of the page: what, and a few words on it."""

    title: str
    rows: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Features:
    """The statistics of C features of a data set.

    Parameters
    ----------
    title : str
        Name of the data set.
    count, missing, mean, std : (C,)
        Numbers of present and missing values; mean and biased standard deviation.
    extremes : (2, C), or None
        The least and the greatest values.
    names : C names, or None
        None for 0, 1, …
    scale : float
        What all values were divided by.
    files : names of files
        In their order.
    notes : Notes
        Hints and remarks, in the order in which they are shown.
    ready : str
        A line to copy, such as one for torchvision; empty for none.
    tables : Tables
        Shown below, such as what stands out among images.
    """

    title: str
    count: Float64
    missing: NDArray[np.int64]
    mean: Float64
    std: Float64
    extremes: Float64 | None = None
    names: Sequence[str] | None = None
    scale: float = 1.0
    files: Sequence[str] = ()
    notes: Sequence[Note] = ()
    ready: str = ""
    tables: Sequence[Table] = ()
