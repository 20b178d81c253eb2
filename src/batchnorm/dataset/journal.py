"""A journal of the files that a run has measured, so that an interrupted run can resume."""

from __future__ import annotations

import contextlib
import json
import math
import sqlite3
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ArgumentError
from ..moments import Moments
from .addresses import Fingerprint
from .parts import Part

#: Seconds between two writes, and so what a killed run loses: each takes longer than a small file.
WRITE_SECONDS = 0.1


#: How SQLite's files begin.
MARK = b"SQLite format 3\0"


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
        self._waiting: list[tuple[str, str, bytes]] = []
        self._written = -math.inf
        if self.path.exists():
            with self.path.open("rb") as file:
                begin = file.read(len(MARK))
            if not MARK.startswith(begin):
                raise ArgumentError(
                    f"out must leave {str(self.path)!r} to what an interrupted run keeps, but that "
                    "is another file. Move it away, or choose another name."
                )
            try:
                self._open()
            except sqlite3.DatabaseError as error:
                self._begin_anew(error)

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
        try:
            row = self._file.execute(
                "SELECT found FROM measured WHERE options = ? AND file = ?",
                (self._options, json.dumps(file)),
            ).fetchone()
        except sqlite3.DatabaseError as error:
            self._begin_anew(error)
            return None
        return row[0] if row and isinstance(row[0], bytes) else None

    def add(self, file: Fingerprint, found: bytes) -> None:
        """Write down what was found in a file, at once or soon."""
        self._waiting.append((self._options, json.dumps(file), found))
        if time.monotonic() >= self._written + WRITE_SECONDS:
            self._write()

    def _write(self) -> None:
        try:
            if self._file is None:
                self._open()
            assert self._file is not None
            with self._file:
                self._file.executemany(
                    "INSERT OR REPLACE INTO measured VALUES (?, ?, ?)", self._waiting
                )
        except sqlite3.Error as error:
            raise self._unusable(error) from error
        self._waiting, self._written = [], time.monotonic()

    def close(self) -> None:
        """Write what is left, if possible, close the file, and keep it."""
        if self._waiting:
            with contextlib.suppress(ArgumentError):  # what ended the run matters more
                self._write()
        self._waiting = []
        if self._file is not None:
            self._file.close()
            self._file = None

    def remove(self) -> None:
        """Delete the file."""
        self._waiting = []
        if self._file is not None:
            self.close()
            with contextlib.suppress(OSError):
                self.path.unlink()

    def _begin_anew(self, error: sqlite3.DatabaseError) -> None:
        """Delete a file that is damaged or of another version; raise if it is only out of reach."""
        if isinstance(error, sqlite3.OperationalError) and "no such" not in str(error):
            raise self._unusable(error) from error
        self.close()
        self.path.unlink(missing_ok=True)

    def _unusable(self, error: sqlite3.Error) -> ArgumentError:
        return ArgumentError(
            f"{self.path}: cannot be used ({error}). Make room, end other runs, or name another "
            "file by out=, --out."
        )


def to_bytes(part: Part) -> bytes:
    """Write a part as bytes, a checksum first."""
    m = part.moments
    rows = np.empty((3 if part.extremes is None else 5, m.mean.size), "<f8")
    rows[0], rows[1], rows[2] = m.count, m.mean, m.m2
    if part.extremes is not None:
        rows[3:] = part.extremes
    data = part.total.to_bytes(16, "little") + rows.tobytes()
    return zlib.crc32(data).to_bytes(4, "little") + data


def from_bytes(data: bytes, features: int) -> Part | None:
    """Read a part of so many features; None if it is not one."""
    check, data = data[:4], data[4:]
    if features == 0 or zlib.crc32(data).to_bytes(4, "little") != check:
        return None
    if len(data) - 16 not in (24 * features, 40 * features):
        return None
    count, mean, m2, *extremes = np.frombuffer(data, "<f8", offset=16).reshape(-1, features)
    if (count == count[0]).all():
        count = count[0]
    return Part(
        Moments(count, mean, m2),
        int.from_bytes(data[:16], "little"),
        np.stack(extremes) if extremes else None,
    )
