"""SyncBatchNorm: one batch that lies on several processes.

Forward, each process sends the moments of its part in float64, in one message; all merge them, in
the order of ranks, to the same bits. Backward, each sends its two sums. Between the messages it is
the layer of one process: the same kernels, with a count that is everybody's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..errors import BatchNormError, ShapeError
from . import derivatives, functional, kernels
from .kernels import IDENTITY, Form
from .modules import Layer

__all__ = ["SyncBatchNorm", "SynchronizationError"]


class SynchronizationError(BatchNormError, RuntimeError):
    """Another process did not take part in an exchange of statistics or gradients."""


class SyncBatchNorm(Layer, nn.SyncBatchNorm):  # type: ignore[misc]
    """torch's SyncBatchNorm, exact, on CPU and GPU, with what it lacks.

    In training the statistics are those of the examples of all processes, weighted by their number:
    processes may bring different numbers of them, or none. Without a process group, or with one of
    a single process, this is plain batch norm. State dict and arguments are torch's; the others are
    keywords, as in `BatchNorm2d`.

    Parameters
    ----------
    num_features : int
        C, of input (N, C, *S).
    eps, momentum, affine, track_running_stats, process_group, device, dtype, bias
        As in `torch.nn.SyncBatchNorm`.
    reproducible : bool
        Statistics are bitwise the same however the same examples are divided among processes of
        one instruction set and memory format, at the price of twice as many messages. y and
        gradients follow from them, but the backward pass sums in the order of processes.
    activation, negative_slope, on_nonfinite, on_single
        As in `BatchNorm2d`; a single value is one in all processes.
    group_size : int
        Examples that share their statistics, all of one process: these are not exchanged for
        normalization, but for the running statistics.

    Raises
    ------
    SynchronizationError
        In forward or backward, a RuntimeError: another process raised in this layer, or did not
        come within the process group's timeout, or has ended. With NCCL, where messages are
        asynchronous, it is PyTorch's watchdog that finds the latter.

    Notes
    -----
    Only processes of one device type share a layer. Weight and bias get the gradients of the
    process's own examples, as in torch, which `DistributedDataParallel` then averages. Backward
    passes can not be differentiated, and `torch.compile` breaks the graph here.

    Examples
    --------
    >>> import torch
    >>> from batchnorm.torch import SyncBatchNorm
    >>> layer = SyncBatchNorm(3, activation="relu")  # without a process group: plain batch norm
    >>> y = layer(torch.randn(8, 3, 4, 4))
    """

    process_group: Any = None
    reproducible: bool = False
    _alone: type[nn.Module] | None = None  # what `convert` has made this of

    EXTRAS: ClassVar[tuple[str, ...]] = (*Layer.EXTRAS, "reproducible", "_alone")

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
        """`convert` without fusion; torch's own would make layers of torch's."""
        from .convert import convert

        return convert(module, fuse=False, sync=True, process_group=process_group)

    def _check_input_dim(self, input: Tensor) -> None:
        """Nothing yet: `_layer` does, where it can tell the other processes."""

    def _is_single(self, x: Tensor, mask: Tensor | None) -> bool:
        return False if self._group() else super()._is_single(x, mask)

    def _group(self) -> Group | None:
        """Whom to exchange statistics with; None: nobody."""
        size = 1
        if dist.is_available() and dist.is_initialized():
            size = dist.get_world_size(self.process_group)
        if size == 1 and not self.reproducible:
            return None
        name = self._name or f"{type(self).__name__}({self.num_features})"
        return Group(size, self.process_group, name)

    def _layer(
        self,
        x: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        batch: bool,
        form: Form,
        residual: Tensor | None,
        mask: Tensor | None,
    ) -> tuple[Tensor, Any]:
        group = self._group() if batch and self.training else None
        tensors = (x, running_mean, running_var, weight, bias)
        if group is None:
            super()._check_input_dim(x)
            return functional.layer(*tensors, batch, form, residual, mask)
        run = _together
        if torch.compiler.is_compiling():
            run = torch.compiler.disable(_together)  # type: ignore[no-untyped-call]
        return run(self, group, *tensors, form, residual, mask)

    def extra_repr(self) -> str:
        """torch's, and what differs from it."""
        return super().extra_repr() + (", reproducible=True" if self.reproducible else "")


