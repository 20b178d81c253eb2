"""Torch tensors into the core, by their addresses, and outputs back.

Nothing here knows autograd, nor anything else that looks on between caller and kernel: that is
`operators` and `functional`. All tensors are dense CPU tensors that `fits` let pass.

A call's statistics are one float64 array of shape (groups, 4, C), whose rows are count, mean, what
rounding left off the mean, and biased variance; a count of zero says that they do not depend on x.
They are a NumPy array where torch need not know them: that costs a tenth of a small tensor.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from .. import _core
from ..errors import ArgumentError, BatchNormError, ShapeError
from ..moments import Moments

Statistics = NDArray[np.float64]

_TYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}

# With these types a tensor is what it seems.
_PLAIN = (Tensor, nn.Parameter)

# Above this many bytes outputs come from the core's pool, whose pages are already mapped.
_POOLED_BYTES = 1 << 18

IDENTITY, RELU, LEAKY_RELU = 0, 1, 2


class NonFiniteError(BatchNormError, FloatingPointError):
    """A batch's statistics are not finite, and the layer was told to raise."""


class Form(NamedTuple):
    """What a call computes, besides its tensors.

    Attributes
    ----------
    eps : float
    group_size : int
        Examples that share their statistics; 0 for all.
    activation : int
        Code of the core: 0 none, 1 ReLU, 2 leaky ReLU.
    slope : float
        Of leaky ReLU.
    """

    eps: float
    group_size: int = 0
    activation: int = IDENTITY
    slope: float = 0.01


def fits(*tensors: Tensor | None) -> bool:
    """Whether the core can read these: dense CPU tensors of a supported floating type."""
    for t in tensors:
        if t is not None and not (t.is_cpu and t.dtype in _TYPES and t.layout is torch.strided):
            return False
    return True


def plain(*tensors: Tensor | None) -> bool:
    """Whether nothing but the caller looks on, so that addresses may be used at once."""
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._get_tracing_state() is not None
    ):
        return False
    for t in tensors:  # noqa: SIM110 (a generator takes twice as long)
        if t is not None and (type(t) not in _PLAIN or t.is_neg()):
            return False
    return True


def reads(*tensors: Tensor | None) -> bool:
    """Whether the core can read these, and may at once."""
    return fits(*tensors) and plain(*tensors)


def groups_of(x: Tensor, group_size: int) -> int:
    """Number of groups; a last one of a single value per channel joins the one before it."""
    n = x.shape[0]
    if group_size <= 0 or group_size >= n:
        return 1
    rest = n % group_size  # symbols have no divmod
    return n // group_size + (1 if rest * values_per_example(x) > 1 else 0)


def values_per_example(x: Tensor) -> int:
    """Values of one channel in one example."""
    return math.prod(x.shape[2:])


def given_statistics(mean: Tensor, var: Tensor) -> Statistics:
    """Statistics that do not depend on x; refuses a negative variance."""
    statistics = np.empty((1, 4, mean.shape[0]))
    negative = _core.given_statistics(_seen(mean), _seen(var), statistics)
    if negative >= 0:
        raise ArgumentError(
            f"running_var must not be negative, got {float(var[negative])} in channel {negative}. "
            "Recompute the statistics; a clamped variance would only hide where they went wrong."
        )
    return statistics


def moments(x: Tensor, mask: Tensor | None) -> Statistics:
    """The statistics (1, 4, C) of x, (N, C, *S); `mask` as in `forward`."""
    if mask is not None:
        check_mask(mask)
    mean, low, var = np.empty((3, x.shape[1]))
    weights = None if mask is None else _weights(mask, x)
    count = _core.forward(_seen(x), None, 1, 0.0, mean, low, var, weights=weights)
    if count > 0:
        var /= count
    else:
        var[:] = 1.0
    return np.stack([np.full_like(mean, count), mean, low, var])[None]


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    form: Form,
) -> tuple[Tensor, Statistics]:
    """Normalize by the statistics of x; also return these.

    `mask`: (N, *S) float64 weights. `residual`: as x.
    """
    eps, group_size, activation, slope = form
    if mask is not None:
        check_mask(mask)
        if int(torch.count_nonzero(mask)) == 1:
            raise ShapeError(
                "Expected more than 1 value per channel when training, got one under the mask, "
                f"input size {x.shape}"
            )
    y = empty_like(x)
    statistics = np.empty((groups_of(x, group_size) if group_size else 1, 4, x.shape[1]))
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
    form: Form,
) -> Tensor:
    """Normalize by given statistics."""
    eps, group_size, activation, slope = form
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


Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def backward(
    grad_y: Tensor,
    x: Tensor,
    statistics: Statistics,
    weight: Tensor | None,
    bias: Tensor | None,
    y: Tensor | None,
    mask: Tensor | None,
    form: Form,
    needs: tuple[bool, bool, bool, bool],
) -> Gradients:
    """Gradients with respect to x, weight, bias and residual; None where not needed.

    `y`: where a residual was added before an activation.
    """
    eps, group_size, activation, slope = form
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


