"""Recordings and features as pages. Sees records and findings, and no framework."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from batchnorm.atomic import check_page, explain_write_errors, replacing
from batchnorm.errors import ArgumentError
from batchnorm.extras import require

if TYPE_CHECKING:
    from batchnorm.diagnose.recording import Recording

    from .records import Features

__all__ = ["check", "write", "write_features"]


def write(path: Path, recording: Recording, other: Recording | None = None) -> None:
    """Write one HTML page that needs nothing else.

    Parameters
    ----------
    path
        Of the page.
    recording, other
        What is shown, and what is shown beside it.

    Raises
    ------
    ArgumentError
        The page cannot be written there, or a recording has no snapshots.
    BatchNormError
        Altair or vl-convert is not installed.
    """
    for shown in (recording, other):
        if shown is not None and not shown.snapshots:
            raise ArgumentError(
                "a report needs a recording with at least one step, got one without. A step is a "
                "forward of the watched model itself, in training mode."
            )
    check(path)
    from .page import render

    _write(path, render(recording, other))


def write_features(path: Path, features: Features) -> None:
    """Write one HTML page that needs nothing else, of the features of a data set.

    Raises
    ------
    ArgumentError
        The page cannot be written there.
    BatchNormError
        Altair or vl-convert is not installed.
    """
    check(path)
    from .features import render

    _write(path, render(features))


def check(path: Path) -> None:
    """Raise if a page could not be written, before the work for it begins.

    Raises
    ------
    ArgumentError
        The page cannot be written there.
    BatchNormError
        Altair or vl-convert is not installed.
    """
    require("The report", "report", "altair", "vl_convert")
    check_page(path, "report.html")


def _write(path: Path, text: str) -> None:
    with explain_write_errors(path), replacing(path) as beside:
        beside.write_text(text, encoding="utf-8")
