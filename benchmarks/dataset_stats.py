"""Time `batchnorm stats` beside `cat` and scikit-learn's `StandardScaler.partial_fit`.

python benchmarks/dataset_stats.py --size 20GB --rounds 3 --out benchmarks/results/dataset_stats.csv
python benchmarks/dataset_stats.py --size 4GB --rounds 9 --cache warm --out dataset_stats_warm.csv
python benchmarks/dataset_stats.py

The first two write a CSV file and, beside it under the same name, a .json file with what it was
measured on; the last takes 256 MB and prints only. The data, a float32 array (N, 64) in a .npy file
of the given size, is made in --directory and removed in the end.

Values are multiples of 1/1024 near 10,000, normal with a deviation of 1, so that each is a float32
and every sum over them is known exactly, in whole numbers. One block of them is repeated with a
shift that differs from block to block.

In every round each provider goes through the whole file once, in a process of its own, in an order
drawn anew. With ``--cache cold`` the system is told before to forget the file; with ``warm`` it has
all been read before. What the system makes of that shows in the time of ``cat``, the floor.

``p50_s``
    Median seconds from the start of the process to its end, imports included.
``gb_per_s``
    Size of the file over that.
``ratio``
    Median over rounds of the time over that of ``cat`` in the same round.
``peak_bytes``
    Most memory resident (VmHWM). StandardScaler reads a memory map, as its users do; the pages of
    the file that it has touched count.
``mean_error, var_error``
    Largest difference over features to the exact value, relative to the deviation and to the
    variance.

Exit status: 0 done; 1 a provider failed, or ours missed what it promises (mean 1e-12·|mean|,
variance 1e-9, 500 MB); 2 the call was unusable; 130 interrupted.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import math
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from batchnorm.atomic import check_place, write_all
from batchnorm.bench.environment import busy_seconds_of_others, describe, usable_cpus
from batchnorm.bench.harness import QUIET, paired_ratio
from batchnorm.errors import ArgumentError, BatchNormError

CAT, OURS, SKLEARN = "cat", "batchnorm stats", "StandardScaler.partial_fit"
PROVIDERS = (CAT, OURS, SKLEARN)

FEATURES = 64
BLOCK_ROWS = 1 << 16  # 16 MiB of float32
OFFSET = 10_000
SCALE = 1024  # values near OFFSET are multiples of 1 / SCALE: float32 has no finer ones there

MEAN_ERROR, VAR_ERROR, PEAK_BYTES = 1e-12, 1e-9, 500e6


@dataclass(frozen=True)
class Row:
    """One provider; a line of the CSV file."""

    provider: str
    cache: str
    bytes: int
    rows: int
    features: int
    rounds: int
    p50_s: float
    least_s: float
    gb_per_s: float
    ratio: float
    peak_bytes: float | None
    mean_error: float | None
    var_error: float | None


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
    ones = whole.sum(axis=0)
    squares = (whole**2).sum(axis=0)
    shifts = [shift_of(k) for k in range(blocks)]
    n, s1, s2 = blocks * BLOCK_ROWS, sum(shifts), sum(s * s for s in shifts)
    means, variances = [], []
    for a, b in zip(map(int, ones), map(int, squares), strict=True):
        total = blocks * a + BLOCK_ROWS * s1
        total_squares = blocks * b + 2 * a * s1 + BLOCK_ROWS * s2
        mean = Fraction(total, n)
        means.append((mean + OFFSET * SCALE) / SCALE)
        variances.append((Fraction(total_squares, n) - mean**2) / SCALE**2)
    return means, variances


def forget(path: Path) -> None:
    """Ask the system to drop the file from its cache."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


# --- providers, each in a process of its own ------------------------------------------------------


def work(provider: str, path: str) -> None:
    """Go through the file, and print what was found as JSON."""
    if provider == OURS:
        from batchnorm.cli import main

        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder, "s.json")
            sys.stdout = io.StringIO()
            status = main(["stats", path, "--out", str(out)])
            sys.stdout = sys.__stdout__
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
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    print(json.dumps({**found, "peak": int(peak[1]) * 1024 if peak else None}))


