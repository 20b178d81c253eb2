"""Batch normalization as plain functions on NumPy arrays."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from . import _core, native
from .errors import ArgumentError, DTypeError, ShapeError
from .moments import Moments, moments_without_copy
from .native import Array, Float64

__all__ = [
    "Saved",
    "batch_norm",
    "batch_norm_backward",
    "batch_norm_inference",
    "normalize",
]


@dataclass(frozen=True, eq=False, repr=False)
class Saved:
    """What `batch_norm_backward` needs; returned by `batch_norm`.

    Attributes
    ----------
    moments : Moments
        The statistics of the batch.
    x : (N, C, *S)
        The input itself, not a copy. If it changes, the gradient changes.
    gamma : (C,) or None
    gamma_dtype, beta_dtype : dtype or None
        Types of the arguments; None for those that were not given.
    eps : float
    channel_axis : int
        Counted from the front.
    weights : (N, *S), broadcast to the shape of `x`, or None
    mean, mean_low, var : (C,)
        The statistics by which x was normalized. The mean is `mean` + `mean_low`, in which the
        second is what rounding has removed from the first.
    training : bool
        Whether the statistics depend on `x`, so that the gradient includes them.
    """

    moments: Moments
    x: Array
    gamma: Float64 | None
    gamma_dtype: np.dtype[np.generic] | None
    beta_dtype: np.dtype[np.generic] | None
    eps: float
    channel_axis: int
    weights: Float64 | None
    mean: Float64
    mean_low: Float64
    var: Float64
    training: bool

    def __repr__(self) -> str:
        """Shape, mode and moments."""
        mode = "training" if self.training else "evaluation"
        return f"Saved(x={self.x.shape} {self.x.dtype}, {mode}, {self.moments!r})"


def normalize(x: ArrayLike, *, eps: float = 1e-5, channel_axis: int = 1) -> Array:
    """Subtract each channel's mean and divide by its standard deviation.

    Parameters
    ----------
    x : (N, C, *S)
        Any strides; channel-first and channel-last arrays are read in place.
    eps : float
        Added to the variance, inside the root.
    channel_axis : int
        The axis of the channels; -1 for channels-last arrays.

    Returns
    -------
    (N, C, *S)
        In the dtype of `x` (float64 for integers). Empty input gives empty output.

    Raises
    ------
    ShapeError
        `x` has fewer than two axes, or one value per channel.
    DTypeError
        `x` is not real numbers.

    References
    ----------
    Ioffe & Szegedy (2015), Algorithm 1 without scale and shift.

    Examples
    --------
    >>> import numpy as np, batchnorm
    >>> batchnorm.normalize(np.array([[1.0, 10.0], [3.0, 30.0]]), eps=0.0)
    array([[-1., -1.],
           [ 1.,  1.]])
    """
    y, _ = batch_norm(x, eps=eps, channel_axis=channel_axis)
    return y


def batch_norm(
    x: ArrayLike,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    *,
    eps: float = 1e-5,
    channel_axis: int = 1,
    weights: ArrayLike | None = None,
    out: Array | None = None,
) -> tuple[Array, Saved]:
    """Normalize each channel of `x` by its batch mean and biased variance.

    Parameters
    ----------
    x : (N, C, *S)
        Any strides; channel-first and channel-last arrays are read in place.
    gamma, beta : (C,)
        Scale and shift; None means 1 and 0. May be of a wider type than `x`.
    eps : float
        Added to the variance, inside the root.
    channel_axis : int
        The axis of the channels; -1 for channels-last arrays.
    weights : broadcasts to (N, *S)
        Weight of each value in the statistics; a mask is 0 and 1. Values with weight zero are
        ignored, in x and in grad_y, even NaN and infinity; y and grad_x are zero there. If all
        weights are zero, y is zero and the moments are empty.
    out : (N, C, *S)
        Array to write y to. It has the shape and type of `x`, and shares no memory with an input.

    Returns
    -------
    y : (N, C, *S)
        In the dtype of `x` (float64 for integers). Empty input gives empty output.
    saved : Saved
        What `batch_norm_backward` needs; `saved.moments` is the batch's statistics.

    Raises
    ------
    ShapeError
        The shape of `gamma`, `beta`, `weights` or `out` does not fit `x`, or a channel has only one
        value. Its variance is zero, so y would be beta, whatever x is.
    DTypeError
        An argument is not real numbers, or `out` is of another type than `x`.
    ArgumentError
        `eps` or a weight is negative or not finite, or `out` shares memory with an input.

    References
    ----------
    Ioffe & Szegedy (2015), Algorithm 1; for (N, C, *S) section 3.2.

    Examples
    --------
    >>> import numpy as np, batchnorm
    >>> x = np.array([[1.0, 10.0], [3.0, 30.0]])
    >>> y, saved = batchnorm.batch_norm(x, gamma=[2.0, 1.0], beta=[0.0, 5.0], eps=0.0)
    >>> y
    array([[-2.,  4.],
           [ 2.,  6.]])
    >>> saved.moments.mean, saved.moments.var()
    (array([ 2., 20.]), array([  1., 100.]))
    """
    values = native.aligned(native.as_values(x))
    axis = native.channel_axis_of(values, channel_axis)
    channels = values.shape[axis]
    g = native.per_channel(gamma, channels, "gamma", channel_axis)
    b = native.per_channel(beta, channels, "beta", channel_axis)
    eps = native.check_eps(eps)
    w = None if weights is None else native.as_weights(weights, values, axis)
    _check_enough_values(values, axis, w)
    y = native.output_like(values, out, _arrays(values, x, gamma, beta, weights))

    mean, low, m2 = np.empty((3, channels))
    count, dof = _core.forward(
        native.for_core(values), native.for_core(y), axis, eps, mean, low, m2, g, b, weights=w
    )
    batch = moments_without_copy(count, mean, m2, None if w is None else dof)
    saved = Saved(
        moments=batch,
        x=values,
        gamma=None if g is None else g.copy(),  # an optimizer may step in place before backward
        gamma_dtype=None if gamma is None else np.asarray(gamma).dtype,
        beta_dtype=None if beta is None else np.asarray(beta).dtype,
        eps=eps,
        channel_axis=axis,
        weights=w,
        mean=mean,
        mean_low=low,
        # Without values every gradient is zero, so any variance will do.
        var=batch.var() if count > 0 else np.ones(channels),
        training=True,
    )
    return y, saved


def batch_norm_backward(
    grad_y: ArrayLike, saved: Saved, *, out: Array | None = None
) -> tuple[Array, Array | None, Array | None]:
    """Gradients of a loss with respect to x, gamma and beta.

    Parameters
    ----------
    grad_y : (N, C, *S)
        ∂L/∂y, in the shape and type of `x`.
    saved : Saved
        From the `batch_norm` that made y.
    out : (N, C, *S)
        Array to write grad_x to.

    Returns
    -------
    grad_x : (N, C, *S)
        In the dtype of `x`. In training, it includes the gradient through mean and variance.
    grad_gamma, grad_beta : (C,)
        In the type of gamma and beta (float64 for integers); None if those were None. Zeros for
        empty input.

    Raises
    ------
    ShapeError, DTypeError
        `grad_y` or `out` does not have the shape or type of `x`.
    ArgumentError
        `out` shares memory with `grad_y` or x.

    Notes
    -----
    grad_x = γ/√(var+ε) · (grad_y − Σgrad_y/m − x̂·Σ(grad_y·x̂)/m). This is the derivation on page 4
    of the paper, simplified to two sums; `batchnorm.reference` has the equations as printed.

    References
    ----------
    Ioffe & Szegedy (2015), section 3.

    Examples
    --------
    >>> import numpy as np, batchnorm
    >>> x = np.array([[1.0], [2.0], [6.0]])
    >>> y, saved = batchnorm.batch_norm(x, gamma=[2.0], eps=0.0)
    >>> grad_x, grad_gamma, grad_beta = batchnorm.batch_norm_backward(np.ones((3, 1)), saved)
    >>> bool(np.abs(grad_x).max() < 1e-15)  # no change of x shifts all of y
    True
    """
    if not isinstance(saved, Saved):
        raise ArgumentError(f"saved must be what batch_norm returned, got {type(saved).__name__}.")
    x = saved.x
    g = np.asarray(grad_y)
    if g.shape != x.shape:
        raise ShapeError(f"grad_y must have the shape of x, {x.shape}, got {g.shape}.")
    if g.dtype != x.dtype:
        if g.dtype.kind not in "fiub" and not native.is_bfloat16(g.dtype):
            raise DTypeError(f"grad_y must be real numbers of type {x.dtype}, got {g.dtype}.")
        g = g.astype(x.dtype)
    g = native.aligned(g)
    grad_x = native.output_like(x, out, _arrays(x, grad_y))
    channels = x.shape[saved.channel_axis]
    sum_grad, sum_grad_x_hat = np.empty((2, channels))
    _core.backward_fused(
        native.for_core(g),
        native.for_core(x),
        native.for_core(grad_x),
        saved.channel_axis,
        float(saved.moments.count) if saved.training else 0.0,
        saved.mean,
        saved.mean_low,
        saved.var,
        saved.eps,
        sum_grad,
        sum_grad_x_hat,
        saved.gamma,
        None,
        weights=saved.weights,
    )
    return (
        grad_x,
        _as_parameter_gradient(sum_grad_x_hat, saved.gamma_dtype),
        _as_parameter_gradient(sum_grad, saved.beta_dtype),
    )


def batch_norm_inference(
    x: ArrayLike,
    mean: ArrayLike,
    var: ArrayLike,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    *,
    eps: float = 1e-5,
    channel_axis: int = 1,
    out: Array | None = None,
) -> Array:
    """Normalize each channel of `x` by given statistics, as at test time.

    Parameters
    ----------
    x : (N, C, *S)
        Any strides; channel-first and channel-last arrays are read in place.
    mean, var : (C,)
        Population statistics. May be of a wider type than `x`.
    gamma, beta : (C,)
        Scale and shift; None means 1 and 0.
    eps : float
        Added to `var`, inside the root.
    channel_axis : int
        The axis of the channels; -1 for channels-last arrays.
    out : (N, C, *S)
        Array to write y to. It has the shape and type of `x`, and shares no memory with an input.

    Returns
    -------
    (N, C, *S)
        gamma·(x − mean)/√(var + eps) + beta, in the dtype of `x` (float64 for integers).

    Raises
    ------
    ShapeError
        A per-channel argument is not (C,), or `out` has another shape than `x`.
    DTypeError
        An argument is not real numbers.
    ArgumentError
        `var` is negative or not finite (the channel is named), `mean` is not finite, `eps` is
        negative, var + eps is zero, or `out` shares memory with an input.

    References
    ----------
    Ioffe & Szegedy (2015), Algorithm 2, step 11.

    Examples
    --------
    >>> import numpy as np, batchnorm
    >>> batchnorm.batch_norm_inference(np.array([[1.0], [7.0]]), mean=[3.0], var=[4.0], eps=0.0)
    array([[-1.],
           [ 2.]])
    """
    values = native.aligned(native.as_values(x))
    axis = native.channel_axis_of(values, channel_axis)
    apart = _arrays(values, x, mean, var, gamma, beta)
    y, _ = inference(
        values, axis, mean, var, gamma, beta, eps, out=out, named_axis=channel_axis, apart=apart
    )
    return y


def inference(
    x: Array,
    axis: int,
    mean: ArrayLike,
    var: ArrayLike,
    gamma: ArrayLike | None,
    beta: ArrayLike | None,
    eps: float,
    *,
    out: Array | None = None,
    named_axis: int = 1,
    apart: tuple[Array, ...] = (),
) -> tuple[Array, Saved]:
    """Normalize by given statistics; return y and what the backward pass in evaluation needs."""
    channels = x.shape[axis]
    if mean is None or var is None:
        raise ArgumentError("mean and var must be given, got None.")
    m = native.per_channel(mean, channels, "mean", named_axis)
    v = native.per_channel(var, channels, "var", named_axis)
    g = native.per_channel(gamma, channels, "gamma", named_axis)
    b = native.per_channel(beta, channels, "beta", named_axis)
    assert m is not None
    assert v is not None
    eps = native.check_eps(eps)
    native.check_variance(v)
    if not np.isfinite(m).all():
        c = int(np.flatnonzero(~np.isfinite(m))[0])
        raise ArgumentError(f"mean must be finite, got {m[c]} in channel {c}.")
    if eps == 0 and not v.all():
        c = int(np.flatnonzero(v == 0)[0])
        raise ArgumentError(f"var + eps must be above zero, got 0 in channel {c}; pass eps > 0.")
    y = native.output_like(x, out, apart)
    low = np.zeros(channels)
    _core.normalize(native.for_core(x), native.for_core(y), axis, m, low, v, eps, g, b)
    saved = Saved(
        moments=_NO_MOMENTS,
        x=x,
        gamma=None if g is None else g.copy(),  # an optimizer may step in place before backward
        gamma_dtype=None if gamma is None else np.asarray(gamma).dtype,
        beta_dtype=None if beta is None else np.asarray(beta).dtype,
        eps=eps,
        channel_axis=axis,
        weights=None,
        mean=m,
        mean_low=low,
        var=v,
        training=False,
    )
    return y, saved


_NO_MOMENTS = Moments()  # evaluation measures nothing


def _arrays(*candidates: object) -> tuple[Array, ...]:
    return tuple(a for a in candidates if isinstance(a, np.ndarray))


def _check_enough_values(x: Array, axis: int, weights: Float64 | None) -> None:
    channels = x.shape[axis]
    if channels == 0:
        return
    per_channel = x.size // channels
    if weights is not None:
        one_channel = weights.take(0, axis) if channels else weights
        per_channel = int(np.count_nonzero(one_channel))
    if per_channel == 1:
        what = "value per channel" if weights is None else "value of non-zero weight per channel"
        raise ShapeError(
            f"x must have more than one {what} to be normalized by its own statistics, got shape "
            f"{x.shape} with channel axis {axis}. Use a larger batch, or batch_norm_inference "
            "with population statistics."
        )


def _as_parameter_gradient(value: Float64, dtype: np.dtype[np.generic] | None) -> Array | None:
    if dtype is None:
        return None
    floating = dtype.kind == "f" or native.is_bfloat16(dtype)
    return value.astype(dtype) if floating else value
