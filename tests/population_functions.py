"""What the processes of test_torch_population.py do."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from batchnorm.torch import BatchNorm1d, SyncBatchNorm, recalibrate

SIZES = ((7, 3), (), (11, 0, 1), (5,))
WIDTH = 6


class Net(nn.Module):
    """Layers of every kind, one of which only some batches reach."""

    def __init__(self) -> None:
        super().__init__()
        self.first = BatchNorm1d(WIDTH)
        self.linears = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.second = nn.BatchNorm1d(WIDTH)
        self.third = SyncBatchNorm(WIDTH)
        self.rare = nn.BatchNorm1d(WIDTH)
        self.last = nn.SyncBatchNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        h = self.second(self.linears[0](self.first(x)).relu())
        h = self.third(self.linears[1](h).relu())
        if len(x) > 5:
            h = self.rare(h + x)
        return self.last(self.linears[2](h))


def net() -> Net:
    torch.manual_seed(20150211)
    return Net().double()


def shares(method: str = "exact") -> list[list[Tensor]]:
    """Batches of every process; "precise" takes none of one."""
    generator = torch.Generator().manual_seed(1)
    return [
        [
            torch.randn(n, WIDTH, generator=generator, dtype=torch.float64) + 3 * n
            for n in sizes
            if method == "exact" or n != 1
        ]
        for sizes in SIZES
    ]


def failing(batches: list[Tensor]) -> Iterator[Tensor]:
    yield from batches
    raise ValueError("no more")


class Failing(list[Tensor]):
    def __iter__(self) -> Iterator[Tensor]:
        return failing(list(super().__iter__()))


def measured(method: str, memory: float) -> dict[str, Any]:
    """State and report after a recalibration."""
    model = net()
    data = shares(method)[dist.get_rank()]
    report = recalibrate(model, data, method=method, memory=memory)
    return {"state": model.state_dict(), "report": report.to_dict()}


def with_a_failing_process(method: str) -> Any:
    """What is raised where another process fails, and whether anything changed."""
    model = net()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    data = shares(method)[dist.get_rank()]
    try:
        recalibrate(model, Failing(data) if dist.get_rank() == 2 else data, method=method)
    except Exception as error:
        same = all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
        return type(error).__name__, str(error), same
    return None


def without_data(method: str) -> None:
    recalibrate(net(), [], method=method)


def with_another_model() -> None:
    model = net()
    if dist.get_rank() == 1:
        model.rare = nn.BatchNorm1d(WIDTH + 1)
    recalibrate(model, shares("precise")[dist.get_rank()])


def in_a_group() -> Any:
    """Two pairs of processes that measure apart."""
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    model = net()
    report = recalibrate(
        model,
        shares()[dist.get_rank()],
        method="exact",
        process_group=groups[dist.get_rank() // 2],
    )
    return report.examples, model.first.running_mean
