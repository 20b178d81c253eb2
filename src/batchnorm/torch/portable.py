"""The back end made of torch's operations, for any device, transform and derivative.

It has the functions of `contract`, composed of differentiable operations. It does what the core
cannot: other devices, derivatives of derivatives, forward mode and `torch.func`. On a CPU, where
the core provides the speed, it computes in float64. Elsewhere it computes in float32 (or wider, if
x is), sums in float64, and subtracts the mean in two parts, to keep all its digits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import ArgumentError, DTypeError, ShapeError
from .contract import (
    DOF,
    HARDSWISH,
    IDENTITY,
    LEAKY_RELU,
    RELU,
    RELU6,
    SILU,
    Config,
    Gradients,
    Needs,
    groups_of,
)
from .internals import is_tracing, is_transformed

# ---- the contract -------------------------------------------------------------------------------


def moments(x: Tensor, mask: Tensor | None) -> Tensor:
    """Statistics of x, as one group, without waiting for its device."""
    axes = _all_but_channels(x)
    if mask is None:
        w: Tensor | None = None
        values = _widened(x)
        n = x.numel() // max(x.shape[1], 1)
        count = torch.full((), n, dtype=torch.float64, device=x.device)
        dof = (count - 1).clamp(min=0)
    else:
        w = mask.unsqueeze(1)
        values = torch.where(w > 0, _widened(x), 0.0)
        count, dof = _count_of(mask)
        w = w.to(values.dtype)

    def mean_of(v: Tensor) -> Tensor:
        total = (v if w is None else v * w).sum(axes, keepdim=True, dtype=torch.float64)
        return total / torch.where(count > 0, count, 1.0)

    mean = mean_of(values)
    high = mean.to(values.dtype)
    centered = values - high
    low = mean_of(centered)  # the rest of the mean, and the rounding error of its sum
    var = mean_of(centered * centered) - low * low
    high = high.double()
    mean = high + low
    rows = (count, mean, (high - mean) + low, var * count, dof)
    return torch.stack([row.expand_as(mean).flatten() for row in rows])[None]


def mean_and_var(x: Tensor, correction: int) -> tuple[Tensor, Tensor]:
    """Mean and m2 / (n - correction) by torch's kernel, in float32 or wider, in one pass."""
    wide = torch.promote_types(x.dtype, torch.float32)
    var, mean = torch.var_mean(x.to(wide), _all_but_channels(x), correction=correction)
    return mean, var


def given(mean: Tensor, var: Tensor) -> Tensor:
    """Statistics with a given mean and variance, which are constants."""
    mean, var = mean.double(), var.double()
    zero = torch.zeros_like(mean)
    return torch.stack([zero + 1, mean, zero, var, zero])[None]


def normalize(
    x: Tensor,
    statistics: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    config: Config,
) -> Tensor:
    """Normalize x by statistics."""
    ys = []
    for k, part in _parts(x, config.group_size):
        xs = _masked(x[part], _slice(mask, part))  # keeps NaN there out of the gradients
        x_hat, _ = _normalized(xs, statistics[min(k, len(statistics) - 1)], config.eps)
        z = _affine(x_hat, weight, bias)
        z = z if residual is None else z + residual[part].to(z.dtype)
        ys.append(_masked(_activated(z, config), _slice(mask, part)))
    return _concatenated(ys).to(x.dtype)


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    config: Config,
) -> tuple[Tensor, Tensor]:
    """Normalize x by its own statistics; return y and the statistics, detached."""
    groups = [moments(x[part], _slice(mask, part)) for _, part in _parts(x, config.group_size)]
    statistics = _concatenated(groups)
    return normalize(x, statistics, weight, bias, residual, mask, config), statistics.detach()


def backward_sums(
    grad_y: Tensor,
    x: Tensor,
    statistics: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    y: Tensor | None,
    mask: Tensor | None,
    config: Config,
) -> Tensor:
    """Σ grad_z and Σ grad_z·x̂, (2, C) float64, of one group."""
    grad_z, x_hat, _ = _grad_z(grad_y, x, statistics[0], weight, bias, y, mask, config)
    return _sums(grad_z, x_hat)


def backward(
    grad_y: Tensor,
    x: Tensor,
    statistics: Tensor,
    sums: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    y: Tensor | None,
    mask: Tensor | None,
    config: Config,
    need_residual: bool,
) -> tuple[Tensor, Tensor | None]:
    """Gradients with respect to x and residual, of one group, from its two sums."""
    parts = _grad_z(grad_y, x, statistics[0], weight, bias, y, mask, config)
    grad_x = _grad_x(*parts, sums, statistics[0], weight, mask)
    return grad_x.to(x.dtype), parts[0].to(x.dtype) if need_residual else None


