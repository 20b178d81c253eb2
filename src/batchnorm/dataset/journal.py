"""A journal of the files that a run has measured, so that an interrupted run can resume."""

from __future__ import annotations

import contextlib
import json
import sqlite3
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ArgumentError
from ..moments import Moments
from .addresses import Fingerprint
from .parts import Part


class Journal:
    """A SQLite file of what was measured, by the fingerprints of files and the options.

    Runs with other options, or at the same time, do not disturb it. The file is made when
    something is first written down.

    Parameters
    ----------
    out
        The file that the run will write; the journal has the same name and ``.partial``.
    options
        Everything besides the files that the result depends on.
    """

    def __init__(self, out: Path, options: dict[str, Any]) -> None:
        self.path = out.with_name(f"{out.name}.partial")
        self._options = json.dumps(options, sort_keys=True)
        self._file: sqlite3.Connection | None = None
        if self.path.exists():
            try:
                self._open()
            except sqlite3.DatabaseError:  # cut short, or not a journal of this version
                self.close()
                self.path.unlink(missing_ok=True)

    def _open(self) -> None:
        self._file = sqlite3.connect(self.path, timeout=30)
        self._file.execute("PRAGMA synchronous = OFF")  # what a loss of power may cost is little
        self._file.execute(
            "CREATE TABLE IF NOT EXISTS measured "
            "(options TEXT, file TEXT, found BLOB, PRIMARY KEY (options, file))"
        )
        self._file.execute("SELECT options, file, found FROM measured LIMIT 1")

    def find(self, file: Fingerprint) -> bytes | None:
        """Return what was written down of a file, if it has not changed since."""
        if self._file is None:
            return None
        with self._explain():
            row = self._file.execute(
                "SELECT found FROM measured WHERE options = ? AND file = ?",
                (self._options, json.dumps(file)),
            ).fetchone()
        return None if row is None else bytes(row[0])

    def add(self, found: Iterable[tuple[Fingerprint, bytes]]) -> None:
        """Write down what was found in some files."""
        with self._explain():
            if self._file is None:
                self._open()
            assert self._file is not None
            with self._file:
                self._file.executemany(
                    "INSERT OR REPLACE INTO measured VALUES (?, ?, ?)",
                    ((self._options, json.dumps(file), data) for file, data in found),
                )

    def close(self) -> None:
        """Close the file, and keep it."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def remove(self) -> None:
        """Delete the file."""
        if self._file is not None:
            self.close()
            with contextlib.suppress(OSError):
                self.path.unlink()

    @contextlib.contextmanager
    def _explain(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise ArgumentError(
                f"{self.path}: cannot be written ({error}). Make room, or name another file by "
                "out=, --out."
            ) from error


def to_bytes(part: Part) -> bytes:
    """Write a part as bytes."""
    count = np.broadcast_to(part.moments.count, part.moments.mean.shape)
    rows = [count, part.moments.mean, part.moments.m2]
    if part.extremes is not None:
        rows += list(part.extremes)
    return part.total.to_bytes(16, "little") + np.stack(rows).astype("<f8").tobytes()


def from_bytes(data: bytes, features: int) -> Part | None:
    """Read a part of so many features; None if it is not one."""
    values = np.frombuffer(data, "<f8", offset=16)
    if features == 0 or values.size not in (3 * features, 5 * features):
        return None
    count, mean, m2, *extremes = values.reshape(-1, features)
    if (count == count[0]).all():
        count = count[0]
    return Part(
        Moments(count, mean, m2),
        int.from_bytes(data[:16], "little"),
        np.stack(extremes) if extremes else None,
    )
