"""Train on three processes that share each batch; the result is the same as on one process.

The processes have 5, 0 and 11 examples of each batch. This script starts them itself; with
`torchrun`, each process would call `train`.
"""

import multiprocessing
import os
import tempfile

import torch
import torch.distributed as dist
from torch import nn

from batchnorm.torch import DistributedDataParallel, convert

SIZES = (5, 0, 11)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1)).double()


def batch(step: int) -> torch.Tensor:
    return torch.randn(sum(SIZES), 4, generator=torch.Generator().manual_seed(step)).double()


def train(rank: int, folder: str) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=len(SIZES)
    )
    model = DistributedDataParallel(convert(network(), sync=True))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for step in range(10):
        examples = batch(step).split(SIZES)[rank]
        # DistributedDataParallel averages gradients over processes. Scale the loss so that the
        # result is the average over all examples.
        loss = model(examples).square().sum() * len(SIZES) / sum(SIZES)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.save(model.module.state_dict(), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def main() -> None:
    alone = network()
    optimizer = torch.optim.SGD(alone.parameters(), 0.1)
    for step in range(10):
        loss = alone(batch(step)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as folder:
        context = multiprocessing.get_context("spawn")
        processes = [context.Process(target=train, args=(r, folder)) for r in range(len(SIZES))]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        states = [torch.load(f"{folder}/{rank}.pt") for rank in range(len(SIZES))]

    for name, value in alone.state_dict().items():
        largest = (states[0][name] - value).abs().max().item()
        same = all(torch.equal(state[name], states[0][name]) for state in states)
        print(f"{name:<22} off by {largest:.0e}, the same in all processes: {same}")
        assert same
        assert largest < 1e-9


if __name__ == "__main__":
    main()