def gradients(
    grad_y: Tensor,
    x: Tensor,
    statistics: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    y: Tensor | None,
    mask: Tensor | None,
    config: Config,
    measured: bool,
    needs: Needs,
) -> Gradients:
    """Gradients that can be differentiated again; if `measured`, statistics are computed anew."""
    grads_x, grads_z, all_sums = [], [], []
    for k, part in _parts(x, config.group_size):
        xs, masks = x[part], _slice(mask, part)
        if measured:
            group = moments(xs, masks)[0]
        else:
            assert statistics is not None
            group = statistics[min(k, len(statistics) - 1)]
        grad_z, x_hat, inv_std = _grad_z(
            grad_y[part], xs, group, weight, bias, _slice(y, part), masks, config
        )
        sums = _sums(grad_z, x_hat)
        shared = sums if measured else None
        grads_x.append(_grad_x(grad_z, x_hat, inv_std, shared, group, weight, masks))
        grads_z.append(grad_z)
        all_sums.append(sums)
    of_bias, of_weight = sum(all_sums[1:], all_sums[0])
    return (
        _concatenated(grads_x).to(x.dtype) if needs[0] else None,
        of_weight.to(weight.dtype) if needs[1] and weight is not None else None,
        of_bias.to(bias.dtype) if needs[2] and bias is not None else None,
        _concatenated(grads_z).to(x.dtype) if needs[3] else None,
    )


def merge(statistics: Tensor) -> Tensor:
    """Statistics of several groups as those of one, without waiting for the device.

    This is `Moments.merge` for tensors (Chan, Golub & LeVeque 1979), with the correction of the
    two-pass algorithm.
    """
    if len(statistics) == 1:
        return statistics
    counts, means, lows, m2s, _ = statistics.unbind(1)
    count, dof = _count_of_groups(statistics)
    share = counts / torch.where(count > 0, count, 1.0)
    means = torch.where(counts > 0, means + lows, 0.0)
    mean = (means * share).sum(0)
    mean = mean + (torch.where(counts > 0, means - mean, 0.0) * share).sum(0)
    # Differences from the rounded mean: equal parts add exactly zero, and nothing cancels.
    delta = torch.where(counts > 0, means - mean, 0.0)
    m2 = (m2s + counts * (delta * delta)).sum(0)
    return torch.stack([count, mean, torch.zeros_like(mean), m2, dof])[None]


def update_running(
    running_mean: Tensor,
    running_var: Tensor,
    tracked: Tensor | None,
    nonfinite: Tensor | None,
    statistics: Tensor | Measured,
    momentum: float | None,
    propagate: bool,
    count_empty: bool,
) -> None:
    """`native.update_running` on any device, without waiting for it.

    A batch that is skipped is counted in `nonfinite`. There are few operations, because each is a
    kernel that the device has to launch.
    """
    with torch.no_grad():
        mean, var, count, dof = _of_batch(statistics, running_mean, running_var)
        used: Tensor | bool = True
        if not propagate and mean.numel():
            # The largest magnitude: NaN if there is one.
            norms = [torch.linalg.vector_norm(v, math.inf) for v in (mean, var)]
            used = finite = torch.maximum(*norms) < math.inf
            if nonfinite is not None:
                nonfinite.add_(~finite)
        if not count_empty:
            used = used & (count > 0)
        if tracked is not None:
            tracked.add_(used)
        if momentum is not None:
            share: Tensor | float = momentum
        else:
            share = 1.0 if tracked is None else 1.0 / tracked.to(running_mean.dtype)
        takes = used & (dof > 0)
        if takes is False:
            return
        for running, new in ((running_mean, mean), (running_var, var)):
            w = share.to(running.dtype) if isinstance(share, Tensor) else share
            running.lerp_(new if takes is True else torch.where(takes, new, running), w)


def finite_channels(
    statistics: Tensor | Measured, running_mean: Tensor, running_var: Tensor
) -> Tensor:
    """Whether each channel's statistics are finite in the type of the buffers, (C,)."""
    mean, var, _, _ = _of_batch(statistics, running_mean, running_var)
    return mean.isfinite() & var.isfinite()


