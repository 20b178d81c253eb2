"""SyncBatchNorm: one batch that is divided among several processes.

In the forward pass, each process sends the moments of its part of the batch in float64, in one
message. All processes merge them in the order of ranks and get the same bits. In the backward pass,
each sends its two sums. Otherwise this is the layer of one process: the same kernels, with the
count of all processes.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..errors import ShapeError
from ..native import ROWS
from . import autograd, functional, native, portable, running
from .autograd import Call
from .contract import IDENTITY, Config, check_mask, joins
from .exact_sums import Examples, statistics_of
from .internals import is_compiling, is_direct, is_transformed, uncompiled
from .modules import Layer
from .processes import Processes

__all__ = ["DistributedDataParallel", "SyncBatchNorm"]


class SyncBatchNorm(Layer, nn.SyncBatchNorm):  # type: ignore[misc]
    """torch's SyncBatchNorm with accurate statistics, on CPU and GPU, and additional options.

    In training, the statistics are those of the examples of all processes, weighted by their
    number. Processes may have different numbers of examples, or none. Without a process group, or
    in a group of one process, this is plain batch norm. State dict and arguments are torch's;
    additional arguments are keywords, as in `BatchNorm2d`.

    Parameters
    ----------
    num_features : int
        C, of input (N, C, *S).
    eps, momentum, affine, track_running_stats, process_group, device, dtype, bias
        As in `torch.nn.SyncBatchNorm`.
    reproducible : bool
        Make the statistics bitwise the same however the same examples are divided among processes
        with the same instruction set and memory format. This takes four messages in the forward
        pass instead of one. The sums of the backward pass still depend on the order of processes.
    activation, negative_slope, on_nonfinite, on_single
        As in `BatchNorm2d`. `on_single` applies if there is one value in all processes together.
    group_size : int
        Number of examples that share their statistics. Groups lie within a process, so statistics
        are exchanged only for the running statistics, not for normalization.

    Raises
    ------
    SynchronizationError
        A RuntimeError, in forward or backward: another process raised an error in this layer, did
        not call it within the timeout of the process group, or has ended. With NCCL, whose messages
        are asynchronous, PyTorch's watchdog detects the last two cases.

    Notes
    -----
    All processes must use the same type of device. As in torch, weight and bias get the gradients
    of the process's own examples, which `DistributedDataParallel` then averages. The backward pass
    cannot be differentiated, and `torch.compile` breaks the graph at this layer.

    Examples
    --------
    >>> import torch
    >>> from batchnorm.torch import SyncBatchNorm
    >>> layer = SyncBatchNorm(3, activation="relu")  # without a process group: plain batch norm
    >>> y = layer(torch.randn(8, 3, 4, 4))
    """

    process_group: Any = None
    reproducible: bool = False
    _class_before_sync: type[nn.Module] | None = None  # set by `convert`

    EXTRAS: ClassVar[tuple[str, ...]] = (*Layer.EXTRAS, "reproducible", "_class_before_sync")

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: Any = None,
        device: Any = None,
        dtype: Any = None,
        *,
        reproducible: bool = False,
        **keywords: Any,
    ) -> None:
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, device, dtype, **keywords
        )
        self.process_group = process_group
        self.reproducible = reproducible

    @classmethod
    def convert_sync_batchnorm(cls, module: nn.Module, process_group: Any = None) -> nn.Module:
        """`convert` with ``sync=True``; the method of torch's class would create torch's layers."""
        from .convert import convert

        return convert(module, sync=True, process_group=process_group)

    def _check_input_dim(self, input: Tensor) -> None:
        """Do nothing: `_normalize` checks, so that an error reaches all processes."""

    def _is_single(self, x: Tensor, mask: Tensor | None) -> bool:
        return False if self._is_shared() else super()._is_single(x, mask)

    def _is_torchs(self, input: Tensor, residual: Tensor | None, batch: bool) -> bool:
        return False  # torch's layer exchanges statistics in another way

    def _is_shared(self) -> bool:
        """Whether statistics are exchanged, or measured as if they were (`reproducible`)."""
        if dist.is_available() and dist.is_initialized():
            return self.reproducible or dist.get_world_size(self.process_group) > 1
        return self.reproducible

    def _normalize(
        self,
        x: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        batch: bool,
        config: Config,
        residual: Tensor | None,
        mask: Tensor | None,
        momentum: float | None,
    ) -> tuple[Tensor, Any]:
        tensors = (x, running_mean, running_var, weight, bias)
        if batch and self.training and self._is_shared():
            if is_compiling():
                return _normalize_uncompiled(self, *tensors, config, residual, mask)
            return _normalize_synchronized(self, *tensors, config, residual, mask)
        super()._check_input_dim(x)
        return functional.normalize(*tensors, batch, config, residual, mask, momentum)

    def extra_repr(self) -> str:
        """torch's, and what differs from it."""
        return super().extra_repr() + (", reproducible=True" if self.reproducible else "")


class DistributedDataParallel(nn.parallel.DistributedDataParallel):
    """torch's DistributedDataParallel, but it accepts our `SyncBatchNorm` on a CPU.

    torch's class refuses every SyncBatchNorm on a CPU, and works on other devices. Arguments and
    behaviour are those of torch's class.
    """

    def _passing_sync_batchnorm_handle(self, module: nn.Module) -> None:
        layers = [m for m in module.modules() if isinstance(m, nn.SyncBatchNorm)]
        if not all(isinstance(m, SyncBatchNorm) for m in layers):
            super()._passing_sync_batchnorm_handle(module)  # type: ignore[no-untyped-call]


