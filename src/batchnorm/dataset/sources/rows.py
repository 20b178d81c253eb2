"""Text of delimited rows, in pieces that end where a row does."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import ArgumentError

BOM = b"\xef\xbb\xbf"
BREAKS = b"\r\n"


def whole_rows(
    read: Callable[[int], bytes], separator: bytes, size: int, label: str
) -> Iterator[bytes]:
    """Yield all text in pieces of about `size` bytes, none of which ends inside a row.

    A line break between quotation marks belongs to a value, and ends no row. As for other readers,
    a mark quotes only where it is the first character of a value.

    Parameters
    ----------
    read
        Reads so many bytes, fewer only at the end.
    separator
        What stands between the values of a row.
    size
        Bytes to read at a time, and so the longest row that there may be.
    label
        The file, for messages.

    Raises
    ------
    ArgumentError
        A quotation mark is not closed, or a row is longer than `size`.
    """
    rest, begin = b"", True
    while data := read(size):
        if begin:
            data, begin = data.removeprefix(BOM), False
        text = rest + data if rest else data
        end = end_of_rows(text, separator)
        if end == 0 and len(text) > size:
            raise ArgumentError(
                f"{label}: rows must be at most {size:,} bytes long, got a longer one, which "
                f"begins with {quote(text)}. If a quotation mark opens a value in it, close it."
            )
        if end:
            yield text[:end]
        rest = text[end:]
    if rest:
        if not _quoted(rest, separator)[2]:
            raise ArgumentError(
                f"{label}: a quotation mark that opens a value must be closed, got none up to the "
                f"end of the file for one in the row that begins with {quote(rest)}. The file may "
                "be cut short."
            )
        yield rest if rest.endswith((b"\r", b"\n")) else rest + b"\n"


def end_of_rows(text: bytes, separator: bytes) -> int:
    """Return the number of bytes up to the last line break that is known to end a row, or 0."""
    starts, ends, _ = _quoted(text, separator)
    # Behind a carriage return at the very end the other half of a line break may follow.
    stop = len(text) - text.endswith(b"\r")
    for k in range(len(starts) - 1, -1, -1):
        if (found := _last_break(text, int(ends[k]), stop)) >= 0:
            return found + 1
        stop = int(starts[k])
    return _last_break(text, 0, stop) + 1


def _last_break(text: bytes, start: int, stop: int) -> int:
    return max(text.rfind(b"\n", start, stop), text.rfind(b"\r", start, stop))


def _quoted(text: bytes, separator: bytes) -> tuple[NDArray[Any], NDArray[Any], bool]:
    """Find what is between quotation marks: starts and ends, and whether the last is closed."""
    if b'"' not in text:
        return np.empty(0, np.intp), np.empty(0, np.intp), True
    data = np.frombuffer(text, np.uint8)
    quotes = np.flatnonzero(data == ord('"'))
    # Usually each mark opens, closes, or is one of two that stand for a mark, and so every other
    # one opens, seemingly: it follows a separator, a line break or, of two, the other.
    before = np.where(quotes[::2] > 0, data[quotes[::2] - 1], ord("\n"))
    may_open = np.isin(before, np.frombuffer(separator + BREAKS, np.uint8))
    may_open[1:] |= quotes[2::2] == quotes[1:-1:2] + 1
    if may_open.all():
        ends, closed = quotes[1::2] + 1, quotes.size % 2 == 0
        return quotes[::2], ends if closed else np.append(ends, len(text)), closed
    # Some are characters like others, as in 5" wide.
    field = rb'(?:\A|[\r\n%s])"[^"]*(?:""[^"]*)*("|\Z)' % re.escape(separator)
    found = [(m.start(), m.end(), bool(m[1])) for m in re.finditer(field, text)]
    spans = np.array([span[:2] for span in found], np.intp).reshape(-1, 2)
    starts = spans[:, 0] + (data[spans[:, 0]] != ord('"'))
    return starts, spans[:, 1], not found or found[-1][2]


def quote(text: bytes | str) -> str:
    """Quote the beginning of a text for a message."""
    if isinstance(text, bytes):
        text = text[:160].decode(errors="replace")
    return repr(text) if len(text) <= 40 else f"{text[:40]!r}…"
