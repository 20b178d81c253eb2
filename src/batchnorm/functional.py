"""Batch normalization as plain functions on NumPy arrays."""

from __future__ import annotations

from typing import Any

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
    "batch_norm_inverse",
    "normalize",
]


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
    weights : (N, C, *S) or None
        Zero where `x` is masked. The channel axis has stride 0 unless the masks of channels differ.
    mean, mean_low, var : (C,)
        The statistics by which x was normalized. The mean is `mean` + `mean_low`, in which the
        second is what rounding has removed from the first.
    training : bool
        Whether the statistics depend on `x`, so that the gradient includes them.
    """

    x: Array
    gamma: Array | None
    gamma_dtype: np.dtype[Any] | None
    beta_dtype: np.dtype[Any] | None

    __slots__ = (
        "beta_dtype", "channel_axis", "eps", "gamma", "gamma_dtype", "statistics", "training",
        "weights", "x",
    )  # fmt: skip

    def __init__(
        self,
        x: Any,
        statistics: Float64,  # (1, 5, C): count, mean, mean_low, m2, dof
        gamma: Any,
        beta: Any,
        eps: float,
        channel_axis: int,
        weights: Float64 | None,
        training: bool,
    ) -> None:
        self.x = x
        self.statistics = statistics
        # A copy, because an optimizer may step in place before the backward pass.
        self.gamma = None if gamma is None else gamma.copy()
        self.gamma_dtype = None if gamma is None else gamma.dtype
        self.beta_dtype = None if beta is None else beta.dtype
        self.eps = eps
        self.channel_axis = channel_axis
        self.weights = weights
        self.training = training

    @property
    def moments(self) -> Moments:
        """Count, mean and m2 of the batch; in evaluation, which measures nothing, ``Moments()``."""
        if not self.training:
            return Moments()
        count, mean, _, m2, dof = self.statistics[0]
        if not native.shared_by_channels(self.weights, self.channel_axis):
            return moments_without_copy(count, mean, m2, dof)
        number = count[0] if count.size else 0.0
        weighted = self.weights is not None
        return moments_without_copy(number, mean, m2, dof[0] if weighted and dof.size else None)

    @property
    def mean(self) -> Float64:
        """High part of the mean: (C,)."""
        mean: Float64 = self.statistics[0, 1]
        return mean

    @property
    def mean_low(self) -> Float64:
        """Low part of the mean: (C,)."""
        low: Float64 = self.statistics[0, 2]
        return low

    @property
    def var(self) -> Float64:
        """Biased variance: (C,)."""
        count, m2 = self.statistics[0, [0, 3]]
        var: Float64 = np.divide(m2, count, out=np.full(m2.shape, np.nan), where=count > 0)
        return var

    def __repr__(self) -> str:
        """Shape, mode and moments."""
        mode = "training" if self.training else "evaluation"
        return f"Saved(x={self.x.shape} {self.x.dtype}, {mode}, {self.moments!r})"


def normalize(x: ArrayLike, *, eps: float = 1e-5, channel_axis: int = 1) -> Array:
    """Subtract each channel's mean and divide by its standard deviation.

    Parameters
    ----------
    x : (N, C, *S)
        Any strides; channel-first and channel-last arrays are read in place. The masked values of a
        masked array are ignored.
    eps : float
        Added to the variance, inside the root.
    channel_axis : int
        The axis of the channels; -1 for channels-last arrays.

    Returns
    -------
    (N, C, *S)
        In the dtype of `x` (float64 for integers). With the mask of a masked `x`, zero there. Empty
        input gives empty output.

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
        Any strides; channel-first and channel-last arrays are read in place. The masked values of a
        masked array have weight zero.
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
        In the dtype of `x` (float64 for integers), and with its mask. Empty input gives empty
        output.
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
    if weights is None and out is None:
        found = _core.quick_forward(x, gamma, beta, eps, channel_axis)
        if found is not None:
            y, statistics, axis = found
            return y, Saved(x, statistics, gamma, beta, eps, axis, None, True)
    values = native.as_values(x)
    axis = native.channel_axis_of(values, channel_axis)
    channels = values.shape[axis]
    g = native.per_channel(gamma, channels, "gamma", channel_axis)
    b = native.per_channel(beta, channels, "beta", channel_axis)
    eps = native.check_eps(eps)
    w = None if weights is None else native.as_weights(weights, values, axis)
    if (mask := native.mask_of(x)) is not None:
        w = native.hide(w, mask, axis)
    _check_enough_values(values, axis, w)
    y = native.output_like(values, out, _arrays(values, x, gamma, beta, weights))
    statistics = _forward(native.for_core(values), native.for_core(y), axis, eps, g, b, w)
    gamma, beta = (None if v is None else np.asarray(v) for v in (gamma, beta))
    y = native.with_mask_of(x, y)
    return y, Saved(values, statistics, gamma, beta, eps, axis, w, True)


