"""The back end for dense CPU tensors: the native core, called with raw pointers.

It has the functions of `contract`, and no derivatives. Statistics are NumPy arrays here, because
making a tensor takes a tenth of a small call. Calls that torch must see (under compilers, dispatch
modes and transforms) go through `operators`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from .. import _core
from ..errors import ArgumentError
from ..moments import Moments, as_statistics
from ..native import ROWS
from .contract import IDENTITY, Config, Gradients, Needs, check_mask, groups_of
from .internals import gradient_format_of, increment_versions, memory_format_of

Statistics = NDArray[np.float64]

FormatOf = Callable[[Tensor], torch.memory_format]

_TYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}

# From as many bytes on the system is told what to expect.
_LARGE = 1 << 22


def supports(*tensors: Tensor | None) -> bool:
    """Whether these are dense CPU tensors of a supported floating type."""
    for t in tensors:
        if t is not None and not (t.is_cpu and t.dtype in _TYPES and t.layout is torch.strided):
            return False
    return True


#: All of a call without residual, mask and groups, checked and normalized in one crossing: y, and
#: the statistics, or None if given ones need not be kept. None if these are not dense CPU tensors
#: whose shapes fit, with more than one value per channel, or if a given variance is negative.
#: Arguments: x, running mean and variance, weight, bias, whether to measure statistics, whether to
#: keep given ones, and the config's. Not a function of Python: small calls would feel its frame.
plain: Callable[..., tuple[Tensor, Statistics | None] | None] = _core.quick_tensor_forward

#: Gradients of `plain`, and None for the Function's last argument; None if it is not plain.
#: Arguments: grad_y, x, statistics, weight, bias, whether statistics were measured, which of the
#: three gradients are needed, and the config's.
plain_gradients: Callable[..., tuple[Tensor | None, ...] | None] = _core.quick_tensor_backward


# ---- the contract -------------------------------------------------------------------------------


def moments(x: Tensor, mask: Tensor | None) -> Statistics:
    """Statistics of x, as one group."""
    if mask is not None:
        check_mask(mask)
    statistics = np.empty((1, ROWS, x.shape[1]))
    count, mean, low, m2, dof = statistics[0]
    count[:], dof[:] = _core.forward(
        _for_core(x), None, 1, 0.0, mean, low, m2, weights=_weights(mask, x)
    )
    return statistics


def given(mean: Tensor, var: Tensor) -> Statistics:
    """Statistics with a given mean and variance, which are constants.

    Raises
    ------
    ArgumentError
        A variance is negative.
    """
    statistics = np.empty((1, ROWS, mean.shape[0]))
    negative = _core.given_statistics(_for_core(mean), _for_core(var), statistics)
    if negative >= 0:
        raise ArgumentError(
            f"running_var must not be negative, got {float(var[negative])} in channel {negative}. "
            "Recompute the statistics; a clamped variance would only hide where they went wrong."
        )
    return statistics


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    config: Config,
) -> tuple[Tensor, Statistics]:
    """Normalize x by its own statistics; return y and the statistics."""
    eps, group_size, activation, slope = config
    if mask is not None:
        check_mask(mask, training=True, shape=x.shape)
    y = empty_like(x)
    statistics = np.empty((groups_of(x, group_size) if group_size else 1, ROWS, x.shape[1]))
    _core.layer_forward(
        _for_core(x),
        _for_core(y),
        1,
        eps,
        statistics,
        group_size,
        None if weight is None else _for_core(weight),
        None if bias is None else _for_core(bias),
        None if mask is None else _weights(mask, x),
        None if residual is None else _for_core(residual),
        activation,
        slope,
    )
    return y, statistics


def normalize(
    x: Tensor,
    statistics: Statistics,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    config: Config,
) -> Tensor:
    """Normalize x by statistics."""
    eps, group_size, activation, slope = config
    if mask is not None:
        check_mask(mask)
    y = empty_like(x)
    _core.layer_normalize(
        _for_core(x),
        _for_core(y),
        1,
        eps,
        statistics,
        group_size,
        None if weight is None else _for_core(weight),
        None if bias is None else _for_core(bias),
        None if mask is None else _weights(mask, x),
        None if residual is None else _for_core(residual),
        activation,
        slope,
    )
    return y


def gradients(
    grad_y: Tensor,
    x: Tensor,
    statistics: Statistics,
    weight: Tensor | None,
    bias: Tensor | None,
    y: Tensor | None,
    mask: Tensor | None,
    config: Config,
    measured: bool,
    needs: Needs,
) -> Gradients:
    """Gradients of `forward`, or of `normalize` if statistics were not `measured` on x."""
    eps, group_size, activation, slope = config
    need_x, need_weight, need_bias, need_residual = needs
    # The core writes grad_x and grad_residual together.
    grad_x = empty_like(x, gradient_format_of) if need_x or need_residual else None
    grad_residual = empty_like(x, gradient_format_of) if need_residual else None
    grad_weight = torch.empty_like(weight) if need_weight and weight is not None else None
    grad_bias = torch.empty_like(bias) if need_bias and bias is not None else None
    if need_residual and activation == IDENTITY:
        y = grad_y  # the core needs an array here, but not its values
    _core.layer_backward(
        _for_core(grad_y),
        _for_core(x),
        None if grad_x is None else _for_core(grad_x),
        1,
        eps,
        statistics,
        measured,
        group_size,
        None if weight is None else _for_core(weight),
        None if bias is None else _for_core(bias),
        None if grad_weight is None else _for_core(grad_weight),
        None if grad_bias is None else _for_core(grad_bias),
        None if mask is None else _weights(mask, x),
        None if y is None else _for_core(y),
        None if grad_residual is None else _for_core(grad_residual),
        activation,
        slope,
    )
    return grad_x if need_x else None, grad_weight, grad_bias, grad_residual


def backward_sums(
    grad_y: Tensor,
    x: Tensor,
    statistics: Statistics,
    weight: Tensor | None,
    bias: Tensor | None,
    y: Tensor | None,
    mask: Tensor | None,
    config: Config,
) -> Tensor:
    """Σ grad_z and Σ grad_z·x̂, (2, C) float64, of one group."""
    sums = np.empty((2, x.shape[1]))
    mean, low, var = _mean_and_var(statistics)
    _core.backward_sums(
        _for_core(grad_y),
        _for_core(x),
        1,
        mean,
        low,
        var,
        config.eps,
        sums[0],
        sums[1],
        _wide(weight),
        _wide(bias),
        _weights(mask, x),
        None if y is None else _for_core(y),
        config.activation,
        config.slope,
    )
    return torch.from_numpy(sums)


def backward(
    grad_y: Tensor,
    x: Tensor,
    statistics: Statistics,
    sums: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    y: Tensor | None,
    mask: Tensor | None,
    config: Config,
    need_residual: bool,
) -> tuple[Tensor, Tensor | None]:
    """Gradients with respect to x and residual, of one group, from its two sums."""
    grad_x = empty_like(x, gradient_format_of)
    grad_residual = empty_like(x, gradient_format_of) if need_residual else None
    if need_residual and config.activation == IDENTITY:
        y = grad_y  # the core needs an array here, but not its values
    mean, low, var = _mean_and_var(statistics)
    sum_grad, sum_grad_x_hat = sums.numpy()
    _core.backward(
        _for_core(grad_y),
        _for_core(x),
        _for_core(grad_x),
        1,
        float(statistics[0, 0, :1].sum()),
        mean,
        low,
        var,
        config.eps,
        sum_grad,
        sum_grad_x_hat,
        _wide(weight),
        _wide(bias),
        _weights(mask, x),
        None if y is None else _for_core(y),
        None if grad_residual is None else _for_core(grad_residual),
        config.activation,
        config.slope,
    )
    return grad_x, grad_residual


def merge(statistics: Statistics) -> Statistics:
    """Statistics of several groups as those of one."""
    if len(statistics) == 1:
        return statistics
    return as_statistics(Moments.merge(as_moments(group) for group in statistics))


def update_running(
    running_mean: Tensor,
    running_var: Tensor,
    tracked: Tensor | None,
    statistics: Statistics,
    momentum: float | None,
    propagate: bool,
    count_empty: bool,
) -> int:
    """Update the running statistics with one batch, in place.

    Parameters
    ----------
    running_mean, running_var : (C,)
    tracked : () int64
        Counts batches.
    statistics : (groups, 5, C)
        Merged first: the running statistics are those of the whole batch.
    momentum : float or None
        Weight of the new value; None averages all batches equally.
    propagate : bool
        Update also with statistics that are not finite. Otherwise such a batch changes nothing.
    count_empty : bool
        Whether a batch without values counts in `tracked`. It never changes the averages.

    Returns
    -------
    int
        The first channel whose statistics are not finite in the type of the buffers, or -1.
    """
    counter = 0
    if tracked is not None:
        if tracked.dtype is torch.int64:
            counter = tracked.data_ptr()
        elif momentum is None:
            momentum = 1.0 / (float(tracked) + 1.0)
    bad = _core.update_running(
        merge(statistics),
        _for_core(running_mean),
        _for_core(running_var),
        counter,
        math.nan if momentum is None else momentum,
        propagate,
        count_empty,
    )
    if bad >= 0 and not propagate:
        return bad
    if tracked is None:
        increment_versions([running_mean, running_var])
        return bad
    if not counter and (count_empty or statistics[:, 0].any()):
        tracked.add_(1)
    increment_versions([running_mean, running_var, tracked])
    return bad


# ---- tensors and moments ------------------------------------------------------------------------


def as_moments(group: Statistics) -> Moments:
    """`Moments` of one group's (5, C)."""
    count, mean, _, m2, dof = group
    return Moments(count, mean, m2, dof)