def _together(
    layer: SyncBatchNorm,
    group: Group,
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    form: Form,
    residual: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Normalize by the statistics of all processes; return these."""
    channels = layer.num_features
    by_group = form.group_size > 0
    weights: Tensor | None = None
    examples: _Examples | None = None
    y: Tensor | None = None

    def measure() -> Tensor:
        """What this process brings: checked, so that whoever raises does so before the others."""
        nonlocal examples, weights, y
        if torch._C._are_functorch_transforms_active():
            raise RuntimeError(
                f"{group.name} exchanges statistics here, which torch.func's transforms cannot "
                "follow. They can in evaluation, or where it is frozen."
            )
        nn.SyncBatchNorm._check_input_dim(layer, x)
        vectors = (running_mean, running_var, weight, bias)
        single = by_group and layer.on_single == "population" and Layer._is_single(layer, x, mask)
        single = single and running_mean is not None
        functional.check(x, *vectors, not single, form, alone=by_group)
        if x.shape[1] != channels:
            raise ShapeError(f"input must have {channels} channels, got {tuple(x.shape)}.")
        if not x.is_floating_point():
            functional.layer(x, *vectors, True, form)  # torch refuses it
        if by_group:
            y, of_groups = functional.layer(x, *vectors, not single, form, residual, mask)
            if of_groups is None:
                return _message_of(0, torch.zeros(4, channels, device=x.device))
            parts = [_message_of(0, part) for part in torch.as_tensor(of_groups).double()]
            return _message_of(0, _merged(torch.stack(parts))[0])
        if residual is not None:
            functional.check_residual(x, residual)
        values = x.numel() // max(channels, 1)
        if mask is not None:
            weights = functional.as_weights(mask, x)
            if x.device.type == "cpu" or layer.reproducible:
                kernels.check_mask(weights)
        seen = values if weights is None else torch.count_nonzero(weights)
        if layer.reproducible:
            examples = _Examples.of(x.detach(), weights)
            return examples.extent(seen)
        return _message_of(seen, functional.statistics_of(x.detach(), weights)[0])

    reproducible = layer.reproducible and not by_group
    length = 3 + 2 * channels if reproducible else 2 + 2 * channels
    parts = group.gather(measure, length, x.device)
    statistics = _reproducible(examples, parts, group) if examples else _merged(parts)
    if y is not None:
        return y, statistics
    if x.device.type == "cpu" and float(parts[:, 0].sum()) == 1:
        if layer.on_single == "population" and running_mean is not None:
            alone = functional.layer(
                x, running_mean, running_var, weight, bias, False, form, residual, mask
            )
            return alone[0], None
        raise ShapeError(
            "Expected more than 1 value per channel when training, got one in all processes, "
            f"input size {x.shape}"
        )
    joined = residual if residual is None or functional.joins(residual, x, form) else None
    apart = residual is not None and joined is None
    inner = form._replace(activation=IDENTITY) if apart else form
    call = _Call(weights, statistics, inner, group)
    y = _apply(x, weight, bias, joined, call)
    return (functional.finish(y, residual, weights, form) if apart else y), statistics


# ---- messages -----------------------------------------------------------------------------------


class Group:
    """The processes that share a layer's batch, and their messages."""

    def __init__(self, size: int, process_group: Any, name: str) -> None:
        self.size = size
        self.process_group = process_group
        self.name = name

    def gather(self, bring: Callable[[], Tensor], length: int, device: torch.device) -> Tensor:
        """What every process brings, float64 of (size, length).

        A process that raises says so to the others first, and all raise.
        """
        message = torch.zeros(1 + length, dtype=torch.float64, device=device)
        problem: Exception | None = None
        try:
            message[1:] = bring()
        except Exception as error:
            problem = error
            message[0] = 1.0
        if self.size == 1:
            parts = message[None]
        else:
            received = [torch.empty_like(message) for _ in range(self.size)]
            self._exchange("statistics", dist.all_gather, received, message)
            parts = torch.stack(received)
        if problem is not None:
            raise problem
        # On other devices this would wait for the message; the next one then does not come.
        if device.type == "cpu" and bool(parts[:, 0].any()):
            rank = int(parts[:, 0].nonzero()[0, 0])
            raise SynchronizationError(
                f"{self.name}: rank {rank} of the layer's process group raised in this layer. Its "
                "own error says why."
            )
        return parts[:, 1:]

    def add(self, what: str, sums: Tensor) -> Tensor:
        """Sums over all processes, in place."""
        if self.size > 1:
            self._exchange(what, dist.all_reduce, sums)
        return sums

    def _exchange(self, what: str, run: Callable[..., Any], *tensors: Any) -> None:
        try:
            run(*tensors, group=self.process_group)
        except RuntimeError as error:
            rank = dist.get_rank(self.process_group)
            raise SynchronizationError(
                f"{self.name}: rank {rank} of {self.size} could not exchange {what} "
                f"({' '.join(str(error).split())}). If that tells no other reason, another process "
                "has ended, raised elsewhere, or not called this layer; look at what it said."
            ) from error


def _message_of(seen: Tensor | int, statistics: Tensor) -> Tensor:
    """Number of values, count, mean and variance as (2 + 2 C), of one group's (4, C).

    The count is the sum of the weights: it does not tell how many values there are.
    """
    count, mean, _, var = statistics
    numbers = torch.stack([torch.as_tensor(seen, device=mean.device).double(), count[:1].sum()])
    return torch.cat([numbers, mean, var])


def _merged(parts: Tensor) -> Tensor:
    """The statistics (1, 4, C) of all parts, messages of (parts, 2 + 2 C).

    `Moments.merge` in tensors, so that no device has to be waited for: Chan, Golub & LeVeque
    (1979), with the correction of the two-pass algorithm.
    """
    counts, (means, variances) = parts[:, 1:2], parts[:, 2:].chunk(2, dim=1)
    count = counts.sum(0)
    share = counts / torch.where(count > 0, count, 1.0)
    mean = (means * share).sum(0)
    mean = mean + (torch.where(counts > 0, means - mean, 0.0) * share).sum(0)
    # To the mean as it is now: equal parts differ by nothing then, and no square is subtracted.
    delta = torch.where(counts > 0, means - mean, 0.0)
    var = (share * (variances + delta * delta)).sum(0)
    return _block(count.expand_as(mean), mean, torch.where(count > 0, var, 1.0))


def _block(count: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    return torch.stack([count, mean, torch.zeros_like(mean), var])[None]


# ---- the same bits for any division of the examples ---------------------------------------------

#: Values that are turned into integers at once: what is made of them fits a core's cache.
_CHUNK = 1 << 16

#: A float64 of up to 2^51 added to this is rounded to a whole number, which its bits then hold.
_WHOLE = 1.5 * 2.0**52
_WHOLE_BITS = 0x4338000000000000


class _Examples(NamedTuple):
    """Mean and variance of each example, (N, C), and its weight, (N,).

    Each is measured by itself, so that it has the same bits on whatever process. Without axes
    behind the channels the mean is the value, and there is no variance (None).
    """

    mean: Tensor
    var: Tensor | None
    weight: Tensor | None

    @classmethod
    def of(cls, x: Tensor, weights: Tensor | None) -> _Examples:
        if x.dim() == 2:
            return cls(x, None, weights)
        found = x.new_zeros((len(x), 4, x.shape[1]), dtype=torch.float64)
        for n, statistics in enumerate(found):
            w = None if weights is None else weights[n : n + 1]
            statistics.copy_(functional.statistics_of(x[n : n + 1], w)[0])
        count, mean, _, var = found.unbind(1)
        return cls(mean, var, count[:, :1].sum(1))

    def extent(self, seen: Tensor | int) -> Tensor:
        """Number of values seen, and of examples, the largest weight, |mean| and variance: (3+2C).

        Mean and variance are those of each channel.
        """
        rows, channels = self.mean.shape
        largest = torch.zeros((2, channels), dtype=torch.float64, device=self.mean.device)
        top: Tensor | float = 1.0 if self.weight is None else 0.0
        if rows:
            for k, values in enumerate((self.mean, self.var)):
                if values is not None:
                    if self.weight is not None:
                        values = torch.where(self.weight[:, None] > 0, values, 0.0)
                    largest[k] = values.abs().amax(0)
            if self.weight is not None:
                top = self.weight.max()
        numbers = [torch.as_tensor(v, device=largest.device).double() for v in (seen, rows, top)]
        return torch.cat([torch.stack(numbers), largest.flatten()])


def _reproducible(examples: _Examples, extents: Tensor, group: Group) -> Tensor:
    """Statistics (1, 4, C) by sums of integers, which do not depend on the order.

    The second round, of differences to the first one's mean, brings what rounding left off, as in
    the corrected two-pass algorithm. `extents`: of all processes, (parts, 3 + 2 C).
    """
    bits = min(51, 62 - int(extents[:, 1].sum()).bit_length())
    one = _power(bits - torch.frexp(extents[:, 2].max()).exponent)
    largest, widest = extents[:, 3:].amax(0).chunk(2)
    finite = _usable(largest) & _usable(widest)

    (means, variances, weight), zero = examples, torch.zeros_like(largest)
    sums = torch.zeros((3, len(zero)), dtype=torch.int64, device=zero.device)
    sums[0] = (one * len(means)).long() if weight is None else (weight * one).round().long().sum()
    unit, wide = _unit_of(largest), _unit_of(widest)
    sums[1:2] = _whole(means, weight, zero, unit, one, 1)
    if variances is not None:
        sums[2:] = _whole(variances, weight, zero, wide, one, 1)
    total, first, inner = group.add("sums", sums).double()
    some = torch.where(total > 0, total, 1.0)
    mean = torch.where(finite, first / some / unit, 0.0)

    far = group.gather(lambda: _farthest(means, weight, mean), len(mean), mean.device).amax(0)
    finite &= _usable(far)
    unit = _unit_of(far)
    sums = group.add("sums", _whole(means, weight, mean, unit, one, 2))
    rest, square = sums.double() / some / unit
    square = square / unit
    # Below zero is only the rounding of a spread that is nothing beside the mean's own.
    var = (square - rest * rest).clamp(min=0) + inner / some / wide
    mean = torch.where(finite, mean + rest, math.nan)
    var = torch.where(finite, torch.where(total > 0, var, 1.0), math.nan)
    return _block(total / one, mean, var)


def _differences(
    values: Tensor, weight: Tensor | None, shift: Tensor
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Differences of values (N, C) to the shift (C,) in float64, with weights (N, 1), in parts."""
    rows = max(1, _CHUNK // max(1, len(shift)))
    for n in range(0, len(values), rows):
        part = values[n : n + rows].double() - shift
        if weight is None:
            yield part, None
        else:
            w = weight[n : n + rows, None]
            yield part.masked_fill_(w <= 0, 0.0), w


def _farthest(values: Tensor, weight: Tensor | None, shift: Tensor) -> Tensor:
    far = torch.zeros_like(shift)
    for part, _ in _differences(values, weight, shift):
        far = torch.maximum(far, part.abs_().amax(0))
    return far


def _whole(
    values: Tensor,
    weight: Tensor | None,
    shift: Tensor,
    unit: Tensor,
    one: Tensor,
    powers: int,
) -> Tensor:
    """Sums over N of the first powers of (values - shift) * unit, in units of 1 / one: (powers, C).

    Each product with the weight is rounded to a whole number of them by itself. What is no number
    gives one that means nothing.
    """
    sums = torch.zeros((powers, len(shift)), dtype=torch.int64, device=shift.device)
    for part, w in _differences(values, weight, shift):
        part.mul_(unit)
        product = part * (one if w is None else one * w)
        for k in range(powers):
            if k:
                product.mul_(part)
            sums[k] += (product + _WHOLE).view(torch.int64).sub_(_WHOLE_BITS).sum(0)
    return sums


def _unit_of(largest: Tensor) -> Tensor:
    """What brings values up to these below one: a power of two, so that nothing is rounded."""
    return _power(-torch.frexp(torch.where(_usable(largest), largest, 0.0)).exponent)


def _power(exponent: Tensor) -> Tensor:
    """2 to integers, exactly: by the bits of float64, for `pow` may be off in the last."""
    return ((exponent.long().clamp(-1000, 1000) + 1023) << 52).view(torch.float64)


def _usable(largest: Tensor) -> Tensor:
    """Where values up to these can be scaled by `_power`; a spread beyond overflows anyway."""
    return largest < 2.0**1000


# ---- autograd -----------------------------------------------------------------------------------


class _Call:
    """What a call is besides its differentiable tensors."""

    __slots__ = ("form", "group", "mask", "statistics")

    def __init__(self, mask: Tensor | None, statistics: Tensor, form: Form, group: Group) -> None:
        self.mask = mask
        self.statistics = statistics
        self.form = form
        self.group = group


class _Together(torch.autograd.Function):
    """Normalize by the statistics of all processes; x, weight, bias, residual, call."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        call: _Call,
    ) -> Tensor:
        tensors = (weight, bias, residual, call.mask)
        if kernels.reads(x, *tensors):
            y = kernels.normalize(x, call.statistics.numpy(), *tensors, call.form)
        else:
            x_hat, _ = derivatives.normalized_by(_wide(x), call.statistics, call.form.eps)
            y = derivatives.affine(x_hat, weight, bias)
            y = functional.finish(y, residual, call.mask, call.form).to(x.dtype)
        ctx.save_for_backward(x, weight, bias, functional.saved_y(y, residual, call.form))
        ctx.call = call
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> Any:
        call = ctx.call
        x, weight, bias, y = ctx.saved_tensors
        need_x, need_weight, need_bias, need_residual, _ = ctx.needs_input_grad
        grad_y = grad_y.to(x.dtype)
        core = kernels.reads(grad_y, x, weight, bias, y, call.mask)
        arguments = (weight, bias, y, call.mask, call.form)
        if core:
            statistics = call.statistics.numpy()
            sums = torch.from_numpy(kernels.backward_sums(grad_y, x, statistics, *arguments))
        else:
            grad_z, x_hat, inv_std = _grad_z(grad_y, x, call.statistics, *arguments)
            axes = [a for a in range(x.dim()) if a != 1]
            pair = (grad_z, grad_z * x_hat)
            sums = torch.stack([v.sum(axes, dtype=torch.float64) for v in pair])
        own = sums.clone()
        # Others may need these for their x, though this one needs no gradient: it may be empty.
        if need_x or need_weight or need_bias:
            call.group.add("sums of gradients", sums)
        grad_x = grad_residual = None
        passed = need_residual and call.form.activation == IDENTITY and call.mask is None
        if need_x or (need_residual and not passed):
            if core:
                grad_x, grad_residual = kernels.backward_by_sums(
                    grad_y, x, statistics, sums.numpy(), *arguments, need_residual and not passed
                )
            else:
                count = call.statistics[0, 0]
                shared = sums / torch.where(count > 0, count, 1.0)
                level, tilt = (derivatives.column(v, grad_z) for v in shared)
                w = 1.0 if call.mask is None else call.mask.unsqueeze(1).to(grad_z.dtype)
                grad_x = derivatives.pulled(grad_z, x_hat, inv_std, w, level, tilt)
                grad_x = derivatives.affine(grad_x, weight, None).to(x.dtype)
                grad_residual = grad_z.to(x.dtype) if need_residual else None
        if passed:
            grad_residual = grad_y
        return (
            grad_x if need_x else None,
            own[1].to(weight.dtype) if weight is not None and need_weight else None,
            own[0].to(bias.dtype) if bias is not None and need_bias else None,
            grad_residual if need_residual else None,
            None,
        )


_apply: Any = _Together.apply


# ---- what the core does not read, in torch's operations -----------------------------------------


def _wide(x: Tensor) -> Tensor:
    """In float32 or wider, which is quicker than float64 on most devices."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _grad_z(
    grad_y: Tensor,
    x: Tensor,
    statistics: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    y: Tensor | None,
    mask: Tensor | None,
    form: Form,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient before the activation, and x̂, zero where the mask hides; and 1 / std."""
    x_hat, inv_std = derivatives.normalized_by(_wide(x), statistics, form.eps)
    z = derivatives.affine(x_hat, weight, bias) if y is None else y
    grad = grad_y.to(x_hat.dtype) * derivatives.steepness(z, form, x_hat.dtype)
    if mask is not None:
        seen = mask.unsqueeze(1) > 0
        grad, x_hat = torch.where(seen, grad, 0.0), torch.where(seen, x_hat, 0.0)
    return grad, x_hat, inv_std


# ---- DistributedDataParallel --------------------------------------------------------------------


def _let_pass() -> None:
    """Have DistributedDataParallel take our layers on a CPU; torch's own it refuses there."""
    ddp = nn.parallel.DistributedDataParallel
    refuse = getattr(ddp, "_passing_sync_batchnorm_handle", None)
    if refuse is None:
        return

    def check(self: Any, module: nn.Module) -> None:
        layers = [m for m in module.modules() if isinstance(m, nn.SyncBatchNorm)]
        if not all(isinstance(m, SyncBatchNorm) for m in layers):
            refuse(self, module)

    ddp._passing_sync_batchnorm_handle = check  # type: ignore[method-assign]


_let_pass()
