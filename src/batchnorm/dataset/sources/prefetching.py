"""Reading ahead in a thread."""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def prefetch(items: Iterator[T]) -> Generator[T, None, None]:
    """Yield the same items, each made in a thread while the one before it is worked on."""
    done, reading = object(), threading.Lock()

    def read() -> T | object:
        with reading:
            return next(items, done)

    with ThreadPoolExecutor(1, "batchnorm-read") as thread:
        try:
            pending = thread.submit(read)
            while (item := pending.result()) is not done:
                pending = thread.submit(read)
                yield item  # type: ignore[misc]
        finally:
            # Ctrl-C inside submit may leave a thread that reads and that nobody else knows of.
            with reading:
                close = getattr(items, "close", None)
                if close is not None:
                    close()