def run_once(provider: str, path: Path) -> tuple[float, dict[str, Any]]:
    """Seconds, and what the process printed."""
    command = [sys.executable, __file__, "worker", provider, str(path)]
    begin = time.perf_counter()
    if provider == CAT:
        with open(os.devnull, "wb") as sink:
            done = subprocess.run(["cat", str(path)], stdout=sink, stderr=subprocess.PIPE)
    else:
        done = subprocess.run(command, capture_output=True)
    seconds = time.perf_counter() - begin
    if done.returncode:
        said = done.stderr.decode().strip().splitlines() or ["it said nothing"]
        raise BatchNormError(f"{provider} ended with status {done.returncode}: {said[-1]}")
    return seconds, json.loads(done.stdout) if provider != CAT else {}


def largest(found: Sequence[float], exact: Sequence[Fraction], scale: Sequence[float]) -> float:
    """Largest difference to the exact values, each relative to its scale."""
    differences = (abs(float(Fraction(f) - e)) for f, e in zip(found, exact, strict=True))
    return max(d / s for d, s in zip(differences, scale, strict=True))


def measure(path: Path, blocks: int, options: argparse.Namespace) -> tuple[list[Row], float]:
    """Make the data, and time all providers on it; also the share of other programs meanwhile."""
    from rich.console import Console
    from rich.progress import Progress

    errors = Console(stderr=True)
    seconds: dict[str, list[float]] = {provider: [] for provider in PROVIDERS}
    answers: dict[str, dict[str, Any]] = {}
    peaks: dict[str, int] = {}
    with Progress(console=errors, transient=True, disable=not errors.is_terminal) as bar:
        task = bar.add_task("writing the data", total=options.rounds * len(PROVIDERS) + 1)
        mean, var = make(path, blocks, options.seed)
        size = path.stat().st_size
        begin, others = time.perf_counter(), busy_seconds_of_others()
        order, shuffle = list(PROVIDERS), random.Random(options.seed)
        for k in range(options.rounds):
            shuffle.shuffle(order)
            for provider in order:
                bar.advance(task)
                bar.update(task, description=f"round {k + 1}: {provider}")
                if options.cache == "cold":
                    forget(path)
                else:
                    run_once(CAT, path)
                taken, answer = run_once(provider, path)
                seconds[provider].append(taken)
                answers[provider] = answer
                peaks[provider] = max(peaks.get(provider, 0), answer.get("peak") or 0)
    busy = busy_seconds_of_others() - others
    share = busy / (usable_cpus() * (time.perf_counter() - begin))
    rows = []
    for provider in PROVIDERS:
        times, answer = seconds[provider], answers[provider]
        row = Row(
            provider=provider,
            cache=options.cache,
            bytes=size,
            rows=blocks * BLOCK_ROWS,
            features=FEATURES,
            rounds=len(times),
            p50_s=statistics.median(times),
            least_s=min(times),
            gb_per_s=size / statistics.median(times) / 1e9,
            ratio=paired_ratio(times, seconds[CAT]),
            peak_bytes=peaks[provider] or None,
            mean_error=largest(answer["mean"], mean, [float(v) ** 0.5 for v in var])
            if answer
            else None,
            var_error=largest(answer["var"], var, list(map(float, var))) if answer else None,
        )
        rows.append(row)
    return rows, share


# --- what was found -------------------------------------------------------------------------------


def as_csv(rows: Sequence[Row]) -> bytes:
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(field.name for field in fields(Row))
    for row in rows:
        writer.writerow(f"{v:.6g}" if isinstance(v, float) else v for v in astuple(row))
    return stream.getvalue().encode()


