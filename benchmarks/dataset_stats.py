"""Time `batchnorm stats` beside `cat` and scikit-learn's `StandardScaler.partial_fit`.

python benchmarks/dataset_stats.py --size 20GB --out benchmarks/results
python benchmarks/dataset_stats.py --size 4GB --rounds 9 --cache warm
python benchmarks/dataset_stats.py

The first writes dataset_stats.csv and dataset_stats.json (what it was measured on), the others only
print; the last takes 256 MB. The data, a float32 array (N, 64) in a .npy file of the given size, is
made in --directory and removed in the end.

Values are multiples of 1/1024 near 10,000, normal with a deviation of 1, so that each is a float32
and every sum over them is known exactly, in whole numbers. One block of them is repeated with a
shift that differs from block to block.

In every round each provider reads the whole file once, in a process of its own, in an order drawn
anew. With ``--cache cold`` the system is told before to drop the file from its cache; with ``warm``
it has all been read before. What the system makes of that shows in the time of ``cat``, the floor.

``p20_ms, p50_ms, p80_ms``: from the start of the process to its end, imports included; ``ratio`` is
to ``cat``. ``gb_per_s``: size of the file over the median. ``peak_bytes``: most memory resident;
StandardScaler reads a memory map, as its users do, and the pages of the file that it has touched
count. ``mean_error, var_error``: largest difference over features to the exact value, relative to
the deviation and to the variance.

Exit status: 0 done; 1 a provider failed, or batchnorm missed what it promises (mean 1e-12·|mean|,
variance 1e-9, 500 MB); 2 the call was unusable; 130 interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import command
import numpy as np

from batchnorm.bench import memory
from batchnorm.bench.rows import TimedRow, timed
from batchnorm.bench.timing import Sample, interleave
from batchnorm.bench.worker import Worker
from batchnorm.errors import ArgumentError
from batchnorm.progress import steps

CAT, OURS, SKLEARN = "cat", "batchnorm stats", "StandardScaler.partial_fit"
PROVIDERS = (CAT, OURS, SKLEARN)

FEATURES = 64
BLOCK_ROWS = 1 << 16  # 16 MiB of float32
OFFSET = 10_000
SCALE = 1024  # values near OFFSET are multiples of 1 / SCALE: float32 has no finer ones there

#: What `batchnorm stats` promises; of the mean, relative to the mean.
LIMITS = {"mean_error": 1e-12 * OFFSET, "var_error": 1e-9, "peak_bytes": 500e6}


@dataclass(frozen=True, kw_only=True)
class Row(TimedRow):
    """One provider; a line of the CSV file."""

    cache: str
    bytes: int
    rows: int
    features: int = FEATURES
    gb_per_s: float = math.nan
    mean_error: float = math.nan
    var_error: float = math.nan


# --- data -----------------------------------------------------------------------------------------


def shift_of(block: int) -> int:
    """What a block is shifted by, in units of 1 / SCALE."""
    return (block * 7 % 17 - 8) * 16


def make(path: Path, blocks: int, seed: int) -> tuple[list[Fraction], list[Fraction]]:
    """Write the data; return the exact mean and biased variance of each feature."""
    noise = np.random.default_rng(seed).standard_normal((BLOCK_ROWS, FEATURES))
    whole = np.rint(noise * SCALE).astype(np.int64)
    header = {"descr": "<f4", "fortran_order": False, "shape": (blocks * BLOCK_ROWS, FEATURES)}
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for k in range(blocks):
            values = (whole + (shift_of(k) + OFFSET * SCALE)) / SCALE
            file.write(values.astype("<f4").data)
        file.flush()
        os.fsync(file.fileno())
    shifts = [shift_of(k) for k in range(blocks)]
    n, s1, s2 = blocks * BLOCK_ROWS, sum(shifts), sum(s * s for s in shifts)
    means, variances = [], []
    for a, b in zip(map(int, whole.sum(axis=0)), map(int, (whole**2).sum(axis=0)), strict=True):
        mean = Fraction(blocks * a + BLOCK_ROWS * s1, n)
        squares = Fraction(blocks * b + 2 * a * s1 + BLOCK_ROWS * s2, n)
        means.append((mean + OFFSET * SCALE) / SCALE)
        variances.append((squares - mean**2) / SCALE**2)
    return means, variances


# --- providers, each in a process of its own ------------------------------------------------------


class Reader:
    """One of the providers, in its process."""

    def read(self, provider: str, path: str) -> dict[str, Any]:
        """Go through the file; return mean, variance and the most memory resident."""
        if provider == OURS:
            from batchnorm.cli import main

            with tempfile.TemporaryDirectory() as folder:
                out = Path(folder, "s.json")
                with contextlib.redirect_stdout(io.StringIO()):
                    status = main(["stats", path, "--out", str(out)])
                if status:
                    sys.exit(status)
                content = json.loads(out.read_text())
            found = {"mean": content["mean"], "var": content["var"]}
        else:
            from sklearn.preprocessing import StandardScaler

            x, scaler = np.load(path, mmap_mode="r"), StandardScaler()
            for k in range(0, len(x), BLOCK_ROWS):
                scaler.partial_fit(x[k : k + BLOCK_ROWS])
            found = {"mean": scaler.mean_.tolist(), "var": scaler.var_.tolist()}
        return found | {"peak": memory.peak()}


def run_once(provider: str, path: Path) -> tuple[float, dict[str, Any]]:
    """Seconds from the start of the process to its end, and what it found."""
    begin, found = time.perf_counter(), {}
    if provider == CAT:
        subprocess.run(["cat", str(path)], stdout=subprocess.DEVNULL, check=True)
    else:
        with Worker(__file__, "Reader") as worker:
            found = worker.ask("read", provider=provider, path=str(path))
    return time.perf_counter() - begin, found


def largest(found: Sequence[float], exact: Sequence[Fraction], scale: Sequence[float]) -> float:
    """Largest difference to the exact values, each relative to its scale."""
    differences = (abs(float(Fraction(f) - e)) for f, e in zip(found, exact, strict=True))
    return max(d / s for d, s in zip(differences, scale, strict=True))


def measure_file(path: Path, blocks: int, options: argparse.Namespace) -> list[Row]:
    """Make the data, and time all providers on it."""
    answers: dict[str, list[dict[str, Any]]] = {provider: [] for provider in PROVIDERS}
    with steps(options.rounds * len(PROVIDERS) + 1) as started:
        started("writing the data")
        mean, var = make(path, blocks, options.seed)

        def take(provider: str) -> Sample:
            started(f"{len(answers[provider]) + 1} of {options.rounds}: {provider}")
            if options.cache == "cold":
                with path.open("rb") as file:
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            else:
                run_once(CAT, path)
            seconds, answer = run_once(provider, path)
            answers[provider].append(answer)
            return Sample(seconds)

        samples = interleave(
            {provider: partial(take, provider) for provider in PROVIDERS},
            min_rounds=options.rounds,
            seed=options.seed,
        )
    rows, size = [], path.stat().st_size
    for provider in PROVIDERS:
        row = Row(provider=provider, cache=options.cache, bytes=size, rows=blocks * BLOCK_ROWS)
        row = timed(row, samples[provider], samples[CAT])
        row = replace(row, gb_per_s=size / row.p50_ms * 1e-6)
        if provider != CAT:
            answer = answers[provider][-1]
            row = replace(
                row,
                peak_bytes=max(one["peak"] for one in answers[provider]),
                mean_error=largest(answer["mean"], mean, [float(v) ** 0.5 for v in var]),
                var_error=largest(answer["var"], var, list(map(float, var))),
            )
        rows.append(row)
    return rows


# --- the call -------------------------------------------------------------------------------------


def size_of(text: str) -> int:
    parts = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kMGT]?)B", text)
    if parts is None:
        raise argparse.ArgumentTypeError(f"must be a size such as 20GB, got {text!r}")
    return int(float(parts[1]) * {"": 1, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}[parts[2]])


def measure(options: argparse.Namespace, files: command.Files) -> list[str]:
    blocks = max(1, options.size // (BLOCK_ROWS * FEATURES * 4))
    with tempfile.TemporaryDirectory(dir=options.directory) as folder:
        free = shutil.disk_usage(folder).free
        if free < options.size * 1.05:
            raise ArgumentError(
                f"--size must fit on the disk, got {options.size / 1e9:.1f} GB, and there are "
                f"{free / 1e9:.1f}. Name another --directory."
            )
        rows = measure_file(Path(folder, "data.npy"), blocks, options)
    files["dataset_stats.csv"] = rows
    files["dataset_stats.json"] = {
        "seed": options.seed,
        "versions": {"scikit-learn": importlib.metadata.version("scikit-learn")},
    }
    columns = {
        "": "{0.provider}",
        "ms": "{0.p50_ms:.0f}",
        "GB/s": "{0.gb_per_s:.2f}",
        "times cat": "{0.ratio:.2f}",
        "peak MB": "{0.peak_mb:.0f}",
        "mean error": "{0.mean_error:.1e}",
        "var error": "{0.var_error:.1e}",
    }
    command.show(
        rows, columns, title=f"{rows[0].bytes / 1e9:.2f} GB, {options.cache} cache, mean/std 1e4"
    )
    (ours,) = (row for row in rows if row.provider == OURS)
    return [
        f"{OURS}: {name} is {value:.3g}, where at most {limit:g} is promised"
        for name, limit in LIMITS.items()
        if (value := getattr(ours, name)) > limit
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = command.make_parser(__file__, __doc__, rounds=3)
    add = parser.add_argument
    add("--size", type=size_of, default=256_000_000, help="of the file; 256MB if left out")
    add("--directory", type=Path, help="where to make the file; a temporary one if left out")
    add("--cache", choices=("cold", "warm"), default="cold", help="what the system remembers")
    return command.main(parser, measure, arguments, needs=("sklearn",))


if __name__ == "__main__":
    sys.exit(main())