def _forward(
    x: Array,
    y: Array,
    axis: int,
    eps: float,
    gamma: Float64 | None,
    beta: Float64 | None,
    weights: Float64 | None,
) -> Float64:
    """Write y; return the statistics, (1, 5, C)."""
    if weights is None or native.shared_by_channels(weights, axis):
        statistics = np.empty((1, native.ROWS, x.shape[axis]))
        _core.layer_forward(x, y, axis, eps, statistics, 0, gamma, beta, weights)
        return statistics
    xs, ws = (native.channels_first(v, axis) for v in (x, weights))
    ys = np.empty_like(xs)
    found = [
        _forward(v, to, 0, eps, g, b, w)
        for v, to, g, b, w in native.each_channel(xs, ys, gamma, beta, ws)
    ]
    np.moveaxis(y, axis, 0)[...] = ys
    return np.concatenate(found, axis=2)


def batch_norm_backward(
    grad_y: ArrayLike, saved: Saved, *, out: Array | None = None
) -> tuple[Array, Array | None, Array | None]:
    """Gradients of a loss with respect to x, gamma and beta.

    Parameters
    ----------
    grad_y : (N, C, *S)
        ∂L/∂y, in the shape and type of `x`. Masked values of a masked array count as zero.
    saved : Saved
        From the `batch_norm` that made y.
    out : (N, C, *S)
        Array to write grad_x to.

    Returns
    -------
    grad_x : (N, C, *S)
        In the dtype of `x`. In training, it includes the gradient through mean and variance. It is
        zero where `x` is masked.
    grad_gamma, grad_beta : (C,)
        In the type of gamma and beta (float64 for integers); None if those were None. Zeros for
        empty input.

    Raises
    ------
    ShapeError, DTypeError
        `grad_y` or `out` does not have the shape or type of `x`.
    ArgumentError
        `saved` is not what `batch_norm` saved, or `out` shares memory with `grad_y` or x.

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
        raise ArgumentError(
            "saved must be the Saved that batch_norm returned beside y, got "
            f"{type(saved).__name__}. Call y, saved = batch_norm(x, ...) first. "
            "batch_norm_inference saves nothing; for gradients in evaluation, use a BatchNorm "
            "layer and its backward."
        )
    x, statistics, axis, eps = saved.x, saved.statistics, saved.channel_axis, saved.eps
    dtypes = saved.gamma_dtype, saved.beta_dtype
    if saved.weights is None and out is None:
        found: tuple[Array, Array | None, Array | None] | None = _core.quick_backward(
            grad_y, x, statistics, axis, eps, saved.gamma, *dtypes, saved.training
        )
        if found is not None:
            return found
    g = np.asarray(grad_y)
    if g.shape != x.shape:
        raise ShapeError(f"grad_y must have the shape of x, {x.shape}, got {g.shape}.")
    if g.dtype != x.dtype:
        if g.dtype.kind not in "fiub" and not native.is_bfloat16(g.dtype):
            raise DTypeError(f"grad_y must be real numbers of type {x.dtype}, got {g.dtype}.")
        g = g.astype(x.dtype)
    if (mask := native.mask_of(grad_y)) is not None:
        g = np.where(mask, np.zeros((), g.dtype), g)
    g = native.as_values(g)
    grad_x = native.output_like(x, out, _arrays(x, grad_y))
    gamma = native.per_channel(saved.gamma, x.shape[axis], "gamma", axis)
    arrays = (native.for_core(v) for v in (g, x, grad_x))
    grads = _backward(axis, eps, statistics, saved.training, gamma, saved.weights, *arrays)
    grad_gamma, grad_beta = map(_as_parameter_gradient, grads, dtypes)
    return grad_x, grad_gamma, grad_beta


def _backward(
    axis: int,
    eps: float,
    statistics: Float64,
    measured: bool,
    gamma: Float64 | None,
    weights: Float64 | None,
    grad_y: Array,
    x: Array,
    grad_x: Array,
) -> Float64:
    """Write grad_x; return the gradients of gamma and beta, (2, C)."""
    if weights is None or native.shared_by_channels(weights, axis):
        grads = np.empty((2, x.shape[axis]))
        _core.layer_backward(
            grad_y, x, grad_x, axis, eps, statistics, measured, gamma=gamma,
            grad_gamma=grads[0], grad_beta=grads[1], weights=weights,
        )  # fmt: skip
        return grads
    ws, gs, xs = (native.channels_first(v, axis) for v in (weights, grad_y, x))
    to = np.empty_like(xs)
    rows = np.ascontiguousarray(statistics.T)
    parts = native.each_channel(rows, gamma, ws, gs, xs, to)
    found = [_backward(0, eps, s, measured, *arrays) for s, *arrays in parts]
    np.moveaxis(grad_x, axis, 0)[...] = to
    return np.concatenate(found, axis=1)


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
        gamma·(x − mean)/√(var + eps) + beta, in the dtype of `x` (float64 for integers). With the
        mask of a masked `x`, zero there.

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
    if out is None:
        found: Array | None = _core.quick_inference(
            x, mean, var, gamma, beta, eps, channel_axis, False
        )
        if found is not None:
            return found
    values = native.as_values(x)
    axis = native.channel_axis_of(values, channel_axis)
    m, v, g, b, eps = _given(mean, var, gamma, beta, eps, values.shape[axis], channel_axis)
    y = native.output_like(values, out, _arrays(values, x, mean, var, gamma, beta))
    return _apply(x, values, y, axis, m, v, eps, g, b)


def _given(
    mean: ArrayLike,
    var: ArrayLike,
    gamma: ArrayLike | None,
    beta: ArrayLike | None,
    eps: float,
    channels: int,
    channel_axis: int,
) -> tuple[Float64, Float64, Float64 | None, Float64 | None, float]:
    """Given statistics and parameters as float64, and ε, checked."""
    if mean is None or var is None:
        raise ArgumentError("mean and var must be given, got None.")
    m, v, g, b = (
        native.per_channel(value, channels, name, channel_axis)
        for name, value in (("mean", mean), ("var", var), ("gamma", gamma), ("beta", beta))
    )
    assert m is not None
    assert v is not None
    eps = native.check_eps(eps)
    native.check_statistics(m, v, eps)
    return m, v, g, b, eps


def _apply(
    x: ArrayLike,
    values: Array,
    y: Array,
    axis: int,
    mean: Float64,
    var: Float64,
    eps: float,
    gamma: Float64 | None,
    beta: Float64 | None,
) -> Array:
    """Write y, and return it with the mask of `x`, whose values are `values`."""
    _core.normalize(
        native.for_core(values), native.for_core(y), axis, mean, None, var, eps, gamma, beta
    )
    if (mask := native.mask_of(x)) is not None:
        y[mask] = 0
    return native.with_mask_of(x, y)


def batch_norm_inverse(
    y: ArrayLike,
    mean: ArrayLike,
    var: ArrayLike,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    *,
    eps: float = 1e-5,
    channel_axis: int = 1,
    out: Array | None = None,
) -> Array:
    """Return the x whose `batch_norm_inference` is `y`.

    Parameters
    ----------
    y : (N, C, *S)
        Any strides; channel-first and channel-last arrays are read in place.
    mean, var : (C,)
        The statistics by which x was normalized; for a training batch, the mean and the biased
        variance of ``saved.moments``.
    gamma, beta : (C,)
        Scale and shift; None means 1 and 0.
    eps : float
        Added to `var`, inside the root.
    channel_axis : int
        The axis of the channels; -1 for channels-last arrays.
    out : (N, C, *S)
        Array to write x to. It has the shape and type of `y`, and shares no memory with an input.

    Returns
    -------
    (N, C, *S)
        (y − beta)·√(var + eps)/gamma + mean, in the dtype of `y` (float64 for integers). With the
        mask of a masked `y`, zero there.

    Raises
    ------
    ShapeError
        A per-channel argument is not (C,), or `out` has another shape than `y`.
    DTypeError
        An argument is not real numbers, or `out` is of another type than `y`.
    ArgumentError
        `gamma` is zero or not finite (the channel is named), or an argument is one that
        `batch_norm_inference` refuses.

    Notes
    -----
    Where y was rounded to float32 or narrower, x has an error of the size of y's rounding errors
    times √(var + eps)/gamma.

    Examples
    --------
    >>> import numpy as np, batchnorm
    >>> x, mean, var = np.array([[1.0], [7.0]]), [3.0], [4.0]
    >>> y = batchnorm.batch_norm_inference(x, mean, var, gamma=[0.5], eps=0.0)
    >>> batchnorm.batch_norm_inverse(y, mean, var, gamma=[0.5], eps=0.0)
    array([[1.],
           [7.]])
    """
    values = native.as_values(y, "y")
    axis = native.channel_axis_of(values, channel_axis, "y")
    m, v, g, b, eps = _given(mean, var, gamma, beta, eps, values.shape[axis], channel_axis)
    g = np.ones_like(v) if g is None else g
    b = np.zeros_like(v) if b is None else b
    native.check_finite(b, "beta")
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        scale = np.sqrt(v + eps) / g
    wrong = ~np.isfinite(scale) | (scale == 0)
    if wrong.any():
        raise ArgumentError(
            "gamma must be finite, and not zero or next to it, to be inverted, got "
            f"{native.in_channel(g, wrong)}. There, y tells nothing about x."
        )
    x = native.output_like(values, out, _arrays(values, y, mean, var, gamma, beta), "y")
    # The same affine map of each channel, with the parts of statistics and parameters exchanged.
    return _apply(y, values, x, axis, b, np.ones_like(v), 0.0, scale, m)


def inference(
    x: Array,
    mean: Float64,
    var: Float64,
    gamma: Array | None,
    beta: Array | None,
    eps: float,
    channel_axis: int,
) -> tuple[Array, Saved]:
    """`batch_norm_inference`, and what the backward pass in evaluation needs."""
    found = _core.quick_inference(x, mean, var, gamma, beta, eps, channel_axis, True)
    if found is not None:
        y, statistics, axis = found
        return y, Saved(x, statistics, gamma, beta, eps, axis, None, False)
    y = batch_norm_inference(x, mean, var, gamma, beta, eps=eps, channel_axis=channel_axis)
    values = native.as_values(x)
    axis = native.channel_axis_of(values, channel_axis)
    channels = values.shape[axis]
    m, v = (native.per_channel(value, channels, "mean", axis) for value in (mean, var))
    statistics = np.empty((1, native.ROWS, channels))
    _core.given_statistics(m, v, statistics)
    hidden = native.hide(None, native.mask_of(x), axis)
    return y, Saved(values, statistics, gamma, beta, eps, axis, hidden, False)


def _arrays(*candidates: object) -> tuple[Array, ...]:
    return tuple(a for a in candidates if isinstance(a, np.ndarray))


def _check_enough_values(x: Array, axis: int, weights: Float64 | None) -> None:
    channels = x.shape[axis]
    if channels == 0:
        return
    what, where = "value of non-zero weight per channel", ""
    if weights is None:
        alone, what = x.size == channels, "value per channel"
    elif native.shared_by_channels(weights, axis):
        alone = np.count_nonzero(weights.take(0, axis)) == 1
    else:
        others = tuple(k for k in range(x.ndim) if k != axis)
        number = np.count_nonzero(weights, axis=others).tolist()
        alone = 1 in number
        where = f", of which channel {number.index(1)} has one such value" if alone else ""
    if alone:
        raise ShapeError(
            f"x must have more than one {what} to be normalized by its own statistics, got shape "
            f"{x.shape} with channel axis {axis}{where}. Use a larger batch, or "
            "batch_norm_inference with population statistics."
        )


def _as_parameter_gradient(value: Float64, dtype: np.dtype[np.generic] | None) -> Array | None:
    if dtype is None:
        return None
    floating = dtype.kind == "f" or native.is_bfloat16(dtype)
    return value.astype(dtype) if floating else value
