"""Batch normalization of torch tensors: a differentiable function with torch's signature.

This module checks the arguments and dispatches the call: to the core directly (`native`), to the
core through torch's dispatcher (`operators`), or to torch's operations (`portable`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import handle_torch_function, has_torch_function_variadic

from ..errors import ArgumentError, DTypeError, ShapeError
from ..moments import Moments
from . import autograd, native, operators, portable, running
from .autograd import Call, NotPlainError, PlainCall, is_differentiated
from .contract import IDENTITY, Config, config_of, joins, values_per_example
from .internals import is_direct, is_eager, is_exporting, is_exporting_to_onnx, is_tracing

__all__ = ["batch_norm"]

# A NumPy array from the native back end; on other devices what torch's own kernels measure.
Statistics = native.Statistics | Tensor | portable.Measured


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
    activation: str | None = None,
    negative_slope: float = 0.01,
    group_size: int | None = None,
) -> Tensor:
    """Normalize each channel, as `torch.nn.functional.batch_norm`, with additional options.

    Parameters
    ----------
    input : (N, C, *S)
        Contiguous, channels-last or any other strides; the output keeps the memory format.
    running_mean, running_var : (C,)
        In training, they are updated in place with the statistics of the batch; None for no
        running statistics. In evaluation, `input` is normalized by them.
    weight, bias : (C,)
        Scale and shift, None for 1 and 0; of any floating type.
    training : bool
        Whether to normalize by the statistics of the batch.
    momentum : float
        Weight of the new value in the running statistics.
    eps : float
        Added to the variance, inside the root.
    residual : broadcasts with (N, C, *S)
        Added before the activation.
    mask : broadcasts to (N, *S)
        Weight of each value in the statistics: booleans, or numbers that are finite and not
        negative; not differentiated. Values with weight zero are ignored, even NaN and infinity,
        and so are their gradients; the output is zero there.
    activation : None, "relu", "leaky_relu", "relu6", "hardswish" or "silu"
        Applied to the result, in the same pass unless a residual precedes hardswish or silu.
    negative_slope : float
        Of "leaky_relu".
    group_size : int
        Number of examples that share their statistics in training (ghost batches); None for all.
        The remaining examples form a smaller group, or join the last one if they have only one
        value per channel. The running statistics are those of the whole batch.

    Returns
    -------
    (N, C, *S)
        In the type of `input`; if the residual has another type or shape, in those of the sum.

    Raises
    ------
    ValueError, RuntimeError
        As torch's function, with its messages. For the arguments that torch does not have, and for
        a negative `running_var`: `ArgumentError` or `ShapeError`, which are ValueErrors. A call
        that raises changes nothing.

    References
    ----------
    Ioffe & Szegedy (2015), Algorithm 1; ghost batches: Hoffer et al. (2017), Algorithm 1.

    Examples
    --------
    >>> import torch
    >>> from batchnorm.torch import functional
    >>> x = torch.tensor([[1.0, 10.0], [3.0, 30.0]])
    >>> functional.batch_norm(x, None, None, training=True, activation="relu", eps=1e-12)
    tensor([[0., 0.],
            [1., 1.]])
    """
    tensors = (input, running_mean, running_var, weight, bias, residual, mask)
    if has_torch_function_variadic(*tensors):
        result: Tensor = handle_torch_function(
            batch_norm,
            tensors,
            input,
            running_mean,
            running_var,
            weight=weight,
            bias=bias,
            training=training,
            momentum=momentum,
            eps=eps,
            residual=residual,
            mask=mask,
            activation=activation,
            negative_slope=negative_slope,
            group_size=group_size,
        )
        return result
    _check_tensors(input, running_mean, running_var, weight, bias)
    config = config_of(eps, group_size, activation, negative_slope)
    y, statistics = normalize(
        input, running_mean, running_var, weight, bias, training, config, residual, mask, momentum
    )
    if training and running_mean is not None and running_var is not None:
        update_running(
            running_mean, running_var, None, None, statistics, momentum, "propagate", mask, ""
        )
    return y


def normalize(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    config: Config,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
    momentum: float | None = 0.0,
) -> tuple[Tensor, Statistics | None]:
    """Check the arguments and normalize; do not update the running statistics.

    Where an exporter or tracer records an evaluation, it sees torch's operator, with `momentum`.

    Returns y and the statistics of the batch (None in evaluation).
    """
    vectors = (running_mean, running_var, weight, bias)
    if (
        residual is None
        and mask is None
        and x.is_cpu
        and is_eager(x)
        and (running_mean is None or not running_mean.requires_grad)
        and (running_var is None or not running_var.requires_grad)
    ):
        # This checks little and relies on the core's checks, which come before any change. If they
        # refuse, the general case below finds out why, or is able to do it.
        if is_differentiated(x, weight, bias):
            plain = PlainCall(running_mean, running_var, training, config)
            try:
                y = autograd.apply_plain(x, weight, bias, plain)
            except NotPlainError:
                pass
            else:
                return y, plain.statistics if training else None
        else:
            found = native.plain(x, *vectors, training, False, *config)
            if found is not None:
                return found if training else (found[0], None)
    check(x, *vectors, training, config)
    weights = None if mask is None else as_weights(mask, x)
    if not training and is_recorded():
        y = _by_torch(x, vectors, momentum or 0.0, config.eps)
        return portable.finish(y, residual, weights, config), None
    if residual is not None and not joins(residual, x, config):
        linear = config._replace(activation=IDENTITY)
        y, statistics = normalize(x, *vectors, training, linear, None, mask, momentum)
        return portable.finish(y, residual, weights, config), statistics
    tensors = (weight, bias, residual, weights)
    if (
        x.dim() < 2
        or not native.supports(x, *tensors, running_mean, running_var)
        or is_exporting_to_onnx()
    ):
        if training and x.dim() >= 2:
            return portable.forward_by_torch(x, *tensors, config)
        y = F.batch_norm(x, *vectors, training, 0.0, config.eps)
        return portable.finish(y, residual, weights, config), None
    backend: Any = native if is_direct(x, *vectors, residual, weights) else operators
    statistics = None
    if not training:
        assert running_mean is not None
        assert running_var is not None
        statistics = backend.given(running_mean, running_var)
    if backend is native and is_differentiated(x, weight, bias, residual):
        call = Call(native, config, weights, statistics, training)
        return autograd.apply(
            x, weight, bias, residual, call
        ), call.statistics if training else None
    if training:
        y, statistics = backend.forward(x, *tensors, config)
        return y, statistics
    return backend.normalize(x, statistics, *tensors, config), None


def is_recorded() -> bool:
    """Whether the call becomes a part of a file, whose readers only know torch's operators."""
    return is_exporting() or is_tracing() or is_exporting_to_onnx()


