"""Time a layer that shares its batch between two processes beside one that does not.

python benchmarks/sync_step.py --out benchmarks/results/sync_step.csv

Two processes of one gloo group on this machine, one thread each, take a forward and a backward pass
of each layer in turn: plain, which exchanges nothing, `SyncBatchNorm`, and the latter with
reproducible=True. ``ratio``: median over rounds of the time over the plain layer's, on the slower
of the processes. What the messages cost depends on the machines' network: here it is the loopback,
and processes that have to wait for a core of their own.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from batchnorm.atomic import write_all
from batchnorm.bench.environment import describe

SHAPES = ((32, 64, 56, 56), (32, 256, 14, 14), (32, 512, 7, 7), (128, 1024))
LAYERS = ("BatchNorm", "SyncBatchNorm", "SyncBatchNorm, reproducible")


def worker(store: str, rank: int, rounds: int) -> None:
    """Print the seconds of every layer and shape, (shapes, layers, rounds), as JSON."""
    import torch
    import torch.distributed as dist

    from batchnorm.torch import BatchNorm1d, BatchNorm2d, SyncBatchNorm

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", world_size=2, rank=rank)
    found = []
    for shape in SHAPES:
        x = torch.randn(shape, requires_grad=True)
        grad = torch.randn(shape)
        plain = BatchNorm1d if len(shape) == 2 else BatchNorm2d
        layers = (
            plain(shape[1]),
            SyncBatchNorm(shape[1]),
            SyncBatchNorm(shape[1], reproducible=True),
        )
        times: list[list[float]] = [[] for _ in layers]
        for k in range(rounds + 3):
            for layer, taken in zip(layers, times, strict=True):
                x.grad = None
                dist.barrier()
                begin = time.perf_counter()
                layer(x).backward(grad)
                if k >= 3:
                    taken.append(time.perf_counter() - begin)
        found.append(times)
    dist.destroy_process_group()
    print(json.dumps(found))


def measure(rounds: int) -> list[dict[str, Any]]:
    """One row a shape and layer."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        processes = [
            subprocess.Popen(
                [sys.executable, __file__, "worker", f"{folder}/store", str(rank), str(rounds)],
                stdout=subprocess.PIPE,
                env=environment,
            )
            for rank in range(2)
        ]
        answers = [process.communicate()[0] for process in processes]
        if any(process.returncode for process in processes):
            raise SystemExit("sync_step.py: a process has failed")
    seconds = np.array([json.loads(answer) for answer in answers]).max(0)
    rows = []
    for shape, of_shape in zip(SHAPES, seconds, strict=True):
        for layer, taken in zip(LAYERS, of_shape, strict=True):
            rows.append(
                {
                    "shape": "x".join(map(str, shape)),
                    "layer": layer,
                    "p50_ms": float(np.median(taken)) * 1e3,
                    "ratio": float(np.median(taken / of_shape[0])),
                }
            )
    return rows


def main() -> int:
    """Measure, print, write."""
    if sys.argv[1:2] == ["worker"]:
        worker(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
        return 0
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="CSV file to write, with a JSON file beside it")
    parser.add_argument("--rounds", type=int, default=50, help="of all layers; 50 if left out")
    options = parser.parse_args()
    rows = measure(options.rounds)
    for row in rows:
        print(f"{row['shape']:<16} {row['layer']:<28} {row['p50_ms']:8.2f} ms {row['ratio']:6.2f}")
    if options.out is not None:
        text = io.StringIO()
        writer = csv.DictWriter(text, rows[0], lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()})
        about = describe(threads=1) | {"rounds": options.rounds, "processes": 2}
        contents = {".csv": text.getvalue(), ".json": json.dumps(about, indent=2) + "\n"}
        write_all({options.out.with_suffix(k): v.encode() for k, v in contents.items()})
    return 0


if __name__ == "__main__":
    sys.exit(main())