def _normalize_synchronized(
    layer: SyncBatchNorm,
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    config: Config,
    residual: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Normalize by the statistics of all processes; return y and the statistics."""
    processes = Processes(layer.process_group, layer._label())
    vectors = (running_mean, running_var, weight, bias)
    part = _LocalPart(layer, processes)
    parts = processes.gather_from(
        lambda: part.measure(x, *vectors, config, residual, mask),
        part.length(),
        x.device,
    )
    if part.examples is not None:
        statistics = statistics_of(part.examples, parts, processes)
    else:
        statistics = portable.merge(_statistics_in(parts))
    if part.y is not None:
        return part.y, statistics
    if x.device.type == "cpu" and float(parts[:, 0].sum()) == 1:
        if layer.on_single == "population" and running_mean is not None:
            y, _ = functional.normalize(x, *vectors, False, config, residual, mask)
            return y, None
        raise ShapeError(
            "Expected more than 1 value per channel when training, got one in all processes, "
            f"input size {x.shape}"
        )
    joined = residual if residual is None or joins(residual, x, config) else None
    apart = residual is not None and joined is None
    inner = config._replace(activation=IDENTITY) if apart else config
    direct = native.supports(x, weight, bias, joined) and is_direct(x, weight, bias, joined)

    def reduce(sums: Tensor) -> None:
        processes.add("sums of gradients", sums)

    if direct:
        call = Call(native, inner, part.weights, statistics.numpy(), reduce=reduce)
    else:
        call = Call(portable, inner, part.weights, statistics, reduce=reduce)
    y = autograd.apply(x, weight, bias, joined, call)
    return (portable.finish(y, residual, part.weights, config) if apart else y), statistics


_normalize_uncompiled = uncompiled(_normalize_synchronized)


class _LocalPart:
    """The part of the batch in this process."""

    def __init__(self, layer: SyncBatchNorm, processes: Processes) -> None:
        self.layer, self.processes = layer, processes
        self.weights: Tensor | None = None
        self.examples: Examples | None = None
        self.y: Tensor | None = None  # with `group_size`, which needs no other process

    def length(self) -> int:
        """Length of the message of `measure`, known even to a process that raises an error."""
        return 3 + 2 * self.layer.num_features

    def measure(
        self,
        x: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        config: Config,
        residual: Tensor | None,
        mask: Tensor | None,
    ) -> Tensor:
        """Check the arguments and return this process's message."""
        layer, channels = self.layer, self.layer.num_features
        vectors = (running_mean, running_var, weight, bias)
        if is_transformed():
            raise RuntimeError(
                f"{self.processes.name} exchanges statistics between processes in training, which "
                "torch.func cannot transform. Call eval() or freeze(model) first."
            )
        nn.SyncBatchNorm._check_input_dim(layer, x)
        by_group = config.group_size > 0
        single = by_group and layer.on_single == "population" and Layer._is_single(layer, x, mask)
        single = single and running_mean is not None
        functional.check(x, *vectors, not single, config, is_whole_batch=by_group)
        if x.shape[1] != channels:
            raise ShapeError(f"input must have {channels} channels, got {tuple(x.shape)}.")
        if not x.is_floating_point():
            functional.normalize(x, *vectors, True, config)  # torch refuses it
        if by_group:
            self.y, of_groups = functional.normalize(
                x, *vectors, not single, config, residual, mask
            )
            if of_groups is None:
                nothing = torch.zeros((1, ROWS, channels), dtype=torch.float64, device=x.device)
                return _message_of(0, nothing)
            return _message_of(0, portable.merge(running.as_tensor(of_groups)))
        if residual is not None:
            portable.check_residual(x, residual)
        values: Tensor | int = x.numel() // max(channels, 1)
        if mask is not None:
            self.weights = functional.as_weights(mask, x)
            if x.device.type == "cpu" or layer.reproducible:
                check_mask(self.weights)
            values = torch.count_nonzero(self.weights)
        if layer.reproducible:
            self.examples = Examples.of(x.detach(), self.weights, functional.statistics_of)
            return self.examples.extent(values)
        return _message_of(values, functional.statistics_of(x.detach(), self.weights))


def _message_of(values: Tensor | int, statistics: Tensor) -> Tensor:
    """Number of values, count, dof, means and m2 of one group, as (3 + 2 C).

    The number of values is sent too, because the count is the sum of the weights.
    """
    count, mean, low, m2, dof = statistics[0]
    number = torch.as_tensor(values, device=mean.device).double()
    numbers = torch.stack([number, count[:1].sum(), dof[:1].sum()])
    return torch.cat([numbers, mean + low, m2])


def _statistics_in(messages: Tensor) -> Tensor:
    """The statistics (parts, 5, C) in messages (parts, 3 + 2 C)."""
    _, count, dof = messages[:, :3, None].unbind(1)
    mean, m2 = messages[:, 3:].chunk(2, dim=1)
    zero = torch.zeros_like(mean)
    return torch.stack([count + zero, mean, zero, m2, dof + zero], dim=1)
