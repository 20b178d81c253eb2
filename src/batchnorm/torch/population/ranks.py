"""The processes that measure together."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from ...errors import ArgumentError, BatchNormError
from ...moments import Moments
from .target import Target

T = TypeVar("T")


class Ranks:
    """The processes that measure together; one, without torch.distributed."""

    def __init__(self, group: Any) -> None:
        self.group, self.number, self.size, self.device = group, 0, 1, torch.device("cpu")
        if dist.is_available() and dist.is_initialized():
            self.number, self.size = dist.get_rank(group), dist.get_world_size(group)
            if self.number < 0:
                raise ArgumentError("process_group must include this process, got one without it.")
            if str(dist.get_backend(group)) == "nccl":
                self.device = torch.device("cuda", torch.cuda.current_device())

    def gather(self, values: Any) -> NDArray[np.float64]:
        """Numbers of every process, (processes, …)."""
        own = np.asarray(values, np.float64)
        if self.size == 1:
            return own[None]
        sent = torch.from_numpy(own.copy()).to(self.device)
        parts = [torch.empty_like(sent) for _ in range(self.size)]
        dist.all_gather(parts, sent, group=self.group)
        gathered: NDArray[np.float64] = torch.stack(parts).cpu().numpy()
        return gathered

    def any(self, flag: bool) -> bool:
        """Whether it is so in any process."""
        return bool(self.gather([flag]).any())

    def together(self, work: Callable[[], T]) -> T:
        """Do something in every process; if it fails in one, raise in all."""
        if self.size == 1:
            return work()
        error: BaseException | None = None  # an interrupt, too, or the others would wait
        try:
            result = work()
        except BaseException as raised:
            error = raised
        failed = np.flatnonzero(self.gather([error is not None])[:, 0])
        if error is not None:
            raise error
        if len(failed):
            raise BatchNormError(
                f"recalibrate failed in process {', '.join(map(str, failed))} of {self.size}, "
                "which raises why; the statistics are unchanged in all."
            )
        return result

    def merge(self, moments: Moments, batches: int, channels: int) -> tuple[Moments, int]:
        """Merge the moments of all processes, in their order: the same bits in each."""
        if self.size == 1:
            return moments, batches
        own = [np.broadcast_to(v, channels) for v in (moments.count, moments.mean, moments.m2)]
        rows = self.gather(np.concatenate([*own, [batches]]))
        parts = (Moments(*row[:-1].reshape(3, channels)) for row in rows)
        return Moments.merge(parts), int(rows[:, -1].sum())

    def compare(self, targets: list[Target], method: str) -> None:
        """Refuse models and methods that differ."""
        about = repr([method, *((target.name, target.channels) for target in targets)])
        digest = hashlib.sha256(about.encode()).digest()[:6]  # a float64 holds so much exactly
        found = self.gather([int.from_bytes(digest, "big"), len(targets)])
        if (found != found[0]).any():
            raise ArgumentError(
                "model must have the same batch norms to measure in every process, by name, order "
                "and channels, and method be the same, got different ones "
                f"({', '.join(str(int(n)) for n in found[:, 1])} batch norms). Make the same "
                "model, freeze the same layers, and use the same mode, everywhere."
            )
