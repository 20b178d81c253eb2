"""What an interrupted run has measured, kept beside the file it was to write."""

from __future__ import annotations

import base64
import contextlib
import json
import os
from pathlib import Path
from typing import IO, Any

import numpy as np

from ..atomic import replacing, writing
from ..moments import Moments
from .block import Measured
from .files import Identity
from .sources import File

FORMAT = "batchnorm journal 2"


class Journal:
    """One line for each file that has been measured, below a line with the options.

    A line holds, between tabs, the file's identity in JSON, the number of its values, and count,
    mean and m2 as the base64 of their bytes. A file counts as measured if its identity and the
    options are the same. A line that was being written when the run ended is no line.

    Parameters
    ----------
    out
        The file that the run is to write; the journal is called the same with ``.partial``.
    options
        All that the result depends on, beside the files.
    """

    def __init__(self, out: Path, options: dict[str, Any]) -> None:
        self.path = out.with_name(f"{out.name}.partial")
        self._first = json.dumps({"format": FORMAT, **options}, sort_keys=True).encode() + b"\n"
        self._old: IO[bytes] | None = None
        self._new: IO[bytes] | None = None
        #: Where a file's line begins: lines are long, and there may be many.
        self._lines: dict[bytes, int] = {}
        with contextlib.suppress(OSError):
            self._old = self.path.open("rb")
            at = len(first := self._old.readline())
            for line in self._old if first == self._first else ():
                if line.endswith(b"\n"):
                    self._lines[line.partition(b"\t")[0]] = at
                at += len(line)

    def find(self, source: File) -> Measured | None:
        """What a file was measured to be, if it has not changed since."""
        at = self._lines.get(_key(source.identity))
        if at is None or self._old is None:
            return None
        self._old.seek(at)
        try:
            _, seen, *arrays = self._old.readline().split(b"\t")
            count, mean, m2 = (np.frombuffer(base64.b64decode(text), "<f8") for text in arrays)
            moments = Moments(count[0] if count.size == 1 else count, mean, m2)
            measured = Measured(moments, int(seen))
        except ValueError:
            return None
        return measured if mean.size == source.features else None

    def add(self, source: File, measured: Measured) -> None:
        """Keep what a file was measured to be."""
        moments = measured.moments
        fields = [_key(source.identity), str(measured.seen).encode()]
        for values in (moments.count, moments.mean, moments.m2):
            fields.append(base64.b64encode(values.astype("<f8").tobytes()))
        with writing(self.path):
            if self._new is None:
                self._begin()
            assert self._new is not None
            self._new.write(b"\t".join(fields) + b"\n")
            self._new.flush()

    def _begin(self) -> None:
        """Begin afresh: without what was torn, or of other options.

        The file stays open. Another run with the same `out` puts its own in the place of this one,
        and neither writes into the other's.
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
        """Forget everything, for the run is done; unless it is another run's by now."""
        file = self._new or self._old
        with contextlib.suppress(OSError):
            if file is not None and os.path.samestat(os.fstat(file.fileno()), self.path.stat()):
                self.path.unlink()

    def close(self) -> None:
        """Close the files; what was kept stays."""
        for file in (self._old, self._new):
            if file is not None:
                with contextlib.suppress(OSError):  # of a full disk, which was said before
                    file.close()


def _key(identity: Identity) -> bytes:
    return json.dumps(identity).encode()
