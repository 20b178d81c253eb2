"""Time a layer that shares its batch between two processes beside one that does not.

python benchmarks/sync_step.py --out benchmarks/results

Writes sync_step.csv and sync_step.json (what it was measured on). Two processes of one gloo group
on this machine, one thread each, take a forward and a backward pass of each layer by turns: plain,
which exchanges nothing, `SyncBatchNorm`, and the latter with reproducible=True. Times are those of
the slower process; ``ratio`` is to the plain layer. What the messages cost depends on the machines'
network: here it is the loopback, and processes that have to wait for a core of their own.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import command

from batchnorm.bench.rows import TimedRow, timed
from batchnorm.bench.timing import Sample, interleave, sample
from batchnorm.bench.worker import Worker

SHAPES = ((32, 64, 56, 56), (32, 256, 14, 14), (32, 512, 7, 7), (128, 1024))
PLAIN, REPRODUCIBLE = "BatchNorm", "SyncBatchNorm, reproducible"
LAYERS = (PLAIN, "SyncBatchNorm", REPRODUCIBLE)
PROCESSES, WARMUP = 2, 3


@dataclass(frozen=True, kw_only=True)
class Row(TimedRow):
    """One layer on one shape; a line of the CSV file."""

    shape: str


class Rank:
    """One of the processes."""

    def __init__(self, store: str, rank: int) -> None:
        import torch
        import torch.distributed as dist

        torch.set_num_threads(1)
        dist.init_process_group(
            "gloo", init_method=f"file://{store}", world_size=PROCESSES, rank=rank
        )

    def measure(self, shape: Sequence[int], rounds: int) -> dict[str, list[Sample]]:
        """Samples of every layer, after a warm-up."""
        import torch
        import torch.distributed as dist

        from batchnorm.torch import BatchNorm1d, BatchNorm2d, SyncBatchNorm

        x, grad = torch.randn(*shape, requires_grad=True), torch.randn(*shape)
        layers: dict[str, Any] = {
            PLAIN: (BatchNorm1d if len(shape) == 2 else BatchNorm2d)(shape[1]),
            "SyncBatchNorm": SyncBatchNorm(shape[1]),
            REPRODUCIBLE: SyncBatchNorm(shape[1], reproducible=True),
        }

        def take(layer: Any) -> Sample:
            x.grad = None
            dist.barrier()
            return sample(lambda: layer(x).backward(grad))

        # The order of a round depends on the seed alone, so it is the same in both processes.
        samples = interleave(
            {name: partial(take, layer) for name, layer in layers.items()},
            min_rounds=rounds + WARMUP,
        )
        return {name: found[WARMUP:] for name, found in samples.items()}


def measure(options: argparse.Namespace, files: command.Files) -> list[str]:
    rows = []
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        environment = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        ranks = [
            stack.enter_context(
                Worker(__file__, "Rank", environment=environment, store=f"{folder}/s", rank=rank)
            )
            for rank in range(PROCESSES)
        ]
        for shape in SHAPES:
            for rank in ranks:
                rank.send("measure", shape=shape, rounds=options.rounds)
            answers = [rank.receive() for rank in ranks]
            slower = {
                name: [Sample(*max(pair)) for pair in zip(*(a[name] for a in answers), strict=True)]
                for name in LAYERS
            }
            label = "x".join(map(str, shape))
            rows += [
                timed(Row(provider=name, shape=label), slower[name], slower[PLAIN])
                for name in LAYERS
            ]
    files["sync_step.csv"] = rows
    files["sync_step.json"] = {"threads": 1, "rounds": options.rounds, "processes": PROCESSES}
    columns = {"": "{0.shape}", "layer": "{0.provider}", "ms": "{0.p50_ms:.2f}"}
    command.show(rows, columns | {"ratio": "{0.ratio:.2f}"})
    return []


def main(arguments: Sequence[str] | None = None) -> int:
    parser = command.make_parser(__file__, __doc__, rounds=50)
    return command.main(parser, measure, arguments, needs=("torch",))


if __name__ == "__main__":
    sys.exit(main())
