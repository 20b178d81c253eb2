"""Reading ahead in a thread."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def prefetch(items: Iterator[T]) -> Generator[T, None, None]:
    """Yield the same items, each made in a thread while the one before it is worked on."""
    done = object()
    with ThreadPoolExecutor(1, "batchnorm-read") as thread:
        try:
            pending = thread.submit(next, items, done)
            while (item := pending.result()) is not done:
                pending = thread.submit(next, items, done)
                yield item  # type: ignore[misc]
        finally:
            # A generator must be closed in the thread that runs it: it owns files and readers.
            pending.cancel()
            close = getattr(items, "close", None)
            if close is not None:
                thread.submit(close).result()
