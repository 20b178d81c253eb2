"""The processes of a process group, which all succeed or all raise an error.

Synchronized layers and `recalibrate` exchange messages only through `Processes`. Every process
merges the messages in the order of ranks, so all get the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from ..errors import ArgumentError, BatchNormError

__all__ = ["Processes", "SynchronizationError"]

T = TypeVar("T")


class SynchronizationError(BatchNormError, RuntimeError):
    """Another process raised an error, or did not take part in exchanging statistics or sums."""


class Processes:
    """The processes of a process group; a single one without `torch.distributed`.

    Making one costs about a microsecond and exchanges nothing.

    Parameters
    ----------
    process_group : ProcessGroup
        None for the default group.
    name : str
        Of the layer or function that exchanges messages; error messages begin with it.

    Attributes
    ----------
    size : int
        Number of processes.

    Raises
    ------
    ArgumentError
        This process is not in the group.
    """

    __slots__ = ("name", "process_group", "size")

    def __init__(self, process_group: Any, name: str) -> None:
        self.process_group, self.name, self.size = process_group, name, 1
        if dist.is_available() and dist.is_initialized():
            self.size = dist.get_world_size(process_group)
            if self.size < 1:
                raise ArgumentError("process_group must include this process, got one without it.")

    @property
    def rank(self) -> int:
        """Number of this process within the group."""
        return dist.get_rank(self.process_group) if self.size > 1 else 0

    @property
    def device(self) -> torch.device:
        """The device on which the process group exchanges messages."""
        if self.size > 1 and str(dist.get_backend(self.process_group)) == "nccl":
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("cpu")

    # ---- messages

    def gather(self, values: ArrayLike) -> NDArray[np.float64]:
        """Numbers from every process.

        Parameters
        ----------
        values : (*S)
            Of the same shape in all processes.

        Returns
        -------
        (size, *S)
            In the order of ranks.
        """
        own = np.array(values, np.float64)
        if self.size == 1:
            return own[None]
        parts = self._gather("numbers", torch.from_numpy(own).to(self.device))
        gathered: NDArray[np.float64] = parts.cpu().numpy()
        return gathered

    def any(self, flag: bool) -> bool:
        """True if `flag` is true in at least one process."""
        return bool(self.gather(flag).any())

    def add(self, what: str, values: Tensor) -> Tensor:
        """Replace `values` by their sums over all processes, in place; `what` names them."""
        if self.size > 1:
            self._exchange(what, dist.all_reduce, values)
        return values

    # ---- all succeed, or all raise an error

    def together(self, work: Callable[[], T]) -> T:
        """Do `work` in every process; if it fails in one, raise an error in all.

        An interrupt counts as a failure, because the other processes would wait for this one.

        Raises
        ------
        SynchronizationError
            In the processes in which `work` succeeded, if it failed in another.
        """
        if self.size == 1:
            return work()
        error: BaseException | None = None
        try:
            result = work()
        except BaseException as raised:
            error = raised
        failed = np.flatnonzero(self.gather(error is not None))
        if error is not None:
            raise error
        if len(failed):
            raise SynchronizationError(
                f"{self.name} failed in process {', '.join(map(str, failed))} of {self.size}, "
                "see the error there; nothing has changed in any process."
            )
        return result

    def gather_from(self, work: Callable[[], Tensor], length: int, device: torch.device) -> Tensor:
        """Gather what `work` returns in every process; if it fails in one, raise an error in all.

        This takes a single message. Its first number says whether the process failed.

        Parameters
        ----------
        work : callable
            Returns numbers of shape (length,).
        length : int
            The same in all processes; needed if `work` fails.
        device : device
            Of the message. On a CPU, the other processes raise an error in this call. On other
            devices they would have to wait for the message; there they continue, and raise an error
            at the next message, which the failed process does not send.

        Returns
        -------
        (size, length)
            In float64, in the order of ranks.

        Raises
        ------
        SynchronizationError
            In the processes in which `work` succeeded, if it failed in another.
        """
        message = torch.zeros(1 + length, dtype=torch.float64, device=device)
        error: BaseException | None = None
        try:
            message[1:] = work()
        except BaseException as raised:
            error = raised
            message[0] = 1.0
        parts = message[None] if self.size == 1 else self._gather("statistics", message)
        if error is not None:
            raise error
        if device.type == "cpu" and bool(parts[:, 0].any()):
            rank = int(parts[:, 0].nonzero()[0, 0])
            raise SynchronizationError(
                f"{self.name}: rank {rank} of the layer's process group raised an error in this "
                "layer; see the error there."
            )
        return parts[:, 1:]

    # ---- exchange

    def _gather(self, what: str, message: Tensor) -> Tensor:
        received = [torch.empty_like(message) for _ in range(self.size)]
        self._exchange(what, dist.all_gather, received, message)
        return torch.stack(received)

    def _exchange(self, what: str, run: Callable[..., Any], *tensors: Any) -> None:
        try:
            run(*tensors, group=self.process_group)
        except RuntimeError as error:
            raise SynchronizationError(
                f"{self.name}: rank {self.rank} of {self.size} could not exchange {what} "
                f"({' '.join(str(error).split())}). If that gives no other reason, another process "
                f"has ended, has failed elsewhere, or has not called {self.name}; see its output."
            ) from error