def _by_torch(x: Tensor, vectors: tuple[Tensor | None, ...], momentum: float, eps: float) -> Tensor:
    """Evaluate by torch's operator, whatever the types of tensors."""
    types = [t.dtype for t in vectors if t is not None]
    given = x
    if any(dtype != x.dtype for dtype in types):
        # It takes vectors of x's type, or all of float32 beside a narrower x.
        wide = torch.float64 if torch.float64 in (x.dtype, *types) else torch.float32
        vectors = tuple(t if t is None or t.dtype == wide else t.to(wide) for t in vectors)
        if wide == torch.float64 and x.dtype != wide:
            given = x.to(wide)
    mean, var, weight, bias = vectors
    y = F.batch_norm(given, mean, var, weight, bias, False, momentum, eps)
    return y if given is x else y.to(x.dtype)


def _is_valid_buffer(t: Tensor, channels: int) -> bool:
    """Whether a tensor with one axis can be a running mean or variance."""
    return t.shape[0] == channels and t.is_floating_point() and not t.requires_grad


# ---- running statistics -------------------------------------------------------------------------


def update_running(
    running_mean: Tensor,
    running_var: Tensor,
    tracked: Tensor | None,
    nonfinite: Tensor | None,
    statistics: Statistics | None,
    momentum: float | None,
    on_nonfinite: str,
    mask: Tensor | None,
    name: str,
) -> None:
    """Update the running statistics with those of a batch (see `running.update_native`)."""
    policy = (momentum, on_nonfinite, mask is None, name)
    buffers = (running_mean, running_var, tracked, nonfinite)
    if statistics is None:
        return
    if not native.supports(running_mean, running_var):
        if isinstance(statistics, np.ndarray):
            statistics = torch.from_numpy(statistics)
        running.update_portable(*buffers, statistics, *policy)
    elif isinstance(statistics, np.ndarray) and is_direct(*buffers):
        running.update_native(*buffers, statistics, *policy)
    else:
        operators.update_running(*buffers, running.as_tensor(statistics), *policy)


def merge_into(
    total: Tensor, statistics: Statistics | None, nonfinite: Tensor | None, *policy: str
) -> None:
    """Merge a batch's statistics into `total` (see `running.merge_into`)."""
    if statistics is not None:
        operators.merge_into(total, running.as_tensor(statistics), nonfinite, *policy)