class Measured(NamedTuple):
    """Mean and variance of one batch as torch's own kernels return them.

    Attributes
    ----------
    mean_and_var : (2, C)
        The variance is the unbiased one.
    values : int
        Per channel.
    """

    mean_and_var: Tensor
    values: int

    def statistics(self) -> Tensor:
        """The same as statistics of one group."""
        mean, var = self.mean_and_var.double()
        zero, dof = torch.zeros_like(mean), max(self.values - 1, 0)
        return torch.stack([zero + self.values, mean, zero, var * dof, zero + dof])[None]


def _of_batch(
    statistics: Tensor | Measured, running_mean: Tensor, running_var: Tensor
) -> tuple[Tensor, Tensor, Any, Any]:
    """Mean and unbiased variance in the type of the buffers; count and degrees of freedom."""
    if isinstance(statistics, Measured):
        mean, var = statistics.mean_and_var.to(running_mean.dtype)
        return mean, var.to(running_var.dtype), statistics.values, statistics.values - 1
    count, mean, _, m2, dof = merge(statistics)[0]
    var = m2 / torch.where(dof > 0, dof, 1.0)
    return mean.to(running_mean.dtype), var.to(running_var.dtype), count[:1].sum(), dof[:1].sum()


# ---- residual, activation, mask -----------------------------------------------------------------


def finish(y: Tensor, residual: Tensor | None, mask: Tensor | None, config: Config) -> Tensor:
    """Add a residual that cannot be added in the same pass, activate, and apply the mask."""
    if residual is not None:
        if not is_tracing():  # comparing a traced size would make it constant
            check_residual(y, residual)
        y = y + residual
    return _masked(_activated(y, config), mask)


def check_residual(x: Tensor, residual: object) -> None:
    """Raise if a residual is no tensor beside x that broadcasts with it."""
    if not isinstance(residual, Tensor):
        raise DTypeError(f"residual must be a tensor, got {type(residual).__name__}.")
    if residual.device != x.device:
        raise ArgumentError(
            f"residual must be on the device of input, {x.device}, got {residual.device}."
        )
    try:
        torch.broadcast_shapes(x.shape, residual.shape)  # type: ignore[no-untyped-call]
    except RuntimeError:
        raise ShapeError(
            f"residual must broadcast with input, {tuple(x.shape)}, got {tuple(residual.shape)}."
        ) from None


def _activated(z: Tensor, config: Config) -> Tensor:
    if config.activation == LEAKY_RELU:
        return F.leaky_relu(z, config.slope)
    activations = {RELU: F.relu, RELU6: F.relu6, HARDSWISH: F.hardswish, SILU: F.silu}
    apply = activations.get(config.activation)
    return z if apply is None else apply(z)


def _activation_gradient(z: Tensor, config: Config) -> Tensor | float:
    """The activation's derivative at z. Except for hardswish and silu, y may be given instead."""
    code, one = config.activation, torch.ones_like(z)
    if code == IDENTITY:
        return 1.0
    if code == SILU:
        sigmoid = z.sigmoid()
        return sigmoid * (1 + z * (1 - sigmoid))
    if code == HARDSWISH:
        return torch.where(z >= 3, one, torch.where(z > -3, z / 3 + 0.5, 0.0))
    if code == RELU6:
        return torch.where((z > 0) & (z < 6), one, 0.0)
    return torch.where(z > 0, one, config.slope if code == LEAKY_RELU else 0.0)


# ---- pieces -------------------------------------------------------------------------------------


def _all_but_channels(x: Tensor) -> list[int]:
    return [a for a in range(x.dim()) if a != 1]


def _widened(x: Tensor) -> Tensor:
    wide = torch.float64 if x.is_cpu else torch.promote_types(x.dtype, torch.float32)
    return x.to(wide)


def _column(v: Tensor, x: Tensor) -> Tensor:
    """A per-channel vector in the type of x, in a shape that broadcasts with x."""
    return v.to(x.dtype).view([-1 if a == 1 else 1 for a in range(x.dim())])


def _masked(v: Tensor, mask: Tensor | None) -> Tensor:
    """Zeros where the mask is zero, even in place of NaN, and v elsewhere."""
    return v if mask is None else torch.where(mask.unsqueeze(1) > 0, v, 0.0)


def _parts(x: Tensor, group_size: int) -> Iterator[tuple[int, slice]]:
    """Yield index and examples of each group."""
    number = groups_of(x, group_size)
    for k in range(number):
        yield k, slice(k * group_size, (k + 1) * group_size if k + 1 < number else None)


def _slice(t: Tensor | None, part: slice) -> Tensor | None:
    return None if t is None else t[part]


