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


class Failing:
    """Batches, and an error instead of the next one."""

    def __init__(self, batches: list[Tensor], error: type[BaseException]) -> None:
        self.batches, self.error = batches, error

    def __iter__(self) -> Iterator[Tensor]:
        yield from self.batches
        raise self.error("no more")


def measured(method: str, memory: float) -> dict[str, Any]:
    """State and report after a recalibration."""
    model = net()
    data = shares(method)[dist.get_rank()]
    report = recalibrate(model, data, method=method, memory=memory)
    return {"state": model.state_dict(), "report": report.to_dict()}


def with_a_failing_process(method: str, how: str = "data") -> Any:
    """What is raised where another process fails, and whether anything changed."""
    model = net()
    data: Any = shares(method)[dist.get_rank()]
    if dist.get_rank() == 2:
        if how == "writing":  # the last buffer cannot be written to
            model.last.num_batches_tracked = torch.zeros(1, dtype=torch.int64).expand(4)
        else:
            data = Failing(data, KeyboardInterrupt if how == "interrupt" else ValueError)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    try:
        recalibrate(model, data, method=method)
    except BaseException as error:
        same = all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
        return type(error).__name__, str(error), same
    return None


def without_data(method: str) -> None:
    recalibrate(net(), [], method=method)


def with_another_model(what: str) -> None:
    model, method = net(), "precise"
    if dist.get_rank() == 1:
        if what == "width":
            model.rare = nn.BatchNorm1d(WIDTH + 1)
        elif what == "order":
            model._modules["rare"] = model._modules.pop("rare")  # now the last
        else:
            method = "exact"
    recalibrate(model, shares("precise")[dist.get_rank()], method=method)


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
