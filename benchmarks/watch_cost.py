"""Time the training of ResNet-18 while `batchnorm.torch.watch` looks, beside one without it.

python benchmarks/watch_cost.py --out benchmarks/results
python benchmarks/watch_cost.py --device cuda --out benchmarks/results

Writes watch_cost_DEVICE.csv and .json (what it was measured on). A sample is 20 training steps, of
which a GPU is waited for at the end only, as a training does. Steps that nobody watches are
interleaved with watched ones of the same model: with the first of the 20 recorded, which is what
``every=20`` costs, and with none recorded, which is what is paid between recorded steps.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import command
from networks import ResNet18

from batchnorm.bench.rows import TimedRow, timed
from batchnorm.bench.timing import interleave, sample
from batchnorm.errors import ArgumentError

PLAIN, BETWEEN, RECORDED = "not watched", "watched, none recorded", "watched, every 20th recorded"
EVERY = 20


@dataclass(frozen=True, kw_only=True)
class Row(TimedRow):
    """One way to train; a line of the CSV file."""

    case: str


def _steps(model: Any, x: Any, target: Any, watching: Any, first: int | None) -> None:
    """20 steps; `first` is the number of the first, or None if nobody watches."""
    import torch

    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    hooks = [] if first is None else watching.hooks()
    for k in range(EVERY):
        watching.step = 1 if first is None else max(first, k)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), target).backward()
        optimizer.step()
    for hook in hooks:
        hook.remove()
    if x.is_cuda:
        torch.cuda.synchronize()


def measure(options: argparse.Namespace, files: command.Files) -> list[str]:
    """Fill in `files`."""
    import torch

    from batchnorm.torch import convert
    from batchnorm.torch.diagnose import Watch

    if options.device == "cuda" and not torch.cuda.is_available():
        raise ArgumentError("--device cuda needs a GPU that PyTorch can use, got none.")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    side, batch = (224, 64) if options.device == "cuda" else (64, 16)
    x = torch.randn(batch, 3, side, side, device=options.device)
    target = torch.randint(0, 1000, (batch,), device=options.device)
    rows: list[Row] = []
    for name, change in (("torch's layers", lambda m: m), ("batchnorm's layers", convert)):
        # One model for all, since the places of tensors in memory matter as much as hooks do.
        model = change(ResNet18().to(options.device))
        watching = Watch(model, every=EVERY)
        runs = {
            kind: partial(_steps, model, x, target, watching, first)
            for kind, first in ((PLAIN, None), (BETWEEN, 1), (RECORDED, 0))
        }
        takes = {kind: partial(sample, run) for kind, run in runs.items()}
        samples = interleave(takes, min_rounds=options.rounds, seed=options.seed)
        watching.close()
        case = f"ResNet-18, batch {batch}, {side}x{side}, {name}"
        rows += [
            timed(Row(provider=kind, case=case), samples[kind], samples[PLAIN]) for kind in runs
        ]
    columns = {
        "case": "{0.case}",
        "training": "{0.provider}",
        "ms for 20 steps": "{0.p50_ms:.0f}",
        "ratio": "{0.ratio:.4f}",
        "low": "{0.ratio_low:.4f}",
        "high": "{0.ratio_high:.4f}",
    }
    command.show(rows, columns)
    files[f"watch_cost_{options.device}.csv"] = rows
    about: dict[str, Any] = {"rounds": options.rounds, "torch_threads": torch.get_num_threads()}
    if options.device == "cuda":
        about["gpu"] = torch.cuda.get_device_name()
    files[f"watch_cost_{options.device}.json"] = about
    return []


def main(arguments: Sequence[str] | None = None) -> int:
    """Carry out the benchmark."""
    parser = command.make_parser(__file__, __doc__ or "", rounds=15)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=command.at_least(1), help="of PyTorch")
    return command.main(parser, measure, arguments, needs=("torch",))


if __name__ == "__main__":
    sys.exit(main())
