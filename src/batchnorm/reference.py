"""The paper's equations, line for line, in float64.

Read this first; the tests compare the kernels with it. Nothing here is fast, and the rest of the
library does not use it. m is the number of values per channel.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["Cache", "batch_norm", "batch_norm_backward", "batch_norm_inference"]

Float64 = NDArray[np.float64]


@dataclass(frozen=True)
class Cache:
    """Values for the backward pass, named as in the paper; all but `axes` broadcast over x."""

    x: Float64
    mu: Float64
    var: Float64
    x_hat: Float64
    gamma: Float64
    eps: float
    axes: tuple[int, ...]


def _columns(values: ArrayLike | None, x: Float64, axis: int, default: float) -> Float64:
    """A (C,) vector in the shape that broadcasts over x along `axis`."""
    shape = [1] * x.ndim
    shape[axis] = x.shape[axis]
    if values is None:
        return np.full(shape, default)
    return np.asarray(values, np.float64).reshape(shape)


# ---- Algorithm 1: Batch Normalizing Transform ---------------------------------------------------


def batch_norm(
    x: ArrayLike,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    eps: float = 1e-5,
    channel_axis: int = 1,
) -> tuple[Float64, Cache]:
    """Ioffe & Szegedy (2015), Algorithm 1; (N, C, *S) as in section 3.2."""
    x = np.asarray(x, np.float64)
    axis = channel_axis % x.ndim
    axes = tuple(a for a in range(x.ndim) if a != axis)
    m = x.size / x.shape[axis]
    g, b = _columns(gamma, x, axis, 1.0), _columns(beta, x, axis, 0.0)

    mu = x.sum(axes, keepdims=True) / m
    var = ((x - mu) ** 2).sum(axes, keepdims=True) / m
    x_hat = (x - mu) / np.sqrt(var + eps)
    y = g * x_hat + b

    return y, Cache(x, mu, var, x_hat, g, eps, axes)


def batch_norm_backward(grad_y: ArrayLike, cache: Cache) -> tuple[Float64, Float64, Float64]:
    """The gradients as printed in section 3: (grad_x, grad_gamma, grad_beta)."""
    dy = np.asarray(grad_y, np.float64)
    x, mu, var, x_hat, eps, axes = (
        cache.x, cache.mu, cache.var, cache.x_hat, cache.eps, cache.axes,
    )  # fmt: skip
    m = x.size / mu.size

    dx_hat = dy * cache.gamma
    dvar = (dx_hat * (x - mu) * -0.5 * (var + eps) ** -1.5).sum(axes, keepdims=True)
    dmu = (dx_hat * (-1 / np.sqrt(var + eps))).sum(axes, keepdims=True) + dvar * (
        -2 * (x - mu)
    ).sum(axes, keepdims=True) / m
    dx = dx_hat / np.sqrt(var + eps) + dvar * 2 * (x - mu) / m + dmu / m
    dgamma = (dy * x_hat).sum(axes)
    dbeta = dy.sum(axes)

    return dx, dgamma, dbeta


# ---- Algorithm 2, step 11: the network at test time ---------------------------------------------


def batch_norm_inference(
    x: ArrayLike,
    mean: ArrayLike,
    var: ArrayLike,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    eps: float = 1e-5,
    channel_axis: int = 1,
) -> Float64:
    """Ioffe & Szegedy (2015), Algorithm 2, step 11."""
    x = np.asarray(x, np.float64)
    axis = channel_axis % x.ndim
    g, b = _columns(gamma, x, axis, 1.0), _columns(beta, x, axis, 0.0)
    e, v = _columns(mean, x, axis, 0.0), _columns(var, x, axis, 1.0)
    y: Float64 = g / np.sqrt(v + eps) * x + (b - g * e / np.sqrt(v + eps))
    return y