def _wide(vector: Tensor | None) -> NDArray[np.float64] | None:
    return None if vector is None else vector.detach().double().contiguous().numpy()


def backward_sums(
    grad_y: Tensor,
    x: Tensor,
    statistics: Statistics,
    weight: Tensor | None,
    bias: Tensor | None,
    y: Tensor | None,
    mask: Tensor | None,
    form: Form,
) -> NDArray[np.float64]:
    """Σ grad_z and Σ grad_z·x̂, (2, C), of one group; the other arguments as in `backward`."""
    sums = np.empty((2, x.shape[1]))
    _, mean, low, var = statistics[0]
    _core.backward_sums(
        _seen(grad_y),
        _seen(x),
        1,
        mean,
        low,
        var,
        form.eps,
        sums[0],
        sums[1],
        _wide(weight),
        _wide(bias),
        None if mask is None else _weights(mask, x),
        None if y is None else _seen(y),
        form.activation,
        form.slope,
    )
    return sums


def backward_by_sums(
    grad_y: Tensor,
    x: Tensor,
    statistics: Statistics,
    sums: NDArray[np.float64],
    weight: Tensor | None,
    bias: Tensor | None,
    y: Tensor | None,
    mask: Tensor | None,
    form: Form,
    need_residual: bool,
) -> tuple[Tensor, Tensor | None]:
    """Gradients with respect to x and residual, of one group whose sums are given."""
    grad_x = empty_like(x)
    grad_residual = empty_like(x) if need_residual else None
    if need_residual and form.activation == IDENTITY:
        y = grad_y  # whose values do not matter then
    count, mean, low, var = statistics[0]
    _core.backward(
        _seen(grad_y),
        _seen(x),
        _seen(grad_x),
        1,
        float(count[:1].sum()),
        mean,
        low,
        var,
        form.eps,
        sums[0],
        sums[1],
        _wide(weight),
        _wide(bias),
        None if mask is None else _weights(mask, x),
        None if y is None else _seen(y),
        None if grad_residual is None else _seen(grad_residual),
        form.activation,
        form.slope,
    )
    return grad_x, grad_residual


def update_running(
    running_mean: Tensor,
    running_var: Tensor,
    tracked: Tensor | None,
    skipped: Tensor | None,
    statistics: Statistics,
    momentum: float | None,
    on_nonfinite: str,
    count_empty: bool,
    name: str,
) -> None:
    """Bring one batch's statistics into the running averages, in place.

    Parameters
    ----------
    running_mean, running_var : (C,)
    tracked : () int64
        Counts batches.
    skipped : () int64
        Counts batches left out because they were not finite.
    statistics : (groups, 4, C)
        Groups are merged: the running statistics are those of the whole batch.
    momentum : float or None
        Weight of the new value; None averages all batches equally.
    on_nonfinite : "skip", "raise" or "propagate"
    count_empty : bool
        Whether a batch without values counts as tracked; it changes nothing else.
    name : str
        Of the layer, for messages.
    """
    if len(statistics) > 1:
        statistics = merged(statistics)
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
        on_nonfinite == "propagate",
        count_empty,
    )
    if bad >= 0 and on_nonfinite != "propagate":
        not_finite(statistics, bad, on_nonfinite, skipped, name)
        return
    if tracked is not None and not counter and (count_empty or statistics[0, 0].any()):
        tracked.add_(1)
    changed = (
        (running_mean, running_var) if tracked is None else (running_mean, running_var, tracked)
    )
    torch.autograd.graph.increment_version(changed)


