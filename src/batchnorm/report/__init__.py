"""A recording as a page, or on the terminal. Sees records and findings, and no framework."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from batchnorm.atomic import check_place, explain_write_errors, replacing
from batchnorm.errors import ArgumentError
from batchnorm.extras import require

if TYPE_CHECKING:
    from batchnorm.diagnose.recording import Recording

__all__ = ["write"]


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
    require("The report", "report", "altair", "vl_convert")
    for shown in (recording, other):
        if shown is not None and not shown.snapshots:
            raise ArgumentError(
                "a report needs a recording with at least one step, got one without. A step is a "
                "forward of the watched model itself, in training mode."
            )
    check_place(path, "an HTML page", "report.html")
    from .page import render

    text = render(recording, other)
    with explain_write_errors(path), replacing(path) as beside:
        beside.write_text(text, encoding="utf-8")
