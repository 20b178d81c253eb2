"""What the numbers were measured on, how many threads every provider gets, and who disturbed."""

import contextlib
import datetime
import importlib
import importlib.metadata
import math
import os
import platform
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from batchnorm.errors import ArgumentError, BatchNormError
from batchnorm.workers import usable_cpus

PACKAGES = ("numpy", "torch", "jax", "jaxlib")

#: The share of the processors that other programs may take before a run says so.
QUIET = 0.05


def resolve_threads(threads: int | None) -> int:
    """Threads for every provider: as asked, else ``OMP_NUM_THREADS``, else all there are."""
    available = usable_cpus()
    if threads is None:
        from_environment = os.environ.get("OMP_NUM_THREADS", "")
        return min(int(from_environment), available) if from_environment.isdigit() else available
    if not 1 <= threads <= available:
        raise ArgumentError(
            f"threads must be between 1 and {available}, the processors this process may use, "
            f"got {threads}. Leave it out to use all {available}."
        )
    return threads


@contextlib.contextmanager
def limited_threads(threads: int) -> Iterator[None]:
    """Give every provider that starts its threads in here the same number of them.

    OpenMP, which batchnorm and PyTorch share, is told. JAX has no setting but counts the processors
    that the process may run on, so that number is lowered too.

    It needs threadpoolctl, unless there are no more processors than `threads`.
    """
    if threads == usable_cpus() and "OMP_NUM_THREADS" not in os.environ:
        yield
        return
    try:
        threadpoolctl: Any = importlib.import_module("threadpoolctl")
    except ImportError:
        raise BatchNormError(
            f"threads can be {threads} only if threadpoolctl is installed, and it is not. "
            f"pip install threadpoolctl adds it; or use all {usable_cpus()} processors."
        ) from None
    affinity = os.sched_getaffinity(0) if sys.platform == "linux" else None
    try:
        if affinity is not None:
            os.sched_setaffinity(0, sorted(affinity)[:threads])
        with threadpoolctl.threadpool_limits(limits=threads):
            yield
    finally:
        if affinity is not None:
            os.sched_setaffinity(0, affinity)


def describe(*, threads: int) -> dict[str, Any]:
    """Collect what a reader needs to judge the numbers, and nothing that names the machine."""
    import batchnorm

    config = batchnorm.show_config()
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "cpu": cpu_name(),
        "cpus": usable_cpus(),
        "threads": threads,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": versions(),
        "instruction_set": config["instruction_set"],
        "openmp": config["openmp"],
        "last_level_cache": config["last_level_cache"],
    }


def busy_seconds_of_others() -> float:
    """Processor seconds that all programs but this one have taken; NaN everywhere but on Linux."""
    try:
        total = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    except OSError:
        return math.nan
    # user, nice, system, idle, iowait, irq, softirq, steal; what follows is contained in user.
    ticks = [int(value) for value in total[:8]]
    own = os.times()
    busy = sum(ticks) - ticks[3] - ticks[4]
    return busy / os.sysconf("SC_CLK_TCK") - sum(own[:4])


@contextlib.contextmanager
def noting_others(environment: dict[str, Any]) -> Iterator[None]:
    """Note in `environment` the share of the processors that other programs take in the block."""
    begin, others = time.perf_counter(), busy_seconds_of_others()
    yield
    available = usable_cpus() * (time.perf_counter() - begin)
    share = (busy_seconds_of_others() - others) / available
    environment["share_of_others"] = None if math.isnan(share) else round(share, 3)


def disturbance(environment: dict[str, Any]) -> str | None:
    """A warning for a run that other programs disturbed, or None."""
    share = environment.get("share_of_others") or 0.0
    if share <= QUIET:
        return None
    return (
        f"other programs took {share:.0%} of the processors during the run, and threads that wait "
        "for one another wait for those too; numbers to keep need an idle machine"
    )


def cpu_name() -> str:
    """Model of the processor, as the operating system calls it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() in {"model name", "Model"}:
                return value.strip()
    return platform.processor() or platform.machine() or "unknown"


def versions() -> dict[str, str]:
    """Versions of the packages that are measured, those that are installed."""
    import batchnorm

    # The metadata knows nothing of a checkout that is imported in place.
    found = {"batchnorm": batchnorm.__version__}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found
