"""Derivatives: one autograd Function for all eager calls, and the derivatives of the operators.

Reductions over processes take place between kernels, as in inplace_abn: before `normalize` in the
caller, and between `backward_sums` and `backward` in `BatchNormFunction`. Derivatives that are
differentiated again, transforms and forward mode use `portable`.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import native, operators, portable
from .contract import IDENTITY, Config, Gradients, Needs, check_mask, saved_y
from .internals import (
    below_autograd,
    has_dispatch_modes,
    is_batched,
    is_compiling,
    is_direct,
    is_eager,
    is_transformed,
    is_vmapped_gradient,
    uncompiled,
)


class Call:
    """The arguments of a call, besides the tensors that it is differentiated by.

    Attributes
    ----------
    backend : module
        `native`, `portable`, or `operators`, which calls `native` through torch's dispatcher.
    config : Config
    mask : (N, *S) or None
    statistics : (groups, 5, C) or None
        Normalize by these; if None, the forward pass measures them and sets this attribute.
    measured : bool
        Whether the statistics depend on x.
    reduce : callable or None
        Sums the two sums of the backward pass over all processes, in place.
    """

    __slots__ = ("backend", "config", "mask", "measured", "reduce", "statistics")

    def __init__(
        self,
        backend: ModuleType,
        config: Config,
        mask: Tensor | None,
        statistics: Any = None,
        measured: bool = True,
        reduce: Callable[[Tensor], None] | None = None,
    ) -> None:
        self.backend = backend
        self.config = config
        self.mask = mask
        self.statistics = statistics
        self.measured = measured
        self.reduce = reduce

    def tensor(self) -> Tensor:
        """The statistics as a tensor."""
        s = self.statistics
        return torch.from_numpy(s) if isinstance(s, np.ndarray) else s


class BatchNormFunction(torch.autograd.Function):
    """The layer in eager mode, as a function of x, weight, bias, residual and call.

    It has the older form of `forward`, with `ctx`. The newer one, with `setup_context`, costs
    several times as much per call.
    """

    @staticmethod
    def forward(  # noqa: D102
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        call: Call,
    ) -> Any:
        tensors = (weight, bias, residual, call.mask)
        if call.statistics is None:
            y, call.statistics = call.backend.forward(x, *tensors, call.config)
        else:
            y = call.backend.normalize(x, call.statistics, *tensors, call.config)
        ctx.save_for_backward(x, weight, bias, saved_y(y, residual, call.config))
        ctx.call = call
        return y

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> Any:  # noqa: D102
        if ctx.call.reduce is not None:
            return _reduced_backward(ctx, grad_y)
        return (*_gradients(ctx.call, ctx.needs_input_grad, grad_y, *ctx.saved_tensors), None)


def _gradients(
    call: Call,
    needs: Any,
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    y: Tensor | None,
) -> Gradients:
    backend, statistics = call.backend, call.statistics
    rest = (weight, bias, y, call.mask, call.config, call.measured)
    tensors = (grad_y, x, weight, bias, y)
    direct = is_direct(*tensors)
    again = torch.is_grad_enabled() or (not direct and is_transformed(*tensors))
    if is_vmapped_gradient(grad_y) or (again and not is_compiling()):
        return portable.gradients(grad_y, x, call.tensor(), *rest, needs)
    if backend is native and not direct:
        backend, statistics = operators, call.tensor()
    needs, passes = _without_copy(call, needs)
    grad_y = grad_y if grad_y.dtype == x.dtype else grad_y.to(x.dtype)
    a, b, c, d = backend.gradients(grad_y, x, statistics, *rest, needs)
    return a, b, c, grad_y if passes else d


class PlainCall:
    """The arguments of `native.plain` that it is not differentiated by, and its statistics."""

    __slots__ = ("config", "measured", "running_mean", "running_var", "statistics")

    def __init__(
        self,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        measured: bool,
        config: Config,
    ) -> None:
        self.statistics: Any = None
        self.running_mean = running_mean
        self.running_var = running_var
        self.measured = measured
        self.config = config


class NotPlainError(Exception):
    """A call that `native.plain` does not do. Nothing has changed."""


class PlainFunction(torch.autograd.Function):
    """`native.plain` as a function of x, weight and bias: what small layers spend their time on.

    In a network, where a matrix product has emptied the caches before, every Python function on
    the way takes microseconds. So there are few.
    """

    @staticmethod
    def forward(  # noqa: D102
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, call: PlainCall
    ) -> Any:
        mean, var = call.running_mean, call.running_var
        found = native.plain(x, mean, var, weight, bias, call.measured, True, *call.config)
        if found is None:
            raise NotPlainError
        y, call.statistics = found
        ctx.save_for_backward(x, weight, bias)
        ctx.call = call
        return y

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> Any:  # noqa: D102
        call, needs = ctx.call, ctx.needs_input_grad
        x, weight, bias = ctx.saved_tensors
        if not torch.is_grad_enabled() and is_eager(grad_y):
            of_x, of_weight, of_bias, _ = needs
            found = native.plain_gradients(
                grad_y, x, call.statistics, weight, bias, call.measured, of_x, of_weight, of_bias,
                *call.config,
            )  # fmt: skip
            if found is not None:
                return found
        general = Call(native, call.config, None, call.statistics, call.measured)
        a, b, c, _ = _gradients(general, (*needs[:3], False), grad_y, x, weight, bias, None)
        return a, b, c, None


def _without_copy(call: Call, needs: Any) -> tuple[Needs, bool]:
    """What kernels have to compute, and whether the gradient of the residual is grad_y itself."""
    passes = needs[3] and call.config.activation == IDENTITY and call.mask is None
    return (needs[0], needs[1], needs[2], needs[3] and not passes), passes


@once_differentiable  # the sums include those of other processes
def _reduced_backward(ctx: Any, grad_y: Tensor) -> Any:
    """Gradients of a synchronized layer: the two sums are reduced over all processes."""
    call = ctx.call
    x, weight, bias, y = ctx.saved_tensors
    backend, statistics = call.backend, call.statistics
    rest = (weight, bias, y, call.mask, call.config)
    needs, passes = _without_copy(call, ctx.needs_input_grad)
    grad_y = grad_y.to(x.dtype)
    sums = backend.backward_sums(grad_y, x, statistics, *rest)
    own_bias, own_weight = sums.clone()
    # The other processes wait for these sums, even if this one needs no gradient of x.
    if needs[0] or needs[1] or needs[2]:
        call.reduce(sums)
    grad_x = grad_residual = None
    if needs[0] or needs[3]:
        grad_x, grad_residual = backend.backward(grad_y, x, statistics, sums, *rest, needs[3])
    return (
        grad_x if needs[0] else None,
        own_weight.to(weight.dtype) if weight is not None and needs[1] else None,
        own_bias.to(bias.dtype) if bias is not None and needs[2] else None,
        grad_y if passes else grad_residual,
        None,
    )


# Typed here, because torch's stubs do not type it; and looked up only once.
apply: Callable[..., Tensor] = BatchNormFunction.apply

#: `PlainFunction.apply` without its checks for transforms, which take a third of its time.
apply_plain: Callable[..., Tensor] = super(torch.autograd.Function, PlainFunction).apply


def is_differentiated(*tensors: Tensor | None) -> bool:
    """Whether a call on these is recorded for a backward pass."""
    if torch.is_grad_enabled():
        for t in tensors:
            if t is not None and t.requires_grad:
                return True
    return False


# ---- operators ----------------------------------------------------------------------------------


def _forward(x: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    weight, bias, residual, mask = others[:4]
    config = Config(*others[4:])
    if is_transformed(x, weight, bias, residual):
        _check_mask(mask, training=True, shape=x.shape)
        return portable.forward(x, weight, bias, residual, mask, config)
    if not is_differentiated(x, weight, bias, residual):
        with below_autograd():
            return operators.forward(x, weight, bias, residual, mask, config)
    call = Call(operators, config, mask)
    y = apply(x, weight, bias, residual, call)
    return y, call.statistics


def _normalize(x: Tensor, statistics: Tensor, *others: Any) -> Tensor:
    weight, bias, residual, mask = others[:4]
    config = Config(*others[4:])
    if is_transformed(x, weight, bias, residual):
        _check_mask(mask)
        return portable.normalize(x, statistics, weight, bias, residual, mask, config)
    if not is_differentiated(x, weight, bias, residual):
        with below_autograd():
            return operators.normalize(x, statistics, weight, bias, residual, mask, config)
    return apply(x, weight, bias, residual, Call(operators, config, mask, statistics, False))


def _check_mask(mask: Tensor | None, **training: Any) -> None:
    """As the kernels do, where the values of the mask are at hand."""
    if mask is not None and not (is_batched(mask) or has_dispatch_modes()):
        check_mask(mask, **training)


def _update_running(*arguments: Any) -> None:
    with below_autograd():
        torch.ops.batchnorm.update_running(*arguments)


for _name, _kernel in (
    ("forward", _forward),
    ("normalize", _normalize),
    ("update_running", _update_running),
):
    torch.library.impl(f"batchnorm::{_name}", "Autograd")(uncompiled(_kernel))
