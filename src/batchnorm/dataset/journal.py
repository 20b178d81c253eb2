"""A journal of the files that a run has measured, so that an interrupted run can resume."""

from __future__ import annotations

import base64
import contextlib
import json
import os
from pathlib import Path
from typing import IO, Any

import numpy as np

from ..atomic import explain_write_errors, replacing
from ..moments import Moments
from .files import Fingerprint
from .parts import Part
from .sources import FileSource

FORMAT = "batchnorm journal 2"


class Journal:
    """One line for each file that has been measured, below a line with the options.

    A line holds, separated by tabs, the file's fingerprint in JSON, the number of its values, and
    count, mean and m2 in base64. A file counts as measured if its fingerprint and the options are
    the same. A last line without its end, from a run that was killed, is ignored.

    Parameters
    ----------
    out
        The file that the run will write; the journal has the same name and ``.partial``.
    options
        Everything besides the files that the result depends on.
    """

    def __init__(self, out: Path, options: dict[str, Any]) -> None:
        self.path = out.with_name(f"{out.name}.partial")
        self._first = json.dumps({"format": FORMAT, **options}, sort_keys=True).encode() + b"\n"
        self._old: IO[bytes] | None = None
        self._new: IO[bytes] | None = None
        #: Where each file's line begins; lines are long, and there may be many.
        self._lines: dict[bytes, int] = {}
        with contextlib.suppress(OSError):
            self._old = self.path.open("rb")
            at = len(first := self._old.readline())
            for line in self._old if first == self._first else ():
                if line.endswith(b"\n"):
                    self._lines[line.partition(b"\t")[0]] = at
                at += len(line)

    def find(self, source: FileSource) -> Part | None:
        """Return the moments of a file that has been measured and has not changed since."""
        at = self._lines.get(_key(source.fingerprint))
        if at is None or self._old is None:
            return None
        self._old.seek(at)
        try:
            _, total, *arrays = self._old.readline().split(b"\t")
            count, mean, m2 = (np.frombuffer(base64.b64decode(text), "<f8") for text in arrays)
            moments = Moments(count[0] if count.size == 1 else count, mean, m2)
            part = Part(moments, int(total))
        except ValueError:
            return None
        return part if mean.size == source.features else None

    def add(self, source: FileSource, part: Part) -> None:
        """Write down the moments of a file."""
        moments = part.moments
        fields = [_key(source.fingerprint), str(part.total).encode()]
        for values in (moments.count, moments.mean, moments.m2):
            fields.append(base64.b64encode(values.astype("<f8").tobytes()))
        with explain_write_errors(self.path):
            if self._new is None:
                self._begin()
            assert self._new is not None
            self._new.write(b"\t".join(fields) + b"\n")
            self._new.flush()

    def _begin(self) -> None:
        """Start a new file with the valid lines of the old one.

        The file stays open. Another run with the same `out` replaces it by its own, so that neither
        writes into the journal of the other.
        """
        with replacing(self.path) as beside:
            file = beside.open("wb")
            try:
                file.write(self._first)
                for at in self._lines.values():
                    assert self._old is not None
                    self._old.seek(at)
                    file.write(self._old.readline())
                file.flush()
            except BaseException:
                file.close()
                raise
        self._new = file

    def remove(self) -> None:
        """Delete the file, unless another run has replaced it."""
        file = self._new or self._old
        with contextlib.suppress(OSError):
            if file is not None and os.path.samestat(os.fstat(file.fileno()), self.path.stat()):
                self.path.unlink()

    def close(self) -> None:
        """Close the file, and keep it."""
        for file in (self._old, self._new):
            if file is not None:
                with contextlib.suppress(OSError):  # a full disk, which has been reported
                    file.close()


def _key(fingerprint: Fingerprint) -> bytes:
    return json.dumps(fingerprint).encode()
