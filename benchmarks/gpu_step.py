"""Time layers and a training step of ResNet-18 on a GPU, by torch and after `convert`.

python benchmarks/gpu_step.py --out benchmarks/results

Writes gpu_step.csv and gpu_step.json (what it was measured on). A sample is a forward, a forward
and backward pass, or a training step, from an idle device until it is idle again; ``ratio`` is to
torch's. On a GPU our layers run torch's kernels, so what is seen is the price of running statistics
that leave out batches that are not finite: a few small kernels more for each layer.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import command
from networks import ResNet18

from batchnorm.bench.rows import TimedRow, timed
from batchnorm.bench.timing import interleave, sample
from batchnorm.errors import ArgumentError

TORCH, OURS, PROPAGATE = "torch", "batchnorm", "batchnorm, on_nonfinite='propagate'"
SHAPES = ((64, 64, 56, 56), (128, 128, 28, 28), (32, 256, 14, 14), (32, 64, 1, 1))
FORMATS = ("contiguous", "channels_last")
BATCH, WARMUP = 64, 5


@dataclass(frozen=True, kw_only=True)
class Row(TimedRow):
    """One layer or network; a line of the CSV file."""

    what: str
    case: str
    memory_format: str


def _converted(model: Any) -> dict[str, Any]:
    """The model by each provider, with the same weights."""
    from batchnorm.torch import convert

    models = {TORCH: model, OURS: convert(copy.deepcopy(model))}
    models[PROPAGATE] = convert(copy.deepcopy(model), on_nonfinite="propagate")
    return models


def _runs(model: Any, x: Any, target: Any = None) -> dict[str, Callable[[], object]]:
    """What is timed of a layer, or of a network that is given targets."""
    import torch

    gradient = torch.randn_like(x)

    def forward() -> None:
        with torch.no_grad():
            model(x)

    def both() -> None:
        x.grad = None
        model(x).backward(gradient)

    if target is None:
        return {"forward": forward, "forward and backward": both}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def step() -> None:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), target).backward()
        optimizer.step()

    return {"training step": step}


def measure(options: argparse.Namespace, files: command.Files) -> list[str]:
    """Fill in `files`."""
    import torch

    if not torch.cuda.is_available():
        raise ArgumentError("this benchmark needs a GPU that PyTorch can use, got none.")
    torch.manual_seed(options.seed)
    rows: list[Row] = []
    cases: list[tuple[str, Any, tuple[int, ...], Any]] = [
        ("x".join(map(str, shape)), torch.nn.BatchNorm2d(shape[1]).cuda(), shape, None)
        for shape in SHAPES
    ]
    classes = torch.randint(0, 1000, (BATCH,), device="cuda")
    cases.append((f"ResNet-18, batch {BATCH}", ResNet18().cuda(), (BATCH, 3, 224, 224), classes))
    for case, model, shape, target in cases:
        for name in FORMATS:
            kind = getattr(torch, name if name == "channels_last" else "contiguous_format")
            x = torch.randn(shape, device="cuda").contiguous(memory_format=kind)
            x.requires_grad_(target is None)
            models = _converted(model.to(memory_format=kind))
            runs = {provider: _runs(m, x, target) for provider, m in models.items()}
            for what in runs[TORCH]:

                def run(provider: str, what: str = what, runs: Any = runs) -> None:
                    runs[provider][what]()
                    torch.cuda.synchronize()

                takes = {p: partial(sample, partial(run, p), untimed=WARMUP) for p in runs}
                samples = interleave(takes, min_rounds=options.rounds, seed=options.seed)
                rows += [
                    timed(
                        Row(provider=p, what=what, case=case, memory_format=name),
                        samples[p],
                        samples[TORCH],
                    )
                    for p in runs
                ]
    columns = {
        "case": "{0.case}",
        "format": "{0.memory_format}",
        "what": "{0.what}",
        "by": "{0.provider}",
        "ms": "{0.p50_ms:.3f}",
        "ratio": "{0.ratio:.2f}",
    }
    command.show(rows, columns)
    files["gpu_step.csv"] = rows
    files["gpu_step.json"] = {"gpu": torch.cuda.get_device_name(), "rounds": options.rounds}
    return []


def main(arguments: Sequence[str] | None = None) -> int:
    """Carry out the benchmark."""
    parser = command.make_parser(__file__, __doc__ or "", rounds=20)
    return command.main(parser, measure, arguments, needs=("torch",))


if __name__ == "__main__":
    sys.exit(main())
