"""Progress of long work, in bytes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from .sources import Source

#: Called with the name of what is being read, the bytes done, and the bytes in all.
Progress = Callable[[str, int, int], None]


class Meter:
    """Report how many bytes of some sources are done."""

    def __init__(self, sources: Sequence[Source], progress: Progress | None) -> None:
        self._whole, self._done, self._progress = sum(s.nbytes for s in sources), 0, progress

    def skip(self, nbytes: int) -> None:
        """Count bytes that were done before."""
        self._done += nbytes

    def advance(self, label: str, nbytes: int = 0) -> None:
        """Count bytes of the source with this label, and report."""
        self._done = min(self._done + nbytes, self._whole)
        if self._progress is not None:
            self._progress(label, self._done, self._whole)

    def start(self, source: Source) -> Callable[[int], None]:
        """Report the start of a source; returns what counts its bytes."""
        self.advance(source.label)
        return partial(self.advance, source.label)
