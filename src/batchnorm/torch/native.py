"""The back end of the native core: dense CPU tensors, taken by their addresses.

It has the functions of `contract`, and knows nothing of autograd. Statistics are NumPy arrays here:
a tensor that torch need not see costs a tenth of a small call. Where torch has to see the call
(compilers, dispatch modes, transforms), `operators` stands in between.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .. import _core
from ..errors import ArgumentError
from ..moments import Moments, as_block
from .contract import IDENTITY, ROWS, Config, Gradients, Needs, check_mask, groups_of
from .internals import memory_format_of

Statistics = NDArray[np.float64]

_TYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}

# Above this many bytes outputs come from the core's pool, whose pages are already mapped.
_POOLED_BYTES = 1 << 18


def supports(*tensors: Tensor | None) -> bool:
    """Whether the core can read these: dense CPU tensors of a supported floating type."""
    for t in tensors:
        if t is not None and not (t.is_cpu and t.dtype in _TYPES and t.layout is torch.strided):
            return False
    return True


# ---- the contract -------------------------------------------------------------------------------


def moments(x: Tensor, mask: Tensor | None) -> Statistics:
    """Statistics of x, as one group."""
    if mask is not None:
        check_mask(mask)
    statistics = np.empty((1, ROWS, x.shape[1]))
    count, mean, low, m2, dof = statistics[0]
    count[:], dof[:] = _core.forward(
        _seen(x), None, 1, 0.0, mean, low, m2, weights=_weights(mask, x)
    )
    return statistics


def given(mean: Tensor, var: Tensor) -> Statistics:
    """Statistics that are given.

    Raises
    ------
    ArgumentError
        A variance is negative.
    """
    statistics = np.empty((1, ROWS, mean.shape[0]))
    negative = _core.given_statistics(_seen(mean), _seen(var), statistics)
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
    """Normalize x by its own statistics; also return these."""
    eps, group_size, activation, slope = config
    if mask is not None:
        check_mask(mask, training=True, shape=x.shape)
    y = empty_like(x)
    statistics = np.empty((groups_of(x, group_size) if group_size else 1, ROWS, x.shape[1]))
    _core.layer_forward(
        _seen(x),
        _seen(y),
        1,
        eps,
        statistics,
        group_size,
        None if weight is None else _seen(weight),
        None if bias is None else _seen(bias),
        None if mask is None else _weights(mask, x),
        None if residual is None else _seen(residual),
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
        _seen(x),
        _seen(y),
        1,
        eps,
        statistics,
        group_size,
        None if weight is None else _seen(weight),
        None if bias is None else _seen(bias),
        None if mask is None else _weights(mask, x),
        None if residual is None else _seen(residual),
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
    """Gradients of `forward`, or of `normalize` where statistics were not `measured` on x."""
    eps, group_size, activation, slope = config
    need_x, need_weight, need_bias, need_residual = needs
    grad_x = empty_like(x) if need_x or need_residual else None  # the core writes both or none
    grad_residual = empty_like(x) if need_residual else None
    grad_weight = torch.empty_like(weight) if need_weight and weight is not None else None
    grad_bias = torch.empty_like(bias) if need_bias and bias is not None else None
    if need_residual and activation == IDENTITY:
        y = grad_y  # whose values do not matter then
    _core.layer_backward(
        _seen(grad_y),
        _seen(x),
        None if grad_x is None else _seen(grad_x),
        1,
        eps,
        statistics,
        measured,
        group_size,
        None if weight is None else _seen(weight),
        None if bias is None else _seen(bias),
        None if grad_weight is None else _seen(grad_weight),
        None if grad_bias is None else _seen(grad_bias),
        None if mask is None else _weights(mask, x),
        None if y is None else _seen(y),
        None if grad_residual is None else _seen(grad_residual),
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
        _seen(grad_y),
        _seen(x),
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
        None if y is None else _seen(y),
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
    """Gradients with respect to x and residual, of one group whose sums are given."""
    grad_x = empty_like(x)
    grad_residual = empty_like(x) if need_residual else None
    if need_residual and config.activation == IDENTITY:
        y = grad_y  # whose values do not matter then
    mean, low, var = _mean_and_var(statistics)
    sum_grad, sum_grad_x_hat = sums.numpy()
    _core.backward(
        _seen(grad_y),
        _seen(x),
        _seen(grad_x),
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
        None if y is None else _seen(y),
        None if grad_residual is None else _seen(grad_residual),
        config.activation,
        config.slope,
    )
    return grad_x, grad_residual


def merge(statistics: Statistics) -> Statistics:
    """Statistics of several groups as those of one."""
    if len(statistics) == 1:
        return statistics
    return as_block(Moments.merge(as_moments(group) for group in statistics))


def update_running(
    running_mean: Tensor,
    running_var: Tensor,
    tracked: Tensor | None,
    statistics: Statistics,
    momentum: float | None,
    propagate: bool,
    count_empty: bool,
) -> int:
    """Bring one batch into the running averages, in place.

    Parameters
    ----------
    running_mean, running_var : (C,)
    tracked : () int64
        Counts batches.
    statistics : (groups, 5, C)
        The running statistics are those of the whole batch.
    momentum : float or None
        Weight of the new value; None averages all batches equally.
    propagate : bool
        Let in what is not finite. Otherwise such a batch changes nothing.
    count_empty : bool
        Whether a batch without values counts as tracked; it changes nothing else.

    Returns
    -------
    int
        The first channel whose statistics are not finite as the buffers hold them, or -1.
    """
    statistics = merge(statistics)
    counter = 0
    if tracked is not None:
        if tracked.dtype is torch.int64:
            counter = tracked.data_ptr()
        elif momentum is None:
            momentum = 1.0 / (float(tracked) + 1.0)
    bad = _core.update_running(
        statistics,
        _seen(running_mean),
        _seen(running_var),
        counter,
        math.nan if momentum is None else momentum,
        propagate,
        count_empty,
    )
    if bad >= 0 and not propagate:
        return bad
    if tracked is not None and not counter and (count_empty or statistics[0, 0].any()):
        tracked.add_(1)
    changed = [t for t in (running_mean, running_var, tracked) if t is not None]
    torch.autograd.graph.increment_version(changed)
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


def empty_like(x: Tensor) -> Tensor:
    """Uninitialised, in the memory format that torch's batch norm gives its output."""
    if x.nbytes < _POOLED_BYTES:
        if x.is_contiguous():
            return torch.empty_like(x)
        return torch.empty_like(x, memory_format=memory_format_of(x))
    like = x
    if not x.is_contiguous():
        like = torch.empty_like(x, device="meta", memory_format=memory_format_of(x))
    memory = torch.frombuffer(_core.take(x.nbytes, _seen(x)), dtype=x.dtype)
    # Not a view: autograd forbids changing views that a Function returns in place.
    y = torch.empty(0, dtype=x.dtype, device="cpu")
    return y.set_(memory.untyped_storage(), 0, x.shape, like.stride())


def _weights(mask: Tensor | None, x: Tensor) -> Any:
    return None if mask is None else _seen(mask.unsqueeze(1).expand(x.shape))


def _address(t: Tensor) -> Any:
    return (t.data_ptr(), _TYPES[t.dtype], t.shape, t.stride())


def _itself(t: Tensor) -> Any:
    return t


def _choose_exchange() -> Callable[[Tensor], Any]:
    """How the core takes a tensor: itself where torch has DLPack's C exchange, or its address."""
    exchange = getattr(Tensor, "__dlpack_c_exchange_api__", None)
    if exchange is None:
        return _address
    try:
        _core.use_exchange(Tensor, exchange)
    except ValueError:  # of another version than the core knows
        return _address
    return _itself


_seen = _choose_exchange()
