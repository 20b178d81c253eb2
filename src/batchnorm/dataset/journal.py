"""What an interrupted run has measured, kept beside the file it was to write."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from ..atomic import replacing
from ..errors import ArgumentError
from ..moments import Moments
from .block import Measured
from .sources import Source

FORMAT = "batchnorm journal 1"


class Journal:
    """One line of JSON for each file that has been measured, below a line with the options.

    A file counts as measured if the line names its path, size and time of change, and the options
    are the same. A line that was being written when the run ended is no line.

    Parameters
    ----------
    out
        The file that the run is to write; the journal is called the same with ``.partial``.
    options
        All that the result depends on, beside the files.
    """

    def __init__(self, out: Path, options: dict[str, Any]) -> None:
        self.path = out.with_name(f"{out.name}.partial")
        self._first = json.dumps({"format": FORMAT, **options}, sort_keys=True)
        self._done: dict[str, str] = {}
        with contextlib.suppress(OSError, UnicodeDecodeError):
            lines = self.path.read_text(encoding="utf-8").split("\n")
            if lines[0] == self._first:
                for line in lines[1:-1]:  # what follows the last line's end is not whole
                    with contextlib.suppress(ValueError, KeyError, TypeError):
                        self._done[_key(json.loads(line)["file"])] = line
        self._begun = False

    def find(self, source: Source) -> Measured | None:
        """What a file was measured to be, if it has not changed since."""
        line = self._done.get(_key(_identity(source)))
        if line is None:
            return None
        try:
            kept = json.loads(line)
            moments = Moments(*(np.asarray(kept[name]) for name in ("count", "mean", "m2")))
            missing = np.asarray(kept["missing"], np.int64)
        except (ValueError, KeyError, TypeError):
            return None
        if moments.mean.shape != (source.features,) or missing.shape != moments.mean.shape:
            return None
        return Measured(moments, missing)

    def add(self, source: Source, measured: Measured) -> None:
        """Keep what a file was measured to be."""
        identity = _identity(source)
        line = json.dumps(
            {
                "file": identity,
                "count": measured.moments.count.tolist(),
                "mean": measured.moments.mean.tolist(),
                "m2": measured.moments.m2.tolist(),
                "missing": measured.missing.tolist(),
            }
        )
        self._done[_key(identity)] = line
        try:
            if not self._begun:  # afresh: without what was torn, or of other options
                with replacing(self.path) as beside:
                    beside.write_text("\n".join([self._first, *self._done.values(), ""]))
                self._begun = True
                return
            with self.path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:
            raise ArgumentError(
                f"{self.path}: cannot be written ({error.strerror or error}). Make room, or name "
                "another file."
            ) from error

    def remove(self) -> None:
        """Forget everything: the run is done."""
        self.path.unlink(missing_ok=True)


def _identity(source: Source) -> list[Any]:
    """Path, array, size and time of change."""
    path = os.path.realpath(getattr(source, "path", ""))
    about = os.stat(path)
    return [path, getattr(source, "member", None), about.st_size, about.st_mtime_ns]


def _key(identity: Any) -> str:
    return json.dumps(identity)
