"""Time whole calls on small arrays beside torch's, or beside another copy of batchnorm.

python benchmarks/small_calls.py --out benchmarks/results
python benchmarks/small_calls.py --before PATH

The first writes small_calls.csv and small_calls.json (what it was measured on); the second, with
--out, small_calls_before.csv and .json. PATH is another checkout, built in place, or a folder that
batchnorm is installed in.

What is measured, in float32 on one thread: the layers ``BatchNorm1d`` of torch and of
batchnorm.torch (forward in training; forward and backward; evaluation, while gradients are recorded
and under no_grad), a layer of an autograd Function that computes nothing, which no layer written in
Python can be faster than, and the NumPy functions ``batch_norm``, ``batch_norm_backward`` and
``batch_norm_inference``, beside torch's functions without autograd. Every answer is compared with
torch's before it is timed.

A sample is the mean over a block of calls; in every round each provider has one block, in an order
drawn anew. Each copy of batchnorm runs in a process of its own, and the rounds are spread over
several such processes, because where a process happens to lie in memory also counts. ``ratio`` is
to ``torch``, and with --before to ``before``.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path

import command
import small_calls_worker
from small_calls_worker import FLOOR, OPS, OURS, TORCH

import batchnorm
from batchnorm.bench.rows import TimedRow, timed
from batchnorm.bench.timing import Sample, interleave
from batchnorm.bench.worker import Worker
from batchnorm.errors import ArgumentError
from batchnorm.progress import steps

#: The file that defines the worker's class.
WORKER = Path(small_calls_worker.__file__)
BEFORE = "before"
SHAPES = ((32, 64), (128, 100), (256, 256), (256, 1024))


@dataclass(frozen=True, kw_only=True)
class Row(TimedRow):
    """One provider of one operation; a line of the CSV file."""

    op: str
    shape: str


def root_of(path: Path) -> Path:
    """The folder to import batchnorm from: of a checkout, its src."""
    for folder in (path / "src", path):
        if (folder / "batchnorm" / "__init__.py").exists():
            return folder.resolve()
    raise ArgumentError(
        "--before must be a checkout or a folder that batchnorm is installed in, "
        f"got {str(path)!r}, which holds neither src/batchnorm nor batchnorm. Name another folder."
    )


def start(root: Path) -> Worker:
    """A worker that imports batchnorm from `root`."""
    return Worker(WORKER, "Calls", environment={"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"})


def measure(options: argparse.Namespace, files: command.Files) -> list[str]:
    roots = {OURS: Path(batchnorm.__file__).resolve().parent.parent}
    # Provider to the copy that it is measured in, and its name there.
    providers = {name: (OURS, name) for name in (TORCH, OURS, FLOOR)}
    if options.before is not None:
        roots[BEFORE] = root_of(options.before)
        providers = {BEFORE: (BEFORE, OURS), OURS: (OURS, OURS)}
    baseline = next(iter(providers))
    cases = list(product(OPS, SHAPES))
    samples: dict[tuple[str, tuple[int, int]], dict[str, list[Sample]]] = {
        case: defaultdict(list) for case in cases
    }
    with steps(options.processes * len(cases)) as started:
        for number in range(options.processes):
            with contextlib.ExitStack() as stack:
                workers = {copy: stack.enter_context(start(root)) for copy, root in roots.items()}
                for copy, worker in workers.items():
                    found = Path(worker.ask("where")).parent
                    if not found.samefile(roots[copy] / "batchnorm"):
                        raise ArgumentError(
                            f"batchnorm must be imported from {roots[copy]}, got {found}. "
                            "Uninstall what takes precedence."
                        )
                for op, shape in cases:
                    started(f"process {number + 1}: {op} of {shape}")
                    taken = measure_case(op, shape, options, providers, workers, seed=number)
                    for name, more in taken.items():
                        samples[op, shape][name] += more
    rows = [
        timed(
            Row(provider=name, op=op, shape="x".join(map(str, shape))),
            samples[op, shape][name],
            samples[op, shape][baseline],
        )
        for op, shape in cases
        for name in samples[op, shape]
    ]
    stem = "small_calls" if options.before is None else "small_calls_before"
    files[f"{stem}.csv"] = rows
    files[f"{stem}.json"] = {
        "threads": 1,
        "rounds": options.rounds * options.processes,
        "processes": options.processes,
        "block_s": options.block,
    }
    columns = {
        "": "{0.op}",
        "shape": "{0.shape}",
        "provider": "{0.provider}",
        "p50 ms": "{0.p50_ms:.4f}",
        f"of {baseline}": "{0.ratio:.3f}",
        "95 %": "{0.ratio_low:.3f} to {0.ratio_high:.3f}",
    }
    command.show(rows, columns)
    return []


def measure_case(
    op: str,
    shape: tuple[int, int],
    options: argparse.Namespace,
    providers: dict[str, tuple[str, str]],
    workers: dict[str, Worker],
    *,
    seed: int,
) -> dict[str, list[Sample]]:
    """Samples of every provider, from one set of processes."""
    seconds = {copy: worker.ask("prepare", op=op, shape=shape) for copy, worker in workers.items()}

    def take(copy: str, provider: str) -> Sample:
        calls = max(1, math.ceil(options.block / seconds[copy][provider]))
        return Sample(*workers[copy].ask("block", provider=provider, calls=calls))

    takes = {
        name: partial(take, copy, provider)
        for name, (copy, provider) in providers.items()
        if provider in seconds[copy]
    }
    return interleave(takes, min_rounds=options.rounds, seed=seed)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = command.make_parser(__file__, __doc__, rounds=20)
    add = parser.add_argument
    add("--before", type=Path, metavar="PATH", help="another copy to compare with, not torch")
    add("--processes", type=command.at_least(1), default=5, help="of each copy; 5 if left out")
    add("--block", type=float, default=5e-3, help="seconds of a block of calls; 0.005 if left out")
    return command.main(parser, measure, arguments)


if __name__ == "__main__":
    sys.exit(main())