def measure(x: Tensor, mask: Tensor | None) -> Moments:
    """Moments of a tensor, (N, C, *S), on any device; `mask` as in `batch_norm`."""
    weights = None if mask is None else as_weights(mask, x)
    return native.as_moments(operators.array(statistics_of(x.detach(), weights))[0])


def statistics_of(x: Tensor, weights: Tensor | None) -> Tensor:
    """Statistics (1, 5, C) of a detached x, on its device and without waiting for it."""
    if native.supports(x, weights) and is_direct(x, weights):
        return torch.from_numpy(native.moments(x, weights))
    return portable.moments(x, weights)


# ---- checks -------------------------------------------------------------------------------------


def check(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    config: Config,
    *,
    is_whole_batch: bool = True,
) -> None:
    """Refuse what torch refuses. `is_whole_batch`: False if other processes have parts of it."""
    if is_tracing():
        return  # comparing a traced size would make it constant; the core checks later
    good = x.dim() >= 2 and (config.eps > 0 or (config.eps == 0 and not training))
    vectors = (running_mean, running_var, weight, bias)
    if good:
        channels = x.shape[1]
        for t in vectors:
            if t is not None and (t.dim() != 1 or t.shape[0] != channels or t.device != x.device):
                good = False
        for t in (running_mean, running_var):
            if good and t is not None and not _is_valid_buffer(t, channels):
                good = False
        good = good and (running_mean is None) == (running_var is None)
        if training:
            per_example = values_per_example(x)
            good = good and not (is_whole_batch and x.shape[0] * per_example == 1)
            if good and config.group_size * per_example == 1:
                raise ShapeError(
                    "Expected more than 1 value per channel when training, got input size "
                    f"{x.shape} in groups of {config.group_size}"
                )
        else:
            good = good and running_mean is not None and running_var is not None
    if not good:
        _raise_as_torch(x, running_mean, running_var, weight, bias, training, config.eps)


def _raise_as_torch(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    eps: float,
) -> None:
    """Raise the error of torch's function; or one of ours, if torch raises none."""
    for name, t in (("weight", weight), ("bias", bias)):
        # torch accepts some of these, and fails in an internal assertion for others.
        if x.dim() >= 2 and t is not None and t.dim() != 1 and t.numel() == x.shape[1]:
            raise ShapeError(f"{name} must have shape ({x.shape[1]},), got {tuple(t.shape)}.")
    mean, var = (None if t is None else _copy_of(t) for t in (running_mean, running_var))
    # Contiguous, because for other inputs torch may fail in an internal assertion.
    F.batch_norm(x.contiguous(), mean, var, weight, bias, training, 0.1, eps)
    if x.dim() == 1 and x.numel() == 0:
        return  # torch's own test samples contain this
    raise ShapeError(
        "weight, bias and the running statistics must have shape (C,) and lie on one device with "
        f"input, got input {tuple(x.shape)} on {x.device}."
    )


def _check_tensors(x: object, *vectors: object) -> None:
    names = ("input", "running_mean", "running_var", "weight", "bias")
    for name, t in zip(names, (x, *vectors), strict=True):
        if not isinstance(t, Tensor) and (t is not None or name == "input"):
            raise DTypeError(f"{name} must be a tensor, got {type(t).__name__}.")


def _copy_of(t: Tensor) -> Tensor:
    copy = t.detach().clone()
    return copy.requires_grad_() if t.requires_grad else copy


def as_weights(mask: Tensor, x: Tensor) -> Tensor:
    """`mask` as (N, *S) float64."""
    shape = x.shape[:1] + x.shape[2:]
    if not isinstance(mask, Tensor):
        raise DTypeError(f"mask must be a tensor, got {type(mask).__name__}.")
    if mask.requires_grad:
        raise ArgumentError("mask is not differentiated; pass mask.detach().")
    if mask.is_complex():
        raise ArgumentError(f"mask must be real numbers or booleans, got {mask.dtype}.")
    if mask.dim() == x.dim() and mask.shape[1] == 1:
        mask = mask.squeeze(1)
    try:
        # A copy, since the mask may change before the backward pass.
        weights = torch.broadcast_to(mask.to(x.device, torch.float64, copy=True), shape)
    except RuntimeError:
        raise ShapeError(
            f"mask must broadcast to the shape of input without its channel axis, {tuple(shape)}, "
            f"got {tuple(mask.shape)}."
        ) from None
    return weights.contiguous()