def _mean_and_var(statistics: Statistics) -> tuple[Any, Any, Any]:
    count, mean, low, m2, _ = statistics[0]
    var = np.divide(m2, count, out=np.ones_like(m2), where=count > 0)
    return mean, low, var


def _wide(vector: Tensor | None) -> NDArray[np.float64] | None:
    return None if vector is None else vector.detach().double().contiguous().numpy()


def empty_like(x: Tensor, format_of: FormatOf = memory_format_of) -> Tensor:
    """An uninitialized tensor with the shape of x, in the memory format of torch's batch norm."""
    if x.dim() < 4 and x.is_contiguous():
        y = torch.empty_like(x)
    else:
        y = torch.empty_like(x, memory_format=format_of(x))
    if x.nbytes >= _LARGE:
        _core.prepare_output(y.data_ptr(), x.nbytes)
    return y


def _weights(mask: Tensor | None, x: Tensor) -> Any:
    return None if mask is None else _for_core(mask.unsqueeze(1).expand(x.shape))


def _as_address(t: Tensor) -> Any:
    return (t.data_ptr(), _TYPES[t.dtype], t.shape, t.stride())


def _as_itself(t: Tensor) -> Any:
    return t


def _choose_exchange() -> Callable[[Tensor], Any]:
    """Pass tensors to the core themselves, if torch has DLPack's C exchange, or as addresses."""
    exchange = getattr(Tensor, "__dlpack_c_exchange_api__", None)
    if exchange is None:
        return _as_address
    try:
        _core.use_exchange(
            Tensor,
            nn.Parameter,
            exchange,
            torch.empty_like,
            lambda x, gradient: empty_like(x, gradient_format_of if gradient else memory_format_of),
            Tensor.is_neg,
            _LARGE,
        )
    except ValueError:  # a version that the core does not know
        return _as_address
    return _as_itself


_for_core = _choose_exchange()
