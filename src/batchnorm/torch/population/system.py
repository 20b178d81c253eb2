"""Limits of the operating system and habits of the C library: threads, memory, interrupts."""

from __future__ import annotations

import ctypes
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

# Most threads that may exist at once, including those of the OpenMP pools.
_MOST_THREADS = 1024


def most_threads() -> int:
    """How many threads may run a model: an eighth of what the system allows, and a constant.

    A thread that has used OpenMP keeps a pool of its own, whose threads count as well.
    """
    limits = [8 * _MOST_THREADS]
    with suppress(ImportError, OSError, ValueError):  # not on Windows
        import resource

        limits.append(resource.getrlimit(resource.RLIMIT_NPROC)[0])
    for name in ("/sys/fs/cgroup/pids.max", "/sys/fs/cgroup/pids/pids.max"):
        with suppress(OSError, ValueError):  # "max"
            limits.append(int(Path(name).read_text()))
    threads = min(limit for limit in limits if limit > 0) // 8
    return max(1, threads // max(1, torch.get_num_threads()))


def return_freed_memory() -> None:
    """Return to the system what the C library keeps of freed memory.

    glibc keeps some for each thread; together this may be as much as is in use.
    """
    with suppress(OSError, TypeError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


@contextmanager
def interrupts_delayed() -> Iterator[None]:
    """Delay interrupts (Ctrl-C) until the block has ended."""
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return
    delayed: list[Any] = []
    signal.signal(signal.SIGINT, lambda *arguments: delayed.append(arguments))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if delayed:
            before(*delayed[0])
