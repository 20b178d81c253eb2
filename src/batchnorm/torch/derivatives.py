"""Derivatives of the layer as torch operations, for where a derivative is differentiated again.

One linear map is behind both directions: how x̂ moves with x. `push` applies it to a tangent,
`pull` its transpose to a gradient; without weights they are the same, for the Jacobian of a
normalization is symmetric. All of it is float64 and recomputes the statistics from x, so that it
is differentiable to any order and by any of torch's transforms.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .kernels import IDENTITY, RELU, Form, groups_of

Map = Callable[[Tensor], Tensor]


class _Normalized(NamedTuple):
    x_hat: Tensor
    push: Map
    pull: Map
    visible: Map  # zero where the mask hides
    statistics: Tensor  # (4, C), detached


def _normalized(
    x: Tensor, statistics: Tensor | None, mask: Tensor | None, eps: float
) -> _Normalized:
    axes = [a for a in range(x.dim()) if a != 1]

    def total(v: Tensor) -> Tensor:
        return v.sum(axes, keepdim=True)

    weights = None if mask is None else mask.unsqueeze(1)

    def visible(v: Tensor) -> Tensor:
        return v if weights is None else torch.where(weights > 0, v, 0.0)

    x = visible(x.double())
    if statistics is not None:
        x_hat, inv_std = normalized_by(x, statistics, eps)

        def scaled(v: Tensor) -> Tensor:
            return visible(visible(v) * inv_std)

        return _Normalized(visible(x_hat), scaled, scaled, visible, statistics[0])

    if weights is None:
        count = torch.tensor(x.numel() / max(x.shape[1], 1), dtype=x.dtype, device=x.device)
    else:
        count = weights.sum()
    share = (1.0 if weights is None else weights) / torch.where(count > 0, count, 1.0)
    mean = total(x * share)
    centered = visible(x - mean)
    var = total(centered * centered * share)
    inv_std = (var + eps).rsqrt()
    x_hat = centered * inv_std

    def push(v: Tensor) -> Tensor:
        v = visible(v)
        return visible(inv_std * (v - total(v * share) - x_hat * total(v * x_hat * share)))

    def pull(v: Tensor) -> Tensor:
        v = visible(v)
        return pulled(v, x_hat, inv_std, share, total(v), total(v * x_hat))

    rows = [(v + 0 * mean).detach().flatten() for v in (count, mean, 0 * mean, var)]
    return _Normalized(x_hat, push, pull, visible, torch.stack(rows))


def normalized_by(x: Tensor, statistics: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x̂ by given statistics, and 1 / std of each channel, in the type of x.

    The mean is subtracted in two parts, so that none of it is lost where that type is narrow.
    """
    _, mean, low, var = statistics[0]
    high = mean.to(x.dtype)
    rest = low if high is mean else mean - high + low
    inv_std = column((var + eps).rsqrt(), x)
    return (x - column(high, x) - column(rest, x)) * inv_std, inv_std


def pulled(
    v: Tensor,
    x_hat: Tensor,
    inv_std: Tensor,
    share: Tensor | float,
    level: Tensor,
    tilt: Tensor,
) -> Tensor:
    """The gradient of x from that of x̂, whose sums, times `share`, each value answers for."""
    return inv_std * (v - share * (level + x_hat * tilt))


def column(v: Tensor, x: Tensor) -> Tensor:
    """A per-channel vector beside x, in its type."""
    return v.to(x.dtype).view([-1 if a == 1 else 1 for a in range(x.dim())])


def affine(x_hat: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """What weight and bias make of x̂."""
    z = x_hat if weight is None else x_hat * column(weight, x_hat)
    return z if bias is None else z + column(bias, z)


def steepness(z: Tensor, form: Form, dtype: torch.dtype = torch.float64) -> Tensor | float:
    """The activation's derivative at z, or at y, which has its sign; constant almost everywhere."""
    if form.activation == IDENTITY:
        return 1.0
    below = 0.0 if form.activation == RELU else form.slope
    return torch.where(z > 0, torch.ones_like(z, dtype=dtype), below)


def slices(x: Tensor, group_size: int) -> Iterator[slice]:
    """The examples of each group."""
    number = groups_of(x, group_size)
    for k in range(number):
        yield slice(k * group_size, (k + 1) * group_size if k + 1 < number else None)


def _part(t: Tensor | None, examples: slice) -> Tensor | None:
    return None if t is None else t[examples]


def tangent(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    y: Tensor | None,
    mask: Tensor | None,
    statistics: Tensor | None,
    form: Form,
    dx: Tensor | None,
    dweight: Tensor | None,
    dbias: Tensor | None,
    dresidual: Tensor | None,
) -> Tensor:
    """Tangent of y; a tangent of None is zero.

    `y`: where a residual was added before an activation. `statistics`: None for those of x.
    """
    parts = []
    for examples in slices(x, form.group_size):
        n = _normalized(x[examples], statistics, _part(mask, examples), form.eps)
        dz = torch.zeros_like(n.x_hat)
        if dx is not None:
            moved = n.push(dx[examples].double())
            dz = dz + (moved if weight is None else column(weight, dz) * moved)
        if dweight is not None:
            dz = dz + column(dweight, dz) * n.x_hat
        if dbias is not None:
            dz = dz + column(dbias, dz)
        if dresidual is not None:
            dz = dz + dresidual[examples].double()
        z = affine(n.x_hat, weight, bias) if y is None else y[examples]
        parts.append(n.visible(dz) * steepness(z, form))
    return torch.cat(parts).to(x.dtype)


def gradient(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    y: Tensor | None,
    mask: Tensor | None,
    statistics: Tensor | None,
    form: Form,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    """Gradients with respect to x, weight, bias and residual; `y`, `statistics` as in `tangent`."""
    grad_x, grad_z, grad_weight, grad_bias = [], [], [], []
    for examples in slices(x, form.group_size):
        n = _normalized(x[examples], statistics, _part(mask, examples), form.eps)
        g = n.visible(grad_y[examples].double())
        g = g * steepness(affine(n.x_hat, weight, bias) if y is None else y[examples], form)
        axes = [a for a in range(g.dim()) if a != 1]
        grad_x.append(n.pull(g if weight is None else g * column(weight, g)))
        grad_z.append(g)
        grad_weight.append((g * n.x_hat).sum(axes))
        grad_bias.append(g.sum(axes))
    return (
        torch.cat(grad_x).to(x.dtype),
        None if weight is None else torch.stack(grad_weight).sum(0).to(weight.dtype),
        None if bias is None else torch.stack(grad_bias).sum(0).to(bias.dtype),
        torch.cat(grad_z).to(x.dtype),
    )


def value(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    statistics: Tensor | None,
    form: Form,
) -> tuple[Tensor, Tensor]:
    """What the layer computes, in the same operations; and the statistics of its groups."""
    ys, measured = [], []
    for examples in slices(x, form.group_size):
        n = _normalized(x[examples], statistics, _part(mask, examples), form.eps)
        z = affine(n.x_hat, weight, bias)
        z = z if residual is None else z + residual[examples].double()
        ys.append(n.visible(z * steepness(z, form)))
        measured.append(n.statistics)
    return torch.cat(ys).to(x.dtype), torch.stack(measured)
