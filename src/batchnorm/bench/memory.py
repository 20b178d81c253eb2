"""The memory of this process: page faults, what is resident, and the most that was."""

import contextlib
import ctypes
import math
import os
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

try:
    import resource
except ImportError:  # Windows
    _resource: Any = None
else:
    _resource = resource


def minor_faults() -> float:
    """Pages that the operating system has given to this process; NaN where it does not tell."""
    return float(_resource.getrusage(_resource.RUSAGE_SELF).ru_minflt) if _resource else math.nan


def resident() -> float:
    """Bytes that are resident now; NaN everywhere but on Linux."""
    return _status("VmRSS")


def peak() -> float:
    """Most bytes resident since `reset_peak`, or since the start; NaN everywhere but on Linux.

    ``ru_maxrss`` is no substitute: a process inherits it from its parent, and it never falls.
    """
    return _status("VmHWM")


def reset_peak() -> bool:
    """Let `peak` start from what is resident now; False where the kernel does not offer this."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def available() -> float:
    """Bytes that this process may still take, about; infinity where the system does not tell."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        limit = math.inf
        with contextlib.suppress(OSError, ValueError):  # "max" is none
            limit = float(Path("/sys/fs/cgroup/memory.max").read_text())
        meminfo = Path("/proc/meminfo").read_text()
        return min(limit, float(meminfo.split("MemAvailable:")[1].split()[0]) * 1024)
    with contextlib.suppress(AttributeError, ValueError, OSError):  # not on Windows
        return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return math.inf


def peak_of(run: Callable[[], object]) -> float:
    """Memory that one call newly makes resident, at its peak, outputs included.

    This counts whoever allocates: NumPy, PyTorch, XLA or batchnorm. Memory kept from earlier calls
    would hide what this one needs, so the C library gives it back first (``malloc_trim``); the
    results of the earlier calls stay alive. Good to a few pages, which may be of 2 MB each; the
    median of three calls.

    Returns
    -------
    float
        Bytes; NaN everywhere but on Linux.
    """
    held, rises = [run()], []
    try:
        # Three, because a framework may free what it no longer needs a little later, in a thread
        # of its own, and so hide as much in one of them.
        for _ in range(3):
            _give_back()
            if not reset_peak():
                return math.nan
            before = peak()
            held.append(run())
            rises.append(max(0.0, peak() - before))
    finally:
        # So many results at once are more than the provider would otherwise keep memory for, and
        # memory that is reused less often is less likely to be in the cache.
        held.clear()
        _give_back()
    return statistics.median(rises)


def _give_back() -> None:
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def _status(key: str) -> float:
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{key}:"):
                return float(line.split()[1]) * 1024
    return math.nan