def show(rows: Sequence[Row]) -> None:
    from rich.console import Console
    from rich.table import Table

    first = rows[0]
    table = Table(title=f"{first.bytes / 1e9:.2f} GB, {first.cache} cache, mean/std 1e4")
    for name in ("", "s", "GB/s", "times cat", "peak MB", "mean error", "var error"):
        table.add_column(name, justify="right" if name else "left")
    for row in rows:
        table.add_row(
            row.provider,
            f"{row.p50_s:.2f}",
            f"{row.gb_per_s:.2f}",
            f"{row.ratio:.2f}",
            *(
                "" if value is None else form.format(value)
                for value, form in (
                    (row.peak_bytes and row.peak_bytes / 1e6, "{:.0f}"),
                    (row.mean_error, "{:.1e}"),
                    (row.var_error, "{:.1e}"),
                )
            ),
        )
    Console(highlight=False).print(table)


def troubles(rows: Sequence[Row]) -> list[str]:
    """What we promise and did not keep."""
    found = []
    (ours,) = (row for row in rows if row.provider == OURS)
    limits = (
        ("mean_error", MEAN_ERROR * OFFSET),  # the promise is relative to the mean
        ("var_error", VAR_ERROR),
        ("peak_bytes", PEAK_BYTES),
    )
    for name, limit in limits:
        value = getattr(ours, name)
        if value is not None and not value <= limit:
            found.append(f"{OURS}: {name} is {value:.3g}, where at most {limit:g} is promised")
    return found


# --- the call -------------------------------------------------------------------------------------


def size_of(text: str) -> int:
    parts = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kMGT]?)B", text)
    if parts is None:
        raise argparse.ArgumentTypeError(f"must be a size such as 20GB, got {text!r}")
    return int(float(parts[1]) * {"": 1, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}[parts[2]])


def positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dataset_stats.py", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--size", type=size_of, default=256_000_000, help="of the file; 256MB if left out")
    add("--directory", type=Path, help="where to make the file; a temporary one if left out")
    add("--cache", choices=("cold", "warm"), default="cold", help="what the system remembers")
    add("--rounds", type=positive, default=3, help="3 if left out")
    add("--seed", type=int, default=0, help="of the values and the order")
    add("--out", type=Path, help="CSV file to write")
    return parser


def run(options: argparse.Namespace) -> int:
    """Measure, print, write."""
    if options.out is not None:
        if options.out.suffix != ".csv":
            raise ArgumentError(f"--out must end in .csv, got {str(options.out)!r}.")
        check_place(options.out, "a CSV file", "dataset_stats.csv")
    blocks = max(1, options.size // (BLOCK_ROWS * FEATURES * 4))
    with tempfile.TemporaryDirectory(dir=options.directory) as folder:
        free = os.statvfs(folder)
        if free.f_bavail * free.f_frsize < options.size * 1.05:
            raise ArgumentError(
                f"--size must fit on the disk, got {options.size / 1e9:.1f} GB, and there are "
                f"{free.f_bavail * free.f_frsize / 1e9:.1f}. Name another --directory."
            )
        rows, share = measure(Path(folder, "data.npy"), blocks, options)
    show(rows)
    found = troubles(rows)
    for trouble in found:
        print(trouble)
    if share > QUIET:
        print(
            f"other programs took {share:.0%} of the processors during the run; numbers to keep "
            "need an idle machine"
        )
    if options.out is not None:
        import sklearn

        environment = describe(threads=usable_cpus()) | {"seed": options.seed}
        environment["share_of_others"] = None if math.isnan(share) else round(share, 3)
        environment["versions"]["scikit-learn"] = sklearn.__version__
        about = options.out.with_suffix(".json")
        content = (json.dumps(environment, indent=2) + "\n").encode()
        write_all({options.out: as_csv(rows), about: content})
        print(f"wrote {options.out} and {about}")
    return 1 if found else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark, or serve it as one of its workers."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == ["worker"]:
        work(*given[1:])
        return 0
    try:
        return run(make_parser().parse_args(given))
    except ArgumentError as error:
        print(f"dataset_stats.py: {error}", file=sys.stderr)
        return 2
    except BatchNormError as error:
        print(f"dataset_stats.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("dataset_stats.py: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