def merge(
    total: Tensor,
    statistics: Statistics,
    skipped: Tensor | None,
    on_nonfinite: str,
    name: str,
) -> None:
    """Merge a batch's statistics into `total`, (1, 4, C), in place; as `update_running`."""
    batch = merged(statistics)
    bad = np.flatnonzero(~np.isfinite(batch[0]).all(0))
    if len(bad) and on_nonfinite != "propagate":
        not_finite(batch, int(bad[0]), on_nonfinite, skipped, name)
        return
    both = as_moments(total[0].detach().cpu().numpy()) + as_moments(batch[0])
    with torch.no_grad():
        total.copy_(torch.from_numpy(of_moments(both)))


def not_finite(
    statistics: Statistics, channel: int, on_nonfinite: str, skipped: Tensor | None, name: str
) -> None:
    """Raise, or count and warn the first time."""
    mean, var = statistics[0, 1, channel], statistics[0, 3, channel]
    what = (
        f"{name}: the batch's statistics are not finite (channel {channel}: mean {mean}, "
        f"variance {var})"
    )
    if on_nonfinite == "raise":
        raise NonFiniteError(
            f"{what}. Look for an overflow or a division by zero before this layer; "
            "on_nonfinite='skip' leaves such batches out of the running statistics."
        )
    if skipped is not None:
        skipped.add_(1)
        if int(skipped) > 1:
            return
    warnings.warn(
        f"{what}; the running statistics leave it out. Further such batches are only counted, in "
        "nonfinite_batches.",
        RuntimeWarning,
        stacklevel=2,
    )


def merged(statistics: Statistics) -> Statistics:
    """Statistics of several groups as those of one, (1, 4, C)."""
    if len(statistics) == 1:
        return statistics
    return of_moments(Moments.merge(as_moments(group) for group in statistics))


def as_moments(group: Statistics) -> Moments:
    """`Moments` of one group's (4, C)."""
    count, mean, _, var = group
    return Moments(count, mean, var * count)


def of_moments(moments: Moments) -> Statistics:
    """The statistics (1, 4, C) of one group."""
    var = moments.var()
    var[np.broadcast_to(moments.count == 0, var.shape)] = 1.0  # nothing measured: any will do
    count = np.broadcast_to(moments.count, var.shape)
    return np.stack([count, moments.mean, np.zeros_like(var), var])[None]


def empty_like(x: Tensor) -> Tensor:
    """Uninitialised, with the shape, type and strides that `torch.empty_like` gives."""
    if x.nbytes < _POOLED_BYTES:
        return torch.empty_like(x)
    like = x if x.is_contiguous() else torch.empty_like(x, device="meta")
    memory = torch.frombuffer(_core.take(x.nbytes, _seen(x)), dtype=x.dtype)
    # Not a view: autograd forbids changing views that a Function returns in place.
    y = torch.empty(0, dtype=x.dtype)
    return y.set_(memory.untyped_storage(), 0, x.shape, like.stride())


def _address(t: Tensor) -> Any:
    return (t.data_ptr(), _TYPES[t.dtype], t.shape, t.stride())


def _itself(t: Tensor) -> Any:
    return t


def _way_of_seeing() -> Callable[[Tensor], Any]:
    """How the core takes a tensor: itself where torch has DLPack's C exchange, or its address."""
    exchange = getattr(Tensor, "__dlpack_c_exchange_api__", None)
    if exchange is None:
        return _address
    try:
        _core.use_exchange(Tensor, exchange)
    except ValueError:  # of another version than the core knows
        return _address
    return _itself


_seen = _way_of_seeing()


def _weights(mask: Tensor, x: Tensor) -> Any:
    return _seen(mask.unsqueeze(1).expand(x.shape))


def check_mask(mask: Tensor) -> None:
    """Refuse weights that are no weights."""
    if mask.numel() and not (bool(torch.isfinite(mask).all()) and float(mask.min()) >= 0):
        raise ArgumentError(
            "mask must be finite and not negative; use 0 to leave a value out, got values from "
            f"{float(mask.min())} to {float(mask.max())}."
        )
