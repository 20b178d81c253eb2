"""What the processes of test_torch_processes.py do."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from batchnorm.torch.processes import Processes

CPU = torch.device("cpu")


def about(groups: list[list[int]]) -> Any:
    """Size and rank of this process in its group, and what the group gathers."""
    made = [dist.new_group(group) for group in groups]
    mine = next(k for k, group in enumerate(groups) if dist.get_rank() in group)
    processes = Processes(made[mine], "here")
    return processes.size, processes.rank, processes.gather([dist.get_rank(), mine]).tolist()


def outside() -> Any:
    group = dist.new_group([0])
    return Processes(group, "here").size


def exchanged() -> Any:
    """Values of all processes, by every kind of message."""
    processes, rank = Processes(None, "here"), dist.get_rank()
    rows = processes.gather_from(lambda: torch.tensor([rank, 0.5]), 2, CPU)
    sums = torch.tensor([rank, 2], dtype=torch.int64)
    added = processes.add("sums", sums)
    assert added is sums
    flags = [processes.any(rank == 1), processes.any(False)]
    return rows.tolist(), sums.tolist(), flags, processes.together(lambda: rank)


def failing(how: str, interrupt: bool) -> Any:
    """What is raised here if process 1 raises; then another message, which must not be mixed up."""
    processes, rank = Processes(None, "layer 'a'"), dist.get_rank()

    def work() -> torch.Tensor:
        if rank == 1:
            raise KeyboardInterrupt if interrupt else ValueError("its own")
        return torch.ones(2)

    try:
        if how == "together":
            processes.together(work)
        else:
            processes.gather_from(work, 2, CPU)
    except BaseException as error:
        return type(error).__name__, str(error), processes.gather(rank).tolist()
    return None


def without_the_last() -> Any:
    """A message in which the last process does not take part: it ends instead."""
    if dist.get_rank() == dist.get_world_size() - 1:
        raise SystemExit
    return Processes(None, "layer 'a'").gather(1.0).tolist()