def _concatenated(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _count_of(weights: Tensor) -> tuple[Tensor, Tensor]:
    """Σw and Σw - Σw²/Σw; the latter is summed over pairs of weights, so nothing cancels."""
    w = weights.flatten().double()
    count = w.sum()
    before = (w.cumsum(0) - w) / torch.where(count > 0, count, 1.0)
    return count, 2 * (w * before).sum()


def _count_of_groups(statistics: Tensor) -> tuple[Tensor, Tensor]:
    """Count and degrees of freedom of all groups together, (C,), merged as in `Moments`."""
    counts, dofs = statistics[:, 0], statistics[:, DOF]
    count = counts[0]
    dof = dofs[0]
    for c, d in zip(counts[1:], dofs[1:], strict=True):
        total = count + c
        across = c * (count - dof) + count * (c - d)
        dof = dof + d + across / torch.where(total > 0, total, 1.0)
        count = total
    return count, dof


def _normalized(x: Tensor, group: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x̂ by the statistics of one group, and 1 / std of each channel."""
    x = _widened(x)
    count, mean, low, m2, _ = group
    # Without values there is nothing to normalize, so any variance will do.
    var = torch.where(count > 0, m2 / torch.where(count > 0, count, 1.0), 1.0)
    high = mean.to(x.dtype)
    rest = (mean - high) + low
    inv_std = _column((var + eps).rsqrt(), x)
    return (x - _column(high, x) - _column(rest, x)) * inv_std, inv_std


def _affine(x_hat: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    z = x_hat if weight is None else x_hat * _column(weight, x_hat)
    return z if bias is None else z + _column(bias, z)


def _grad_z(
    grad_y: Tensor,
    x: Tensor,
    group: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    y: Tensor | None,
    mask: Tensor | None,
    config: Config,
) -> tuple[Tensor, Tensor, Tensor]:
    """∂z, x̂ and 1 / std; the first two are zero where the mask is zero."""
    if mask is not None:
        x = _masked(x, mask)
    x_hat, inv_std = _normalized(x, group, config.eps)
    z = _affine(x_hat, weight, bias) if y is None else y.to(x_hat.dtype)
    grad_z = _masked(grad_y.to(x_hat.dtype), mask) * _activation_gradient(z, config)
    return grad_z, _masked(x_hat, mask), inv_std


def _sums(grad_z: Tensor, x_hat: Tensor) -> Tensor:
    axes = _all_but_channels(grad_z)
    return torch.stack([v.sum(axes, dtype=torch.float64) for v in (grad_z, grad_z * x_hat)])


def _grad_x(
    grad_z: Tensor,
    x_hat: Tensor,
    inv_std: Tensor,
    sums: Tensor | None,
    group: Tensor,
    weight: Tensor | None,
    mask: Tensor | None,
) -> Tensor:
    """∂x from ∂z and its two channel sums; `sums` is None if the statistics are constant."""
    if sums is not None:
        count = group[0]
        level, tilt = (_column(v, grad_z) for v in sums / torch.where(count > 0, count, 1.0))
        share = level + x_hat * tilt
        grad_z = grad_z - (share if mask is None else share * mask.unsqueeze(1).to(grad_z.dtype))
    return _affine(inv_std * grad_z, weight, None)


# ---- torch's own batch norm, for calls without a mask -------------------------------------------


def forward_by_torch(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    config: Config,
) -> tuple[Tensor, Tensor | Measured]:
    """`forward` by the device's own kernels where they can, with the accuracy that they have."""
    if mask is not None:
        return forward(x, weight, bias, residual, mask, config)
    groups = [
        _group_by_torch(x[part], weight, bias, config.eps)
        for _, part in _parts(x, config.group_size)
    ]
    ys, measured = zip(*groups, strict=True)
    y = finish(_concatenated(list(ys)), residual, None, config)
    if len(groups) == 1:
        return y, measured[0]
    return y, torch.cat([m.statistics() for m in measured])


def _group_by_torch(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Measured]:
    wide = torch.promote_types(x.dtype, torch.float32)
    n = x.numel() // max(x.shape[1], 1)
    if is_transformed(x, weight, bias):
        y = F.batch_norm(x, None, None, weight, bias, True, 0.0, eps)
        return y, Measured(torch.stack(mean_and_var(x.detach(), correction=1)), n)
    # With momentum 1, the running statistics become those of the batch.
    both = torch.zeros((2, x.shape[1]), dtype=wide, device=x.device)
    y = F.batch_norm(x, both[0], both[1], weight, bias, True, 1.0, eps)
    return y, Measured(both, n)
